"""Ask a handle for everything that torch asks a tensor for; a script, for a crash ends its process.

Prints a line for each member of `torch.Tensor`, and each function of torch, that needs no more than
the tensor: its name before it is asked, the verdict after. ok: as the dense tensor; refused: an
UnsupportedInputError; else what differs.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.utils import logging

from hf_tiered_cache import TieredCache, UnsupportedInputError

# What tells a handle from a dense tensor, on purpose or by nature.
NO_QUESTIONS = {
    *("__annotations__", "__class__", "__dict__", "__dir__", "__doc__", "__getstate__", "__hash__"),
    *("__module__", "__repr__", "__sizeof__", "__slots__", "__str__", "__weakref__"),
    *("__init__", "__init_subclass__", "__new__", "__reduce__", "__subclasshook__"),
    *("_python_dispatch", "_typed_storage"),
}
UNDEFINED = {"empty_like", "new_empty", "empty"}  # contents nobody chose
# What torch says where it finds no bytes, deep inside an operation of its own.
TORCH_REFUSES = ("its data is not allocated yet", "Cannot access data pointer")


def members() -> Iterator[tuple[str, Callable[[torch.Tensor], Any]]]:
    """Every member of a tensor: its value, or what it returns without arguments."""
    for name in dir(torch.Tensor):
        if name not in NO_QUESTIONS:

            def ask(tensor: torch.Tensor, name: str = name) -> Any:
                member = getattr(tensor, name)
                return member() if callable(member) else member

            yield f"Tensor.{name}", ask
    for function in torch.overrides.get_testing_overrides():
        name = torch.overrides.resolve_name(function)
        if name and not name.startswith("torch.Tensor."):
            yield name, function


def is_same(got: Any, expected: Any) -> bool:
    """Whether two answers are the same, but for the last digits of tensors."""
    if isinstance(expected, torch.Tensor):
        if expected.layout != torch.strided or expected.is_quantized:
            return repr(got) == repr(expected)
        if got.dtype != expected.dtype or got.shape != expected.shape:
            return False
        return torch.allclose(got, expected, equal_nan=True)
    if isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(is_same, got, expected))
    if " at 0x" in repr(expected):
        return type(got) is type(expected)
    return repr(got) == repr(expected)


def main() -> None:
    """Ask a handle, and a dense tensor with the same numbers, the same questions."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    dense = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(1)).abs()
    cache = TieredCache(
        device_bytes=64 * 4096, disk_bytes="1MiB", disk_dir=tempfile.mkdtemp(), block_tokens=4
    )
    cache.update(dense, dense, 0)
    for name, ask in members():
        torch.manual_seed(0)
        try:
            expected = ask(dense.clone())
        except Exception:
            continue  # not a question for a tensor alone
        print(name, end=" ", flush=True)
        torch.manual_seed(0)
        try:
            got = ask(cache.layers[0].keys)
        except UnsupportedInputError:
            print("refused")
        except Exception as error:
            text = str(error).replace("\n", " ")
            is_refusal = isinstance(error, RuntimeError) and any(
                why in text for why in TORCH_REFUSES
            )
            print("refused by torch" if is_refusal else f"raised {type(error).__name__}: {text}")
        else:
            is_right = name.rpartition(".")[2] in UNDEFINED or is_same(got, expected)
            print("ok" if is_right else f"got {got!r:.60} instead of {expected!r:.60}")
        assert torch.equal(cache.layers[0].keys.clone(), dense), "the cache has changed"
    cache.close()


if __name__ == "__main__":
    sys.exit(main())
