"""README.md and docs/: the tree names every module, the commands run, and links lead somewhere.

The README's commands run first, in their order. The commands of a file in docs/ may use what they
made, and nothing of another file. A command that appears several times runs once.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from extract.cli import run_command
from extract.commands import COMMANDS

ROOT = Path(__file__).parent.parent
ROOMS = ("extract", "aggregate", "ensemble", "pipelines")
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
ELSEWHERE = (
    ROOT / "docs" / "features-from-elsewhere.md"
)  # its Python runs between its commands: see test_elsewhere.py
# Every command gets these flags in addition to its own, so that it takes seconds instead of
# minutes.
SMALL = {
    "--backbone": "test_resnet",
    "--weights": "random",
    "--frames": "4",
    "--decode-workers": "1",
}
QUICK = {
    "extract": SMALL,
    "aggregate.train": {"--epochs": "1", "--g1": "4", "--g2": "2"},
    "aggregate.ablate": {"--epochs": "1"},
    "aggregate.crossval": {"--epochs": "1", "--seeds": "0", "--g1": "4", "--g2": "2"},
    "aggregate.finetune": SMALL | {"--epochs": "1", "--batch-size": "8", "--frames": "3"},
    "pipelines.kinetics700": SMALL
    | {"--epochs": "1", "--batch-size": "8", "--g1": "4", "--g2": "2"},
}


def commands() -> list[str]:
    """The command lines of all shell blocks, each once."""
    pages = [text for page, text in PAGES.items() if page != ELSEWHERE]
    blocks = [block for text in pages for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    lines = dict.fromkeys(line for block in blocks for line in block.splitlines())
    return [line for line in lines if line.startswith(("python -m ", "hgnl "))]


def test_the_readme_is_short():
    assert len(PAGES[ROOT / "README.md"].split()) <= 1200


def test_the_readme_links_every_page():
    linked = re.findall(r"\((docs/[\w.-]+)", PAGES[ROOT / "README.md"])
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").iterdir()}
    assert pages == {*linked}


def test_every_link_leads_to_a_file_and_a_heading():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            path = page.parent / file
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {
                    re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                    for heading in headings
                }
                assert anchor in anchors, f"{page.name}: {target}"


def test_the_tree_names_every_module_and_nothing_else():
    text = PAGES[ROOT / "docs" / "architecture.md"]
    tree = text[text.index("## The tree") : text.index("## Words")]
    lines = re.search(r"```text\n(.*?)```", tree, re.DOTALL)[1].splitlines()
    named, folders = set(), []
    for line in lines:
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.add("".join([*folders, name]))
    modules = {
        path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")
    }
    assert named == {name for name in modules if not name.endswith("__init__.py")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with k700/ (real clips in five classes, train and val) and clip.mp4."""
    here = tmp_path_factory.mktemp("readme")
    source = sorted((ROOT / "pipelines" / "clips" / "exercise_mini" / "clips").rglob("*.mp4"))
    for number in range(25):
        target = (
            here
            / "k700"
            / ("val" if number % 4 == 3 else "train")
            / f"exercise {number // 5}"
            / f"{number}.mp4"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source[number * 3])
    (here / "clip.mp4").symlink_to(source[3])
    (here / "matches").mkdir()
    for number in range(2):
        (here / "matches" / f"{number}.mp4").symlink_to(source[number])
    spans = [
        f"{number}.mp4,exercise {number},{start},{start + 0.3},test"
        for number in range(2)
        for start in (0, 0.2)
    ]
    (here / "spans.csv").write_text("\n".join(["path,label,start,end,split", *spans]) + "\n")
    return here


def run(line: str, capsys) -> str:
    """Run a command line of the documentation with small settings; returns its output."""
    program, *words = shlex.split(line)
    module, arguments = (
        (COMMANDS[words[0]], words[1:]) if program == "hgnl" else (words[1], words[2:])
    )
    flags = {flag: value for flag, value in QUICK.get(module, {}).items() if flag not in arguments}
    if module in ("aggregate.train", "aggregate.crossval") and "hgnl" not in arguments:
        flags = {flag: value for flag, value in flags.items() if flag not in ("--g1", "--g2")}
    if "--shots" in arguments:  # draws have no seeds
        flags.pop("--seeds", None)
    if any(word.startswith("torchvision/") for word in arguments):  # even the small ones are large
        flags["--frames"] = "1"
    more = [word for pair in flags.items() for word in pair]
    name = (
        f"{module}.__main__"
        if (ROOT / module.replace(".", "/") / "__main__.py").exists()
        else module
    )
    command = importlib.import_module(name)
    capsys.readouterr()
    status = run_command(command.main, command.Options, prog=line, args=[*arguments, *more])
    shown = capsys.readouterr()
    assert status == 0, f"{line}: {shown.err}"
    return shown.out


def test_every_command_runs_and_the_commands_that_they_print_run_too(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    printed: dict[
        tuple[str, str], str
    ] = {}  # the first command of each kind that `hgnl train`, `hgnl crossval` ... print
    lines = commands()
    for line in lines:
        name = shlex.split(line)[1]
        for following in re.findall(
            rf"^(?:Next: )?(hgnl (?:{'|'.join(COMMANDS)}) .*)$", run(line, capsys), re.MULTILINE
        ):
            printed.setdefault((name, shlex.split(following)[1]), following)
    assert len(lines) > 15
    for name in (
        "runs/fused.h5",
        "runs/sub.json",
        "runs/report.html",
        "model.onnx",
        "runs/k700/submission.json",
    ):
        assert (folder / name).exists(), name
    assert {name for name, _ in printed} >= {
        "extract",
        "train",
        "evaluate",
        "crossval",
        "finetune",
        "ensemble",
        "kinetics700",
    }
    for line in printed.values():
        if line not in lines:
            run(line, capsys)
