"""Change the most important lines of the program, one at a time, and see whether a test fails.

    python tests/benchmarks/mutate.py                     all mutations, one after the other
    python tests/benchmarks/mutate.py --only splits.py    those of files whose path has this in it
    python tests/benchmarks/mutate.py --at-once 8         eight at a time, each in a copy of its own

A mutation that no test notices has survived: a test is missing. The tree itself is never changed:
tracked and new files are copied to a temporary folder, and the lines are changed there. The tests
that a mutation names are first run without it, since tests that fail anyway would prove nothing.
The exit status is 0 if none survived, 1 if some did, and 2 if a mutation cannot be tried: its line
is no longer in its file exactly once, or its tests do not run.
"""

import argparse
import contextlib
import multiprocessing
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LONGEST = 300  # seconds; a mutation whose tests take longer hangs, and that is noticed
# Imported once, before each run is forked off, which saves most of its time.
PRELOADED = ["torch", "timm", "zarr", "sklearn.model_selection", "pandas", "h5py", "av"]


class Mutation(NamedTuple):
    file: str
    old: str  # in the file exactly once
    new: str
    tests: str  # arguments of pytest


READER, PACKETS = "extract/decode/reader.py", "extract/decode/packets.py"
JOBS, TRANSFORM = "extract/decode/jobs.py", "extract/decode/transform.py"
SAMPLING, WINDOWS = "extract/sampling.py", "extract/listing/windows.py"
STORE, SHARDS = "extract/store/feature_store.py", "extract/store/shards.py"
DRIVER, RECONCILE = "extract/workers/driver.py", "extract/workers/reconcile.py"
SPLITS, METRICS = "aggregate/training/splits.py", "aggregate/metrics.py"
FOLDS, NESTED = "aggregate/ablation/folds.py", "aggregate/ablation/nested.py"
LEARNER, RECIPES = "aggregate/training/learner.py", "aggregate/training/recipes.py"
CHECKPOINT, MANIFEST = "aggregate/training/checkpoint.py", "aggregate/training/manifest.py"
FEATURES, SCORES = "aggregate/data/features.py", "aggregate/scores.py"
SEARCH, FUSE, ALIGN = "ensemble/search.py", "ensemble/fuse.py", "ensemble/align.py"

DECODE_TESTS = "tests/extract/test_decode.py"
SPAN_TESTS = "tests/extract/test_spans.py"
VIEW_TESTS = "tests/extract/test_transform.py"
STORE_TESTS = "tests/extract/test_store.py"
RECONCILE_TESTS = "tests/extract/test_reconcile.py"
TRAIN_TESTS = "tests/aggregate/test_train.py"
LEARNER_TESTS = "tests/aggregate/test_learner.py"
CROSSVAL_TESTS = "tests/aggregate/test_crossval.py"
METRICS_TESTS = "tests/aggregate/test_metrics.py"
SEARCH_TESTS = "tests/ensemble/test_search.py"

