"""How host blocks are shared between the two lanes that bring them to attention.

The copy lane carries blocks to the device, all the time; the CPU lane attends them where they lie,
while the device attends the same layer. Both end together when each has blocks in the ratio of its
rate; what the rates do not say (a layer's other work, a busy host) is learnt from the waits.
"""

# A step of the correction at the largest difference of waits: a tenth of the share is moved. Small
# against the noise of a token, large enough that a hundred tokens find the balance.
STEP = 0.1
SMALLEST_STEP = 0.01  # what is staged is given up at every step


class LaneSplit:
    """`cpu_share`: the part of a layer's host blocks that the CPU attends, 0 to 1."""

    def __init__(self, cpu_share: float, is_fixed: bool = True) -> None:
        self.cpu_share = cpu_share
        self.is_fixed = is_fixed

    @classmethod
    def measured(cls, copy_rate: float, cpu_rate: float) -> "LaneSplit":
        """The share that follows from the rates (bytes per second), to be corrected while running;
        fixed at 0 or 1 where one lane does not work at all."""
        if copy_rate <= 0 or cpu_rate <= 0:
            return cls(float(cpu_rate > 0))
        return cls(cpu_rate / (copy_rate + cpu_rate), is_fixed=False)

    def correct(self, copy_wait_seconds: float, cpu_wait_seconds: float) -> bool:
        """Take blocks from the lane that the device waited for longer since the last correction;
        whether the share changed by as much as matters."""
        total = copy_wait_seconds + cpu_wait_seconds
        if self.is_fixed or total <= 0:
            return False
        step = STEP * (copy_wait_seconds - cpu_wait_seconds) / total
        share = min(1.0, max(0.0, self.cpu_share + step))
        if abs(share - self.cpu_share) < SMALLEST_STEP:
            return False
        self.cpu_share = share
        return True


STAGE_ALL = LaneSplit(0.0)
"""Every host block is carried to the device."""
