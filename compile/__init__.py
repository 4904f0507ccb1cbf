"""The engine behind `Collins.step`.

Public names: `Engine`.

`Engine.run` takes the `Work` of all parameters of all groups. Work on a device that is to be compiled is sorted into
signatures (the static `Spec`, shapes, strides, dtypes, device); each signature has one graph, traced with
fullgraph=True from `collins.update.update_`, the function that eager steps call too. Hyperparameters, the step and the
hash constants enter as tensors, so that neither a scheduler nor another parameter of the same signature compiles
anything new. Small dense tensors of one signature are stacked and stepped in one call. Everything else, odd ends of
compiled parameters among it, runs eagerly, piece by piece.
"""

from collins.compile.engine import Engine

__all__ = ["Engine"]
