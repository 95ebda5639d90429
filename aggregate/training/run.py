"""A training run in its folder.

options.json    the options of the command
videos.csv      the videos of the run (aggregate/training/manifest.py)
metrics.csv     a row per epoch; the same numbers go to TensorBoard's events
best.pt         each learner at its best epoch (baseline.pt, control.pt)
last.pt         the state after the last epoch, to resume from
results.json    the final table
"""

from collections.abc import Iterator, Sequence
from dataclasses import InitVar, asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from aggregate.inference import attention_text
from aggregate.metrics import (
    Summary,
    challenge_errors,
    csv_of,
    paired_bootstrap,
    ranks,
    summarize_ranks,
    summary_table,
)
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.learner import Learner
from aggregate.training.loop import fit
from aggregate.training.manifest import VIDEOS, record, refuse_other_data, videos_csv
from aggregate.training.options import to_json
from aggregate.training.sources import Source
from aggregate.training.splits import Chosen, Videos
from extract import InputError, Record
from extract.cli import progress
from extract.durable import (
    LOCK,
    is_leftover,
    os_errors_as_run_error,
    read_record,
    replace_file,
    write_record,
)
from extract.store import difference

# Options that may change when a run is resumed.
_FREE_ON_RESUME = {
    # The device, and options of speed.
    *("out", "device", "placement", "at_once", "workers", "address", "decode_workers"),
    "micro_batch",
    # Paths: the contents of these files are compared instead (aggregate/training/manifest.py).
    *("features", "init", "videos", "root", "labels"),
    "version",
}
_ANOTHER_VERSION = (
    "{out} was started by another version of this program and cannot be resumed (its checkpoints "
    "still open); give another --out, or remove it"
)


def open_folder(options: Any) -> Checkpoint | None:
    """The last checkpoint in the folder of a run, or None if it has none yet.

    InputError if the folder holds other files, a run with other options, or a run of another
    version.
    """
    # A run that ended before its first epoch leaves only files that the same command overwrites; so
    # does one that ended while it wrote the checkpoints of that epoch.
    out = options.folder
    last_path = out / "last.pt"
    ours = ("options.json", VIDEOS, "ray", "events.out", LOCK)
    names = [
        path.name
        for path in out.glob("*")
        if not (path.name.startswith(ours) or is_leftover(path.name))
    ]
    started = (out / "options.json").exists() and all(name.endswith(".pt") for name in names)
    if names and not last_path.exists() and not started:
        raise InputError(f"--out {out} is not empty and holds no run; give another name")
    if names:
        refuse_other_options(out, to_json(options))
    if not last_path.exists():
        return None
    last = Checkpoint.load(last_path)
    if last.data is None or last.training is None:
        raise InputError(_ANOTHER_VERSION.format(out=out))
    return last


def refuse_other_options(out: Path, now: Record) -> None:
    """InputError that lists the differences between `out`/options.json and `now`."""
    recorded = read_record(out / "options.json")
    if recorded.keys() != now.keys():
        raise InputError(_ANOTHER_VERSION.format(out=out))
    recorded, now = (
        {name: value for name, value in options.items() if name not in _FREE_ON_RESUME}
        for options in (recorded, now)
    )
    lines = []
    if "contents_of_features" in now:
        before, after = recorded.pop("contents_of_features"), now.pop("contents_of_features")
        changed = [name for name in after if before.get(name) != after[name]]
        if changed:
            lines.append(
                f"the store's {', '.join(changed)} changed "
                f"({before['videos']} videos then, {after['videos']} now)"
            )
    lines += difference(recorded, now, then="in the folder")
    if lines:
        raise InputError(
            f"{out} holds a run with other options or data:\n  " + "\n  ".join(lines) + "\n"
            "use those to resume it, give another --out, or remove it"
        )


