"""How the compiled cores are called: tensors in, raw pointers and strides out.

One class per core, the same methods. Arguments were checked in `ops`; addresses are of memory that
the core's processor reads. The order of what a core takes is that of csrc/python_arguments.h.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from hf_tiered_cache.errors import UnsupportedInputError
from hf_tiered_cache.kernels import reference
from hf_tiered_cache.kernels.call import AttentionCall
from hf_tiered_cache.kernels.state import RunningState
from hf_tiered_cache.kernels.view import BlockView

MAX_HEAD_DIM = 256
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc: enum class DType


# What `Core.attend` knows of a call; `ops` gives it no other.
KNOWN_FACTS = frozenset(
    (
        "kv_tokens",
        "query_start",
        "scale",
        "causal",
        "starts",
        "mask",
        "softcap",
        "sinks",
        "has_gaps",
    )
)


class Core(ABC):
    """A compiled core, for tensors of one kind of device.

    `state` is (acc, max, sum) and `out` (address, 4 strides, lse, sinks), as addresses; in a call
    to `attend` one of them is None.
    """

    __slots__ = ()

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        view: BlockView,
        call: AttentionCall,
        state: tuple[int, ...] | None,
        out: tuple[int, ...] | None,
    ) -> None:
        """Fold the view's blocks into `state`, or attend them into `out`."""

    @abstractmethod
    def finish(self, state: RunningState, dtype: torch.dtype, out: tuple[int, ...]) -> None:
        """Divide by the sum, into an `out` of `dtype`."""

    @abstractmethod
    def join(self, state: RunningState, other: RunningState) -> None:
        """Fold `other` into `state`."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, view: BlockView, start_token: int) -> None:
        """Write new tokens into their blocks."""


class CpuCore(Core):
    """One kernel of `hf_tiered_cache._C`, on torch's number of threads."""

    __slots__ = ("module", "number")

    def __init__(self, module: ModuleType, number: int) -> None:
        self.module = module
        self.number = number  # of the kernel, in the module

    def attend(
        self,
        query: Tensor,
        view: BlockView,
        call: AttentionCall,
        state: tuple[int, ...] | None,
        out: tuple[int, ...] | None,
    ) -> None:
        """See `Core`."""
        try:
            self.module.attend(
                self.number,
                DTYPE_NUMBERS[view.layout.dtype],
                query.data_ptr(),
                query.shape,
                query.stride(),
                view.core_arguments,
                *call_arguments(call),
                state,
                out,
                torch.get_num_threads(),
            )
        except ValueError as error:
            raise UnsupportedInputError(f"paged_attention: {error}") from None

    def finish(self, state: RunningState, dtype: torch.dtype, out: tuple[int, ...]) -> None:
        """See `Core`."""
        self.module.finish(
            self.number,
            DTYPE_NUMBERS[dtype],
            state.acc.shape,
            state_pointers(state),
            out,
            torch.get_num_threads(),
        )

    def join(self, state: RunningState, other: RunningState) -> None:
        """See `Core`."""
        reference.join_states(state, other)  # a few rows, rarely

    def append(self, keys: Tensor, values: Tensor, view: BlockView, start_token: int) -> None:
        """See `Core`."""
        try:
            self.module.append(
                keys.data_ptr(),
                keys.shape,
                keys.stride(),
                values.data_ptr(),
                values.stride(),
                view.core_arguments,
                start_token,
                torch.get_num_threads(),
            )
        except ValueError as error:
            raise UnsupportedInputError(f"append_tokens: {error}") from None


# Asked for every launch, as torch's own compiled code does (2.0 to 2.13): `current_stream` makes a
# Stream in Python for the same number. Missing where torch is built without CUDA.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_place(tensor: Tensor) -> tuple[int, int]:
    """The tensor's CUDA device and the stream that torch works on there: (index, handle)."""
    device = tensor.get_device()
    if _raw_stream is None:
        return device, torch.cuda.current_stream(device).cuda_stream
    return device, _raw_stream(device)


class CudaCore(Core):
    """`hf_tiered_cache._cuda`, on the current stream of the tensors' device.

    Memory for partials comes from torch, so it is counted and reused like any other. A failing
    call is a RuntimeError with CUDA's own words.
    """

    __slots__ = ("module", "place")

    def __init__(
        self,
        module: ModuleType,
        place: Callable[[Tensor], tuple[int, int]] = current_place,
    ) -> None:
        self.module = module
        self.place = place

    def attend(
        self,
        query: Tensor,
        view: BlockView,
        call: AttentionCall,
        state: tuple[int, ...] | None,
        out: tuple[int, ...] | None,
    ) -> None:
        """See `Core`."""
        scratch_bytes = self.module.scratch_bytes(
            query.shape,
            view.core_arguments,
            call.kv_tokens,
            call.query_start,
            call.causal,
            state is not None,
        )
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=query.device)
        device, stream = self.place(query)
        view.note_stream(stream)
        self.module.attend(
            device,
            stream,
            DTYPE_NUMBERS[view.layout.dtype],
            query.data_ptr(),
            query.shape,
            query.stride(),
            view.core_arguments,
            *call_arguments(call),
            state,
            out,
            scratch.data_ptr(),
            scratch_bytes,
        )

    def finish(self, state: RunningState, dtype: torch.dtype, out: tuple[int, ...]) -> None:
        """See `Core`."""
        self.module.finish(
            *self.place(state.acc),
            DTYPE_NUMBERS[dtype],
            state.acc.shape,
            state_pointers(state),
            out,
        )

    def join(self, state: RunningState, other: RunningState) -> None:
        """See `Core`."""
        self.module.join(
            *self.place(state.acc),
            state.sum.numel(),
            state.acc.size(-1),
            state_pointers(state),
            state_pointers(other),
        )

    def append(self, keys: Tensor, values: Tensor, view: BlockView, start_token: int) -> None:
        """See `Core`."""
        device, stream = self.place(keys)
        view.note_stream(stream)
        self.module.append(
            device,
            stream,
            keys.data_ptr(),
            keys.shape,
            keys.stride(),
            values.data_ptr(),
            values.stride(),
            view.core_arguments,
            start_token,
        )


def call_arguments(call: AttentionCall) -> tuple[object, ...]:
    """A call as `attention_params` in csrc/python_arguments.h takes it; its sinks go with `out`."""
    starts, mask = call.starts, call.mask
    return (
        call.kv_tokens,
        call.query_start,
        call.causal,
        call.scale,
        call.softcap or 0.0,
        0 if starts is None else starts.data_ptr(),
        None if mask is None else mask_pointer(mask),
    )


def state_pointers(state: RunningState) -> tuple[int, ...]:
    """Addresses of a running state."""
    return state.acc.data_ptr(), state.max.data_ptr(), state.sum.data_ptr()


def out_pointers(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[int, ...]:
    """Address and strides of an output, addresses of lse (empty: null) and sinks."""
    return (out.data_ptr(), *out.stride(), lse.data_ptr(), 0 if sinks is None else sinks.data_ptr())


def mask_pointer(mask: Tensor) -> tuple[int, ...]:
    """Address and strides of a mask; a broadcast dimension has stride 0."""
    strides = (
        0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)
    )
    return (mask.data_ptr(), *strides)
