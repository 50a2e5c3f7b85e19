"""Who imports whom, by the sources: no circle, no arrow up. `TYPE_CHECKING` and imports in functions count."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    ("edgeprompt.cli", "edgeprompt.__main__"),
    ("exporters",),
    ("edgeprompt.bench", "edgeprompt.tuning", "edgeprompt.server", "edgeprompt.ray"),
    ("edgeprompt.base",),
    ("edgeprompt.evaluation",),
    ("edgeprompt.runtime", "edgeprompt.loading", "edgeprompt.asynchronous", "edgeprompt"),
    ("edgeprompt.engines",),
    ("edgeprompt.decoding", "edgeprompt.heads"),
    ("edgeprompt.prompts", "edgeprompt.ort"),
    ("edgeprompt.package",),
    ("edgeprompt.options", "edgeprompt.request", "edgeprompt.arrays", "edgeprompt.errors", "edgeprompt.names"),
    ("edgeprompt.progress",),
)
"""Upper first; a module imports from its own layer and from those below."""


def read_graph() -> dict[str, set[str]]:
    """Module -> first-party modules that it imports."""
    files = {}
    for folder in ("edgeprompt", "exporters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found = [f"{node.module}.{alias.name}" for alias in node.names]
            for target in found:
                while target and target not in files:
                    target = target.rpartition(".")[0]
                if target and target != name:
                    graph[name].add(target)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def layer_of(module: str) -> int:
    """Where a module stands, by its longest known prefix."""
    places = {prefix: place for place, layer in enumerate(LAYERS) for prefix in layer}
    while module not in places:
        module = module.rpartition(".")[0]
    return places[module]


def test_there_is_no_circle() -> None:
    assert circles(read_graph()) == []


def test_no_arrow_goes_up() -> None:
    graph = read_graph()
    up = [
        (name, target) for name in sorted(graph) for target in sorted(graph[name]) if layer_of(target) < layer_of(name)
    ]
    assert up == []


def test_the_checks_see_what_they_look_for() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert "edgeprompt.names" in read_graph()["edgeprompt.runtime"] | read_graph()["edgeprompt.engines.base"]
    assert layer_of("exporters.export") < layer_of("edgeprompt.engines.base") < layer_of("edgeprompt.names")
