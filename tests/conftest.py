"""Fixtures of the whole suite: folders of clips, and random state and threads that are restored
after each test."""

import contextlib
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from extract.cores import available_cores

# Waiting threads sleep: if others load the machine, spinning makes small tensor work 20 times
# slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

ROOT = Path(__file__).parent.parent
os.environ.setdefault(
    "HGNL_CACHE", str(ROOT / ".pytest_cache" / "hgnl")
)  # converted networks, kept between runs
# Test processes share the cores; if each used all of them, all would be slower.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = available_cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
# The slowest files, slowest first. Test processes start them in this order, so that all end
# together.
LONGEST = (
    "test_ray_pool.py",
    "test_prove.py",
    "test_export.py",
    "test_processes.py",
    "test_backbone.py",
    "test_decode.py",
    "test_power.py",
    "test_readme.py",
    "test_matrix.py",
    "test_engines.py",
    "test_remote.py",
    "test_finetune.py",
    "test_predict.py",
    "test_windows.py",
    "test_video_models.py",
    "test_crossval.py",
    "test_run.py",
    "test_report.py",
    "test_int8.py",
    "test_train.py",
    "test_ablate.py",
    "test_pool.py",
    "test_reconcile.py",
    "test_store.py",
    "test_joined.py",
    "test_notebook.py",
    "test_protocols.py",
    "test_stnet.py",
    "test_spans.py",
    "test_lazy_dynamo.py",
    "test_image_models.py",
)

with contextlib.suppress(ImportError):  # a machine with a GPU may have none
    import hypothesis

    # The time of an example says nothing if others use the machine too.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile(
        "shared machine", deadline=None, suppress_health_check=slow
    )
    hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def shared_clips() -> Path:
    """The real clips next to the project (kinetics_like, odd). They are not shipped, since their
    licenses forbid it."""
    clips = ROOT.parent / "shared" / "clips"
    if not clips.is_dir():
        pytest.skip(
            "the real clips of ../shared/clips are not here; they are not shipped with the project"
        )
    return clips


@pytest.fixture(scope="session")
def codec_clips() -> Path:
    """22 tiny clips, one per codec or oddity, made from one MIT-licensed clip."""
    return ROOT / "tests" / "clips" / "codecs"


@pytest.fixture(scope="session")
def broken_clips() -> Path:
    """Seven inputs that are not good videos: empty, HTML, random bytes, truncated, bit flips, audio
    only."""
    return ROOT / "tests" / "clips" / "broken"


@pytest.fixture(scope="session")
def demo_clips() -> Path:
    """The labeled real clips of the package: daily_actions and exercise_mini."""
    return ROOT / "pipelines" / "clips"


@pytest.fixture(autouse=True)
def _state_restored():
    """A test that seeds, draws or sets threads must not change a bit of the next test's results."""
    states = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    torch_state = (torch.get_rng_state(), torch.get_num_threads()) if torch else None
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    if torch is not None:
        torch.set_rng_state(torch_state[0])
        torch.set_num_threads(torch_state[1])


def pytest_configure() -> None:
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # a shell's background job ignores SIGINT; processes that tests start must not
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("HGNL_GPU") == "pretended":
        import pretend

        pretend.begin()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests run if HGNL_GPU=1 says that there is a GPU, and must not skip then.

    HGNL_GPU=pretended runs them on the CPU with small sizes, as a rehearsal.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if os.environ.get("HGNL_GPU"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU is said to be present (HGNL_GPU=1)"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as in each of several processes: another number of threads sums in another
    order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
