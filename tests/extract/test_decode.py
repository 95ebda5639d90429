"""Every requested frame is the frame that decoding everything with plain PyAV gives, for every kind
of file that FFmpeg can write."""

import atexit
import csv
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from extract.decode import Decoded, VideoError, decode, decoder_version, packets
from extract.decode import reader as decoding
from extract.sampling import segment_centers
from thorough import THOROUGH
from videos import (
    DOUBTED,
    TRUSTED,
    Whole,
    cut_by_edit_list,
    decode_everything,
    forget_key_frames,
    turn,
    write_repeated,
    write_video,
)

SHARED = Path(__file__).parents[3] / "shared" / "clips"


def every_frame(num_frames: int) -> np.ndarray:
    return np.arange(num_frames)


def samples(num_frames: int, *, singly: bool = True, step: int = 1) -> Iterator[np.ndarray]:
    """Requests to a video: all frames, TSN's, each `step`-th frame alone, some frames in any order
    with repeats."""
    rng = np.random.default_rng(num_frames)
    yield np.arange(num_frames)
    yield segment_centers(num_frames, 3)
    yield rng.integers(0, num_frames, 7)
    if singly:
        yield segment_centers(num_frames, 25)
        yield from (rng.integers(0, num_frames, 3) for _ in range(4))
        yield from (np.array([number]) for number in range(0, num_frames, step))


def assert_exact(
    path: Path, whole: Whole | None = None, *, singly: bool = True, step: int = 1
) -> Decoded:
    """Raises AssertionError unless all samples of `path` equal, bit for bit, those of decoding
    everything."""
    whole = whole or decode_everything(path)
    assert whole.frames
    for wanted in samples(len(whole.frames), singly=singly, step=step):
        asked: list[int] = []

        def sample(num_frames: int, wanted=wanted, asked=asked) -> np.ndarray:
            asked.append(num_frames)
            return wanted

        decoded = decode(path, sample)
        assert asked == [len(whole.frames)] * len(asked), f"sample was asked for {asked} frames"
        assert decoded.num_frames == len(whole.frames)
        assert decoded.indices.tolist() == wanted.tolist()
        for index, frame in zip(wanted.tolist(), decoded.frames, strict=True):
            assert np.array_equal(frame, whole.frames[index]), f"frame {index} of {wanted.tolist()}"
        if None not in whole.seconds:
            seconds = sorted(time - min(whole.seconds) for time in whole.seconds)
            np.testing.assert_allclose(
                decoded.timestamps, [seconds[index] for index in wanted], atol=1e-3
            )
        assert decoded.problem == ""
    return decoded


@pytest.fixture
def no_fallback(monkeypatch):
    """Decoding everything is a failure here: the tests check that requested frames are decoded
    alone."""

    def refuse(path, doubt):
        pytest.fail(f"{path} is decoded as a whole: {doubt}")

    monkeypatch.setattr(decoding, "_FullDecode", refuse)


# -- every encoder ---------------------------------------------------------------------------------------------------

# Encoders that fail in the first attempts: they take only some sizes, or need a setting.
_ENCODERS = {
    "dnxhd": {"size": (256, 120), "options": {"profile": "dnxhr_lb"}},
    "xface": {"size": (48, 48)},
}
_FOR_ANY = (
    "matroska",
    "mov",
    "avi",
    "flv",
    "apng",
    "rm",
    "roq",
    "fits",
    "yuv4mpegpipe",
    "image2pipe",
)
_HARDWARE = re.compile(r"_(amf|cuvid|mediacodec|mf|nvenc|qsv|v4l2m2m|vaapi|videotoolbox|vulkan)$")
# Still pictures: FFmpeg's pipe reader takes the whole file as one picture.
_READ_AS_ONE_PICTURE = {"pcx", "sunrast", "wbmp"}


def _encoders() -> dict[str, av.codec.Codec]:
    codecs = {}
    for name in sorted(av.codec.codecs_available):
        try:
            codec = av.codec.Codec(name, "w")
        except ValueError:  # only a decoder
            continue
        if codec.type == "video":
            codecs[codec.name] = codec
    return codecs


