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


def same(ours, theirs):
    """Whether two nested values are equal in all their tensors, dtypes and numbers, and of the same structure."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def small_model(seed=0, dtype=torch.float32, device="cpu"):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)]
    return torch.nn.Sequential(*layers).to(device, dtype)


def train(model, opt, steps, first=0):
    """Trains a small model on data that depends on the number of the step alone; returns copies of its parameters."""
    for step in range(first, first + steps):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(model[0].weight)
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]
