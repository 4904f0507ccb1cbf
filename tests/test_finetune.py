"""`examples/finetune.py` fine-tunes tiny random models of many architectures."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers import DEVICE, EXAMPLES, environment
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional

import collins
from collins.offload.budget import Training
from collins.offload.models import model_of
from collins.offload.trial import Machine

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 262
COMMON = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
}
OLDER = {  # their configurations use other names
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 2},
}
CONFIGS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "pad_token_id": 0, "final_logit_softcapping": 3.0},
    "phi3": {},
    "mixtral": {"num_local_experts": 8},
}
# Other cases of the loss: a bias of the head, a scale of the logits.
FURTHER = {"phi": {}, "cohere": {"logit_scale": 0.3}, "granite": {"logits_scaling": 0.5}}
# A model of images and text, trained on text only.
WITH_IMAGES = {
    "text_config": {**COMMON, "head_dim": 8, "sliding_window": 8, "pad_token_id": 0},
    "vision_config": {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 14},
    },
    "mm_tokens_per_image": 4,
}
CONFIGURED = {**CONFIGS, **FURTHER, "gpt2": {}, "opt": {}, "bert": {}, "mamba": {}, "gemma3": WITH_IMAGES}
STEPS, EVERY, STOP = 9, 4, 6


def tiny_tokenizer(template=TEMPLATE):
    """A tokenizer of single bytes, and one token of two bytes: a space and an f."""
    letters = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Ġf"]
    vocabulary = {token: number for number, token in enumerate(SPECIAL + letters)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("Ġ", "f")]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=template,
    )


def tiny_model(kind, dtype=torch.bfloat16, **more):
    """A random model of an architecture."""
    overrides = CONFIGURED[kind]
    values = overrides if "text_config" in overrides else {**COMMON, **OLDER.get(kind, {}), **overrides, **more}
    config = transformers.CONFIG_MAPPING[kind](**values)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def tiny_folder(folder, kind, **more):
    tiny_model(kind, **more).save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


TEXT = {"text": "the cat sat on the mat. the cat sat on the mat. "}
COMPLETION = {"prompt": "two and two is", "completion": " four"}
CHAT = {
    "messages": [
        *({"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}),
        *({"role": "user", "content": "bye"}, {"role": "assistant", "content": "so long"}),
    ]
}


def as_line(record):
    """A record as a line of JSON; a string is a line already."""
    return record if isinstance(record, str) else json.dumps(record)


def write_lines(path, *records):
    path.write_text("".join(f"{as_line(record)}\n" for record in records))
    return path


@pytest.fixture(scope="module")
def finetune(load):
    return load("finetune")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A folder with the data, and models, which are created on demand."""
    folder = tmp_path_factory.mktemp("finetune")
    write_lines(folder / "data.jsonl", *[TEXT, COMPLETION, CHAT] * 8)
    return folder


@pytest.fixture(scope="module")
def source(data_folder):
    def make_folder(kind, **more):
        folder = data_folder / "-".join([kind, *more])
        return folder if folder.exists() else tiny_folder(folder, kind, **more)

    return make_folder


def arguments(data_folder, model, out, *more):
    return [
        *(str(model), "--data", str(data_folder / "data.jsonl"), "--out", str(out), "--device", "cpu"),
        *("--steps", str(STEPS), "--batch-size", "2", "--seq-len", "64", "--lr", "1e-2", "--eval-fraction", "0.1"),
        *("--save-every", str(EVERY), "--max-grad-norm", "1", *more),
    ]


@pytest.fixture(scope="module")
def finetuned(finetune, data_folder, source):
    """An uninterrupted run, its folder, and its model at the end."""
    outcomes = {}

    def run(kind, **more):
        key = (kind, *more.items())
        if key not in outcomes:
            models = []
            with pytest.MonkeyPatch.context() as patch:
                load = finetune.loaded
                patch.setattr(finetune, "loaded", lambda job: models.append(load(job)) or models[0])
                out = data_folder / f"{'-'.join(map(str, key))}-out"
                outcomes[key] = finetune.main(arguments(data_folder, source(kind, **more), out)), out, models[0]
        return outcomes[key]

    return run


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_fine_tunes_and_saves_what_transformers_loads(finetuned, source, kind):
    run, out, language_model = finetuned(kind)
    assert list(run.losses) == list(range(1, STEPS + 1))
    assert run.losses[1] == pytest.approx(math.log(VOCABULARY), abs=0.3)
    assert list(run.held_out) == [0, STEPS]
    assert run.held_out[STEPS] < run.held_out[0] - 0.5
    assert run.packed

    saved, loading_info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading_info["missing_keys"]
    assert not loading_info["unexpected_keys"]
    assert saved.dtype == torch.bfloat16
    batch = probe(language_model)
    with torch.no_grad():
        language_model.model.eval()
        assert torch.equal(saved(input_ids=batch.tokens).logits, language_model.logits(batch))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(CHAT["messages"], tokenize=False) == tiny_tokenizer().apply_chat_template(
        CHAT["messages"], tokenize=False
    )
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in names:
        assert (out / name).read_bytes() == (source(kind) / name).read_bytes()


def probe(language_model, length=16):
    """A batch of one row with one document; the target of each token is the next one."""
    tokens = torch.arange(length) * 13 % VOCABULARY
    target_indices = torch.arange(length - 1)
    return type_of_batch(language_model)(tokens[None], torch.arange(length)[None], target_indices, tokens[1:])


def type_of_batch(language_model):
    return sys.modules[type(language_model).__module__].Batch


