"""hgnl: every command under one name, in any folder; printed commands and hints can be pasted."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from extract import commands
from extract.cli import _help_types
from extract.options import Options as ExtractOptions
from extract.store import OK, FeatureStore
from pipelines.__main__ import main

ROOT = Path(__file__).parents[2]
SMALL = [
    "--backbone",
    "test_resnet",
    "--weights",
    "random",
    "--frames",
    "2",
    "--decode-workers",
    "1",
]


def test_the_overview_lists_every_command_by_stage(capsys):
    assert main(["--help"]) == main([]) == 0
    shown = capsys.readouterr().out
    for stage, members in commands.STAGES.items():
        assert f"\n{stage}:\n" in shown
        for name, (_, text) in members.items():
            assert f"  {name:12} {text}" in shown


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_answers_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: hgnl {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["extract", "train", "predict", "ablate"])
def test_help_wraps_text_to_the_terminal_and_shows_no_empty_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert "default: None" not in shown
    assert "default: )" not in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_the_text_of_an_option_has_no_line_breaks_of_the_source():
    """tyro would break it there, and once more at the width of the terminal."""
    types = _help_types(ExtractOptions, dict(ExtractOptions.__dataclass_fields__))
    texts = {name: shown.__metadata__[-1].help for name, shown in types.items()}
    assert texts["videos"].endswith("a CSV (Kinetics', or path,label[,start,end] ...).")
    assert not any("\n" in text for text in texts.values())


def test_every_module_with_a_main_is_a_command():
    files = [path for room in commands._PACKAGES for path in (ROOT / room).rglob("*.py")]
    runnable = {
        path for path in files if "    run_as_script()\n" in path.read_text(encoding="utf-8")
    }
    names = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in runnable
    }
    assert {name.removesuffix(".__main__") for name in names} == {
        *commands.COMMANDS.values(),
        "pipelines.untrimmed",
    }


def test_help_loads_nothing_heavy():
    code = "import sys; from pipelines.__main__ import main; main([]); "
    code += "print(*{'torch', 'numpy', 'tyro'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.endswith("Kinetics-700\n\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["statsu"], "'statsu' is not a command; did you mean `hgnl status`?"),
        (["xyzzy"], "'xyzzy' is not a command; `hgnl --help` lists the commands"),
        (
            ["train", "--agg", "tsn", "--epoch", "3"],
            "hgnl train has no option --epoch; did you mean --epochs?",
        ),
        (
            ["train", "--agg=tsn", "--xyzzy=3"],
            "hgnl train has no option --xyzzy; `hgnl train --help` lists the options",
        ),
        (
            ["extract", "--retry_faild"],
            "hgnl extract has no option --retry-faild; did you mean --retry-failed?",
        ),
    ],
)
def test_a_misspelt_command_or_option_is_answered_with_the_nearest(arguments, message, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "ensemble.search",
            "ensemble.search is not a command; `python -m pipelines` lists the commands",
        ),
        ("extract.decode.reader", "extract.decode.reader is not a command"),
        ("aggregate.trian", "aggregate.trian is not a command; did you mean aggregate.train?"),
    ],
)
def test_a_module_that_is_no_command_says_so(module, message):
    done = subprocess.run(
        [sys.executable, "-m", module], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_help_shows_a_command_s_own_options_first_and_then_groups(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    marks = [
        "main options",
        "--agg ",
        "--features ",
        "head options",
        "--g1 ",
        "schedule options",
        "--epochs ",
    ]
    places = [shown.index(mark) for mark in marks]
    assert places == sorted(places)


def test_windows_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["status", "feats.zarr"]) == 2
    assert capsys.readouterr().err.startswith("error: Windows is not supported")


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("extract.status"), "main", interrupted)
    assert main(["status", "feats.zarr"]) == 130
    assert "run the same command again to continue" in capsys.readouterr().err


# -- in a folder with modules of the user's own --------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path) -> Path:
    """A user's folder: two videos, and the user's own modules with the names of our packages."""
    for number, clip in enumerate(
        sorted((ROOT / "pipelines/clips/exercise_mini/clips").rglob("*.mp4"))[:2]
    ):
        (tmp_path / f"videos/class {number}").mkdir(parents=True)
        (tmp_path / f"videos/class {number}/clip.mp4").symlink_to(clip)
    for name in ("extract", "aggregate", "ensemble"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user')\n")
    return tmp_path


def run_in(folder: Path, *command: str, script: bool = True) -> str:
    """The output of `hgnl COMMAND` (as the console script runs it), or of a Python command, in
    `folder`."""
    start = "import sys; sys.path.remove(''); from pipelines.__main__ import main; sys.exit(main())"
    line = [sys.executable, *(["-c", start] if script else []), *command]
    done = subprocess.run(
        line,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_modules_of_the_user_do_not_matter(own_folder):
    shown = run_in(own_folder, "extract", "--videos", "videos", "--out", "feats.zarr", *SMALL)
    assert "2 videos" in shown
    assert (FeatureStore.open(own_folder / "feats.zarr").status == OK).all()
    run_in(own_folder, "-m", "pipelines.report", ".", "--out", "report.html", script=False)
    assert (own_folder / "report.html").exists()


@pytest.mark.ray
def test_modules_of_the_user_do_not_matter_to_ray_workers(own_folder):
    two = ["--workers", "2", "--device", "cpu", "--block-size", "1"]
    run_in(own_folder, "extract", "--videos", "videos", "--out", "feats.zarr", *SMALL, *two)
    assert (FeatureStore.open(own_folder / "feats.zarr").status == OK).all()


# -- commands and hints to paste -----------------------------------------------------------------------------------


def test_commands_are_quoted_and_leave_out_what_is_not_set():
    line = commands.command_line(
        "aggregate.train", agg=("tsn", "hgnl"), features="my feats.zarr", init=None, control=True
    )
    assert line == "hgnl train --agg tsn hgnl --features 'my feats.zarr' --control"
    options = ExtractOptions(videos=Path("a b"), out="s.zarr", decode_workers=2, retry_failed=True)
    line = commands.command_of("extract", options, retry_failed=False)
    assert line == "hgnl extract --videos 'a b' --out s.zarr --decode-workers 2"


def test_commands_repeat_the_form_that_was_used(monkeypatch):
    main_module = SimpleNamespace(__spec__=SimpleNamespace(name="aggregate.train"))
    monkeypatch.setitem(sys.modules, "__main__", main_module)
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "aggregate.train"])
    assert (
        commands.command_line("extract.status", "f.zarr")
        == ".venv/bin/python -m extract.status f.zarr"
    )
    main_module.__spec__ = None
    monkeypatch.setattr(sys, "argv", [".venv/bin/hgnl", "train"])
    assert commands.command_line("extract.status", "f.zarr") == ".venv/bin/hgnl status f.zarr"
    monkeypatch.setattr(commands.shutil, "which", lambda _: ".venv/bin/hgnl")
    assert commands.command_line("extract.status", "f.zarr") == "hgnl status f.zarr"


@pytest.mark.parametrize(
    ("origin", "pip", "hint"),
    [
        (None, True, "pip install 'hgnl-video[demo]'"),
        (
            {"url": "file:///home/me/it", "dir_info": {"editable": True}},
            True,
            "pip install -e '/home/me/it[demo]'",
        ),
        (
            {"url": "file:///home/me/it", "dir_info": {}},
            False,
            "uv pip install '/home/me/it[demo]'",
        ),
        ("not installed", True, f"pip install {shlex.quote(f'{ROOT}[demo]')}"),
    ],
)
def test_hints_name_extras_as_the_package_was_installed(origin, pip, hint, monkeypatch):
    def distributions(name):
        if origin == "not installed":
            return []
        egg_info = SimpleNamespace(read_text=lambda _: None)  # from a checkout: there is no record
        installed = SimpleNamespace(read_text=lambda _: origin and json.dumps(origin))
        return [egg_info, installed]

    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: pip or None)
    assert commands.install_command("demo") == hint
