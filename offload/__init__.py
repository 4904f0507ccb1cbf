"""Where tables live: on the device, or on the host when the device has no room.

Public names: `MemoryPolicy`, what the user wants; `place`, which turns it and the figures of `device_figures`,
`host_memory_free` and `host_memory_total` into a `PlacementPlan`; `Request` and `PlacementRow`, its rows before and
after. `python -m collins plan` prints the same plan for a model that need not exist.

Figures are bytes, measured at the moment of the call. Host memory is what the kernel would hand out without swapping,
cut to what the process's control groups still allow; device memory is what the driver reports free plus what PyTorch's
allocator holds in reserve without using it.
"""

from collins.offload.memory import (
    DeviceFigures,
    device_figures,
    device_memory_free,
    host_memory_free,
    host_memory_total,
)
from collins.offload.plan import PlacementPlan, PlacementRow, Request, place
from collins.offload.policy import MemoryPolicy

__all__ = [
    "DeviceFigures",
    "MemoryPolicy",
    "PlacementPlan",
    "PlacementRow",
    "Request",
    "device_figures",
    "device_memory_free",
    "host_memory_free",
    "host_memory_total",
    "place",
]
