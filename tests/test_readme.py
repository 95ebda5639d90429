"""What the README says is so: its tree names every module, and its commands run, in their order."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from extract.cli import run_command

ROOT = Path(__file__).parent.parent
ROOMS = ("extract", "aggregate", "ensemble", "pipelines")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Every command is run with these flags behind its own, so that minutes become seconds; none changes what it does.
SMALL = {"--backbone": "test_resnet", "--weights": "random", "--frames": "4", "--decode-workers": "1"}
QUICK = {
    "extract": SMALL,
    "aggregate.train": {"--epochs": "1", "--g1": "4", "--g2": "2"},
    "aggregate.ablate": {"--epochs": "1"},
    "aggregate.crossval": {"--epochs": "1", "--g1": "4", "--g2": "2"},
    "aggregate.finetune": SMALL | {"--epochs": "1", "--batch-size": "8", "--frames": "3"},
    "pipelines.kinetics700": SMALL | {"--epochs": "1", "--batch-size": "8", "--g1": "4", "--g2": "2"},
}


def commands() -> list[list[str]]:
    """The `python -m` lines of the README's shell blocks: [module, argument, ...]."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python -m ")]
    return [shlex.split(line)[2:] for line in lines]


def test_the_tree_names_every_room_and_module_and_nothing_else():
    tree = README[README.index("## The tree") : README.index("## Words")]
    lines = re.search(r"```text\n(.*?)```", tree, re.DOTALL)[1].splitlines()
    named, folders = set(), []
    for line in lines:
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.add("".join([*folders, name]))
    there = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert named == {name for name in there if not name.endswith("__init__.py")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with k700/: real clips in five classes, train and val; and clip.mp4."""
    here = tmp_path_factory.mktemp("readme")
    source = sorted((ROOT / "pipelines" / "clips" / "exercise_mini" / "clips").rglob("*.mp4"))
    for number in range(40):
        target = here / "k700" / ("val" if number % 4 == 3 else "train") / f"exercise {number // 8}" / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source[number * 3])
    (here / "clip.mp4").symlink_to(source[3])
    (here / "matches").mkdir()
    for number in range(2):
        (here / "matches" / f"{number}.mp4").symlink_to(source[number])
    spans = [f"{number}.mp4,exercise {number},{start},{start + 0.3},test" for number in range(2) for start in (0, 0.2)]
    (here / "spans.csv").write_text("\n".join(["path,label,start,end,split", *spans]) + "\n")
    return here


def test_every_command_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ran = []
    for module, *arguments in commands():
        flags = {flag: value for flag, value in QUICK.get(module, {}).items() if flag not in arguments}
        if module == "aggregate.train" and "hgnl" not in arguments:
            flags = {flag: value for flag, value in flags.items() if flag not in ("--g1", "--g2")}
        more = [word for pair in flags.items() for word in pair]
        name = f"{module}.__main__" if (ROOT / module.replace(".", "/") / "__main__.py").exists() else module
        command = importlib.import_module(name)
        status = run_command(command.main, command.Options, prog=f"python -m {module}", args=[*arguments, *more])
        assert status == 0, f"python -m {module} {' '.join(arguments)}: {capsys.readouterr().err}"
        ran.append(module)
    assert len(ran) > 15
    for name in ("runs/fused.h5", "runs/sub.json", "runs/report.html", "model.onnx", "runs/k700/submission.json"):
        assert (folder / name).exists(), name
