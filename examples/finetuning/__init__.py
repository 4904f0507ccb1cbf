"""What `finetune.py` and `measure_one_card.py` are made of.

`arguments`: of the command line. `folder`: a model's folder, checked, loaded and saved. `data`: JSON lines, tokenized,
with what is trained on. `packing`: documents in rows. `causal_lm`: a model of transformers, prepared for training.
`forecast`: what it takes, and what to change when that is too much. `running`: checkpoints, rate, progress.
"""
