"""Files that are opened, and files that are refused by name before they are read. No file can make
the program decode another file."""

import os
import re
import socket
import time
from pathlib import Path

import av
import numpy as np
import pytest

from extract.decode import VideoError, container, decode
from extract.decode.container import check_length, check_size, demuxers, is_refused
from extract.decode.packets import duration_of
from odd_files import write_pictures

# Every format that the FFmpeg in PyAV's wheel reads, and whether it is allowed. A new format fails
# a test, so that a person decides: does it hold a video itself, or does it name other files, a
# device or an address?
REFUSED = """
alsa avisynth concat dash dvdvideo fbdev hls image2 imf kmsgrab lavfi libcdio oss rtp rtsp sap sdp
vapoursynth video4linux2,v4l2 vobsub webm_dash_manifest x11grab
"""
READ = """
3dostr 3g2 3gp 4xm aa aac aax ac3 ac4 ace acm act adf adp ads adx aea afc aiff aix alaw alias_pix alp amr
amrnb amrwb anm apac apc ape apm apng aptx aptx_hd apv aqtitle argo_asf argo_brp argo_cvg asf asf_o ass ast
au av1 avi avr avs avs2 avs3 bethsoftvid bfi bfstm bin bink binka bit bitpacked bmp_pipe bmv boa bonk
brender_pix brstm c93 caf cavsvideo cdg cdxl cine codec2 codec2raw cri_pipe data daud dcstr dds_pipe derf
dfa dfpwm dhav dirac dnxhd dpx_pipe dsf dsicin dss dts dtshd dv dvbsub dvbtxt dxa ea ea_cdata eac3 epaf evc
exr_pipe f32be f32le f64be f64le ffmetadata film_cpk filmstrip fits flac flic flv frm fsb fwse g722 g723_1
g726 g726le g728 g729 gdv gem_pipe genh gif gif_pipe gsm gxf h261 h263 h264 hca hcom hdr_pipe hevc hnm hxvs
iamf ico idcin idf iff ifv ilbc image2pipe ingenient ipmovie ipu ircam iss iv8 ivf ivr j2k_pipe jacosub
jpeg_pipe jpegls_pipe jpegxl_anim jpegxl_pipe jpegxs_pipe jv kux kvag laf lc3 live_flv lmlm4 loas lrc luodat
lvf lxf m4v matroska matroska,webm mca mcc mgsts microdvd mjpeg mjpeg_2000 mlp mlv mm mmf mods moflex mov
mov,mp4,m4a,3gp,3g2,mj2 mp3 mp4 mpc mpc8 mpeg mpegts mpegtsraw mpegvideo mpjpeg mpl2 mpsub msf msnwctcp msp
mtaf mtv mulaw musx mv mvi mxf mxg nc nistsphere nsp nsv nut nuv obu ogg oma osq paf pam_pipe pbm_pipe
pcx_pipe pdv pfm_pipe pgm_pipe pgmyuv_pipe pgx_pipe phm_pipe photocd_pipe pictor_pipe pjs pmp png_pipe
pp_bnk ppm_pipe psd_pipe psxstr pva pvf qcp qdraw_pipe qoa qoi_pipe r3d rawvideo rcwt realtext redspark rka
rl2 rm roq rpl rsd rso s16be s16le s24be s24le s32be s32le s337m s8 sami sbc sbg scc scd sdns sdr2 sds sdx
ser sga sgi_pipe shn siff simbiosis_imx sln smjpeg smk smush sol sox spdif srt stl subviewer subviewer1
sunrast_pipe sup svag svg_pipe svs swf tak tedcaptions thp tiertexseq tiff_pipe tmv truehd tta tty txd ty
u16be u16le u24be u24le u32be u32le u8 usm v210 v210x vag vbn_pipe vc1 vc1test vidc vividas vivo vmd voc vpk
vplayer vqf vvc w64 wady wav wavarc wc3movie webm webp_pipe webvtt wsaud wsd wsvqa wtv wv wve xa xbin
xbm_pipe xmd xmv xpm_pipe xvag xwd_pipe xwma yop yuv4mpegpipe
"""


def center(num_frames: int) -> np.ndarray:
    return np.array([num_frames // 2])


def reason_for(path) -> str:
    with pytest.raises(VideoError) as failure:
        decode(path, center)
    return failure.value.reason


def test_every_format_that_ffmpeg_reads_was_decided_on():
    refused = {name for name, format in demuxers().items() if is_refused(format)}
    undecided = set(demuxers()) - set(REFUSED.split()) - set(READ.split())
    assert not undecided, (
        f"decide on {undecided} (REFUSED_FORMATS in extract/decode/container.py), then list them here"
    )
    assert refused == set(REFUSED.split()) & set(demuxers())


# -- files that refer to others --------------------------------------------------------------------------------------


@pytest.fixture
def video(tmp_path) -> Path:
    (tmp_path / "sub").mkdir()
    return write_pictures(tmp_path / "sub" / "other.mp4", (64, 48), 10)


def concat(video: Path) -> str:
    return f"ffconcat version 1.0\nfile sub/{video.name}\n"


def playlist(video: Path) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{video}\n#EXT-X-ENDLIST\n"


def session(video: Path) -> str:
    head = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    return f"{head}m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.mp4", concat, "concat"),
        ("a.ffconcat", concat, "concat"),
        ("list.m3u8", playlist, "hls"),
        ("list.mp4", playlist, "hls"),
        ("a.sdp", session, "sdp"),
        ("a.mp4", session, "sdp"),
    ],
)
def test_text_that_names_other_files_is_refused_by_name(name, content, kind, video, tmp_path):
    path = tmp_path / name
    path.write_text(content(video))
    reason = reason_for(path)
    # FFmpeg itself does not recognize a playlist with that name.
    expected = f"is of a kind that refers to other files ({kind}); list those files themselves"
    assert reason == ("is text, not a video" if name == "list.mp4" else expected)
    with pytest.raises(VideoError, match=r"other files|is text"):
        duration_of(str(path))


