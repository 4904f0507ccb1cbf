"""The examples run, at a size for tests."""

import importlib
import random
import re
import sys

import pytest
import torch
from helpers import EXAMPLES, Allocations
from torch.nn import functional

from collins.offload.shapes import llama

TINY_70B = [
    *("--device", "cpu", "--no-compile", "--layers", "2", "--hidden", "64", "--ffn", "176", "--heads", "4"),
    *("--kv-heads", "2", "--vocab", "256", "--seq-len", "32", "--batch-size", "8", "--lr", "1e-2"),
]


@pytest.fixture
def load(monkeypatch):
    """Imports an example as `python examples/NAME.py` does: with its folder on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module
    ours = {path.stem for path in EXAMPLES.iterdir()}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]


@pytest.fixture
def train_lm(load):
    return load("train_lm")


@pytest.fixture
def train_70b(load):
    return load("train_70b")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of sources, enough that some are held out, and one for what is made of them."""
    generator, folder = random.Random(0), tmp_path_factory.mktemp("sources")
    words = ["".join(generator.choices("abcdefgh", k=4)) for _ in range(50)]
    for number in range(100):
        for suffix in (".py", ".md"):
            (folder / f"{number}{suffix}").write_text(" ".join(generator.choices(words, k=200)))
    return ["--text", str(folder), "--cache", str(tmp_path_factory.mktemp("cache"))]


SMALL = ["vocabulary=400", "hidden=64", "layers=1", "heads=2", "ffn=96", "context=16", "batch=4", "held_out=4"]


@pytest.fixture
def small(sources, monkeypatch, train_lm):
    """Arguments of a small training, in this process."""
    monkeypatch.setattr(train_lm, "cpus", lambda *_: [torch.device("cpu")])

    def arguments(steps, *more):
        return [*sources, "--set", *SMALL, f"steps={steps}", *more]

    return arguments


def test_train_lm_compares_the_optimizers(train_lm, small, tmp_path, capsys):
    picture = tmp_path / "loss.png"
    optimizers = ("--optimizers", "adamw", "collins", "collins-published")
    records = train_lm.main(small(60, *optimizers, "--rates", "1e-2", "collins=2e-2", "--out", str(picture)))
    assert [(r["optimizer"], r["lr"]) for r in records] == [
        ("adamw", 1e-2),
        ("collins", 2e-2),
        ("collins-published", 1e-2),
    ]
    for record in records:
        assert record["steps"][-1] == 60
        assert record["validation"][-1] < record["validation"][0] < 6.1  # nats; a uniform guess has 5.99
    assert records[1]["state_bytes"] < records[0]["state_bytes"] / 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for record in records:
        assert f"{record['state_bytes']:,}" in shown
        assert f"{record['validation_loss']:.3f}" in shown


def test_train_lm_sweeps_both_optimizers_at_as_many_rates(train_lm, small, tmp_path):
    records = train_lm.main(small(1, "--out", str(tmp_path / "loss.png")))
    tried = {name: [r["lr"] for r in records if r["optimizer"] == name] for name in ("adamw", "collins")}
    assert tried == {"adamw": [1e-3, 2e-3, 4e-3], "collins": [2e-3, 4e-3, 8e-3]}
    assert train_lm.LM_SMALL.settings.vocabulary == 8192
    assert train_lm.LM_SMALL.settings.steps == 300


