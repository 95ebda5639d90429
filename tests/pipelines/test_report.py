"""python -m pipelines.report on a whole folder of runs, on incomplete ones and on an empty
folder."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from html import unescape
from itertools import combinations
from pathlib import Path

import jinja2
import lxml.html
import numpy as np
import pandas as pd
import pytest
import torch

import ensemble.__main__ as fusing
import pipelines.report.__main__ as report
from aggregate import ablate, audit, evaluate, figures, train
from aggregate.metrics import summarize
from aggregate.scores import Scores
from extract import InputError
from extract.cli import run_command
from extract.store import FeatureStore
from extract.store.layout import store_attributes
from pipelines.__main__ import main as hgnl
from pipelines.report import compared, gallery, page, results
from pipelines.report.find import Contents, find
from pipelines.report.page import render
from stores import classes_store, fail_rows

SECTIONS = (
    "summary",
    "results",
    "confusion",
    "attention",
    "crossval",
    "ablation",
    "ensemble",
    "training",
    "audit",
    "map",
    "extracted",
    "provenance",
)


class Page:
    """The content of a page. Raises AssertionError if its markup is not complete."""

    def __init__(self, html: str) -> None:
        self.html = html
        parser = lxml.html.HTMLParser()
        tree = lxml.html.fromstring(html, parser=parser)
        # libxml2 knows no HTML 5, so it calls <section> and others unknown.
        assert [error for error in parser.error_log if error.type_name != "HTML_UNKNOWN_TAG"] == []
        assert not tree.xpath("//script | //iframe | //object"), "the page needs no scripts"
        ids = tree.xpath("//@id")
        assert len(ids) == len(set(ids)), "an id is on the page twice"
        self.links = [str(link) for link in tree.xpath("//@href | //@src")]
        self.words = {
            section.get("id"): section.text_content() for section in tree.xpath("//section")
        }
        self.images = {}  # by what they show
        for image in tree.xpath("//img"):
            kind, _, data = image.get("src").partition(";base64,")
            assert kind in ("data:image/svg+xml", "data:image/jpeg")
            self.images[image.get("alt")] = base64.b64decode(data, validate=True)
        self.commands = [code.text_content() for code in tree.xpath("//code")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store with failed videos, a TSN and an HG-NL trained on it, their scores and their
    ensemble."""
    root = tmp_path_factory.mktemp("runs")
    features = str(root / "deep" / "feats.zarr")
    classes_store(Path(features))
    fail_rows(Path(features), [4, 5])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for agg, own in {"tsn": {}, "hgnl": {"g1": 4, "g2": 2, "m1": 8, "scale_init": 0.1}}.items():
        train.main(
            train.Options(
                agg=agg, features=features, out=root / agg, epochs=2, batch_size=16, lr=0.01, **own
            )
        )
        checkpoint = root / agg / "best.pt"
        evaluate.main(
            evaluate.Options(
                checkpoint=checkpoint, features=features, out=root / "scores" / f"{agg}.h5"
            )
        )
    torch.set_num_threads(threads)
    both = (root / "scores" / "tsn.h5", root / "scores" / "hgnl.h5")
    fusing.main(fusing.Options(scores=both, out=root / "fused.h5"))
    grid = {
        "g1": (2, 4),
        "g2": (2, 4),
        "m1": (8,),
        "seeds": (0, 1),
        "epochs": (1,),
        "batch_size": (16,),
    }
    ablate.main(ablate.Options(agg=("tsn", "hgnl"), features=features, out=root / "grid", **grid))
    audit.main(audit.Options(features, both[0], out=root / "audit"))
    (root / "cv").mkdir()
    shutil.copy(
        both[0], root / "cv" / "tsn.h5"
    )  # as if from held-out folds: of a split that no other has
    (root / "cv" / "results.json").write_text(json.dumps(crossval_record()))
    return root


def crossval_record() -> dict:
    """A record as aggregate.crossval writes it, with two heads."""
    around = {"value": 0.5, "low": 0.4, "high": 0.625}
    one = dict.fromkeys(("top1", "top5", "average_error"), around) | {
        "over_seeds": None,
        "by_seed": [0.5],
    }
    gain = {"value": 0.07, "low": -0.01, "high": 0.15}
    segments = [
        {"3": one | {"difference": None}, "16": one | {"difference": found}}
        for found in (None, gain)
    ]
    heads = [
        {"name": name, "scores": f"{name}.h5", "segments": each}
        for name, each in zip(("tsn", "hgnl"), segments, strict=True)
    ]
    common = {
        "by": "5",
        "folds": list("01234"),
        "videos": 1440,
        "classes": 6,
        "baseline": "tsn",
        "seeds": [0],
    }
    return {"schema": "hgnl-crossval/1", **common, "heads": heads}


@pytest.fixture(scope="module")
def videos(folder, tmp_path_factory) -> Path:
    """A real clip under each of the ids."""
    root = tmp_path_factory.mktemp("videos")
    clip = Path(__file__).parent.parent / "clips" / "codecs" / "h264_16x16.mp4"
    assert clip.is_file()
    (root / "v").mkdir()
    for name in FeatureStore.open(folder / "deep" / "feats.zarr").ids:
        (root / name).symlink_to(clip)
    return root


