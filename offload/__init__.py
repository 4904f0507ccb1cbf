"""Where tables live, and how those in host memory are stepped on the device.

Public names: `MemoryPolicy`, what the user wants; `place`, which turns it and the figures of `device_figures`,
`host_memory_free` and `host_memory_total` into a `PlacementPlan`; `Request` and `PlacementRow`, its rows before and
after. `python -m collins plan` prints the same plan for a model that need not exist. `TensorSpec`, `Slab`, `grouped`,
`pinned_bytes`, `set_pin_limit`: pinned host memory; `Pipeline` and `streams_for`: what moves it.

Figures are bytes, measured at the moment of the call. Host memory is what the kernel would hand out without swapping,
cut to what the process's control groups still allow; device memory is what the driver reports free plus what PyTorch's
allocator holds in reserve without using it.

`grouped` sorts parameters into buckets; each bucket's moments lie in one `Slab` of pinned host memory. A `Pipeline`
over the slabs stages buckets on the device while others are computed and written back, on the streams of `streams_for`.
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