class StopError(Exception):
    """Imitates a SIGKILL between two saves."""


def stopping_at(stop, batch):
    """`Rows.batch`, which raises a StopError when the batch of step `stop` is requested."""

    def batch_or_stop(self, step):
        if step == stop:
            raise StopError
        return batch(self, step)

    return batch_or_stop


@pytest.mark.parametrize(
    ("kind", "more"),
    [*((kind, {}) for kind in (*CONFIGS, "gemma3")), ("gpt2", {"resid_pdrop": 0.3})],
    ids=lambda value: str(value),
)
def test_a_stopped_run_resumes_bitwise(finetune, finetuned, data_folder, source, tmp_path, monkeypatch, kind, more):
    uninterrupted, expected, _ = finetuned(kind, **more)
    args = arguments(data_folder, source(kind, **more), tmp_path / "out", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Rows, "batch", stopping_at(STOP, finetune.Rows.batch))
        with pytest.raises(StopError):
            finetune.main(args)  # there is nothing to resume from
    assert sorted(path.name for path in (tmp_path / "out.checkpoints").iterdir()) == [f"step-{EVERY}"]
    assert not (tmp_path / "out").exists()
    run = finetune.main(args)
    assert run.first == EVERY
    assert run.losses == {step: loss for step, loss in uninterrupted.losses.items() if step > EVERY}
    assert files(tmp_path / "out") == files(expected)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out.checkpoints" / f"step-{2 * EVERY}")


KILLED = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES)!r})
import collins, finetune
save, marker = collins.save, Path(sys.argv[1])

def save_then_wait(path, **parts):
    save(path, **parts)
    if path.parent.name.startswith(".step-{2 * EVERY}"):  # weights and optimizer are written, the folder is incomplete
        marker.touch()
        time.sleep(600)