def test_a_name_with_a_pattern_is_a_name(video, tmp_path):
    """FFmpeg would read frame-1.png, frame-2.png ... for such a name."""
    for name in ("frame-%d.png", "frame-1.png", "frame-2.png"):
        with av.open(str(tmp_path / "one.mov"), "w") as output:
            stream = output.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 8, 8, "rgb24"
            packets = stream.encode(av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8)))
        (tmp_path / name).write_bytes(bytes(packets[0]))
    assert "(image2)" in reason_for(tmp_path / "frame-%d.png")


# -- what is not a file ----------------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.mark.parametrize("make", [fifo, listening, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_sockets_and_devices_are_refused_at_once(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    path = Path("a.mp4")
    make(path)
    started = time.monotonic()
    assert reason_for(path) == "is a pipe, a socket or a device, not a file"
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("https://example.org/a.mp4", "is an address, not a file; download it first"),
        (Path("https://example.org/a.mp4"), "is an address, not a file; download it first"),
        (
            "a\\b.mp4",
            "does not exist; its name contains a backslash, which separates folders on Windows only: write /",
        ),
        ("a\0b.mp4", "cannot be read: embedded null byte"),
    ],
)
def test_names_that_are_no_files_are_named_for_what_they_are(path, reason):
    assert reason_for(path) == reason


# -- pictures and lengths beyond any use -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "codec", "pix_fmt"),
    [
        ("thin8.mp4", (4096, 8), "libx264", "yuv420p"),
        ("thin2.mkv", (8192, 2), "ffv1", "yuv420p"),
        ("tall.mp4", (8, 4096), "libx264", "yuv420p"),
        ("huge.mov", (8320, 8320), "png", "rgb24"),
    ],
)
def test_pictures_beyond_any_use_are_refused_by_name(name, size, codec, pix_fmt, tmp_path):
    path = write_pictures(tmp_path / name, size, 1, codec=codec, pix_fmt=pix_fmt)
    limits = "expected at most 67,108,864 pixels, and a longer side of at most 32 times the shorter"
    assert reason_for(path) in (
        f"its pictures are {size[0]} x {size[1]}; {limits}",
        f"no frame of it decodes (damaged after 0 readable frames: a picture has more than {8192 * 8192:,} pixels)",
    )


def test_pictures_at_the_limits_are_read():
    check_size("a", 8192, 8192)
    check_size("a", 32, 1)
    check_size("a", 1, 1)
    for width, height in ((8193, 8192), (33, 1), (1, 33)):
        with pytest.raises(
            VideoError, match=f"its pictures are {width} x {height}; expected at most"
        ):
            check_size("a", width, height)


def growing(folder: Path, size: tuple[int, int]) -> Path:
    """One stream with five pictures of 64 x 64, then five of another size."""
    path, parts = folder / "grows.mkv", []
    for name, pictures in (("first.mkv", (64, 64)), ("second.mkv", size)):
        parts.append(write_pictures(folder / name, pictures, 5, codec="mjpeg", pix_fmt="yuvj420p"))
    with (
        av.open(str(path), "w") as output,
        av.open(str(parts[0])) as first,
        av.open(str(parts[1])) as second,
    ):
        stream = output.add_stream_from_template(first.streams.video[0])
        packets = [
            packet for source in (first, second) for packet in source.demux(video=0) if packet.size
        ]
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = 100 * number
            packet.stream = stream
            output.mux(packet)
    return path


def test_a_size_that_changes_on_the_way_is_checked_too(tmp_path, monkeypatch):
    """Frames before the change are read, and the error names the limit."""
    path = growing(tmp_path, (256, 256))
    assert decode(path, np.arange).num_frames == 10
    monkeypatch.setattr(container, "MAX_PIXELS", 128 * 128)
    decoded = decode(path, np.arange)
    assert decoded.num_frames == 5
    assert (
        decoded.problem == "damaged after 5 readable frames: a picture has more than 16,384 pixels"
    )


def test_a_shape_that_changes_on_the_way_is_refused(tmp_path):
    assert reason_for(growing(tmp_path, (4096, 64))).startswith(
        "its pictures are 4096 x 64; expected"
    )


def test_a_length_that_a_file_cannot_have_is_refused(tmp_path):
    path = write_pictures(tmp_path / "gap.mkv", (64, 48), 3, times=[0, 0.1, 3e6])
    message = r"its time stamps claim [34],\d00,000 s in 1,4\d\d bytes"
    assert re.match(message, reason_for(path))
    with pytest.raises(VideoError, match=message):
        duration_of(str(path))
    check_length(path, 3600.0)
    with pytest.raises(
        VideoError,
        match="at most 1,000,000 s, and at least 1 byte per second of a video that is longer",
    ):
        check_length(path, 3601.0)