ENCODERS = _encoders()


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="every-encoder-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _written(name: str) -> Path | str:
    """Write a video with an encoder into the first container that FFmpeg writes and reads back;
    otherwise the reason."""
    if _HARDWARE.search(name):
        return "is for hardware"
    formats = [format.name for format in ENCODERS[name].video_formats or ()] or ["yuv420p"]
    path, reason = _folder() / name, "no container takes it"
    for container in _FOR_ANY:
        for size in ((64, 48), (176, 144), (720, 480)):
            for pix_fmt in formats[:2]:
                arguments = {"size": size, "pix_fmt": pix_fmt, "frames": 13} | _ENCODERS.get(
                    name, {}
                )
                try:
                    write_video(path, codec=name, container=container, **arguments)
                except (av.FFmpegError, OSError, ValueError) as error:
                    if "does not support" not in str(error):
                        reason = f"is not written to {container}: {error}"
                    continue
                try:
                    if decode_everything(path).frames:
                        return path
                    reason = f"is not read back from {container}"
                except (av.FFmpegError, AssertionError) as error:
                    reason = f"is not read back from {container}: {error}"
    return reason


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_that_this_ffmpeg_has(name):
    path = _written(name)
    if isinstance(path, str):
        pytest.skip(f"{name} {path}")
    whole = decode_everything(path)
    assert len(whole.frames) == (1 if name in _READ_AS_ONE_PICTURE else 13)
    # Opening a file of still pictures takes long (FFmpeg looks at many of them), so it is not done
    # for each frame.
    assert_exact(path, whole, singly=ENCODERS[name].name in packets._SKIPPING)


def test_most_encoders_are_tested():
    written = [name for name in ENCODERS if isinstance(_written(name), Path)]
    assert len(written) >= 80, written
    assert {
        "libx264",
        "libx265",
        "libsvtav1",
        "libvpx",
        "libvpx-vp9",
        "mpeg4",
        "mpeg2video",
        "wmv2",
    } <= set(written)


# -- kinds of video --------------------------------------------------------------------------------------------------


# Where packets are read again, every third frame is requested alone: all are found the same way.
STEP = 1 if THOROUGH else 3


@functools.cache
def _of_a_kind(name: str) -> tuple[Path, Whole]:
    """A video by its name in TRUSTED or DOUBTED, and all of it: made once for all tests."""
    path = write_video(_folder() / name, **(TRUSTED | DOUBTED)[name])
    return path, decode_everything(path)


@pytest.mark.parametrize("name", TRUSTED)
@pytest.mark.usefixtures("no_fallback")
def test_wanted_frames_alone_are_exact(name):
    assert_exact(*_of_a_kind(name))


@pytest.mark.parametrize("name", TRUSTED)
def test_frames_are_exact_where_packets_are_read_again(name, monkeypatch):
    """As in a file too large to keep in memory. If a packet is not found again, everything is
    decoded."""
    monkeypatch.setattr(packets, "_KEPT_BYTES", 0)
    assert_exact(*_of_a_kind(name), step=STEP)


@pytest.mark.parametrize(
    "name", ["b-frames.mp4", "b-frames.mkv", "hevc.mkv", "late.mkv", "streams.mp4"]
)
@pytest.mark.usefixtures("no_fallback")
def test_packets_are_found_again_in_the_containers_of_kinetics(name, monkeypatch):
    monkeypatch.setattr(packets, "_KEPT_BYTES", 0)
    assert_exact(*_of_a_kind(name))


@pytest.mark.parametrize("name", DOUBTED)
@pytest.mark.parametrize("kept", [packets._KEPT_BYTES, 0])
def test_frames_are_exact_where_packets_cannot_be_trusted(name, kept, monkeypatch):
    monkeypatch.setattr(packets, "_KEPT_BYTES", kept)
    assert_exact(*_of_a_kind(name), step=1 if kept else STEP)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_a_file_that_calls_every_frame_a_key_frame(codec, tmp_path):
    assert_exact(
        forget_key_frames(write_video(tmp_path / "a.mp4", codec=codec, gop=8, bframes=3, frames=30))
    )


