"""Which tokens a cache holds, as its forwards told: `TokenRecord`.

Keys and values say nothing of the tokens they are of. A cache with a store notes them, so that no
block gets a name that it does not deserve: what did not come as plain ids at plain positions has no
name.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

# Arguments of a forward that do not change what is cached, and those that are looked at.
_HARMLESS = frozenset(
    {
        *("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "labels"),
        *("logits_to_keep", "num_logits_to_keep", "cache_position", "return_dict"),
        *("output_attentions", "output_hidden_states"),
    }
)


class TokenRecord:
    """The ids of the tokens held, int64 `[rows, tokens]` on the CPU; None where they are not known,
    and then `reason` says why."""

    def __init__(self) -> None:
        self.ids: torch.Tensor | None = None
        self.reason = ""

    def set(self, ids: torch.Tensor) -> None:
        """These, and no others, are held."""
        self.ids, self.reason = ids.detach().to("cpu", torch.int64), ""

    def forget(self, reason: str = "") -> None:
        """Nothing is held, or nobody knows what."""
        self.ids, self.reason = None, reason

    @property
    def num_tokens(self) -> int:
        """Tokens known."""
        return 0 if self.ids is None else self.ids.shape[1]

    def crop(self, num_tokens: int) -> None:
        """Only the first tokens are held still."""
        if self.ids is not None:
            self.ids = self.ids[:, :num_tokens]

    def select(self, rows: torch.Tensor) -> None:
        """Row `i` is what row `rows[i]` was."""
        if self.ids is not None:
            self.ids = self.ids[rows]

    def copy(self) -> "TokenRecord":
        """The same, for a fork."""
        other = TokenRecord()
        other.ids, other.reason = self.ids, self.reason
        return other

    def told(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], held: int
    ) -> "Told":
        """What a forward is about to add to `held` tokens."""
        reason = self.reason
        ids = None
        if not reason and held != self.num_tokens:
            reason = "tokens came otherwise than by a forward of a model"
        if not reason:
            given = named_arguments(model.forward, args, kwargs) if args else kwargs
            ids = given.get("input_ids")
            reason = reason or not_plain(given, held)
        if reason or ids is None:
            return Told(self, None, reason or "no ids were given")
        new = ids.detach().to("cpu", torch.int64)
        if self.ids is not None:
            if self.ids.shape[0] != new.shape[0]:
                return Told(self, None, "the number of rows changed")
            new = torch.cat([self.ids, new], 1)
        return Told(self, new, "")


class Told:
    """What a record becomes when a forward went through."""

    def __init__(self, record: TokenRecord, ids: torch.Tensor | None, reason: str) -> None:
        self.ids, self.reason = ids, reason
        self._record = record

    def note(self) -> None:
        """It went through."""
        self._record.ids, self._record.reason = self.ids, self.reason


def named_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What a call is given, by name; those for which there is no name of its own as well."""
    signature = inspect.signature(function)
    named = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


def not_plain(given: dict[str, Any], held: int) -> str:
    """Why tokens that come with these arguments, behind `held` ones, are not told by their ids
    alone; empty where they are."""
    ids = given.get("input_ids")
    if given.get("inputs_embeds") is not None or ids is None:
        return "embeddings were given in place of ids"
    if ids.dim() != 2:
        return f"ids of shape {list(ids.shape)}"
    others = [
        name
        for name, value in given.items()
        if name not in _HARMLESS and not (value is None or isinstance(value, bool | int | float))
    ]
    if others:
        return f"{', '.join(sorted(others))} came with the ids"
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return "a mask of another kind than padding was given"
        if not bool(mask.all()):
            return "the batch is padded"
    for name, num_dims in (("position_ids", 2), ("cache_position", 1)):
        if not _are_plain(given.get(name), num_dims, held, ids.shape[1]):
            return "positions of its own were given"
    return ""


def _are_plain(positions: Any, num_dims: int, held: int, num_new: int) -> bool:
    """Whether these are None or count on behind what is held."""
    if positions is None:
        return True
    if not isinstance(positions, torch.Tensor) or positions.dim() != num_dims:
        return False
    plain = torch.arange(held, held + num_new, device=positions.device)
    return positions.shape[-1] == num_new and bool((positions == plain).all())
