"""The import rules of the project, checked on the syntax tree: imports point up, no circles, one
external library per package."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "extract",
    "aggregate",
    "ensemble",
    "pipelines",
)  # data flows down: a package imports itself and those before it
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in MODULES]

# Where an external library may be imported. Libraries that are not named here may be imported
# anywhere.
HOMES = {
    "zarr": ("extract/store/",),
    "av": ("extract/decode/",),
    "decord": ("extract/decode/",),
    "ray": ("extract/workers/", "aggregate/finetune.py"),
}
# Decoding subprocesses, score files and the ensemble must start without torch's five seconds.
TORCH_FREE = (
    *(
        "extract/cli.py",
        "extract/sampling.py",
        "extract/listing/",
        "extract/decode/",
        "extract/store/",
    ),
    *("aggregate/metrics.py", "aggregate/scores.py", "ensemble/"),
)
# Its functions import torch, and no decoding subprocess calls one
# (test_a_child_never_imports_torch).
ON_GPU = "extract/decode/nvdec.py"


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, at any depth; imports inside functions and under
    TYPE_CHECKING count."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; name the room"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_up_and_stay_in_their_room(name: str):
    allowed = ROOMS[: ROOMS.index(name.split("/")[0]) + 1]
    for other in imported(ROOT / name):
        top = other.split(".")[0]
        assert top not in ROOMS or top in allowed, f"{name} imports {other}, which lies below it"
        assert top not in HOMES or name.startswith(HOMES[top]), (
            f"{name} imports {top}, whose home is {HOMES[top]}"
        )
        if name.startswith(TORCH_FREE) and name != ON_GPU:
            assert top not in ("torch", "torchvision", "timm"), (
                f"{name} imports {other} and must start without torch"
            )


def module_graph() -> dict[str, set[str]]:
    """The project's modules by dotted name, and the project's modules that each imports."""
    known = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): ROOT / name
        for name in NAMES
    }
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for other in imported(path):
            target = other if other in known else other.rpartition(".")[0]
            if target in known and target != name:
                graph[name].add(target)
    return graph


def rooms_of(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same graph between packages: folders with the modules in them. A module next to packages
    is a package of its own."""
    packages = {
        name
        for name in graph
        if any(other.startswith(f"{name}.") for other in graph) and "." in name
    }

    def room(name: str) -> str:
        return next(
            (package for package in packages if name == package or name.startswith(f"{package}.")),
            name,
        )

    rooms: dict[str, set[str]] = {room(name): set() for name in graph}
    for name, others in graph.items():
        rooms[room(name)] |= {room(other) for other in others} - {room(name)}
    return rooms


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            if len(stack) - place > 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_commands_import_no_commands():
    """Code that two commands of `aggregate` share is in a package of its own."""
    graph = module_graph()
    commands = {
        path.relative_to(ROOT).as_posix().removesuffix(".py").replace("/", ".")
        for path in MODULES
        if "    run_as_script()\n" in path.read_text(encoding="utf-8")
        and ROOT / "aggregate" in path.parents
    }
    assert len(commands) > 5
    for name in commands:
        assert not graph[name] & commands, (
            f"{name} imports the command {(graph[name] & commands).pop()}"
        )


def test_no_circles_between_modules():
    assert circles(module_graph()) == []


def test_no_circles_between_rooms():
    assert circles(rooms_of(module_graph())) == []


def test_the_rules_can_fail(tmp_path):
    """A rule over an empty set always holds. So this checks that imports inside functions are seen
    and circles are found."""
    (tmp_path / "m.py").write_text("def f():\n    import zarr.core\n    from torch import nn\n")
    assert list(imported(tmp_path / "m.py")) == ["zarr.core", "torch.nn"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert rooms_of({"x.a": set(), "x.b": {"x.r.m"}, "x.r": set(), "x.r.m": {"x.a"}})["x.r"] == {
        "x.a"
    }
    assert len(MODULES) > 4


def test_the_house_stays_readable():
    """No module above 450 lines, no function above 60."""
    long: list[str] = []
    for name in NAMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        if text.count("\n") > 450:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.end_lineno - node.lineno >= 60
            ):
                long.append(f"{name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long


# Nouns that say nothing about the contents of a variable.
GENERIC = {
    "one",
    "some",
    "few",
    "several",
    "other",
    "others",
    "found",
    "known",
    "wanted",
    "asked",
    "made",
    "given",
    "told",
    "said",
    "words",
    "there",
    "here",
    "place",
    "places",
    "at",
    "by",
    "of",
    "beside",
    "share",
}


def generic_names(text: str) -> list[str]:
    """Variables and arguments with a generic name that is in use for more than three lines."""
    lived: list[str] = []
    for scope in ast.walk(ast.parse(text)):
        if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for node in ast.walk(scope):
            if isinstance(node, ast.arg) and node.arg in GENERIC:
                first.setdefault(node.arg, node.lineno)
            if isinstance(node, ast.Name) and node.id in GENERIC:
                if isinstance(node.ctx, ast.Store):
                    first[node.id] = min(node.lineno, first.get(node.id, node.lineno))
                last[node.id] = max(node.lineno, last.get(node.id, 0))
        lived += [
            f"{scope.lineno}: {name}" for name in first if last.get(name, 0) - first[name] > 3
        ]
    return lived


@pytest.mark.parametrize("name", NAMES)
def test_names_say_what_they_hold(name: str):
    assert not generic_names((ROOT / name).read_text(encoding="utf-8"))


def test_a_generic_name_is_noticed():
    body = "\n".join(f"    print({number})" for number in range(4))
    assert generic_names(f"def f(found):\n{body}\n    return found") == ["1: found"]
    assert not generic_names("def f(found):\n    return found")
