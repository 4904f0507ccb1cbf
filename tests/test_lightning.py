"""Collins under Lightning's `Trainer`: closures, mixed precision, clipping, accumulation, checkpoints."""

import pytest
import torch
from clients import Repeater, StatisticsCalls, network, steps_taken
from helpers import OPTIONS, same

from collins import Collins
from collins.offload import MemoryPolicy

lightning = pytest.importorskip("lightning")

pytestmark = [
    # Lightning's own use of torch.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    # The tests use few batches, from memory, so workers would not pay off.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # A resumed run uses the folder of its checkpoint.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

BATCHES, EPOCHS = 4, 2


class Module(lightning.LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.net = network()
        self.options = options
        self.losses = []

    def training_step(self, batch, _):
        loss = self.net(batch.to(self.net[0].weight.dtype)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = Collins(self.net.named_parameters(), **{**OPTIONS, **self.options})
        self.repeater = None if self.options.get("in_backward") else Repeater(optimizer)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(size=4):
    data = torch.randn(4 * BATCHES, 32, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(data, batch_size=size)


def fit(module, folder, precision="32-true", resume=None, size=4, epochs=EPOCHS, **arguments):
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints],
        **arguments,
    )
    trainer.fit(module, batches(size), ckpt_path=resume, weights_only=None if resume is None else True)
    return trainer


PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipped_steps_with_closures_equal_manual_steps(tmp_path, precision, clip):
    clip_value = 0.05 if clip == "norm" else 1e-3
    module = Module()
    fit(module, tmp_path, precision, gradient_clip_val=clip_value, gradient_clip_algorithm=clip)
    assert module.repeater.is_equal
    assert len(module.repeater.norms) == steps_taken(module.repeater.first) == BATCHES * EPOCHS
    largest = module.repeater.norms[0] if clip == "norm" else max(g.abs().max() for g in module.repeater.gradients)
    assert float(largest) == pytest.approx(clip_value, rel=2e-2)
    assert len(set(module.losses)) > BATCHES
    assert module.repeater.first.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("memory", [None, "host"], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_bitwise_equals_an_uninterrupted_one(tmp_path, precision, memory):
    uninterrupted, resumed = (Module(memory=memory) for _ in range(2))
    fit(uninterrupted, tmp_path, precision, gradient_clip_val=0.05)
    fit(resumed, tmp_path, precision, gradient_clip_val=0.05, resume=tmp_path / "epoch=0.ckpt")
    assert len(uninterrupted.losses) == BATCHES * EPOCHS
    assert resumed.losses == uninterrupted.losses[BATCHES:]
    assert same(resumed.state_dict(), uninterrupted.state_dict())
    assert same(resumed.repeater.first.state_dict(), uninterrupted.repeater.first.state_dict())
    assert steps_taken(resumed.repeater.first) == BATCHES * EPOCHS


def test_accumulated_gradients_equal_those_of_the_large_batch(tmp_path):
    small, large = Module(), Module()
    fit(small, tmp_path, accumulate_grad_batches=2, size=2)
    fit(large, tmp_path)
    assert small.repeater.is_equal
    assert steps_taken(small.repeater.first) == steps_taken(large.repeater.first) == BATCHES * EPOCHS
    torch.testing.assert_close(small.repeater.gradients, large.repeater.gradients)


class AlternatingNetworks(lightning.LightningModule):
    """Two networks with one optimizer each, trained alternately, with the other one toggled off."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.nets = torch.nn.ModuleList([network(), network()])
        self.repeaters = []
        self.frozen = []

    def training_step(self, batch, index):
        net_index = index % 2
        optimizer = self.optimizers()[net_index]
        self.toggle_optimizer(optimizer)
        self.frozen.append([p.requires_grad for p in self.nets[1 - net_index].parameters()])
        self.manual_backward((self.nets[0](batch) - self.nets[1](batch)).add(1).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        optimizers = [Collins(net.parameters(), **OPTIONS) for net in self.nets]
        self.repeaters = [Repeater(optimizer) for optimizer in optimizers]
        return optimizers


def test_two_optimizers_step_alternately(tmp_path):
    module = AlternatingNetworks()
    fit(module, tmp_path)
    assert not any(map(any, module.frozen))
    for repeater in module.repeaters:
        assert repeater.is_equal
        assert steps_taken(repeater.first) == BATCHES * EPOCHS // 2


def test_in_backward_rejects_the_closures_of_lightning_and_nothing_changes(tmp_path):
    module = Module(in_backward=True)
    with pytest.raises(RuntimeError, match="closure must be None with in_backward=True"):
        fit(module, tmp_path)
    assert module.losses == []
    assert same(module.net.state_dict(), network().state_dict())


def test_the_command_line_accepts_the_optimizer_and_its_options(monkeypatch):
    cli = pytest.importorskip("lightning.pytorch.cli")
    pytest.importorskip("jsonargparse")

    class Bare(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

    args = [
        "--optimizer=collins.Collins",
        "--optimizer.lr=3e-3",
        "--optimizer.betas=[0.9,0.95]",
        "--optimizer.table_dtype=bfloat16",
        "--optimizer.compress_ratio=16",
        "--optimizer.rehash_period=null",
        "--optimizer.maximize=false",
        "--optimizer.memory={tier: host, transfer_size: 1MiB}",
        "--lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
        "--lr_scheduler.gamma=0.5",
    ]
    trainer_defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    monkeypatch.setattr("sys.argv", ["train.py", *args])
    lightning_cli = cli.LightningCLI(
        Bare, run=False, save_config_callback=None, seed_everything_default=0, trainer_defaults=trainer_defaults
    )
    (optimizer,), _ = lightning_cli.model.configure_optimizers()
    assert type(optimizer) is Collins
    group = optimizer.param_groups[0]
    names = ("lr", "betas", "table_dtype", "compress_ratio", "rehash_period", "maximize")
    assert [group[name] for name in names] == [3e-3, (0.9, 0.95), torch.bfloat16, 16, None, False]
    assert optimizer.memory == MemoryPolicy("host", transfer_size="1MiB")


class Recorder(lightning.pytorch.loggers.logger.Logger):
    def __init__(self):
        super().__init__()
        self.logged = []

    name, version = "recorder", 0

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, metrics))


@pytest.mark.parametrize("rounds", [1, 2])
def test_statistics_are_read_only_at_the_steps_that_lightning_logs(tmp_path, monkeypatch, rounds):
    from collins.integrations.lightning import StatisticsCallback

    calls = StatisticsCalls(monkeypatch)
    module, recorder = Module(max_grad_norm=1.0), Recorder()
    lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2 * rounds,
        accumulate_grad_batches=rounds,
        log_every_n_steps=3,
        logger=recorder,
        callbacks=[StatisticsCallback()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    ).fit(module, batches())
    assert calls.read == [3, 6]
    assert sorted(set(calls.measured)) == [2, 5]
    entries = [(step, metrics) for step, metrics in recorder.logged if "collins/grad_norm" in metrics]
    assert [step for step, _ in entries] == [2, 5]  # Lightning counts steps from 0
    for _, metrics in entries:
        assert metrics["collins/grad_norm"] > 0
        assert metrics["collins/update_rms/0"] > 0
