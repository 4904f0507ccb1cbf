"""The engine behind `Collins.step`.

Public names: `Engine`.

A step is a `StepProgram` (program): the parameters that it steps, guards that say whether it may be run again, and an
executor. `Engine.executor` makes the executor from the `UpdateTask`s of all parameters of all groups. Each task runs in
one of three ways.

- By a kernel launch (multi_tensor, kernels): on CUDA devices, if the kernel supports the task. Tasks of one dtype,
  format and load share a launch, which finds its tensors through a table of addresses; addresses of gradients and
  scalars are uploaded in one copy (transfer).
- By a graph (graphs): one for each signature (the static `UpdateSpec`, shapes, strides, dtypes, device), traced with
  fullgraph=True from `collins.update.update_`, which eager steps run too. Hyperparameters, the step number and the hash
  constants are input tensors, so neither a scheduler nor another parameter of the same signature causes a
  recompilation. Small dense tensors of one signature are stacked and stepped in one call. Graphs for the CPU are traced
  with hints for Inductor's C++ backend (cpu_codegen).
- Eagerly, piece by piece: on the CPU by default, for the trailing elements of compiled parameters that do not fill a
  bucket, and for everything that failed to compile.

Inside code that torch.compile traces, a step is one operator (tracing), which performs all of this when the graph runs.
"""

from collins.compile.engine import Engine

__all__ = ["Engine"]
