"""What a dense mask says in fewer words, where it does.

transformers spells causality out, `[batch, 1, queries, kv_tokens]`, as soon as several queries
stand behind a past (chunked prefill, several turns). Told as positions, the same attention needs
no mask to be read by every layer and chunk, and may be done by kernels that take none.
"""

import torch
from torch import Tensor

SLICE_ELEMENTS = 1 << 24  # 16 MiB of boolean at a time; queries are sliced to keep to it


@torch.no_grad()
def causal_starts(mask: Tensor, query_start: int, kv_tokens: int) -> Tensor | None:
    """The first attended position of each sequence, int32 [batch or 1], if with these `starts` and
    `causal` the first kv_tokens positions are attended just as `mask` says; else None.

    mask: bool [batch|1, heads|1, queries|1, >= kv_tokens], True = attend. Reads it once and waits
    for the device: for once per forward, not once per layer.
    """
    batch, heads, queries, _ = mask.shape
    if heads != 1 or kv_tokens == 0:
        return None
    mask = mask[:, 0, :, :kv_tokens]
    positions = torch.arange(kv_tokens, device=mask.device)
    starts = mask[:, -1].int().argmax(dim=-1)  # the last query attends the most
    is_same = torch.ones((), dtype=torch.bool, device=mask.device)
    step = max(1, SLICE_ELEMENTS // (batch * kv_tokens))
    for begin in range(0, queries, step):
        rows = mask[:, begin : begin + step]
        stands_at = torch.arange(begin, begin + rows.shape[1], device=mask.device) + query_start
        expected = positions <= stands_at[:, None]
        expected = expected & (positions >= starts[:, None, None])
        is_same &= (rows == expected).all()
    return starts.int() if bool(is_same) else None
