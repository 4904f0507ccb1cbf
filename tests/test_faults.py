"""After any failure in the middle of a step, each parameter is bitwise either stepped or unchanged, and training can
continue.

Steps fail at every allocation, at lines spread over all the code that performs steps, in copies between host and
device, and in hooks of backward. The state afterwards is compared with that of an optimizer whose steps did not fail.
"""

import copy
import errno
import gc
import io
import random
import resource
import sys
import types
import warnings
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fake_streams import MODES, FakeStreams
from helpers import give_gradients, parameters, same_snapshots, snapshot, tensors_in
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

import collins
from collins import Collins, whole_folder
from collins.offload import Slab, pinned_bytes, set_pin_limit, slabs, staging
from collins.offload.streams import HostStreams

FAILURE_POINTS = 100 if settings.get_current_profile_name() == "thorough" else 10
SHAPES = [(32, 64), (40,), (33, 37), (32, 64), (24, 64)]
WAYS = {
    "resident": {},
    "universal": {"hash": "universal"},
    "bf16 tables": {"table_dtype": torch.bfloat16},
    "capturable": {"capturable": True},
    "device": {"memory": "device"},
    "host": {"memory": {"tier": "host", "transfer_size": 1500, "staging_slots": 2}},
    "mixed": {"memory": {"device_budget": 1600, "transfer_size": 300, "staging_slots": 2}},  # one on the device
    "in_backward": {"in_backward": True},
    "orthogonal": {"decode": "orthogonal"},
    "orthogonal host": {"decode": "orthogonal", "memory": {"tier": "host", "transfer_size": 1500, "staging_slots": 2}},
    "host in_backward": {"memory": {"tier": "host", "transfer_size": 1500, "staging_slots": 2}, "in_backward": True},
}
in_every_configuration = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
at_either_step = pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])


def make_optimizer(options, steps):
    ps = parameters(torch.float32, SHAPES, "cpu")
    opt = Collins(ps, lr=1e-2, min_K=16, rehash_period=3, **options)
    for number in range(steps):
        step(ps, opt, number)
    return ps, opt


def step(ps, opt, number, indices=None):
    """Steps with gradients for all parameters, or for those with these indices."""
    give_gradients(number, ps)
    grads = [p.grad if indices is None or i in indices else None for i, p in enumerate(ps)]
    try:
        if opt.in_backward:
            for p in ps:
                p.grad = None
            if any(g is not None for g in grads):
                sum((p * g).sum() for p, g in zip(ps, grads, strict=True) if g is not None).backward()
        else:
            for p, g in zip(ps, grads, strict=True):
                p.grad = g
        opt.step()
    finally:
        for p in ps:
            p.grad = None


class Fault:
    """A step that is made to fail in many ways, with the state of all parameters before and after it."""

    def __init__(self, options, first):
        self.number = 0 if first else 3
        self.options = options
        self.before = snapshot(*self.new())
        ps, opt = self.new()
        step(ps, opt, self.number)
        self.after = snapshot(ps, opt)

    def new(self):
        return make_optimizer(self.options, self.number)

    def check_after_failure(self, ps, opt):
        """Checks an optimizer whose step has just failed; returns the indices of the parameters that were stepped."""
        actual = snapshot(ps, opt)
        stepped = {i for i, after in enumerate(self.after) if same_snapshots(actual[i], after)}
        unstepped = set(range(len(ps))) - stepped
        assert all(same_snapshots(actual[i], self.before[i]) for i in unstepped), (stepped, unstepped)
        if opt.in_backward:
            opt.step()  # ends it
        step(ps, opt, self.number + 1)
        reference_ps, reference_opt = self.new()
        step(reference_ps, reference_opt, self.number, stepped)
        step(reference_ps, reference_opt, self.number + 1)
        assert all(map(same_snapshots, snapshot(ps, opt), snapshot(reference_ps, reference_opt)))
        return stepped


def failed_steps(fault, owner, name, error, monkeypatch):
    """Steps in which the first call of a function fails, then the second one, and so on until no call is left."""
    original = getattr(owner, name)

    def fail(*args):
        calls.append(args)
        if len(calls) == failing:
            raise error
        return original(*args)

    for failing in range(1, 30):  # noqa: B007
        (ps, opt), calls = fault.new(), []
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            try:
                step(ps, opt, fault.number)
            except type(error) as raised:
                assert raised is error  # noqa: PT017
            else:
                return
        yield ps, opt
    raise AssertionError


