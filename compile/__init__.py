"""The engine behind `Collins.step`.

Public names: `Engine`.

A step is a `StepProgram` (program): the parameters that it steps, guards that say whether it may be run again, and an
executor. `Engine.executor` makes one for the `UpdateTask` of all parameters of all groups. Each task goes one of three
ways.

- Through a launch (multi_tensor, kernels): on CUDA devices, where the kernel can take it. Tasks of one dtype, format
  and load share a launch, which finds its tensors through a table of addresses; addresses of gradients and scalars are
  uploaded in one copy (transfer).
- Through a graph (graphs): one for each signature (the static `UpdateSpec`, shapes, strides, dtypes, device), traced
  with fullgraph=True from `collins.update.update_`, the mathematics of eager steps. Hyperparameters, the step
  and the hash constants enter as tensors, so that neither a scheduler nor another parameter of the same signature
  compiles anything new. Small dense tensors of one signature are stacked and stepped in one call. Graphs for the CPU
  are traced with hints for Inductor's C++ backend (cpu_codegen).
- Eagerly, piece by piece: on the CPU by default, odd ends of compiled parameters, and whatever failed to compile.

Inside code that torch.compile traces, a step is one operator (tracing), which performs all of this when the graph runs.
"""

from collins.compile.engine import Engine

__all__ = ["Engine"]
