"""Measures full training of a model on one device: speed, memory, and what the optimizer adds. No file is needed.

PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python examples/measure_one_card.py 70b --steps 5
python examples/measure_one_card.py 7b --steps 20 --memory-limit 24GiB
python examples/measure_one_card.py MODEL_FOLDER/config.json --seq-len 4096
python examples/measure_one_card.py 7b --device cpu --no-compile --layers 2 --hidden 64 --ffn 176 --heads 4 \
    --kv-heads 2 --vocab 256 --seq-len 64 --batch-size 8 --steps 30 --lr 1e-2 --policy host

A named shape is that of LLaMA 2 (7b, 13b), Llama 3 (8b, 70b), Qwen 3 (14b) or Qwen 2.5 (32b), without the biases and
norms within heads of the last two. With transformers installed the model is its LLaMA, or that of the configuration,
trained as by `finetune.py`; without, it is that of `llama.py` beside this script. --code selects one of them.

Weights are random and in bfloat16, without a copy in float32; tokens are the bytes of Python's standard library. Layers
are checkpointed and compiled, the loss is computed in chunks, and Collins steps each parameter while backward goes on.

It prints the plan, then trains. Each step is timed against a forward and backward on the same batch whose gradients are
dropped as they arrive: "optimizer adds" is the difference of the two medians, without the first of each, which
compiles. On a GPU, both times end when the stream that computes is done: the last copies of tables back to the host,
which streams of their own make, go on under the forward that follows, as in training. The last line has all figures in
JSON: sizes in bytes, times in seconds.

--memory-limit emulates a smaller card: PyTorch may allocate no more than that. On a card of that size the CUDA context
would take about 0.5 GiB of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from corpus import batches, clock, standard_library
from finetuning.arguments import memory_policy
from finetuning.causal_lm import CausalLM
from finetuning.forecast import advice, figures, machine_of, refuse_weights, trial_of, with_index
from finetuning.packing import Batch
from llama import Llama
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from collins import Collins
from collins.offload import MemoryPolicy, PlacementPlan, pinned_bytes
from collins.offload.alternatives import alternatives
from collins.offload.architectures import transformers_or_none
from collins.offload.budget import Training
from collins.offload.models import from_config
from collins.offload.shapes import Transformer, llama
from collins.offload.sizes import parse_size, size_text
from collins.offload.trial import Trial

CHUNKS = 8
POLICIES = Path(__file__).parent / "policies"


@dataclass(frozen=True)
class Shape:
    """A LLaMA's."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int


SHAPES = {
    "7b": Shape(32, 4096, 11008, 32, 32, 32000),
    "8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "13b": Shape(40, 5120, 13824, 40, 40, 32000),
    "14b": Shape(40, 5120, 17408, 40, 8, 151936),
    "32b": Shape(64, 5120, 27648, 40, 8, 152064),
    "70b": Shape(80, 8192, 28672, 64, 8, 128256),
}
DEFAULT_POLICIES = {"70b": POLICIES / "70b-on-141gb.toml"}  # "auto" for all others
_KEYS = {  # of a configuration that `llama.py` can be built from
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}


@dataclass
class Run:
    """The measurements of a run, step by step; times in seconds."""

    trial: Trial
    tokens: int  # in a step
    losses: list[float] = field(default_factory=list)  # nats per token
    steps: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)  # forward and backward alone
    peaks: list[int] = field(default_factory=list)  # bytes on the device; none on the CPU
    pinned: int = 0  # bytes
    placement: tuple[PlacementPlan, ...] = ()

    @property
    def added(self) -> float | None:
        """The time that the optimizer adds, as a fraction of that of forward and backward."""
        if len(self.steps) < 2:
            return None
        return statistics.median(self.steps[1:]) / statistics.median(self.passes[1:]) - 1

    @property
    def speed(self) -> float | None:
        """Tokens per second of the median step, without the first one."""
        return self.tokens / statistics.median(self.steps[1:]) if len(self.steps) > 1 else None


