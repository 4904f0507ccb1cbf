"""Free memory is what the system, and every control group on the way, still allow."""

import psutil
import pytest
import torch

from collins.offload import device_memory_free, host_memory_free


def test_host_memory_is_within_what_the_system_has():
    assert 0 < host_memory_free() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("line", "folder", "limit", "usage"),
    [
        ("0::/outer/inner", "outer", "memory.max", "memory.current"),
        ("0::/outer/inner", "outer/inner", "memory.max", "memory.current"),
        ("0::/not/here", ".", "memory.max", "memory.current"),
        ("4:cpu,memory:/job", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_the_tightest_control_group_counts(tmp_path, line, folder, limit, usage):
    membership, cgroups = tmp_path / "membership", tmp_path / "cgroup"
    membership.write_text(f"7:cpuset:/elsewhere\n{line}\n")
    (cgroups / "outer" / "inner").mkdir(parents=True)
    group = cgroups / folder
    group.mkdir(parents=True, exist_ok=True)
    (group / limit).write_text("5000\n")
    (group / usage).write_text("1000\n")
    assert host_memory_free(cgroups, membership) == 4000
    (group / usage).write_text("6000\n")
    assert host_memory_free(cgroups, membership) == 0


def test_a_group_without_limit_and_a_system_without_groups(tmp_path):
    membership = tmp_path / "membership"
    assert host_memory_free(tmp_path, membership) > 2**20
    membership.write_text("0::/\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    assert host_memory_free(tmp_path, membership) > 2**20


def test_device_memory_of_a_host_is_refused():
    with pytest.raises(ValueError, match="device must be a CUDA device, got cpu"):
        device_memory_free(torch.device("cpu"))


@pytest.mark.cuda
def test_device_memory_shrinks_by_what_is_taken():
    device = torch.device("cuda", 0)
    before = device_memory_free(device)
    taken = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - device_memory_free(device) >= taken.nbytes
