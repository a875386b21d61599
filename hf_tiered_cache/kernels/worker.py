"""Attention in a thread of the compiled core: begun by one flag, told by another.

The thread needs neither the interpreter nor its caller, so it serves a device that raises and waits
for flags in its own order; see `csrc/attention_worker.h`.
"""

import os
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_tiered_cache.errors import (
    ClosedCacheError,
    KernelUnavailableError,
    UnsupportedInputError,
)
from hf_tiered_cache.kernels.call import AttentionCall
from hf_tiered_cache.kernels.cores import DTYPE_NUMBERS, CpuCore, state_pointers
from hf_tiered_cache.kernels.loader import chosen_kernel
from hf_tiered_cache.kernels.state import RunningState
from hf_tiered_cache.kernels.view import BlockView
from hf_tiered_cache.layout import BlockLayout

# What a job knows of a call: nothing that masks but by position.
KNOWN_FACTS = frozenset(
    ("kv_tokens", "query_start", "scale", "causal", "softcap", "sinks", "has_gaps")
)
SPARE_PROCESSORS = 2
PROBE_ROUNDS = 3
PROBE_WAIT_SECONDS = 0.1  # at most this long is not interruptible
PROBE_GROUP = 4  # query heads for each key-value head, as most models have them
PROBE_HEAD_DIM, PROBE_TOKENS = 64, 16  # planes of 2 KiB in 16 bits: they fill any block


class AttentionWorker:
    """One thread that does jobs in order, by the kernel that is chosen when it is made.

    Raises KernelUnavailableError where that is not a compiled one.
    """

    def __init__(self) -> None:
        kernel = chosen_kernel()
        if not isinstance(kernel.core, CpuCore):
            raise KernelUnavailableError(
                f"kernel {kernel.name!r} runs in its caller's thread only; a compiled one is needed"
            )
        self._core = kernel.core
        self._worker = self._core.module.AttentionWorker()
        # The kernel's threads are pinned to a processor each: the thread that gives the device its
        # work, and what else there is, must find others.
        self.num_threads = max(1, min(torch.get_num_threads(), num_processors() - SPARE_PROCESSORS))

    def submit(
        self,
        query: Tensor,
        views: Sequence[BlockView],
        state: RunningState,
        flags: tuple[int, int],
        value: int,
        call: AttentionCall,
    ) -> Any:
        """Queue one job: wait until the first flag (their addresses) is raised to `value`, begin
        `state` anew, fold the views into it, raise the second.

        Query, views and call as `ops.attend_blocks` takes them. All memory must stay as long as
        the job's `is_done` is False. Raises UnsupportedInputError for a fact of the call that is
        not among KNOWN_FACTS and for a slot outside its slab, ClosedCacheError after close, all
        before anything is written.
        """
        call.check_known(KNOWN_FACTS, "the CPU's thread")
        try:
            job = self._core.module.AttentionJob(
                kernel=self._core.number,
                dtype=DTYPE_NUMBERS[views[0].layout.dtype],
                query=query.data_ptr(),
                query_shape=query.shape,
                query_stride=query.stride(),
                views=[view.core_arguments for view in views],
                kv_tokens=call.kv_tokens,
                query_start=call.query_start,
                causal=call.causal,
                scale=call.scale,
                softcap=call.softcap or 0.0,
                state=state_pointers(state),
                num_threads=self.num_threads,
                ready=flags[0],
                done=flags[1],
                value=value,
            )
        except ValueError as error:
            raise UnsupportedInputError(f"attention on the CPU: {error}") from None
        try:
            self._worker.submit(job)
        except RuntimeError as error:
            raise ClosedCacheError(f"{error}; make a new cache") from None
        return job

    def wait(self, job: Any, timeout_seconds: float) -> None:
        """Return when the job is done, or after the time."""
        self._worker.wait(job, timeout_seconds)

    def close(self) -> None:
        """End the job under way, cancel the others, join the thread. Idempotent."""
        self._worker.close()


def num_processors() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def attention_rate(worker: AttentionWorker, blocks: Tensor) -> float:
    """Bytes per second at which the worker attends uint8 `[slots, num_bytes]`, which are zeroed for
    it; 4 query heads on each key-value head, in bfloat16. What fits a processor's cache is read
    from there: only memory that is several times as large says how fast memory is."""
    blocks.zero_()
    slots, num_bytes = blocks.shape
    plane = PROBE_HEAD_DIM * PROBE_TOKENS * torch.bfloat16.itemsize
    heads = max(1, num_bytes // (2 * plane))
    layout = BlockLayout(heads, PROBE_HEAD_DIM, PROBE_HEAD_DIM, PROBE_TOKENS, torch.bfloat16)
    view = BlockView(blocks, torch.arange(slots, dtype=torch.int32).view(1, -1), layout)
    query = torch.zeros(1, PROBE_GROUP * heads, 1, PROBE_HEAD_DIM, dtype=torch.bfloat16)
    tokens = slots * PROBE_TOKENS
    call = AttentionCall(kv_tokens=tokens, query_start=tokens - 1, scale=1.0)
    state = RunningState.begin(query, PROBE_HEAD_DIM)
    flags = torch.zeros(2, dtype=torch.int32)  # raised already
    addresses = (flags.data_ptr(), flags.data_ptr() + flags.itemsize)
    jobs = [worker.submit(query, [view], state, addresses, 0, call) for _ in range(PROBE_ROUNDS)]
    for job in jobs:
        while not job.is_done:
            worker.wait(job, PROBE_WAIT_SECONDS)
    return slots * layout.data_bytes / median(job.seconds for job in jobs)
