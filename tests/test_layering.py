"""Which part of the package may import which: the table below, from the bottom up.

A part may import only parts above it in the table, and only those listed. Imports inside functions and those for type
checking count too, so no circle can hide.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vce_ray"

LAYERS: dict[str, str] = {
    # vocabulary: no files, no network, no models
    "errors": "",
    "net": "",
    "worker_warnings": "",
    "env": "errors",
    "devices": "errors",
    "config": "errors",
    "yaml_file": "errors",
    "dataflow/ids": "",
    "dataflow/rows": "",
    "dataflow/schemas": "",
    # files and object stores
    "storage": "errors env",
    "trackers": "errors env",
    # plain torch: no Ray
    "models": "errors env config storage",
    "sampling": "errors env devices config models",
    "training/terms": "models sampling",
    "training/data": "errors training/terms",
    "training/objectives": "errors config models training/terms training/data",
    # what a run is
    "run_config": "errors config training/objectives",
    "concepts": "errors config yaml_file models training/objectives",
    "defaults": "config training/objectives concepts",
    "dataflow/task": "config storage models run_config concepts",
    # what its steps do: no Ray either
    "evaluation/prompt_sets": "errors",
    "pairs": "errors net env config dataflow/ids dataflow/rows models sampling run_config concepts "
    "evaluation/prompt_sets",
    "evaluation": "errors env config dataflow/ids dataflow/rows dataflow/schemas models training/objectives run_config "
    "concepts dataflow/task pairs",
    # Ray
    "dataflow/fanout": "errors worker_warnings config dataflow/rows dataflow/schemas storage dataflow/task",
    "training": "errors worker_warnings devices config dataflow/rows storage models sampling training/terms "
    "training/data training/objectives run_config",
    "pipeline": "errors env devices config yaml_file dataflow/ids dataflow/rows dataflow/schemas storage trackers "
    "models sampling training/objectives run_config concepts defaults dataflow/task pairs evaluation dataflow/fanout "
    "training",
    "serving": "errors net env config models sampling",
    # what people call
    "api": "errors config storage models sampling evaluation pipeline",
    "cli": "errors worker_warnings env devices config storage models sampling training/objectives run_config concepts "
    "defaults pairs evaluation training pipeline serving api",
    "__main__": "cli",
    "__init__": "errors storage concepts api",
}
USES_RAY = {"dataflow/fanout", "training", "pipeline", "serving"}
"""Parts that may import Ray."""


def layer_of(module: str) -> str:
    """The row of a module, such as 'training/objectives' of 'vce_ray.training.objectives.dpo'."""
    path = module.removeprefix("vce_ray").strip(".").replace(".", "/") or "__init__"
    while path not in LAYERS:
        assert "/" in path, f"{module} is in no row of the table"
        path = path.rpartition("/")[0]
    return path


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top, inside functions or for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else node.module


@cache
def modules() -> dict[str, list[str]]:
    """Each module of the package, with the modules that it imports."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = sorted(set(imports(path)))
    return found


def edges() -> Iterator[tuple[str, str, str, str]]:
    for module, imported in modules().items():
        for other in imported:
            if other.split(".")[0] == "vce_ray":
                yield module, other, layer_of(module), layer_of(other)


def test_the_table_is_ordered_from_the_bottom_up() -> None:
    above: set[str] = set()
    for layer, allowed in LAYERS.items():
        assert set(allowed.split()) <= above, f"{layer} may import a part that comes after it"
        above.add(layer)


def test_modules_import_only_what_the_table_allows() -> None:
    wrong = [
        f"{module} imports {other}: {layer} may not import {target}"
        for module, other, layer, target in edges()
        if target != layer and target not in LAYERS[layer].split()
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_allows_nothing_that_is_not_used() -> None:
    used = {(layer, target) for _, _, layer, target in edges()}
    unused = [
        f"{layer} {target}" for layer, row in LAYERS.items() for target in row.split() if (layer, target) not in used
    ]
    assert not unused, unused


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: [other for other in imported if other in modules()] for module, imported in modules().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph[module]:
                if other != module:
                    visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_ray_is_imported_where_the_table_says() -> None:
    users = {
        layer_of(module) for module, imported in modules().items() if any(i.split(".")[0] == "ray" for i in imported)
    }
    assert users == USES_RAY


def test_ray_is_started_in_one_place() -> None:
    callers = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"
    ]
    assert callers == ["pipeline/session.py"]
