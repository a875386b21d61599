"""Pinning: in the context of the device that it is for."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from hf_tiered_cache.devices.pinning import CudaPinning


def test_ranges_are_registered_on_the_device_that_was_given(monkeypatch):
    current, seen = [torch.device("cuda", 0)], []

    @contextmanager
    def guard(device):
        current.append(device)
        yield
        current.pop()

    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, *_: seen.append((address, current[-1])) or 0,
        cudaHostUnregister=lambda address: seen.append((address, current[-1])),
    )
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    second = torch.device("cuda", 1)
    pinning = CudaPinning(second)
    assert pinning.register(4096, 8192)
    pinning.unregister(4096)
    assert seen == [(4096, second)] * 2
    assert current == [torch.device("cuda", 0)]
