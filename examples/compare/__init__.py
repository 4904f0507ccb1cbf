"""A comparison of optimizers: tasks, optimizers, rates and seeds, on all devices there are, resumed where it stopped.

`examples/compare_optimizers.py` is its command. A *task* (tasks, language, digits, recommender) makes a model and its
data; an *optimizer* (optimizers) steps it; a *run* (runs) is one of each with a rate and a seed, and has a key.
`training.train` takes its steps and measures, the *schedule* (schedule, workers) hands runs to devices, *results* are
lines of JSON, one for each finished run, and the *report* (report, plots) makes tables and figures of them.
"""
