"""Blocks that outlive their cache: named by what they hold, verified when they are read.

`keys` names token blocks, `files` is one of them on disk, `index` and `policies` decide which stay,
`block_store` puts these together for many processes on one folder. Nothing here knows models, and
nothing knows tiers; blocks are bytes under a key.
"""
