"""How blocks are written in fewer bytes: codecs, a file each. What is imported here can be asked
for by name."""

from hf_tiered_cache.tiers.codecs.base import Codec
from hf_tiered_cache.tiers.codecs.bf16_12bit import Bf16TwelveBit

__all__ = ["Bf16TwelveBit", "Codec"]
