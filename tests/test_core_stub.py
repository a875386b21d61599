"""`_C.pyi` says what the compiled core has: every name, and every parameter in its place."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import hf_tiered_cache

core = pytest.importorskip("hf_tiered_cache._C", reason="the compiled core was not built")
STUB = Path(hf_tiered_cache.__file__).parent / "_C.pyi"


def stubbed(body: list[ast.stmt], within: str = "") -> dict[str, list[str]]:
    """Every name that the stub defines, with its parameters; those of what takes none are []."""
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            found[within + node.target.id] = []
        elif isinstance(node, ast.ClassDef):
            found[node.name] = []
            found |= stubbed(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            taken = node.args
            in_order = [it for it in (*taken.posonlyargs, *taken.args) if it.arg != "self"]
            # As pybind11 names what is told by its place.
            places = [f"arg{place}" for place in range(len(in_order))]
            found[within + node.name] = [*places, *(it.arg for it in taken.kwonlyargs)]
    return found


def built(scope: object, within: str = "") -> dict[str, list[str]]:
    """The same of the built core, of whose functions the docstring's first line tells."""
    found = {}
    for name, it in vars(scope).items():
        if name.startswith("_") and name != "__init__":
            continue
        signature = it.__doc__.partition("\n")[0] if callable(it) and it.__doc__ else ""
        names = re.findall(r"(\w+): ", signature)
        found[within + name] = [one for one in names if one != "self"]
        if inspect.isclass(it):
            found |= built(it, f"{name}.")
    return found


def test_the_stub_says_what_the_core_has():
    expected = built(core)
    assert stubbed(ast.parse(STUB.read_text()).body) == expected
    assert expected["append"] == [f"arg{place}" for place in range(8)]
    assert "timeout_seconds" not in expected["BlockIO.wait"] and "fd" in expected["Move.__init__"]


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("    record_bytes: int,\n", ""),
        ("    def leave(", "    def left("),
        ("END_OF_FILE: Final[int]\n", ""),
        ("    start_token: int,\n", "    start_token: int,\n    count: int,\n"),
    ],
)
def test_a_stub_that_says_something_else_is_noticed(line, instead):
    text = STUB.read_text()
    assert line in text
    wrong = stubbed(ast.parse(text.replace(line, instead)).body)
    assert wrong != built(core)
