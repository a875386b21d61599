"""The device that is measured, and all that is asked of `torch.cuda`."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

import benchmarking

GIB = 1 << 30


class Machine:
    """The device that is measured, and all that is asked of `torch.cuda`.

    On the CPU, where only the code is tried, the answers are such that every branch is taken.
    """

    CPU_LIMIT_BYTES = 1 << 16  # of a cache, while memory is limited

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        self._is_limited = False

    @property
    def name(self) -> str:
        if not self.is_cuda:
            return benchmarking.environment()["processor"]
        properties = torch.cuda.get_device_properties(self.device)
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, sm_{major}{minor}"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        """Device memory that could still be taken."""
        if not self.is_cuda:
            return psutil.virtual_memory().available
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.is_cuda else 0

    @contextmanager
    def peak_bytes(self) -> Iterator[list[int]]:
        """A list that at the end holds the most that torch had allocated inside the `with`."""
        peak: list[int] = []
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield peak
        self.synchronize()
        peak.append(torch.cuda.max_memory_allocated(self.device) if self.is_cuda else 0)

    @contextmanager
    def limited_to(self, num_bytes: int) -> Iterator[None]:
        """As if the device had so much memory."""
        self._is_limited = True
        if self.is_cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), self.device)
        try:
            yield
        finally:
            self._is_limited = False
            if self.is_cuda:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)
                torch.cuda.empty_cache()

    @contextmanager
    def cudnn_attention(self, is_allowed: bool) -> Iterator[None]:
        """Let torch's sdpa choose cuDNN, or not."""
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(is_allowed)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)

    def check_cache(self, num_bytes: int) -> None:
        """On the CPU, run out of memory as a limited GPU would."""
        if self._is_limited and not self.is_cuda and num_bytes > self.CPU_LIMIT_BYTES:
            raise torch.OutOfMemoryError("more than the CPU is allowed")

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.is_cuda)

    def streams(self, count: int) -> list[Any]:
        """Side streams, as context managers."""
        if not self.is_cuda:
            return [nullcontext() for _ in range(count)]
        return [torch.cuda.stream(torch.cuda.Stream(self.device)) for _ in range(count)]

    def numa_node(self) -> str:
        """The memory node the device is attached to, where the system tells."""
        if not self.is_cuda:
            return "the CPU's own"
        properties = torch.cuda.get_device_properties(self.device)
        parts = ("pci_domain_id", "pci_bus_id", "pci_device_id")
        numbers = [getattr(properties, part, None) for part in parts]  # torch 2.9: not all
        if None in numbers:
            return "unknown"
        path = Path("/sys/bus/pci/devices/{:04x}:{:02x}:{:02x}.0/numa_node".format(*numbers))
        return path.read_text().strip() if path.exists() else "unknown"

    def elapsed(self, work: Callable[[], object], rounds: int) -> float:
        """Seconds that one call of `work` takes the device, the median of `rounds`."""
        seconds = []
        for _ in range(rounds):
            if self.is_cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                work()
                end.record()
                end.synchronize()
                seconds.append(begin.elapsed_time(end) / 1000)
            else:
                start = perf_counter()
                work()
                seconds.append(perf_counter() - start)
        return statistics.median(seconds)
