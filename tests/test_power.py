"""Nothing that a command reported as finished is lost when the power fails. A full disk delays a
run but loses nothing."""

import errno
import json
import math
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ensemble.__main__ as fusing
import pipelines.report.__main__ as report
from aggregate import ablate, crossval, evaluate, finetune, train
from aggregate.ablation.records import Records
from aggregate.scores import Scores
from aggregate.training.checkpoint import Checkpoint
from extract import RunError
from extract.__main__ import Options as ExtractOptions
from extract.__main__ import main as extract
from extract.export import Options as ExportOptions
from extract.export import main as export
from extract.store import OK, FeatureStore, Outcomes
from extract.store.damage import damaged_rows
from extract.workers import driver
from extract.workers.blocks import BackboneInfo, BlockResult
from power import FullDisk, PowerCuts
from stores import classes_store, store_digest
from thorough import THOROUGH

ROOT = Path(__file__).parent.parent
VIDEOS, FRAMES, DIM = 5, 2, 4


class FakeWorker:
    """Replaces backbone and decoder: its features tell their video."""

    def __init__(self, options, cores, sample=()):
        self._path = options.out

    def settled(self):
        return 0

    def describe(self):
        provenance = {"precision": "fp32", "views": ["center"]}
        return BackboneInfo(provenance, FRAMES, DIM, 0, FRAMES, "")

    def check(self, nonce, video, version):
        pass

    def extract(self, blocks):
        for block in blocks:
            store = FeatureStore.open(self._path, writable=True)
            rows = np.array(block.rows)
            store.write_block(block.number, features_of(store.block_rows(block.number)))
            shape = (len(rows), 1, FRAMES)
            outcome = Outcomes(
                rows,
                np.full(len(rows), OK, "i1"),
                [""] * len(rows),
                np.full(len(rows), 7, "<i4"),
                np.full(shape, 3, "<i4"),
                np.zeros(shape, "<f4"),
            )
            seconds = dict.fromkeys(("decode", "wait", "device", "write"), 0.0)
            yield [BlockResult(block.number, outcome, "here", len(rows), seconds)]

    def close(self):
        pass


def features_of(rows: np.ndarray) -> np.ndarray:
    return np.broadcast_to((rows + 1)[:, None, None, None], (len(rows), 1, FRAMES, DIM)).astype(
        "<f2"
    )


