"""python -m aggregate.finetune on real clips with a tiny backbone: steps, initial weights, resumed
runs, and the commands that follow."""

import csv
import importlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from aggregate import evaluate, finetune, train
from aggregate.data.frames import VideoFrames
from aggregate.endtoend import model_from_record
from aggregate.finetune import Options, prepare
from aggregate.inference import predict
from aggregate.models import build
from aggregate.scores import Scores
from aggregate.training.checkpoint import Checkpoint
from decode_jobs import prepare_row
from extract import InputError, RunError
from extract.__main__ import Options as ExtractOptions
from extract.__main__ import main as extract
from extract.backbone.model import load_trunk
from extract.cli import run_command
from extract.commands import COMMANDS
from extract.decode import decode
from extract.decode.jobs import Plan
from extract.listing.videos import list_videos
from extract.sampling import segment_centers
from extract.store import FeatureStore
from extract.workers.rows import RowDecoder
from processes import running

BACKBONE = "test_resnet"  # timm's: four stages, 160 x 160, 96 features


@pytest.fixture(scope="module")
def videos(tmp_path_factory, request) -> Path:
    """12 real clips of two classes (8 to train, 4 to validate). One of them is broken."""
    folder = tmp_path_factory.mktemp("clips")
    source = Path(__file__).parents[2] / "pipelines" / "clips" / "exercise_mini"
    with (source / "labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["label"] in ("barbell", "kettlebells")]
    chosen = [
        row
        for name in ("barbell", "kettlebells")
        for row in [r for r in rows if r["label"] == name][:6]
    ]
    for number, row in enumerate(chosen):
        split = "val" if number % 3 == 2 else "train"
        target = folder / split / row["label"] / Path(row["path"]).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source / "clips" / row["path"])
    (folder / "train" / "barbell" / "broken.mp4").write_bytes(b"no video at all")
    return folder


def options(videos: Path, out: Path, model: str = "tsn", **changes) -> Options:
    quick = {
        "epochs": 2,
        "batch_size": 4,
        "lr": 0.01,
        "decode_workers": 1,
        "weights": "random",
        "backbone": BACKBONE,
    }
    if model == "hgnl":
        quick |= {"g1": 4, "g2": 2, "m1": 16}
    return Options(model=model, videos=videos, out=out, **(quick | changes))


def test_a_clip_is_a_function_of_seed_epoch_and_id(videos):
    preprocessing = load_trunk(BACKBONE, weights="random").preprocessing
    plan = Plan(frames=3, crops=1, augment_passes=0, preprocessing=preprocessing, clip_length=2)
    video = list_videos(videos / "val").videos[0]

    def seen(epoch: int | None, seed: int = 0) -> np.ndarray:
        out = np.zeros(plan.shape, np.uint8)
        prepare_row(video.path, video.id, replace(plan, seed=seed, epoch=epoch), out)
        return out.reshape(3, 2, preprocessing.size, preprocessing.size, 3)

    assert np.array_equal(seen(0), seen(0))
    assert not np.array_equal(seen(0), seen(1))
    assert not np.array_equal(seen(0), seen(0, seed=1))
    test = seen(None)
    whole = decode(
        video.path,
        lambda count: np.clip(segment_centers(count, 3)[:, None] + [0, 1], 0, count - 1).ravel(),
    )
    assert (
        whole.indices.reshape(3, 2)[:, 1].tolist()
        == (segment_centers(whole.num_frames, 3) + 1).tolist()
    )
    assert test.any()


@pytest.mark.parametrize("model", ["tsn", "nl", "hgnl", "txb", "stnet"])
def test_every_model_trains_and_is_tested_from_its_checkpoint(model, videos, tmp_path, capsys):
    changes = {"frames_per_segment": 2} if model == "stnet" else {}
    assert finetune.main(options(videos, tmp_path / "run", model, epochs=1, **changes)) == 0
    printed = capsys.readouterr().out
    assert "1 of 9 training videos were left out: train/barbell/broken.mp4" in printed
    for name in ("best.pt", "last.pt", "metrics.csv", "options.json", "results.json"):
        assert (tmp_path / "run" / name).exists()
    asked = evaluate.Options(
        tmp_path / "run" / "best.pt",
        videos=videos,
        segments=(3, 5),
        crops=3,
        out=tmp_path / "s.h5",
        decode_workers=1,
    )
    assert evaluate.main(asked) == 0
    scores = Scores.load(tmp_path / "s.h5", 3)
    assert scores.crops.shape == (4, 3, 2)
    best = Checkpoint.load(tmp_path / "run" / "best.pt")
    # Validation saw one crop, the first of three.
    top1 = (scores.crops[:, 0].argmax(1) == scores.labels).mean()
    assert top1 == pytest.approx(best.metrics["val_top1"])


