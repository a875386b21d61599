"""The weights of a model, wherever they lie, and checksums of all their bytes.

Every byte counts: of samples alone, a row of an embedding that changed would not be seen. So all
are read once, and again where a weight has another address, another version or other samples (what
goes through `weight.data`, as PEFT's merge does, changes no version).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import xxhash
from torch.utils.weak import WeakTensorKeyDictionary

NUM_SAMPLES = 1024  # of each weight, evenly spaced, looked at every time
CHUNK_BYTES = 64 << 20  # that are brought from a device at once


class Weight(NamedTuple):
    """A parameter or buffer. tensor: None where its numbers are out of reach."""

    name: str
    tensor: torch.Tensor | None
    declared: torch.Tensor  # as the module has it; on "meta" where it is offloaded


class _Offloaded(NamedTuple):
    """Where accelerate keeps the weights of a module and those below it."""

    module: str
    weights: Mapping[str, torch.Tensor]


def modules_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, list[_Offloaded]]]:
    """(name, module, where offloaded weights may lie, nearest last) of each module once. Quicker
    than `named_modules`: this runs in every forward."""
    seen = set()
    stack: list[tuple[str, torch.nn.Module, list[_Offloaded]]] = [("", model, [])]
    while stack:
        name, module, places = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = [
            _Offloaded(name, weights)
            for hook in accelerate_hooks(module)
            if (weights := getattr(hook, "weights_map", None)) is not None
        ]
        places = [*places, *own] if own else places
        yield name, module, places
        prefix = f"{name}." if name else ""
        for child, below in vars(module)["_modules"].items():
            if below is not None:
                stack.append((prefix + child, below, places))


def weights_of(name: str, module: torch.nn.Module, places: list[_Offloaded]) -> Iterator[Weight]:
    """The module's own parameters and buffers; the rest as `modules_of` tells it."""
    prefix = f"{name}." if name else ""
    for kind in ("_parameters", "_buffers"):
        for own, declared in vars(module)[kind].items():
            if declared is not None:
                tensor = declared
                if declared.device.type == "meta":
                    tensor = _loaded(prefix + own, places)
                elif kind == "_parameters" and not declared.numel():
                    tensor = None  # gathered for a forward only (ZeRO, FSDP)
                yield Weight(prefix + own, tensor, declared)


def accelerate_hooks(module: torch.nn.Module) -> list[Any]:
    """What accelerate does around the module's forward."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _loaded(name: str, places: list[_Offloaded]) -> torch.Tensor | None:
    """An offloaded weight that lies in memory; what lies on disk would be read at each look."""
    for module, weights in reversed(places):
        key = name.removeprefix(f"{module}.") if module else name
        known: Any = weights
        if hasattr(known, "prefix") and hasattr(known, "dataset"):
            known, key = known.dataset, known.prefix + key
        known = getattr(known, "state_dict", known)
        if isinstance(known, Mapping) and isinstance(known.get(key), torch.Tensor):
            return known[key]
    return None


def version(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, how often it was changed in place). Changes through `.data` are not counted."""
    if hasattr(tensor, "__tensor_flatten__"):
        return id(tensor), 0
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


class _Known(NamedTuple):
    version: tuple[int, int]
    samples: bytes
    checksum: bytes


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def checksum(tensor: torch.Tensor) -> bytes:
    """xxh3_128 of all bytes, the same on every device."""
    if hasattr(tensor, "to_local"):  # a rank's part of a distributed tensor
        tensor = tensor.to_local()
    if hasattr(tensor, "__tensor_flatten__"):  # quantised: made of others
        names, _ = tensor.__tensor_flatten__()
        return b"".join(checksum(getattr(tensor, name)) for name in names)
    flat = tensor.detach().contiguous().view(-1)
    samples = _bytes_of(flat[:: max(1, flat.numel() // NUM_SAMPLES)]).tobytes()
    known = _known.get(tensor)
    if known is not None and known[:2] == (version(tensor), samples):
        return known.checksum
    now = version(tensor)
    digest = xxhash.xxh3_128()
    for part in flat.split(CHUNK_BYTES // flat.itemsize):
        digest.update(_bytes_of(part))
    _known[tensor] = _Known(now, samples, digest.digest())
    return digest.digest()


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return flat.contiguous().cpu().view(torch.uint8).numpy().data
