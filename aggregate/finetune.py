"""python -m aggregate.finetune: TSN, NL, HG-NL and StNet trained end to end, from videos through the backbone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aggregate.training.options import (
    HeadOptions,
    ScheduleOptions,
    SplitOptions,
    VideoOptions,
    aggregator_options,
    changes_of,
)
from extract.cli import InputError, RunError, run_command

if TYPE_CHECKING:
    import torch

    from aggregate.endtoend import Recogniser
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.learner import Learner
    from aggregate.training.recipes import Recipe
    from aggregate.training.run import Run
    from aggregate.training.sources import DecodedVideos
    from extract.backbone.model import Trunk

_FREE_ON_RESUME = ("out", "device", "workers", "address", "decode_workers", "micro_batch")


@dataclass(frozen=True)
class Options(HeadOptions, ScheduleOptions, SplitOptions, VideoOptions):
    """Train a backbone together with its aggregator, or StNet, on videos; run again to resume.

    Where no recipe is named it is the paper's: TSN 40 epochs, NL and HG-NL 8, StNet 20.
    """

    model: Literal["tsn", "max", "weighted", "nl", "hgnl", "txb", "stnet"]
    """An aggregator over the backbone's frame features, or stnet."""
    videos: Path
    """As for python -m extract: a folder, or a CSV with --root."""
    out: Path | None = None
    """The run folder (default: runs/finetune-MODEL)."""
    backbone: str = "legacy_seresnext101_32x4d"
    weights: str = "pretrained"
    """Where the backbone starts: pretrained, random, or a file."""
    init: Path | None = None
    """A checkpoint to start from: of cached features (same backbone and weights), or fine-tuned (its backbone too)."""
    frames_per_segment: int = 1
    """stnet: N, the frames of a super-image."""
    form: Literal["released", "paper"] = "released"
    """stnet: the temporal block of the released code, or of the paper."""
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
    workers: int = 1
    """Data-parallel processes; more than one run in Ray Train."""
    address: str | None = None
    """A Ray cluster (auto, or host:port)."""
    limit: int | None = None
    """Only the first so many videos to train on."""
    seed: int = 0

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"finetune-{self.model}"


def main(options: Options) -> int:
    _check(options)
    if options.workers > 1 or options.address is not None:
        return _train_with_ray(options)
    return train(options)


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


def train(options: Options, *, rank: int = 0, world: int = 1) -> int:
    """Train to the end as one process, `rank` of `world`; rank 0 prints and writes."""
    with prepare(options, rank=rank, world=world) as run:
        _train(run, options)
    return 0


def _train(run: "Run", options: Options) -> None:
    source: Any = run.source
    with _out_of_memory_named(run.learners[0].device, options):
        if options.model == "stnet" and options.form == "paper" and run.epoch == 0:
            _calibrate(run.learners[0], source, options)
        run.train()
        if run.writes and source.failed:
            videos = source.training.videos
            some = "; ".join(f"{videos[place].id}: {why}" for place, why in list(source.failed.items())[:3])
            print(f"{len(source.failed)} of {len(videos)} training videos were left out: {some}")
        run.report()  # every process tests its share
    if run.writes:
        best = run.out / "best.pt"
        print(
            f"Next: python -m aggregate.evaluate --checkpoint {best} --videos {options.videos},\n"
            f"or python -m extract --weights {best}, to train HG-NL on its cache."
        )


