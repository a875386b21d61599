"""`look_at`: whether tokens alone tell what a model computes of them, and whether it is still the
model that it was.

A cache may lose, it may never lie: where keys and values depend on what no name holds (the length
of the whole sequence, somebody's hooks, weights out of reach), nothing is stored or restored.
"""

import inspect
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig

from hf_tiered_cache.integration.weights import accelerate_hooks, modules_of, version, weights_of

# Of RoPE: frequencies that are what they are, however long the sequence is. "dynamic" and
# "longrope" are not, and of others nobody knows.
FIXED_ROPE = frozenset({"default", "linear", "llama3", "mrope", "proportional", "yarn"})
_KNOWN_CODE = frozenset(
    {"accelerate", "bitsandbytes", "builtins", "hf_tiered_cache", "peft", "torch", "torchao"}
    | {"transformers"}
)


class Seen(NamedTuple):
    """Of a model as it is now."""

    why: str
    """Why blocks it computes have no name; empty where they have."""
    stamp: tuple[Any, ...]
    """Equal while nothing changed; what goes through `weight.data` is not seen."""


def look_at(model: torch.nn.Module) -> Seen:
    """Look; a fraction of a millisecond, for it is done in every forward."""
    why = _why_of_the_whole(model)
    stamp: list[Any] = [_autocast()]
    for name, module, places in modules_of(model):
        why = why or _why_of(model, name, module)
        stamp += (id(module), module.training, *adapters_of(module))
        for weight in weights_of(name, module, places):
            if weight.tensor is None:
                why = why or f"the weight {weight.name} cannot be read (offloaded to disk?)"
            elif hasattr(weight.tensor, "placements"):
                why = why or "the model is sharded over processes"
            else:
                stamp.append(version(weight.tensor))
    return Seen(why, tuple(stamp))


def _why_of_the_whole(model: torch.nn.Module) -> str:
    if model.training:
        return "the model was in training mode"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "hooks of all modules are there"
    if _is_sharded(model):
        return "the model is sharded over processes"
    config: Any = getattr(model, "config", None)
    return "" if config is None else _why_of_rope(set(_rope_types(config)))


def _why_of(model: torch.nn.Module, name: str, module: torch.nn.Module) -> str:
    own = vars(module)
    hooks = [*own["_forward_pre_hooks"].values()]
    if module is not model:  # outputs of the whole are not cached
        hooks += own["_forward_hooks"].values()
    hooks = [hook for hook in hooks if not _module_of(hook).startswith(_NOTHING_BUT_LOOK)]
    hooks += [
        one for one in accelerate_hooks(module) if _module_of(type(one)) != "accelerate.hooks"
    ]
    if hooks:
        return f"{name or 'the model'} has a hook that may change what it computes"
    if "forward" in own and not accelerate_hooks(module) and not _is_known(own["forward"]):
        return f"forward of {name or 'the model'} was replaced"
    if "rope_deltas" in own:
        return "positions depend on an earlier image (rope_deltas)"
    if module.training and _is_random(module):
        return f"{name} was in training mode"
    rope = own.get("rope_type")
    if rope is not None and (
        why := _why_of_rope(set(rope.values() if isinstance(rope, dict) else [rope]))
    ):
        return why
    return "" if code_of(type(module)) is not None else f"the code of {type(module)} cannot be read"


_NOTHING_BUT_LOOK = ("transformers.utils.output_capturing", "hf_tiered_cache.")


def _module_of(one: Any) -> str:
    return getattr(one, "__module__", None) or ""


def _is_known(one: Any) -> bool:
    """Whether a library that has a name of its own has written it."""
    return _module_of(one).split(".")[0] in _KNOWN_CODE


def _is_random(module: torch.nn.Module) -> bool:
    """Whether it computes otherwise in training mode."""
    if isinstance(module, torch.nn.modules.batchnorm._NormBase):
        return True
    is_dropout = isinstance(module, torch.nn.modules.dropout._DropoutNd)
    return any(
        isinstance(value, float)
        and value > 0
        and ("drop" in name or "jitter" in name or (name == "p" and is_dropout))
        for name, value in vars(module).items()
    )


def _is_sharded(model: torch.nn.Module) -> bool:
    """Whether this process has but a part of it (tensor parallel, FSDP)."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    if distributed.get_world_size() == 1:
        return False
    mesh = getattr(model, "_device_mesh", None)
    return mesh is not None or any("FullySharded" in type(m).__name__ for m in model.modules())


def _why_of_rope(types: set[str]) -> str:
    others = sorted(map(str, types - FIXED_ROPE))
    return f"RoPE may depend on the length of the sequence ({', '.join(others)})" if others else ""


def _rope_types(part: Any) -> Iterator[str]:
    """Every kind of RoPE in a config, those of its parts, and in parameters by layer type."""
    if isinstance(part, PreTrainedConfig):
        for name, value in vars(part).items():
            if name in ("rope_parameters", "rope_scaling") or isinstance(value, PreTrainedConfig):
                yield from _rope_types(value)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in ("rope_type", "type"):
                yield value
            else:
                yield from _rope_types(value)


def _autocast() -> list[str]:
    """Of every kind of device, what autocast makes of a matrix product."""
    return [
        f"{kind} {torch.get_autocast_dtype(kind)}"
        for kind in ("cpu", "cuda", "xpu", "mps")
        if torch.is_autocast_enabled(kind)
    ]


def adapters_of(module: torch.nn.Module) -> list[Any]:
    """Which adapters of a layer of PEFT are active, and how much they count."""
    own = vars(module)
    if "base_layer" not in own["_modules"]:
        return []
    active = own.get("_active_adapter", [])
    return [
        [active] if isinstance(active, str) else sorted(map(str, active)),
        sorted((str(one), float(value)) for one, value in dict(own.get("scaling", {})).items()),
        sorted(map(str, own.get("merged_adapters", []))),
        bool(own.get("_disable_adapters", False)),
    ]


_codes: weakref.WeakKeyDictionary[type, str | None] = weakref.WeakKeyDictionary()


def code_of(cls: type) -> str | None:
    """The source of a class and of what it inherits, as far as no library with a name of its own
    has written it; None where it cannot be read."""
    if cls not in _codes:
        _codes[cls] = _code_of(cls)
    return _codes[cls]


def _code_of(cls: type) -> str | None:
    own = [one for one in cls.__mro__ if not _is_known(one)]
    try:
        return "\n".join(map(inspect.getsource, own))
    except (OSError, TypeError):
        return None
