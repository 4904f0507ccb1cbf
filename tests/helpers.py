"""What several files of tests use: parameters and gradients, comparisons, and the way to the kernel without a GPU."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"lr": 1e-2, "min_K": 16, "rehash_period": 3}  # small weights have tables; signs change within a short run


def with_kernel(opt):
    """The optimizer, stepping through the Triton kernel: under its interpreter where there is no GPU."""
    if DEVICE == "cpu":
        from collins.compile.multi_tensor import KernelLaunches

        opt._engine._launches = KernelLaunches("cpu")
    return opt


def parameters(dtype, shapes, device=DEVICE):
    """The same values in every call, and for every dtype and device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def give_gradients(step, *lists):
    """Gradients of step number `step`: what a parameter gets depends on its place in its list, not on the list."""
    for ps in lists:
        for i, p in enumerate(ps):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p)


def moments(opt, p):
    """The first and the second moment of `p`, in tables or dense."""
    return [value for name, value in opt.state[p].items() if name not in ("step", "layout")]