@pytest.mark.parametrize(("start", "seconds"), [(0.2, 0.4), (0.0, 0.5), (0.3, 10), (0.52, 0.04)])
@pytest.mark.usefixtures("no_fallback")
def test_frames_that_an_edit_list_hides_are_no_frames(start, seconds, tmp_path):
    path = write_video(tmp_path / "a.mp4", gop=6, bframes=2, frames=40)
    before = decode_everything(path)
    whole = decode_everything(cut_by_edit_list(path, start=start, seconds=seconds))
    assert 1 <= len(whole.frames) <= min(seconds * 25 + 1, 40 - start * 25 + 1)
    assert np.array_equal(whole.frames[0], before.frames[round(start * 25)])
    assert_exact(path, whole)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_the_display_rotation_is_applied(degrees, tmp_path):
    path = turn(write_video(tmp_path / "a.mp4", frames=3), degrees)
    upright = decode_everything(path).frames
    turned = decode(path, every_frame).frames
    assert np.array_equal(
        turned, [np.rot90(frame, -degrees // 90) for frame in upright]
    )  # rot90: counter-clockwise


def test_the_best_of_several_streams_is_decoded_alone(tmp_path):
    """The second stream is marked as the one to show, and packets of the first are not mixed in."""
    path = write_video(tmp_path / "a.mkv", more_streams=[(320, 240)])
    with av.open(str(path)) as container:
        assert container.streams.best("video").index == 1
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=1)]
    decoded = decode(path, every_frame)
    assert decoded.frames.shape == (24, 240, 320, 3)
    assert np.array_equal(decoded.frames, shown)