@pytest.fixture(autouse=True)
def _one_process(monkeypatch) -> None:
    """Folds in parallel processes would talk through pipes, which the simulated disk would fail
    too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def extraction(tmp_path, monkeypatch) -> ExtractOptions:
    monkeypatch.setattr(driver, "Worker", FakeWorker)
    folder = tmp_path / "videos" / "train" / "walking"
    folder.mkdir(parents=True)
    for number in range(VIDEOS):
        (folder / f"{number}.mp4").write_bytes(b"not decoded here")
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk" / "new" / "feats.zarr"
    return ExtractOptions(videos=tmp_path / "videos", out=str(out), frames=FRAMES, block_size=2)


def done_rows(path: Path) -> list[int]:
    """The rows that a store calls done, after a check of each of them."""
    if not path.exists():
        return []
    store = FeatureStore.open(path)
    assert store.ids.tolist() == [f"train/walking/{number}.mp4" for number in range(len(store))]
    assert store.labels.tolist() == [0] * len(store)
    rows = np.flatnonzero(store.status == OK)
    np.testing.assert_array_equal(store.read(rows), features_of(rows))
    assert store.num_frames[rows].tolist() == [7] * len(rows)
    assert (store.frame_indices[rows] == 3).all()
    assert all(not damaged_rows(store, block) for block in range(store.num_blocks))
    return rows.tolist()


# -- the power goes ------------------------------------------------------------------------------------------------


def test_what_a_store_calls_done_is_there_whenever_the_power_goes(
    extraction, tmp_path, monkeypatch
):
    promised: list[int] = []
    real = FeatureStore.commit

    def commit(self, done):
        real(self, done)
        promised.extend(done.rows.tolist())

    seen: set[int] = set()

    def check(disk: Path) -> None:
        done = done_rows(disk / "new" / "feats.zarr")
        assert set(promised) <= set(done)
        seen.add(len(done))

    monkeypatch.setattr(FeatureStore, "commit", commit)
    cuts = PowerCuts(tmp_path / "disk", tmp_path / "after", check, lambda: len(promised))
    (tmp_path / "after").mkdir()
    with cuts.recording():
        assert extract(extraction) == 0
        (
            tmp_path / "videos" / "train" / "walking" / "5.mp4"
        ).touch()  # its row is appended, its shard written again
        assert extract(extraction) == 0
    assert seen == {0, 2, 4, 5, 6}
    assert cuts.moments > 60


def test_a_write_that_is_not_synced_is_found(tmp_path, monkeypatch):
    """The simulated disk detects errors: without any one of the syncs, something is lost."""
    kept: list[str] = []

    def check(disk: Path) -> None:
        kept.append(file.read_text() if (file := disk / "a.txt").exists() else "no file")

    from extract import durable

    sync = durable.sync
    for broken, lost in (
        ((lambda path: None), "no file"),
        ((lambda path: path.is_dir() and sync(path)), ""),
    ):
        (tmp_path / "disk").mkdir()
        (tmp_path / "after").mkdir()
        cuts = PowerCuts(tmp_path / "disk", tmp_path / "after", check)
        with monkeypatch.context() as patch, cuts.recording():
            patch.setattr(durable, "sync", broken)
            durable.replace_file(tmp_path / "disk" / "a.txt", "what was promised")
        assert lost in kept
        assert "what was promised" not in kept[-2:]
        shutil.rmtree(tmp_path / "disk")
        shutil.rmtree(tmp_path / "after")


def test_strace_sees_every_file_synced_before_it_has_its_name(tmp_path):
    """The kernel's own record: each rename follows the fsync of that file and precedes one of its
    folder."""
    if (
        not shutil.which("strace")
        or subprocess.run(["strace", "-o", "/dev/null", "true"], check=False).returncode
    ):
        pytest.skip("strace is not installed, or may not trace here")
    program = (
        "import sys, numpy as np\n"
        "from aggregate.scores import Scores\n"
        "from extract.store import FeatureStore\n"
        "FeatureStore.from_arrays(sys.argv[1] + '/a.zarr', np.zeros((3, 2, 4)), lengths=[2, 1, 2], labels=[0, 0, 0],\n"
        "                         classes=['a'])\n"
        "Scores(['x'], ['a'], np.zeros((1, 1))).save(sys.argv[1] + '/s.h5')\n"
    )
    trace = tmp_path / "trace"
    command = [
        "strace",
        "-f",
        "-y",
        "-e",
        "trace=fsync,rename,renameat,renameat2",
        "-o",
        str(trace),
    ]
    subprocess.run(
        [*command, str(ROOT / ".venv/bin/python"), "-c", program, str(tmp_path)],
        cwd=ROOT,
        check=True,
    )
    synced: list[str] = []
    inside: set[str] = set()
    renamed = 0
    waiting = ""
    for line in trace.read_text().splitlines():
        if "fsync(" in line:
            synced.append(line[line.index("<") + 1 : line.index(">")])
            if waiting:
                assert synced[-1] == waiting
                waiting = ""
        elif "rename" in line and str(tmp_path) in line:
            old, new = (text for text in line.split('"')[1::2])
            assert not waiting
            if (
                ".partial/" in new
            ):  # in a folder that has no name yet: synced as a whole before it gets one
                inside.add(new)
                continue
            assert old in synced
            assert inside <= set(synced)
            waiting, renamed = str(Path(new).parent), renamed + 1
    assert not waiting
    assert len(inside) > 10
    assert renamed >= 6


def test_run_folders_ablations_and_cross_validations_go_on_whenever_the_power_goes(tmp_path):
    classes_store(tmp_path / "feats.zarr", videos=18, classes=6)
    classes_store(tmp_path / "many.zarr")
    (tmp_path / "disk").mkdir()
    (tmp_path / "after").mkdir()
    epochs: set[int] = set()

    def check(disk: Path) -> None:
        from aggregate.training.run import open_folder

        last = open_folder(training(tmp_path, disk / "run"))
        epochs.add(last.training["epoch"] if last else 0)
        for file in disk.glob("run/*.pt"):
            Checkpoint.load(file).model()
        grid, cv = ablating(tmp_path, disk / "grid"), crossing(tmp_path, disk / "cv")
        for wanted, by, seen in (
            (grid, ("name", "seed"), results),
            (cv, ("seed", "fold", "agg"), folds),
        ):
            if wanted.out.exists():
                with Records(
                    wanted, FeatureStore.open(wanted.features), by=by, kind="result"
                ) as records:
                    assert all(records.array(key) is not None for key in records.rows)
                    seen.add(len(records.rows))
        for file in (*disk.glob("*.h5"), *disk.glob("cv/*.h5")):
            assert Scores.load(file).ids
        for file in disk.rglob("*.json"):
            json.loads(file.read_text())

    results: set[int] = set()
    folds: set[int] = set()
    cuts = PowerCuts(tmp_path / "disk", tmp_path / "after", check)
    with cuts.recording():
        train.main(training(tmp_path, tmp_path / "disk" / "run"))
        evaluate.main(evaluating(tmp_path, tmp_path / "disk"))
        fusing.main(fused(tmp_path / "disk"))
        ablate.main(ablating(tmp_path, tmp_path / "disk" / "grid"))
        crossval.main(crossing(tmp_path, tmp_path / "disk" / "cv"))
    assert results == folds == {0, 1, 2}
    assert epochs == {0, 1, 2}
    assert cuts.moments > 30


# -- the disk takes no more ----------------------------------------------------------------------------------------


def training(here: Path, out: Path) -> train.Options:
    return train.Options("tsn", str(here / "feats.zarr"), out, epochs=2, batch_size=4, lr=0.01)


def evaluating(here: Path, disk: Path) -> evaluate.Options:
    return evaluate.Options(
        disk / "run" / "best.pt", str(here / "feats.zarr"), out=disk / "s.h5", segments=(3, 6)
    )


def fused(disk: Path) -> fusing.Options:
    return fusing.Options(
        (disk / "s.h5",), disk / "out" / "fused.h5", submission=disk / "out" / "sub" / "a.json"
    )


def ablating(here: Path, out: Path) -> ablate.Options:
    return ablate.Options(
        agg=("tsn",),
        features=str(here / "feats.zarr"),
        out=out,
        epochs=(1,),
        batch_size=(4,),
        lr=(0.01, 0.02),
        seeds=(0,),
    )


def crossing(here: Path, out: Path) -> crossval.Options:
    lists = {"epochs": (1,), "batch_size": (4,), "seeds": (0,)}
    return crossval.Options(
        agg=("tsn",), features=str(here / "many.zarr"), out=out, folds="2", **lists
    )


def timed_store(path: Path) -> None:
    """A store whose videos can be exported as rows at a constant rate."""
    classes_store(path, videos=4, classes=2)
    store = FeatureStore.open(path, writable=True)
    shape = (4, 1, store.frames_per_video)
    indices = np.broadcast_to(np.arange(shape[2], dtype="<i4"), shape)
    ok = np.full(4, OK, "i1")
    store.commit(
        Outcomes(
            np.arange(4),
            ok,
            [""] * 4,
            np.full(4, shape[2], "<i4"),
            indices,
            indices.astype("<f4") / 2,
        )
    )


def every_step(
    run: Callable[[], object],
    disk: Path,
    before: Callable[[], object],
    code: int = errno.ENOSPC,
    stride: int = 1,
) -> int:
    """Run with a disk that is full from the k-th step on, then again with space; returns the number
    of steps.

    k is the first step of every line of the program that writes (or of one line in `stride`), and
    the last step of all. With `make fuzz` it is every number.
    """
    before()
    with (roomy := FullDisk(disk, math.inf)).refusing():
        run()
    places = roomy.places
    first = {place: step for step, place in reversed([*enumerate(places)])}
    chosen = {*sorted(first.values())[::stride], len(places) - 1}
    for step in range(len(places)) if THOROUGH else sorted(chosen):
        before()
        full = FullDisk(disk, step, code)
        with full.refusing():
            error = ended(run)
        assert full.refused
        assert error is not None
        assert str(disk) in str(error)
        assert f": {os.strerror(code)}; " in str(error)
        assert "run the same command again to continue" in str(error)
        run()
        assert not list(disk.rglob("*.partial"))
    return len(places)


def ended(run: Callable[[], object]) -> RunError | None:
    try:
        run()
    except RunError as error:
        return error
    return None


def emptied(disk: Path) -> Callable[[], None]:
    def empty() -> None:
        shutil.rmtree(disk, ignore_errors=True)
        disk.mkdir()

    return empty


FULL = [(errno.ENOSPC, 1), (errno.EROFS, 13), (errno.EACCES, 14), (errno.EDQUOT, 15)]


@pytest.mark.parametrize(("code", "stride"), FULL)
def test_extract_on_a_disk_that_is_full(code, stride, extraction, tmp_path):
    disk = tmp_path / "disk"
    whole: dict[str, str] = {}

    def run():
        assert extract(extraction) == 0
        assert done_rows(Path(extraction.out)) == list(range(VIDEOS))
        digest = store_digest(Path(extraction.out))
        assert whole.setdefault("digest", digest) == digest

    run()
    assert every_step(run, disk, emptied(disk), code, stride) > 60


def test_train_evaluate_fuse_report_ablate_and_crossval_on_a_disk_that_is_full(
    tmp_path, monkeypatch
):
    # Drawing figures and a page takes most of the time, and has nothing to do with the disk.
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"<svg></svg>")
    )
    monkeypatch.setattr("pipelines.report.page.render", lambda contents, title: f"<p>{contents}")
    classes_store(tmp_path / "feats.zarr", videos=18, classes=6)
    classes_store(tmp_path / "many.zarr")
    disk = tmp_path / "disk"
    assert (
        every_step(lambda: train.main(training(tmp_path, disk / "run")), disk, emptied(disk)) > 15
    )
    assert every_step(lambda: evaluate.main(evaluating(tmp_path, disk)), disk, lambda: None) >= 4
    again = emptied(disk / "out")
    assert every_step(lambda: fusing.main(fused(disk)), disk, again) > 10
    page = report.Options(disk, out=disk / "report.html")
    assert every_step(lambda: report.main(page), disk, lambda: None) >= 4
    assert (
        every_step(
            lambda: ablate.main(ablating(tmp_path, disk / "grid")), disk, emptied(disk / "grid")
        )
        > 20
    )
    assert (
        every_step(
            lambda: crossval.main(crossing(tmp_path, disk / "cv")),
            disk,
            emptied(disk / "cv"),
        )
        > 20
    )


def test_exports_on_a_disk_that_is_full(tmp_path):
    timed_store(tmp_path / "feats.zarr")
    disk = tmp_path / "disk"
    for asked in ({"to": disk / "npy"}, {"to": Path("npy"), "out": disk / "npy"}):
        options = ExportOptions(str(tmp_path / "feats.zarr"), **asked)

        def one_export(options=options):
            shutil.rmtree(disk / "npy", ignore_errors=True)
            assert export(options) == 0
            assert len(list(disk.rglob("*.npy"))) == 4

        assert every_step(one_export, disk, emptied(disk)) > 8


def test_what_libraries_write_themselves_says_the_file_too(tmp_path):
    """torch and HDF5 write by themselves and report little. A limit on the size of files stops them
    in the middle."""
    classes_store(tmp_path / "feats.zarr", videos=18, classes=6)
    train.main(training(tmp_path, tmp_path / "run"))
    checkpoint = Checkpoint.load(tmp_path / "run" / "last.pt")
    many = Scores([f"v{row}" for row in range(300)], ["a", "b"], np.zeros((300, 2)))
    whole = {"c.pt": checkpoint.save, "s.h5": many.save}
    for name, write in whole.items():
        path = tmp_path / name
        write(path)
        size = path.stat().st_size
        path.unlink()
        for limit in range(0, size, max(1, size // 7)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                with pytest.raises(RunError, match=rf"{name}: File too large; raise the limit"):
                    write(path)
            finally:
                resource.setrlimit(
                    resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                )
            assert not path.exists()
            assert not list(tmp_path.glob("*.partial"))


def test_an_export_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    classes_store(tmp_path / "feats.zarr", videos=18, classes=6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(RunError, match=r"e.h5 needs 3.46 kB more, its disk has 10 B free"):
        export(ExportOptions(str(tmp_path / "feats.zarr"), tmp_path / "e.h5"))
    assert not list(tmp_path.glob("e.h5*"))


def test_a_small_disk_that_is_really_full(extraction, tmp_path):
    """A tmpfs, if this machine allows mounting one: the error is the kernel's, and the second run
    has space."""
    mounted = tmp_path / "disk" / "new"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        with pytest.raises(
            RunError,
            match=r"No space left on device; make room on its disk and run the same command",
        ):
            extract(extraction)
        subprocess.run(["mount", "-o", "remount,size=4m", str(mounted)], check=True)
        assert extract(extraction) == 0
        assert done_rows(Path(extraction.out)) == list(range(VIDEOS))
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_finetune_on_a_disk_that_is_full(tmp_path, demo_clips):
    clips = sorted((demo_clips / "exercise_mini" / "clips" / "barbell").glob("*.mp4"))
    for number, clip in enumerate(clips[:4]):
        target = (
            tmp_path / "videos" / ("val" if number == 3 else "train") / "barbell" / f"{number}.mp4"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(clip)
    disk = tmp_path / "disk"
    disk.mkdir()
    chosen = finetune.Options(
        "tsn",
        tmp_path / "videos",
        disk / "run",
        "test_resnet",
        "random",
        epochs=1,
        frames=1,
        decode_workers=1,
    )
    for steps in (0, 5, 9):  # the run folder is train's, where every step is tried
        full = FullDisk(disk, steps)
        with (
            full.refusing(),
            pytest.raises(RunError, match=r"disk.*: No space left on device; make room"),
        ):
            finetune.main(chosen)
    assert finetune.main(chosen) == 0
    assert Checkpoint.load(disk / "run" / "best.pt").metrics["epoch"] == 0
