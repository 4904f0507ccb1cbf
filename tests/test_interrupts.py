"""Ctrl-C: deferred while parameters are stepped, and in effect afterwards."""

import signal
import threading

import pytest
import torch
from helpers import OPTIONS, give_gradients, parameters, same_snapshots, snapshot, with_kernel
from test_faults import SHAPES, WAYS, FailureAtLine, Fault, make_optimizer, step

from collins import Collins, interrupts
from collins.compile.graphs import Graphs
from collins.interrupts import HeldInterrupts

pytestmark = pytest.mark.usefixtures("restored_handler")


@pytest.fixture
def restored_handler():
    """Installs Python's handler, which raises KeyboardInterrupt, and checks that the test has restored it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    handler = signal.signal(signal.SIGINT, before)
    assert handler is signal.default_int_handler


def send_ctrl_c():
    signal.raise_signal(signal.SIGINT)


class CtrlCAtLine(FailureAtLine):
    """Sends Ctrl-C before the `failing`-th executed line of the code of steps."""

    def fail(self):
        send_ctrl_c()


CONFIGURATIONS = {
    "eager": {},
    "mixed": WAYS["mixed"],
    "in_backward": WAYS["in_backward"],
    "host in_backward": WAYS["host in_backward"],
    "graphs": {"compile": True},
    "kernel": {},
    "kernel host": WAYS["host"],
    "kernel in_backward": WAYS["in_backward"],
}


class SteppedFault(Fault):
    """An optimizer that steps in one of the ways of `STEPPED`."""

    def __init__(self, configuration):
        self.configuration, self.graphs = configuration, Graphs()  # compiled once for all optimizers of this way
        super().__init__(CONFIGURATIONS[configuration], first=False)

    def new(self):
        # The budget of "mixed" is for SHAPES.
        shapes = SHAPES if self.configuration == "mixed" else [(32, 64), (40,), (33, 37)]
        ps = parameters(torch.float32, shapes, "cpu")
        opt = Collins(ps, **{**OPTIONS, **self.options})
        opt._stepper.engine._graphs = self.graphs
        if self.configuration.startswith("kernel"):
            pytest.importorskip("triton")
            with_kernel(opt)
        for number in range(self.number):
            step(ps, opt, number)
        return ps, opt

    def step_with_ctrl_c(self, failing):
        ps, opt = self.new()
        lines = CtrlCAtLine(failing)
        if failing is None:
            with lines:
                step(ps, opt, self.number)
        else:
            with pytest.raises(KeyboardInterrupt), lines:
                step(ps, opt, self.number)
        return ps, opt, lines


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_ctrl_c_at_any_line_of_a_step_leaves_each_parameter_stepped_or_unchanged(configuration):
    fault = SteppedFault(configuration)
    *_, lines = fault.step_with_ctrl_c(None)
    points = 2 if configuration.startswith("kernel") else 6  # Triton's interpreter is slow
    for failing in range(1, lines.count + 1, max(lines.count // points, 1)):
        ps, opt, trace = fault.step_with_ctrl_c(failing)
        try:
            fault.check_after_failure(ps, opt)
        except BaseException as error:
            error.add_note(f"pressed before {trace.where}, line {failing} of {lines.count}")
            raise


@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in_backward"])
def test_ctrl_c_between_the_launch_of_a_kernel_and_its_record(in_backward, monkeypatch):
    """The step, or in backward the step of one parameter, is completed first."""
    pytest.importorskip("triton")
    from collins.compile import kernels

    original, snapshots = kernels.step_, []
    for sends in (False, True):
        ps = parameters(torch.float32, [(64, 64), (40,)], "cpu")
        opt = with_kernel(Collins(ps, **OPTIONS, in_backward=in_backward))
        step(ps, opt, 0)

        def launch(*args, sends=sends):
            original(*args)
            if sends:
                send_ctrl_c()

        with monkeypatch.context() as patch:
            patch.setattr(kernels, "step_", launch)
            if sends:
                with pytest.raises(KeyboardInterrupt):
                    step(ps, opt, 1)
            else:
                step(ps, opt, 1)
        snapshots.append(snapshot(ps, opt))
        if sends:
            assert [int(state["step"]) for _, state in snapshots[1]] == ([1, 2] if in_backward else [2, 2])
    unchanged = list(map(same_snapshots, *snapshots))
    assert unchanged == ([False, True] if in_backward else [True, True])  # backward begins at the last one


def test_a_failure_is_rolled_back_before_ctrl_c_takes_effect(monkeypatch):
    ps, opt = make_optimizer({}, 2)
    before = snapshot(ps, opt)

    def fail(*_):
        send_ctrl_c()
        raise torch.OutOfMemoryError

    give_gradients(2, ps)
    monkeypatch.setattr(opt._stepper.engine, "run_rest", fail)
    with pytest.raises(KeyboardInterrupt) as caught:
        opt.step()
    assert isinstance(caught.value.__context__, torch.OutOfMemoryError)
    assert all(map(same_snapshots, snapshot(ps, opt), before))


def run_deferred(body):
    with HeldInterrupts():
        body()


def test_ctrl_c_is_deferred_until_the_body_ends():
    completed = []

    def body():
        send_ctrl_c()
        send_ctrl_c()  # at once: another of the same
        completed.append(1)

    with pytest.raises(KeyboardInterrupt):
        run_deferred(body)
    assert completed == [1]


def test_a_nested_body_defers_ctrl_c_until_the_outer_one_ends():
    completed = []

    def body():
        run_deferred(send_ctrl_c)
        completed.append(1)

    with pytest.raises(KeyboardInterrupt):
        run_deferred(body)
    assert completed == [1]


def test_a_second_ctrl_c_after_a_delay_takes_effect_at_once(monkeypatch):
    now, completed = [0.0], []
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])

    def body():
        for seconds in (0, interrupts.PATIENCE / 2, interrupts.PATIENCE / 2):
            now[0] += seconds
            send_ctrl_c()
            completed.append(now[0])

    with pytest.raises(KeyboardInterrupt):
        run_deferred(body)
    assert completed == [0, interrupts.PATIENCE / 2]


def test_a_custom_handler_is_called_once_with_its_signal():
    calls = []
    before = signal.signal(signal.SIGINT, lambda *args: calls.append(args))
    with HeldInterrupts():
        send_ctrl_c()
        send_ctrl_c()
        assert not calls
    signal.signal(signal.SIGINT, before)
    assert calls == [(signal.SIGINT, None)]


def test_a_handler_that_the_body_installs_is_kept():
    calls = []

    def handler(*_):
        calls.append(1)

    with HeldInterrupts():
        signal.signal(signal.SIGINT, handler)
        send_ctrl_c()
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is handler
    assert calls == [1]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_without_a_handler_of_python_none_is_installed(handler):
    before = signal.signal(signal.SIGINT, handler)
    with HeldInterrupts():
        assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, before)


def test_in_other_threads_ctrl_c_is_not_deferred():
    """Handlers run in the main thread only, which may execute a body of its own."""
    handlers = []

    def record_handler():
        with HeldInterrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    with HeldInterrupts():
        handler = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=record_handler)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGINT) == handler
    assert handlers == [handler]