def shapes_of(args: argparse.Namespace) -> Transformer:
    """The model as the plan describes it."""
    if args.shape is None:
        return from_config(args.config)
    shape = args.shape
    return llama(shape.layers, shape.hidden, shape.ffn, shape.kv_heads * shape.hidden // shape.heads, shape.vocab)


def built(args: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor], Tensor], str]:
    """The model with random weights, which are drawn on the device, since host memory may not suffice.

    Returns:
        The model; its loss of tokens, (batch, length + 1); and whose code it is.
    """
    torch.manual_seed(args.seed)
    transformers = None if args.code == "own" else transformers_or_none()
    if transformers is None:
        with torch.device("meta"):
            own = Llama(*asdict(args.shape).values()).to(torch.bfloat16)
        own.to_empty(device=args.device)
        own.fill()
        if args.compile:
            own.compile_blocks()
        return own, lambda tokens: own.loss(tokens, CHUNKS), "examples/llama.py"
    if args.shape is None:
        values = json.loads(args.config.read_bytes())
        config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    else:
        names = {name: getattr(args.shape, field) for field, name in _KEYS.items()}
        config = transformers.LlamaConfig(**names, max_position_embeddings=args.seq_len, rope_theta=500_000.0)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    language_model = CausalLM(model, CHUNKS)
    language_model.prepare(backend="inductor" if args.compile else None)
    model.train()
    name = f"{type(model).__name__} of transformers {transformers.__version__}"
    return model, lambda tokens: language_model.loss(_whole(tokens)), name


def _whole(tokens: Tensor) -> Batch:
    """All tokens but the last of each row, each with the next one as its target."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    positions = torch.arange(length, device=tokens.device).expand(rows, length)
    trained = torch.arange(rows * length, device=tokens.device)
    return Batch(tokens[:, :-1], positions, trained, tokens[:, 1:].flatten())


class Dropping:
    """While `on`, drops gradients as they arrive. Make it before the optimizer, so that its hooks run first."""

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self)

    def __call__(self, p: Tensor) -> None:
        if self.on:
            p.grad = None


def train(args: argparse.Namespace, run: Run, console: Console) -> str:
    """Trains, and measures the times. Returns the origin of the model's code."""
    text = standard_library()
    model, loss_of, code = built(args)
    dropping = Dropping(model)
    optimizer = Collins(model, lr=args.lr, memory=args.policy, in_backward=True)
    table = Table("step", "loss", "tokens/s", "peak on the device", "pinned on the host", "optimizer adds")
    data = batches(text, args.steps, args.batch_size, args.seq_len, args.seed, args.device)
    progress = tqdm(data, total=args.steps, disable=None)
    for number, tokens in enumerate(progress, 1):
        if args.device.type == "cuda" and number > 1:  # the first step decides by the peak that was seen
            torch.cuda.reset_peak_memory_stats(args.device)
        started = clock(args.device)
        loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        run.steps.append(clock(args.device) - started)
        run.losses.append(loss.item())
        if args.device.type == "cuda":
            run.peaks.append(torch.cuda.max_memory_allocated(args.device))
        dropping.on = True
        started = clock(args.device)
        loss_of(tokens).backward()
        run.passes.append(clock(args.device) - started)
        dropping.on = False
        run.pinned = pinned_bytes()
        added = "" if run.added is None else f"{run.added:.1%}"
        speed = run.tokens / run.steps[-1]
        progress.set_postfix(loss=f"{run.losses[-1]:.3f}", tokens_per_s=f"{speed:.0f}", optimizer_adds=added)
        peak = size_text(run.peaks[-1]) if run.peaks else ""
        table.add_row(str(number), f"{run.losses[-1]:.3f}", f"{speed:,.0f}", peak, size_text(run.pinned), added)
    run.placement = optimizer.placement
    console.print(table)
    return code