@dataclass
class Run:
    """Learners trained on one source, in one folder.

    The first learner is the requested model, and the others are compared with it. With several
    processes only rank 0 writes.
    """

    options: Any
    learners: list[Learner]
    source: Source
    videos: Videos
    chosen: Chosen
    features: Record  # provenance: backbone, weights, preprocessing
    last: InitVar[Checkpoint | None]  # the last checkpoint of a run that is resumed
    segments: Sequence[int]  # numbers of segments in the final table
    baselines: dict[str, nn.Module] = field(default_factory=dict)  # finished models in that table
    epoch: int = 0
    history: list[Record] = field(default_factory=list)
    _board: SummaryWriter | None = None

    def __post_init__(self, last: Checkpoint | None) -> None:
        """Raises InputError if the data of the run differ from those of `last`."""
        self.out = self.options.folder
        self.recipe, self.writes = self.learners[0].recipe, self.learners[0].rank == 0
        data = record(self.videos, self.chosen, init=self.options.init, recipe=self.recipe)
        self.common = {  # fields of `Checkpoint` that all learners share
            "classes": list(self.videos.classes),
            "features": self.features,
            "frames": self.options.frames,
            "data": data,
        }
        if last is not None:
            refuse_other_data(self.out, last, self.videos, self.features, data)
            self._resume(last)

    def _prefix(self, learner: Learner) -> str:
        """The prefix of a learner's columns in metrics.csv; the first learner has none."""
        return "" if learner is self.learners[0] else f"{learner.file.removesuffix('.pt')}_"

    def _resume(self, last: Checkpoint) -> None:
        """Continue after the epoch of `last`."""
        assert last.training is not None
        self.epoch, self.history = last.training["epoch"], last.training["history"]
        for learner, state in zip(self.learners, last.training["learners"], strict=True):
            best = Checkpoint.load(self.out / learner.file)
            if best.data is None or best.data["videos"] != self.common["data"]["videos"]:
                raise InputError(
                    f"{best.path} is not of the run in {self.out}; restore it, or give another "
                    "--out"
                )
            # The defaults of a head may have changed since: its weights would mean something else.
            built = getattr(learner.net, "options", best.options)
            lines = difference(
                {learner.name: best.options}, {learner.name: built}, then="when it started"
            )
            if lines:
                raise InputError(
                    f"{self.out} holds a model with other options:\n  " + "\n  ".join(lines) + "\n"
                    "give these as flags to continue it, or another --out"
                )
            learner.load_state_dict(state, best.state_dict)
        if self.writes:
            print(
                f"resuming  {self.out}: {self.epoch} of {self.recipe.epochs} epochs are done",
                flush=True,
            )

    def train(self) -> None:
        """Train all remaining epochs; each is on disk before the next begins."""
        if self.writes:
            if not self.epoch:
                replace_file(self.out / VIDEOS, videos_csv(self.videos, self.chosen))
            write_record(self.out / "options.json", to_json(self.options))
        if self.epoch >= self.recipe.epochs:
            return
        steps = self.learners[0].steps_per_epoch
        total, done = self.recipe.epochs * steps, self.epoch * steps
        bar = progress(total=total, initial=done, unit="step", disable=not self.writes)
        try:
            with bar:
                for epoch in fit(self.learners, self.source, start=self.epoch, on_step=bar.update):
                    row = self.end_epoch(*epoch)
                    bar.set_postfix_str(
                        f"loss {row['loss']:.3f}, val top-1 {100 * row['val_top1']:.2f} %",
                        refresh=False,
                    )
        except KeyboardInterrupt:
            if self.writes:
                print(
                    f"\nstopped; {self.out / 'last.pt'} holds {self.epoch} epochs, the same "
                    "command resumes",
                    flush=True,
                )
            raise
        finally:
            if self._board is not None:
                self._board.close()

    def end_epoch(self, epoch: int, seconds: float, waited: float) -> Record:
        """Write checkpoints and measures of an epoch; returns its row of metrics.csv."""
        row: Record = {
            "epoch": epoch,
            "lr": self.recipe.lr * self.recipe.factor(epoch),
            "seconds": round(seconds, 3),
            "waited": round(waited / seconds, 3),
        }
        for learner in self.learners:
            label_ranks, classes = (
                ranks(learner.scores, self.source.labels),
                learner.scores.shape[1],
            )
            measures = {
                "loss": learner.loss,
                "val_top1": float((label_ranks == 0).mean()),
                "val_top5": float((label_ranks < min(5, classes)).mean()),
                "val_average_error": float(challenge_errors(label_ranks, classes).mean()),
            }
            row |= {f"{self._prefix(learner)}{name}": value for name, value in measures.items()}
        row |= self.source.attention(self.learners[0])
        self.history.append(row)
        self.epoch = epoch + 1
        if self.writes:
            self.save(row)
        return row

    def save(self, row: Record) -> None:
        for learner in self.learners:
            if learner.best_epoch == self.epoch - 1:
                self._checkpoint(learner, learner.best_state).save(self.out / learner.file)
        first = self.learners[0]
        states = [learner.state_dict() for learner in self.learners]
        training = {"epoch": self.epoch, "history": self.history, "learners": states}
        self._checkpoint(first, first.tested_state(), training).save(self.out / "last.pt")
        replace_file(self.out / "metrics.csv", csv_of(self.history))
        with os_errors_as_run_error(self.out / "events.out.tfevents"):
            if self._board is None:
                self._board = SummaryWriter(str(self.out), purge_step=self.epoch - 1)
            for name, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, self.epoch - 1)
            self._board.flush()

    def _checkpoint(
        self, learner: Learner, state: Record, training: dict | None = None
    ) -> Checkpoint:
        row = self.history[learner.best_epoch]
        metrics = {
            name: row[f"{self._prefix(learner)}{name}"]
            for name in ("val_top1", "val_top5", "val_average_error")
        }
        metrics["epoch"] = learner.best_epoch
        net: Any = learner.net
        return Checkpoint(
            **self.common, options=net.options, metrics=metrics, state_dict=state, training=training
        )

    def report(self) -> None:
        """Print and write the final table: each model at its best epoch, with each number of
        segments, and the differences to the first model."""
        for learner in self.learners:
            learner.load_best()
        first, labels, groups = self.learners[0], self.source.labels, self.source.groups
        models = {learner.name: learner.model for learner in self.learners} | self.baselines
        epochs = ", ".join(f"{learner.name} {learner.best_epoch + 1}" for learner in self.learners)
        rows: list[tuple[list[str], Summary]] = []
        differences: list[str] = []
        results: Record = {name: {} for name in models}
        for segments in self.segments:
            tested = self.source.validate(list(models.values()), segments, first)
            label_ranks = {
                name: ranks(logits, labels) for name, logits in zip(models, tested, strict=True)
            }
            classes = tested[0].shape[1]
            for name, values in label_ranks.items():
                summary = summarize_ranks(values, labels, classes, groups)
                rows.append(([name, str(segments)], summary))
                results[name][segments] = asdict(summary)
            for line in _differences(label_ranks, classes, groups):
                differences.append(f"{segments} segments: {line}")
        lines = [
            f"\n{self.out}: {len(labels):,} validation videos; each model at its best epoch, "
            f"chosen on the same videos ({epochs})",
            summary_table(["model", "segments"], rows),
            *differences,
        ]
        measured = self.source.attention(first)
        if "changed" in measured:
            lines.append(f"attention: {attention_text(measured)}")
        if self.writes:
            print("\n".join(lines))
            write_record(self.out / "results.json", results)
            files = ", ".join(str(self.out / learner.file) for learner in self.learners)
            print(f"checkpoints: {files}", flush=True)


def _differences(
    label_ranks: dict[str, np.ndarray], classes: int, groups: np.ndarray
) -> Iterator[str]:
    """The first model minus each other model, in points, paired over the same videos."""
    (first, ours), *others = label_ranks.items()
    for name, theirs in others:
        top1 = paired_bootstrap(ours == 0, theirs == 0, groups)
        our_errors, their_errors = (challenge_errors(each, classes) for each in (ours, theirs))
        error = paired_bootstrap(our_errors, their_errors, groups)
        yield f"{first} - {name}: top-1 {top1}, average error {error} (points)"
