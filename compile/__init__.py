"""The engine behind `Collins.step`.

Public names: `Engine`.

`Engine.run` takes the `UpdateTask` of all parameters of all groups, and each goes one of three ways.

- Through a launch (launch, kernels): on CUDA devices, where the kernel can take it. Works of one dtype, layout and load
  share a launch, which finds its tensors through a table of addresses.
- Through a graph (graphs): one for each signature (the static `UpdateSpec`, shapes, strides, dtypes, device), traced
  with fullgraph=True from `collins.update.update_`, the function that eager steps call too. Hyperparameters, the step
  and the hash constants enter as tensors, so that neither a scheduler nor another parameter of the same signature
  compiles anything new. Small dense tensors of one signature are stacked and stepped in one call. Graphs for the CPU
  are traced with hints for Inductor's C++ backend (cpu_codegen).
- Eagerly, piece by piece: on the CPU by default, odd ends of compiled parameters, and whatever failed to compile.
"""

from collins.compile.engine import Engine

__all__ = ["Engine"]