@pytest.fixture(scope="module")
def whole(folder, videos, tmp_path_factory) -> Page:
    out = tmp_path_factory.mktemp("page") / "new" / "report.html"
    assert report.main(report.Options(rundir=folder, out=out, videos=(videos,))) == 0
    return Page(out.read_text(encoding="utf-8"))


def made(root: Path, **options) -> Page:
    return Page(render(find(root, **options), "a test"))


def test_every_figure_is_on_the_page(whole):
    assert list(SECTIONS) == list(whole.words), (
        "a section is missing, or something is said to be missing"
    )
    for shows in (
        "Videos of deep/feats.zarr by split and status",
        "class 0: v/",
        "Training loss over epochs",
        "Validation top-1 % over epochs",
        "Validation average error % over epochs",
        "Attention: frame weights from even (0) to a single frame (100), % over epochs",
        "Attention: predictions that it changes, % over epochs",
        "Top-1 of every model with its interval",
        "Confusion matrix of ensemble",
        "Attention of hgnl along v/",
        "Map of the features of deep/feats.zarr, colored by class",
        "Top-1 of every head in cv/results.json",
        "Gain of every head over tsn in cv/results.json",
        "Heat map of grid/ablation.csv: hgnl",
        "Pareto front of grid/ablation.csv: top-1 over parameters",
        "Weights of the models in fused.json",
        "Contribution of each model in fused.json",
    ):
        assert any(alt.startswith(shows) for alt in whole.images), (
            f"no picture {shows!r} among {list(whole.images)}"
        )
    for picture in whole.images.values():
        assert picture.startswith((b"<svg", b"\xff\xd8"))
        assert b"mathdefault" not in picture, "a tick is written as mathematics"


def test_the_page_stands_alone(whole):
    assert all(link.startswith(("data:", "#")) for link in whole.links)
    assert {link[1:] for link in whole.links if link.startswith("#")} <= set(whole.words)
    assert not re.search(r"https?:|url\(|@import|//", re.sub(r"base64,[^\"]*", "", whole.html))
    for picture in whole.images.values():
        if picture.startswith(b"<svg"):  # what an SVG names are its namespaces and places in itself
            named = set(re.findall(rb"https?://[^\"' <]+", picture))
            assert named <= {b"http://www.w3.org/2000/svg", b"http://www.w3.org/1999/xlink"}
            assert all(
                link.startswith((b"#", b"data:"))
                for link in re.findall(rb"href=\"([^\"]*)", picture)
            )


def test_it_says_what_it_shows(whole, folder):
    extracted = whole.words["extracted"]
    assert "60 videos of 3 classes" in extracted
    assert "v/0004.mp4: a test made it fail" in extracted
    store = FeatureStore.open(folder / "deep" / "feats.zarr")
    ok = (store.status == 1) & (store.splits == "train")
    assert re.search(rf"train\s*{ok.sum()}\s*0\s*2\s*0", extracted)
    results = json.loads((folder / "hgnl" / "results.json").read_text())
    top1 = results["hgnl"]["6"]["top1"]
    assert (
        f"{100 * top1['value']:.2f} [{100 * top1['low']:.1f}, {100 * top1['high']:.1f}]"
        in whole.words["results"]
    )
    assert "2 groups over 6 frames; an even share is 16.7%" in whole.words["attention"]
    assert "videos that the run was validated on" in whole.words["attention"]
    assert "FeatureStore.from_arrays" in whole.words["provenance"]
    assert "5 folds, 1 seed, 1,440 videos of 6 classes" in whole.words["crossval"]
    assert "cv/tsn.h5" not in whole.words["results"]
    assert re.search(r"Split val\s.*ensemble, equal weights", whole.words["results"], re.DOTALL)
    assert "not named" not in whole.words["results"]
    cells = r"hgnl, 16 segments\s*50.00 \[40.0, 62.5\]\s*(50.00 \[40.0, 62.5\]\s*){2}\+7.00 \[-1.0, \+15.0\]"
    assert re.search(cells, whole.words["crossval"])
    assert re.search(r"hgnl g1=4 g2=2 m1=8\s*2\s*[\d,]+\s*\d+\.\d\d \[", whole.words["ablation"])


def test_a_phone_and_paper_are_thought_of(whole):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in whole.html
    assert "@media print" in whole.html
    assert whole.html.count('class="scroll wide"') == sum(
        alt.startswith("Attention of") for alt in whole.images
    )


def test_the_same_results_give_the_same_bytes(folder, videos, whole):
    again = render(find(folder, (videos,)), folder.name)
    assert again == whole.html


