"""The books of blocks and all that moves them: which block is where, how blocks come to attention,
how they go down, what fits."""
