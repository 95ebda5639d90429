"""python -m aggregate.finetune: train a backbone and its aggregator, or StNet, on videos."""

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
from extract import InputError, Record, RunError
from extract.cli import check_ranges, run_as_script
from extract.commands import command_line
from extract.cores import available_cores

if TYPE_CHECKING:
    import torch

    from aggregate.endtoend import FrameModel
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.learner import Learner
    from aggregate.training.run import Run


@dataclass(frozen=True)
class Options(HeadOptions, ScheduleOptions, SplitOptions, VideoOptions):
    """Train a backbone together with its aggregator, or StNet, on videos; run again to resume.

    The recipe is the paper's: 40 epochs for TSN, 8 for NL and HG-NL, 20 for StNet.
    """

    model: Aggregator | Literal["stnet"]
    """An aggregator over the backbone's frame features, or stnet."""
    videos: Path
    """As for python -m extract: a folder, or a CSV with --root."""
    out: Path | None = None
    """The run folder (default: runs/finetune-MODEL)."""
    backbone: str = "legacy_seresnext101_32x4d"
    weights: str = "pretrained"
    """The weights that the backbone starts from: pretrained, random, or a file."""
    init: Path | None = None
    """A checkpoint to start from: trained on cached features of the same backbone and weights, or
    fine-tuned (with its backbone)."""
    frames_per_segment: int = 1
    """For stnet: N, the number of frames per super-image."""
    backbone_lr: float = 1.0
    """Factor on --lr for the backbone; 0 freezes it."""
    micro_batch: int = 16
    """Videos that go through the network at once; the gradients of a batch are accumulated."""
    train_batch_norm: bool = False
    """Train all batch norms of the backbone; by default all but the first are frozen (partial
    BN)."""
    checkpoint_activations: bool = False
    """Recompute the backbone's activations in the backward pass: less memory, more time."""
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
    check_ranges(options)
    if options.model != "stnet" and options.frames_per_segment > 1:
        raise InputError(
            f"--frames-per-segment {options.frames_per_segment} is for stnet, "
            f"not for {options.model}"
        )
    if options.workers > 1 or options.address is not None:
        _train_with_ray(options)
    else:
        train(options)
    return 0


def train(options: Options, *, rank: int = 0, world: int = 1) -> None:
    """Train to the end as process `rank` of `world`; rank 0 prints and writes."""
    import torch

    from extract.durable import locked

    folder_lock = locked(options.folder) if rank == 0 else nullcontext()
    with folder_lock, prepare(options, rank=rank, world=world) as run:
        try:
            run.train()
            if run.writes:
                _print_failed(run.source.training)
            run.report()  # every process tests its share
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if not out_of_memory and "can't allocate memory" not in str(error):
                raise
            raise RunError(
                f"{run.learners[0].device} has too little memory for {options.micro_batch} videos "
                f"of {options.frames} frames at once; try "
                f"--micro-batch {max(1, options.micro_batch // 2)}, which changes nothing else"
            ) from None
        if run.writes:
            _print_next_commands(options, run.out)


def _print_failed(training: Any) -> None:
    if training.failed:
        failures = [f"{training.videos[row].id}: {why}" for row, why in training.failed.items()]
        count = f"{len(failures)} of {len(training.videos)} training videos"
        print(f"{count} were left out: {'; '.join(failures[:3])}")


def _print_next_commands(options: Options, out: Path) -> None:
    best = out / "best.pt"
    listing: dict[str, Any] = {"videos": options.videos, "root": options.root}
    if options.labels != "auto":
        listing |= {"labels": options.labels}
    tested = {**listing, "checkpoint": best, "split": "held-out", "out": f"{out}.h5"}
    print(f"Next: {command_line('aggregate.evaluate', **tested)}")
    if options.model != "stnet":
        store = {"backbone": options.backbone, "weights": best, "out": f"{out}.zarr"}
        print("or, to train heads on the features of its backbone:")
        print(command_line("extract", **listing, **store))