collins.save = save_then_wait
finetune.main(sys.argv[2:])
"""


def test_a_run_killed_while_it_saves_resumes_bitwise(finetune, finetuned, data_folder, source, tmp_path):
    _, expected, _ = finetuned("llama")
    args, marker = arguments(data_folder, source("llama"), tmp_path / "out"), tmp_path / "marker"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(marker), *args]
    process = subprocess.Popen(command, env=environment(OMP_NUM_THREADS=str(torch.get_num_threads())))
    try:
        deadline = time.monotonic() + 120
        while not marker.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    checkpoints = tmp_path / "out.checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [f".step-{2 * EVERY}.partial", f"step-{EVERY}"]
    with pytest.raises(SystemExit):  # only with --resume
        finetune.main(args)
    assert finetune.main([*args, "--resume"]).first == EVERY
    assert files(tmp_path / "out") == files(expected)


def test_older_checkpoints_are_removed_and_others_kept(load, tmp_path):
    checkpoints = load("finetuning.running").Checkpoints(tmp_path / "out")
    (tmp_path / "out.checkpoints" / "step-of-another-kind").mkdir(parents=True)
    for step in (9, 10, 11):
        checkpoints.save(step, lambda folder: (folder / "file").write_text("whole"), keep=2)
    assert sorted(path.name for path in checkpoints.root.iterdir()) == ["step-10", "step-11", "step-of-another-kind"]
    assert checkpoints.newest() == (11, checkpoints.root / "step-11")


@pytest.mark.parametrize(
    "changes",
    [
        *(["--lr", "1e-3"], ["--batch-size", "3"], ["--steps", "13"], ["--data", "other"]),
        ["--accumulation-steps", "2"],
    ],
)
def test_a_run_is_resumed_with_its_settings_only(finetune, data_folder, source, tmp_path, changes, capsys, monkeypatch):
    other = write_lines(tmp_path / "other.jsonl", *[TEXT, COMPLETION] * 8)
    args = arguments(data_folder, source("llama"), tmp_path / "out", "--save-every", "1", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Rows, "batch", stopping_at(2, finetune.Rows.batch))
        with pytest.raises(StopError):
            finetune.main(args)
    changes = [str(other) if value == "other" else value for value in changes]
    assert_refused(finetune, [*args, *changes], capsys, f"{changes[0]} must be", "--resume")


def test_a_run_is_resumed_with_its_original_packing(finetune, load, data_folder, source, tmp_path, capsys, monkeypatch):
    args = arguments(data_folder, source("llama"), tmp_path / "out", "--save-every", "1", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Rows, "batch", stopping_at(2, finetune.Rows.batch))
        with pytest.raises(StopError):
            finetune.main(args)
    mask = torch.ones(8, dtype=torch.bool)
    monkeypatch.setattr(load("finetuning.causal_lm").CausalLM, "_influences", lambda *_: mask & (mask.cumsum(0) == 1))
    assert_refused(finetune, args, capsys, "whether documents share rows must be True, as in the run that")


def test_a_run_of_a_version_without_accumulation_is_resumed_without_it(load, tmp_path):
    refuse_others = load("finetuning.running").refuse_others
    (tmp_path / "run.json").write_text('{"--lr": 1.0, "step": 4}')
    refuse_others(tmp_path, {"--lr": 1.0, "--accumulation-steps": 1})
    with pytest.raises(ValueError, match=r"--accumulation-steps must be 1, as in the run that .*got 2"):
        refuse_others(tmp_path, {"--lr": 1.0, "--accumulation-steps": 2})


def errors_at_exit(finetune, args, capsys, code):
    """What is printed as an error when the script exits with this code."""
    with pytest.raises(SystemExit) as exit_info:
        finetune.main(args)
    assert exit_info.value.code == code
    return capsys.readouterr().err


def assert_refused(finetune, args, capsys, *messages):
    errors = errors_at_exit(finetune, args, capsys, code=2)
    for text in messages:
        assert text in errors


# Steps of several batches


def test_the_gradient_of_a_step_of_several_batches_is_that_of_the_mean_over_all_targets(finetune, load, tmp_path):
    """Gradients and loss equal those of all rows in one batch, also with unequal numbers of targets per batch."""
    documents, _ = documents_of(load, tmp_path, TEXT, COMPLETION, CHAT)
    model = tiny_model("llama", torch.float32)
    language_model = load("finetuning.causal_lm").CausalLM(model, chunks=2)
    shape = {"seq_len": 64, "packed": False, "seed": 0}
    rows, packed = (load("finetuning.packing").Rows(documents, **shape, batch_size=size) for size in (1, 3))
    batches = [rows.batch(number) for number in (1, 2, 3)]
    assert len({len(batch.targets) for batch in batches}) == 3
    loss = language_model.loss(packed.batch(1))
    expected = gradients(model, loss)
    model.zero_grad()
    torch.testing.assert_close(finetune.accumulated(language_model, batches, torch.device("cpu")), loss.detach())
    actual = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_run_that_is_stopped_between_the_batches_of_a_step_resumes_bitwise(
    finetune, load, data_folder, source, tmp_path, monkeypatch, capsys
):
    """Steps are counted, not batches, and each batch is used exactly once, also if their number is odd."""
    language_model, rows = load("finetuning.causal_lm").CausalLM, finetune.Rows
    loss, batch, batch_numbers, rates = language_model.loss, rows.batch, [], []
    monkeypatch.setattr(rows, "batch", lambda self, number: batch_numbers.append(number) or batch(self, number))

    class RateRecorder(finetune.Collins):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(finetune, "Collins", RateRecorder)

    def arguments_for(out):
        more = ["--accumulation-steps", "2", "--resume", "--save-every", "2", "--eval-every", "3", "--warmup", "0.3"]
        args = arguments(data_folder, source("llama"), out, *more)
        index = args.index("--steps")
        args[index : index + 2] = ["--epochs", "1.4"]
        return args

    uninterrupted = finetune.main(arguments_for(tmp_path / "whole"))
    count, steps = len(batch_numbers), uninterrupted.steps
    assert batch_numbers == list(range(1, count + 1))
    assert steps == (count + 1) / 2 >= 5
    assert f"{steps} steps of 2 batches of 2 x 64 tokens, the last step of 1\n" in capsys.readouterr().out
    assert list(uninterrupted.losses) == list(range(1, steps + 1))
    assert list(uninterrupted.held_out) == sorted({0, *range(3, steps, 3), steps})
    rate = load("finetuning.running").Rate(steps, warmup=0.3, least=0.1)
    assert rates == [pytest.approx(1e-2 * rate(step)) for step in range(steps)]

    calls = []

    def stop_at_batch(self, batch):
        calls.extend([None] * torch.is_grad_enabled())  # those of evaluation are not counted
        if len(calls) == 8:
            raise StopError  # at the second batch of step 4
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(language_model, "loss", stop_at_batch)
        with pytest.raises(StopError):
            finetune.main(arguments_for(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out.checkpoints").iterdir()] == ["step-2"]
    batch_numbers.clear()
    run = finetune.main(arguments_for(tmp_path / "out"))
    assert batch_numbers == list(range(5, count + 1))
    assert run.losses == {step: loss for step, loss in uninterrupted.losses.items() if step > 2}
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_step_of_one_batch_equals_backward_and_step(finetune, finetuned, data_folder, source, tmp_path, monkeypatch):
    """Bitwise: neither weights of batches nor partial steps are involved."""
    uninterrupted, expected, _ = finetuned("llama")

    def backward_of_one_batch(language_model, batches, device):
        (batch,) = batches
        loss = language_model.loss(batch.to(device))
        loss.backward()
        return loss.detach()

    def make_optimizer(*args, accumulation_steps, **options):
        assert accumulation_steps == 1
        return collins.Collins(*args, **options)

    monkeypatch.setattr(finetune, "accumulated", backward_of_one_batch)
    monkeypatch.setattr(finetune, "Collins", make_optimizer)
    assert finetune.main(arguments(data_folder, source("llama"), tmp_path / "out")).losses == uninterrupted.losses
    assert files(tmp_path / "out") == files(expected)


def test_the_memory_plan_is_for_one_batch(finetune, data_folder, source, tmp_path, monkeypatch):
    machine = Machine(GIB, GIB, GIB, GIB)
    monkeypatch.setattr(finetune, "machine_of", lambda device: machine)
    plans = []
    for parts in ("1", "8"):
        args = finetune.parse(
            None, arguments(data_folder, source("llama"), tmp_path / "out", "--accumulation-steps", parts)
        )
        trial = finetune.prepared(args).trial
        plans.append((trial.training, finetune.figures("model", trial)))
    assert plans[0] == plans[1]


# What a model computes


def full_loss(language_model, batch):
    logits = language_model.logits(batch).flatten(0, 1)[batch.trained]
    return functional.cross_entropy(logits.float(), batch.targets)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", [*CONFIGS, *FURTHER])
def test_the_loss_in_chunks_equals_that_of_whole_logits(load, kind):
    """Compares values and gradients in float32, with layers that are recomputed in backward."""
    model = tiny_model(kind, torch.float32).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 4)
    language_model = load("finetuning.causal_lm").CausalLM(model, chunks=3)
    language_model.check(rows=2)
    batch = probe(language_model)
    batch = type(batch)(batch.tokens, batch.positions, batch.trained[3:], batch.targets[3:])
    expected_loss = full_loss(language_model, batch)
    expected = gradients(model, expected_loss)
    language_model.prepare()
    chunked = language_model.loss(batch)
    torch.testing.assert_close(chunked, expected_loss)
    torch.testing.assert_close(gradients(model, chunked), expected, rtol=1e-4, atol=1e-6)
    assert expected[next(iter(expected))].any()


def test_layers_keep_only_their_input(load):
    language_model = load("finetuning.causal_lm").CausalLM(tiny_model("llama", num_hidden_layers=4), chunks=2)
    saved_bytes = {}
    for checkpointed in (False, True):
        if checkpointed:
            language_model.prepare()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            language_model.loss(probe(language_model))
        saved_bytes[checkpointed] = sum(sizes)
    assert saved_bytes[True] < saved_bytes[False] / 4


def test_each_gradient_is_computed_once(load):
    """Also the gradient of a head that is tied to the embedding, as steps in backward require."""
    model = tiny_model("qwen2")
    language_model = load("finetuning.causal_lm").CausalLM(model, chunks=4)
    language_model.prepare()
    names = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: names.append(name))
    language_model.loss(probe(language_model)).backward()
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile's own look at its inputs
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # transformers' own
def test_compiled_layers_share_one_graph_with_the_same_result(load):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = tiny_model("gemma2", torch.float32, num_hidden_layers=4).train()
    language_model = load("finetuning.causal_lm").CausalLM(model, chunks=2)
    batch = probe(language_model)
    expected = gradients(model, language_model.loss(batch))
    language_model.prepare(backend=backend)
    torch.testing.assert_close(gradients(model, language_model.loss(batch)), expected, rtol=1e-4, atol=1e-6)
    assert 1 <= len(graphs) <= 2  # full attention, and in a window


def counting_backend(products):
    """A backend of torch.compile that divides forward and backward as inductor does, and runs both eagerly.

    Args:
        products: the number of matrix products of each graph that is run is appended to it.
    """

    def compiled(graph, _):
        own = sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes)

        def run(*args):
            products.append(own)
            return graph(*args)

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=compiled, bw_compiler=compiled, partition_fn=min_cut_rematerialization_partition)


def own_model(load, backend):
    model = load("llama").Llama(3, 32, 48, 2, 2, VOCABULARY)
    for block in model.blocks:
        block.compile(backend=backend)
    return lambda: model.loss(torch.arange(17)[None], 1)


def model_of_transformers(load, backend):
    model = tiny_model("llama", torch.float32, num_hidden_layers=3)
    language_model = load("finetuning.causal_lm").CausalLM(model, chunks=1)
    language_model.prepare(backend=backend)
    return lambda: language_model.loss(probe(language_model))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile's own look at its inputs
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # transformers' own
@pytest.mark.parametrize("loss_of", [own_model, model_of_transformers])
def test_compiled_layers_compute_all_but_their_last_product_again(load, loss_of):
    torch._dynamo.reset()
    products = []
    loss = loss_of(load, counting_backend(products))
    loss().backward()
    # Of three layers with seven products; backward has two for each of them.
    assert products == [7] * 3 + [6 + 14] * 3


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_packed_row_has_the_loss_of_its_documents(load, kind):
    """The loss of documents in one row equals that of single documents, except for rounding, in float32."""
    packing, data = load("finetuning.packing"), load("finetuning.data")
    documents = data.Documents()
    for line, length in enumerate((20, 3, 14), 1):
        tokens = torch.arange(length).mul(7 * line).remainder(VOCABULARY).numpy()
        documents.add(data.Tokenized(line, tokens, tokens >= 0, whole=False), 64)
    language_model = load("finetuning.causal_lm").CausalLM(tiny_model(kind, torch.float32), chunks=2)
    language_model.check(rows=2)
    assert language_model.separates_documents
    shape = {"batch_size": 1, "seed": 0}
    (packed,) = packing.Rows(documents, seq_len=40, packed=True, **shape).in_order()
    separate = list(packing.Rows(documents, seq_len=40, packed=False, **shape).in_order())
    assert packed.tokens.shape == (1, 40)
    assert [len(batch.targets) for batch in separate] == [19, 2, 13]
    with torch.no_grad():
        losses = torch.stack([language_model.loss(batch) * len(batch.targets) for batch in separate])
        torch.testing.assert_close(language_model.loss(packed), losses.sum() / 34)
        unseparated = type(packed)(packed.tokens, torch.arange(40)[None], packed.trained, packed.targets)
        assert abs(language_model.loss(unseparated) - losses.sum() / 34) > 1e-4  # if documents were not separated


@pytest.mark.parametrize("kind", ["opt", "mamba"])
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_a_model_that_does_not_separate_documents_gets_one_per_row(
    finetune, data_folder, source, tmp_path, kind, capsys
):
    run = finetune.main(arguments(data_folder, source(kind), tmp_path / "out", "--steps", "3"))
    assert not run.packed
    assert "documents that share a row would see each other" in capsys.readouterr().out


def test_a_model_that_attends_to_later_tokens_is_rejected(finetune, data_folder, source, tmp_path, capsys):
    args = arguments(data_folder, source("bert"), tmp_path / "out")
    assert_refused(finetune, args, capsys, "bert is no causal language model as configured: tokens see later ones")


def test_a_nonfinite_loss_ends_the_run(finetune, data_folder, source, tmp_path):
    with pytest.raises(FloatingPointError, match="the loss of step 2 is"):
        finetune.main([*arguments(data_folder, source("llama"), tmp_path / "out", "--log-every", "1"), "--lr", "1e18"])
    assert not (tmp_path / "out").exists()


# What is trained on


def documents_of(load, tmp_path, *records, seq_len=64, tokenizer=None):
    """Each document as its tokens and its targets; "·" stands for tokens that are not trained on."""
    tokenizer = tokenizer or tiny_tokenizer()
    path = write_lines(tmp_path / "data.jsonl", *records)
    documents = load("finetuning.data").read_documents(path, tokenizer, seq_len=seq_len, vocabulary=VOCABULARY)
    texts = []
    for start, stop in zip(documents.bounds, documents.bounds[1:], strict=False):
        text = tokenizer.decode(documents.tokens[start:stop].tolist())
        predicted = "".join("·" if t < 0 else tokenizer.decode([t]) for t in documents.targets[start:stop])
        texts.append((text, predicted))
    return documents, texts


def test_text_is_trained_on_in_full(load, tmp_path):
    _, texts = documents_of(load, tmp_path, {"text": "a cat", "id": 7})
    assert texts == [("a cat", " cat</s>")]


def test_a_completion_is_trained_on_without_its_prompt(load, tmp_path):
    _, texts = documents_of(load, tmp_path, COMPLETION, {"prompt": "is ", "completion": "five"})
    first, second = texts
    assert first == ("two and two is four", "·" * 13 + " four</s>")
    assert second == ("is five", "· five</s>")  # the token " f" belongs to both


def test_answers_of_the_assistant_in_a_chat_are_trained_on(load, tmp_path):
    _, ((text, predicted),) = documents_of(load, tmp_path, CHAT, seq_len=99)
    assert text == "<s><|user|>hello<|end|><|assistant|>good day<|end|><|user|>bye<|end|><|assistant|>so long"
    assert predicted == "·" * 8 + "good day<|end|>" + "·" * 6 + "so long<|end|>"


def test_marks_of_a_template_are_used(load, tmp_path):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    )
    _, ((_, predicted),) = documents_of(load, tmp_path, CHAT, seq_len=99, tokenizer=tiny_tokenizer(template))
    assert predicted.replace("·", "") == "good dayso long"


def test_a_template_that_changes_earlier_answers_gives_a_document_for_each(load, tmp_path):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}hm. {% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    _, (first, second) = documents_of(load, tmp_path, CHAT, seq_len=99, tokenizer=tiny_tokenizer(template))
    assert first == ("<|user|>hello<|end|><|assistant|>hm. good day", "·" * 7 + "hm. good day<|end|>")
    assert second[0] == "<|user|>hello<|end|><|assistant|>good day<|end|><|user|>bye<|end|><|assistant|>hm. so long"
    assert second[1].lstrip("·") == "hm. so long<|end|>"


def test_with_a_template_without_an_opening_the_role_is_trained_on(load, tmp_path):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    _, ((_, predicted),) = documents_of(load, tmp_path, CHAT, seq_len=99, tokenizer=tiny_tokenizer(template))
    assert predicted == "·" * 6 + "<|assistant|>good day<|end|>" + "·" * 5 + "<|assistant|>so long<|end|>"


def test_long_text_is_cut_into_pieces_without_loss(load, tmp_path):
    text = "abcdefghij" * 5
    documents, texts = documents_of(load, tmp_path, {"text": text}, seq_len=16)
    assert documents.lengths == [16, 16, 16, 2]
    assert "".join(predicted for _, predicted in texts) == text[1:] + "</s>"
    assert (documents.cut, documents.dropped) == (0, 0)


def test_the_end_of_a_long_completion_is_dropped_and_counted(load, tmp_path):
    dropped = {"prompt": "p" * 40, "completion": "c"}
    documents, texts = documents_of(load, tmp_path, {"prompt": "pp", "completion": "c" * 30}, dropped, seq_len=16)
    assert texts == [("pp" + "c" * 14, "·" + "c" * 15)]
    assert (documents.cut, documents.dropped) == (31 + 1 - 16 + 40 + 1 - 16, 1)


def test_packing_uses_every_document_and_most_of_each_row(load):
    pack = load("finetuning.packing").pack
    lengths = torch.randint(1, 65, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(lengths, 64)
    assert sorted(document for row in rows for document in row) == list(range(500))
    assert max(sum(lengths[document] for document in row) for row in rows) <= 64
    assert len(rows) <= 1.05 * sum(lengths) / 64
    assert rows == pack(lengths, 64)
    with pytest.raises(ValueError, match="at most 63 places, got 64"):
        pack([*lengths, 64], 63)


def test_each_epoch_uses_every_row_once_in_a_different_order(load, tmp_path):
    documents, _ = documents_of(load, tmp_path, *[TEXT, COMPLETION, CHAT] * 4)
    rows = load("finetuning.packing").Rows(documents, seq_len=64, batch_size=3, packed=True, seed=5)
    count = len(rows)
    assert rows.batches(3.0) == count  # three passes of `count` rows, three rows a batch
    rows_in_order = [tuple(row.tolist()) for step in range(1, count + 1) for row in rows.batch(step).tokens]
    passes = [rows_in_order[i : i + count] for i in range(0, 3 * count, count)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1]
    ordered = list(rows.in_order())
    assert {tuple(batch.tokens.shape) for batch in ordered} == {(3, 64)}
    assert sum(len(batch.targets) for batch in ordered) == documents.trained == sum(t >= 0 for t in documents.targets)


def test_dropped_tokens_and_documents_are_reported(finetune, source, tmp_path, capsys):
    too_long = {"prompt": "p" * 70, "completion": "c"}
    write_lines(tmp_path / "data.jsonl", too_long, {"prompt": "p", "completion": "c" * 70}, *[TEXT] * 8)
    finetune.main(arguments(tmp_path, source("llama"), tmp_path / "out", "--steps", "1"))
    assert "left out: 14 tokens beyond --seq-len, 1 documents without a target" in capsys.readouterr().out


def test_held_out_lines_are_not_trained_on(finetune, load, tmp_path):
    records = [{"text": f"{number:03} " * 40} for number in range(20)]
    documents, _ = documents_of(load, tmp_path, *records, seq_len=16)
    args = finetune.parse(None, ["m", "--data", "d", "--out", "o", "--eval-fraction", "0.25"])
    training, held_out = finetune._divided(documents, args)
    assert len(set(held_out.lines)) == 5
    assert set(training.lines) | set(held_out.lines) == set(range(1, 21))
    assert not set(training.lines) & set(held_out.lines)
    assert sorted([*training.tokens, *held_out.tokens]) == sorted(documents.tokens)


def test_held_out_data_may_be_in_a_separate_file(finetune, data_folder, source, tmp_path):
    held_out = write_lines(tmp_path / "held-out.jsonl", TEXT)
    args = arguments(data_folder, source("llama"), tmp_path / "out", "--eval-data", str(held_out), "--eval-every", "1")
    run = finetune.main([*args, "--steps", "2"])
    assert list(run.held_out) == [0, 1, 2]


def test_the_rate_rises_then_falls(load):
    rate = load("finetuning.running").Rate(steps=100, warmup=0.1, least=0.2)
    rates = [rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)


# Errors before anything is loaded


@pytest.fixture
def no_model_loading(finetune, monkeypatch):
    """Fails if a model is loaded onto the device."""
    monkeypatch.setattr(finetune, "load_model", lambda *_: pytest.fail("the model was loaded"))


@pytest.fixture
def model_copy(source, tmp_path):
    """A copy of a model's folder, which tests modify."""
    return shutil.copytree(source("llama"), tmp_path / "model")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def truncate(file, by):
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - by)


