"""make gpu: every test and benchmark that needs a GPU, in less than nine minutes, on a machine that
needs no network.

    wheelhouse/part*  -> build/gpu/site         packages that the machine lacks (`make wheelhouse`, elsewhere)
    tests/gpu         -> HGNL_GPU=1 pytest      may fail, must not skip
    tests/gpu/bench.py                          the measured speed
                      -> runs/gpu/gpu.json and gpu.md, the table that is printed

The exit status is 1 if a test fails or skips, or if a benchmark ends with an error. A missed goal
is only reported. `--rehearse` does all of it with small networks on a simulated GPU (`pretend.py`),
which proves only that it runs.
"""

import argparse
import ctypes.util
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "gpu" / "site"
TESTS_SHARE = 0.5  # largest fraction of the time
VERSIONS = ("torch", "torchvision", "timm", "numpy", "av", "torchcodec", "zarr", "onnxruntime")


def install() -> None:
    """Unpack the wheels of the wheelhouse, if there is one, whose packages this Python lacks."""
    known = {
        plain(one.name) for one in importlib.metadata.distributions(path=[*sys.path, str(SITE)])
    }
    new = [
        wheel
        for wheel in sorted(ROOT.glob("wheelhouse/part*/*.whl"))
        if plain(wheel.name.split("-")[0]) not in known
    ]
    if new:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
        ]
        subprocess.run([*command, "--target", str(SITE), *map(str, new)], check=True)
        print(f"installed {len(new)} wheels of the wheelhouse into {SITE.relative_to(ROOT)}")


def plain(name: str) -> str:
    """A package's name in the form that indexes compare."""
    return re.sub(r"[-_.]+", "-", name).lower()


def environment(rehearse: bool) -> dict[str, str]:
    """Environment variables of the tests and benchmarks: folders of packages, FFmpeg for
    torchcodec, and that there is a GPU."""
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "gpu", SITE]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    changed |= {"HGNL_GPU": "pretended" if rehearse else "1"}
    if not ctypes.util.find_library("avcodec"):
        links = ROOT / "build" / "gpu" / "ffmpeg"
        make = f"import ffmpeg, pathlib; ffmpeg.links_to_ffmpeg(pathlib.Path({str(links)!r}))"
        if not links.exists():
            links.mkdir(parents=True)
            subprocess.run([sys.executable, "-c", make], env=os.environ | changed, check=True)
        changed["LD_LIBRARY_PATH"] = os.pathsep.join(
            filter(None, [str(links), os.environ.get("LD_LIBRARY_PATH")])
        )
    return os.environ | changed


def machine(env: dict[str, str]) -> dict[str, Any]:
    """The GPU's name, memory and driver, and versions."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpu = (
            subprocess.run(asked, capture_output=True, text=True, check=True)
            .stdout.strip()
            .splitlines()[0]
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        gpu = "none that nvidia-smi shows"
    words = "import torch; print(torch.version.cuda, torch.backends.cudnn.version())"
    cuda = subprocess.run(
        [sys.executable, "-c", words], env=env, capture_output=True, text=True
    ).stdout.split()
    sys.path[:0] = [str(SITE)]
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    versions |= dict(zip(("cuda", "cudnn"), cuda, strict=False))
    return {
        "gpu": gpu,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
    }


def run_tests(
    env: dict[str, str], folder: Path, *, seconds: float, only: list[str]
) -> dict[str, Any]:
    """Run all tests marked gpu; returns counts, and each test that did not pass with its last
    line."""
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    command += [
        "-W",
        "default",
    ]  # libraries of other versions may give warnings that are not our fault
    began = time.monotonic()
    try:
        subprocess.run([*command, *(only or ["tests/gpu"])], cwd=ROOT, env=env, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"passed": 0, "seconds": seconds, "not passed": [f"not done after {seconds:.0f} s"]}
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    bad = [
        (case, child)
        for case in cases
        for child in case
        if child.tag in ("failure", "error", "skipped")
    ]
    words = [
        f"{case.get('name')}: {child.tag}: {' '.join(child.get('message', '').split())[:300]}"
        for case, child in bad
    ]
    passed = len(cases) - len({id(case) for case, _ in bad})
    if not cases:
        words = ["pytest found or ran no test; its words stand above"]
    return {"passed": passed, "seconds": time.monotonic() - began, "not passed": words}


def run_benchmarks(env: dict[str, str], folder: Path, *, seconds: float) -> dict[str, Any]:
    results = folder / "benchmarks.jsonl"
    results.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "bench.py"), "--out", str(results)]
    command += ["--seconds", f"{seconds:.0f}"]
    done: dict[str, Any] = {}
    try:
        status = subprocess.run(command, cwd=ROOT, env=env, timeout=seconds + 5).returncode
        ended = "" if status == 0 else f"bench.py ended with status {status}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s"
    if results.exists():
        for line in results.read_text().splitlines():
            done |= json.loads(line)
    return done | ({"all": {"error": ended}} if ended else {})


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    about, tests = record["machine"], record["tests"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"{about['gpu']}; Python {about['python']}, {about['cores']} cores; {versions}", ""]
    lines += [
        f"{tests['passed']} tests passed in {tests['seconds']:.0f} s, {len(tests['not passed'])} did not",
        "",
    ]
    lines += [*(f"- {words}" for words in tests["not passed"]), ""] if tests["not passed"] else []
    lines += ["| benchmark | what | measured | hoped for |", "|---|---|---|---|"]
    for name, result in record["benchmarks"].items():
        for what, value in result.items():
            if what == "goals":
                for goal, (got, sign, hoped) in value.items():
                    met = "met" if (got >= hoped if sign == ">=" else got <= hoped) else "missed"
                    lines.append(f"| {name} | {goal} | {got:.4g} | {sign} {hoped:g}: {met} |")
            else:
                lines.append(
                    f"| {name} | {what} | {value if isinstance(value, str) else f'{value:.4g}'} | |"
                )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all of it")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--tests", nargs="*", default=[], help="only these")
    arguments = parser.parse_args()
    began, folder = time.monotonic(), arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.rehearse:
        install()
    env = environment(arguments.rehearse)
    record: dict[str, Any] = {"rehearsal": arguments.rehearse, "machine": machine(env)}
    limit = TESTS_SHARE * arguments.seconds
    record["tests"] = run_tests(env, folder, seconds=limit, only=arguments.tests)
    left = arguments.seconds - (time.monotonic() - began)
    record["benchmarks"] = run_benchmarks(env, folder, seconds=left)
    record["seconds"] = time.monotonic() - began
    (folder / "gpu.json").write_text(json.dumps(record, indent=1))
    (folder / "gpu.md").write_text(table(record))
    print(f"\n{table(record)}\n{folder / 'gpu.json'} and gpu.md, after {record['seconds']:.0f} s")
    return (
        1
        if record["tests"]["not passed"]
        or any("error" in each for each in record["benchmarks"].values())
        else 0
    )


if __name__ == "__main__":
    sys.exit(main())
