"""How host blocks are shared between the two lanes that bring them to attention.

The copy lane carries blocks to the device, all the time; the CPU lane attends them where they lie,
while the device attends the same layer. Both end together when each has blocks in the ratio of its
rate; what the rates do not say (a layer's other work, a busy host) is learnt from the waits.
"""

from time import perf_counter

# Waits below this part of the elapsed time decide nothing: where the host is what everything waits
# for, the copy lane shows none at all and the CPU lane a little, whatever their shares are.
NOISE = 0.02
# The most that one correction moves. A lane that was waited for during a smaller part of the time
# gives up that part only, so that a balance that is nearly found is not overshot.
STEP = 0.1
# Of what its rate says a lane keeps so much: no wait may mean a slow host, and not a fast lane.
KEPT = 0.5


class LaneSplit:
    """`cpu_share`: the part of a layer's host blocks that the CPU attends, 0 to 1."""

    def __init__(self, cpu_share: float, is_fixed: bool = True) -> None:
        self.cpu_share = cpu_share
        self.is_fixed = is_fixed
        self.least, self.most = KEPT * cpu_share, 1 - KEPT * (1 - cpu_share)
        self._corrected_at = perf_counter()

    @classmethod
    def measured(cls, copy_rate: float, cpu_rate: float) -> "LaneSplit":
        """The share that follows from the rates (bytes per second), to be corrected while running;
        fixed at 0 or 1 where one lane does not work at all."""
        if copy_rate <= 0 or cpu_rate <= 0:
            return cls(float(cpu_rate > 0))
        return cls(cpu_rate / (copy_rate + cpu_rate), is_fixed=False)

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
        step = min(STEP, max(-STEP, copy_wait - cpu_wait))
        self.cpu_share = min(self.most, max(self.least, self.cpu_share + step))


STAGE_ALL = LaneSplit(0.0)
"""Every host block is carried to the device."""