def edit_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def without_weights(folder):
    for shard in shards(folder):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").touch()


FOLDERS = {
    "no folder": (shutil.rmtree, ["model: must be a model's folder: there is none"]),
    "no configuration": (lambda f: (f / "config.json").unlink(), ["model: must be", "config.json"]),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json: must be JSON"]),
    "no object": (lambda f: (f / "config.json").write_text("[]"), ["config.json: must hold a JSON object, got list"]),
    "quantized": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
        ["config.json: has a quantization_config"],
    ),
    "unknown model": (
        lambda f: edit_json(f / "config.json", model_type="llama9"),
        ["config.json: model_type must be one that transformers", "'llama9'"],
    ),
    "no language model": (
        lambda f: edit_json(f / "config.json", model_type="t5"),
        ["config.json: model_type must be that of a causal language model, got 't5'"],
    ),
    "no weights": (without_weights, ["model: must have its weights in model.safetensors", "pytorch_model.bin"]),
    "no shard": (
        lambda f: shards(f)[1].unlink(),
        ["model.safetensors.index.json: names the shard model-00002", "not complete"],
    ),
    "truncated shard": (lambda f: truncate(shards(f)[2], 7), ["model-00003-of-", "bytes, by its own header, got"]),
    "truncated header": (
        lambda f: truncate(shards(f)[0], shards(f)[0].stat().st_size - 40),
        ["model-00001-of-", "its header cannot be read, or it is truncated"],
    ),
    "empty shard": (lambda f: shards(f)[0].write_bytes(b""), ["model-00001-of-", "must be a safetensors file"]),
    "longer shard": (
        lambda f: shards(f)[0].write_bytes(shards(f)[0].read_bytes() + b"more"),
        ["model-00001-of-", "not written by"],
    ),
    "index of another model": (
        lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"odd": shards(f)[0].name}),
        ["model-00001-of-", "must hold odd, by model.safetensors.index.json"],
    ),
    "index to elsewhere": (
        lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"odd": "../odd.safetensors"}),
        ["shards must be files beside it, got '../odd.safetensors'"],
    ),
    "more layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=3),
        ["must have all weights of LlamaForCausalLM; missing: model.layers.2."],
    ),
    "other widths": (
        lambda f: edit_json(f / "config.json", intermediate_size=64),
        ["must have the shape (32, 64), by config.json, got (32, 48)"],
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("token*")],
        ["model: must have a tokenizer that transformers can load"],
    ),
}


