"""GPUs by name, for predictions on machines that are not at hand: numbers that others published,
or that were measured once, each with its source. What follows from them is never a result.
"""

from dataclasses import dataclass

from hf_tiered_cache.planner.prediction import Figure, ModelPace, Rates

GIB = 1 << 30
PREFILL_SHARE = 0.5  # of the multiplications that a data sheet promises
EAGER_LAYERS = 32  # of the model whose time on the host was measured


@dataclass(frozen=True)
class DeviceProfile:
    """A GPU and the machine around it; bytes, bytes per second, multiplications, seconds."""

    name: str
    memory_bytes: int
    memory_rate: Figure  # at which weights and blocks are read
    link: Figure  # pinned host memory to the device
    multiplications: Figure  # per second, dense, 16 bits
    host_layer: Figure  # the host's time of a layer and token, all resident
    disk: Figure

    def rates(self) -> Rates:
        """As the planner takes them."""
        return Rates(
            attend=self.memory_rate,
            prefill_attend=self.multiplications,
            disk_read=self.disk,
            disk_write=self.disk,
            link=self.link,
        )

    def pace(
        self, num_layers: int, layer_bytes: float, rest_bytes: float, itemsize: int
    ) -> ModelPace:
        """Of a model by the bytes of its weights: read once for each token, multiplied once for
        each token of a prefill."""

        def figure(value: float, what: str) -> Figure:
            return Figure(value, f"the weights' bytes by {what}")

        rate, work = self.memory_rate.value, self.multiplications.value * itemsize
        return ModelPace(
            decode_layer=figure(layer_bytes / rate, "the memory's rate"),
            decode_rest=figure(rest_bytes / rate, "the memory's rate"),
            prefill_layer=figure(layer_bytes / work, "half the promised multiplications"),
            prefill_rest=figure(0.0, "only the last token's logits"),
            host=Figure(num_layers * self.host_layer.value, self.host_layer.source),
        )


_DISK = Figure(6.5e9, "assumed: one NVMe drive on PCIe 4 at its rate (FlexKV's measurement)")


def _sheet(teraflops: float, sheet: str) -> Figure:
    return Figure(
        PREFILL_SHARE * teraflops * 1e12 / 2,
        f"{PREFILL_SHARE:.0%} of {teraflops:g} TFLOP/s, dense, 16 bits ({sheet})",
    )


# Python's time was measured on one machine (docs/gpu.md): 31.7 ms a token, 32 layers, all resident.
_HOST = Figure(31.7e-3 / EAGER_LAYERS, "measured on the H200's machine (docs/gpu.md, 31.7 ms)")
_HOST_ELSEWHERE = Figure(_HOST.value, "assumed: as measured on the H200's machine (docs/gpu.md)")

PROFILES = {
    profile.name: profile
    for profile in (
        DeviceProfile(
            "h200",
            141 * 10**9,
            Figure(3.7e12, "measured: the decode kernel at 131,072 tokens (docs/gpu.md)"),
            Figure(52e9, "measured: copies of 1 to 16 MiB reach 48 to 55 GB/s (docs/gpu.md)"),
            _sheet(989, "NVIDIA's H200 data sheet"),
            _HOST,
            _DISK,
        ),
        DeviceProfile(
            "h100",
            80 * 10**9,
            Figure(
                2.4e12, "assumed: 72 % of 3.35 TB/s (SXM data sheet), what this kernel may reach"
            ),
            Figure(50e9, "vLLM's measurement of cuMemcpyBatchAsync: 50 to 52 GB/s on PCIe 5"),
            _sheet(989, "NVIDIA's H100 SXM data sheet"),
            _HOST_ELSEWHERE,
            _DISK,
        ),
        DeviceProfile(
            "4090",
            24 * 10**9,
            Figure(0.93e12, "assumed: 92 % of 1.008 TB/s (data sheet)"),
            Figure(25e9, "assumed: what PCIe 4 x16 carries in copies of 1 MiB"),
            _sheet(165, "NVIDIA's Ada data sheet, float32 accumulation"),
            _HOST_ELSEWHERE,
            _DISK,
        ),
        DeviceProfile(
            "3060",
            12 * 10**9,
            Figure(0.31e12, "assumed: 86 % of 360 GB/s (data sheet)"),
            Figure(24e9, "assumed: what PCIe 4 x16 carries in copies of 1 MiB"),
            _sheet(51, "NVIDIA's Ampere data sheet, float32 accumulation halves it"),
            _HOST_ELSEWHERE,
            _DISK,
        ),
    )
}
