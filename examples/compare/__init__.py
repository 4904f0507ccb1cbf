"""A comparison of optimizers over tasks, learning rates and seeds, on all devices, which resumes after interruption.

`examples/compare_optimizers.py` is its command. A *task* (tasks, language, digits, recommender) creates a model and its
data. An *optimizer* (optimizers) updates the model. A *run* (runs) is a combination of a task, an optimizer, a learning
rate and a seed, and is identified by a key. `training.train` takes the steps of a run and measures losses. The
*schedule* (schedule, workers) assigns runs to devices. *Results* (results) are lines of JSON, one per finished run. The
*report* (report, plots) consists of tables and figures of the results.
"""
