"""A run in its folder: options.json, metrics.csv, TensorBoard's events, best.pt, last.pt,
results.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from aggregate.metrics import Summary, challenge_errors, csv_of, paired_bootstrap, ranks, summarize
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.learner import Learner
from aggregate.training.loop import fit
from aggregate.training.manifest import VIDEOS
from aggregate.training.options import plain
from aggregate.training.sources import Source, attention_text
from extract import InputError
from extract.cli import progress
from extract.durable import LOCK, is_leftover, os_errors_as_run_error, replace_file
from extract.store import difference

# Below this |s F_o| / |F| attention changes nothing that matters.


# Where a command may go on with another value: they say where and how fast, not what.
_FREE_ON_RESUME = {
    "out",
    "device",
    "placement",
    "at_once",
    "workers",
    "address",
    "decode_workers",
    "micro_batch",
}
# Where things lie: what they hold is compared instead (aggregate/training/manifest.py).
_FREE_ON_RESUME |= {"features", "init", "videos", "root", "labels", "version"}


ANOTHER_VERSION = (
    "{out} was begun by another version of this program, and what it left half done is not continued (its checkpoints "
    "still open); give another --out, or remove it"
)


def open_folder(out: Path, options: Any) -> Checkpoint | None:
    """The last checkpoint of the run in `out`, None if it has none yet.

    InputError for a folder of anything else, of a run with other options, or of a run of another
    version.
    """
    # A run that ended before its first epoch leaves nothing that others could not overwrite; one
    # that ended while it wrote that epoch leaves checkpoints, which the same command writes again.
    last, begun = out / "last.pt", (out / "options.json").exists()
    ours = ("options.json", VIDEOS, "ray", "events.out", LOCK)
    names = [
        path.name
        for path in out.glob("*")
        if not (path.name.startswith(ours) or is_leftover(path.name))
    ]
    foreign = [name for name in names if not name.endswith(".pt")]
    if not last.exists() and names and (foreign or not begun):
        raise InputError(f"--out {out} is not empty and holds no run; give another name")
    if names:
        refuse_other_options(out, plain(options))
    return _of_this_version(out, Checkpoint.load(last)) if last.exists() else None


def _of_this_version(out: Path, last: Checkpoint) -> Checkpoint:
    if last.data is None or last.training is None:
        raise InputError(ANOTHER_VERSION.format(out=out))
    return last


def refuse_other_options(out: Path, now: dict[str, Any]) -> None:
    """InputError that lists what differs between `out`/options.json and `now`."""
    recorded = json.loads((out / "options.json").read_text(encoding="utf-8"))
    if recorded.keys() != now.keys():
        raise InputError(ANOTHER_VERSION.format(out=out))
    recorded, now = (
        {k: v for k, v in side.items() if k not in _FREE_ON_RESUME} for side in (recorded, now)
    )
    lines = []
    if "contents_of_features" in now:
        before, after = recorded.pop("contents_of_features"), now.pop("contents_of_features")
        if changed := [name for name in after if before.get(name) != after[name]]:
            lines.append(
                f"the store's {', '.join(changed)} are others now "
                f"({before['videos']} videos then, {after['videos']} now)"
            )
    lines += [line.replace("in the store", "in the folder") for line in difference(recorded, now)]
    if lines:
        raise InputError(
            f"{out} holds a run with other options or data:\n  " + "\n  ".join(lines) + "\n"
            "use those to resume it, give another --out, or remove it"
        )


@dataclass
class Run:
    """Learners trained on one source in one folder. The first is what was asked for, the others it
    is compared with.

    `common` are the fields of `Checkpoint` that all share, `segments` the numbers of frames of the
    final table, and `references` are finished models, by name, that are in that table too. Only the
    process of rank 0 writes.
    """

    out: Path
    options: Any
    learners: list[Learner]
    source: Source
    common: dict[str, Any]
    segments: Sequence[int]
    references: dict[str, nn.Module] = field(default_factory=dict)
    videos_csv: bytes = b""  # the list of videos, for the folder
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    _board: SummaryWriter | None = None

    def __post_init__(self) -> None:
        self.recipe, self.writes = self.learners[0].recipe, self.learners[0].rank == 0

    def _prefix(self, learner: Learner) -> str:
        """Before a learner's columns in metrics.csv; the first one's have none."""
        return "" if learner is self.learners[0] else f"{learner.file.removesuffix('.pt')}_"

    def resume(self, last: Checkpoint | None) -> None:
        """Go on where `last` stopped."""
        if last is None:
            return
        assert last.training is not None
        state = last.training
        self.epoch, self.history = state["epoch"], state["history"]
        for learner, kept in zip(self.learners, state["learners"], strict=True):
            best = Checkpoint.load(self.out / learner.file)
            if best.data is None or best.data["videos"] != self.common["data"]["videos"]:
                raise InputError(
                    f"{best.path} is not of the run in {self.out}; restore it, or give another --out"
                )
            # Defaults of a head may have changed since: its weights would mean something else.
            built = getattr(learner.net, "options", best.options)
            if lines := difference({learner.name: best.options}, {learner.name: built}):
                lines = [line.replace("in the store", "when it was begun") for line in lines]
                raise InputError(
                    f"{self.out} holds a model with other options:\n  " + "\n  ".join(lines) + "\n"
                    "give these as flags to go on with it, or another --out"
                )
            learner.load_state_dict(kept, best.state_dict)
        if self.writes:
            print(
                f"resuming  {self.out}: {self.epoch} of {self.recipe.epochs} epochs are done",
                flush=True,
            )

    def train(self) -> None:
        """All epochs that are left; each is on the disk before the next begins."""
        if self.writes:
            if not self.epoch:
                replace_file(self.out / VIDEOS, self.videos_csv)
            replace_file(
                self.out / "options.json", json.dumps(plain(self.options), indent=1) + "\n"
            )
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
                words = (
                    f"{self.out / 'last.pt'} holds {self.epoch} epochs, the same command resumes"
                )
                print(f"\nstopped; {words}", flush=True)
            raise
        finally:
            if self._board is not None:
                self._board.close()

    def end_epoch(self, epoch: int, seconds: float, waited: float) -> dict[str, Any]:
        """Write everything that an epoch leaves; its row of metrics.csv."""
        row: dict[str, Any] = {"epoch": epoch, "lr": self.recipe.lr * self.recipe.factor(epoch)}
        row["seconds"], row["waited"] = round(seconds, 3), round(waited / seconds, 3)
        for learner in self.learners:
            prefix, labels = self._prefix(learner), self.source.labels
            places, classes = ranks(learner.scores, labels), learner.scores.shape[1]
            row[f"{prefix}loss"] = learner.loss
            row[f"{prefix}val_top1"] = float((places == 0).mean())
            row[f"{prefix}val_top5"] = float((places < min(5, classes)).mean())
            row[f"{prefix}val_average_error"] = float(challenge_errors(places, classes).mean())
        row |= self.source.attention(self.learners[0].model)
        self.history.append(row)
        self.epoch = epoch + 1
        if self.writes:
            self.save(row)
        return row

    def save(self, row: dict[str, Any]) -> None:
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
        self, learner: Learner, state: dict[str, Any], training: dict | None = None
    ) -> Checkpoint:
        row = self.history[learner.best_epoch]
        names = ("val_top1", "val_top5", "val_average_error")
        metrics = {name: row[f"{self._prefix(learner)}{name}"] for name in names} | {
            "epoch": learner.best_epoch
        }
        net: Any = learner.net
        return Checkpoint(
            **self.common, options=net.options, metrics=metrics, state_dict=state, training=training
        )

    # -- after -----------------------------------------------------------------------------------------------------

    def report(self) -> None:
        """The final table: every model at its best epoch, with few and with all segments, and the
        differences."""
        for learner in self.learners:
            learner.load_best()
        contestants = {one.name: one.model for one in self.learners} | self.references
        names, models, labels = list(contestants), list(contestants.values()), self.source.labels
        results: dict[str, Any] = {}
        width = max(map(len, names))
        lines = [
            f"\n{self.out}: {len(labels):,} validation videos; each model at its best epoch, chosen on the same videos "
            f"({', '.join(f'{one.name} {one.best_epoch + 1}' for one in self.learners)})",
            f"{'model':<{width}} segments {Summary.header()}",
        ]
        for segments in self.segments:
            logits = self.source.validate(models, segments)
            for name, scores in zip(names, logits, strict=True):
                summary = summarize(scores, labels, self.source.groups)
                lines.append(f"{name:<{width}} {segments:>8} {summary}")
                results.setdefault(name, {})[segments] = asdict(summary)
            lines += _differences(
                names, logits, labels, self.source.groups, f"{'':<{width}} {segments:>8}"
            )
        lines.append(f"intervals: 95 %, bootstrap over {summary.resampled()}")
        found = self.source.attention(models[0])
        if "changed" in found:
            lines.append(f"attention: {attention_text(found)}")
        if self.writes:
            print("\n".join(lines))
            replace_file(self.out / "results.json", json.dumps(results, indent=1) + "\n")
            print(
                f"checkpoints: {', '.join(str(self.out / one.file) for one in self.learners)}",
                flush=True,
            )


def _differences(
    names: list[str], logits: list[np.ndarray], labels: np.ndarray, groups: np.ndarray, before: str
) -> list[str]:
    """The first model minus each other, in points, paired over the same videos."""
    places, classes = [ranks(scores, labels) for scores in logits], logits[0].shape[1]
    correct, errors = (
        [one == 0 for one in places],
        [challenge_errors(one, classes) for one in places],
    )
    return [
        f"{before} {names[0]} - {names[other]}: top-1 {paired_bootstrap(correct[0], correct[other], groups)}, "
        f"average error {paired_bootstrap(errors[0], errors[other], groups)} (points)"
        for other in range(1, len(names))
    ]
