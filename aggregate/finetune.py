"""python -m aggregate.finetune: TSN, NL, HG-NL and StNet trained end to end, from videos through
the backbone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aggregate.training.options import (
    Aggregator,
    HeadOptions,
    ScheduleOptions,
    SplitOptions,
    VideoOptions,
    aggregator_options,
    changes_of,
)
from aggregate.training.recipes import Recipe, parameter_groups, recipe
from extract import InputError, RunError
from extract.cli import run_command
from extract.commands import command_line
from extract.cores import available_cores

if TYPE_CHECKING:
    from aggregate.endtoend import FrameModel
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.learner import Learner
    from aggregate.training.run import Run


@dataclass(frozen=True)
class Options(HeadOptions, ScheduleOptions, SplitOptions, VideoOptions):
    """Train a backbone together with its aggregator, or StNet, on videos; run again to resume.

    Where no recipe is named it is the paper's: TSN 40 epochs, NL and HG-NL 8, StNet 20.
    """

    model: Aggregator | Literal["stnet"]
    """An aggregator over the backbone's frame features, or stnet."""
    videos: Path
    """As for python -m extract: a folder, or a CSV with --root."""
    out: Path | None = None
    """The run folder (default: runs/finetune-MODEL)."""
    backbone: str = "legacy_seresnext101_32x4d"
    weights: str = "pretrained"
    """Where the backbone starts: pretrained, random, or a file."""
    init: Path | None = None
    """A checkpoint to start from: of cached features (same backbone and weights), or fine-tuned
    (its backbone too)."""
    frames_per_segment: int = 1
    """stnet: N, the frames of a super-image."""
    backbone_lr: float = 1.0
    """What --lr is multiplied by for the backbone; 0 freezes it."""
    micro_batch: int = 16
    """Videos that go through the network at once; gradients of a batch are added up."""
    train_batch_norm: bool = False
    """Train all batch norms of the backbone; by default all but the first keep their statistics
    (partial BN)."""
    checkpoint_activations: bool = False
    """Compute activations of the backbone again in the backward pass: less memory, more time."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    workers: int = 1
    """Data-parallel processes; more than one run in Ray Train."""
    address: str | None = None
    """A Ray cluster (auto, or host:port)."""
    seed: int = 0

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"finetune-{self.model}"


def main(options: Options) -> int:
    _check(options)
    if options.workers > 1 or options.address is not None:
        _train_with_ray(options)
    else:
        train(options)
    return 0


def _check(options: Options) -> None:
    for name in ("frames", "frames_per_segment", "micro_batch", "workers"):
        if getattr(options, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1"
            )
    if options.model != "stnet" and options.frames_per_segment > 1:
        raise InputError(
            f"--frames-per-segment {options.frames_per_segment} is for stnet, not for {options.model}"
        )
    if options.backbone_lr < 0:
        raise InputError(f"--backbone-lr {options.backbone_lr:g}: expected 0 or more")


def train(options: Options, *, rank: int = 0, world: int = 1) -> None:
    """Train to the end as one process, `rank` of `world`; rank 0 prints and writes."""
    import torch

    from extract.durable import locked

    alone = locked(options.folder) if rank == 0 else nullcontext()  # the others write nothing
    with alone, prepare(options, rank=rank, world=world) as run:
        training: Any = run.source.training
        try:
            run.train()
            if run.writes and training.failed:
                some = [
                    f"{training.videos[place].id}: {why}"
                    for place, why in list(training.failed.items())[:3]
                ]
                count = f"{len(training.failed)} of {len(training.videos)} training videos"
                print(f"{count} were left out: {'; '.join(some)}")
            run.report()  # every process tests its share
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
                error
            ):
                raise
            raise RunError(
                f"{run.learners[0].device} has too little memory for {options.micro_batch} videos of {options.frames} "
                f"frames at once; try --micro-batch {max(1, options.micro_batch // 2)}, which changes nothing else"
            ) from None
        if run.writes:
            best = run.out / "best.pt"
            listing: dict[str, Any] = {"videos": options.videos, "root": options.root}
            if options.labels != "auto":
                listing |= {"labels": options.labels}
            tested = {**listing, "checkpoint": best, "split": "held-out", "out": f"{run.out}.h5"}
            print(f"Next: {command_line('aggregate.evaluate', **tested)}")
            if options.model != "stnet":
                store = {"backbone": options.backbone, "weights": best, "out": f"{run.out}.zarr"}
                print("or, to train heads on the features of its backbone:")
                print(command_line("extract", **listing, **store))


@contextmanager
def prepare(options: Options, *, rank: int = 0, world: int = 1) -> "Iterator[Run]":
    """The run of `options`, at the epoch its folder is at; its decoding processes end with it."""
    import numpy as np
    import torch

    from aggregate.data.frames import VideoFrames, clip_pool
    from aggregate.training.manifest import (
        choose_or_continue,
        record,
        refuse_other_data,
        videos_csv,
    )
    from aggregate.training.run import Run, open_folder
    from aggregate.training.sources import DecodedVideos
    from aggregate.training.splits import ListedVideos, group_keys
    from extract.decode.jobs import Plan
    from extract.device import choose_device
    from extract.listing.videos import list_videos

    spread = world > 1 and options.device == "auto" and torch.cuda.is_available()
    device = choose_device(f"cuda:{rank % torch.cuda.device_count()}" if spread else options.device)
    last = open_folder(options.folder, options)
    listing = list_videos(options.videos, labels=options.labels, root=options.root)
    classes = list(listing.classes)
    listed = ListedVideos(listing)
    chosen = choose_or_continue(listed, options, options.seed, options.folder, last)
    videos = [listing.videos[row] for row in chosen.train]
    val_videos = [listing.videos[row] for row in chosen.validate]
    schedule = _recipe(options, len(videos))
    model, frozen, features = build_model(options, classes, schedule.dropout, tell=rank == 0)
    model.to(device).net.to(memory_format=torch.channels_last)
    learner = _learner(options, model, schedule, len(videos), frozen, device, rank, world)
    plan = Plan(options.frames, 1, 0, model.preprocessing, clip_length=options.frames_per_segment)
    cores = options.decode_workers or max(1, available_cores() // world)
    data = record(listed, chosen, init=options.init, recipe=schedule)
    if last is not None:
        refuse_other_data(options.folder, last, listed, features, data)
    common = {"classes": classes, "features": features, "frames": options.frames, "data": data}
    with clip_pool(
        plan, workers=cores, timeout=options.video_timeout, nice=10 * (device.type == "cpu")
    ) as pool:
        training = VideoFrames(videos, plan, pool)
        testing = VideoFrames(val_videos[rank::world], plan, pool)
        labels = np.array([video.label for video in val_videos])
        groups = group_keys(listed.ids, listed.groups)[chosen.validate]
        source = DecodedVideos(
            training, testing, labels, groups, len(classes), options.frames, learner
        )
        run = Run(
            options.folder, options, [learner], source, common=common, segments=(options.frames,)
        )
        run.videos_csv = videos_csv(listed, chosen)
        run.resume(last)
        if rank == 0:
            where = f"{_parameters(model)} on {device} in {learner.precision}, {world} process(es)"
            print(
                f"videos    {chosen.description}\nmodel     {options.model} over {options.backbone}, {where}"
            )
            print(f"recipe    {schedule}, backbone at {options.backbone_lr:g} of it", flush=True)
        yield run


def _learner(
    options: Options,
    model: "FrameModel",
    schedule: Recipe,
    videos: int,
    frozen: list[Any],
    device: Any,
    rank: int,
    world: int,
) -> "Learner":
    """The model with its optimizer, to train on `videos` videos."""
    from aggregate.training.learner import Learner

    return Learner(
        name=options.model,
        model=model,
        recipe=schedule,
        steps_per_epoch=-(-videos // schedule.batch_size),
        seed=options.seed,
        device=device,
        groups=_parameter_groups(model, schedule, options.backbone_lr),
        precision=options.precision,
        micro_batch=options.micro_batch,
        frozen=frozen,
        rank=rank,
        world=world,
    )


def _recipe(options: Options, videos: int) -> Recipe:
    # The paper's 256 where there are enough videos for some steps an epoch; tsn-pytorch's limit of
    # the gradient.
    few = min(256, max(8, 1 << (max(videos // 8, 1).bit_length() - 1)))
    changes = changes_of(options) | {"batch_size": options.batch_size or few, "clip": 20.0}
    return recipe("paper", options.model, videos=videos, **changes)


def build_model(
    options: Options, classes: list[str], dropout: float, *, tell: bool = True
) -> "tuple[FrameModel, list[Any], dict[str, Any]]":
    """The network with its start (backbone weights, then what --init holds), its frozen batch
    norms, and the record of its backbone."""
    import torch

    from aggregate.endtoend import (
        FrameModel,
        backbone_record,
        build_net,
        check_backbone,
        freeze_batch_norms,
    )
    from aggregate.models import carry_over
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.manifest import sha256_of
    from extract.backbone.model import load_trunk
    from extract.decode.transform import is_clip_wise

    init = None if options.init is None else Checkpoint.load(options.init)
    with_backbone = init is not None and init.holds_backbone
    if is_clip_wise(options.backbone):
        raise InputError(
            f"--backbone {options.backbone}: clip-wise backbones stay frozen; extract their features with "
            "hgnl extract, and train a head with hgnl train"
        )
    # The backbone of --init is loaded below, into the network with the shapes of its training.
    trunk = load_trunk(
        options.backbone, weights="random" if with_backbone else options.weights, seed=options.seed
    )
    if init is not None and not with_backbone:
        # A classifier starts from the very features it was trained on, or not at all.
        check_backbone(init, trunk)
    torch.manual_seed(options.seed)
    own: dict[str, Any] = {"frames_per_segment": options.frames_per_segment}
    if options.model != "stnet":
        own = aggregator_options(options.model, options, init.options if init else None)
        own |= {"standardize": bool(options.standardize)}
    own |= {"name": options.model, "num_classes": len(classes), "dropout": dropout}
    own["dim"] = trunk.dim
    net: Any = build_net(own, trunk.module)
    if init is not None and with_backbone:
        _load_backbone(net, init, options)
        trunk = replace(
            trunk, weights={"name": Path(init.path).name, "sha256": sha256_of(init.path)}
        )
    if init is not None:
        kept = init.state_dict.items()
        blocks = {name: value for name, value in kept if name.startswith("after_res")}
        net.load_state_dict(blocks, strict=False)  # of a StNet, in a StNet
        carried = carry_over(net, init.state_dict, classes=classes, source_classes=init.classes)
        if tell:
            print(f"init      {options.init}: {carried}")
    frozen = [] if options.train_batch_norm else freeze_batch_norms(net.backbone)
    if options.backbone_lr == 0:
        net.backbone.requires_grad_(False)
    if options.checkpoint_activations:
        _checkpoint_activations(net.backbone, options.backbone)
    return FrameModel(net, trunk.preprocessing), frozen, backbone_record(trunk)


def _checkpoint_activations(backbone: Any, name: str) -> None:
    try:
        backbone.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        raise InputError(f"--checkpoint-activations: timm's {name} does not know how to") from None


def _load_backbone(net: Any, init: "Checkpoint", options: Options) -> None:
    """Start the backbone of `net` from the one that a fine-tuned checkpoint holds. InputError for
    another one."""
    backbone = init.features["backbone"]
    if backbone != options.backbone:
        raise InputError(
            f"--init {init.path} holds the backbone {backbone}; pass --backbone {backbone}"
        )
    # A StNet has widened the first convolution for the frames of a segment.
    theirs, ours = (held.get("frames_per_segment", 1) for held in (init.options, net.options))
    if theirs != ours:
        hint = f"pass --model stnet --frames-per-segment {theirs}, or another --init"
        raise InputError(
            f"--init {init.path} sees {theirs} frames per segment at once, this model {ours}; {hint}"
        )
    held = {name: value for name, value in init.state_dict.items() if name.startswith("backbone.")}
    net.backbone.load_state_dict(
        {name.removeprefix("backbone."): value for name, value in held.items()}
    )


def _parameter_groups(
    model: "FrameModel", schedule: Recipe, backbone_lr: float
) -> list[dict[str, Any]]:
    from torch import nn

    net: Any = model.net
    rest = nn.ModuleList([child for name, child in net.named_children() if name != "backbone"])
    return parameter_groups(rest, schedule) + parameter_groups(
        net.backbone, schedule, lr_scale=backbone_lr
    )


def _parameters(model: "FrameModel") -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{trained:,} of {sum(parameter.numel() for parameter in model.parameters()):,} parameters trained"


def _train_with_ray(options: Options) -> None:
    """Data parallel: `workers` processes of Ray Train, each with its share of every batch."""
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError, get_context
    from ray.train.torch import TorchConfig, TorchTrainer

    from extract.workers.ray_pool import job_config

    # Workers have another working directory.
    there: dict[str, Any] = {name: getattr(options, name) for name in ("videos", "root", "init")}
    there = {name: path.resolve() for name, path in there.items() if path is not None}
    for name in ("weights", "labels"):
        if Path(getattr(options, name)).is_file():
            there[name] = str(Path(getattr(options, name)).resolve())
    options = replace(options, out=options.folder.resolve(), **there)
    with prepare(options):
        pass  # what is wrong with the options is said here, in words, before processes start
    if not ray.is_initialized():
        ray.init(address=options.address, log_to_driver=True, job_config=job_config())
    gpus = ray.cluster_resources().get("GPU", 0) >= options.workers and options.device in (
        "auto",
        "cuda",
    )
    trainer = TorchTrainer(
        lambda: train(
            options, rank=get_context().get_world_rank(), world=get_context().get_world_size()
        ),
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=gpus),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(name="finetune", storage_path=str(options.folder / "ray")),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunError(f"a worker failed: {error}") from None


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.finetune"))
