"""Bytes of the state of real models, and of the temporary memory of a step."""

import pytest
import torch
from helpers import Allocations

from collins import Collins
from collins.offload.shapes import llama

MODELS = {
    "7B": (llama(32, 4096, 11008, 4096, 32000).shapes, 6.738e9, 1.75e9),
    "70B": (llama(80, 8192, 28672, 1024, 128256).shapes, 70.55e9, 17.5e9),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("hash", ["block", "universal"])
def test_a_quarter_of_a_byte_per_parameter(name, hash):
    shapes, parameters, named_bytes = MODELS[name]
    meta = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    report = Collins(meta, hash=hash).memory_report()
    count = sum(p.numel() for p in meta)
    assert count == pytest.approx(parameters, rel=1e-3)
    # "7B" and "70B" are round names: 6.74 and 70.55 billion parameters.
    of_the_name = report.state_bytes * float(name[:-1]) * 1e9 / count
    if hash == "universal":
        assert report.state_bytes / count == pytest.approx(0.25, rel=0.01)
        assert of_the_name == pytest.approx(named_bytes, rel=0.01)
    else:
        assert 0.2 < report.state_bytes / count <= 0.25
        assert of_the_name <= named_bytes
    assert report.adamw_bytes / count == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("hash", "shape"),
    [
        ("block", (1100,)),
        ("block", (40, 40)),
        ("block", (1, 3000)),
        ("block", (4, 10000)),
        ("block", (208, 200)),
        ("block", (768, 767)),
        ("block", (2048, 2048)),
        ("universal", (512, 511)),
    ],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_peak_extra_memory_of_an_eager_step(hash, transposed, shape, dtype):
    ps = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(3)]
    if transposed:
        ps = [torch.nn.Parameter(p.detach().t()) for p in ps]
    opt = Collins(ps, hash=hash, compile=False)
    for p in ps:
        p.grad = torch.ones_like(p)
    opt.step()  # creates the state
    with Allocations() as allocations:
        opt.step()
    assert allocations.peak > 0
    if hash == "block":
        allowance = 2**18  # memory of a piece that is not divided further
        assert allocations.peak <= max(2.2 * ps[0].nbytes, allowance)
    assert allocations.widest_index < ps[0].numel()