# Memory.


class FailingAllocations(TorchDispatchMode):
    """Makes the `failing`-th operation that allocates memory fail."""

    def __init__(self, failing=None):
        super().__init__()
        self.failing, self.count = failing, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        argument_storages = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        if any(t.untyped_storage()._cdata not in argument_storages for t in tensors_in(result)):
            self.count += 1
            if self.count == self.failing:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return result


@in_every_configuration
@at_either_step
def test_memory_that_runs_out_at_any_allocation_of_a_step(options, first):
    fault = Fault(options, first)
    ps, opt = fault.new()
    with FailingAllocations() as allocations:
        step(ps, opt, fault.number)
    assert allocations.count > 10
    stride = max(allocations.count // FAILURE_POINTS, 1)
    for failing in range(1, allocations.count + 1, stride):
        ps, opt = fault.new()
        try:
            with FailingAllocations(failing):
                step(ps, opt, fault.number)
        except torch.OutOfMemoryError:
            fault.check_after_failure(ps, opt)
        else:  # a table went to the host instead
            assert all(map(same_snapshots, snapshot(ps, opt), fault.after))


@in_every_configuration
@at_either_step
def test_memory_that_runs_out_at_any_allocation_of_a_load(options, first):
    """The saved state has other hash keys, those of the names of its parameters."""

    def new_optimizer():
        ps, opt = make_optimizer(options, 0 if first else 3)
        return ps, opt, snapshot(ps, opt)

    qs = parameters(torch.float32, SHAPES, "cpu")
    source = Collins([(f"p{i}", q) for i, q in enumerate(qs)], lr=1e-2, min_K=16, rehash_period=3, **options)
    for number in range(2):
        step(qs, source, number)
    saved = source.state_dict()
    ps, opt, _ = new_optimizer()
    with FailingAllocations() as allocations:
        opt.load_state_dict(copy.deepcopy(saved))
    for failing in range(1, allocations.count + 1, max(allocations.count // FAILURE_POINTS, 1)):
        ps, opt, before = new_optimizer()
        state_dict = copy.deepcopy(saved)
        try:
            with FailingAllocations(failing):
                opt.load_state_dict(state_dict)
        except (torch.OutOfMemoryError, MemoryError):  # of the staging ring
            assert all(map(same_snapshots, snapshot(ps, opt), before))
            reference_ps, reference_opt, _ = new_optimizer()
            for params, optimizer in ((ps, opt), (reference_ps, reference_opt)):
                step(params, optimizer, 3)
            assert all(map(same_snapshots, snapshot(ps, opt), snapshot(reference_ps, reference_opt)))
        else:  # a table went to the host instead
            assert same_snapshots([ps[0], opt.state_dict()["state"][0]], [ps[0], saved["state"][0]])


def test_the_mixed_policy_uses_both_tiers():
    _, opt = make_optimizer(WAYS["mixed"], 1)
    assert [row.tier for plan in opt.placement for row in plan.rows] == ["device", *["host"] * 4]


class LaterUnfrozen(Fault):
    """A later step, the first one after some parameters were frozen."""

    def new(self):
        ps, opt = make_optimizer(self.options, 0)
        for p in ps[2:]:
            p.requires_grad_(False)
        for number in range(self.number):
            step(ps, opt, number, {0, 1})
        for p in ps[2:]:
            p.requires_grad_(True)
        return ps, opt


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((Fault, way) for way in ("host", "mixed", "host in_backward", "orthogonal host")),
        *((LaterUnfrozen, way) for way in ("host", "host in_backward", "orthogonal host")),
    ],
)
def test_host_memory_that_runs_out_at_any_slab(kind, way, monkeypatch):
    fault, count = kind(WAYS[way], first=kind is Fault), 0
    error = OSError(errno.ENOMEM, "Cannot allocate memory")
    for count, (ps, opt) in enumerate(failed_steps(fault, slabs, "_mapped", error, monkeypatch), 1):  # noqa: B007
        assert not fault.check_after_failure(ps, opt) or kind is LaterUnfrozen
    assert count > 0


@pytest.mark.parametrize("way", ["host", "mixed", "host in_backward"])
def test_pages_that_cannot_be_locked_change_no_bit(way, monkeypatch):
    """The slab whose pages cannot be locked, any one of the first step, stays pageable, with one warning."""
    fault, before = Fault(WAYS[way], first=True), pinned_bytes()
    for failing in range(1, 20):
        runtime = RuntimeWithLockFailure(failing)
        with monkeypatch.context() as patch:
            patch.setattr(slabs, "torch", runtime)
            patch.setattr(staging, "Slab", lambda parts, pin: Slab(parts, pin=True))
            set_pin_limit(None)  # enables the warning again
            ps, opt = fault.new()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                step(ps, opt, fault.number)
            assert all(map(same_snapshots, snapshot(ps, opt), fault.after))
            if runtime.calls < failing:
                assert failing > 1
                assert not warned
            else:
                (warning,) = warned
                assert "failed with error 2 (out of memory)" in str(warning.message)
            assert len(runtime.locked) == runtime.calls - (runtime.calls >= failing)
            assert pinned_bytes() - before == sum(runtime.locked.values())
            del opt
            gc.collect()
            assert not runtime.locked
            assert pinned_bytes() == before
        if runtime.calls < failing:
            return
    raise AssertionError


class RuntimeWithLockFailure:
    """PyTorch with a CUDA runtime that cannot lock the pages of the `failing`-th block."""

    def __init__(self, failing):
        self.failing, self.calls, self.locked = failing, 0, {}
        self.cuda = types.SimpleNamespace(is_available=lambda: True, cudart=lambda: self)

    def __getattr__(self, name):
        return getattr(torch, name)

    def ones(self, *_, device):
        """The kernel launch that clears a pending error."""

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls += 1
        if self.calls == self.failing:
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        del self.locked[address]

    def cudaError(self, code):
        return code

    def cudaGetErrorString(self, error):
        return "out of memory"


# Interruptions.

PACKAGE = Path(collins.__file__).parent
SUBPACKAGES = [Path(sys.modules[f"collins.{name}"].__path__[0]) for name in ("compile", "offload")]
TRACED_FILES = {
    str(file)
    for folder in (PACKAGE, *SUBPACKAGES)
    for file in folder.glob("*.py")
    if folder != PACKAGE or file.name in ("stepper.py", "state.py", "update.py", "entries.py")
}


class FailureAtLine:
    """Counts the executed lines of `TRACED_FILES`, and raises a KeyboardInterrupt before the `failing`-th.

    Garbage is not collected meanwhile: finalizers of other tests' optimizers would be counted too.
    """

    def __init__(self, failing=None):
        self.failing, self.count, self.where = failing, 0, None

    def __enter__(self):
        self.before = sys.gettrace()
        gc.disable()
        sys.settrace(self.trace_call)

    def __exit__(self, *_):
        sys.settrace(self.before)
        gc.enable()

    def trace_call(self, frame, event, arg):
        return self.trace_line if frame.f_code.co_filename in TRACED_FILES else None

    def trace_line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            if self.count == self.failing:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.fail()
        return self.trace_line

    def fail(self):  # test_interrupts.py overrides it
        raise KeyboardInterrupt


def step_interrupted_at(fault, failing):
    ps, opt = fault.new()
    lines = FailureAtLine(failing)
    try:
        with lines:
            step(ps, opt, fault.number)
    except KeyboardInterrupt:
        pass
    return ps, opt, lines


@in_every_configuration
@at_either_step
def test_an_interruption_at_any_line_of_a_step(options, first):
    fault = Fault(options, first)
    *_, lines = step_interrupted_at(fault, None)
    stride = max(lines.count // FAILURE_POINTS, 1)
    for failing in range(1, lines.count + 1, stride):
        ps, opt, trace = step_interrupted_at(fault, failing)
        try:
            fault.check_after_failure(ps, opt)
        except BaseException as error:
            error.add_note(f"interrupted before {trace.where}, line {failing} of {lines.count}")
            raise


# Copies and hooks.


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
@at_either_step
def test_a_copy_that_fails(in_backward, first, monkeypatch):
    """Any copy between host and device, in either direction."""
    fault, count = Fault({**WAYS["host"], "in_backward": in_backward}, first), 0
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    for count, (ps, opt) in enumerate(failed_steps(fault, HostStreams, "copy", error, monkeypatch), 1):  # noqa: B007
        fault.check_after_failure(ps, opt)
    assert count > 1


@pytest.mark.parametrize("memory", [None, WAYS["host"]["memory"]], ids=["resident", "host"])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_a_hook_that_fails_in_backward(index, memory):
    fault = Fault({"memory": memory, "in_backward": True}, first=False)
    ps, opt = fault.new()

    def fail(p):
        raise ZeroDivisionError

    handle = ps[index].register_post_accumulate_grad_hook(fail)
    with pytest.raises(ZeroDivisionError):
        step(ps, opt, fault.number)
    handle.remove()
    assert index in fault.check_after_failure(ps, opt)  # its own hook came first


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_that_is_collected_while_copies_are_in_flight(mode):
    """Memory that a copy reads or writes is not freed before the copy is complete."""
    from test_tiers import on_fake_device

    fake, options = FakeStreams(mode), WAYS["host"]
    ps, opt = make_optimizer(options, 0)
    on_fake_device(opt, fake)
    give_gradients(0, ps)
    opt.step()
    reference = weakref.ref(opt)
    del opt
    gc.collect()
    fake.finish_everything()
    assert reference() is None
    reference_ps, _ = make_optimizer({}, 1)
    assert all(map(torch.equal, ps, reference_ps))


# Files.


class FullDisk(io.BytesIO):
    """A file on a disk that has `capacity` bytes."""

    capacity = 0

    def write(self, data):
        if self.tell() + len(data) > self.capacity:
            raise OSError(28, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_a_full_disk_leaves_the_checkpoint_and_the_optimizer_unchanged(fraction, tmp_path, monkeypatch):
    ps, opt = make_optimizer(WAYS["host"], 3)
    path, before = tmp_path / "last.pt", snapshot(ps, opt)
    collins.save(path, opt=opt)
    content = path.read_bytes()
    step(ps, opt, 3)
    after = snapshot(ps, opt)
    FullDisk.capacity = int(fraction * len(content))

    def open_full(name, mode="r"):
        Path(name).touch()
        return FullDisk()

    with monkeypatch.context() as patch:
        patch.setattr(collins.files, "open", open_full, raising=False)
        with pytest.raises((OSError, RuntimeError)):
            collins.save(path, opt=opt)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    assert all(map(same_snapshots, snapshot(ps, opt), after))
    collins.load(path, opt=opt)
    assert all(
        same_snapshots([p, state], [p, old]) for (p, state), (_, old) in zip(snapshot(ps, opt), before, strict=True)
    )


@contextmanager
def file_size_limit(nbytes):
    """Limits the size of files that this process writes: larger writes fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_leaves_the_checkpoint_unchanged(tmp_path):
    """Writes fail at 100 positions: the first byte, the last one, and random ones."""
    _, opt = make_optimizer({}, 3)
    path, rng = tmp_path / "last.pt", random.Random(0)
    collins.save(path, opt=opt, epoch=1)
    content = path.read_bytes()
    for nbytes in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(98))]:
        with pytest.raises((OSError, RuntimeError)), file_size_limit(nbytes):
            collins.save(path, opt=opt, epoch=2)
        assert path.read_bytes() == content, nbytes
        assert list(tmp_path.iterdir()) == [path]
    with file_size_limit(len(content)):
        collins.save(path, opt=opt, epoch=2)
    assert collins.load(path, opt=opt) == {"epoch": 2}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it is: one process saves
def test_a_failed_write_leaves_no_folder(tmp_path):
    ps, opt = make_optimizer({}, 3)
    before, content = snapshot(ps, opt), {"opt": opt.state_dict()}

    def save():
        with whole_folder(tmp_path / "step-3") as folder:
            dcp.save(content, checkpoint_id=folder, no_dist=True)

    sizes, rng = [], random.Random(0)
    save()
    for file in (tmp_path / "step-3").iterdir():
        sizes.append(file.stat().st_size)
        file.unlink()
    (tmp_path / "step-3").rmdir()
    for nbytes in [0, max(sizes) - 1, *(rng.randrange(max(sizes)) for _ in range(98))]:
        # CheckpointException is a BaseException, not an Exception.
        with pytest.raises(BaseException, match="File too large"), file_size_limit(nbytes):
            save()
        assert [path.name for path in tmp_path.iterdir()] in ([], [".step-3.partial"])
    save()
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    assert all(map(same_snapshots, snapshot(ps, opt), before))
