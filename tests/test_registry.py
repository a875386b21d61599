"""Classes that are chosen by name."""

import sys
from abc import ABC, abstractmethod
from types import ModuleType

import pytest

from hf_tiered_cache.blocks.demotion import DemotionPolicy
from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.registry import Registered
from hf_tiered_cache.tiers import DiskTier, Tier


class Fruit(Registered, ABC, kind="fruit"):
    @abstractmethod
    def taste(self) -> str: ...


class Apple(Fruit, name="apple"):
    def taste(self) -> str:
        return "sour"


class Stone(Fruit, name="stone"):
    """Cannot be tasted."""


def test_a_subclass_with_a_name_is_found():
    assert Fruit.by_name("apple") is Apple
    assert Apple.name == "apple"
    assert Tier.by_name("disk") is DiskTier


def test_kinds_know_nothing_of_each_other():
    assert not set(Tier.registry) & set(DemotionPolicy.registry)
    with pytest.raises(ConfigError, match="unknown demotion policy 'disk'; known: by_age"):
        DemotionPolicy.by_name("disk")


def test_a_subclass_without_a_name_is_not_registered():
    before = dict(Fruit.registry)

    class Nameless(Apple):
        pass

    assert Fruit.registry == before
    assert Nameless.name == "apple"


def test_an_unknown_name_lists_the_known_ones_and_says_how_to_give_a_class():
    with pytest.raises(
        ConfigError, match=r'unknown fruit \'plum\'; known: apple, .*"module:Class"'
    ):
        Fruit.by_name("plum")


def test_a_class_is_found_by_its_module(monkeypatch):
    module = ModuleType("orchard")
    module.Nameless = type("Nameless", (Apple,), {})
    monkeypatch.setitem(sys.modules, "orchard", module)
    assert Fruit.by_name("orchard:Nameless") is module.Nameless


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no_such_module:Apple", "No module named 'no_such_module'"),
        ("json:Apple", "module 'json' has no attribute 'Apple'"),
        (":Apple", "Empty module name"),
        ("json:dumps", "expected a subclass of .*Fruit"),
        ("json:JSONEncoder", "expected a subclass of .*Fruit"),
        (f"{__name__}:Fruit", r"has no name: class Fruit\(..., name="),
        ("stone", "fruit 'stone' lacks taste"),
    ],
)
def test_what_is_no_such_class_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Fruit.by_name(given)


def test_a_name_is_taken_once_but_the_same_class_may_be_made_again():
    with pytest.raises(ConfigError, match=r"the fruit 'apple' is .*Apple already"):

        class Pear(Fruit, name="apple"):
            pass

    assert Fruit.by_name("apple") is Apple

    def cell() -> type[Fruit]:
        class Cherry(Fruit, name="cherry"):
            def taste(self) -> str:
                return "sweet"

        return Cherry

    cell()
    again = cell()
    assert Fruit.by_name("cherry") is again