def test_train_lm_repeats_itself_and_takes_a_subset(train_lm, small, tmp_path):
    arguments = small(5, "--optimizers", "collins", "--rates", "1e-2", "--out", str(tmp_path / "loss.png"))
    (first,), (second,) = train_lm.main(arguments), train_lm.main(arguments)
    assert first["validation"] == second["validation"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--set", "hidden=65"], "hidden must be a multiple of twice heads, got 65 and 3"),
        (["--rates", "sgd=1"], "'sgd=1' is of an optimizer that is not compared"),
        (["--optimizers", "sgd"], "'sgd' is not an optimizer"),
        (["--rates", "fast"], "must be a number above 0, or NAME=NUMBER, got 'fast'"),
        (["--memory", "disk"], "argument --memory: memory must be"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--text", "nowhere"], "must be a folder, got nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_lm_refuses_what_it_cannot_run(train_lm, wrong, named, capsys):
    with pytest.raises(SystemExit):
        train_lm.main(wrong)
    assert named in " ".join(capsys.readouterr().err.split())


def test_train_lm_takes_a_policy_file_and_trains_alike(train_lm, small, tmp_path, capsys):
    policy = tmp_path / "policy.toml"
    policy.write_text('[collins.memory]\ntier = "host"\ntransfer_size = "8KiB"\n')
    arguments = small(5, "--optimizers", "collins", "--rates", "1e-2", "--out", str(tmp_path / "loss.png"))
    (resident,), (housed,) = train_lm.main(arguments), train_lm.main([*arguments, "--memory", str(policy)])
    assert housed["validation"] == resident["validation"]
    assert housed["optimizer"] == resident["optimizer"] == "collins"
    assert resident["placement"] == []
    (plan,) = housed["placement"]
    assert "host" in plan
    assert f"collins, lr 0.01: where its tables are\n{plan}" in capsys.readouterr().out


@pytest.mark.parametrize("tier", [["--tier", "host"], ["--tier", "auto"]], ids=" ".join)
def test_train_70b_learns_and_reports(train_70b, tier, capsys):
    run = train_70b.main([*TINY_70B, *tier, "--steps", "15"])
    assert run.losses[0] == pytest.approx(5.545, abs=0.3)  # nats; a uniform guess
    assert run.losses[-1] < run.losses[0] - 1
    assert len(run.steps) == len(run.passes) == 15
    assert run.added > 0
    assert run.pinned == 0  # nothing is, on the CPU
    shown = capsys.readouterr().out
    assert run.plan.summary().splitlines()[-1] in shown
    assert shown.index("staging ring") < shown.index("tokens/s")
    assert f"{run.losses[-1]:.3f}" in shown
    (placed,) = run.placement
    assert [row[1:4] for row in placed.rows] == [row[1:4] for row in run.plan.rows]  # shape, bytes, tier


def test_train_70b_follows_its_policy_file(train_70b, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('[collins.memory]\ntier = "host"\nstaging_slots = 2\ntransfer_size = "32KiB"\n')
    run = train_70b.main([*TINY_70B, "--steps", "1", "--policy", str(policy)])
    assert run.added is None
    assert run.placement[0].policy == train_70b.MemoryPolicy.of(policy)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile's own look at its inputs
def test_train_70b_compiles_its_blocks_to_the_same_losses(train_70b):
    compiling = [argument for argument in TINY_70B if argument != "--no-compile"]
    eager, compiled = (
        train_70b.main([*arguments, "--tier", "host", "--steps", "3"]).losses for arguments in (TINY_70B, compiling)
    )
    assert compiled == pytest.approx(eager, rel=1e-2)  # in bfloat16
    assert compiled[-1] < compiled[0]


@pytest.mark.parametrize(("vocab", "count"), [(32000, 68_976_648_192), (128256, 70_553_706_496)])
def test_train_70b_has_the_real_shape(load, train_70b, vocab, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = train_70b.parse(["--vocab", str(vocab)])
    with torch.device("meta"):
        model = load("llama").Llama(args.layers, args.hidden, args.ffn, args.heads, args.kv_heads, args.vocab)
    assert sum(p.numel() for p in model.parameters()) == count
    assert [tuple(p.shape) for p in model.parameters()] == llama(80, 8192, 28672, 1024, vocab).shapes
    assert args.policy.tier == "host"


def test_the_chunked_loss_is_cross_entropy(load):
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (13, 40))
    targets = torch.randint(40, (13,), generator=generator)
    sides = []
    for chunked in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, head)]
        if chunked:
            loss = load("llama").ChunkedLoss.apply(*leaves, targets, 5)
        else:
            loss = functional.cross_entropy(leaves[0] @ leaves[1].T, targets)
        (3 * loss).backward()
        sides.append((loss.double(), *(leaf.grad for leaf in leaves)))
    for plain, mine in zip(*sides, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


def test_the_chunked_loss_never_has_a_second_gradient_of_the_head(load):
    """No tensor of more than a chunk's logits but the head's one gradient, which the parameter takes as it is."""
    x, head = torch.randn(64, 4).requires_grad_(), torch.randn(1000, 4).requires_grad_()
    targets = torch.zeros(64, dtype=torch.long)
    loss = load("llama").ChunkedLoss.apply(x, head, targets, 8)
    with Allocations() as seen:
        loss.backward()
    assert seen.shapes.count((1000, 4)) == 1
    assert max(torch.Size(shape).numel() for shape in seen.shapes) == 8 * 1000


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--hidden", "66"], "--hidden must be a multiple of twice --heads, got 66 and 4"),
        (["--kv-heads", "3"], "--heads must be a multiple of --kv-heads, got 4 and 3"),
        (["--vocab", "100"], "--vocab must be at least 256"),
        (["--tier", "disk"], "memory must be"),
        (["--policy", "nowhere.toml"], "not a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_train_70b_refuses_what_it_cannot_run(train_70b, wrong, named, capsys):
    with pytest.raises(SystemExit):
        train_70b.main([*TINY_70B, *wrong])
    assert re.sub(r"\s+", " ", named) in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_train_70b_says_so_when_there_is_no_room(train_70b, monkeypatch):
    monkeypatch.setattr(train_70b, "host_memory_free", lambda: 10_000)
    with pytest.raises(MemoryError, match="The host may give"):
        train_70b.main([*TINY_70B, "--tier", "host"])