MUTATIONS = [
    # -- decode ----------------------------------------------------------------------------------
    Mutation(PACKETS, "if not packet.is_discard:", "if True:", f"{DECODE_TESTS} -k edit_list"),
    Mutation(
        PACKETS,
        "stop = max(stop, packet.pts + (packet.duration or 0))",
        "stop = max(stop, packet.pts)",
        "tests/extract/test_clock.py -k last_frame_goes",
    ),
    Mutation(
        PACKETS,
        "if self.pts[key] <= self.pts[number]]",
        "if True]",
        f"{DECODE_TESTS} -k wanted_frames_alone",
    ),
    Mutation(
        PACKETS,
        '"DEFAULT" if position in requested else "NONREF"',
        '"DEFAULT"',
        f"{DECODE_TESTS} -k few_frames_cost",
    ),
    Mutation(
        PACKETS, "if start > position + 1:", "if False:", f"{DECODE_TESTS} -k few_frames_cost"
    ),
    Mutation(
        PACKETS,
        "np.rot90(picture, turns) if turns",
        "np.rot90(picture, -turns) if turns",
        f"{DECODE_TESTS} -k display_rotation",
    ),
    Mutation(
        PACKETS, "if packet.is_corrupt:", "if False:", "tests/extract/test_clock.py -k lost_packet"
    ),
    Mutation(
        PACKETS,
        "self.end + max(last_frame, 0.0) + 1e-3",
        "self.end + 1e-3",
        f"{SPAN_TESTS} -k another_frame_would",
    ),
    Mutation(
        READER,
        "self._take_corrupt = bool(self._corrupt.all())",
        "self._take_corrupt = True",
        "tests/extract/test_clock.py -k patch_up",
    ),
    Mutation(
        READER,
        "(checked < 0) | (checked >= count)",
        "(checked < 0) | (checked > count)",
        f"{DECODE_TESTS} -k not_there_is_named",
    ),
    Mutation(READER, "os.stat(path).st_mtime_ns", "0", f"{SPAN_TESTS} -k file_that_changed"),
    Mutation(
        JOBS,
        "np.clip(middles - (length - 1) // 2, 0",
        "np.clip(middles - length // 2, 0",
        f"{VIEW_TESTS} -k clips_are_neighbors",
    ),
    Mutation(
        JOBS,
        "augmentation_rng(plan.seed, self._row_id, name)",
        "augmentation_rng(0, self._row_id, name)",
        f"{VIEW_TESTS} -k another_id",
    ),
    Mutation(
        TRANSFORM,
        "if not flip:",
        "if True:",
        f"{VIEW_TESTS} -k views_are",
    ),
    Mutation(
        TRANSFORM,
        "(height - tall) // 4, (width - wide) // 4",
        "(height - tall) // 2, (width - wide) // 2",
        f"{VIEW_TESTS} -k ten_crops",
    ),
    # -- which frames and windows ----------------------------------------------------------------
    Mutation(
        SAMPLING,
        "(2 * np.arange(num_segments, dtype=np.int64) + 1)",
        "(2 * np.arange(num_segments, dtype=np.int64))",
        "tests/extract/test_sampling.py",
    ),
    Mutation(
        SAMPLING,
        "np.maximum(np.diff(edges), 1)",
        "np.maximum(np.diff(edges) - 1, 1)",
        "tests/extract/test_sampling.py",
    ),
    Mutation(
        WINDOWS, "2 * remainder >= window", "2 * remainder > window", f"{SPAN_TESTS} -k windows"
    ),
    Mutation(
        WINDOWS,
        "2 * remainder >= window",
        "2 * remainder >= window - 2",
        f"{SPAN_TESTS} -k windows",
    ),
    Mutation(
        WINDOWS,
        "group=video.group or file,",
        "group=video.group,",
        f"{SPAN_TESTS} -k windows_of_files",
    ),
    Mutation(
        FEATURES,
        "np.random.default_rng((seed, epoch, 1))",
        "np.random.default_rng((seed, 1))",
        "tests/aggregate/test_features.py",
    ),
    # -- the store -------------------------------------------------------------------------------
    Mutation(
        "extract/store/runs.py",
        "sorted(recorded.keys() | current.keys())",
        'sorted((recorded.keys() | current.keys()) - {"preprocessing"})',
        f"{RECONCILE_TESTS} -k what_only_the_loaded",
    ),
    Mutation(
        DRIVER,
        "check_provenance(store, info.provenance)",
        "pass",
        f"{RECONCILE_TESTS} -k what_only_the_loaded",
    ),
    Mutation(
        DRIVER,
        "                lock.ensure_held()\n",
        "                pass\n",
        f"{RECONCILE_TESTS} -k lost_the_store",
    ),
    Mutation(
        DRIVER,
        "\n            lock.ensure_held()\n",
        "\n",
        f"{RECONCILE_TESTS} -k lost_the_store",
    ),
    Mutation(
        "extract/store/locks.py",
        "if not take_lock(self._file):",
        "if take_lock(self._file) is None:",
        f"{STORE_TESTS} -k second_run",
    ),
    Mutation(
        "extract/store/remote.py",
        "> 0.75 * LEASE_TIMEOUT",
        "> 75 * LEASE_TIMEOUT",
        "tests/extract/test_remote.py -k slept",
    ),
    Mutation(
        SHARDS,
        "if google_crc32c.value(tail[:index_bytes]) !=",
        "if 0 >",
        f"{STORE_TESTS} -k damage_is_found",
    ),
    Mutation(
        SHARDS,
        "intact.append(google_crc32c.value(features) ==",
        "intact.append(True or 0 ==",
        f"{STORE_TESTS} -k damage_is_found",
    ),
    Mutation(
        SHARDS,
        "or size != self.size(videos)",
        "or False",
        f"{STORE_TESTS} -k damage_is_found",
    ),
    Mutation(
        SHARDS,
        "if videos < self._videos[block]:",
        "if False:",
        f"{RECONCILE_TESTS} -k fewer_videos",
    ),
    Mutation(
        STORE,
        "if recorded not in (None, checksum(attributes)):",
        "if False:",
        f"{STORE_TESTS} -k changed_attribute",
    ),
    Mutation(
        STORE,
        "return ~repeated & (indices >= 0)",
        "return ~repeated",
        f"{STORE_TESTS} -k mask",
    ),
    Mutation(
        STORE,
        "rows, values = rows[order], values[order]",
        "rows = rows[order]",
        f"{STORE_TESTS} -k outcomes_of",
    ),
    Mutation(STORE, "if pending.any():", "if pending.all():", f"{STORE_TESTS} -k pending"),
    Mutation(
        STORE, "status < DROPPED", "status <= DROPPED", f"{RECONCILE_TESTS} -k taken_out_is_listed"
    ),
    Mutation(
        "extract/store/corrections.py",
        'if record.pop("checksum") == checksum(record):',
        'if record.pop("checksum"):',
        f"{RECONCILE_TESTS} -k damaged_correction",
    ),
    Mutation(
        RECONCILE,
        'changed = (values != "") & (values != before)',
        "changed = values != before",
        f"{RECONCILE_TESTS} -k 'label or kept'",
    ),
    Mutation(
        RECONCILE,
        'store.append(**columns | {"labels": labels[columns["labels"]]})',
        "store.append(**columns)",
        f"{RECONCILE_TESTS} -k new_rows_go",
    ),
    Mutation(
        RECONCILE,
        'columns | {"labels": labels})\n        if',
        "columns)\n        if",
        f"{RECONCILE_TESTS} -k 'label or class'",
    ),
    Mutation(
        "extract/workers/changed.py",
        "changed[position] = source[:2] != tuple(recorded[rows[position]])",
        "changed[position] = False",
        f"{RECONCILE_TESTS} -k same_size",
    ),
    # -- splits and folds ------------------------------------------------------------------------
    Mutation(
        SPLITS,
        'train = ~val & (splits != "test")',
        "train = ~val",
        f"{TRAIN_TESTS} -k without_a_training_split",
    ),
    Mutation(
        SPLITS,
        "(train | val) & held_out",
        "held_out",
        f"{TRAIN_TESTS} -k group_can_be",
    ),
    Mutation(
        SPLITS,
        "train & labeled & (store.status != FAILED)",
        "train & labeled",
        f"{TRAIN_TESTS} -k failed_videos",
    ),
    Mutation(
        SPLITS,
        "(store.labels >= 0) & store.listed",
        "store.labels >= 0",
        f"{RECONCILE_TESTS} -k readers_leave_out",
    ),
    Mutation(
        SPLITS,
        "(after[present] < total[present]).all()",
        "(after[present] <= total[present]).all()",
        f"{TRAIN_TESTS} -k last_videos",
    ),
    Mutation(
        SCORES,
        "group or group_of_file.get(file, file)",
        "group or file",
        f"tests/aggregate/test_scores.py {CROSSVAL_TESTS} -k 'groups or windows'",
    ),
    Mutation(
        FOLDS,
        "train = train[store.usable[train]]",
        "train = train",
        f"{CROSSVAL_TESTS} -k failed_videos",
    ),
    Mutation(
        FOLDS,
        "tested = ~np.isin(units, units[taken])",
        "tested = ~np.isin(np.arange(len(rows)), taken)",
        "tests/aggregate/test_protocols.py -k a_draw_has",
    ),
    Mutation(
        FOLDS,
        "(StratifiedGroupKFold, groups) if has_groups(keys) else",
        "(StratifiedGroupKFold, groups) if False else",
        f"{CROSSVAL_TESTS} -k split_no_group",
    ),
    Mutation(
        NESTED,
        "learners, source = trainer.make_learners(group, fold.inner, fold.held_out_rows)",
        "learners, source = trainer.make_learners(group, fold.train, fold.held_out_rows)",
        f"{CROSSVAL_TESTS} -k bit_for_bit",
    ),
    Mutation(NESTED, "else epoch + 1 for", "else epoch for", f"{CROSSVAL_TESTS} -k table_scores"),
    # -- metrics ---------------------------------------------------------------------------------
    Mutation(
        METRICS,
        "(np.arange(classes) < truth)",
        "(np.arange(classes) > truth)",
        f"{METRICS_TESTS} -k 'tie or obvious'",
    ),
    Mutation(
        METRICS,
        "np.where(failed, classes, ahead.sum(axis=1))",
        "ahead.sum(axis=1)",
        f"{METRICS_TESTS} -k 'obvious or failed'",
    ),
    Mutation(
        METRICS,
        "(label_ranks >= min(5, classes)).astype(float)",
        "(label_ranks > min(5, classes)).astype(float)",
        f"{METRICS_TESTS} -k 'challenge'",
    ),
    Mutation(
        METRICS,
        "np.count_nonzero(counts, axis=-1)",
        "counts.shape[-1]",
        f"{METRICS_TESTS} -k 'mean_class or one_by_one'",
    ),
    Mutation(
        METRICS,
        "np.percentile(drawn, [2.5, 97.5])",
        "np.percentile(drawn, [5, 95])",
        f"{METRICS_TESTS} -k 'intervals or one_by_one'",
    ),
    Mutation(
        METRICS,
        "return units if len(names) > 1 else",
        "return units if len(names) > 2 else",
        f"{METRICS_TESTS} -k two_groups",
    ),
    # -- the ensemble ----------------------------------------------------------------------------
    Mutation(
        SEARCH,
        "fit(ranking, fold != held_out)",
        "fit(ranking, fold >= 0)",
        f"{SEARCH_TESTS} -k own_videos",
    ),
    Mutation(
        SEARCH,
        "self.against_equal.high < 0",
        "self.against_equal.value < 0",
        f"{SEARCH_TESTS} -k whole_interval",
    ),
    Mutation(
        SEARCH,
        "units = independent_units(groups)  # in",
        "units = np.arange(len(groups))  # in",
        SEARCH_TESTS,
    ),
    Mutation(
        FUSE,
        "] = -np.inf  # failed rows must",
        "] = 1  # failed rows must",
        "tests/ensemble/test_fuse.py",
    ),
    Mutation(
        ALIGN,
        "self.lacking[used].any(axis=0)",
        "self.lacking[used].all(axis=0)",
        "tests/ensemble/test_fuse.py",
    ),
    Mutation(
        "pipelines/steps.py",
        'if "search" in record and not record["search"]["beats_equal"]:',
        "if False:",
        "tests/pipelines/test_steps.py",
    ),
    Mutation(
        "pipelines/kinetics700.py",
        'work, split="val", weights=',
        'work, split="test", weights=',
        "tests/pipelines/test_kinetics700.py -k weights",
    ),
    Mutation(
        "pipelines/kinetics700.py",
        "split=last, weights=weights,",
        'split=last, weights="search",',
        "tests/pipelines/test_kinetics700.py -k weights",
    ),
    # -- training --------------------------------------------------------------------------------
    Mutation(
        LEARNER,
        "self.recipe, epoch + step / self.steps_per_epoch)",
        "self.recipe, epoch)",
        f"{LEARNER_TESTS} -k 'not balance and not precision'",
    ),
    Mutation(
        LEARNER,
        "if error < self.best_error:",
        "if error <= self.best_error:",
        f"{LEARNER_TESTS} -k 'not balance and not precision'",
    ),
    Mutation(
        LEARNER,
        "loss * (self.world / whole)",
        "loss * (self.world / len(labels))",
        f"{LEARNER_TESTS} -k 'not balance and not precision'",
    ),
    Mutation(
        LEARNER,
        "loss * (self.world / whole)",
        "loss * (self.world / len(labels))",
        "tests/aggregate/test_finetune.py -k micro",
    ),
    Mutation(
        LEARNER,
        "= (self.seed, epoch, step)\n",
        "= (self.seed, step)\n",
        f"{LEARNER_TESTS} -k 'not balance and not precision'",
    ),
    Mutation(
        LEARNER,
        'self.best_error, self.best_epoch = state["best_error"], state["best_epoch"]',
        'self.best_epoch = state["best_epoch"]',
        f"{TRAIN_TESTS} -k resumed",
    ),
    Mutation(
        LEARNER,
        'self.optimizer.load_state_dict(state["learner"]["optimizer"])',
        "pass",
        f"{TRAIN_TESTS} -k resumed",
    ),
    Mutation(
        RECIPES,
        "epoch >= milestone for",
        "epoch > milestone for",
        f"{LEARNER_TESTS} -k 'not balance and not precision'",
    ),
    Mutation(
        RECIPES,
        'epoch * changes["epochs"] / chosen.epochs',
        "epoch",
        f"{LEARNER_TESTS} -k 'not balance and not precision'",
    ),
    Mutation(
        RECIPES,
        'p.ndim < 2], "weight_decay": 0.0',
        'p.ndim < 2], "weight_decay": chosen.weight_decay',
        f"{LEARNER_TESTS} -k 'not balance and not precision'",
    ),
    Mutation(
        RECIPES,
        'chosen.factor(epoch) * group["lr_scale"]',
        "chosen.factor(epoch)",
        f"{LEARNER_TESTS} -k 'not balance and not precision'",
    ),
    Mutation(
        "aggregate/training/sources.py",
        "return [logits.mean(axis=1) for logits in crops]",
        "return [logits[:, 0] for logits in crops]",
        f"{TRAIN_TESTS} -k mean_over_crops",
    ),
    Mutation(
        "aggregate/evaluate.py",
        "crops.mean(axis=1),",
        "crops[:, 0],",
        f"{TRAIN_TESTS} -k crops_are_averaged",
    ),
    Mutation(
        CHECKPOINT,
        '("backbone", "weights", "preprocessing", "clips")',
        '("backbone", "weights", "clips")',
        f"{TRAIN_TESTS} -k differ_in_any",
    ),
    Mutation(
        CHECKPOINT,
        '("backbone", "weights", "preprocessing", "clips")',
        '("backbone", "preprocessing", "clips")',
        f"{TRAIN_TESTS} -k differ_in_any",
    ),
    Mutation(
        CHECKPOINT,
        "if damaged := records.testzip():",
        "if damaged := None:",
        f"{TRAIN_TESTS} -k flipped_byte",
    ),
    Mutation(
        "aggregate/models.py",
        "target.weight[row] = weight[source_rows[name]]",
        "target.weight[row] = 0 * weight[source_rows[name]]",
        "tests/aggregate/test_finetune.py -k then_extract",
    ),
    Mutation(
        CHECKPOINT,
        "if (mapped == -2).any():",
        "if False:",
        f"{TRAIN_TESTS} -k matched_by_class",
    ),
    Mutation(
        MANIFEST,
        'if hashlib.sha256(content).hexdigest() != last.data["videos"]:',
        "if False:",
        "tests/test_matrix.py -k files_of_another_run",
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="a part of the path of the files to change")
    parser.add_argument("--at-once", type=int, default=1, help="how many at a time")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # removes the copies, as Ctrl-C does
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.file]
    errors = [error for error in map(cannot_be_applied, chosen) if error]
    if errors or not chosen:
        print("\n".join(errors) or f"no mutation is of a file with {options.only!r} in its path")
        return 2
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1"}  # no bytecode from before a change
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(options.at_once):
            trees.put(copy_of_the_tree(Path(folder) / str(number)))
        with ThreadPoolExecutor(options.at_once) as pool:
            distinct = list(dict.fromkeys(mutation.tests for mutation in chosen))
            clean = list(pool.map(partial(status_of, trees, context), distinct))
            errors = [
                f"the tests do not pass without a mutation: {tests} (pytest's status {status})"
                for tests, status in zip(distinct, clean, strict=True)
                if status != 0
            ]
            print("\n".join(errors), flush=True)
            passing = {tests for tests, status in zip(distinct, clean, strict=True) if status == 0}
            tried = [mutation for mutation in chosen if mutation.tests in passing]
            survived = []
            statuses = pool.map(lambda one: status_of(trees, context, one.tests, one), tried)
            for mutation, status in zip(tried, statuses, strict=True):
                verdict = {0: "SURVIVED", 1: "noticed", None: "noticed (hangs)"}.get(status)
                if verdict is None:
                    errors.append(f"pytest ends with status {status}: {mutation}")
                survived += [mutation] if status == 0 else []
                print(
                    f"{verdict or 'ERROR':10} {mutation.file}: {mutation.old.strip()}", flush=True
                )
    print(f"\n{len(tried)} mutations, {len(survived)} survived")
    for mutation in survived:
        print(f"  {mutation.file}: {mutation.old.strip()} -> {mutation.new.strip()}")
    print("\n".join(errors))
    return 2 if errors else 1 if survived else 0


