"""python -m aggregate.train: a feature store in, a trained classifier and a comparison with plain averaging out."""

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from extract.cli import InputError, RunError, run_command

if TYPE_CHECKING:
    import numpy as np
    import torch

    from aggregate.models import VideoClassifier
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.learner import Learner
    from aggregate.training.recipes import Recipe
    from extract.store import FeatureStore

# Where a run may continue with another value: they say where and how fast, not what.
_FREE_ON_RESUME = ("out", "device", "placement")
# The flags that are an aggregator's own; to all others they mean nothing.
AGGREGATOR_FLAGS: dict[str, tuple[str, ...]] = {
    "nl": ("m1", "scale_init", "scale_scores"),
    "hgnl": ("g1", "g2", "m1", "shared", "norm", "attention", "scale_init", "scale_scores"),
}
# Below this |s F_o| / |F| attention changes nothing that matters.
_ATTENTION_UNUSED = 1e-3


@dataclass(frozen=True)
class Options:
    """Train an aggregator and its classifier on cached features; run again to resume."""

    agg: Literal["tsn", "max", "weighted", "nl", "hgnl", "txb"]
    """tsn (average), max, weighted, nl, hgnl, or txb (StNet's temporal block, which sees the order of frames)."""
    features: str = "feats.zarr"
    """The feature store of `python -m extract`."""
    out: Path | None = None
    """The run folder (default: runs/AGG)."""
    init: Path | None = None
    """A checkpoint to start from; classifier rows carry over by class name."""
    recipe: Literal["cached", "paper"] = "cached"
    """cached: what works best on a frozen backbone; paper: iQIYI's schedule."""
    g1: int = 16
    """hgnl: groups of W_q and W_k."""
    g2: int = 8
    """hgnl: groups of W_v, and attention maps."""
    m1: int | None = None
    """hgnl, nl: width of Q and K (default: m/8 for hgnl, m/2 for nl)."""
    shared: bool = False
    """hgnl: one set of weights for all groups."""
    norm: Literal["none", "n", "n_over_train"] = "none"
    """hgnl: what the ReLU map is divided by."""
    attention: Literal["relu", "softmax"] = "relu"
    """hgnl: softmax is an ablation the paper lacks."""
    scale_init: float = 0.0
    """hgnl, nl: s before training."""
    scale_scores: bool = False
    """hgnl, nl: divide scores by the root of their length."""
    frames: int = 3
    """Segments in training, and in the validation of each epoch."""
    optimizer: Literal["sgd", "adamw"] | None = None
    """Default: the recipe's, as for the five below."""
    lr: float | None = None
    weight_decay: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    dropout: float | None = None
    control: bool = False
    """Also train the TSN of --init for as many more epochs, the control the paper lacks."""
    train_split: str = "train"
    val_split: str = "val"
    val_groups: tuple[str, ...] = ()
    """Validate on these groups (subjects, sources), train on all others."""
    val_fraction: float = 0.2
    """How much to hold out where the store has no validation split; whole groups where it knows them."""
    allow_missing_classes: bool = False
    """Train although some classes have no example."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    placement: Literal["auto", "device", "memory", "mmap"] = "auto"
    """Where features lie while they are read; auto chooses by size."""


@dataclass
class Entrant:
    """One row of the comparison: a learner, the state of its best epoch, and the file that goes to."""

    learner: "Learner"
    file: str
    options: dict[str, Any]
    best_error: float = float("inf")
    best_epoch: int = -1
    best_state: dict[str, Any] = field(default_factory=dict)

    def judge(self, error: float, epoch: int) -> None:
        """Keep the state where this epoch's validation error is the smallest so far."""
        if error < self.best_error:
            self.best_error, self.best_epoch = error, epoch
            self.best_state = {k: v.detach().cpu().clone() for k, v in self.learner.model.state_dict().items()}


