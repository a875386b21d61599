"""Which tokens a cache holds, as its forwards told: `TokenRecord`.

Keys and values say nothing of the tokens they are of. A cache with a store notes them, so that no
block gets a name that it does not deserve: what did not come as plain ids at plain positions has no
name.
"""

import inspect
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
            given = kwargs
            if args:
                named = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
                given = {**named, **named.pop("kwargs", {})}
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
        if name not in _HARMLESS and isinstance(value, torch.Tensor)
    ]
    if others:
        return f"{', '.join(sorted(others))} came with the ids"
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return "a mask of another kind than padding was given"
        if not bool(mask.all()):
            return "the batch is padded"
    positions = given.get("position_ids")
    if positions is not None:
        plain = torch.arange(held, held + ids.shape[1], device=positions.device)
        if positions.dim() != 2 or not bool((positions == plain).all()):
            return "positions of its own were given"
    return ""
