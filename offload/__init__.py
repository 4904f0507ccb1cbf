"""Placement of tables on the device and on the host, and steps on the device with tables in host memory.

Public names. Placement: `MemoryPolicy`, the user's settings; `place`, which makes a `PlacementPlan` from the policy and
the figures of `device_figures`, `host_memory_free` and `host_memory_total`; `Request` and `PlacementRow`, a parameter
before and after placement. `python -m collins plan` prints the same plan for a model that need not exist. Pinned host
memory: `TensorSpec`, `Slab`, `grouped`, `pinned_bytes`, `set_pin_limit`. Copies: `Pipeline` and `streams_for`.

Figures are bytes, measured at the time of the call. Host memory is the memory that the kernel can allocate without
swapping, limited by the process's control groups; device memory is the memory that the driver reports as free, plus the
memory that PyTorch's allocator has reserved and does not use.

`grouped` divides parameters into transfers; the moments of a transfer are in one `Slab` of pinned host memory. A
`Pipeline` over the slabs stages transfers on the device while others are computed and written back, on the streams of
`streams_for`.
"""

from collins.formats import TensorSpec
from collins.offload.memory import (
    DeviceFigures,
    device_figures,
    device_memory_free,
    host_memory_free,
    host_memory_total,
)
from collins.offload.pipeline import Pipeline
from collins.offload.plan import PlacementPlan, PlacementRow, Request, place
from collins.offload.policy import MemoryPolicy
from collins.offload.slabs import Slab, grouped, pinned_bytes, set_pin_limit
from collins.offload.streams import streams_for

__all__ = [
    "DeviceFigures",
    "MemoryPolicy",
    "Pipeline",
    "PlacementPlan",
    "PlacementRow",
    "Request",
    "Slab",
    "TensorSpec",
    "device_figures",
    "device_memory_free",
    "grouped",
    "host_memory_free",
    "host_memory_total",
    "pinned_bytes",
    "place",
    "set_pin_limit",
    "streams_for",
]
