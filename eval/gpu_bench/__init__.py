"""The sections of `bench_gpu.py`, by what they are about, and what they share."""
