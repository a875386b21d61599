"""Tokens per second before a run: what lies where, what each part of a token takes, what binds.

`placement` counts blocks, `prediction` adds up seconds; both are pure arithmetic over `rates` that
were measured here, or over a device's `profiles`. Nothing here knows a model but by its numbers.
"""