def test_a_broken_video_counts_as_an_error_in_a_test(videos, tmp_path):
    finetune.main(options(videos, tmp_path / "run", epochs=1))
    asked = evaluate.Options(
        tmp_path / "run" / "best.pt",
        videos=videos,
        split="train",
        segments=(1,),
        out=tmp_path / "s.h5",
    )
    evaluate.main(asked)
    scores = Scores.load(tmp_path / "s.h5")
    assert [scores.ids[row] for row in np.flatnonzero(scores.failed)] == [
        "train/barbell/broken.mp4"
    ]


def states(folder: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.load(folder / "last.pt").training["learners"][0]["learner"]["model"]


def test_a_resumed_run_is_the_undisturbed_run_bit_for_bit(videos, tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        wanted = options(videos, tmp_path / "whole", "hgnl", epochs=3)
        finetune.main(wanted)
        cut = replace(wanted, out=tmp_path / "cut")
        with prepare(cut) as run:
            end_epoch = run.end_epoch

            def dies(*args):
                if run.epoch == 1:
                    raise KeyboardInterrupt
                return end_epoch(*args)

            run.end_epoch = dies
            with pytest.raises(KeyboardInterrupt):
                run.train()
        finetune.main(cut)
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = states(tmp_path / "whole"), states(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    for key in ("state_dict",):
        best, again = (
            getattr(Checkpoint.load(tmp_path / run / "best.pt"), key) for run in ("whole", "cut")
        )
        assert all(torch.equal(best[name], again[name]) for name in best)


def test_kill_9_loses_only_the_epoch_in_hand_and_leaves_no_child(videos, tmp_path):
    wanted = options(videos, tmp_path / "run", epochs=500)
    flags = f"--model tsn --videos {videos} --out {tmp_path / 'run'} --epochs 500 --batch-size 4 --lr 0.01"
    command = (
        f"aggregate.finetune {flags} --decode-workers 1 --weights random --backbone {BACKBONE}"
    )
    with running(command, until=(tmp_path / "run" / "last.pt").exists) as process:
        children = psutil.Process(process.pid).children(recursive=True)
    _gone, alive = psutil.wait_procs(children, timeout=60)
    assert children
    assert not alive
    with prepare(wanted) as run:
        assert run.epoch >= 1
        assert len(run.history) == run.epoch


def test_batches_in_micro_batches_are_the_same_update(videos, tmp_path):
    # Batch norm is not trained: with other batches it would see other statistics.
    settings = {"epochs": 1, "dropout": 0.0, "batch_size": 8, "train_batch_norm": False}
    updates = []
    for micro_batch in (8, 2):
        out = tmp_path / str(micro_batch)
        with prepare(options(videos, out, micro_batch=micro_batch, **settings)) as run:
            before = {name: value.clone() for name, value in run.learners[0].net.named_parameters()}
            run.learners[0].frozen = list(run.learners[0].net.backbone.modules())
            run.train()
            after = dict(run.learners[0].net.named_parameters())
        updates.append({name: (after[name] - before[name]).detach() for name in before})
    whole, parts = updates
    for name in ("classifier.weight", "classifier.bias", "backbone.layer1.0.conv1.weight"):
        assert (parts[name] - whole[name]).norm() < 0.01 * whole[name].norm(), name


def test_partial_batch_norm_keeps_all_but_the_first(videos, tmp_path):
    with prepare(options(videos, tmp_path / "run")) as run:
        net = run.learners[0].net
        before = {name: value.clone() for name, value in net.state_dict().items()}
        run.train()
    after = net.state_dict()
    moved = {
        name
        for name in before
        if name.endswith("running_mean") and not torch.equal(before[name], after[name])
    }
    assert moved == {"backbone.conv1.1.running_mean"}  # the first batch norm, in a deep stem
    assert not torch.equal(
        before["backbone.layer1.0.conv1.weight"], after["backbone.layer1.0.conv1.weight"]
    )


def test_a_frozen_backbone_and_a_slower_one(videos, tmp_path):
    with prepare(options(videos, tmp_path / "frozen", backbone_lr=0, epochs=1)) as run:
        net = run.learners[0].net
        before = net.state_dict()["backbone.layer1.0.conv1.weight"].clone()
        run.train()
    assert torch.equal(before, net.state_dict()["backbone.layer1.0.conv1.weight"])
    with prepare(options(videos, tmp_path / "slow", backbone_lr=0.1, epochs=1)) as slow:
        assert sorted({group["lr_scale"] for group in slow.learners[0].optimizer.param_groups}) == [
            0.1,
            1.0,
        ]


def test_activations_computed_again_change_no_step(videos, tmp_path):
    common = {"epochs": 1, "dropout": 0.0}
    finetune.main(options(videos, tmp_path / "kept", **common))
    finetune.main(options(videos, tmp_path / "again", checkpoint_activations=True, **common))
    one, other = states(tmp_path / "kept"), states(tmp_path / "again")
    torch.testing.assert_close(
        one["classifier.weight"], other["classifier.weight"], rtol=1e-3, atol=1e-5
    )
    with pytest.raises(
        InputError, match="--checkpoint-activations: timm's legacy_seresnet18 does not support it"
    ):
        finetune.main(
            options(
                videos, tmp_path / "run", backbone="legacy_seresnet18", checkpoint_activations=True
            )
        )


def test_a_run_with_an_option_that_is_no_more_is_not_resumed_in_silence(videos, tmp_path):
    wanted = options(videos, tmp_path / "run", epochs=1)
    finetune.main(wanted)
    recorded = json.loads((tmp_path / "run" / "options.json").read_text())
    (tmp_path / "run" / "options.json").write_text(json.dumps(recorded | {"ema": 0.9}))
    with pytest.raises(InputError, match="was started by another version of this program"):
        finetune.main(wanted)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    torch.save({"format": "hgnl-checkpoint", "version": 99}, tmp_path / "new.pt")
    with pytest.raises(InputError, match="has version 99; this program reads 1"):
        Checkpoint.load(tmp_path / "new.pt")


# -- the road between cached features and end to end --------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(videos, tmp_path_factory) -> Path:
    """Features of the same clips by the same random backbone, and a TSN and an HG-NL trained on
    them."""
    folder = tmp_path_factory.mktemp("cached")
    extract(
        ExtractOptions(
            videos=videos,
            out=str(folder / "f.zarr"),
            backbone=BACKBONE,
            weights="random",
            frames=3,
            precision="fp32",
            max_failed=1.0,
        )
    )
    common = {
        "features": str(folder / "f.zarr"),
        "epochs": 10,
        "batch_size": 4,
        "lr": 0.05,
        "optimizer": "adamw",
    }
    train.main(train.Options(agg="tsn", out=folder / "tsn", **common))
    groups = {"g1": 4, "g2": 2, "m1": 16, "scale_init": 0.5}
    train.main(train.Options(agg="hgnl", out=folder / "hgnl", **common, **groups))
    return folder


def test_the_logits_at_step_0_are_the_cached_models_on_the_same_frames(videos, cached, tmp_path):
    store = FeatureStore.open(cached / "f.zarr")
    checkpoint = Checkpoint.load(cached / "hgnl" / "best.pt")
    assert checkpoint.options["standardize"]  # with the statistics of its batch norm
    model = checkpoint.model()
    rows = np.flatnonzero(store.splits == "val")
    with prepare(
        options(videos, tmp_path / "run", "hgnl", init=cached / "hgnl" / "best.pt")
    ) as run:
        (logits,) = run.source.validate([run.learners[0].model], 3, run.learners[0])
        assert [video.id for video in run.source.testing.videos] == store.ids[rows].tolist()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(store.gather(rows, np.arange(3))))
    np.testing.assert_allclose(logits, theirs.numpy(), rtol=5e-3, atol=5e-3)
    assert np.ptp(logits) > 0.02, "equal because nothing was learned"


def test_features_of_other_weights_do_not_start_a_fine_tuning(videos, cached, tmp_path):
    with pytest.raises(
        InputError,
        match=r"not those .*tsn/best.pt was trained on: .*seed 1 instead of .*seed 0",
    ):
        finetune.main(options(videos, tmp_path / "run", init=cached / "tsn" / "best.pt", seed=1))


def test_finetune_then_extract_then_hgnl_from_its_tsn(videos, tmp_path, capsys):
    """HG-NL follows its TSN as in the paper: on features of the fine-tuned backbone, and from the
    TSN's classifier."""
    finetune.main(options(videos, tmp_path / "tsn", epochs=1))
    tuned = tmp_path / "tsn" / "best.pt"
    checkpoint = Checkpoint.load(tuned)
    # One epoch leaves weights near 0, whose logits could not be told from those of zero weights.
    weight = torch.randn(
        checkpoint.state_dict["classifier.weight"].shape, generator=torch.Generator().manual_seed(0)
    )
    replace(checkpoint, state_dict=checkpoint.state_dict | {"classifier.weight": weight}).save(
        tuned
    )
    settings = {
        "backbone": BACKBONE,
        "weights": str(tuned),
        "frames": 3,
        "precision": "fp32",
        "max_failed": 1.0,
    }
    extract(ExtractOptions(videos=videos, out=str(tmp_path / "f.zarr"), **settings))
    store = FeatureStore.open(tmp_path / "f.zarr")
    rows = np.flatnonzero(store.splits == "val")
    net = model_from_record(Checkpoint.load(tuned))
    common = {
        "features": str(tmp_path / "f.zarr"),
        "epochs": 1,
        "lr": 1e-12,
        "recipe": "paper",
        "batch_size": 4,
    }
    train.main(
        train.Options(agg="hgnl", out=tmp_path / "hgnl", init=tuned, g1=4, g2=2, m1=16, **common)
    )
    assert "2 carried over by class name" in capsys.readouterr().out
    hgnl = Checkpoint.load(tmp_path / "hgnl" / "best.pt").model()
    plan = Plan(frames=3, crops=1, augment_passes=0, preprocessing=net.preprocessing)
    with RowDecoder.start(plan, workers=1, timeout=60) as decoder:
        frames = VideoFrames(
            [v for v in list_videos(videos).videos if v.split == "val"], plan, decoder
        )
        _, (whole,) = predict([net], frames.test_batches(batch_size=4))
    with torch.inference_mode():
        logits = hgnl(torch.from_numpy(store.gather(rows, np.arange(3))))
    np.testing.assert_allclose(logits.numpy(), whole[:, 0], rtol=5e-3, atol=5e-3)
    assert np.abs(whole).min() > 0.1


def test_a_fine_tuned_checkpoint_starts_another_with_its_backbone_and_classes(
    videos, tmp_path, capsys
):
    finetune.main(options(videos, tmp_path / "tsn", epochs=1))
    old = Checkpoint.load(tmp_path / "tsn" / "best.pt")
    k600 = replace(old, classes=["kettlebells", "snowboarding"])
    k600.save(tmp_path / "k600.pt")
    with prepare(options(videos, tmp_path / "hgnl", "hgnl", init=tmp_path / "k600.pt")) as run:
        state = run.learners[0].net.state_dict()
    assert "1 carried over by class name, 1 start fresh" in capsys.readouterr().out
    assert torch.equal(state["backbone.conv1.0.weight"], old.state_dict["backbone.conv1.0.weight"])
    assert torch.equal(state["classifier.weight"][1], old.state_dict["classifier.weight"][0])


def test_a_stnet_of_several_frames_starts_from_its_own_checkpoint(videos, tmp_path):
    """Its first convolution is as wide as two frames. Other models cannot use it, and the error
    says so."""
    stnet = {"frames_per_segment": 2, "frames": 2}
    finetune.main(options(videos, tmp_path / "one", "stnet", epochs=1, **stnet))
    best = tmp_path / "one" / "best.pt"
    with prepare(options(videos, tmp_path / "two", "stnet", init=best, **stnet)) as run:
        state = run.learners[0].net.state_dict()
    for name, value in Checkpoint.load(best).state_dict.items():
        assert torch.equal(state[name], value), name
    other = options(videos, tmp_path / "three", "stnet", init=best)
    with pytest.raises(
        InputError, match="sees 2 frames per segment at once, this model 1; pass --model stnet"
    ):
        finetune.main(other)
    with pytest.raises(
        InputError, match="holds the backbone test_resnet; pass --backbone test_resnet"
    ):
        finetune.main(replace(other, backbone="resnet10t"))


def test_the_next_commands_run_as_they_are_printed(videos, tmp_path, capsys, monkeypatch):
    """The folders have no validation split, so a fifth is held out, and exactly that fifth is
    scored."""
    folders = tmp_path / "my clips"
    for clip in videos.rglob("*.mp4"):
        if clip.parent.name == "barbell" or clip.parent.name == "kettlebells":
            target = folders / clip.parent.name / clip.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(clip.resolve())
    monkeypatch.chdir(tmp_path)
    finetune.main(options(folders, Path("run"), epochs=1, val_fraction=0.4))
    printed = capsys.readouterr().out
    lines = [line.removeprefix("Next: ") for line in printed.splitlines() if "hgnl " in line]
    assert len(lines) == 2
    for line in lines:
        name, *words = shlex.split(line)[1:]
        module = COMMANDS[name]
        command = importlib.import_module("extract.__main__" if module == "extract" else module)
        more = [
            "--decode-workers",
            "1",
            *(["--frames", "3", "--max-failed", "0.5"] if module == "extract" else []),
        ]
        assert run_command(command.main, command.Options, prog=module, args=[*words, *more]) == 0
    scores, recorded = (
        Scores.load("run.h5"),
        list(csv.DictReader(Path("run/videos.csv").read_text().splitlines())),
    )
    assert sorted(scores.ids) == sorted(row["id"] for row in recorded if row["role"] == "validate")
    assert scores.source["trained_on"] == 0
    assert len(FeatureStore.open("run.zarr")) == 13


def test_txb_trained_on_cached_features_starts_a_stnet(videos, cached, tmp_path):
    common = {
        "features": str(cached / "f.zarr"),
        "epochs": 1,
        "batch_size": 4,
        "standardize": False,
    }
    train.main(train.Options(agg="txb", out=tmp_path / "txb", **common))
    with prepare(
        options(videos, tmp_path / "run", "stnet", init=tmp_path / "txb" / "best.pt")
    ) as run:
        ours = run.learners[0].net.state_dict()
    theirs = Checkpoint.load(tmp_path / "txb" / "best.pt").state_dict
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


# -- what is wrong is said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("tsn", {"frames_per_segment": 2}, "--frames-per-segment 2 is for stnet"),
        ("tsn", {"micro_batch": 0}, "--micro-batch 0: expected at least 1"),
        ("tsn", {"backbone": "resnet5O"}, "resnet5O"),
        ("hgnl", {"g1": 5}, "g2 2 does not divide g1 5"),
        ("stnet", {"backbone": "test_vit"}, "four stages"),
        ("tsn", {"init": Path("none.pt")}, "the checkpoint none.pt does not exist"),
        ("tsn", {"videos": Path("nowhere")}, "nowhere"),
    ],
)
def test_wrong_options_are_named(model, changes, message, videos, tmp_path):
    with pytest.raises(InputError, match=message):
        finetune.main(replace(options(videos, tmp_path / "run", model), **changes))