def main(options: Options) -> int:
    from extract.store import FeatureStore

    out = options.out or Path("runs") / options.agg
    store = FeatureStore.open(options.features)
    run = Run(options, store, out)
    with run.interruptible():
        run.train()
    run.report()
    return 0


class Run:
    """One training run in its folder: prepare, resume, train, report."""

    def __init__(self, options: Options, store: "FeatureStore", out: Path) -> None:
        from aggregate.data.features import StoredFeatures
        from aggregate.evaluate import choose_device, held_for_test

        self.options, self.store, self.out = options, store, out
        self.device = choose_device(options.device)
        resumed = self._check_folder()
        train_rows, self.val_rows, split_words = choose_rows(store, options)
        check_classes(store, train_rows, options)
        self.recipe = recipe_of(options, videos=len(train_rows))
        self.train_features: StoredFeatures = StoredFeatures(
            store, train_rows, device=self.device, placement=options.placement, training=True
        )
        self.val_features = held_for_test(store, self.val_rows, device=self.device)
        self.val_labels = store.labels[self.val_rows]
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        print(
            f"features  {store!r}\nvideos    {split_words}\n"
            f"training  {self.train_features.words}; {len(self.train_features.views)} views; on {self.device}\n"
            f"recipe    {options.recipe}: {self.recipe}"
        )
        self.entrants = self._entrants()
        if resumed is not None:
            self._resume(resumed)
        out.mkdir(parents=True, exist_ok=True)
        (out / "options.json").write_text(json.dumps(plain(options), indent=1) + "\n", encoding="utf-8")

    # -- before ----------------------------------------------------------------------------------------------------

    def _check_folder(self) -> "Checkpoint | None":
        """The last checkpoint of this run, if there is one; other options than its own are refused."""
        from aggregate.training.checkpoint import Checkpoint

        last = self.out / "last.pt"
        if not last.exists():
            # A run that ended before its first epoch leaves nothing that others could not overwrite.
            ours = (path.name == "options.json" or path.name.startswith("events.out") for path in self.out.glob("*"))
            if self.out.exists() and not all(ours):
                raise InputError(f"--out {self.out} is not empty and holds no run; give another name")
            return None
        refuse_other_options(self.out, plain(self.options), free=_FREE_ON_RESUME)
        return Checkpoint.load(last)

    def _entrants(self) -> list[Entrant]:
        """The model asked for, and beside it the mean-pool baseline and the control, on the same batches."""
        from aggregate.training.checkpoint import Checkpoint

        options = self.options
        init = None if options.init is None else Checkpoint.load(options.init)
        if init is not None:
            init.check_features(self.store.provenance, self.store.dim, options.features)
        elif options.recipe == "paper" and options.agg in ("nl", "hgnl"):
            print("note      the paper starts its 8 epochs from a trained TSN; without --init this starts fresh")
        entrants = [self._entrant(options.agg, "best.pt", aggregator_options(options), init)]
        if options.agg != "tsn":
            if init is not None and init.options["name"] == "tsn" and init.classes == list(self.store.classes):
                print(f"baseline  the TSN of {options.init}, as it is")
                self.reference: VideoClassifier | None = init.model().to(self.device)
            else:
                entrants.append(self._entrant("tsn", "baseline.pt", {}, None, "tsn (baseline)"))
                self.reference = None
        else:
            self.reference = None
        if options.control:
            if init is None or init.options["name"] != "tsn":
                raise InputError("--control trains the TSN of --init for as many more epochs; give --init tsn.pt")
            entrants.append(self._entrant("tsn", "control.pt", {}, init, "tsn (control)"))
        return entrants

    def _entrant(
        self, name: str, file: str, options: dict[str, Any], init: "Checkpoint | None", label: str = ""
    ) -> Entrant:
        learner = make_learner(
            self.options,
            self.store,
            self.recipe,
            name,
            options,
            videos=len(self.train_features),
            device=self.device,
            init=init,
            label=label,
        )
        model: Any = learner.model
        return Entrant(learner, file, model.options)

    def _resume(self, last: "Checkpoint") -> None:
        assert last.training is not None
        state = last.training
        self.epoch, self.history = state["epoch"], state["history"]
        for entrant, kept in zip(self.entrants, state["entrants"], strict=True):
            entrant.learner.load_state_dict(kept["learner"])
            entrant.best_error, entrant.best_epoch = kept["best_error"], kept["best_epoch"]
            entrant.best_state = kept["best_state"]
        print(f"resuming  {self.out}: {self.epoch} of {self.recipe.epochs} epochs are done")

    # -- the epochs ------------------------------------------------------------------------------------------------

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            print(f"\nstopped; {self.out / 'last.pt'} holds {self.epoch} epochs, the same command resumes", flush=True)
            raise

    def train(self) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        from aggregate.data.features import find_non_finite
        from aggregate.training.learner import DivergedError, train_epoch

        if self.epoch >= self.recipe.epochs:
            return
        learners = [entrant.learner for entrant in self.entrants]
        steps = learners[0].steps_per_epoch
        total, done = self.recipe.epochs * steps, self.epoch * steps
        with (
            SummaryWriter(str(self.out), purge_step=self.epoch) as board,
            tqdm(total=total, initial=done, unit="step", file=sys.stderr) as bar,
        ):
            while self.epoch < self.recipe.epochs:
                started = time.perf_counter()
                batches = self.train_features.train_batches(
                    epoch=self.epoch,
                    frames=self.options.frames,
                    batch_size=self.recipe.batch_size,
                    seed=self.options.seed,
                )
                try:
                    losses = train_epoch(learners, batches, self.epoch, bar.update)
                except DivergedError as error:
                    name = find_non_finite(self.store, error.rows)
                    raise RunError(
                        f"the stored features of {name} are not finite; `python -m extract.verify` checks the store"
                        if name
                        else f"{error}; a smaller --lr than {self.recipe.lr:g} may help"
                    ) from None
                row = self._end_epoch(losses, time.perf_counter() - started)
                for name, value in row.items():
                    if isinstance(value, float):
                        board.add_scalar(name, value, self.epoch)
                bar.set_postfix_str(f"loss {losses[0]:.3f}, val top-1 {100 * row['val_top1']:.2f} %")

    def _end_epoch(self, losses: Sequence[float], seconds: float) -> dict[str, Any]:
        """Validate, keep the best, write everything; the row of metrics.csv."""
        from aggregate.metrics import challenge_error, top_k_error

        logits = self._validate([entrant.learner.model for entrant in self.entrants], self.options.frames)
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "lr": self.recipe.lr * self.recipe.factor(self.epoch),
            "seconds": round(seconds, 3),
        }
        for entrant, loss, scores in zip(self.entrants, losses, logits, strict=True):
            prefix = "" if entrant is self.entrants[0] else f"{entrant.file.removesuffix('.pt')}_"
            error = challenge_error(scores, self.val_labels)
            row[f"{prefix}loss"] = loss
            row[f"{prefix}val_top1"] = 1 - top_k_error(scores, self.val_labels, 1)
            row[f"{prefix}val_top5"] = 1 - top_k_error(scores, self.val_labels, 5)
            row[f"{prefix}val_average_error"] = error
            entrant.judge(error, self.epoch)
        if (found := self._attention()) is not None:
            row["scale"], row["attention_ratio"] = found
        self.history.append(row)
        self.epoch += 1
        self._save()
        return row

    def _validate(self, models: Sequence[Any], segments: int) -> "list[np.ndarray]":
        from aggregate.evaluate import logits_of

        crops = logits_of(
            models,
            self.store,
            self.val_rows,
            segments=segments,
            batch_size=self.recipe.batch_size,
            device=self.device,
            features=self.val_features,
        )
        return [one.mean(axis=1) for one in crops]

    def _attention(self) -> tuple[float, float] | None:
        return attention_on(
            self.entrants[0].learner, self.store, self.val_rows, segments=self.options.frames, device=self.device
        )

    def _save(self) -> None:
        from aggregate.training.checkpoint import Checkpoint

        for entrant in self.entrants:
            common: dict[str, Any] = {
                "options": entrant.options,
                "classes": list(self.store.classes),
                "features": self.store.provenance,
                "frames": self.options.frames,
                "metrics": {"val_average_error": entrant.best_error, "epoch": entrant.best_epoch},
            }
            if entrant.best_epoch == self.epoch - 1:
                Checkpoint(**common, state_dict=entrant.best_state).save(self.out / entrant.file)
        first = self.entrants[0]
        state = {k: v.detach().cpu() for k, v in first.learner.model.state_dict().items()}
        training = {
            "epoch": self.epoch,
            "history": self.history,
            "entrants": [
                {
                    "learner": entrant.learner.state_dict(),
                    "best_error": entrant.best_error,
                    "best_epoch": entrant.best_epoch,
                    "best_state": entrant.best_state,
                }
                for entrant in self.entrants
            ],
        }
        Checkpoint(**{**common, "options": first.options}, state_dict=state, training=training).save(
            self.out / "last.pt"
        )
        with open(self.out / "metrics.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.history[0]))
            writer.writeheader()
            writer.writerows(self.history)

    # -- after -----------------------------------------------------------------------------------------------------

    def report(self) -> None:
        """The final table: every entrant at its best epoch, with few and with all segments, and the differences."""
        from aggregate.evaluate import possible_segments
        from aggregate.metrics import Summary, challenge_errors, paired_bootstrap, ranks, summarise

        models = []
        for entrant in self.entrants:
            entrant.learner.model.load_state_dict(entrant.best_state)
            models.append(entrant.learner.model)
        names = [entrant.learner.name for entrant in self.entrants]
        if self.reference is not None:
            models.append(self.reference)
            names.append("tsn (as it was)")
        results: dict[str, Any] = {}
        width = max(map(len, names))
        print(
            f"\n{self.out}: {len(self.val_rows):,} validation videos; each model at its best epoch, chosen on the same "
            f"videos ({', '.join(f'{e.learner.name} {e.best_epoch + 1}' for e in self.entrants)})"
        )
        print(f"{'model':<{width}} segments {Summary.header()}")
        for segments in possible_segments((self.options.frames, self.store.frames_per_video), self.store):
            logits = self._validate(models, segments)
            for name, scores in zip(names, logits, strict=True):
                summary = summarise(scores, self.val_labels)
                print(f"{name:<{width}} {segments:>8} {summary}")
                results.setdefault(name, {})[segments] = asdict(summary)
            correct = [ranks(scores, self.val_labels) == 0 for scores in logits]
            errors = [challenge_errors(scores, self.val_labels) for scores in logits]
            for name, theirs, error in zip(names[1:], correct[1:], errors[1:], strict=True):
                top1 = paired_bootstrap(correct[0], theirs)
                average = paired_bootstrap(errors[0], error)
                print(
                    f"{'':<{width}} {segments:>8} {names[0]} - {name}: top-1 {top1}, average error {average} (points)"
                )
        if (found := self._attention()) is not None:
            scale, ratio = found
            print(f"attention: s = {scale:.3g}, |s F_o| / |F| = {ratio:.2g}", end="")
            print("; attention is not used" if ratio < _ATTENTION_UNUSED else "")
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"checkpoints: {', '.join(str(self.out / e.file) for e in self.entrants)}")


