"""What is known of devices, and what is said of others."""

import pytest
import torch

from hf_tiered_cache.devices import CpuDevice, Device, has_accelerator
from hf_tiered_cache.errors import UnsupportedInputError


def test_a_device_is_found_by_the_type_of_torch():
    assert {name: kind.name for name, kind in Device.registry.items()} == {
        "cpu": "cpu",
        "cuda": "cuda",
    }
    assert Device.kind_of(torch.device("cuda", 3)).name == "cuda"


def test_another_device_is_refused_with_what_to_do(make_cache):
    states = torch.empty(1, 2, 3, 8, device="meta")
    cache = make_cache(None, 64)
    with pytest.raises(UnsupportedInputError) as error:
        cache.update(states, states, 0)
    for word in ("on meta", "cpu, cuda", "DynamicCache", "docs/extending.md"):
        assert word in str(error.value)


def test_the_cpu_needs_nothing_to_reach_the_hosts_memory():
    device = CpuDevice(torch.device("cpu"))
    assert device.free_bytes() > 0
    assert device.copy_lane is device.in_place is device.pinning is None
    device.close()


def test_a_new_kind_of_device_is_an_accelerator_where_there_is_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(Device, "registry", dict(Device.registry))
    assert not has_accelerator()

    class Npu(CpuDevice, name="npu"):
        is_host = False

    assert has_accelerator()
    assert Device.kind_of(torch.device("cpu")) is CpuDevice
