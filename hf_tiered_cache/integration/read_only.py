"""Tensors that can be read in every way and written to in none.

What a cache gives out of its blocks is built for the occasion: a write into it would be lost
without a word. So the handles, and every view of what they stand for, refuse to be written to;
what an operation computes from them is an ordinary tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_tiered_cache.errors import UnsupportedInputError


class ReadOnlyTensor(torch.Tensor):
    """Stands for the dense tensor that `materialize` returns, for every operation of torch."""

    # Operations are caught one level lower, where every one of them arrives.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        _check_writes_none(func, args, kwargs)
        args, kwargs = tree_map_only(ReadOnlyTensor, _operand, (args, kwargs))
        result = func(*args, **kwargs)
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return tree_map_only(torch.Tensor, ReadOnlyView, result)
        return result

    def materialize(self) -> torch.Tensor:
        """The dense tensor this one stands for."""
        raise NotImplementedError

    def operand(self) -> torch.Tensor:
        """The dense tensor, for an operation of torch."""
        return self.materialize()

    # What follows would not arrive as an operation: torch reaches for the bytes.

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array."""
        array = self.materialize().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> list[Any]:
        return self.materialize().tolist()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.materialize().__dlpack__(**kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialize().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise _read_only("setting data")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _read_only("setting an item")

    def apply_(self, *args: Any) -> Any:
        raise _read_only("apply_")

    def map_(self, *args: Any) -> Any:
        raise _read_only("map_")

    def map2_(self, *args: Any) -> Any:
        raise _read_only("map2_")


class ReadOnlyView(ReadOnlyTensor):
    """A dense tensor that was built for a view of a handle."""

    dense: torch.Tensor

    @staticmethod
    def __new__(cls, dense: torch.Tensor) -> "ReadOnlyView":
        view = torch.Tensor._make_subclass(cls, dense)
        view.dense = dense
        return view

    def materialize(self) -> torch.Tensor:
        """The dense tensor, for reading only."""
        return self.dense

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.dense)


def _operand(tensor: ReadOnlyTensor) -> torch.Tensor:
    return tensor.operand()


def _check_writes_none(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedInputError if `func` would write into a read-only tensor."""
    if not func._schema.is_mutable:
        return
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    for argument in func._schema.arguments:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        tensors = tree_leaves(given.get(argument.name)) if is_written else []
        if any(isinstance(tensor, ReadOnlyTensor) for tensor in tensors):
            raise _read_only(str(func))


def _read_only(what: str) -> UnsupportedInputError:
    return UnsupportedInputError(
        f"{what}: keys and values of a TieredCache are read-only; work on a copy, `.clone()`, "
        "which may be assigned to the layer (`layer.keys = copy`)"
    )