def test_thumbnails_only_where_videos_are_at_hand(folder, tmp_path):
    without = made(folder)
    assert (
        "No frames are shown: --videos DIR says where the videos are." in without.words["extracted"]
    )
    assert "no frames of the videos: --videos DIR says where they are" in without.words["missing"]
    assert not any(alt.startswith("class ") for alt in without.images)
    films = [
        picture
        for alt, picture in without.images.items()
        if alt.startswith("Attention of hgnl along")
    ]
    assert films
    assert all(film.startswith(b"<svg") for film in films)
    elsewhere = made(folder, videos=(tmp_path,))
    assert "none of its videos is in --videos" in elsewhere.words["extracted"]


def test_a_clip_that_cannot_be_read_is_left_out(folder, videos, tmp_path):
    store = FeatureStore.open(folder / "deep" / "feats.zarr")
    broken = tmp_path / store.ids[0]
    broken.parent.mkdir()
    broken.write_bytes(b"no video")
    assert gallery.thumbnails(store, 0, np.array([0]), (tmp_path,), height=20) == []
    frames = gallery.thumbnails(store, 0, np.array([0, 99_999]), (videos,), height=20, square=True)
    assert [frame.shape for frame in frames] == [(20, 20, 3)] * 2


def test_spans_are_counted_and_their_frames_are_those_of_the_file(demo_clips, tmp_path):
    clip = next((demo_clips / "daily_actions" / "clips").glob("*/*.mp4"))
    common = {"lengths": [2] * 4, "labels": [0] * 4, "classes": ["only"]}
    FeatureStore.from_arrays(
        tmp_path / "s.zarr", np.ones((4, 2, 4)), ids=["whole.mp4", "a", "b", "c"], **common
    )
    store = FeatureStore.open(tmp_path / "s.zarr")
    store.starts, store.ends = np.array([np.nan, 0, 1, 2]), np.array([np.nan, 1, 2, 4])
    store.ids = np.array(
        ["whole.mp4", "long.mp4#0-1000", "long.mp4#1000-2000", "long.mp4#2000-4000"], object
    )
    (tmp_path / "long.mp4").symlink_to(clip)
    (shown,) = gallery.extracted(Contents(stores={"s.zarr": store}, videos=(tmp_path,)))
    assert shown["spans"] == {"rows": 3, "files": 1, "seconds": 1}
    assert sorted(id for _, id, _ in shown["samples"]) == store.ids[1:].tolist()


def test_an_audit_is_shown_with_both_videos_of_a_pair(folder, videos, tmp_path):
    store = FeatureStore.open(folder / "deep" / "feats.zarr")
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 16)).astype(np.float32)
    features[[30, 31]] = features[[0, 1]]  # planted copies
    FeatureStore.from_arrays(
        tmp_path / "copies.zarr",
        features[:, None],
        lengths=np.ones(60, int),
        labels=np.arange(60) % 2,
        classes=["<run>", "jump"],
        ids=store.ids.tolist(),
        splits=["train"] * 30 + ["test"] * 30,
    )
    logits = np.eye(2, dtype=np.float32)[np.arange(60) % 2] * 6
    logits[7] = logits[8]  # a planted wrong label
    Scores(store.ids.tolist(), ["<run>", "jump"], logits, np.arange(60) % 2).save(
        tmp_path / "oof.h5"
    )
    features_path = str(tmp_path / "copies.zarr")
    out = tmp_path / "runs" / "audit"
    audit.main(audit.Options(features_path, tmp_path / "oof.h5", out=out))
    page = made(tmp_path / "runs", videos=(videos,))
    words = page.words["audit"]
    for row, copy in ((0, 30), (1, 31)):
        assert store.ids[row] in words
        assert store.ids[copy] in words
        names = [("<run>", "jump")[at % 2] + ": " + store.ids[at] for at in (row, copy)]
        assert all(page.images[name].startswith(b"\xff\xd8") for name in names)
    assert "across test/train, similarity 1.00, distance 0.00 of the usual one" in words
    assert "1 labels are contradicted" in words
    assert page.images[f"jump or <run>: {store.ids[7]}"].startswith(b"\xff\xd8")
    assert "No frames are shown" not in words

    shutil.rmtree(features_path)  # the audit alone: text without pictures
    alone = made(tmp_path / "runs", videos=(videos,))
    assert not any("or <run>" in alt for alt in alone.images)
    assert "No frames are shown" in alone.words["audit"]
    assert store.ids[30] in alone.words["audit"]


def test_partial_runs_show_what_there_is(folder, tmp_path):
    shutil.copytree(folder / "hgnl", tmp_path / "begun")
    for name in ("results.json", "best.pt", "last.pt"):
        (tmp_path / "begun" / name).unlink()
    begun = made(tmp_path)
    assert "Training loss over epochs" in begun.images
    lacks = "run begun: no results.json, best.pt; run its command again, which resumes it"
    assert lacks in begun.words["missing"]
    assert {"results", "extracted", "confusion", "map", "ensemble"}.isdisjoint(begun.words)

    (tmp_path / "begun" / "metrics.csv").write_text("")  # killed before the first epoch ended
    assert "training" not in made(tmp_path).words


