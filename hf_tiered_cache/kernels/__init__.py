"""Attention over blocks: `ops` is the door, `reference` the meaning, `csrc` the speed."""
