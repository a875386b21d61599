"""How many tokens to guess before the next pass: `DraftLength`, from what was measured so far.

A pass over the cold blocks takes `base` seconds and `row` more for each guess that it checks, a
guess takes `draft`. If each is right with the same chance `a`, independently, a pass with g guesses
brings E(g) = (1 - a^(g+1)) / (1 - a) tokens (Leviathan et al. 2023, arXiv 2211.17192), so the rate
is E(g) / (base + g * (row + draft)): the best g is looked up, 0 where guessing does not pay.
"""

MOST = 16  # guesses in a pass
FIRST_PASSES = (
    2  # without guesses, to know what a pass takes; the first one finds nothing prefetched
)
LEAST_GAIN = 1.05  # over no guesses, so that noise does not choose
# While guessing does not pay it is tried again after so many passes, then twice as many: one guess
# that cost as much as a pass would be 3 % of 32.
FIRST_PAUSE, LAST_PAUSE = 32, 256
NEW_WEIGHT = 0.2  # of the newest measurement
PRIOR_TRIES, PRIOR_CHANCE = 8.0, 0.8
MEMORY = 0.95  # of tries, per pass: what counts are the last 20 passes


class DraftLength:
    """Chooses the number of guesses for each pass. Times are seconds."""

    def __init__(self) -> None:
        self._passes = 0
        self._pause = FIRST_PAUSE
        self._next_try = 0  # the pass before which guessing is tried, while it does not pay
        self._base = self._row = 0.0
        self._draft: float | None = None
        self._tries, self._hits = PRIOR_TRIES, PRIOR_TRIES * PRIOR_CHANCE

    def choose(self) -> int:
        """For the next pass."""
        if self._passes < FIRST_PASSES:
            return 0
        if self._draft is None:
            return 1  # what a guess takes is not known
        best = max(range(MOST + 1), key=self._rate)
        if self._rate(best) >= LEAST_GAIN * self._rate(0):
            self._pause = FIRST_PAUSE
            return best
        if self._passes < self._next_try:
            return 0
        self._next_try = self._passes + self._pause
        self._pause = min(2 * self._pause, LAST_PAUSE)
        return 1

    def note(self, guesses: int, accepted: int, draft_seconds: float, pass_seconds: float) -> None:
        """A pass checked so many guesses, of which the first `accepted` were right."""
        self._passes += 1
        if guesses == 0:
            is_first = self._passes <= FIRST_PASSES
            known = pass_seconds if not self._base else self._base
            self._base = min(known, pass_seconds) if is_first else _mean(known, pass_seconds)
            return
        if self._draft is None:
            self._draft = draft_seconds / guesses
            self._row = max(0.0, pass_seconds - self._base) / guesses
            self._next_try = self._passes + self._pause
        else:
            self._draft = _mean(self._draft, draft_seconds / guesses)
            expected = self._base + guesses * self._row
            scale = _mean(1.0, pass_seconds / expected) if expected else 1.0
            self._base *= scale
            self._row *= scale
        self._tries = MEMORY * self._tries + min(accepted + 1, guesses)
        self._hits = MEMORY * self._hits + accepted

    def _rate(self, guesses: int) -> float:
        """Tokens per second expected of a pass with so many guesses."""
        chance = min(self._hits / self._tries, 0.999)
        tokens = (1 - chance ** (guesses + 1)) / (1 - chance)
        seconds = self._base + guesses * (self._row + (self._draft or 0.0))
        return tokens / max(seconds, 1e-9)


def _mean(known: float, new: float) -> float:
    return (1 - NEW_WEIGHT) * known + NEW_WEIGHT * new