@contextmanager
def prepare(options: Options, *, rank: int = 0, world: int = 1) -> "Iterator[Run]":
    """The run that `options` ask for, at the epoch where its folder stands; its decoding processes end with it."""
    import numpy as np
    import torch

    from aggregate.data.clips import ClipPlan
    from aggregate.data.frames import VideoFrames
    from aggregate.training.learner import choose_device
    from aggregate.training.run import Run, open_folder
    from aggregate.training.sources import DecodedVideos
    from aggregate.training.splits import ListedVideos, check_classes, choose_rows
    from extract.listing.videos import list_videos

    device_name = options.device
    if world > 1 and device_name == "auto" and torch.cuda.is_available():
        device_name = f"cuda:{rank % torch.cuda.device_count()}"
    device = choose_device(device_name)
    last = open_folder(options.folder, options, free=_FREE_ON_RESUME)
    listing = list_videos(options.videos, labels=options.labels, root=options.root)
    listed = ListedVideos(str(options.videos), listing.videos, listing.classes)
    rows, val_rows, words = choose_rows(listed, options, options.seed)
    check_classes(listed, rows, allow_missing=options.allow_missing_classes)
    videos = [listing.videos[row] for row in rows][: options.limit]
    val_videos = [listing.videos[row] for row in val_rows]
    recipe = _recipe(options, len(videos))
    learner, record = _learner(options, recipe, list(listing.classes), len(videos), device, rank, world)
    model: Any = learner.model
    plan = ClipPlan(options.frames, options.frames_per_segment, model.preprocessing, decoder=options.decoder)
    cores = options.decode_workers or max(1, len(os.sched_getaffinity(0)) // world)
    pool: dict[str, Any] = {"workers": cores, "timeout": options.video_timeout}
    pool["nice"] = 10 if device.type == "cpu" else 0
    labels = np.array([video.label for video in val_videos])
    features = {"backbone": record["name"], **{k: record[k] for k in ("weights", "preprocessing")}}
    common = {"classes": list(listing.classes), "features": features, "frames": options.frames, "backbone": record}
    with VideoFrames(videos, plan, **pool) as training, VideoFrames(val_videos[rank::world], plan, **pool) as testing:
        source = DecodedVideos(
            training,
            testing,
            labels=labels,
            frames=options.frames,
            batch_size=recipe.batch_size,
            micro_batch=options.micro_batch,
            seed=options.seed,
            precision=learner.precision,
            classes=len(listing.classes),
            rank=rank,
            world=world,
        )
        run = Run(options.folder, options, [learner], source, common=common, segments=(options.frames,))
        run.resume(last)
        if rank == 0:
            print(
                f"videos    {words}\nmodel     {options.model} over {options.backbone}, {_parameters(model)} "
                f"on {device} in {learner.precision}, {world} process(es)\n"
                f"recipe    {recipe}, backbone at {options.backbone_lr:g} of it",
                flush=True,
            )
        yield run


def _learner(
    options: Options, recipe: "Recipe", classes: list[str], videos: int, device: "torch.device", rank: int, world: int
) -> "tuple[Learner, dict[str, Any]]":
    """The learner of process `rank` of `world`, and the record of its backbone."""
    import torch

    from aggregate.training.learner import Learner

    model, frozen, record = build_model(options, classes, recipe.dropout, tell=rank == 0)
    model.to(device).net.to(memory_format=torch.channels_last)
    learner = Learner(
        name=options.model,
        model=model,
        recipe=recipe,
        steps_per_epoch=-(-videos // recipe.batch_size),
        seed=options.seed,
        device=device,
        groups=_parameter_groups(model, recipe, options.backbone_lr),
        precision=options.precision,
        micro_batch=options.micro_batch,
        ema=options.ema,
        frozen=frozen,
        rank=rank,
        world=world,
    )
    return learner, record


def _recipe(options: Options, videos: int) -> "Recipe":
    from aggregate.training.recipes import recipe

    # The paper's 256 where there are enough videos for some steps an epoch.
    few = min(256, max(8, 1 << (max(videos // 8, 1).bit_length() - 1)))
    changes = changes_of(options) | {"batch_size": options.batch_size or few, "clip": options.clip}
    return recipe("paper", options.model, videos=videos, **changes)


def build_model(
    options: Options, classes: list[str], dropout: float, *, tell: bool = True
) -> "tuple[Recogniser, list[Any], dict[str, Any]]":
    """The network with its start (backbone weights, then what --init holds), its frozen batch norms, and the record of
    its backbone."""
    import torch

    from aggregate.endtoend import Recogniser, backbone_record, build_net, freeze_batch_norms
    from aggregate.training.checkpoint import Checkpoint
    from extract.backbone.model import load_trunk

    init = None if options.init is None else Checkpoint.load(options.init)
    with_backbone = init is not None and init.backbone is not None
    weights = str(options.init) if with_backbone else options.weights
    trunk = load_trunk(options.backbone, weights=weights, seed=options.seed)
    record = backbone_record(trunk)
    if init is not None and not with_backbone:
        _check_same_backbone(init, record)
    torch.manual_seed(options.seed)
    net: Any = build_net(_model_options(options, trunk, len(classes), dropout), trunk.module)
    if init is not None:
        carried = _carry_over(net, init, options, classes)
        if tell:
            print(f"init      {carried}")
    frozen = [] if options.train_batch_norm else freeze_batch_norms(net.backbone)
    if options.backbone_lr == 0:
        for parameter in net.backbone.parameters():
            parameter.requires_grad_(False)
    if options.checkpoint_activations:
        try:
            net.backbone.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise InputError(f"--checkpoint-activations: timm's {options.backbone} does not know how to") from None
    return Recogniser(net, trunk.preprocessing), frozen, record


def _model_options(options: Options, trunk: "Trunk", classes: int, dropout: float) -> dict[str, Any]:
    common: dict[str, Any] = {"name": options.model, "num_classes": classes, "dropout": dropout, "dim": trunk.dim}
    if options.model == "stnet":
        return {**common, "frames_per_segment": options.frames_per_segment, "form": options.form}
    return {**common, **aggregator_options(options.model, options)}


def _check_same_backbone(init: "Checkpoint", record: dict[str, Any]) -> None:
    """Classifiers of cached features start from the very features they were trained on, or not at all."""
    theirs = {"name": init.features.get("backbone"), **{k: init.features.get(k) for k in ("weights", "preprocessing")}}
    for name, value in record.items():
        if theirs[name] != value:
            raise InputError(
                f"--init {init.path} was trained on features of {name} {theirs[name]}, this run has {value}; "
                "give its --backbone and --weights"
            )


def _carry_over(net: Any, init: "Checkpoint", options: Options, classes: list[str]) -> str:
    """Start `net` from what fits in `init`; that in words."""
    from aggregate.models import carry_over

    if options.model != "stnet":
        carried = carry_over(net, init.state_dict, classes=classes, source_classes=init.classes)
        return f"{options.init}: {carried}"
    state = net.state_dict()
    fits = {
        name: value
        for name, value in init.state_dict.items()
        if name in state
        and state[name].shape == value.shape
        and (init.classes == classes or not name.startswith("classifier."))
    }
    net.load_state_dict({**state, **fits})
    return f"{len(fits)} of {len(state)} tensors from {options.init}, the others start fresh"


def _parameter_groups(model: "Recogniser", recipe: "Recipe", backbone_lr: float) -> list[dict[str, Any]]:
    from torch import nn

    from aggregate.training.recipes import parameter_groups

    net: Any = model.net
    rest = nn.ModuleList([child for name, child in net.named_children() if name != "backbone"])
    return parameter_groups(rest, recipe) + parameter_groups(net.backbone, recipe, lr_scale=backbone_lr)


def _parameters(model: "Recogniser") -> str:
    every = list(model.parameters())
    trained = sum(parameter.numel() for parameter in every if parameter.requires_grad)
    return f"{trained:,} of {sum(parameter.numel() for parameter in every):,} parameters trained"


def _calibrate(learner: "Learner", source: "DecodedVideos", options: Options) -> None:
    """The paper's temporal block is the identity only once its batch norm knows the maps (FACTS 5)."""
    from aggregate.data.frames import normalised

    model: Any = learner.model
    see = model.preprocessing
    batches = source.training.train_batches(epoch=0, batch_size=options.micro_batch, seed=options.seed + 1)
    model.net.calibrate(normalised(batch.x, see.mean, see.std, learner.device) for batch in islice(batches, 8))


@contextmanager
def _out_of_memory_named(device: "torch.device", options: Options) -> Iterator[None]:
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        least = max(1, options.micro_batch // 2)
        raise RunError(
            f"{device} has too little memory for {options.micro_batch} videos of {options.frames} frames at once; "
            f"try --micro-batch {least}, which changes nothing else, or --checkpoint-activations"
        ) from None


# -- Ray Train -----------------------------------------------------------------------------------------------------


def _train_with_ray(options: Options) -> int:
    """Data parallel: `workers` processes of Ray Train, each with its share of every batch."""
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    with prepare(options):
        pass  # what is wrong with the options is said here, in words, before processes start
    if not ray.is_initialized():
        ray.init(address=options.address, log_to_driver=True)
    gpus = ray.cluster_resources().get("GPU", 0) >= options.workers and options.device in ("auto", "cuda")
    paths: dict[str, Any] = {"videos": options.videos, "root": options.root, "init": options.init}
    paths["out"] = options.folder
    config = {**asdict(options), **{k: str(Path(v).resolve()) for k, v in paths.items() if v is not None}}
    if Path(options.weights).is_file():
        config["weights"] = str(Path(options.weights).resolve())
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=gpus),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(name="finetune", storage_path=str(Path(config["out"]) / "ray")),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunError(f"a worker failed: {error}") from None
    return 0


def _ray_worker(config: dict[str, Any]) -> None:
    from ray import train as ray_train

    context = ray_train.get_context()
    paths = {name: Path(config[name]) for name in ("videos", "root", "init", "out") if config[name] is not None}
    options = Options(**{**config, **paths, "val_groups": tuple(config["val_groups"])})
    train(options, rank=context.get_world_rank(), world=context.get_world_size())


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.finetune"))
