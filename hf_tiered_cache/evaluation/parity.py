"""From passes to figures: one row per dtype, context and cache, and a Markdown table.

Likelihoods are natural logarithms; a bit per byte is a nat per byte over log 2.
"""

import math
import statistics
from itertools import pairwise
from typing import Any

import numpy as np

from hf_tiered_cache.evaluation.bars import Bar
from hf_tiered_cache.evaluation.scoring import NOISE, REFERENCE, ROUNDINGS_OF_A_FLIP, TIERED, Pass
from hf_tiered_cache.sizes import format_bytes

FIRST_BUCKET = 128
MAX_LISTED_FLIPS = 5
ORDER = (REFERENCE, NOISE, TIERED)


def buckets(context: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions: to FIRST_BUCKET, then by doubling."""
    edges = [0]
    while edges[-1] < context:
        edges.append(min(context, max(FIRST_BUCKET, 2 * edges[-1])))
    return list(pairwise(edges))


def rows(dtype: str, passes: list[Pass]) -> list[dict[str, Any]]:
    """One row per (context, cache, share) over all windows, the reference first, then the noise."""
    groups: dict[tuple[int, str, float | None], list[Pass]] = {}
    for one in passes:
        groups.setdefault((one.context, one.cache, one.share), []).append(one)
    dynamic = {one.key: one for one in passes if one.cache == REFERENCE}
    resident = {one.key: one for one in passes if one.share == 0}
    table: list[dict[str, Any]] = []
    for (context, cache, share), group in sorted(
        groups.items(), key=lambda item: (item[0][0], ORDER.index(item[0][1]), item[0][2] or 0.0)
    ):
        row: dict[str, Any] = {
            "dtype": dtype,
            "context": context,
            "cache": cache,
            "share_asked": share,
            "attention": group[0].attention,
        }
        row |= _likelihoods(group)
        row |= _speed(group)
        row["peak_bytes"] = {
            tier: max(one.peak_bytes[tier] for one in group) for tier in group[0].peak_bytes
        }
        if cache != REFERENCE:
            references = [dynamic[one.key] for one in group]
            row |= _differences(group, references)
            row["by_position"] = [
                bucket | _bucket_difference(bucket, group, references)
                for bucket in row["by_position"]
            ]
            row["slowdown_over_dynamic"] = _slowdown(group, references)
        if cache == TIERED:
            row["share_off_device"] = statistics.fmean(one.off_device for one in group)
            row["block_tokens"] = group[0].block_tokens
            if resident:
                residents = [resident[one.key] for one in group]
                row["slowdown_over_resident"] = _slowdown(group, residents)
                row["bits_of_resident"] = all(
                    one.digest == other.digest for one, other in zip(group, residents, strict=True)
                )
        table.append(row)
    return table


def add_float32(table: list[dict[str, Any]]) -> None:
    """Add to each row how far its loss is from float32's, where that was measured: what of a
    difference is the dtype's, with either cache."""
    exact = {
        row["context"]: row["nll"]
        for row in table
        if row["dtype"] == "float32" and row["cache"] == REFERENCE
    }
    for row in table:
        if row["context"] in exact:
            row["nll_over_float32"] = row["nll"] - exact[row["context"]]


def _likelihoods(group: list[Pass]) -> dict[str, Any]:
    scores = np.concatenate([one.log_likelihoods for one in group])
    nll = -float(scores.mean())
    # The decoded tokens' own predictions; those before come from the prefill.
    decoded = np.concatenate([_positions(one) > one.prefill_tokens for one in group])
    return {
        "windows": len(group),
        "documents": len({one.document for one in group}),
        "tokens": len(scores),
        "nll": nll,
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "bits_per_byte": -float(scores.sum()) / math.log(2) / sum(one.num_bytes for one in group),
        "nll_prefilled": _mean(-scores[~decoded]),
        "nll_decoded": _mean(-scores[decoded]),
        "by_position": [_bucket(group, *edges) for edges in buckets(group[0].context)],
    }


def _positions(one: Pass) -> np.ndarray:
    """Of each scored token in its window."""
    return np.arange(one.first_scored, one.first_scored + len(one.log_likelihoods))


def _in_bucket(one: Pass, first: int, last: int) -> np.ndarray:
    positions = _positions(one)
    return one.log_likelihoods[(first <= positions) & (positions < last)]


def _bucket(group: list[Pass], first: int, last: int) -> dict[str, Any]:
    scores = np.concatenate([_in_bucket(one, first, last) for one in group])
    return {"from": first, "to": last, "tokens": len(scores), "nll": _mean(-scores)}


def _bucket_difference(
    bucket: dict[str, Any], group: list[Pass], references: list[Pass]
) -> dict[str, float | None]:
    edges = bucket["from"], bucket["to"]
    deltas = [
        _in_bucket(reference, *edges) - _in_bucket(one, *edges)
        for one, reference in zip(group, references, strict=True)
    ]
    return {"delta_nll": _mean(np.concatenate(deltas))}


def _differences(group: list[Pass], references: list[Pass]) -> dict[str, Any]:
    pairs = list(zip(group, references, strict=True))
    deltas = np.concatenate([other.log_likelihoods - one.log_likelihoods for one, other in pairs])
    flips = [flip for one in group for flip in one.flips]
    flips.sort(key=lambda flip: flip.roundings)
    identical = [one.continuation == other.continuation for one, other in pairs]
    partings = [one.parting for one in group]
    return {
        "delta_nll": float(deltas.mean()),
        "delta_nll_standard_error": float(deltas.std() / math.sqrt(len(deltas))),
        "mean_abs_delta_nll": float(np.abs(deltas).mean()),
        "max_abs_delta_nll": float(np.abs(deltas).max()),
        "max_delta_logit": max(one.max_delta_logit for one in group),
        "compared_tokens": sum(one.compared_rows for one in group),
        "flips": len(flips),
        "flips_beyond_one_rounding": sum(flip.roundings > 1 for flip in flips),
        "flips_beyond_rounding": sum(flip.roundings > ROUNDINGS_OF_A_FLIP for flip in flips),
        "widest_flip_roundings": flips[-1].roundings if flips else 0.0,
        "largest_flips": [vars(flip) for flip in flips[: -MAX_LISTED_FLIPS - 1 : -1]],
        "new_tokens": len(group[0].continuation),
        "continuations_identical": sum(identical),
        "parting_roundings": [flip.roundings for flip in partings if flip],
    }


def _speed(group: list[Pass]) -> dict[str, float]:
    return {
        name: statistics.median(_rate(one, kind) for one in group)
        for kind in ("prefill", "decode")
        for name in (f"{kind}_tokens_per_second",)
    }


def _rate(one: Pass, kind: str) -> float:
    tokens, seconds = getattr(one, f"{kind}_tokens"), getattr(one, f"{kind}_seconds")
    return tokens / seconds


def _slowdown(group: list[Pass], baselines: list[Pass]) -> dict[str, float]:
    """The baseline's speed over ours, above 1 is slower: median, least and most of the windows."""
    result = {}
    for kind in ("prefill", "decode"):
        pairs = zip(group, baselines, strict=True)
        ratios = [_rate(baseline, kind) / _rate(one, kind) for one, baseline in pairs]
        result[kind] = statistics.median(ratios)
        result[f"{kind}_least"], result[f"{kind}_most"] = min(ratios), max(ratios)
    return result


def _mean(values: np.ndarray) -> float | None:
    """None where there is nothing to average."""
    return float(values.mean()) if len(values) else None


COLUMNS = (
    "dtype",
    "context",
    "cache",
    "off device",
    "NLL/token",
    "bits/byte",
    "delta NLL",
    "max delta logit",
    "flips (largest margin)",
    "continued alike",
    "peak memory",
    "prefill tokens/s",
    "decode tokens/s",
    "slowdown, decode",
)


def markdown(table: list[dict[str, Any]], kept: list[Bar], environment: dict[str, Any]) -> str:
    """The table, what was measured on, and which bars were missed."""
    lines = [f"`{environment['command']}`", ""]
    lines.append(
        f"{environment['processor']}, {environment['processes']} x {environment['threads']} "
        f"threads, kernel {environment['kernel']}, torch {environment['torch']}, transformers "
        f"{environment['transformers']}. Model {environment['model']}, data {environment['data']}: "
        f"{', '.join(environment['documents'])}. The last {environment['decode_tokens']} tokens of "
        "each context by single-token decode. Delta: against DynamicCache with the model's own "
        "attention; noise: with another of transformers' own. Slowdown: against the "
        "TieredCache with everything on the device, then against DynamicCache (below 1 is faster)."
    )
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in table]
    missed = [bar for bar in kept if not bar.is_reached]
    lines += ["", f"{len(kept) - len(missed)} of {len(kept)} bars reached."]
    lines += [f"MISSED {bar.name}: {bar}" for bar in missed]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    is_compared = row["cache"] != REFERENCE
    margins = row["largest_flips"][:1] if is_compared else []
    slowdowns = [row[name]["decode"] for name in SLOWDOWNS if name in row]
    return [
        row["dtype"],
        f"{row['context']:,}",
        f"{row['cache']} ({row['attention']})",
        f"{row['share_off_device']:.0%}" if row["cache"] == TIERED else "",
        f"{row['nll']:.6f}",
        f"{row['bits_per_byte']:.4f}",
        f"{row['delta_nll']:+.1e}" if is_compared else "",
        f"{row['max_delta_logit']:.1e}" if is_compared else "",
        f"{row['flips']}" + "".join(f" ({m['margin']:.2g})" for m in margins)
        if is_compared
        else "",
        f"{row['continuations_identical']} of {row['windows']}" if is_compared else "",
        ", ".join(f"{tier} {format_bytes(size)}" for tier, size in row["peak_bytes"].items()),
        f"{row['prefill_tokens_per_second']:.0f}",
        f"{row['decode_tokens_per_second']:.1f}",
        ", ".join(f"{slowdown:.2f}x" for slowdown in slowdowns),
    ]


SLOWDOWNS = ("slowdown_over_resident", "slowdown_over_dynamic")
