"""python -m aggregate.finetune: TSN, NL, HG-NL and StNet trained end to end, from videos through the backbone."""

import csv
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from extract.cli import InputError, RunError, run_command

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from aggregate.data.frames import FrameBatch, VideoFrames
    from aggregate.endtoend import Recogniser
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.recipes import Recipe
    from extract.backbone.model import Trunk
    from extract.listing.videos import Video

_FREE_ON_RESUME = ("out", "device", "workers", "address", "decode_workers", "micro_batch")


@dataclass(frozen=True)
class Options:
    """Train a backbone together with its aggregator, or StNet, on videos; run again to resume."""

    model: Literal["tsn", "max", "weighted", "nl", "hgnl", "txb", "stnet"]
    """An aggregator over the backbone's frame features, or stnet."""
    videos: Path
    """As for python -m extract: a folder, or a CSV with --root."""
    root: Path | None = None
    labels: str = "auto"
    out: Path | None = None
    """The run folder (default: runs/finetune-MODEL)."""
    backbone: str = "legacy_seresnext101_32x4d"
    weights: str = "pretrained"
    """Where the backbone starts: pretrained, random, or a file."""
    init: Path | None = None
    """A checkpoint to start from: of cached features (same backbone and weights), or fine-tuned (its backbone too)."""
    g1: int = 16
    g2: int = 8
    m1: int | None = None
    shared: bool = False
    norm: Literal["none", "n", "n_over_train"] = "none"
    frames: int = 3
    """Segments of a video, in training and in the validation of each epoch."""
    frames_per_segment: int = 1
    """stnet: N, the frames of a super-image."""
    form: Literal["released", "paper"] = "released"
    """stnet: the temporal block of the released code, or of the paper."""
    epochs: int | None = None
    """Default: the paper's (TSN 40, NL and HG-NL 8, StNet 20); likewise for the five below."""
    optimizer: Literal["sgd", "adamw"] | None = None
    lr: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    dropout: float | None = None
    backbone_lr: float = 1.0
    """What --lr is multiplied by for the backbone; 0 freezes it."""
    clip: float = 20.0
    """Largest norm of the gradient; 0: not clipped."""
    micro_batch: int = 16
    """Videos that go through the network at once; gradients of a batch are added up."""
    train_batch_norm: bool = False
    """Train all batch norms of the backbone; by default all but the first keep their statistics (partial BN)."""
    ema: float = 0.0
    """Decay of an average of the weights, which is then what is tested and saved; 0: off."""
    checkpoint_activations: bool = False
    """Compute activations of the backbone again in the backward pass: less memory, more time."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    decoder: Literal["pyav", "decord"] = "pyav"
    decode_workers: int | None = None
    """Decoding processes a worker (default: the cores it has)."""
    video_timeout: float = 60.0
    workers: int = 1
    """Data-parallel processes; more than one run in Ray Train."""
    address: str | None = None
    """A Ray cluster (auto, or host:port)."""
    train_split: str = "train"
    val_split: str = "val"
    val_groups: tuple[str, ...] = ()
    val_fraction: float = 0.2
    allow_missing_classes: bool = False
    limit: int | None = None
    """Only the first so many videos to train on."""
    seed: int = 0


@dataclass(frozen=True)
class Listed:
    """The videos of a listing with a feature store's columns, for what chooses rows by split, group and label."""

    path: str
    videos: "tuple[Video, ...]" = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.videos)

    def _column(self, name: str) -> "np.ndarray":
        import numpy as np

        return np.array([getattr(video, name) for video in self.videos])

    @property
    def labels(self) -> "np.ndarray":
        return self._column("label")

    @property
    def splits(self) -> "np.ndarray":
        return self._column("split")

    @property
    def groups(self) -> "np.ndarray":
        return self._column("group")

    @property
    def status(self) -> "np.ndarray":
        import numpy as np

        return np.ones(len(self), "i1")


def main(options: Options) -> int:
    _check(options)
    if options.workers > 1 or options.address is not None:
        return _main_with_ray(options)
    return Trainer(options).run()