def test_pictures_that_change_size_half_way_get_one_shape(tmp_path):
    """Two transport streams follow each other, as in a broadcast."""
    for number, size in enumerate([(64, 48), (96, 80)]):
        pts = [1000 * number + 40 * frame for frame in range(20)]
        write_video(tmp_path / f"{number}.ts", size=size, frames=20, gop=10, bframes=0, pts=pts)
    both = tmp_path / "both.ts"
    both.write_bytes((tmp_path / "0.ts").read_bytes() + (tmp_path / "1.ts").read_bytes())
    decoded = decode(both, every_frame)
    assert decoded.frames.shape == (decoded.num_frames, 48, 64, 3)
    assert decoded.num_frames >= 38


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_few_frames_cost_few_packets_and_few_pictures(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", frames=200, gop=20, bframes=2)
    fed, resized, came = [], [], []
    packet, frames = packets._Redemuxer.packet, packets.PacketDecoder._frames
    monkeypatch.setattr(
        packets.PacketDecoder,
        "_frames",
        lambda self, *args: (came.append(frame) or frame for frame in frames(self, *args)),
    )
    monkeypatch.setattr(
        packets._Redemuxer,
        "packet",
        lambda self, number: fed.append(number) or packet(self, number),
    )
    monkeypatch.setattr(packets, "_KEPT_BYTES", 0)
    decoded = decode(
        path, lambda n: np.array([30, 30, 190]), resize=lambda frame: resized.append(1) or frame
    )
    assert decoded.frames.shape[0] == 3
    assert len(resized) == 2
    assert len(fed) <= 2 * 20
    assert len(came) < len(fed)  # frames that no other one refers to are not decoded
    assert sorted(set(fed)) == sorted(fed)


def peak_memory(path: Path) -> float:
    """Peak memory in MB of a separate process that decodes 25 frames, with the interpreter."""
    program = (
        "import sys; from extract.decode import decode; from extract.sampling import segment_centers\n"
        "frames, _, seconds = decode(sys.argv[1], lambda n: segment_centers(n, 25))\n"
        "print(len(frames), seconds[-1] - seconds[0])\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    return int(run.stdout.split()[-1]) / 1024


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads the peak from Linux's /proc"
)
@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
def test_memory_does_not_grow_with_length(name, tmp_path):
    """5 minutes against 10 s; all frames of the long video would be 276 MB. The AVI is decoded as a
    whole."""
    short = write_video(
        tmp_path / name, size=(128, 96), frames=250, options={"preset": "ultrafast"}
    )
    long = write_repeated(tmp_path / f"long-{name}", short, 30)
    seen = decode(long, lambda n: np.array([0, n - 1]))
    assert seen.num_frames == 7500
    assert seen.timestamps[1] == pytest.approx(299.96, abs=0.1)
    assert peak_memory(long) < peak_memory(short) + 20


# -- real clips ------------------------------------------------------------------------------------------------------

CODEC_CLIPS = sorted((Path(__file__).parents[1] / "clips" / "codecs").iterdir())


@pytest.mark.parametrize("path", CODEC_CLIPS, ids=lambda path: path.name)
def test_codec_clips_are_exact(path):
    whole = decode_everything(path)
    expected = {
        "h264_1frame.mp4": 1,
        "h264_2frames.mp4": 2,
        "h264 with spaces & ünïcode 动作.mp4": 12,
    }
    assert len(whole.frames) == expected.get(path.name, 48)
    assert_exact(path, whole, singly=len(whole.frames) < 48)


@pytest.mark.parametrize(
    ("name", "frames", "problem"),
    [
        ("truncated_faststart.mp4", 3, "damaged after 3 readable frames: Invalid data found"),
        ("bitflips.mp4", 1, "1 of 1 readable frames are corrupt; damaged after 1 readable frames"),
    ],
)
def test_what_can_be_read_of_a_damaged_clip_is_partial(name, frames, problem, broken_clips):
    whole = decode_everything(broken_clips / name)
    decoded = decode(broken_clips / name, lambda n: segment_centers(n, 5))
    assert decoded.num_frames == len(whole.frames) == frames
    assert np.array_equal(
        decoded.frames, [whole.frames[index] for index in segment_centers(frames, 5)]
    )
    assert decoded.problem.startswith(problem)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("zero_bytes.mp4", r"the file is empty \(0 bytes\)"),
        ("html_error_page.mp4", r"is a web page \(HTML\), not a video"),
        ("random_bytes.mp4", "is not a video that FFmpeg knows"),
        ("truncated_no_moov.mp4", r"is an MP4 without its index \(moov atom\)"),
        ("audio_only.mp4", r"has no video stream \(audio only\)"),
    ],
)
def test_what_is_no_video_says_what_it_is(name, reason, broken_clips):
    with pytest.raises(VideoError, match=reason) as caught:
        decode(broken_clips / name, every_frame)
    assert caught.value.path == str(broken_clips / name)
    assert str(caught.value) == f"{caught.value.path}: {caught.value.reason}"