def test_an_ablation_under_way_shows_what_is_done(folder, tmp_path):
    whole, begun = folder / "grid", tmp_path / "grid"
    begun.mkdir()
    for name in ("options.json", "results.jsonl"):  # which do not make it a training run
        shutil.copy(whole / name, begun / name)
    lines = (whole / "ablation.csv").read_text().splitlines()
    (begun / "ablation.csv").write_text("\n".join([lines[0], *lines[1:3]]))
    shown = made(tmp_path)
    assert {"ablation", "missing"} == set(shown.words)
    assert "over videos, of one seed" in shown.words["ablation"]
    (begun / "ablation.csv").write_text("g1,g2\n4,2\n")
    assert "ablation: KeyError('name')" in made(tmp_path).words["problems"]


def test_the_summary_of_an_ablation_is_read_unless_it_is_of_fewer_rows(folder, tmp_path):
    shutil.copytree(folder / "grid", tmp_path / "grid")
    file = tmp_path / "grid" / "summary.csv"
    summary = pd.read_csv(file).assign(seconds=12345.6)
    summary.to_csv(file, index=False)
    assert "12345.6" in made(tmp_path).words["ablation"]
    summary[1:].to_csv(file, index=False)
    assert "12345.6" not in made(tmp_path).words["ablation"]


def test_scores_alone(folder, tmp_path):
    shutil.copy(folder / "scores" / "tsn.h5", tmp_path / "tsn.h5")
    alone = made(tmp_path)
    assert {"summary", "results", "confusion", "provenance", "missing"} == set(alone.words)
    assert "Split val" in alone.words["results"]
    assert "tsn is best (the only model): top-1" in alone.words["summary"]


def test_an_unlabeled_scores_file_and_an_unfinished_store(tmp_path):
    Scores(["a", "b"], ["x", "y"], np.eye(2)).save(tmp_path / "test.h5")
    pending = {
        "labels": [-1],
        "splits": [""],
        "groups": [""],
        "classes": ["x"],
        "views": ["center"],
    }
    FeatureStore.create(
        tmp_path / "s.zarr",
        ids=["a.mp4"],
        frames=2,
        dim=4,
        block_size=2,
        provenance={"made": "here"},
        **pending,
    )
    shown = made(tmp_path)
    assert "1 videos of 1 classes" in shown.words["extracted"]
    assert "No video has a label." in shown.words["extracted"]
    assert {"results", "confusion", "map"}.isdisjoint(shown.words)


def test_an_empty_folder_is_an_input_error(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path} holds nothing to report on")):
        find(tmp_path)
    out = str(tmp_path / "r.html")
    assert (
        run_command(report.main, report.Options, prog="report", args=[str(tmp_path), "--out", out])
        == 2
    )
    assert not Path(out).exists()
    with pytest.raises(InputError, match="nowhere is not a folder"):
        report.main(report.Options(rundir=tmp_path / "nowhere"))


def test_damage_is_named_and_the_rest_is_shown(folder, tmp_path, capsys):
    shutil.copy(folder / "scores" / "tsn.h5", tmp_path / "good.h5")
    (tmp_path / "bad.h5").write_bytes(b"no HDF5")
    (tmp_path / "bad.zarr").mkdir()
    (tmp_path / "bad.json").write_text("{")
    shutil.copytree(folder / "hgnl", tmp_path / "hgnl")
    (tmp_path / "hgnl" / "best.pt").write_bytes(b"no checkpoint")
    assert report.main(report.Options(rundir=tmp_path, out=tmp_path / "r.html")) == 0
    complaints = capsys.readouterr().err
    shown = Page((tmp_path / "r.html").read_text())
    assert "tsn" in shown.words["results"]
    for name in ("bad.h5", "bad.zarr", "bad.json", "attention of hgnl"):
        assert f"{name}: " in shown.words["problems"]
        assert f"not shown: {name}: " in complaints


def test_attention_needs_the_features_of_its_model(folder, tmp_path):
    shutil.copytree(folder / "hgnl", tmp_path / "hgnl")
    assert "attention" in made(tmp_path).words  # the store is where the run says
    recorded = json.loads((tmp_path / "hgnl" / "options.json").read_text())
    (tmp_path / "hgnl" / "options.json").write_text(
        json.dumps(recorded | {"features": "gone.zarr"})
    )
    classes_store(tmp_path / "other.zarr", dim=8)
    shown = made(tmp_path)
    assert "attention" not in shown.words
    assert "attention of hgnl: its features 'gone.zarr' were not found" in shown.words["problems"]


def test_names_are_text_and_not_html_or_mathematics(tmp_path):
    classes = ["<b>$x$", 'a "quoted" & \x07 $y', "动作"]
    rng = np.random.default_rng(0)
    store = {"lengths": [2] * 6, "labels": [0, 1, 2] * 2, "classes": classes}
    FeatureStore.from_arrays(tmp_path / "s.zarr", rng.normal(size=(6, 2, 4)), **store)
    logits = np.eye(3)[[1, 0, 2, 1, 0, 2]]
    Scores([f"<i>{n}" for n in range(6)], classes, logits, np.array([0, 1, 2] * 2)).save(
        tmp_path / "s.h5"
    )
    shown = made(tmp_path)
    assert "<b>$x$" in shown.words["confusion"]
    assert 'a "quoted" & \N{REPLACEMENT CHARACTER} $y' in shown.words["confusion"]
    assert "\x07" not in shown.html
    assert "动作".encode() in shown.images["Map of the features of s.zarr, colored by class"]