@pytest.mark.usefixtures("no_model_loading")
@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_trained_is_rejected(finetune, data_folder, model_copy, tmp_path, case, capsys):
    break_folder, messages = FOLDERS[case]
    break_folder(model_copy)
    assert_refused(
        finetune, arguments(data_folder, model_copy, tmp_path / "out"), capsys, "finetune.py: error: ", *messages
    )
    assert not (tmp_path / "out.checkpoints").exists()


ACCEPTED = 'an object with "text", with "prompt" and "completion", or with "messages"'
DATA = {
    "no file": (None, "data.jsonl: must be a file of JSON lines: there is none"),
    "empty": ([], f"data.jsonl: must hold at least one line of JSON, {ACCEPTED}; it holds none"),
    "blank": (["", "  "], "must hold at least one line"),
    "no JSON": ([TEXT, "", "{'text': 1}"], f"data.jsonl:3: must be a line of JSON, {ACCEPTED}"),
    "no UTF-8": ([TEXT, b"\xff\xfe"], "data.jsonl:2: must be a line of JSON"),
    "no object": ([TEXT, [1, 2]], f"data.jsonl:2: must be {ACCEPTED}, got [1, 2]"),
    "no kind": ([{"content": "a"}], f"data.jsonl:1: must be {ACCEPTED}, and one kind alone; got the keys 'content'"),
    "two kinds": ([{**TEXT, **COMPLETION}], "one kind alone; got the keys 'text', 'prompt', 'completion'"),
    "no string": ([TEXT, {"text": 5}], "data.jsonl:2: 'text' must be a string, got 5"),
    "no completion": ([{"prompt": "a"}], "data.jsonl:1: 'completion' must be a string, got nothing"),
    "no messages": ([{"messages": []}], "data.jsonl:1: 'messages' must be a list of objects with 'role'"),
    "no role": ([{"messages": [{"content": "a"}]}], "'messages'[0] must be an object with 'role' and 'content'"),
    "no content": ([{"messages": [{"role": "user"}]}], "'messages'[0]: 'content' must be a string, got null"),
    "no answer": ([{"messages": [{"role": "user", "content": "a"}]}], "must have one of the role 'assistant'"),
    "nothing to learn": ([{"text": ""}], "data.jsonl: must hold something to train on; no token of its 1 lines can be"),
}


