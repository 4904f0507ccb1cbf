"""The engine: compiled steps are the eager steps, compiled once, and eager where there is no compiler."""

import subprocess
import sys

import pytest
import torch

from collins import Collins

CASES = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.float16, {}),
    (torch.bfloat16, {"hash": "universal", "decode": "sketch"}),
    (torch.float32, {"table_dtype": torch.bfloat16, "compress_ratio": 64, "maximize": True}),
]


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_compiled_equals_eager(dtype, options, device):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in ((96, 64), (40,), (), (96, 64))]
    sides = []
    for compile in (False, True):
        ps = [torch.nn.Parameter(value.clone()) for value in values]
        opt = Collins(ps, lr=1e-2, min_K=16, rehash_period=3, compile=compile, **options)
        for step in range(6):
            for i, p in enumerate(ps):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                p.grad = g.to(device, dtype)
            opt.step()
        sides.append(ps)
    for eager, compiled in zip(*sides, strict=True):
        # Sums in another order may send a stochastically rounded value to the other neighbour.
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(eager.detach(), compiled.detach(), rtol=4 * ulp, atol=4 * ulp)
        assert (eager != compiled).float().mean() < (0.9 if dtype == torch.float32 else 0.02)


def test_no_working_compiler_is_one_warning_and_an_eager_step():
    code = """
import warnings, torch
from collins import Collins
ps = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
for p in ps:
    p.grad = torch.ones_like(p)
opt = Collins(ps, min_K=16, compile=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    opt.step()
    opt.step()
texts = [str(w.message) for w in caught if "Collins" in str(w.message)]
assert len(texts) == 1, texts
print(texts[0])
eager = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
for p in eager:
    p.grad = torch.ones_like(p)
other = Collins(eager, min_K=16, compile=False)
other.step()
other.step()
assert all(torch.equal(p, q) for p, q in zip(ps, eager))
assert all(state["step"] == 2 for state in opt.state.values())
"""
    environment = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    ran = subprocess.run(
        ["env", *(f"{k}={v}" for k, v in environment.items()), sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Collins steps eagerly, because torch.compile failed" in ran.stdout
    assert "compiler" in ran.stdout