def test_the_most_confused_pair_is_the_planted_one(tmp_path):
    """There are 30 classes, of which 25 are always right. The matrix shows the others."""
    labels = np.repeat(np.arange(30), 10)
    guesses = labels.copy()
    guesses[70:77] = 3  # 7 of 10 of class 7
    guesses[110:112] = 12
    logits = np.eye(30)[guesses]
    logits[5] = np.nan  # a failed video is not a confusion
    ids = [f"v{row}" for row in range(300)]
    Scores(ids, [f"c{n}" for n in range(30)], logits, labels).save(tmp_path / "s.h5")
    Scores(ids, [f"c{n}" for n in range(30)], np.eye(30)[(labels + 1) % 30], labels).save(
        tmp_path / "worse.h5"
    )
    words = made(tmp_path).words["confusion"]
    assert re.search(r"c7\s*c3\s*7 of 10\s*v70\s*c11\s*c12\s*2 of 10\s*v110\s*$", words)
    assert "s (the best of 2 on these videos themselves" in words
    assert "1 segments, 299 videos of split not named." in words
    assert "Of 30 classes, the 4 confused most." in words


class Planted(torch.nn.Module):
    """Frame weights are the given ones of each video, in two groups; those of the second group are
    0."""

    def __init__(self, weights: np.ndarray) -> None:
        super().__init__()
        self.weights = torch.from_numpy(weights)

    @property
    def aggregator(self):
        return self

    def frame_weights(self, x, mask):
        chosen = x[:, 0, 0].long()
        return torch.stack([self.weights[chosen] * mask, torch.zeros(mask.shape)], 1)

    def forward(self, x, mask):  # the class with the largest weight: 0, or 2 for the uneven
        return self.frame_weights(x, mask)[:, 0]

    def with_even_weights(self, x, mask):
        return torch.ones(mask.shape)

    def classify(self, features):
        return features


def test_films_show_the_most_uneven_clips_and_a_usual_one(tmp_path):
    count = 80
    features = np.ones((count, 4, 2)) * np.arange(count)[:, None, None]
    labels = [0] * count
    store = FeatureStore.from_arrays(
        tmp_path / "s.zarr",
        features,
        lengths=[4] * (count - 1) + [3],
        labels=labels,
        classes=["only"],
    )
    weights = np.ones((count, 4))
    weights[:, 0] += np.linspace(0, 1, count)
    weights[17] = 0, 0, 9, 0
    weights[70] = 0, 0.1, 9, 0
    weights[79] = 2, 1, 1, 7  # the last frame is a repeat, which is masked
    model = Planted(weights)
    shares, use = gallery.frame_shares(model, store, np.arange(count))
    np.testing.assert_allclose(shares[79, 0], [0.5, 0.25, 0.25, 0])
    assert np.isnan(shares[:, 1]).all()
    assert use.startswith("frame weights are")
    shown = gallery.filmstrips(model, store, np.arange(count), ())
    clips = [film["id"] for film in shown["films"]]
    assert clips[:2] == [store.ids[17], store.ids[70]]
    assert len(clips) == 3
    assert "of the predictions change" in shown["use"]
    assert shown["silent"] == 1
    assert shown["films"][0]["largest"] == 1


def test_mean_features_count_repeats_once(tmp_path):
    store = classes_store(tmp_path / "s.zarr", videos=9)
    rows = np.array([7, 2, 0])  # 7 and 0 have two frames of six
    expected = [
        store.read(np.array([row]))[0, 0, : 2 if row in (0, 7) else 6].astype("f8").mean(0)
        for row in rows
    ]
    np.testing.assert_allclose(gallery.mean_features(store, rows), expected, rtol=1e-3, atol=1e-4)


def test_few_videos_are_laid_out_by_pca():
    plane = (
        np.random.default_rng(0).normal(size=(9, 2))
        @ np.linalg.qr(np.random.default_rng(1).normal(size=(5, 2)))[0].T
    )
    places, method = gallery.project_2d(plane)
    assert method == "PCA (100% of the variance)"
    distances = [np.linalg.norm(p[:, None] - p[None], axis=2) for p in (plane, places)]
    np.testing.assert_allclose(*distances, atol=1e-9)


def test_tsne_keeps_clusters_apart():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    places, method = gallery.project_2d(np.eye(3, 40)[labels] * 20 + rng.normal(size=(60, 40)))
    assert method.startswith("t-SNE")
    nearest = np.linalg.norm(places[:, None] - places[None], axis=2) + np.diag([np.inf] * 60)
    assert (labels[nearest.argmin(1)] == labels).mean() > 0.9