@pytest.mark.usefixtures("no_model_loading")
@pytest.mark.parametrize("case", DATA)
def test_invalid_data_are_rejected(finetune, source, tmp_path, case, capsys):
    records, message = DATA[case]
    path = tmp_path / "data.jsonl"
    if records is not None:
        path.write_bytes(b"\n".join(r if isinstance(r, bytes) else as_line(r).encode() for r in records))
    assert_refused(finetune, arguments(tmp_path, source("llama"), tmp_path / "out"), capsys, message)


@pytest.mark.usefixtures("no_model_loading")
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "data.jsonl:1: 'messages' need a chat template, and the tokenizer has none"),
        ("{{ raise_exception('no users here') }}", "data.jsonl:1: 'messages' must suit the tokenizer's chat template"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "data.jsonl:1: 'messages'[1]: the chat template writes what comes before this answer in two ways",
        ),
    ],
)
def test_a_chat_that_the_template_cannot_format_is_rejected(finetune, model_copy, tmp_path, template, message, capsys):
    (model_copy / "chat_template.jinja").unlink()
    tiny_tokenizer(template).save_pretrained(model_copy)
    write_lines(tmp_path / "data.jsonl", CHAT)
    assert_refused(finetune, arguments(tmp_path, model_copy, tmp_path / "out"), capsys, message)


