"""`make gpu` and `make wheelhouse` themselves, rehearsed on the CPU: files execute, counts and
messages are right."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bench
import prove
import wheelhouse
from thorough import THOROUGH

ROOT = Path(__file__).parents[2]
# The packages that a GPU machine is expected to have and that the missing ones require.
THERE = {
    "click",
    "colorama",
    "numpy",
    "packaging",
    "pyyaml",
    "typing-extensions",
    "pytest",
    "attrs",
    "torch",
    "pillow",
}


def test_every_test_that_wants_a_gpu_stands_where_make_gpu_looks():
    marked = {
        path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()
    }
    assert len(marked - {Path(__file__)}) >= 4
    assert {path.parent.name for path in marked} == {"gpu"}


def test_a_machine_without_a_gpu_fails_the_tests_and_does_not_skip_them(tmp_path):
    env = {**prove.environment(False), "CUDA_VISIBLE_DEVICES": ""}
    only = [
        "tests/gpu/test_backbone.py::test_frames_that_come_bit_by_bit_and_those_that_are_on_the_device"
    ]
    tests = prove.run_tests(env, tmp_path, seconds=120, only=only)
    assert tests["passed"] == 0
    assert len(tests["not passed"]) == 1
    assert "PyTorch sees 0 GPUs on this machine" in tests["not passed"][0]


# Tests that run different lines on a GPU. On a simulated one, the others differ from these only in
# CPU computations, which CPU tests cover; half precision of whole networks takes minutes there.
REHEARSED = (
    "test_backbone.py::test_auto_takes_the_gpu_in_half_precision_and_says_how_it_runs",
    "test_backbone.py::test_the_same_bytes_again_whatever_is_beside_and_however_it_runs[graphs]",
    "test_backbone.py::test_the_compiled_form_rounds_otherwise_and_is_recorded",
    "test_backbone.py::test_frames_that_come_bit_by_bit_and_those_that_are_on_the_device",
    "test_backbone.py::test_features_that_are_not_finite_and_then_good_ones",
    "test_backbone.py::test_out_of_memory_names_the_flag_that_helps",
    "test_extract.py",
    "test_onnx.py",
    "test_training.py::test_forward_and_backward_are_those_of_the_cpu[hgnl]",
    "test_training.py::test_training_with_features_on_the_gpu_learns_what_the_cpu_learns[hgnl]",
    "test_training.py::test_a_run_goes_on_on_another_device",
    "test_training.py::test_a_pass_of_several_is_each_of_them_alone",
    "test_training.py::test_fine_tuning_in_half_precision[tsn-fp16]",
    "test_training.py::test_fine_tuning_in_half_precision[stnet-bf16]",
    "test_training.py::test_fine_tuning_out_of_memory_names_the_flag",
)


@pytest.mark.timeout(1800 if THOROUGH else 300)
def test_the_whole_of_it_rehearsed_on_the_cpu(tmp_path):
    """All benchmarks, and tests of each kind, on a simulated GPU; with `make fuzz` nearly all
    tests."""
    prove_it = [sys.executable, str(ROOT / "tests" / "gpu" / "prove.py"), "--rehearse"]
    names = ("test_backbone.py", "test_extract.py", "test_onnx.py", "test_training.py")
    tests = [f"tests/gpu/{name}" for name in (names if THOROUGH else REHEARSED)]
    command = [*prove_it, "--out", str(tmp_path), "--seconds", "1800", "--tests", *tests]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["rehearsal"]
    assert record["tests"]["not passed"] == []
    assert record["tests"]["passed"] >= len(REHEARSED) + 3
    assert not [name for name, each in record["benchmarks"].items() if "error" in each]
    assert set(record["benchmarks"]) == set(bench.BENCHMARKS)
    assert record["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    text = (tmp_path / "gpu.md").read_text()
    assert text in done.stdout
    for goal in (
        "SE-ResNeXt101 alone",
        "extraction / min",
        "epoch of Kinetics-700, hgnl",
        "in one pass / one by one",
    ):
        assert goal in text
    assert record["benchmarks"]["extraction"]["torchcodec-cuda, videos it left to pyav"] == 0


def test_a_part_of_a_benchmark_that_fails_takes_nothing_along():
    numbers = {"before": 1.0}
    bench.attempt(numbers, "good", lambda: {"after": 2.0})
    for what in ("graphs", "compiled"):
        bench.attempt(numbers, what, lambda: {"never": 1 / 0})
    errors = (
        "graphs: ZeroDivisionError: division by zero; compiled: ZeroDivisionError: division by zero"
    )
    assert numbers == {"before": 1.0, "after": 2.0, "error": errors}


def test_a_failure_a_skip_and_an_error_are_told_and_end_with_status_1(tmp_path, monkeypatch):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_skipped(): pytest.skip('no card')\n"
    )
    tests = prove.run_tests(prove.environment(True), tmp_path, seconds=100, only=[str(file)])
    assert tests["passed"] == 1
    assert [re.sub(r": .*", "", words, flags=re.S) for words in tests["not passed"]] == [
        "test_bad",
        "test_skipped",
    ]
    tests = prove.run_tests(prove.environment(True), tmp_path, seconds=0.01, only=[str(file)])
    assert tests["not passed"] == ["not done after 0 s"]
    record = {
        "machine": prove.machine(dict(os.environ)),
        "tests": tests,
        "benchmarks": {"grid": {"error": "it broke"}},
    }
    assert "| grid | error | it broke | |" in prove.table(record)


def test_wheels_are_those_of_the_lock_and_need_nothing_that_is_not_there():
    pins = wheelhouse.pinned()
    assert len(pins) == len(wheelhouse.LACKING)
    lock = (ROOT / "requirements.lock").read_text()
    assert all(pin in lock for pin in pins)
    known = THERE | set(wheelhouse.LACKING)
    here = {
        prove.plain(one.name) for one in importlib.metadata.distributions()
    }  # another Python needs others
    for name in here & set(wheelhouse.LACKING):
        for line in importlib.metadata.requires(name) or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate(
                {"extra": "", "python_version": wheelhouse.PYTHON}
            ):
                assert prove.plain(need.name) in known, f"{name} needs {line}"


def test_only_wheels_of_packages_that_are_missing_are_installed(tmp_path, monkeypatch, capsys):
    wheels = tmp_path / "wheelhouse" / "part1"
    wheels.mkdir(parents=True)
    for name in (
        "google_crc32c-1.9.0-cp312-cp312-manylinux2014_x86_64.whl",
        "hgnl_missing-1.0-py3-none-any.whl",
    ):
        (wheels / name).touch()
    commands = []
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    monkeypatch.setattr(prove, "SITE", tmp_path / "site")
    monkeypatch.setattr(prove.subprocess, "run", lambda command, check: commands.append(command))
    prove.install()
    assert [Path(command[-1]).name for command in commands] == ["hgnl_missing-1.0-py3-none-any.whl"]
    assert commands[0][-3:-1] == ["--target", str(tmp_path / "site")]
    assert "installed 1 wheels" in capsys.readouterr().out


def test_parts_are_few_and_none_is_too_large():
    sizes = {"a": 30, "b": 25, "c": 20, "d": 15, "e": 10}
    parts = wheelhouse.parts(sizes, limit=50)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    assert [sum(sizes[name] for name in part) for part in parts] == [50, 50]
    with pytest.raises(SystemExit, match="b has 25 bytes, a part has room for 20"):
        wheelhouse.parts({"b": 25}, limit=20)


def test_extraction_by_one_worker_needs_no_ray(tmp_path):
    """Training does not need Ray either: a GPU machine may have none."""
    clip = ROOT / "tests" / "clips" / "codecs" / "h264_portrait.mp4"
    code = f"""
import sys
sys.modules["ray"] = None
from pathlib import Path
from extract.__main__ import main
from extract.options import Options
small = {{"backbone": "test_resnet", "weights": "random", "frames": 2, "precision": "fp32", "device": "cpu"}}
sys.exit(main(Options(videos=Path({str(clip)!r}), out={str(tmp_path / "f.zarr")!r}, **small)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 frames in" in done.stdout
