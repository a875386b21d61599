"""Processors near a PCI device, as a made-up /sys tells."""

import os

import pytest
import torch

from hf_tiered_cache.devices.numa import cpus_near, parse_cpu_list
from hf_tiered_cache.tiers import Budget, HostTier, host

GPU = "0000:3B:00.0"


@pytest.fixture
def sysfs(tmp_path):
    """Two nodes of four processors; a device on the second."""
    for node, cpus in enumerate(("0-1,4-5", "2-3,6-7")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    device = tmp_path / "bus/pci/devices" / GPU.lower()
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    return tmp_path


def test_the_node_of_the_device_is_found(sysfs):
    assert cpus_near(GPU, sysfs) == {2, 3, 6, 7}


def test_a_device_of_no_node_has_no_near_processors(sysfs):
    (sysfs / "bus/pci/devices" / GPU.lower() / "numa_node").write_text("-1\n")
    assert cpus_near(GPU, sysfs) == frozenset()


def test_one_node_needs_no_choice(sysfs):
    (sysfs / "devices/system/node/node0/cpulist").unlink()
    (sysfs / "devices/system/node/node0").rmdir()
    assert cpus_near(GPU, sysfs) == frozenset()


def test_an_unknown_device_and_a_strange_system_have_none(sysfs, tmp_path):
    assert cpus_near("0000:00:00.0", sysfs) == frozenset()
    assert cpus_near(GPU, tmp_path / "nothing") == frozenset()


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-2,5\n", {0, 1, 2, 5}), ("7", {7}), ("\n", set()), ("3-3", {3})]
)
def test_lists_of_processors(text, cpus):
    assert parse_cpu_list(text) == cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_the_threads_that_get_memory_run_near_it(monkeypatch):
    """Theirs is the first touch, which decides where a page lies."""
    seen = set()
    touch = host._touch

    def noted(memory: torch.Tensor) -> None:
        seen.add(frozenset(os.sched_getaffinity(0)))
        touch(memory)

    monkeypatch.setattr(host, "_touch", noted)
    ours = frozenset(os.sched_getaffinity(0))
    near = frozenset([min(ours)])
    tier = HostTier(4096, Budget("host", 64 * 4096), near=near)
    tier.allocate()
    tier.close()
    assert seen == {near}
    assert os.sched_getaffinity(0) == ours