def as_json(args: argparse.Namespace, run: Run, code: str) -> dict[str, Any]:
    """All measurements, and the plan's figures."""
    budget, count = run.trial.budget, run.trial.model.count
    on_gpu = args.device.type == "cuda"
    return {
        "model": args.model,
        "parameters": count,
        "code": code,
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "steps": args.steps,
        "device": torch.cuda.get_device_name(args.device) if on_gpu else "cpu",
        "device_bytes": torch.cuda.mem_get_info(args.device)[1] if on_gpu else None,
        "memory_limit": args.memory_limit,
        "torch": torch.__version__,
        "tokens_per_s": run.speed,
        "step_s": statistics.median(run.steps[1:]) if run.steps[1:] else None,
        "forward_backward_s": statistics.median(run.passes[1:]) if run.passes[1:] else None,
        "optimizer_adds": run.added,
        "peak_device": max(run.peaks, default=None),
        "pinned_host": run.pinned,
        "tables_on_device": sum(plan.device_bytes for plan in run.placement),
        "tables_on_host": sum(plan.host_bytes for plan in run.placement),
        "losses": run.losses,
        "plan": {
            "weights": budget.weights,
            "gradients_in_backward": budget.gradients_in_backward,
            "activations": budget.activations,
            "tables": sum(request.bytes for request in run.trial.requests),
            "alternatives": [alternative._asdict() for alternative in alternatives(run.trial)],
        },
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="70b", help=f"{', '.join(SHAPES)}, or a config.json (%(default)s)")
    for field_ in fields(Shape):
        parser.add_argument(
            f"--{field_.name.replace('_', '-')}", type=int, help="replaces the value of the named shape"
        )
    for name, value in {"seq-len": 2048, "batch-size": 1, "steps": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-6, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", type=torch.device, default="cuda", help="(%(default)s)")
    parser.add_argument("--code", choices=("transformers", "own"), help="(default: transformers, if installed)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the layers (default: yes)"
    )
    parser.add_argument("--memory-limit", type=_size, metavar="SIZE", help="limit of PyTorch's device memory, as 24GiB")
    parser.add_argument(
        "--policy", type=memory_policy, metavar="FILE|TIER", help="memory policy (default: auto; a file for 70b)"
    )
    args = parser.parse_args(arguments)
    given = {field_.name: value for field_ in fields(Shape) if (value := getattr(args, field_.name)) is not None}
    for name, value in {**given, **{name: getattr(args, name) for name in ("seq_len", "batch_size", "steps")}}.items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    try:
        args.shape, args.config = _model(args, given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device must be one that is here, got {args.device}; --device cpu runs a small model")
    if args.memory_limit is not None and args.device.type != "cuda":
        parser.error(f"--memory-limit must be of a CUDA device, got --device {args.device}")
    if args.policy is None:
        args.policy = MemoryPolicy.of(DEFAULT_POLICIES.get(args.model, "auto"))
    return args


def _model(args: argparse.Namespace, given: dict[str, int]) -> tuple[Shape | None, Path | None]:
    """The shape to build, or the configuration."""
    config = None
    if args.model in SHAPES:
        shape = replace(SHAPES[args.model], **given)
    else:
        config = Path(args.model)
        config = config / "config.json" if config.is_dir() else config
        if not config.is_file():
            raise ValueError(f"model must be one of {', '.join(SHAPES)}, or a config.json, got {args.model!r}")
        if given:
            raise ValueError(f"--{next(iter(given))} must be of a named shape: {config} has its own")
        if args.code != "own" and transformers_or_none() is not None:
            return None, config
        values = json.loads(config.read_bytes())
        if values.get("model_type") not in ("llama", "mistral", "qwen2"):
            raise ValueError(f"{config}: model_type must be llama, mistral or qwen2, without transformers")
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        shape = Shape(**{name: values[key] for name, key in _KEYS.items()})
    if shape.hidden % (2 * shape.heads):
        raise ValueError(f"--hidden must be a multiple of twice --heads, got {shape.hidden} and {shape.heads}")
    if shape.heads % shape.kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv-heads, got {shape.heads} and {shape.kv_heads}")
    if shape.vocab < 256:
        raise ValueError(f"--vocab must be at least 256, the number of bytes, got {shape.vocab}")
    return shape, None


def _size(text: str) -> int:
    try:
        return parse_size("--memory-limit", text, relative=False).fixed
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: list[str] | None = None) -> Run:
    """Runs the command.

    Raises:
        SystemExit: with status 2 for arguments that cannot be used, with 1 where memory ran out.
    """
    args = parse(arguments)
    args.device = with_index(args.device)
    console = Console()
    if args.memory_limit is not None:
        total = torch.cuda.mem_get_info(args.device)[1]
        torch.cuda.set_per_process_memory_fraction(min(args.memory_limit / total, 1.0), args.device)
    training = Training(torch.bfloat16, args.batch_size, args.seq_len, CHUNKS)
    trial = trial_of(shapes_of(args), training, machine_of(args.device), args.policy)
    console.print(figures(args.model, trial), soft_wrap=True, highlight=False, markup=False)
    run = Run(trial, args.batch_size * args.seq_len)
    try:
        refuse_weights(trial)
        code = train(args, run, console)
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(advice(args.model, trial), "", f"measure_one_card.py: out of memory: {error}", sep="\n", file=sys.stderr)
        raise SystemExit(1) from error
    print(json.dumps(as_json(args, run, code)))
    return run


if __name__ == "__main__":
    main()
