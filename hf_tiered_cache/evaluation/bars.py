"""What a `TieredCache` must keep, figure by figure, and the verdict over all of them.

In float32 the bars are fixed: the same tokens, and the same loss. In half precision two right
computations of one model differ, by how much depends on the model and the text. So the bars follow
from the noise: how far transformers' own implementations of attention are from one another in the
same run, on the same text. The bits, which must not depend on the share off the device, are no
matter of noise in any dtype.
"""

import math
from dataclasses import dataclass
from typing import Any

from hf_tiered_cache.evaluation.scoring import NOISE, ROUNDINGS_OF_A_FLIP, TIERED

IDENTICAL, DIFFERENT = "identical", "DIFFERENT"
MET, MISSED = "met", "MISSED"
EXACT_DTYPE = "float32"
EXACT_NLL_BAR = 1e-6  # of |delta NLL| per token, in nats
# Where no other implementation can be had: |delta NLL| that half precision has shown.
UNMEASURED_NLL_BAR = 1e-3
STANDARD_ERRORS = 3  # that a mean, or a count, may be off by chance
TIMES_THE_NOISE = 2  # that an extreme of two runs may differ by chance
TIMES_THE_MEAN_NOISE = 1.5  # the same of a mean over all tokens, which hardly moves


@dataclass(frozen=True)
class Bar:
    """One figure of one row, the noise of it and the bar that it must keep."""

    name: str
    what: str  # dtype, context, share
    share: str
    measured: str
    noise: str
    bar: str
    is_reached: bool

    @property
    def verdict(self) -> str:
        return MET if self.is_reached else MISSED

    def __str__(self) -> str:
        return f"{self.what}: {self.name} {self.measured}, noise {self.noise}, bar {self.bar}"


def bars(table: list[dict[str, Any]]) -> list[Bar]:
    """What each row of a TieredCache in `parity.rows` must keep."""
    noise = {(row["dtype"], row["context"]): row for row in table if row["cache"] == NOISE}
    return [
        bar
        for row in table
        if row["cache"] == TIERED
        for bar in _of_row(row, noise.get((row["dtype"], row["context"])))
    ]


def verdict(kept: list[Bar]) -> str:
    """The conjunction of all bars in one line, in the words of the bars."""
    missed = [bar for bar in kept if not bar.is_reached]
    words = IDENTICAL if all(DIFFERENT not in bar.measured for bar in kept) else DIFFERENT
    if missed:
        names = ", ".join(dict.fromkeys(bar.name for bar in missed))
        return f"NO PARITY: {MISSED} {names}; new tokens {words}: please report it, with `env`"
    if words == DIFFERENT:
        return f"parity within the noise: every bar {MET}; new tokens {DIFFERENT}, within the bar"
    return f"parity: every bar {MET}; new tokens {IDENTICAL}"


def _of_row(row: dict[str, Any], noise: dict[str, Any] | None) -> list[Bar]:
    share = f"{row['share_off_device']:.0%}"
    what = f"{row['dtype']}, context {row['context']:,}, {share} off the device"
    found: list[Bar] = []

    def add(name: str, measured: str, of_noise: str, bar: str, is_reached: bool) -> None:
        found.append(Bar(name, what, share, measured, of_noise, bar, is_reached))

    def add_number(name: str, key: str, limit: float, chance: float = 0.0) -> None:
        """MISSED for NaN."""
        got, spread = abs(row[key]), f" +- {chance:.1e}" if chance else ""
        add(name, f"{got:.1e}", _number(noise, key) + spread, f"{limit:.1e}", got <= limit)

    is_exact = row["dtype"] == EXACT_DTYPE
    chance = STANDARD_ERRORS * noise["delta_nll_standard_error"] if noise else 0.0
    add_number("|delta NLL|", "delta_nll", _nll_limit(is_exact, noise, chance), chance)
    if noise and not is_exact:
        mean, most = "mean_abs_delta_nll", "max_delta_logit"
        add_number("mean |delta NLL|", mean, TIMES_THE_MEAN_NOISE * noise[mean])
        add_number("max |delta logit|", most, TIMES_THE_NOISE * noise[most])
        limit = noise["flips"] + STANDARD_ERRORS * math.sqrt(noise["flips"] + 1)
        flips = row["flips"]
        add("other likeliest", f"{flips}", f"{noise['flips']}", f"{limit:.0f}", flips <= limit)
    limit = ROUNDINGS_OF_A_FLIP
    if noise and not is_exact:
        limit = max(limit, TIMES_THE_NOISE * noise["widest_flip_roundings"])
    widest = row["widest_flip_roundings"]
    add(
        "widest of them",
        _roundings(row),
        _roundings(noise),
        f"{limit:.2g} roundings",
        widest <= limit,
    )
    parted = sum(one <= limit for one in row["parting_roundings"]) if not is_exact else 0
    add(
        "new tokens",
        _continued(row),
        _continued(noise),
        IDENTICAL if is_exact else f"parted within {limit:.2g} roundings",
        row["continuations_identical"] + parted == row["windows"],
    )
    if row["share_asked"] and "bits_of_resident" in row:
        is_same = row["bits_of_resident"]
        add("bits", "those resident" if is_same else "OTHERS", "", "those resident", is_same)
    return found


def _nll_limit(is_exact: bool, noise: dict[str, Any] | None, chance: float) -> float:
    if is_exact:
        return EXACT_NLL_BAR
    if noise is None:
        return UNMEASURED_NLL_BAR
    return max(EXACT_NLL_BAR, abs(noise["delta_nll"]) + chance)


def _continued(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    different = row["windows"] - row["continuations_identical"]
    if not different:
        return IDENTICAL
    widest = max(row["parting_roundings"], default=math.inf)
    many = f" in {different} of {row['windows']}" if row["windows"] > 1 else ""
    return f"{DIFFERENT}{many} (parted at {widest:.2g} roundings)"


def _roundings(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['widest_flip_roundings']:.2g} roundings" if row["flips"] else "none"


def _number(row: dict[str, Any] | None, key: str) -> str:
    return f"{abs(row[key]):.1e}" if row else ""