def test_no_video_that_decodes_ends_the_run(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            target = tmp_path / "v" / split / name / "x.mp4"
            target.parent.mkdir(parents=True)
            target.write_bytes(b"nothing")
    with pytest.raises(RunError, match="none of the 2 videos can be decoded; train/"):
        finetune.main(options(tmp_path / "v", tmp_path / "run"))


def test_no_validation_video_that_decodes_ends_the_run(videos, tmp_path):
    shutil.copytree(videos / "train", tmp_path / "v" / "train")
    for name in ("barbell", "kettlebells"):
        target = tmp_path / "v" / "val" / name / "x.mp4"
        target.parent.mkdir(parents=True)
        target.write_bytes(b"nothing")
    with pytest.raises(RunError, match="none of the 2 videos to test on can be decoded"):
        finetune.main(options(tmp_path / "v", tmp_path / "run"))


def test_out_of_memory_says_which_batch_to_try(videos, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("aggregate.training.learner.Learner.step", no_memory)
    with pytest.raises(RunError, match="try --micro-batch 6"):
        finetune.main(options(videos, tmp_path / "run", micro_batch=12))


def test_a_loss_that_diverges_says_so(videos, tmp_path):
    with pytest.raises(RunError, match="a smaller --lr"):
        finetune.main(options(videos, tmp_path / "run", lr=1e30))


def test_checkpoints_without_a_backbone_ask_for_features(videos, tmp_path):
    model = build("tsn", dim=96, num_classes=2)
    Checkpoint(model.options, ["a", "b"], model.state_dict(), {}, 3).save(tmp_path / "c.pt")
    with pytest.raises(InputError, match="give --features"):
        evaluate.main(evaluate.Options(tmp_path / "c.pt", videos=videos))
