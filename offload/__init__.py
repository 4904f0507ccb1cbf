"""Where memory for tables can be found.

Public names: `host_memory_free`, `device_memory_free`.

Both measure at the moment of the call, in bytes. Host memory is what the kernel would hand out without swapping, cut to
what the process's control groups still allow; device memory is what the driver reports free plus what PyTorch's
allocator holds in reserve without using it.
"""

from collins.offload.memory import device_memory_free, host_memory_free

__all__ = ["device_memory_free", "host_memory_free"]