def browser() -> str | None:
    """A Chromium on this machine, in PATH or where playwright keeps it."""
    names = (
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
        "chrome",
        "headless_shell",
    )
    kept = sorted(Path.home().glob(".cache/ms-playwright/chromium*/*/*"))
    return next(filter(None, map(shutil.which, names)), None) or next(
        (
            str(path)
            for path in kept
            if path.name in ("chrome", "headless_shell", "chrome-headless-shell")
        ),
        None,
    )


HOSTILE = "<img src=x onerror=alert(1)>"
# The page in a frame of the requested width (a window of Chromium is at least 500 px wide), and its
# size.
FRAME = """<!DOCTYPE html><iframe id="frame" style="border: 0; width: {width}px; height: 3000px"></iframe>
<pre id="found"></pre>
<script>
  const frame = document.getElementById("frame");
  frame.onload = () => {{
    const inside = frame.contentDocument, pictures = [...inside.images];
    document.getElementById("found").textContent = JSON.stringify({{
      wide: inside.documentElement.scrollWidth,
      pictures: pictures.length,
      unseen: pictures.filter(one => !one.naturalWidth).length,
      silent: pictures.filter(one => !one.alt.trim()).length,
      narrow: [...inside.querySelectorAll("figure > img")].map(
        one => one.getBoundingClientRect().width / one.parentElement.getBoundingClientRect().width),
      scripts: inside.scripts.length,
      text: inside.body.innerText,
    }});
  }};
  frame.srcdoc = {page};
</script>"""