def _check(options: Options) -> None:
    for name in ("frames", "frames_per_segment", "micro_batch", "workers"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1")
    if options.model != "stnet" and options.frames_per_segment > 1:
        raise InputError(f"--frames-per-segment {options.frames_per_segment} is for stnet, not for {options.model}")
    if not 0 <= options.ema < 1:
        raise InputError(f"--ema {options.ema:g}: a decay is from 0 to below 1")
    if options.backbone_lr < 0:
        raise InputError(f"--backbone-lr {options.backbone_lr:g}: expected 0 or more")


class Trainer:
    """One process of a fine-tuning run: `rank` of `world`. Rank 0 speaks and writes."""

    def __init__(self, options: Options, *, rank: int = 0, world: int = 1) -> None:
        import torch

        from aggregate.data.clips import ClipPlan
        from aggregate.evaluate import choose_device
        from aggregate.train import check_classes, choose_rows
        from extract.listing.videos import list_videos

        self.options, self.rank, self.world = options, rank, world
        self.out = options.out or Path("runs") / f"finetune-{options.model}"
        device = options.device
        if world > 1 and device == "auto" and torch.cuda.is_available():
            device = f"cuda:{rank % torch.cuda.device_count()}"
        self.device = choose_device(device)
        last = self._check_folder()
        listing = list_videos(options.videos, labels=options.labels, root=options.root)
        listed: Any = Listed(str(options.videos), listing.videos, listing.classes)
        rows, val_rows, words = choose_rows(listed, options)  # type: ignore[arg-type]
        check_classes(listed, rows, options)  # type: ignore[arg-type]
        self.classes = list(listing.classes)
        self.videos = [listing.videos[row] for row in rows][: options.limit]
        self.val_videos = [listing.videos[row] for row in val_rows]
        self.recipe = self._recipe()
        self.precision = options.precision
        if self.precision == "auto":
            self.precision = "bf16" if self.device.type == "cuda" else "fp32"
        self._say(f"videos    {words}")
        self.model, self.record = self._model()
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")  # type: ignore[attr-defined]
        self.parallel: nn.Module = self.model
        if world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.parallel = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        self.plan = ClipPlan(
            segments=options.frames,
            frames_per_segment=options.frames_per_segment,
            preprocessing=self.model.preprocessing,
            decoder=options.decoder,
        )
        self.epoch, self.history, self.best = 0, [], math.inf  # type: ignore[var-annotated]
        self.average = None
        if options.ema:
            self.average = {name: value.detach().clone() for name, value in self.model.net.state_dict().items()}
        if last is not None:
            self._resume(last)
        self._say(
            f"model     {options.model} over {options.backbone}, {self._parameters()} on {self.device} in "
            f"{self.precision}, {world} process(es)\nrecipe    {self.recipe}, backbone at {options.backbone_lr:g} of it"
        )

    def _say(self, words: str) -> None:
        if self.rank == 0:
            print(words, flush=True)

    # -- before ----------------------------------------------------------------------------------------------------

    def _check_folder(self) -> "Checkpoint | None":
        from aggregate.train import plain, refuse_other_options
        from aggregate.training.checkpoint import Checkpoint

        if not (self.out / "last.pt").exists():
            return None
        refuse_other_options(self.out, plain(self.options), free=_FREE_ON_RESUME)
        return Checkpoint.load(self.out / "last.pt")

    def _recipe(self) -> "Recipe":
        from aggregate.training.recipes import recipe

        options = self.options
        chosen = {name: getattr(options, name) for name in ("epochs", "optimizer", "lr", "weight_decay", "dropout")}
        # The paper's 256 where there are enough videos for some steps an epoch.
        batch_size = options.batch_size or min(256, max(8, 1 << (max(len(self.videos) // 8, 1).bit_length() - 1)))
        return recipe(
            "paper", options.model, videos=len(self.videos), **chosen, batch_size=batch_size, clip=options.clip
        )

    def _model(self) -> "tuple[Recogniser, dict[str, Any]]":
        """The network with its start: backbone weights, then what --init holds."""
        import torch

        from aggregate.endtoend import Recogniser, backbone_record, build_net, freeze_batch_norms
        from aggregate.training.checkpoint import Checkpoint
        from extract.backbone.model import load_trunk

        options = self.options
        init = None if options.init is None else Checkpoint.load(options.init)
        with_backbone = init is not None and init.backbone is not None
        weights = str(options.init) if with_backbone else options.weights
        trunk = load_trunk(options.backbone, weights=weights, seed=options.seed)
        record = backbone_record(trunk)
        if init is not None and not with_backbone:
            self._check_same_backbone(init, record)
        torch.manual_seed(options.seed)
        net = build_net(self._model_options(trunk), trunk.module)
        if init is not None:
            self._carry_over(net, init)
        self.frozen = [] if options.train_batch_norm else freeze_batch_norms(net.backbone)
        if options.backbone_lr == 0:
            for parameter in net.backbone.parameters():
                parameter.requires_grad_(False)
        if options.checkpoint_activations:
            try:
                net.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
            except (AssertionError, AttributeError):
                raise InputError(f"--checkpoint-activations: timm's {options.backbone} does not know how to") from None
        net.to(self.device).to(memory_format=torch.channels_last)
        return Recogniser(net, trunk.preprocessing), record

    def _model_options(self, trunk: "Trunk") -> dict[str, Any]:
        options = self.options
        common: dict[str, Any] = {
            "name": options.model,
            "num_classes": len(self.classes),
            "dropout": self.recipe.dropout,
        }
        if options.model == "stnet":
            return {**common, "frames_per_segment": options.frames_per_segment, "form": options.form, "dim": trunk.dim}
        if options.model in ("nl", "hgnl"):
            common["inner_dim"] = options.m1
        if options.model == "hgnl":
            common |= {"g1": options.g1, "g2": options.g2, "shared": options.shared, "norm": options.norm}
            common["train_frames"] = options.frames
        return {**common, "dim": trunk.dim}

    def _check_same_backbone(self, init: "Checkpoint", record: dict[str, Any]) -> None:
        """Classifiers of cached features start from the very features they were trained on, or not at all."""
        theirs = {
            "name": init.features.get("backbone"),
            "weights": init.features.get("weights"),
            "preprocessing": init.features.get("preprocessing"),
        }
        for name, value in record.items():
            if theirs[name] != value:
                raise InputError(
                    f"--init {self.options.init} was trained on features of {name} {theirs[name]}, this run has "
                    f"{value}; give its --backbone and --weights"
                )

    def _carry_over(self, net: "nn.Module", init: "Checkpoint") -> None:
        from aggregate.models import carry_over

        if self.options.model == "stnet":
            state = net.state_dict()
            fits = {
                name: value
                for name, value in init.state_dict.items()
                if name in state and state[name].shape == value.shape and not name.startswith("classifier.")
            }
            if init.classes == self.classes:
                fits |= {n: v for n, v in init.state_dict.items() if n.startswith("classifier.") and n in state}
                fits = {name: value for name, value in fits.items() if state[name].shape == value.shape}
            net.load_state_dict({**state, **fits})
            self._say(f"init      {len(fits)} of {len(state)} tensors from {self.options.init}, the others start fresh")
            return
        carried = carry_over(net, init.state_dict, classes=self.classes, source_classes=init.classes)  # type: ignore[arg-type]
        self._say(f"init      {self.options.init}: {carried}")

    def _optimizer(self) -> "torch.optim.Optimizer":
        from torch import nn

        from aggregate.training.recipes import make_optimizer, parameter_groups

        net = self.model.net
        rest = nn.ModuleList([child for name, child in net.named_children() if name != "backbone"])
        groups = parameter_groups(rest, self.recipe)
        groups += parameter_groups(net.backbone, self.recipe, lr_scale=self.options.backbone_lr)  # type: ignore[arg-type]
        return make_optimizer(groups, self.recipe)

    def _parameters(self) -> str:
        total = sum(parameter.numel() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return f"{trained:,} of {total:,} parameters trained"

    def _resume(self, last: "Checkpoint") -> None:
        assert last.training is not None
        state = last.training
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        self.model.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        self._say(f"resuming  {self.out}: {self.epoch} of {self.recipe.epochs} epochs are done")

    # -- the epochs ------------------------------------------------------------------------------------------------

    def run(self) -> int:
        from aggregate.data.frames import VideoFrames
        from aggregate.train import plain

        options = self.options
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "options.json").write_text(json.dumps(plain(options), indent=1) + "\n", encoding="utf-8")
        workers = options.decode_workers or max(1, len(os.sched_getaffinity(0)) // self.world)
        nice = 10 if self.device.type == "cpu" else 0
        pool: dict[str, Any] = {"workers": workers, "timeout": options.video_timeout, "nice": nice}
        with (
            VideoFrames(self.videos, self.plan, **pool) as train,
            VideoFrames(self.val_videos[self.rank :: self.world], self.plan, **pool) as val,
            self._stopped_in_words(),
        ):
            if options.model == "stnet" and options.form == "paper" and self.epoch == 0:
                self._calibrate(train)
            while self.epoch < self.recipe.epochs:
                self._epoch(train, val)
            if train.failed:
                some = "; ".join(f"{self.videos[place].id}: {why}" for place, why in list(train.failed.items())[:3])
                self._say(f"{len(train.failed)} of {len(self.videos)} training videos were left out: {some}")
        if self.rank == 0:
            self._report()
        return 0

    @contextmanager
    def _stopped_in_words(self) -> Iterator[None]:
        import torch

        try:
            yield
        except KeyboardInterrupt:
            self._say(f"\nstopped; {self.out / 'last.pt'} holds {self.epoch} epochs, the same command resumes")
            raise
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            least = max(1, self.options.micro_batch // 2)
            raise RunError(
                f"{self.device} has too little memory for {self.options.micro_batch} videos of {self.options.frames} "
                f"frames at once; try --micro-batch {least}, which changes nothing else, or --checkpoint-activations"
            ) from None

    def _calibrate(self, train: "VideoFrames") -> None:
        """The paper's temporal block is the identity only once its batch norm knows the maps (FACTS 5)."""
        from itertools import islice

        from aggregate.data.frames import normalised

        see = self.model.preprocessing
        batches = train.train_batches(epoch=0, batch_size=self.options.micro_batch, seed=self.options.seed + 1)
        self.model.net.calibrate(  # type: ignore[operator]
            normalised(batch.frames[:, 0], see.mean, see.std, self.device) for batch in islice(batches, 8)
        )

    def _epoch(self, train: "VideoFrames", val: "VideoFrames") -> None:
        from tqdm import tqdm

        started, steps = time.perf_counter(), -(-len(self.videos) // self.recipe.batch_size)
        self.parallel.train()
        for norm in self.frozen:
            norm.eval()
        loss_sum, seen, waited = 0.0, 0.0, 0.0
        batches = train.train_batches(
            epoch=self.epoch,
            batch_size=self.recipe.batch_size,
            seed=self.options.seed,
            rank=self.rank,
            world=self.world,
        )
        with tqdm(total=len(self.videos), unit="video", file=sys.stderr, disable=self.rank > 0) as bar:
            bar.set_description(f"epoch {self.epoch + 1} of {self.recipe.epochs}")
            step = 0
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                waited += time.perf_counter() - asked
                if batch is None:
                    break
                loss = self._step(batch, step / steps)
                if not math.isfinite(loss):
                    raise RunError(
                        f"the loss is {loss} in epoch {self.epoch}; try a smaller --lr than {self.recipe.lr:g}"
                    )
                loss_sum, seen, step = loss_sum + loss * len(batch.places), seen + len(batch.places), step + 1
                bar.update(min(len(batch.places) * self.world, len(self.videos) - bar.n))
                bar.set_postfix_str(f"loss {loss_sum / max(seen, 1):.3f}")
        loss_sum, seen = self._over_ranks(loss_sum), self._over_ranks(seen)
        wall = time.perf_counter() - started
        row = {
            "epoch": self.epoch,
            "lr": self.recipe.lr * self.recipe.factor(self.epoch),
            "loss": loss_sum / max(seen, 1),
            **self._validate(val),
            "seconds": round(wall, 3),
            "videos_per_second": round(seen / wall, 2),
            "waited_for_frames": round(waited / wall, 3),
        }
        self.history.append(row)
        self.epoch += 1
        if self.rank == 0:
            self._save(row)
            scale = getattr(getattr(self.model.net, "aggregator", None), "scale", None)
            s = "" if scale is None else f", s {scale.item():.3g}"
            print(
                f"epoch {self.epoch}: loss {row['loss']:.3f}, val top-1 {100 * row['val_top1']:.2f} %{s}; "
                f"{row['videos_per_second']:g} videos/s, {row['waited_for_frames']:.0%} of the time waiting for frames",
                flush=True,
            )

    def _step(self, batch: "FrameBatch", part: float) -> float:
        """One update from a batch, in micro-batches; the batch's mean loss."""
        import torch
        import torch.nn.functional as F

        from aggregate.training.recipes import set_lr

        # Dropout's numbers are a function of this, so a resumed epoch is the epoch that was lost.
        torch.manual_seed(hash((self.options.seed, self.epoch, round(part * 1e6), self.rank)) & 0x7FFF_FFFF)
        set_lr(self.optimizer, self.recipe, self.epoch + part)
        self.optimizer.zero_grad(set_to_none=True)
        count, total = len(batch.places), 0.0
        whole = self._over_ranks(count)
        if not whole:
            return 0.0
        if not count:  # others have videos, and gradients are averaged with ours: those of nothing
            with self._autocast():
                blank = batch.frames.new_zeros((1, *batch.frames.shape[2:]))
                nothing = self.parallel(blank, batch.mask.new_ones((1, self.plan.segments)))
                self.scaler.scale(0.0 * nothing.sum()).backward()
        for start in range(0, count, self.options.micro_batch):
            micro = slice(start, start + self.options.micro_batch)
            sync = start + self.options.micro_batch >= count
            with self._accumulating(sync), self._autocast():
                logits = self.parallel(batch.frames[micro, 0], batch.mask[micro])
                loss = F.cross_entropy(logits.float(), batch.labels[micro].to(self.device), reduction="sum")
                # DDP averages over processes; this makes it the mean over the whole batch, however it is spread.
                self.scaler.scale(loss * self.world / whole).backward()
            total += float(loss.detach())
        if self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            for name, value in self.model.net.state_dict().items():
                kept = self.average[name]
                if value.is_floating_point():
                    kept.lerp_(value.detach(), 1 - self.options.ema)
                else:
                    kept.copy_(value)
        return total / max(count, 1)

    @contextmanager
    def _accumulating(self, sync: bool) -> Iterator[None]:
        if self.world > 1 and not sync:
            with self.parallel.no_sync():  # type: ignore[operator]
                yield
        else:
            yield

    def _autocast(self) -> "torch.autocast":
        import torch

        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast(
            self.device.type, kinds.get(self.precision, torch.bfloat16), enabled=self.precision in kinds
        )

    def _over_ranks(self, value: float) -> float:
        """The sum over processes."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        total = torch.tensor(float(value), device=self.device)
        dist.all_reduce(total)
        return float(total)

    def _validate(self, val: "VideoFrames") -> dict[str, float]:
        """Top-1, top-5 and average error over all validation videos; those that cannot be decoded count as errors."""
        import numpy as np

        from aggregate.metrics import challenge_errors, ranks

        with self._averaged_weights():
            logits = predict_videos(self.model, val, batch_size=self.options.micro_batch, autocast=self._autocast)
        labels = np.array([video.label for video in val.videos])
        if len(labels):
            places = ranks(logits.mean(axis=1), labels)
            five = min(5, len(self.classes))
            sums = [(places == 0).sum(), (places < five).sum(), challenge_errors(logits.mean(axis=1), labels).sum()]
        else:
            sums = [0, 0, 0]
        first, in_five, error = (self._over_ranks(float(value)) / len(self.val_videos) for value in sums)
        return {"val_top1": first, "val_top5": in_five, "val_average_error": error}

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self.average is None:
            yield
            return
        own = {name: value.detach().clone() for name, value in self.model.net.state_dict().items()}
        self.model.net.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.net.load_state_dict(own)

    def _save(self, row: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        from aggregate.training.checkpoint import Checkpoint

        tested = self.model.net.state_dict() if self.average is None else self.average
        better = row["val_average_error"] < self.best
        self.best = min(self.best, row["val_average_error"])
        common: dict[str, Any] = {
            "options": self._checkpoint_options(),
            "classes": self.classes,
            "features": {"backbone": self.record["name"], **{k: self.record[k] for k in ("weights", "preprocessing")}},
            "frames": self.options.frames,
            "metrics": {key: row[key] for key in ("val_top1", "val_top5", "val_average_error")}
            | {"epoch": self.epoch - 1},
            "backbone": self.record,
        }
        state = {name: value.detach().cpu().clone() for name, value in tested.items()}
        if better:
            Checkpoint(**common, state_dict=state).save(self.out / "best.pt")
        training = {
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
            "net": self.model.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average,
        }
        Checkpoint(**common, state_dict=state, training=training).save(self.out / "last.pt")
        with open(self.out / "metrics.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.history[0]))
            writer.writeheader()
            writer.writerows(self.history)
        with SummaryWriter(str(self.out), purge_step=self.epoch - 1) as board:
            for name, value in row.items():
                board.add_scalar(name, value, self.epoch - 1)

    def _checkpoint_options(self) -> dict[str, Any]:
        net: Any = self.model.net
        if self.options.model != "stnet":
            return net.options
        return {
            "name": "stnet",
            "dim": net.aggregator.norm_in.num_features,
            "num_classes": len(self.classes),
            "frames_per_segment": self.options.frames_per_segment,
            "form": self.options.form,
            "dropout": self.recipe.dropout,
        }

    def _report(self) -> None:
        if not self.history:
            return
        best = min(self.history, key=lambda row: row["val_average_error"])
        print(
            f"\n{self.out / 'best.pt'}: epoch {best['epoch'] + 1}, chosen on {len(self.val_videos)} validation videos: "
            f"top-1 {100 * best['val_top1']:.2f} %, top-5 {100 * best['val_top5']:.2f} %, average error "
            f"{100 * best['val_average_error']:.2f} % with {self.options.frames} segments.\n"
            f"Next: python -m aggregate.evaluate --checkpoint {self.out / 'best.pt'} --videos {self.options.videos},\n"
            f"or python -m extract --weights {self.out / 'best.pt'}, to train HG-NL on its cache."
        )


def predict_videos(model: "Recogniser", videos: "VideoFrames", *, batch_size: int, autocast: Any) -> "np.ndarray":
    """Logits float32 [N, crops, C] of all videos, rows of NaN for those that cannot be decoded (`videos.failed`)."""
    import numpy as np
    import torch

    model.eval()
    logits: np.ndarray | None = None
    with torch.inference_mode():
        for batch in videos.test_batches(batch_size=batch_size):
            views = [batch.frames[:, crop] for crop in range(batch.frames.shape[1])]
            with autocast():
                several = torch.stack([model(view, batch.mask) for view in views], dim=1).float().cpu().numpy()
            if logits is None:
                logits = np.full((len(videos.videos), *several.shape[1:]), np.nan, np.float32)
            logits[batch.places] = several
    if logits is None:
        classes = model.net.classifier.out_features  # type: ignore[union-attr]
        logits = np.full((len(videos.videos), videos.plan.crops, classes), np.nan, np.float32)  # type: ignore[arg-type]
    return logits


# -- Ray Train -----------------------------------------------------------------------------------------------------


def _main_with_ray(options: Options) -> int:
    """Data parallel: `workers` processes of Ray Train, each with its share of every batch."""
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    Trainer(options)  # what is wrong with the options is said here, in words, before processes start
    if not ray.is_initialized():
        ray.init(address=options.address, log_to_driver=True)
    gpus = ray.cluster_resources().get("GPU", 0) >= options.workers and options.device in ("auto", "cuda")
    absolute = {
        name: str(Path(value).resolve())
        for name, value in asdict(options).items()
        if name in ("videos", "root", "init") and value is not None
    }
    absolute["out"] = str((options.out or Path("runs") / f"finetune-{options.model}").resolve())
    if Path(options.weights).is_file():
        absolute["weights"] = str(Path(options.weights).resolve())
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={**asdict(options), **absolute},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=gpus),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(name="finetune", storage_path=str(Path(absolute["out"]) / "ray")),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunError(f"a worker failed: {error}") from None
    return 0


def _ray_worker(config: dict[str, Any]) -> None:
    from ray import train

    context = train.get_context()
    paths = {name: Path(config[name]) for name in ("videos", "root", "init", "out") if config[name] is not None}
    options = Options(**{**config, **paths, "val_groups": tuple(config["val_groups"])})
    Trainer(options, rank=context.get_world_rank(), world=context.get_world_size()).run()


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.finetune"))