@contextmanager
def prepare(options: Options, *, rank: int = 0, world: int = 1) -> "Iterator[Run]":
    """The run of `options`, resumed if its folder holds one; its decoding processes end with it."""
    import torch

    from aggregate.data.frames import VideoFrames
    from aggregate.madds import count_parameters
    from aggregate.training.manifest import choose_or_continue
    from aggregate.training.run import Run, open_folder
    from aggregate.training.sources import DecodedVideos
    from aggregate.training.splits import ListedVideos, group_keys
    from extract.decode.jobs import Plan
    from extract.device import choose_device
    from extract.listing.videos import list_videos
    from extract.workers.rows import RowDecoder

    spread = world > 1 and options.device == "auto" and torch.cuda.is_available()
    device = choose_device(f"cuda:{rank % torch.cuda.device_count()}" if spread else options.device)
    last = open_folder(options)
    listing = ListedVideos(list_videos(options.videos, labels=options.labels, root=options.root))
    classes = list(listing.classes)
    chosen = choose_or_continue(listing, options, last)
    videos = [listing.videos[row] for row in chosen.train]
    val_videos = [listing.videos[row] for row in chosen.validate[rank::world]]
    schedule = _recipe(options, len(videos))
    learner, features = _learner(options, classes, schedule, len(videos), device, rank, world)
    model: Any = learner.model
    plan = Plan(options.frames, 1, 0, model.preprocessing, clip_length=options.frames_per_segment)
    cores = options.decode_workers or max(1, available_cores() // world)
    with RowDecoder.start(plan, workers=cores, timeout=options.video_timeout) as decoder:
        source = DecodedVideos(
            VideoFrames(videos, plan, decoder),
            VideoFrames(val_videos, plan, decoder),
            listing.labels[chosen.validate],
            group_keys(listing.ids, listing.groups)[chosen.validate],
            len(classes),
            options.frames,
        )
        segments = (options.frames,)
        run = Run(options, [learner], source, listing, chosen, features, last, segments)
        if rank == 0:
            trained, in_all = count_parameters(model, trained=True), count_parameters(model)
            execution = f"{device} in {learner.precision}, {world} process(es)"
            print(f"videos    {chosen.description}")
            print(
                f"model     {options.model} over {options.backbone}, {trained:,} of {in_all:,} "
                f"parameters trained on {execution}"
            )
            print(f"recipe    {schedule}, backbone at {options.backbone_lr:g} of it", flush=True)
        yield run


def _learner(
    options: Options,
    classes: list[str],
    schedule: Recipe,
    num_videos: int,
    device: "torch.device",
    rank: int,
    world: int,
) -> "tuple[Learner, Record]":
    """The learner: the model with its optimizer. Also the record of its backbone."""
    import torch
    from torch import nn

    from aggregate.training.learner import Learner

    model, frozen, features = build_model(options, classes, schedule.dropout, verbose=rank == 0)
    model.to(device).net.to(memory_format=torch.channels_last)
    net: Any = model.net
    head = nn.ModuleList([child for name, child in net.named_children() if name != "backbone"])
    groups = parameter_groups(head, schedule)
    groups += parameter_groups(net.backbone, schedule, lr_scale=options.backbone_lr)
    learner = Learner(
        name=options.model,
        model=model,
        recipe=schedule,
        steps_per_epoch=-(-num_videos // schedule.batch_size),
        seed=options.seed,
        device=device,
        groups=groups,
        precision=options.precision,
        micro_batch=options.micro_batch,
        frozen=frozen,
        rank=rank,
        world=world,
    )
    return learner, features


def _recipe(options: Options, videos: int) -> Recipe:
    """The paper's recipe, with smaller batches if there are few videos.

    Gradients are clipped as in tsn-pytorch.
    """
    power_of_two = 1 << (max(videos // 8, 1).bit_length() - 1)
    batch_size = options.batch_size or min(256, max(8, power_of_two))
    changes = changes_of(options) | {"batch_size": batch_size, "clip": 20.0}
    return recipe("paper", options.model, videos=videos, **changes)


def build_model(
    options: Options, classes: list[str], dropout: float, *, verbose: bool = True
) -> "tuple[FrameModel, list[Any], Record]":
    """The model with its initial weights, its frozen batch norms, and its backbone's record."""
    import torch

    from aggregate.endtoend import (
        FrameModel,
        backbone_record,
        build_net,
        check_backbone,
        freeze_batch_norms,
    )
    from aggregate.models import carry_over, strip_prefix
    from aggregate.training.checkpoint import Checkpoint
    from extract.backbone.model import load_trunk
    from extract.decode.transform import is_clip_wise
    from extract.sources import sha256_of

    if is_clip_wise(options.backbone):
        raise InputError(
            f"--backbone {options.backbone}: clip-wise backbones stay frozen; extract their "
            "features with hgnl extract, and train a head with hgnl train"
        )
    init = None if options.init is None else Checkpoint.load(options.init)
    tuned = init if init is not None and init.holds_backbone else None
    # The backbone of a fine-tuned --init is loaded below, once the network has its shapes.
    trunk = load_trunk(
        options.backbone, weights="random" if tuned else options.weights, seed=options.seed
    )
    if init is not None and tuned is None:
        check_backbone(init, trunk)  # a classifier fits the features it was trained on only
    torch.manual_seed(options.seed)
    own: dict[str, Any] = {"frames_per_segment": options.frames_per_segment}
    if options.model != "stnet":
        own = aggregator_options(options.model, options, init.options if init else None)
        own |= {"standardize": bool(options.standardize)}
    own |= {"name": options.model, "num_classes": len(classes), "dropout": dropout}
    own["dim"] = trunk.dim
    net: Any = build_net(own, trunk.module)
    if tuned is not None:
        _check_tuned(tuned, options, net)
        net.backbone.load_state_dict(strip_prefix(tuned.state_dict, "backbone."))
        weights = {"name": Path(tuned.path).name, "sha256": sha256_of(tuned.path)}
        trunk = replace(trunk, weights=weights)
    if init is not None:
        temporal_blocks = {
            name: tensor for name, tensor in init.state_dict.items() if name.startswith("after_res")
        }
        net.load_state_dict(temporal_blocks, strict=False)  # empty unless both are StNets
        carried = carry_over(net, init.state_dict, classes=classes, source_classes=init.classes)
        if verbose:
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
        raise InputError(f"--checkpoint-activations: timm's {name} does not support it") from None


def _check_tuned(init: "Checkpoint", options: Options, net: Any) -> None:
    """Raise InputError unless the backbone in a fine-tuned checkpoint fits that of `net`."""
    backbone = init.features["backbone"]
    if backbone != options.backbone:
        raise InputError(
            f"--init {init.path} holds the backbone {backbone}; pass --backbone {backbone}"
        )
    # A StNet has widened the first convolution for the frames of a segment.
    theirs, ours = (held.get("frames_per_segment", 1) for held in (init.options, net.options))
    if theirs != ours:
        raise InputError(
            f"--init {init.path} sees {theirs} frames per segment at once, this model {ours}; "
            f"pass --model stnet --frames-per-segment {theirs}, or another --init"
        )


def _train_with_ray(options: Options) -> None:
    """Train data-parallel in `workers` processes of Ray Train."""
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError, get_context
    from ray.train.torch import TorchConfig, TorchTrainer

    from extract.workers.ray_pool import job_config

    # Workers have another working directory, so every path must be absolute.
    absolute: dict[str, Any] = {"out": options.folder.resolve()}
    for name in ("videos", "root", "init"):
        if (path := getattr(options, name)) is not None:
            absolute[name] = path.resolve()
    for name in ("weights", "labels"):
        if (path := Path(getattr(options, name))).is_file():
            absolute[name] = str(path.resolve())
    options = replace(options, **absolute)
    with prepare(options):
        pass  # wrong options raise here, before processes start
    if not ray.is_initialized():
        ray.init(address=options.address, log_to_driver=True, job_config=job_config())
    enough_gpus = ray.cluster_resources().get("GPU", 0) >= options.workers
    gpus = enough_gpus and options.device in ("auto", "cuda")
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
    run_as_script()