def shared_files() -> dict[str, dict[str, str]]:
    """The rows of manifest.csv and reader_behaviour.csv by path; empty if those files are not
    there."""
    files: dict[str, dict[str, str]] = {}
    for table in ("manifest.csv", "reader_behaviour.csv"):
        if (SHARED / table).exists():
            with (SHARED / table).open(encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    files.setdefault(row["path"], {}).update(row)
    return files


@pytest.mark.shared
@pytest.mark.parametrize("name", shared_files() or ["not here"])
def test_shared_clips_are_read_as_their_manifest_says(name, shared_clips):
    row = shared_files()[name]
    known = row["pyav"].split()  # "280", "28 ERR", "- ERR"
    path = shared_clips / name
    if known[0] == "-":
        with pytest.raises(VideoError):
            decode(path, every_frame)
        return
    # PyAV's column is of the first stream; FFmpeg's best is the second, as torchcodec's and
    # decord's columns say.
    count = 390 if name == "odd/torchcodec_nasa_13013.mp4" else int(known[0])
    decoded = decode(path, lambda n: segment_centers(n, 3))
    assert decoded.num_frames == count
    assert bool(decoded.problem) == (known[-1] == "ERR")
    shape = re.search(r"\(\d+, (\d+), (\d+), 3\)", row["decord"])  # rotated for display
    width, height = map(int, row["size"].split("x"))
    assert decoded.frames.shape[1:3] == (
        tuple(map(int, shape.groups())) if shape else (height, width)
    )


def test_all_shared_clips_are_there(shared_clips):
    assert len(shared_files()) == 61
    assert all((shared_clips / name).is_file() for name in shared_files())


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", [name for name in shared_files() if name[:3] in ("kin", "odd")] or ["not here"]
)
def test_shared_clips_are_exact(name, shared_clips):
    whole = decode_everything(shared_clips / name)
    if whole.error:
        decoded = decode(shared_clips / name, every_frame)
        assert np.array_equal(decoded.frames, whole.frames)
        assert f"after {len(whole.frames)} readable frames" in decoded.problem
        return
    with av.open(str(shared_clips / name)) as container:
        turns = next(container.decode(video=0)).rotation // 90 % 4
    upright = Whole(
        [np.rot90(frame, turns) for frame in whole.frames], whole.seconds, whole.corrupt, ""
    )
    assert_exact(shared_clips / name, upright, singly=len(whole.frames) <= 10)


@pytest.mark.shared
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_agrees_with_decords(degrees, shared_clips):
    pytest.importorskip("decord")
    path = shared_clips / "odd" / f"decord_video_{degrees}.mov"
    ours, theirs = (
        decode(path, every_frame, decoder=decoder).frames.astype(int)
        for decoder in ("pyav", "decord")
    )
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).mean() < 3  # they convert colors in their own way
    assert np.abs(ours - theirs[:, ::-1, ::-1]).mean() > 10


# -- faults ----------------------------------------------------------------------------------------------------------


def test_no_file(tmp_path):
    for path, reason in (
        (tmp_path, "is a folder, not a video"),
        (tmp_path / "no.mp4", "does not exist"),
        (tmp_path / "link.mp4", "is a link to 'gone.mp4', which does not exist"),
        (tmp_path / "loop.mp4", "cannot be read: Too many levels of symbolic links"),
        (tmp_path / "pipe.mp4", "is a pipe, a socket or a device, not a file"),
    ):
        if path.stem == "link":
            path.symlink_to("gone.mp4")
        elif path.stem == "loop":
            path.symlink_to(path.name)
        elif path.stem == "pipe":
            os.mkfifo(path)
        with pytest.raises(VideoError, match=re.escape(f"{path}: {reason}")):
            decode(path, every_frame)


def test_no_permission(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=2)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything, so run as `nobody` for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(VideoError, match="cannot be read: Permission denied"):
            decode(path, every_frame)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\x00" * 5000, "is not a video that FFmpeg knows"),
        (np.random.default_rng(0).bytes(50_000), "is not a video that FFmpeg knows"),
        (b"429 Too Many Requests\n", "is text, not a video"),
        ("Добрый день".encode(), "is text, not a video"),
        (b"\n <!DOCTYPE html><html></html>", "is a web page"),
        (b'<?xml version="1.0"?><Error/>', "is a web page"),
    ],
)
def test_garbage_says_what_it_is(content, reason, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=reason):
        decode(path, every_frame)


def test_a_header_without_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", container_options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 4])
    with pytest.raises(VideoError, match="no frame of it decodes"):
        decode(path, every_frame)


