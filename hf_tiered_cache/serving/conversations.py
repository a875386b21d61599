"""The caches of chats between their turns: parked, found again by their tokens, dropped in turn.

The store, where there is one, is the second line: what was dropped, or computed before a restart.
All are forks of one empty cache, so they share its tiers and budgets, and blocks of prompts they
have in common. A request gets a fork of the parked cache with which it shares the most tokens, cut
to exactly those; the parked one stays for who else continues there.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_tiered_cache.integration.cache import TieredCache


@dataclass(eq=False)
class _Parked:
    cache: TieredCache
    ids: np.ndarray  # int64, of the tokens that the cache holds
    prompt_tokens: int  # of the turn that it was parked after
    tenant: str


class Conversations:
    """Parked caches, the most lately used last. For the model's thread alone.

    root: an empty cache, whose budgets they share. max_parked: how many there may be at most.
    """

    def __init__(self, root: TieredCache, max_parked: int) -> None:
        self.root = root
        self.max_parked = max_parked
        self._parked: list[_Parked] = []

    def __len__(self) -> int:
        return len(self._parked)

    def open(self, ids: torch.Tensor, tenant: str, model: PreTrainedModel) -> TieredCache:
        """A cache that holds a prefix of `ids` (int64 `[tokens]`) as long as the tenant's parked
        ones have it, or the store has it of this model; but without the last token, whose logits
        are still to be computed."""
        parked = self._fork_parked(ids[:-1].cpu().numpy(), tenant)
        fresh = copy.deepcopy(self.root)
        if self.root.store is not None and len(ids) > 1:
            fresh.restore(ids, model, salt=tenant.encode())
        if parked is None or fresh.get_seq_length() > parked.get_seq_length():
            best, other = fresh, parked
        else:
            best, other = parked, fresh
        if other is not None:
            other.close()
        return best

    def _fork_parked(self, wanted: np.ndarray, tenant: str) -> TieredCache | None:
        mine = [it for it in self._parked if it.tenant == tenant]
        for parked in sorted(mine, key=lambda it: -common_prefix(it.ids, wanted)):
            length = common_prefix(parked.ids, wanted)
            if length == 0:
                break
            fork = copy.deepcopy(parked.cache)
            try:
                if length < len(parked.ids):
                    fork.crop(length - len(parked.ids))
            except (RuntimeError, ValueError):  # a window or a state that cannot go back
                fork.close()
                continue
            self._parked.remove(parked)
            self._parked.append(parked)
            return fork
        return None

    def park(self, cache: TieredCache, ids: list[int], prompt_tokens: int, tenant: str) -> None:
        """Keep a cache that holds exactly `ids`. It takes the place of those whose prompt it
        continues: a chat is parked once, not once a turn."""
        new = _Parked(cache, np.asarray(ids, dtype=np.int64), prompt_tokens, tenant)
        for old in list(self._parked):
            prompt = old.ids[: old.prompt_tokens]
            if old.tenant == tenant and common_prefix(prompt, new.ids) == len(prompt):
                self._drop(old)
        self._parked.append(new)
        while len(self._parked) > self.max_parked:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Give back the blocks of the one that was not used for longest; False if there is none."""
        if not self._parked:
            return False
        self._drop(self._parked[0])
        return True

    def close(self) -> None:
        """Drop all, and the tiers and the store with them."""
        while self.drop_oldest():
            pass
        self.root.close()
        if self.root.store is not None:
            self.root.store.close()

    def _drop(self, parked: _Parked) -> None:
        self._parked.remove(parked)
        parked.cache.close()


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many first elements are equal."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
