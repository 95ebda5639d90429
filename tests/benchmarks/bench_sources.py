"""The cost of checking whether files are still those that were extracted:
`pytest -s tests/benchmarks/bench_sources.py`.

Ratios of one run: reading sizes and digests against decoding the same clips, and reading sizes and
modification times of many files against listing them. The page cache is warm.
"""

import os
import time
from pathlib import Path

import numpy as np

from extract.decode.jobs import Plan, decode_job
from extract.decode.transform import Preprocessing
from extract.listing.videos import list_videos
from extract.sources import read_source
from extract.store import OK, FeatureStore
from extract.workers.changed import SeenTimes, look_for_changed_files

CLIPS = sorted((Path(__file__).parents[2] / "pipelines" / "clips").rglob("*.mp4"))[:60]
FILES = int(os.environ.get("HGNL_FILES", 130_000))  # 650,000 are those of Kinetics-700
PLAN = Plan(25, 1, 0, Preprocessing(224, 256, "bilinear", (0.5,) * 3, (0.5,) * 3))


def cpu_seconds(run) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def test_digests_against_decoding():
    out = np.zeros(PLAN.slot_bytes, np.uint8)
    paths = list(map(str, CLIPS))
    ratios = []
    for _ in range(3):
        reading = cpu_seconds(lambda: [read_source(path) for path in paths])
        decoding = cpu_seconds(
            lambda: [decode_job((path, [("id", None)], PLAN), out) for path in paths]
        )
        ratios.append(reading / decoding)
    print(
        f"\nsize and digest of a clip take {np.median(ratios):.2%} of the CPU time of decoding its 25 frames"
    )
    assert np.median(ratios) < 0.01


def test_a_start_over_many_files_against_listing_them(tmp_path):
    for number in range(FILES):
        folder = tmp_path / "k700" / "train" / f"class {number % 700}"
        if number < 700:
            folder.mkdir(parents=True)
        (folder / f"{number:011d}_000001_000011.mp4").touch()
    started = time.process_time()
    listing = list_videos(tmp_path / "k700")
    listed = time.process_time() - started
    count = len(listing.videos)
    store = FeatureStore.create(
        tmp_path / "f.zarr",
        ids=[video.id for video in listing.videos],
        labels=[video.label for video in listing.videos],
        classes=listing.classes,
        views=["center"],
        frames=1,
        dim=1,
        block_size=64,
        provenance={},
    )
    source = read_source(listing.videos[0].path)
    store._set("sources", np.arange(count), np.tile(np.array(source[:2]), (count, 1)))
    store.set_status(np.arange(count), OK)
    seen = SeenTimes(store)
    times = [os.stat(video.path).st_mtime_ns for video in listing.videos]
    seen.note(np.arange(count), [source._replace(mtime_ns=mtime) for mtime in times])
    seen.save()
    pairs = list(enumerate(listing.videos))
    started = time.process_time()
    assert not len(look_for_changed_files(store, pairs))
    looked = time.process_time() - started
    print(
        f"\nlisting {count:,} files {listed:.2f} s; looking for changed ones {looked / listed:.0%} of that"
    )