@pytest.mark.parametrize(
    "options", [{"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}]
)
def test_a_file_that_ends_between_two_packets_is_partial(options, tmp_path):
    """No packet is damaged then: only the index shows that some are missing."""
    path = write_video(tmp_path / "a.mp4", bframes=0, gop=30, container_options=options)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        ends = [packet.pos + packet.size for packet in container.demux(stream) if packet.size]
    path.write_bytes(path.read_bytes()[: ends[9]])
    decoded = decode(path, lambda n: segment_centers(n, 3))
    assert decoded.num_frames == 10
    assert re.search(
        r"the file ends early: it names (24|16) frames and holds 10", decoded.problem
    )  # 16 in a fragment


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "pipe:0", "-i.mp4", "a%03d.mp4", "a\nb.mp4", "?x=1#y.mp4"]
)
def test_names_that_mean_something_to_ffmpeg_are_names(name, tmp_path, monkeypatch):
    os.replace(write_video(tmp_path / "a.mp4", frames=2), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert decode(name, every_frame).num_frames == 2


def test_a_name_that_is_no_utf8(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"clip\xff.mp4")
    os.replace(write_video(tmp_path / "a.mp4", frames=2), name)
    assert decode(os.fsdecode(name), every_frame).num_frames == 2


def test_a_title_that_is_no_utf8(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=2)
    with av.open(str(path)) as source, av.open(str(tmp_path / "titled.mp4"), "w") as output:
        output.metadata["title"] = "ABCDEFGH"
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    content = (tmp_path / "titled.mp4").read_bytes()
    assert content.count(b"ABCDEFGH") == 1
    (tmp_path / "titled.mp4").write_bytes(
        content.replace(b"ABCDEFGH", b"\xff\xfe\x80\xc3\xff\xfe\x80\xc3")
    )
    if int(av.__version__.split(".")[0]) < 19:
        with pytest.raises(UnicodeDecodeError):
            av.open(str(tmp_path / "titled.mp4"))
    assert decode(str(tmp_path / "titled.mp4"), every_frame).num_frames == 2


FUZZED = {
    "a.mp4": {"container_options": {"movflags": "faststart"}},
    "b.mkv": {"codec": "libx265"},
    "c.avi": {"codec": "mpeg4", "bframes": 2, "gop": 6},
    "d.ts": {"codec": "mpeg2video", "bframes": 2, "gop": 6},
    "e.webm": {"codec": "libvpx"},
    "f.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "gop": 8},
    "g.mp4": {"codec": "libsvtav1"},
}


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One kind of damage: bits flipped, the end cut off, a hole of zeros, bytes lost, one byte of
    the header changed."""
    damage = bytearray(content)
    kind, at = rng.integers(5), int(rng.integers(len(damage)))
    if kind == 0:
        for place in rng.integers(0, len(damage), rng.integers(1, 30)):
            damage[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        del damage[at:]
    elif kind == 2:
        damage[at : at + 200] = bytes(len(damage[at : at + 200]))
    elif kind == 3:
        del damage[at : at + int(rng.integers(1, 200))]
    else:
        damage[rng.integers(min(1500, len(damage)))] = rng.integers(256)
    return bytes(damage)


@pytest.mark.parametrize("name", FUZZED)
def test_damage_ends_in_frames_or_in_words(name, tmp_path):
    path = write_video(tmp_path / name, **FUZZED[name])
    content = path.read_bytes()
    endings = {"whole": 0, "partial": 0, "failed": 0}
    for seed in range(40):
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        try:
            decoded = decode(path, lambda n: segment_centers(n, 5))
        except VideoError:
            endings["failed"] += 1
            continue
        assert decoded.frames.shape[0] == 5, seed
        assert decoded.frames.dtype == np.uint8
        assert decoded.frames.shape[3] == 3
        assert (np.diff(decoded.indices) >= 0).all()
        if not decoded.problem:  # else frames that do not decode keep their numbers
            assert decoded.indices.tolist() == segment_centers(decoded.num_frames, 5).tolist()
        assert np.isfinite(decoded.timestamps).all()
        assert (np.diff(decoded.timestamps) >= 0).all()
        assert decoded.timestamps[0] >= 0
        endings["partial" if decoded.problem else "whole"] += 1
    assert endings["failed"] < 40, endings
    assert endings["whole"] < 40, endings


# -- the call --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", frames=24)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("indices", "wrong"),
    [([0, 24], 24), ([-1], -1), ([5, 1000, 2], 1000)],
    ids=["behind", "before", "far"],
)
def test_a_frame_that_is_not_there_is_named(indices, wrong, decoder, clip):
    if decoder == "decord":
        pytest.importorskip("decord")
    with pytest.raises(IndexError, match=rf"has 24 frames, sample\(24\) returned frame {wrong}$"):
        decode(clip, lambda n: np.array(indices), decoder=decoder)


@pytest.mark.parametrize("indices", [np.array([]), np.array(1), np.array([0.5]), np.array(["0"])])
def test_what_sample_must_give(indices, clip):
    with pytest.raises(ValueError, match=r"sample\(24\) returned .*expected integer frame indices"):
        decode(clip, lambda n: indices)


def test_the_result_unpacks_and_knows_its_types(clip):
    decoded = decode(str(clip), lambda n: [3, 0, 3])
    frames, indices, timestamps = decoded
    assert (frames.shape, frames.dtype) == ((3, 48, 64, 3), np.uint8)
    assert (indices.tolist(), indices.dtype) == ([3, 0, 3], np.int32)
    assert timestamps.dtype == np.float32
    np.testing.assert_allclose(timestamps, [0.12, 0, 0.12], atol=1e-6)
    assert len(repr(decoded)) < 300, "pictures do not belong in a repr"


def test_resize_is_applied_to_wanted_frames(clip):
    shapes = []

    def quarter(frame: np.ndarray) -> np.ndarray:
        shapes.append(frame.shape)
        return frame[::2, ::2]

    decoded = decode(clip, lambda n: np.array([7, 2, 7]), resize=quarter)
    assert shapes == [(48, 64, 3)] * 2
    assert np.array_equal(
        decoded.frames, decode(clip, lambda n: np.array([7, 2, 7])).frames[:, ::2, ::2]
    )


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("name", ["h264_vfr.mp4", "h264_start_5s.mp4", "vp8.webm"])
def test_when_the_last_frame_goes_is_told(decoder, name, codec_clips):
    if decoder == "decord":
        pytest.importorskip("decord")
    decoded = decode(codec_clips / name, np.arange, decoder=decoder)
    assert decoded.end > decoded.timestamps[-1]
    assert (
        decode(codec_clips / name, lambda count: np.array([0]), decoder=decoder).end == decoded.end
    )


def test_decord_reads_the_same_frames(clip):
    pytest.importorskip("decord")
    ours, theirs = (
        decode(clip, lambda n: np.array([0, 9, 23]), decoder=decoder)
        for decoder in ("pyav", "decord")
    )
    assert np.array_equal(ours.indices, theirs.indices)
    assert theirs.num_frames == 24
    np.testing.assert_allclose(ours.timestamps, theirs.timestamps, atol=1e-4)
    assert np.array_equal(ours.frames, theirs.frames)


def test_decord_says_what_it_cannot_read(broken_clips):
    pytest.importorskip("decord")
    with pytest.raises(VideoError, match="decord cannot read it"):
        decode(broken_clips / "random_bytes.mp4", every_frame, decoder="decord")


def test_where_decord_is_not_installed_it_says_so(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(VideoError, match=r"is not installed; .* use --decoder pyav"):
        decode(clip, every_frame, decoder="decord")
    with pytest.raises(VideoError, match="is not installed"):
        decoder_version("decord")


def test_an_unknown_decoder_is_not_replaced_by_another(clip):
    with pytest.raises(
        ValueError, match="got decoder 'opencv', expected 'pyav', 'decord' or 'torchcodec-DEVICE'"
    ):
        decode(clip, every_frame, decoder="opencv")


def test_the_version_of_a_decoder():
    assert re.fullmatch(r"PyAV [\d.]+, libavcodec \d+\.\d+\.\d+", decoder_version("pyav"))
    pytest.importorskip("decord")
    assert re.fullmatch(r"decord [\d.]+", decoder_version("decord"))
