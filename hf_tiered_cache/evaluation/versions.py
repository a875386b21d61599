"""Which version of the package this is. Loads nothing else."""

from importlib import import_module


def package_version() -> str:
    """Of this package, installed or run from its sources."""
    return import_module("hf_tiered_cache").__version__
