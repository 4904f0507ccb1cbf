"""Fine-tunes all parameters of a Hugging Face causal language model on one device.

python examples/finetune.py MODEL_FOLDER --data FILE.jsonl --out FOLDER
python examples/finetune.py MODEL_FOLDER --data FILE.jsonl --out FOLDER --resume

MODEL_FOLDER has config.json, a tokenizer and safetensors. FILE.jsonl has an object in each line: {"messages": [...]}
(the assistant's tokens are trained on), {"prompt": "...", "completion": "..."} (those of the completion are) or
{"text": "..."}. FOLDER is created at the end of the run, for `from_pretrained`. Nothing is downloaded.

Weights are in bfloat16, without a copy in float32, and Collins steps them as their gradients arrive in backward. With
--accumulation-steps K, a step takes K batches, each in a backward pass of its own. Layers are checkpointed and, on a
GPU, compiled one by one; logits exist for one chunk of tokens at a time. Documents share rows of --seq-len tokens if
the model's code restricts attention to a document, which is tested on the loaded model; otherwise each document has a
row of its own. The output says which is the case.

All errors in the folder, the data or the arguments are raised before anything is loaded onto the device. Checkpoints
are written to FOLDER.checkpoints; --resume continues from the newest one, bitwise identical to an uninterrupted run if
the device's kernels are deterministic (on a GPU: --deterministic).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from finetuning.arguments import DTYPES, parse
from finetuning.causal_lm import CausalLM
from finetuning.data import Documents, checked_tokenizer, read_documents
from finetuning.folder import ModelFolder, load_model, open_folder, read_headers, save_model, transformers_module
from finetuning.forecast import advice, figures, machine_of, refuse_weights, trial_of, with_index
from finetuning.packing import Batch, Rows
from finetuning.running import (
    SETTINGS,
    TRAINING,
    Checkpoints,
    Progress,
    Rate,
    Run,
    digest,
    random_state,
    refuse_others,
    set_random_state,
)
from tqdm import tqdm

import collins
from collins import Collins
from collins.offload.budget import Training
from collins.offload.models import model_of
from collins.offload.trial import Trial


@dataclass(frozen=True)
class Job:
    """Everything that is known before weights are loaded."""

    args: argparse.Namespace
    folder: ModelFolder
    documents: Documents
    held_out: Documents | None
    checkpoints: Checkpoints
    begun: tuple[int, Path] | None  # the step to go on from, and its folder
    settings: dict[str, Any]
    trial: Trial

    @property
    def first(self) -> int:
        """The last step that has been taken."""
        return 0 if self.begun is None else self.begun[0]

    @property
    def weights(self) -> Path:
        """The folder to load weights from."""
        path: Path = self.args.model
        return path if self.begun is None else self.begun[1]


def prepared(args: argparse.Namespace) -> Job:
    """Checks everything that a run depends on.

    Raises:
        ValueError, OSError: for what cannot be used, naming it and what is accepted.
    """
    checkpoints, begun = _places(args)
    folder = open_folder(args.model)
    if folder.positions is not None and args.seq_len is not None and args.seq_len > folder.positions:
        raise ValueError(
            f"--seq-len must be at most {folder.positions:,}, the positions of {args.model / 'config.json'}, got"
            f" {args.seq_len:,}"
        )
    if args.seq_len is None:
        args.seq_len = min(2048, folder.positions or 2048)
    tokenizer = checked_tokenizer(transformers_module(), args.model, folder.vocabulary)
    reading = {"tokenizer": tokenizer, "seq_len": args.seq_len, "vocabulary": folder.vocabulary}
    documents = read_documents(args.data, **reading)
    if args.eval_data is not None:
        held_out: Documents | None = read_documents(args.eval_data, **reading)
    else:
        documents, held_out = _divided(documents, args)
    settings = {
        "whether --eval-data is given": args.eval_data is not None,
        **{f"--{name.replace('_', '-')}": getattr(args, name) for name in _SAME},
        "the content of --data": digest(args.data),
    }
    if begun is not None:
        refuse_others(begun[1], settings)
        read_headers(begun[1])
    training = Training(DTYPES[args.dtype], args.batch_size, args.seq_len, args.loss_chunks)
    planned = model_of(str(args.model / "config.json"))
    trial = trial_of(planned, training, machine_of(args.device), args.policy, args.compress_ratio)
    return Job(args, folder, documents, held_out, checkpoints, begun, settings, trial)


# Arguments that must be the same when a run is resumed.
_SAME = (
    *("seq_len", "batch_size", "steps", "epochs", "lr", "warmup", "min_lr", "weight_decay", "compress_ratio", "seed"),
    *("dtype", "eval_fraction", "max_grad_norm", "accumulation_steps", "residual_weight"),
)


def _places(args: argparse.Namespace) -> tuple[Checkpoints, tuple[int, Path] | None]:
    """The folder to which the run writes, and the checkpoint from which it resumes."""
    out: Path = args.out
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out must not exist yet, got {out}")
    if not out.name or not out.parent.is_dir():
        raise ValueError(f"--out must be in an existing folder, got {out}")
    checkpoints = Checkpoints(out)
    begun = checkpoints.newest()
    if begun is not None and not args.resume:
        raise ValueError(
            f"--out must be a new folder, got {out}: {checkpoints.root} has the checkpoints of an"
            " unfinished run. Use --resume, or remove the folder"
        )
    return checkpoints, begun


def _divided(documents: Documents, args: argparse.Namespace) -> tuple[Documents, Documents | None]:
    """The documents to train on and those that are held out: whole lines, drawn with the seed."""
    lines = sorted(set(documents.lines))
    count = math.ceil(args.eval_fraction * len(lines))
    if not 0 < count < len(lines):
        return documents, None
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = {lines[i] for i in order[:count]}
    kept = documents.of_lines(set(lines) - held_out)
    kept.cut, kept.dropped = documents.cut, documents.dropped
    return kept, documents.of_lines(held_out)


def loaded(job: Job) -> CausalLM:
    """The model on the device, prepared for training; it has been tested whether documents may share a row.

    Raises:
        ValueError: for a model that cannot be trained in this way, or not as the run that is resumed.
    """
    args = job.args
    model = load_model(job.folder, job.weights, DTYPES[args.dtype], args.device, args.attention)
    try:
        language_model = CausalLM(model, args.loss_chunks)
        language_model.check(args.batch_size)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # models may raise any exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{model.config.model_type} cannot be trained in this way: {reason}") from error
    job.settings["whether documents share rows"] = language_model.separates_documents
    if job.begun is not None:
        refuse_others(job.begun[1], job.settings)
    language_model.prepare(checkpointed=args.recompute, backend="inductor" if args.compile else None)
    model.train()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)  # the policy decides by what training takes, not by loading
    return language_model


def fine_tune(job: Job, language_model: CausalLM) -> Run:
    """Trains the model, and writes the folder."""
    args, model = job.args, language_model.model
    shape = {"seq_len": args.seq_len, "batch_size": args.batch_size, "packed": language_model.separates_documents}
    rows = Rows(job.documents, **shape, seed=args.seed)
    held_out = None if job.held_out is None else Rows(job.held_out, **shape, seed=args.seed)
    parts = args.accumulation_steps
    batches = args.steps * parts if args.steps else rows.batches(args.epochs)
    run = Run(job.first, -(-batches // parts), rows.packed)
    for line in _described(job, rows, batches):
        tqdm.write(line)
    optimizer = Collins(
        model,
        lr=args.lr,
        weight_decay=args.weight_decay,
        compress_ratio=args.compress_ratio,
        residual_weight=args.residual_weight,
        seed=args.seed,
        max_grad_norm=args.max_grad_norm,
        memory=args.policy,
        in_backward=True,
        accumulation_steps=parts,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Rate(run.steps, args.warmup, args.min_lr))
    torch.manual_seed(args.seed)
    if job.begun is not None:
        rest = collins.load(job.weights / TRAINING, optimizer=optimizer, schedule=schedule)
        set_random_state(rest["random"], args.device)

    def write(step: int, folder: Path) -> None:
        save_model(folder, model, job.folder)
        parts = {"optimizer": optimizer, "schedule": schedule, "random": random_state(args.device)}
        collins.save(folder / TRAINING, **parts)
        (folder / SETTINGS).write_text(json.dumps({**job.settings, "step": step}, indent=2) + "\n", encoding="utf-8")

    def evaluate(step: int) -> None:
        if held_out is not None:
            run.held_out[step] = evaluated(language_model, held_out.in_order(), args.device)
            tqdm.write(f"step {step}: {run.held_out[step]:.4f} nats per token that was held out")

    if not job.first:
        evaluate(0)
    progress = Progress(run, optimizer, args.log_every)
    for step in range(job.first + 1, run.steps + 1):
        numbers = range((step - 1) * parts + 1, min(step * parts, batches) + 1)
        loss = accumulated(language_model, [rows.batch(number) for number in numbers], args.device)
        optimizer.step()
        schedule.step()
        progress.step(step, loss, len(numbers) * args.batch_size * rows.length)
        last = step == run.steps
        if last or step % args.eval_every == 0:
            with progress.pausing():
                evaluate(step)
        if step % args.save_every == 0 and not last:
            with progress.pausing():
                job.checkpoints.save(step, partial(write, step), args.keep)
    progress.close()
    run.placement = optimizer.placement
    with collins.whole_folder(args.out) as folder:
        save_model(folder, model, job.folder)
    left = f"; {job.checkpoints.root} is of no more use" if job.checkpoints.root.exists() else ""
    tqdm.write(f"saved: {args.out}{left}")
    return run


def accumulated(language_model: CausalLM, batches: Sequence[Batch], device: torch.device) -> torch.Tensor:
    """Runs backward for each batch of a step, one on the device at a time.

    The weight of a batch is its share of the step's targets, so that gradients add up to that of the mean over all of
    them.

    Returns:
        Mean cross-entropy in nats of all targets of the step.
    """
    total, count = torch.zeros((), device=device), sum(len(batch.targets) for batch in batches)
    for batch in batches:
        loss = language_model.loss(batch.to(device)) * (len(batch.targets) / count)
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluated(language_model: CausalLM, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean cross-entropy in nats of all targets of some batches."""
    language_model.model.eval()
    total, count = torch.zeros((), device=device), 0
    for batch in batches:
        total += language_model.loss(batch.to(device)) * len(batch.targets)
        count += len(batch.targets)
    language_model.model.train()
    return total.item() / count


