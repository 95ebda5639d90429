"""Trainings in parallel processes: the same results as in one process, and no process is left when
the parent ends."""

import functools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from aggregate import ablate, crossval
from aggregate.ablation import processes
from aggregate.ablation.processes import plan_processes, run_side_by_side
from aggregate.scores import Scores
from extract import InputError, RunError
from processes import running

FLAGS = "--epochs 4 --batch-size 16 --lr 0.01 --g1 4 --g2 2 --m1 8"
QUICK = {
    "epochs": (4,),
    "batch_size": (16,),
    "lr": (0.01,),
    "seeds": (0,),
    "g1": (4,),
    "g2": (2,),
    "m1": (8,),
}


@pytest.fixture
def two_cores(monkeypatch) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: 2)


def own_process(start: int, task: int) -> tuple[int, int]:
    return start + task, os.getpid()


def fail(kind: type[Exception], start: int, task: int) -> int:
    raise kind(f"task {task} is wrong")


def die(start: int, task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def ten() -> int:
    return 10


def test_tasks_are_done_by_processes_of_their_own(two_cores):
    results = dict(run_side_by_side(own_process, [1, 2, 3, 4], prepare=ten, processes=2, threads=1))
    assert {task: result for task, (result, _) in results.items()} == {1: 11, 2: 12, 3: 13, 4: 14}
    assert os.getpid() not in {process for _, process in results.values()}
    (alone,) = run_side_by_side(own_process, [1], prepare=ten, processes=1, threads=1)
    assert alone == (1, (11, os.getpid()))


@pytest.mark.parametrize("kind", [InputError, RunError, ValueError])
def test_an_error_keeps_its_kind_and_its_sentence(kind):
    with pytest.raises(kind, match=r"^task 1 is wrong$"):
        list(
            run_side_by_side(
                functools.partial(fail, kind), [1], prepare=ten, processes=2, threads=1
            )
        )


def test_a_process_that_dies_is_an_error_that_says_how():
    with pytest.raises(
        RunError, match=r"a training process died .*lower --at-once.*same command again"
    ):
        list(run_side_by_side(die, [1, 2], prepare=ten, processes=2, threads=1))


def test_the_plan_follows_the_cores_and_all_tasks(monkeypatch):
    monkeypatch.setattr(processes, "available_cores", lambda: 8)
    assert [plan_processes(tasks, "cpu") for tasks in (1, 3, 8, 100)] == [
        (1, 8),
        (3, 2),
        (8, 1),
        (8, 1),
    ]


def test_crossval_is_the_same_in_two_processes(features, tmp_path, monkeypatch):
    wanted = crossval.Options(features=features, out=tmp_path / "one", agg=("tsn", "hgnl"), **QUICK)
    crossval.main(wanted)
    monkeypatch.setattr(processes, "available_cores", lambda: 2)
    crossval.main(replace(wanted, out=tmp_path / "two"))
    for name in ("tsn.h5", "hgnl.h5"):
        alone, together = (Scores.load(tmp_path / out / name) for out in ("one", "two"))
        np.testing.assert_array_equal(alone.logits, together.logits)
    one, two = ((tmp_path / out / "results.json").read_text() for out in ("one", "two"))
    assert one == two


def test_ablate_is_the_same_in_two_processes(features, tmp_path, monkeypatch, capsys):
    wanted = ablate.Options(
        features=features, out=tmp_path / "one", agg=("tsn", "hgnl"), **QUICK | {"g2": (1, 2)}
    )
    ablate.main(wanted)
    monkeypatch.setattr(processes, "available_cores", lambda: 2)
    ablate.main(replace(wanted, out=tmp_path / "two"))
    assert "in 2 passes, 0 skipped; 2 passes at a time, 1 threads each" in capsys.readouterr().out

    def measured(out: str) -> list[list[str]]:
        lines = [
            line.split(",") for line in (tmp_path / out / "ablation.csv").read_text().splitlines()
        ]
        kept = [
            number
            for number, name in enumerate(lines[0])
            if not name.startswith(("seconds", "pass_"))
        ]
        return [[line[number] for number in kept] for line in lines]

    assert measured("one") == measured("two")


WAIT_SIDE_BY_SIDE = """
import functools, sys
from aggregate.ablation.processes import run_side_by_side
from processes import begin_and_wait
prepare = functools.partial(str, sys.argv[1])
list(run_side_by_side(begin_and_wait, [1, 2, 3], prepare=prepare, processes=2, threads=1))
"""


def test_kill_9_leaves_no_process(tmp_path):
    """Tasks that do nothing but wait: their processes start without torch."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", WAIT_SIDE_BY_SIDE, str(tmp_path)]
    with running(command, until=lambda: len(os.listdir(tmp_path)) == 2, env=environment) as process:
        started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


def test_ctrl_c_leaves_no_process_and_says_how_to_go_on(features, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    out = tmp_path / "cv"
    command = (
        f"aggregate.crossval --agg tsn hgnl {FLAGS} --epochs 60 --features {features} --out {out}"
    )
    started: list[psutil.Process] = []

    def two_children_train() -> bool:
        log = out / "results.jsonl"
        return log.exists() and b"\n" in log.read_bytes()

    with running(command, until=two_children_train, output=subprocess.PIPE) as process:
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert len(started) >= 2 or len(os.sched_getaffinity(0)) == 1
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    assert process.returncode == 130
    assert "the same command resumes" in output
    assert "Traceback" not in output
    assert "leaked" not in output  # semaphores of the children, by Python's resource tracker
