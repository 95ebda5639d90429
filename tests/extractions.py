"""Small extractions, by `main(options(...))` or as a program, and their progress."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from extract.options import Options
from extract.store import RunLog

ROOT = Path(__file__).parent.parent
SMALL = {
    "backbone": "test_resnet",
    "weights": "random",
    "precision": "fp32",
    "frames": 3,
    "block_size": 2,
}


def options(videos: Path, out: Path | str, **changed: Any) -> Options:
    return Options(videos=videos, out=str(out), **(SMALL | changed))


def command(videos: Path | str, out: Path | str, **changed: Any) -> list[str]:
    """The command line of the same options, for a separate process."""
    named = {"videos": videos, "out": out} | SMALL | changed
    flags = [
        word
        for name, value in named.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [sys.executable, "-m", "extract", *flags]


def start_held(
    videos: Path | str, out: Path | str, folder: Path, hold: str, *, output: Any, **changed: Any
) -> subprocess.Popen:
    """Start the same command in a separate process. It waits at videos with the part `hold` in
    their path until the file `hold` in `folder` is gone (see `decode_jobs.held`)."""
    (folder / "hold").write_text(hold)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"HGNL_TEST_HELD": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    program = (
        "import sys\n"
        "from functools import partial\n"
        "from extract.__main__ import main\n"
        "from extract.cli import run_command\n"
        "from extract.options import Options\n"
        "from extract.workers import driver\n"
        "from extract.workers.ray_pool import RayActorPool\n"
        "from simulated import HeldWorker\n"
        "driver.Worker, driver.RayActorPool = HeldWorker, partial(RayActorPool, worker=HeldWorker)\n"
        "sys.exit(run_command(main, Options, prog='extract'))\n"
    )
    words = [sys.executable, "-c", program, *command(videos, out, **changed)[3:]]
    return subprocess.Popen(
        words, stdout=output, stderr=output, env=os.environ | environment, cwd=ROOT
    )


def committed_blocks(out: Path) -> list[dict[str, Any]]:
    """The records of committed blocks in the log of the run."""
    return [record for record in RunLog.records(out) if record["event"] == "block"]


def decode_children() -> list[psutil.Process]:
    """All decode children below this process, in a local cluster too."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "extract.decode.pool" in " ".join(command_of(process))
    ]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended, or is a zombie
        return []
