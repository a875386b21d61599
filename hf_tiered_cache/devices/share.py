"""How host blocks are shared between the two lanes that bring them to attention.

The copy lane carries blocks to the device, all the time; the CPU attends them where they lie,
while the device attends the same layer. The CPU's part begins at nothing and grows while the device
stands still for copies: where the host is what everything waits for, the lane that costs it more is
of no use (H200, 16 processors, 32K tokens, 90 % off: copies alone 74 ms a token, half of them
attended by the CPU 79 ms, though the device waited for neither lane).
"""

from time import perf_counter

# Waits below this part of the elapsed time decide nothing.
NOISE = 0.02
# The most that one correction moves. A lane that was waited for during a smaller part of the time
# gives up that part only, so that a balance that is nearly found is not overshot.
STEP = 0.1
# A smaller part is not worth a hand-over in every layer.
SMALLEST = 0.1
# Of what its rate says the copy lane keeps so much: no wait may mean a slow host, and no fast lane.
KEPT = 0.5


class InPlaceShare:
    """`cpu_share`: the part of a layer's host blocks that the CPU attends, 0 to 1; at most `most`
    where it `is_fixed` not."""

    def __init__(self, cpu_share: float, is_fixed: bool = True, most: float = 1.0) -> None:
        self.cpu_share = cpu_share
        self.is_fixed = is_fixed
        self.most = most
        self._corrected_at = perf_counter()

    @classmethod
    def measured(cls, copy_rate: float, cpu_rate: float) -> "InPlaceShare":
        """One that is corrected while running, up to a share that follows from the rates (bytes per
        second); fixed at 0 or 1 where one lane does not work at all."""
        if copy_rate <= 0 or cpu_rate <= 0:
            return cls(float(cpu_rate > 0))
        return cls(0.0, is_fixed=False, most=1 - KEPT * copy_rate / (copy_rate + cpu_rate))

    def correct(self, copy_wait_seconds: float, cpu_wait_seconds: float, now: float) -> None:
        """Take blocks from the lane that the device waited for longer since the last correction.

        now: in seconds of `perf_counter`.
        """
        elapsed, self._corrected_at = now - self._corrected_at, now
        if self.is_fixed or elapsed <= 0:
            return
        copy_wait, cpu_wait = (
            part if (part := seconds / elapsed) >= NOISE else 0.0
            for seconds in (copy_wait_seconds, cpu_wait_seconds)
        )
        share = self.cpu_share + min(STEP, max(-STEP, copy_wait - cpu_wait))
        self.cpu_share = min(self.most, share) if share >= SMALLEST else 0.0


STAGE_ALL = InPlaceShare(0.0)
"""Every host block is carried to the device."""
