"""A plan for people, one screen, and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from hf_tiered_cache.planner.prediction import PLAIN, Figure, Mode, Plan, Prediction
from hf_tiered_cache.sizes import format_bytes

ASSUMED = "By a profile: predictions with their assumptions, nothing was measured here."
MEASURED = "Predictions by rates measured here, now."


def as_dict(
    plan: Plan, modes: Sequence[Mode] = (PLAIN,), is_profile: bool = False
) -> dict[str, Any]:
    """Everything that `describe` says, ready for JSON: bytes, seconds, tokens per second."""
    placement = plan.placement
    return {
        "is_prediction": True,
        "rates_are_measured": not is_profile,
        "context": plan.context,
        "batch": plan.shape.batch,
        "chunk": plan.chunk,
        "token_bytes": plan.shape.token_bytes,
        "block_tokens": plan.shape.layout.block_tokens,
        "block_bytes": plan.shape.layout.num_bytes,
        "layers_in_blocks": plan.shape.num_layers,
        "tiers": [asdict(tier) for tier in placement.tiers],
        "staging_bytes": placement.staging_bytes,
        "cold_bytes": placement.cold_bytes,
        "rates": {name: asdict(figure) for name, figure in _figures(plan)},
        "prefill": _as_dict(plan.prefill),
        "decode": {mode.name: _as_dict(plan.decode(mode)) for mode in modes},
        "knobs": [asdict(advice) for advice in plan.knobs()],
    }


def describe(plan: Plan, modes: Sequence[Mode] = (PLAIN,), is_profile: bool = False) -> str:
    """What lies where, the rates and their sources, tokens per second, what binds, what helps."""
    shape, placement = plan.shape, plan.placement
    rows = f" x {shape.batch}" if shape.batch > 1 else ""
    lines = [
        f"{plan.context:,} tokens{rows}: {format_bytes(shape.token_bytes)} a token in"
        f" {shape.num_layers} layers, blocks of {shape.layout.block_tokens} tokens"
        f" ({format_bytes(shape.layout.num_bytes)})",
        *_aligned(
            [
                ("tier", "read from here", "used", "budget"),
                *(
                    (
                        tier.name,
                        f"{tier.home_blocks:,} blocks",
                        format_bytes(tier.used_bytes),
                        format_bytes(tier.budget_bytes),
                    )
                    for tier in placement.tiers
                ),
            ]
        ),
        ASSUMED if is_profile else MEASURED,
        *_aligned([(name, _shown(figure, name), figure.source) for name, figure in _figures(plan)]),
        *_aligned(
            [
                _line("prefill", plan.prefill),
                *(_line(f"decode, {mode.name}", plan.decode(mode)) for mode in modes),
            ]
        ),
        "  " + _advice(plan),
    ]
    return "\n".join(lines)


def _advice(plan: Plan) -> str:
    found = plan.knobs()
    if found:
        best = found[0]
        return (
            f"{best.knob}={format_bytes(best.num_bytes).replace(' ', '')!r} would decode"
            f" {best.factor:.2f} times as fast ({best.tokens_per_second:.2f} tokens/s)"
        )
    if not plan.placement.cold_bytes:
        return "everything lies on the device: no budget would help"
    return f"no budget would help much: {plan.decode().binds} binds"


def _line(name: str, prediction: Prediction) -> tuple[str, str, str]:
    parts = sorted(prediction.parts.items(), key=lambda part: -part[1])
    of_them = ", ".join(f"{part} {_seconds(seconds)}" for part, seconds in parts)
    speed = f"{prediction.tokens_per_second:,.2f} tokens/s"
    return name, speed, f"{prediction.binds} binds ({of_them}, in part at the same time)"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"


UNITS = {
    "prefill_attend": (1e-9, "G multiplications/s"),
    "disk_read_work": (1e9, "s of a processor per GB"),
    "attend": (1e-9, "GB/s"),
    "disk_read": (1e-9, "GB/s"),
    "disk_write": (1e-9, "GB/s"),
    "link": (1e-9, "GB/s"),
}


def _shown(figure: Figure, name: str) -> str:
    factor, unit = UNITS.get(name, (1e3, "ms a token"))
    return f"{figure.value * factor:,.3g} {unit}"


def _figures(plan: Plan) -> list[tuple[str, Figure]]:
    of_both = [
        (field.name, getattr(holder, field.name))
        for holder in (plan.rates, plan.pace)
        for field in fields(holder)
    ]
    return [(name, value) for name, value in of_both if isinstance(value, Figure)]


def _as_dict(prediction: Prediction) -> dict[str, Any]:
    return {
        **asdict(prediction),
        "tokens_per_second": prediction.tokens_per_second,
        "binds": prediction.binds,
    }


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
