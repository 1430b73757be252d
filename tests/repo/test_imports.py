"""Imports go down only, those inside functions included; the kernels and the model know nothing of the rest."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the top down. A module may import from its own part and from layers below; parts of one layer never meet.
LAYERS = (
    ("run",),
    ("iterate", "plan", "report", "export", "grid"),
    ("session", "recipes"),
    ("summary",),
    ("alarms",),
    ("stages",),
    ("sampler", "train", "filter", "eval", "score"),
    ("cli",),
    ("model", "text"),
    ("mesh",),
    ("ranks",),
    ("watch",),
    ("log",),
    ("config", "artifacts"),
    ("loading",),
    ("isheep_kernels",),
)
DEPTH = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}
KERNELS_MAY = {"torch", "triton", "isheep_kernels"} | sys.stdlib_module_names


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names of all that `source`, the text of `module`, imports anywhere."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(dotted: str) -> str | None:
    """'isheep.train.data' -> 'train'; 'isheep_kernels.rope' -> 'isheep_kernels'; None for what is not ours."""
    top, *rest = dotted.split(".")
    if top == "isheep":
        return rest[0] if rest else None
    return top if top == "isheep_kernels" else None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    own = part_of(module)
    found = []
    for name in imported(source, module, is_package):
        other = part_of(name)
        if own is None or other is None or own == other:
            continue
        if other not in DEPTH:  # a name that isheep/__init__.py itself offers, or a part the table does not know
            found.append(f"{module} imports {name}, which has no layer")
        elif DEPTH[other] <= DEPTH[own]:
            found.append(f"{module} imports {name}, which is not below it")
    return found


def modules(folder: str, package: str) -> Iterator[tuple[str, str, bool]]:
    """(source, dotted name, is a package) of each file."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
        is_package = names[-1] == "__init__"
        yield path.read_text(encoding="utf-8"), ".".join(names[:-1] if is_package else names), is_package


def test_every_part_has_a_layer() -> None:
    parts = {part_of(module) for _, module, _ in modules("isheep", "isheep")} - {None}
    assert parts <= DEPTH.keys()


def test_imports_go_down() -> None:
    assert [line for module in modules("isheep", "isheep") for line in violations(*module)] == []


def test_kernels_know_torch_and_triton_only() -> None:
    found = [
        f"{module} imports {name}"
        for source, module, is_package in modules("kernels", "isheep_kernels")
        for name in imported(source, module, is_package)
        if name.split(".")[0] not in KERNELS_MAY
    ]
    assert found == []


def test_the_model_does_not_know_how_it_is_deployed() -> None:
    source = (ROOT / "isheep/model/transformer.py").read_text(encoding="utf-8")
    names = list(imported(source, "isheep.model.transformer", False))
    assert [name for name in names if name.startswith(("torch.distributed", "isheep_kernels"))] == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import isheep.run", "isheep.iterate"),
        ("def f():\n    from isheep.train import data", "isheep.sampler.engine"),
        ("from isheep import stages", "isheep.cli"),
        ("from ..text import prompts", "isheep.model.ops"),
        ("from .. import text", "isheep.model.ops"),
        ("from isheep.model import ops", "isheep.artifacts"),
        ("from isheep.unheard import of", "isheep.run"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(source: str, module: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from isheep.train import data", "isheep.train.trainer"),
        ("from . import data", "isheep.train.trainer"),
        ("import isheep_kernels.rope, os, torch", "isheep.model.ops"),
        ("from isheep import log", "isheep.run"),
    ],
)
def test_an_import_downwards_is_fine(source: str, module: str) -> None:
    assert violations(source, module) == []
