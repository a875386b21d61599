"""Which model blocks are of: everything that keys and values depend on besides the tokens.

Names and revisions prove nothing (a merge changes weights in place), so every byte of every weight
counts, and the source of classes that no known library has written.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_tiered_cache.integration.nameless import adapters_of, code_of
from hf_tiered_cache.integration.weights import (
    accelerate_hooks,
    checksum,
    modules_of,
    weights_of,
)
from hf_tiered_cache.store import keys

LAYOUT = "kv-head-major-1"  # `BlockLayout`
# Of a config, what is not about keys and values, or differs between two loads of one checkpoint.
_IGNORED = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures"),
        *("torch_dtype", "dtype", "use_cache", "_attn_implementation", "attn_implementation"),
        *("output_attentions", "output_hidden_states", "return_dict", "problem_type"),
        *("id2label", "label2id", "chunk_size_feed_forward"),
    }
)


def model_space(model: torch.nn.Module, salt: bytes = b"") -> bytes:
    """The namespace of a model's blocks as it computes them now, 32 bytes: weights, config after
    loading (RoPE included), dtypes, adapters, quantisation, autocast, tensor-parallel rank.
    salt: a tenant's."""
    return keys.namespace({**model_identity(model), "salt": salt})


def model_identity(model: torch.nn.Module) -> dict[str, Any]:
    """What `model_space` is made of, by name. It is whole where `look_at` finds no fault."""
    device = compute_device(model).type
    autocast = torch.is_autocast_enabled(device)
    config: Any = getattr(model, "config", None)
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "code": _code(model),
        "config": _plain(config.to_dict()) if hasattr(config, "to_dict") else None,
        "weights": _weights(model),
        "adapters": list(_adapters(model)),
        "autocast": str(torch.get_autocast_dtype(device)) if autocast else "",
        "layout": LAYOUT,
        "parallel": _parallel(model),
    }


def compute_device(model: torch.nn.Module) -> torch.device:
    """Where it computes: its first layer, else its first weight that is anywhere."""
    for device in layer_devices(model).values():
        return device
    found = (one.device for one in model.parameters() if one.device.type != "meta")
    return next(found, torch.device("cpu"))


def _code(model: torch.nn.Module) -> str:
    """SHA-256 of the source of its classes."""
    codes = {code_of(type(module)) or "" for module in model.modules()}
    return hashlib.sha256(keys.canonical(sorted(codes))).hexdigest()


def _weights(model: torch.nn.Module) -> bytes:
    digest = hashlib.sha256()
    for name, module, places in modules_of(model):
        for weight in weights_of(name, module, places):
            tensor = weight.declared if weight.tensor is None else weight.tensor
            described = [weight.name, str(tensor.dtype), list(tensor.shape)]
            digest.update(keys.canonical(described))
            digest.update(b"" if weight.tensor is None else checksum(tensor))
    return digest.digest()


def _adapters(model: torch.nn.Module) -> Iterator[list[Any]]:
    """What of LoRA and its like is active and how much it counts; weights are summed already."""
    for name, module in model.named_modules():
        if adapters := adapters_of(module):
            yield [name, *adapters]


def _parallel(model: torch.nn.Module) -> list[int]:
    """(rank, world) of the tensor-parallel group."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return [0, 1]
    tp = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    return [tp.get_local_rank(), tp.size()]


def _plain(value: Any) -> Any:
    """A config as `keys.canonical` takes it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in _IGNORED}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _plain(one) for one in (sorted(value, key=str) if isinstance(value, set) else value)
        ]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def layer_devices(model: torch.nn.Module) -> dict[int, torch.device]:
    """Where each layer attends, by its number: where accelerate brings its attention's parameters
    to, or where they lie."""
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and number not in devices:
            hooks = (hook for part in module.modules() for hook in accelerate_hooks(part))
            given = (getattr(hook, "execution_device", None) for hook in hooks)
            lying = (one.device for one in module.parameters() if one.device.type != "meta")
            device = next((one for one in given if one is not None), next(lying, None))
            if device is not None:
                devices[number] = torch.device(device)
    return devices
