"""The modules of `finetune.py` and `measure_one_card.py`.

`arguments`: the command line. `folder`: checks, loads and saves a model's folder. `data`: tokenizes JSON lines.
`packing`: packs documents into rows. `causal_lm`: prepares a model of transformers for training. `forecast`: plans the
memory, and proposes changes if it does not suffice. `running`: checkpoints, learning rate, progress.
"""