def shown_in_a_browser(html: str, folder: Path, *, width: int) -> dict:
    """The content of a page in a real Chromium, which must not report an error."""
    program = browser()
    if program is None:
        if os.environ.get("HGNL_BROWSER") == "1":
            pytest.fail("HGNL_BROWSER=1 says that there is a Chromium, and none is found")
        pytest.skip(
            "no Chromium in PATH or in playwright's cache; the page is parsed by the other tests instead"
        )
    page_text = json.dumps(html).replace("</", "<\\/")
    (folder / "frame.html").write_text(FRAME.format(width=width, page=page_text), encoding="utf-8")
    command = [
        program,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
    ]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1600,3200",
        "--virtual-time-budget=20000",
    ]
    command += ["--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, "the page did not load"
    assert found[1], "the page did not load"
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", [420, 1400])
def test_a_real_browser_shows_it_without_complaint(whole, tmp_path, width):
    seen = shown_in_a_browser(whole.html, tmp_path, width=width)
    assert seen["wide"] <= width, "the page can be pushed sideways"
    assert seen["pictures"] == whole.html.count("<img ")
    assert seen["unseen"] == seen["silent"] == seen["scripts"] == 0
    assert min(seen["narrow"]) > 0.99, "a figure does not fill its column"


def test_a_hostile_name_is_text_in_a_real_browser(tmp_path):
    classes = [HOSTILE, "b", "c"]
    logits = np.eye(3)[[1, 0, 2, 1, 0, 2]]
    Scores([f"{HOSTILE}{n}" for n in range(6)], classes, logits, np.array([0, 1, 2] * 2)).save(
        tmp_path / "s.h5"
    )
    html = render(find(tmp_path), HOSTILE)
    seen = shown_in_a_browser(html, tmp_path, width=420)
    assert HOSTILE in seen["text"]
    assert seen["pictures"] == html.count('src="data:image/')
    assert seen["wide"] <= 420


def save_scores(
    folder: Path, model: str, split: str, right: int, *, name: str | None = None
) -> None:
    """Scores of 20 videos of a split, of which the first `right` are right."""
    labels = np.arange(20) % 2
    logits = np.eye(2)[np.where(np.arange(20) < right, labels, 1 - labels)]
    ids = [f"{split}{n}" for n in range(20)]
    source = {"split": split, "model": model}
    Scores(ids, ["x", "y"], logits, labels, source=source).save(
        folder / f"{name or f'{model}_{split}'}.h5"
    )


def test_the_summary_names_models_that_are_as_good_as_the_best(tmp_path):
    for model, right in (("tsn", 15), ("hgnl", 15), ("weighted", 10)):
        save_scores(tmp_path, model, "val", right)
    words = " ".join(made(tmp_path).words["summary"].split())
    assert "hgnl is best (equal to tsn; the best of 3 on these videos" in words


def test_the_best_model_of_test_is_chosen_on_validation(tmp_path):
    """hgnl is best on val, so it does not matter that weighted is better on test."""
    for model, on_val, on_test in (("tsn", 10, 8), ("weighted", 15, 18), ("hgnl", 20, 14)):
        save_scores(tmp_path, model, "val", on_val)
        save_scores(tmp_path, model, "test", on_test)
    page = made(tmp_path)
    summary = " ".join(page.words["summary"].split())
    test = "Split test: hgnl is best (chosen on val, among 3): top-1 70.00 [50.0, 90.0] %. That is +30.00 ["
    val = "Split val: hgnl is best (the best of 3 on these videos themselves, so its figure is a little optimistic)"
    assert summary.index(test) < summary.index(val)
    assert "points over TSN, the plain average of the frames: better than TSN." in summary
    results = page.words["results"]
    assert results.index("Split test") < results.index("Split val")
    assert "hgnl (chosen on val, among 3)" in page.words["confusion"]
    assert len(re.findall(r"^\s*weighted$", results, re.MULTILINE)) == 0
    rows = lxml.html.fromstring(page.html).xpath("//section[@id='results']//tbody/tr/td[1]/text()")
    assert rows == ["hgnl", "tsn", "weighted"] * 2, "one row per model"


def test_heads_that_see_order_count_with_the_frames_of_training():
    for name, expected in (("txb", "3"), ("attentive-time", "3"), ("hgnl", "16"), ("logreg", "16")):
        assert (
            compared.segments_that_count({"name": name, "segments": {"3": {}, "16": {}}})
            == expected
        )


def test_gains_and_names_that_repeat(tmp_path):
    save_scores(tmp_path, "tsn", "val", 10)
    save_scores(tmp_path, "hgnl", "val", 11, name="small_val")
    save_scores(tmp_path, "hgnl", "val", 9, name="large_val")
    words = " ".join(made(tmp_path).words["summary"].split())
    assert "Split val: hgnl (small) is best" in words
    assert "no difference found, since the interval holds 0" in words
    one_right = Scores(["a", "b"], ["x", "y"], np.eye(2)[[0, 0]], np.array([0, 1]))
    reordered = Scores(["b", "a"], ["x", "y"], np.eye(2)[[0, 0]], np.array([1, 0]))
    models = {
        "hgnl": compared.Model("hgnl", {}, one_right),
        "tsn": compared.Model("tsn", {}, reordered),
    }
    gain = compared.gain_over_tsn(models, "hgnl")
    assert gain == compared.Interval(0, 0, 0), "videos are paired by id, not by position"
    assert compared.verdict(compared.Interval(-0.2, -0.3, -0.1)) == "worse than TSN"


def test_runs_of_one_name_are_listed_once_each(tmp_path):
    """Two runs of tsn have scores files, and a third has none."""
    for run, right in (("a", 10), ("b", 15), ("c", 20)):
        save_scores(tmp_path, "tsn", "val", right, name=run)
        scores = Scores.load(tmp_path / f"{run}.h5")
        summary = asdict(summarize(scores.logits, scores.labels, scores.groups))
        (tmp_path / run).mkdir()
        results = json.dumps({"tsn": {str(scores.segments): summary}})
        (tmp_path / run / "results.json").write_text(results)
        (tmp_path / run / "options.json").write_text('{"agg": "tsn"}')
    (tmp_path / "c.h5").unlink()
    models = compared.models_by_split(find(tmp_path))["val"]
    assert sorted(models) == ["tsn", "tsn (a)", "tsn (b)"]
    assert models["tsn"].top1 == 1


def test_baselines_are_listed_once(folder):
    models = compared.models_by_split(find(folder))["val"]
    assert list(models) == ["ensemble, equal weights", "hgnl", "tsn"]


def test_the_next_commands_run(folder, tmp_path, monkeypatch):
    root = tmp_path / "it's mine"
    for name in ("deep", "tsn", "hgnl", "scores"):
        shutil.copytree(folder / name, root / name)
    monkeypatch.chdir(tmp_path)
    page = made(root)
    assert [shlex.split(line)[1] for line in page.commands] == ["crossval", "ensemble"]
    for line in page.commands:
        extra = ["--folds", "2", "--epochs", "1"] if "crossval" in line else []
        assert hgnl([*shlex.split(line)[1:], *extra]) == 0
    only_a_store = tmp_path / "fresh"
    shutil.copytree(folder / "deep", only_a_store / "deep")
    (line,) = [shlex.split(line) for line in compared_commands(only_a_store)]
    assert hgnl([*line[1:], "--epochs", "1"]) == 0


def compared_commands(root: Path) -> list[str]:
    contents = find(root)
    splits = compared.models_by_split(contents)
    return [line for _, line in compared.next_commands(contents, splits)]


def test_the_best_model_is_tested_next_if_there_are_test_videos(folder, tmp_path):
    shutil.copytree(folder / "tsn", tmp_path / "tsn")
    features = np.zeros((6, 6, 16), np.float16)
    splits = ["train", "train", "val", "val", "test", "test"]
    labels = {"labels": [0, 1] * 3, "classes": ["class 0", "class 1"], "splits": splits}
    FeatureStore.from_arrays(tmp_path / "f.zarr", features, lengths=[6] * 6, **labels)
    evaluation = shlex.split(compared_commands(tmp_path)[0])
    assert evaluation[:2] == ["hgnl", "evaluate"]
    assert evaluation[evaluation.index("--split") + 1] == "test"


def random_and_trained_stores(root: Path) -> None:
    """Two stores of the same videos. The first by name comes from random weights."""
    features = np.random.default_rng(0).normal(size=(6, 6, 16))
    columns = {
        "labels": [0, 1] * 3,
        "classes": ["class 0", "class 1"],
        "splits": ["train", "train", "val", "val", "test", "test"],
    }
    for name, weights in (("a.zarr", "random weights, seed 0"), ("b.zarr", "r3d_18.pth")):
        FeatureStore.from_arrays(root / name, features, lengths=[6] * 6, **columns)
        store = FeatureStore.open(root / name, writable=True)
        provenance = {"backbone": "torchvision/r3d_18", "weights": {"name": weights}}
        store.group.attrs.put(store_attributes(store.classes, provenance))


def test_the_next_command_never_takes_random_features_if_there_are_others(folder, tmp_path):
    random_and_trained_stores(tmp_path)

    def stores() -> list[str]:
        lines = [shlex.split(line) for line in compared_commands(tmp_path)]
        return [Path(line[line.index("--features") + 1]).name for line in lines]

    assert stores() == ["b.zarr"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    common = {"epochs": 1, "batch_size": 4, "frames": 6}
    for agg, store in (("tsn", "a.zarr"), ("weighted", "b.zarr")):
        train.main(
            train.Options(agg=agg, features=str(tmp_path / store), out=tmp_path / agg, **common)
        )
    torch.set_num_threads(threads)
    assert set(stores()) == {"b.zarr"}
    shutil.rmtree(tmp_path / "b.zarr")
    shutil.rmtree(tmp_path / "weighted")
    assert set(stores()) == {"a.zarr"}


def test_the_map_names_gray_points(folder, tmp_path):
    rng = np.random.default_rng(0)
    store = {"lengths": [2] * 6, "labels": [0, 1, -1] * 2, "classes": ["x", "y"]}
    FeatureStore.from_arrays(tmp_path / "s.zarr", rng.normal(size=(6, 2, 4)), **store)
    assert "Gray: other classes, or none." in made(tmp_path).words["map"]
    shutil.copytree(folder / "deep" / "feats.zarr", tmp_path / "t" / "feats.zarr")
    assert "Gray" not in made(tmp_path / "t").words["map"]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_legend_of_curves_is_outside_the_plot(count):
    lines = {
        f"a run with a long name, number {number}, baseline": (pd.Series([1.0, 2.0]), "C0-")
        for number in range(count)
    }
    figure = figures.curves(lines, title="Training loss")
    figures.svg(figure)  # which lays out the page
    [axes], [legend] = figure.axes, figure.legends
    box = legend.get_window_extent()
    assert not box.overlaps(axes.get_tightbbox())
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    texts = [text.get_window_extent() for text in legend.get_texts()]
    assert not any(one.overlaps(two) for one, two in combinations(texts, 2))
    assert axes.get_window_extent().height > 100


def test_700_classes_show_the_worst_confusions(tmp_path):
    labels = np.repeat(np.arange(700), 2)
    guesses = np.where(np.arange(1400) % 7 == 0, (labels + 1) % 700, labels)
    guesses[:2] = 9
    ids = [f"v{row}" for row in range(1400)]
    Scores(ids, [f"c{n}" for n in range(700)], np.eye(700)[guesses], labels).save(tmp_path / "s.h5")
    shown = made(tmp_path)
    assert re.search(r"example\s*c0\s*c9\s*2 of 2\s*v0", shown.words["confusion"])
    (matrix,) = [
        picture for alt, picture in shown.images.items() if alt.startswith("Confusion matrix")
    ]
    assert matrix.count(b"<text") < 20 * 20 + 50
    assert "Of 700 classes, the 20 confused most." in shown.words["confusion"]


def test_random_weights_are_said_first_and_by_name():
    """Those of stores, of scores, of ensembles of such scores, and of cross-validations."""

    class Recorded:
        def __init__(self, **record):
            self.provenance = self.source = record

    def backbone(weights):
        return {"backbone": "torchvision/r3d_18", "weights": {"name": weights}}

    random, real = backbone("random weights, seed 0"), backbone("r3d_18.pth")
    contents = Contents(
        stores={"clips.zarr": Recorded(**random), "real.zarr": Recorded(**real)},
        scores={
            "clips.h5": [Recorded(features=random)],
            "real.h5": [Recorded(features=real)],
            "both.h5": [Recorded(members=["real", "clips"])],
        },
        crossvals={"cv/results.json": {"provenance": {"joined": [real, random]}}, "old": {}},
    )
    said = results.backbones_with_random_weights(contents)
    expected = ["clips.zarr", "clips.h5", "cv/results.json", "both.h5"]
    assert said == {"torchvision/r3d_18 (random weights, seed 0)": expected}
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(page.__file__).parent))
    pages.filters["data_uri"] = pages.filters["interval"] = pages.filters["percent"] = str
    pages.filters["thousands"] = str
    html = pages.get_template("page.html.j2").render(
        title="t", contents=Contents(), sections={"random": said}, missing=[]
    )
    section = Page(html).words["random"]
    assert "its features mean nothing" in section
    assert "both.h5" in section
    assert (
        "RANDOM WEIGHTS"
        not in Page(
            pages.get_template("page.html.j2").render(
                title="t", contents=Contents(), sections={}, missing=[]
            )
        )
        .html.partition("<main>")[2]
        .partition("</main>")[0]
    )
