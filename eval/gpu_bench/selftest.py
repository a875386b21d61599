"""Whether the device does what the lanes ask of it, in seconds: the first thing to know."""

from collections.abc import Iterator
from statistics import median
from time import monotonic, perf_counter, sleep
from types import ModuleType
from typing import Any

import torch
from sections import Row, Skipped, attempted

from gpu_bench.workshop import Bench
from hf_tiered_cache.devices.pinning import CudaPinning
from hf_tiered_cache.kernels import ops
from hf_tiered_cache.kernels.loader import cuda_core
from hf_tiered_cache.kernels.worker import AttentionWorker
from hf_tiered_cache.layout import BlockLayout
from hf_tiered_cache.tiers.memory import virtual_slab

FLAG_SECONDS = 0.1
PIECE_BYTES = (8 << 10, 256 << 10)  # by a kernel, and in a batch
PIECES = 64
IDLE_SECONDS = (0.0001, 0.001, 0.01)


def selftest(bench: Bench) -> Iterator[Row]:
    """Flags, both ways of small copies, waking the CPU's thread."""
    for what, part in (
        ("self-test: flags", flags),
        ("self-test: copies from registered memory", registered_copies),
        ("self-test: waking the CPU's thread", waking),
    ):
        yield from attempted(bench, what, part(bench))


def core_and_stream(bench: Bench) -> tuple[ModuleType, Any]:
    """The CUDA core and a stream of the device. Raises Skipped without one."""
    core, reason = cuda_core()
    if core is None or not bench.machine.is_cuda:
        raise Skipped(f"needs the CUDA core and a device: {reason or 'the CPU is tried'}")
    return core.module, torch.cuda.Stream(bench.machine.device)  # the default takes no batches


def flags(bench: Bench) -> Iterator[Row]:
    """The device writes a word of pinned memory, and waits for one whose value is met."""
    module, stream = core_and_stream(bench)
    place = (stream.device_index, stream.cuda_stream)
    word = bench.machine.pinned(4).view(torch.int32).zero_()
    start = perf_counter()
    module.write_flag(*place, word.data_ptr(), 7)
    deadline = monotonic() + FLAG_SECONDS
    while int(word) != 7 and monotonic() < deadline:
        pass
    seconds = perf_counter() - start
    if int(word) != 7:
        raise RuntimeError(f"the flag was not raised within {FLAG_SECONDS} s")
    module.wait_flag(*place, word.data_ptr(), 7)
    bench.machine.synchronize()
    yield Row("self-test: flags", "work", note=f"seen by the host after {seconds * 1e6:.0f} us")


def registered_copies(bench: Bench) -> Iterator[Row]:
    """Pieces of memory as the host tier has it, to the device: by a kernel that reads them, and by
    the driver's batches. The bytes are compared."""
    module, stream = core_and_stream(bench)
    place = (stream.device_index, stream.cuda_stream)
    for size in PIECE_BYTES:
        mapping, slab = virtual_slab(2 * PIECES, size, "host")
        is_pinned = CudaPinning(bench.machine.device).register(slab.data_ptr(), slab.numel())
        slab.view(-1).view(torch.int32).copy_(torch.arange(slab.numel() // 4))
        target = torch.zeros((PIECES, size), dtype=torch.uint8, device=bench.machine.device)
        bench.machine.synchronize()
        sources = list(slab[::2])  # none beside another
        seconds = []
        for _ in range(5):
            start = perf_counter()
            module.copy(
                *place,
                [block.data_ptr() for block in target],
                [block.data_ptr() for block in sources],
                [size] * PIECES,
                module.CopyDirection.HOST_TO_DEVICE,
                is_pinned,
            )
            bench.machine.synchronize()
            seconds.append(perf_counter() - start)
        is_right = torch.equal(target.cpu(), slab[::2])
        if is_pinned:
            CudaPinning(bench.machine.device).unregister(slab.data_ptr())
        if not is_right:
            raise RuntimeError(f"pieces of {size} bytes from registered memory came out wrong")
        rate = PIECES * size / median(seconds)
        yield Row(
            f"self-test: {PIECES} pieces of {size >> 10} KiB, registered memory",
            f"{rate / 1e9:.1f} GB/s",
            note="right" + ("" if is_pinned else "; but pinning was refused"),
            data={"seconds": seconds},
        )
        del mapping


def waking(bench: Bench) -> Iterator[Row]:
    """How long the CPU's thread takes for next to nothing after it had nothing to do for a while:
    what every layer pays."""
    worker = AttentionWorker()
    layout = BlockLayout(1, 64, 64, 16, torch.bfloat16)
    blocks = torch.zeros((1, layout.num_bytes), dtype=torch.uint8)
    view = ops.BlockView(blocks, torch.zeros((1, 1), dtype=torch.int32), layout)
    query = torch.zeros((1, 1, 1, 64), dtype=torch.bfloat16)
    call = ops.AttentionCall(kv_tokens=16, query_start=15, scale=1.0)
    words = torch.zeros(2, dtype=torch.int32)
    addresses = (words.data_ptr(), words.data_ptr() + 4)
    number = 0
    for idle in IDLE_SECONDS:
        seconds = []
        for _ in range(20):
            number += 1
            state = ops.RunningState.begin(query, 64)
            job = worker.submit(query, [view], state, addresses, number, call)
            sleep(idle)
            start = perf_counter()
            words[0] = number  # as the device would
            while not job.is_done:
                pass
            seconds.append(perf_counter() - start)
        yield Row(
            f"self-test: the CPU's thread after {idle * 1e3:g} ms",
            f"{median(seconds) * 1e6:.0f} us",
            note=f"at most {max(seconds) * 1e6:.0f}",
            data={"seconds": seconds},
        )
    worker.close()
