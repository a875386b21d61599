"""The name "tiered" is known to transformers as soon as transformers has models.

transformers keeps the names of attention in the module of its models, which costs seconds to
import. Whoever imports this package must not pay for that before they need it, and must not miss
the name when a model is made; so `attention`, whose import adds the name, follows that module.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELS = "transformers.modeling_utils"


def follow_models() -> None:
    """Import `hf_tiered_cache.integration.attention` now if transformers' models are there, else
    right behind them. What it raises then comes out of the import of the models."""
    if MODELS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Follower())


class _Follower(MetaPathFinder):
    """Finds the module of the models where the other finders do, and goes when it was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the models, with `_register` behind their execution; None for any other."""
        if fullname != MODELS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


class _ThenRegister(Loader):
    """Executes a module with its own loader, which it leaves with the module, then registers."""

    def __init__(self, loader: Loader, follower: _Follower) -> None:
        self._loader = loader
        self._follower = follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute it; raises what that raises, and the follower stays for the next try."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self._follower]
        _register()


def _register() -> None:
    importlib.import_module("hf_tiered_cache.integration.attention")
