"""Free memory is the minimum of what the system and every enclosing control group allow."""

import psutil
import pytest
import torch

from collins.offload import DeviceFigures, device_figures, device_memory_free, host_memory_free, host_memory_total


def test_host_memory_is_within_what_the_system_has():
    assert 0 < host_memory_free() <= host_memory_total() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("line", "folder", "limit", "usage", "inactive"),
    [
        ("0::/outer/inner", "outer", "memory.max", "memory.current", "inactive_file"),
        ("0::/outer/inner", "outer/inner", "memory.max", "memory.current", "inactive_file"),
        ("0::/not/here", ".", "memory.max", "memory.current", "inactive_file"),
        ("4:cpu,memory:/job", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_tightest_control_group_counts(tmp_path, line, folder, limit, usage, inactive):
    membership, cgroups = tmp_path / "membership", tmp_path / "cgroup"
    membership.write_text(f"7:cpuset:/elsewhere\n{line}\n")
    (cgroups / "outer" / "inner").mkdir(parents=True)
    group = cgroups / folder
    group.mkdir(parents=True, exist_ok=True)
    (group / limit).write_text("5000\n")
    (group / usage).write_text("1000\n")
    assert host_memory_free(cgroups, membership) == 4000
    assert host_memory_total(cgroups, membership) == 5000
    (group / usage).write_text("6000\n")
    assert host_memory_free(cgroups, membership) == 0
    (group / "memory.stat").write_text(f"anon 900\nfile 5100\n{inactive} 4500\nactive_file 600\n")
    assert host_memory_free(cgroups, membership) == 3500
    (group / usage).write_text("4000\n")  # read a little later
    assert host_memory_free(cgroups, membership) == 5000


def test_a_group_without_limit_and_a_system_without_groups(tmp_path):
    membership = tmp_path / "membership"
    assert host_memory_free(tmp_path, membership) > 2**20
    membership.write_text("0::/\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    assert host_memory_free(tmp_path, membership) > 2**20
    assert host_memory_total(tmp_path, membership) == psutil.virtual_memory().total


def test_device_memory_of_a_host_is_rejected():
    with pytest.raises(ValueError, match="device must be a CUDA device, got cpu"):
        device_memory_free(torch.device("cpu"))


@pytest.mark.parametrize(
    ("figures", "free", "spare"),
    [
        # 100 in all, 50 of them in weights and gradients; activations took 30 more at their peak.
        (DeviceFigures(total=100, driver_free=20, fraction=1.0, reserved=80, allocated=50, peak=80), 50, 20),
        # The allocator has returned the memory of the peak, which the next forward will allocate again.
        (DeviceFigures(total=100, driver_free=50, fraction=1.0, reserved=50, allocated=50, peak=80), 50, 20),
        # Another process holds 10.
        (DeviceFigures(total=100, driver_free=10, fraction=1.0, reserved=80, allocated=50, peak=80), 40, 10),
        # ... and has grown into the memory that the peak needs.
        (DeviceFigures(total=100, driver_free=5, fraction=1.0, reserved=60, allocated=50, peak=80), 15, 0),
        # No forward yet, or the peak was reset since.
        (DeviceFigures(total=100, driver_free=50, fraction=1.0, reserved=50, allocated=50, peak=50), 50, 50),
        (DeviceFigures(total=100, driver_free=50, fraction=1.0, reserved=50, allocated=50, peak=0), 50, 50),
        # This process may use 90 % of the device.
        (DeviceFigures(total=100, driver_free=20, fraction=0.9, reserved=80, allocated=50, peak=80), 40, 10),
        (DeviceFigures(total=100, driver_free=20, fraction=0.4, reserved=80, allocated=50, peak=80), 0, 0),
    ],
)
def test_memory_that_the_next_step_needs_is_not_spare(figures, free, spare):
    assert (figures.free, figures.spare) == (free, spare)


def test_the_figures_come_from_driver_and_allocator(monkeypatch):
    devices = []

    def set_figure(name, value):
        monkeypatch.setattr(torch.cuda, name, lambda device: (devices.append(device), value)[1])

    set_figure("mem_get_info", (20, 100))
    set_figure("get_per_process_memory_fraction", 0.75)
    set_figure("memory_reserved", 80)
    set_figure("memory_allocated", 50)
    set_figure("max_memory_allocated", 70)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_figures(torch.device("cuda", 1)) == DeviceFigures(100, 20, 0.75, 80, 50, 70)
    assert set(devices) == {torch.device("cuda", 1)}
    devices.clear()
    assert device_memory_free(torch.device("cuda")) == 25
    assert set(devices) == {torch.device("cuda", 3)}


@pytest.mark.cuda
def test_device_memory_shrinks_by_what_is_taken():
    device = torch.device("cuda", 0)
    before = device_memory_free(device)
    allocation = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - device_memory_free(device) >= allocation.nbytes


@pytest.mark.cuda
def test_a_past_peak_reduces_the_spare_memory():
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    before = device_figures(device)
    peak = torch.empty(2**28, dtype=torch.uint8, device=device)
    del peak
    after = device_figures(device)
    assert after.peak >= before.allocated + 2**28
    assert after.spare <= before.spare - 2**28 + 2**24  # apart from changes by other processes
