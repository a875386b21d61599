"""The floors of the house: who may import whom, and what the public rooms owe their readers."""

import ast
import importlib
import inspect
import pkgutil
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_tiered_cache

PACKAGE = "hf_tiered_cache"
ROOT = Path(hf_tiered_cache.__file__).parent
FLOORS = {
    "errors": 0,
    "compiled": 1,
    "finalizers": 1,
    "layout": 1,
    "registry": 1,
    "sizes": 1,
    "transfers": 1,
    "config": 2,
    "observe": 2,
    "store": 2,
    "kernels": 3,
    "devices": 4,
    "tiers": 5,
    "blocks": 6,
    "planner": 7,
    "integration": 8,
    "evaluation": 9,
    "serving": 9,
    "commands": 10,
    "__main__": 11,
    "__init__": 99,
}
ROOF = FLOORS["__init__"]
HUGGING_FACE_ROOMS = {"integration", "evaluation", "serving"}
OPTIONAL = {"lm_eval"}  # an extra, which a room may be for
BUILT = {"_C", "_cuda"}  # compiled, not a room


def room_of(module: str) -> str:
    """The room of a module's dotted name: hf_tiered_cache.tiers.disk.tier -> tiers."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_modules(node: ast.AST) -> list[str]:
    """Dotted names that an import statement reaches (names of a package count as its modules)."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
        return [f"{PACKAGE}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def breaches(root: Path) -> list[str]:
    """Everything in the tree under `root` that breaks a law of the house."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        room = relative.parts[0].removesuffix(".py")
        where = str(relative)
        if room not in FLOORS:
            found.append(f"{where}: a room without a floor; give it one in this test")
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                found.append(f"{where}:{node.lineno}: a relative import")
                continue
            # The roof alone may: its names are loaded late, and a test compares them.
            is_roof = room == "__init__"
            if (
                not is_roof
                and isinstance(node, ast.Name | ast.Attribute)
                and "TYPE_CHECKING"
                in (
                    getattr(node, "id", ""),
                    getattr(node, "attr", ""),
                )
            ):
                found.append(f"{where}:{node.lineno}: an import hidden behind TYPE_CHECKING")
            for module in imported_modules(node):
                found += [f"{where}:{node.lineno}: {why}" for why in wrong_import(room, module)]
    return found


def wrong_import(room: str, module: str) -> list[str]:
    """Why `room` may not import `module`; empty if it may."""
    top = module.split(".")[0]
    if top == "transformers":
        if room in HUGGING_FACE_ROOMS or module == "transformers.utils":
            return []
        return [f"{module} outside {', '.join(sorted(HUGGING_FACE_ROOMS))}"]
    if top == "pybind11":
        return ["pybind11 belongs to csrc/bindings.cpp"]
    other = room_of(module)
    if top != PACKAGE or other in BUILT or other == room:
        return []
    if other not in FLOORS:
        return [f"{module} is no room"]
    if FLOORS[other] >= FLOORS[room]:
        return [f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"]
    return []


def test_imports_go_down_only():
    assert breaches(ROOT) == []


def test_every_room_has_a_floor_and_every_floor_a_room():
    rooms = {path.stem for path in ROOT.glob("*.py")}
    rooms |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms == set(FLOORS)


def circles(root: Path) -> list[str]:
    """Modules of the tree under `root` that import one another, in a ring."""
    names = {
        ".".join((PACKAGE, *path.relative_to(root).with_suffix("").parts)): path
        for path in root.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {
        name: {module for module in reached_by(path) if module in names and module != name}
        for name, path in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def reached_by(path: Path) -> set[str]:
    """What a file imports, and what it imports from there, which may be a module as well."""
    reached = set()
    for node in ast.walk(ast.parse(path.read_text())):
        reached.update(imported_modules(node))
        if isinstance(node, ast.ImportFrom):
            reached.update(f"{node.module}.{alias.name}" for alias in node.names)
    return reached


def test_no_modules_import_one_another_in_a_ring():
    assert circles(ROOT) == []


def test_a_ring_is_found(tmp_path):
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "pins.py").write_text("from hf_tiered_cache.blocks import stores\n")
    (tmp_path / "blocks" / "stores.py").write_text("import hf_tiered_cache.blocks.capacity\n")
    (tmp_path / "blocks" / "capacity.py").write_text("from hf_tiered_cache.layout import x\n")
    assert circles(tmp_path) == []
    line = "from hf_tiered_cache.blocks.pins import Pins\n"
    (tmp_path / "blocks" / "capacity.py").write_text(line)
    assert len(circles(tmp_path)) == 4


@pytest.mark.parametrize(
    ("room", "line", "breach"),
    [
        ("layout", "from hf_tiered_cache.blocks import pins", "layout .* imports blocks"),
        ("devices/cuda", "import hf_tiered_cache.tiers.host", "devices .* imports tiers"),
        ("tiers/disk/tier", "from hf_tiered_cache.blocks import pins", "tiers .* imports blocks"),
        ("errors", "from hf_tiered_cache import TieredCache", "TieredCache is no room"),
        ("blocks/pins", "from hf_tiered_cache import __init__", "blocks .* imports __init__"),
        ("blocks/pins", "from . import stores", "a relative import"),
        ("tiers/disk", "from ..errors import TierIOError", "a relative import"),
        ("blocks/pins", "import transformers", "transformers outside"),
        ("tiers/host", "from transformers.cache_utils import Cache", "cache_utils outside"),
        ("kernels/ops", "import pybind11", "bindings.cpp"),
        ("layout", "if typing.TYPE_CHECKING: from x import y", "TYPE_CHECKING"),
        ("attic", "import os", "a room without a floor"),
    ],
)
def test_a_planted_breach_is_found(tmp_path, room, line, breach):
    path = tmp_path / f"{room}.py"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f'"""A room."""\n{line}\n')
    (found,) = breaches(tmp_path)
    assert re.search(breach, found), found
    assert found.startswith(f"{room}.py")


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("blocks/pins", "from hf_tiered_cache import config, errors"),
        ("integration/cache", "from transformers import DynamicCache"),
        ("kernels/loader", "from transformers.utils import logging"),
        ("kernels/loader", "from hf_tiered_cache import _C"),
        ("tiers/disk", "from hf_tiered_cache.tiers.base import Tier"),
        ("__init__", "from hf_tiered_cache.integration.cache import TieredCache"),
        (
            "__init__",
            "if typing.TYPE_CHECKING: from hf_tiered_cache.observe.tracing import Trace",
        ),
    ],
)
def test_a_lawful_import_is_no_breach(tmp_path, room, line):
    path = tmp_path / f"{room}.py"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"{line}\n")
    assert breaches(tmp_path) == []


def test_pybind11_is_in_the_bindings_alone():
    csrc = ROOT.parent / "csrc"
    sources = [path for path in csrc.rglob("*") if path.is_file()]
    users = {str(path.relative_to(csrc)) for path in sources if "pybind11" in path.read_text()}
    assert users == {"bindings.cpp", "cuda/bindings.cpp", "python_arguments.h"}


def test_the_public_names_are_complete_sorted_and_documented():
    public = hf_tiered_cache.__all__
    assert list(public) == sorted(public, key=str.lower) or list(public) == sorted(public)
    tree = ast.parse((ROOT / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported - {"follow_models"} == set(public)
    for name in public:
        assert own_docstring(getattr(hf_tiered_cache, name)), name


def own_docstring(thing: object) -> str:
    """Its own, not one inherited or written by `dataclass`."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    name = getattr(thing, "__name__", "")
    return "" if not text or text.startswith(f"{name}(") else text


def public_members(thing: type) -> list[tuple[str, object]]:
    return [
        (name, member)
        for name, member in vars(thing).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property | classmethod))
    ]


def test_every_room_says_why_it_exists():
    for path in sorted(ROOT.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, path


def test_every_public_class_function_and_method_has_a_docstring():
    missing = []
    for info in pkgutil.walk_packages([str(ROOT)], f"{PACKAGE}."):
        if info.name.rpartition(".")[2] in BUILT:
            continue
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            continue
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", "") != info.name:
                continue
            if inspect.isfunction(thing) and not thing.__doc__:
                missing.append(f"{info.name}.{name}")
            if inspect.isclass(thing):
                if not own_docstring(thing):
                    missing.append(f"{info.name}.{name}")
                missing += [
                    f"{info.name}.{name}.{member}"
                    for member, value in public_members(thing)
                    if not value.__doc__ and len(inspect.getsource(unwrap(value)).splitlines()) > 3
                ]
    assert missing == []


def unwrap(member: object) -> object:
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)


def test_torch_is_no_build_requirement():
    text = (ROOT.parent / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert requires is not None
    assert "setuptools" in requires[1]
    assert "torch" not in requires[1]
