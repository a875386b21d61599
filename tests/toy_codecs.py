"""Codecs as somebody else might write them."""

import torch

from hf_tiered_cache.tiers.codecs import Codec


class Mirror(Codec, name="mirror"):
    """Bytes back to front: every block goes in, and none is what it was."""

    exact = True

    @property
    def encoded_bytes(self):
        return self.layout.num_bytes

    def encode(self, block, out):
        out.copy_(block.flip(0))
        return True

    def decode(self, encoded, out):
        out.copy_(encoded.flip(0))


class Halves(Codec, name="halves"):
    """Approximate: the first half of a block, twice."""

    exact = False

    @property
    def encoded_bytes(self):
        return max(4096, self.layout.num_bytes // 2)

    def encode(self, block, out):
        out.zero_()
        half = self.layout.num_bytes // 2
        out[:half] = block[:half]
        return True

    def decode(self, encoded, out):
        half = self.layout.num_bytes // 2
        out.copy_(torch.cat((encoded[:half], encoded[:half])))