def plain(options: Any) -> dict[str, Any]:
    """A command's options as JSON keeps them."""
    return json.loads(json.dumps(asdict(options), default=str))


def refuse_other_options(out: Path, wanted: dict[str, Any], *, free: Sequence[str]) -> None:
    """InputError that lists what differs between `out`/options.json and `wanted`, but for `free`."""
    from extract.store import difference

    recorded = json.loads((out / "options.json").read_text(encoding="utf-8"))
    before, now = ({k: v for k, v in side.items() if k not in free} for side in (recorded, wanted))
    lines = [line.replace("in the store", "in the folder") for line in difference(before, now)]
    if lines:
        raise InputError(
            f"{out} holds a run with other options:\n  " + "\n  ".join(lines) + "\n"
            "use those to resume it, give another --out, or remove it"
        )


def recipe_of(options: Options, *, videos: int) -> "Recipe":
    """The recipe that `options` choose and change, for so many videos to train on."""
    from aggregate.training.recipes import recipe

    return recipe(
        options.recipe,
        options.agg,
        videos=videos,
        optimizer=options.optimizer,
        lr=options.lr,
        weight_decay=options.weight_decay,
        epochs=options.epochs,
        batch_size=options.batch_size,
        dropout=options.dropout,
    )


def make_learner(
    options: Options,
    store: "FeatureStore",
    recipe: "Recipe",
    name: str,
    aggregator: dict[str, Any],
    *,
    videos: int,
    device: "torch.device",
    init: "Checkpoint | None",
    label: str = "",
    say: Callable[[str], object] = print,
) -> "Learner":
    """A fresh learner of the aggregator `name`, started from `init` where there is one; says what that carried over."""
    import torch

    from aggregate.models import build, carry_over
    from aggregate.training.learner import Learner

    torch.manual_seed(options.seed)  # a model's start is a function of the seed, whatever stands beside it
    model = build(name, dim=store.dim, num_classes=len(store.classes), dropout=recipe.dropout, **aggregator)
    if init is not None:
        carried = carry_over(model, init.state_dict, classes=store.classes, source_classes=init.classes)
        say(f"{label or name}: from {options.init}: {carried}")
    return Learner(
        name=label or name,
        model=model,
        recipe=recipe,
        steps_per_epoch=-(-videos // recipe.batch_size),
        seed=options.seed,
        device=device,
    )


def attention_on(
    learner: "Learner", store: "FeatureStore", rows: "np.ndarray", *, segments: int, device: "torch.device"
) -> tuple[float, float] | None:
    """s, and |s F_o| / |F| over the first 1,024 of `rows` that can be read; None for a model without attention."""
    from aggregate.data.features import StoredFeatures, usable
    from aggregate.training.learner import attention

    features = StoredFeatures(store, rows[usable(store)[rows]][:1024], device=device)
    return attention(learner.model, features.test_batches(frames=segments, batch_size=learner.recipe.batch_size))


def aggregator_options(options: Options) -> dict[str, Any]:
    """Those of the flags that the chosen aggregator has. InputError for one given to another aggregator."""
    own = AGGREGATOR_FLAGS.get(options.agg, ())
    defaults = {one.name: one.default for one in fields(Options)}
    for flag in AGGREGATOR_FLAGS["hgnl"]:  # NL's are among them
        if flag not in own and (given := getattr(options, flag)) != defaults[flag]:
            raise InputError(f"--{flag.replace('_', '-')} {given} means nothing to --agg {options.agg}")
    chosen = {"inner_dim" if flag == "m1" else flag: getattr(options, flag) for flag in own}
    if options.agg == "hgnl":
        chosen["train_frames"] = options.frames
    return chosen


def choose_rows(store: "FeatureStore", options: Options) -> "tuple[np.ndarray, np.ndarray, str]":
    """Rows to train on (with features and label) and to validate on (with a label), and that in words."""
    import numpy as np

    from aggregate.data.features import usable

    labelled = store.labels >= 0
    splits = store.splits
    if options.val_groups:
        unknown = sorted(set(options.val_groups) - set(store.groups.tolist()))
        if unknown:
            known = ", ".join(sorted(set(store.groups.tolist()))[:20])
            raise InputError(f"--val-groups {unknown[0]}: {store.path} has no such group; it has {known}")
        val = np.isin(store.groups, options.val_groups)
        train, words = ~val, f"validation on group {', '.join(options.val_groups)}"
    else:
        val = splits == options.val_split
        train = splits == options.train_split
        words = f"split {options.train_split!r} to train, {options.val_split!r} to validate"
        if not train.any():
            if options.train_split != "train":
                known = ", ".join(repr(name) for name in sorted(set(splits.tolist())))
                raise InputError(f"--train-split {options.train_split}: {store.path} has no such split; it has {known}")
            train = ~val & (splits != "test")
            words = f"no split named 'train': all but {options.val_split!r} and 'test' to train"
        if not (val & labelled).any():
            val = hold_out(store, np.flatnonzero(train & labelled), options.val_fraction, options.seed)
            train &= ~val
            how = "whole groups" if len(set(store.groups[train | val].tolist())) > 1 else "by class"
            words = f"NO SPLIT {options.val_split!r}: {options.val_fraction:.0%} held out of the others, {how}"
    failed = train & labelled & ~usable(store)
    pending = store.status == 0
    rows = np.flatnonzero(train & labelled & (usable(store) | pending))
    val_rows = np.flatnonzero(val & labelled)
    for name, chosen in (("train", rows), ("validate", val_rows)):
        if not len(chosen):
            raise InputError(f"{store.path} has no labelled video to {name} on ({words})")
    unlabelled = int(((train | val) & ~labelled).sum())
    return (
        rows,
        val_rows,
        f"{len(rows):,} to train, {len(val_rows):,} to validate ({words}); left out: {int(failed.sum()):,} failed, "
        f"{unlabelled:,} without a label",
    )


def hold_out(store: "FeatureStore", rows: "np.ndarray", fraction: float, seed: int) -> "np.ndarray":
    """Choose about `fraction` of each class of `rows` for validation: bool [N].

    Whole groups where the store knows several, added in random order while they bring the classes nearer to
    `fraction`; else videos. A class keeps at least one video to train on.
    """
    import numpy as np

    if not 0 < fraction < 1:
        raise InputError(f"--val-fraction {fraction:g}: expected a fraction between 0 and 1")
    rng = np.random.default_rng(seed)
    classes = len(store.classes)
    labels, groups = store.labels[rows], store.groups[rows]
    names = np.unique(groups)
    # Without groups each video is one of its own.
    unit = np.searchsorted(names, groups) if len(names) > 1 else np.arange(len(rows))
    total = np.bincount(labels, minlength=classes)
    wanted, held = fraction * total, np.zeros(classes)
    members: list[list[int]] = [[] for _ in range(int(unit.max(initial=-1)) + 1)]
    for place, number in enumerate(unit.tolist()):
        members[number].append(place)
    chosen = np.zeros(len(store), bool)
    for number in rng.permutation(len(members)).tolist():
        places = members[number]
        counts = np.bincount(labels[places], minlength=classes)
        present = counts > 0
        after = held + counts
        gain = np.abs(held - wanted)[present].sum() - np.abs(after - wanted)[present].sum()
        if gain > 0 and (after[present] < total[present]).all():
            held = after
            chosen[rows[places]] = True
    return chosen


def check_classes(store: "FeatureStore", rows: "np.ndarray", options: Options) -> None:
    """InputError for a class that has no video among `rows`, unless that is allowed."""
    import numpy as np

    counts = np.bincount(store.labels[rows], minlength=len(store.classes))
    empty = [store.classes[place] for place in np.flatnonzero(counts == 0)]
    if empty and not options.allow_missing_classes:
        raise InputError(
            f"{len(empty)} of {len(store.classes)} classes have no video to train on: {', '.join(empty[:5])}"
            f"{', ...' if len(empty) > 5 else ''}; extract some, or pass --allow-missing-classes"
        )


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.train"))