def _described(job: Job, rows: Rows, batches: int) -> Iterator[str]:
    """A summary of the training data, in lines.

    Args:
        batches: of the whole run.
    """
    documents, folder = job.documents, job.folder
    count = len(documents.lines)
    yield f"{count:,} documents of {len(documents.tokens):,} tokens, {documents.trained:,} of them trained on"
    if rows.packed:
        yield f"packed into {len(rows):,} rows of {rows.length:,}, {rows.filled:.1%} filled; no document sees another"
    else:
        yield (
            f"one to each of {len(rows):,} rows of {rows.length:,}, {rows.filled:.1%} filled: in this model documents"
            " that share a row would see each other"
        )
    if documents.cut or documents.dropped:
        yield f"left out: {documents.cut:,} tokens beyond --seq-len, {documents.dropped:,} documents without a target"
    if job.held_out is not None:
        yield f"held out: {len(job.held_out.lines):,} documents of {len(job.held_out.tokens):,} tokens"
    if folder.unread:
        more = f" and {len(folder.unread) - 1} more" if len(folder.unread) > 1 else ""
        yield f"not part of {folder.build.__name__}, and not saved: {folder.unread[0]}{more}"
    if job.begun is not None:
        yield f"going on after step {job.first}, from {job.weights}"
    parts = job.args.accumulation_steps
    several = f"{parts} batches of " if parts > 1 else ""
    fewer = f", the last step of {batches % parts}" if batches % parts else ""
    yield f"{-(-batches // parts):,} steps of {several}{job.args.batch_size} x {rows.length:,} tokens{fewer}"


def _end(status: int, *lines: str) -> NoReturn:
    print(*lines, sep="\n", file=sys.stderr)
    raise SystemExit(status)


def main(arguments: list[str] | None = None) -> Run:
    """Runs the command.

    Raises:
        SystemExit: with status 2 for arguments, a folder or data that cannot be used, with 1 where memory ran out.
    """
    args = parse(__doc__, arguments)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS does not repeat itself
        torch.use_deterministic_algorithms(True)
    args.device = with_index(args.device)
    job = None
    try:
        try:
            job = prepared(args)
            if args.device.type == "cuda":
                print(figures(str(args.model / "config.json"), job.trial))
            refuse_weights(job.trial)
            language_model = loaded(job)
        except (ValueError, OSError) as error:
            _end(2, f"finetune.py: error: {error}")
        return fine_tune(job, language_model)
    except (torch.OutOfMemoryError, MemoryError) as error:
        if job is None:
            raise
        _end(1, advice(str(args.model / "config.json"), job.trial), "", f"finetune.py: error: out of memory: {error}")


if __name__ == "__main__":
    main()