@pytest.mark.usefixtures("no_model_loading")
def test_a_tokenizer_of_another_model_is_rejected(finetune, data_folder, tmp_path, capsys):
    small_model = tiny_folder(tmp_path / "small", "llama", vocab_size=200)
    assert_refused(
        finetune,
        arguments(data_folder, small_model, tmp_path / "out"),
        capsys,
        "its tokenizer has 262 tokens, but its model 200",
    )
    extended_model = tiny_folder(tmp_path / "added", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(extended_model)
    write_lines(tmp_path / "data.jsonl", TEXT, {"text": "a <|new|> token"})
    message = "data.jsonl:2: becomes token 262, '<|new|>', but the model has 262 embeddings"
    assert_refused(finetune, arguments(tmp_path, extended_model, tmp_path / "out"), capsys, message)


@pytest.mark.usefixtures("no_model_loading")
@pytest.mark.parametrize(
    ("bad_arguments", "message"),
    [
        (["--seq-len", "65"], "--seq-len must be at most 64, the positions of "),
        (["--out", "nowhere/out"], "--out must be in an existing folder, got nowhere/out"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--lr", "0"], "--lr must be above 0 and below 2**63, got 0.0"),
        (["--compress-ratio", "0.5"], "--compress-ratio must be at least 1, got 0.5"),
        (["--residual-weight", "-0.5"], "--residual-weight must be at least 0 and below 2**63, got -0.5"),
        (["--residual-weight", "nan"], "--residual-weight must be at least 0 and below 2**63, got nan"),
        (["--max-grad-norm", "-1"], "--max-grad-norm must be above 0 and below 2**63, got -1.0"),
        (["--warmup", "2"], "--warmup must be in [0, 1], got 2.0"),
        (["--policy", "disk"], "memory must be"),
        (["--accumulation-steps", "0"], "accumulation_steps must be an int of at least 1, got 0"),
        (["--accumulation-steps", "1.5"], "accumulation_steps must be an int of at least 1, got '1.5'"),
        (["--accumulation-steps", "257"], "accumulation_steps must be at most 256, got 257"),
        (["--epochs", "1"], "not allowed with argument --steps"),
        (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl: must be a file of JSON lines"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments_are_rejected(finetune, data_folder, source, tmp_path, bad_arguments, message, capsys):
    assert_refused(
        finetune, [*arguments(data_folder, source("llama"), tmp_path / "out"), *bad_arguments], capsys, message
    )


@pytest.mark.usefixtures("no_model_loading")
def test_an_existing_folder_is_not_overwritten(finetune, data_folder, source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    message = f"--out must not exist yet, got {tmp_path / 'out'}"
    assert_refused(finetune, arguments(data_folder, source("llama"), tmp_path / "out"), capsys, message)
    assert not list((tmp_path / "out").iterdir())


# Output


def test_the_files_of_a_published_folder_are_preserved(finetune, data_folder, model_copy, tmp_path):
    """Keys of an older transformers, files that it does not write, and files that do not belong to the model."""
    config = json.loads((model_copy / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config.pop("dtype")
    config.update(rope_theta=theta, torch_dtype="float32", architectures=["LlamaModel"], odd={"kept": True})
    (model_copy / "config.json").write_text(json.dumps(config))
    (model_copy / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": false}'
    )  # not to be written now
    for name in ("LICENSE", "tokenizer.model", "README.md", "optimizer.pt"):
        (model_copy / name).write_text(name)
    finetune.main(arguments(data_folder, model_copy, tmp_path / "out", "--steps", "1"))
    written = files(tmp_path / "out")
    assert json.loads(written["config.json"]) == {
        **config,
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
    }
    for name in ("generation_config.json", "LICENSE", "tokenizer.model"):
        assert written[name] == (model_copy / name).read_bytes()
    assert not written.keys() & {"README.md", "optimizer.pt"}


def test_large_weights_are_written_in_shards(load, finetune, data_folder, source, tmp_path, monkeypatch):
    monkeypatch.setattr(load("finetuning.folder"), "_SHARD", "20KB")
    finetune.main(arguments(data_folder, source("llama"), tmp_path / "out", "--steps", "1"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_no_progress_bar_is_drawn_without_a_terminal(finetune, data_folder, source, tmp_path, capsys):
    finetune.main(arguments(data_folder, source("llama"), tmp_path / "out", "--steps", "2", "--log-every", "1"))
    output = capsys.readouterr()
    assert output.err == ""
    assert re.search(r"step 2/2: loss \d\.\d{4}, norm \d\.\d{3}, lr \S+, tokens/s [\d,]+\n", output.out)
    assert "\r" not in output.out


# Out of memory


def test_out_of_memory_is_reported_with_the_plan_and_proposed_changes(
    finetune, load, data_folder, source, tmp_path, monkeypatch, capsys
):
    def raise_out_of_memory(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(load("finetuning.causal_lm").CausalLM, "check", lambda *_: None)  # so that training begins
    monkeypatch.setattr(load("finetuning.causal_lm").CausalLM, "loss", raise_out_of_memory)
    monkeypatch.setattr("collins.offload.trial.MOST_LAYERS", 4)  # limits the search for the largest model
    errors = errors_at_exit(finetune, arguments(data_folder, source("llama"), tmp_path / "out"), capsys, code=1)
    for figure in ("weights", "activations: checkpoints", "staging ring on the device", "largest that fits"):
        assert figure in errors
    assert errors.index("What to change:") < errors.index(
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    assert "expandable_segments:True" in errors


@pytest.mark.usefixtures("no_model_loading")
def test_weights_that_exceed_the_device_are_not_loaded(
    finetune, load, data_folder, source, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(load("finetuning.forecast"), "host_memory_free", lambda: 10_000)
    args = arguments(data_folder, source("llama"), tmp_path / "out")
    assert "9.8 KiB are free" in errors_at_exit(finetune, args, capsys, code=1)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("batch", "seq_len", "device", "host", "policy", "proposed"),
    [
        (16, 2048, 24, 64, "auto", "--batch-size"),
        (1, 65536, 24, 64, "auto", "--seq-len"),
        (1, 2048, 15, 64, "device", "--policy host"),
        (1, 2048, 24, 64, "auto", "by the plan it fits"),
        (1, 2048, 8, 64, "auto", "a device with more memory"),
    ],
)
def test_proposed_changes_fit_according_to_the_plan(load, batch, seq_len, device, host, policy, proposed):
    forecast = load("finetuning.forecast")
    machine = Machine(device * GIB, device * GIB, host * GIB, host * GIB)
    policy = collins.offload.MemoryPolicy(policy)

    def trial(batch, seq_len, policy):
        return forecast.trial_of(model_of("llama-7b"), Training(torch.bfloat16, batch, seq_len), machine, policy)

    (line,) = [
        line for line in forecast.advice("llama-7b", trial(batch, seq_len, policy)).splitlines() if proposed in line
    ]
    if proposed == "--batch-size":
        assert trial(int(line.split()[-1]), seq_len, policy).fits()
        assert not trial(batch, seq_len, policy).fits()
    if proposed == "--seq-len":
        assert trial(batch, int(line.split()[-1]), policy).fits()
    if proposed == "--policy host":
        assert trial(batch, seq_len, collins.offload.MemoryPolicy("host")).fits()


# On a GPU


@pytest.mark.cuda
@pytest.mark.usefixtures("reproducible")
def test_on_a_gpu_it_is_compiled_and_resumes_bitwise(finetune, data_folder, source, tmp_path, monkeypatch):
    def arguments_for(out):
        return [*arguments(data_folder, source("llama"), out, "--resume", "--policy", "host"), "--device", "cuda"]

    uninterrupted = finetune.main(arguments_for(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Rows, "batch", stopping_at(STOP, finetune.Rows.batch))
        with pytest.raises(StopError):
            finetune.main(arguments_for(tmp_path / "out"))
    run = finetune.main(arguments_for(tmp_path / "out"))
    assert run.losses == {step: loss for step, loss in uninterrupted.losses.items() if step > EVERY}
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.cuda
def test_weights_are_on_the_gpu_only_once(load, tmp_path):
    folder = load("finetuning.folder")
    source = tiny_folder(tmp_path / "model", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = folder.load_model(folder.open_folder(source), source, torch.bfloat16, torch.device(DEVICE))
    weights = sum(p.nbytes for p in model.parameters())
    assert torch.cuda.max_memory_allocated() - before < 1.1 * weights
