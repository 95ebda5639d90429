"""The import rules of the house, held over the syntax tree: imports point up, one foreign library a room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("extract", "aggregate", "ensemble", "pipelines")  # data flows down: a room imports itself and those before it
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))

# Where a foreign library may be imported; every library that is not named here may be imported anywhere.
HOMES = {
    "zarr": {"extract/store.py"},
    "av": {"extract/decode.py"},
    "decord": {"extract/decode.py"},
    "ray": {"extract/crew.py", "aggregate/finetune.py", "aggregate/ablate.py"},
}
# Decode children, score files and the ensemble must start without torch's five seconds.
TORCH_FREE = {
    *(f"extract/{name}.py" for name in ("cli", "videos", "folders", "tables", "labels", "sampling")),
    *("extract/decode.py", "extract/transform.py", "extract/children.py", "extract/shards.py", "extract/store.py"),
    "aggregate/metrics.py",
    "aggregate/scores.py",
}


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; name the room"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_up_and_stay_in_their_room(path: Path):
    here = f"{path.parent.name}/{path.name}"
    allowed = ROOMS[: ROOMS.index(path.parent.name) + 1]
    for name in imported(path):
        top = name.split(".")[0]
        assert top not in ROOMS or top in allowed, f"{here} imports {name}, which lies below it"
        assert top not in HOMES or here in HOMES[top], f"{here} imports {top}, whose home is {HOMES[top]}"
        if here in TORCH_FREE or path.parent.name == "ensemble":
            assert top not in ("torch", "torchvision", "timm"), f"{here} imports {name} and must start without torch"


def test_the_rules_can_fail(tmp_path):
    """A rule over nothing holds always: the walker sees imports inside functions and the modules are there."""
    (tmp_path / "m.py").write_text("def f():\n    import zarr.core\n    from torch import nn\n")
    assert list(imported(tmp_path / "m.py")) == ["zarr.core", "torch.nn"]
    assert len(MODULES) > 4
