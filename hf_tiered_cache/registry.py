"""Classes that are chosen by name: `Registered`, the base of each kind of them.

class Tier(Registered, kind="tier"): ...      opens a registry
class DiskTier(Tier, name="disk"): ...        is found there
Tier.by_name("disk")                          so is Tier.by_name("their_module:TheirTier")
"""

from importlib import import_module
from typing import Any, ClassVar, Self

from hf_tiered_cache.errors import ConfigError


class Registered:
    """Subclassing with `kind` opens a registry of that kind of class, subclassing with `name` adds
    to it. Raises ConfigError for a name that another class has."""

    name: str
    kind: ClassVar[str]
    registry: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, *, name: str | None = None, kind: str | None = None) -> None:
        super().__init_subclass__()
        if kind is not None:
            cls.kind, cls.registry = kind, {}
        if name is not None:
            other = cls.registry.get(name)
            if other is not None and _address(other) != _address(cls):  # a cell may be run again
                raise ConfigError(
                    f"{_address(cls)}: the {cls.kind} {name!r} is {_address(other)} already; choose"
                    " another name="
                )
            cls.name = name
            cls.registry[name] = cls

    @classmethod
    def by_name(cls, given: str) -> type[Self]:
        """The class registered as `given`, or that a "module:Class" refers to; the module is
        imported. Raises ConfigError where there is none, it is of another kind, has no name, or
        lacks methods."""
        found = cls.registry.get(given) or cls._imported(given)
        if not hasattr(found, "name"):
            raise ConfigError(
                f'{cls.kind} {given!r} has no name: class {found.__name__}(..., name="...")'
            )
        missing = sorted(getattr(found, "__abstractmethods__", ()))
        if missing:
            raise ConfigError(f"{cls.kind} {given!r} lacks {', '.join(missing)}")
        return found

    @classmethod
    def _imported(cls, given: str) -> type[Self]:
        module, colon, name = given.partition(":")
        if not colon:
            known = ", ".join(sorted(cls.registry))
            raise ConfigError(
                f"unknown {cls.kind} {given!r}; known: {known}; or give a class of your own as"
                ' "module:Class"'
            )
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f'{cls.kind} {given!r}, read as "module:Class": {error}') from error
        if not (isinstance(found, type) and issubclass(found, cls)):
            raise ConfigError(
                f"{cls.kind} {given!r} is {found!r}; expected a subclass of {_address(cls)}"
            )
        return found


def _address(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