def cannot_be_applied(mutation: Mutation) -> str:
    """Why a mutation cannot be made; empty if it can."""
    count = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
    return "" if count == 1 else f"{mutation.file} has this {count} times, not once: {mutation.old}"


def copy_of_the_tree(folder: Path) -> Path:
    """Copy all tracked and new files, with their changes."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return folder


def status_of(trees, context, tests: str, mutation: Mutation | None = None) -> int | None:
    """The exit status of pytest with a mutation, in one of the copies; None if it hangs."""
    tree = trees.get()
    process = context.Process(target=run_tests, args=(str(tree), tests))
    file = tree / mutation.file if mutation else None
    before = file.read_text(encoding="utf-8") if file else ""
    try:
        if file and mutation:
            file.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
        process.start()
        process.join(LONGEST)
        return process.exitcode
    finally:
        if process.pid:
            with contextlib.suppress(ProcessLookupError):  # with its children
                os.killpg(process.pid, signal.SIGKILL)
        if file:
            file.write_text(before, encoding="utf-8")
        trees.put(tree)


def run_tests(tree: str, tests: str) -> None:
    """In a process of its own: run pytest on a copy, and end with its status."""
    import pytest

    os.setsid()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = tree
    sys.path[:] = [tree, *(path for path in sys.path if Path(path) != ROOT)]
    sys.dont_write_bytecode = True
    output = os.open("tests.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    # Plugins that were imported before cannot be rewritten by pytest, and need not be.
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider"]
    status = pytest.main(["-x", "-q", *quiet, *shlex.split(tests)])
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
