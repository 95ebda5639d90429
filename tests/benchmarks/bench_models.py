"""One training step of HG-NL against TSN's and against the literal form of eq. 7-8, on finished
batches in memory.

Sizes are dim 2048, m1 256, g1 16, g2 8, 256 videos per batch, 700 classes, 2 CPU threads. A step is
that of `aggregate.fit` (forward, backward, clipping if the recipe has it, update), with both
recipes. The contenders take turns in one process, in rotating order. The first turns do not count,
and the figure is the median of the ratios within a turn. TSN takes part twice: without noise the
ratio of the two would be 1.

The literal form (`tests/literal.py`: grouped Conv1d, all of V, n x n products) runs on the same
features, [batch, time, dim]; the limit is for these. It also runs on [batch, dim, time], the layout
that suits its convolutions best, although no caller has it. PyTorch counts the operations of matrix
products and convolutions.

This needs an idle machine. If others use the cores, two threads wait for each other at every small
product of the pooled form, and the ratios say little. So the load is printed, and also the ratio of
the best times, which other work disturbs least.

Run: `python -m pytest -s tests/benchmarks/bench_models.py`
"""

import os
import time
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aggregate.data.features import Batch
from aggregate.hgnl import HGNonLocal
from aggregate.models import build
from aggregate.training.learner import Learner
from aggregate.training.recipes import Recipe
from literal import literal_form

DIM, CLASSES, BATCH, THREADS, WARM_UP = 2048, 700, 256, 2, 3
_COMMON = {"lr": 1e-3, "weight_decay": 5e-4, "epochs": 8, "batch_size": BATCH, "dropout": 0.5}
# The steps of two recipes; schedules cost nothing.
RECIPES = {
    "paper": Recipe(optimizer="sgd", milestones=(4, 6), **_COMMON),
    "cached": Recipe(optimizer="adamw", clip=5.0, **_COMMON),
}


class LiteralHGNonLocal(HGNonLocal):
    """The same weights in a module that computes eq. 7, 8, 5 and 6 as they are written."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None
        return literal_form(self, x.transpose(1, 2))


@pytest.fixture(autouse=True)
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


def learner(name: str, recipe_name: str, *, literal: bool = False) -> Learner:
    torch.manual_seed(0)
    options = {"inner_dim": 256, "g1": 16, "g2": 8, "scale_init": 0.1} if name == "hgnl" else {}
    model = build(name, dim=DIM, num_classes=CLASSES, **options)
    if literal:
        model.aggregator.__class__ = LiteralHGNonLocal
    model.train()
    chosen, cpu = RECIPES[recipe_name], torch.device("cpu")
    return Learner(name=name, model=model, recipe=chosen, steps_per_epoch=2000, seed=0, device=cpu)


def batch_of(frames: int, dtype: torch.dtype, *, channels_first: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, frames, DIM, generator=generator).to(dtype)
    if channels_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return Batch(x, None, torch.randint(CLASSES, (BATCH,), generator=generator), np.arange(BATCH))


def take_turns(
    contenders: dict[str, tuple[Learner, Batch]], *, turns: int
) -> dict[str, list[float]]:
    """Seconds of a step, one number for each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(WARM_UP + turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            trained, batch = contenders[name]
            started = time.perf_counter()
            trained.step(batch, 0, turn)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], of: str, to: str) -> float:
    return median(one / other for one, other in zip(seconds[of], seconds[to], strict=True))


def of_best(seconds: dict[str, list[float]], of: str, to: str) -> float:
    return min(seconds[of]) / min(seconds[to])


def operations(trained: Learner, batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter:
        trained.step(batch, 0, 0)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32], ids=["features as stored", "features in fp32"]
)
@pytest.mark.parametrize("recipe_name", ["paper", "cached"])
def test_a_step_with_3_frames_against_tsn(recipe_name, dtype):
    batch = batch_of(3, dtype)
    contenders = {
        name: (learner(name.split()[0], recipe_name), batch)
        for name in ("tsn", "hgnl", "tsn again")
    }
    seconds = take_turns(contenders, turns=41)
    counted = {name: operations(*contenders[name]) for name in ("tsn", "hgnl")}
    times, by_operations = ratio(seconds, "hgnl", "tsn"), counted["hgnl"] / counted["tsn"]
    print(
        f"\n3 frames, {recipe_name} recipe, {dtype}: TSN {1e3 * median(seconds['tsn']):.1f} ms, HG-NL "
        f"{1e3 * median(seconds['hgnl']):.1f} ms: {times:.2f} times (best against best "
        f"{of_best(seconds, 'hgnl', 'tsn'):.2f}; by operations {by_operations:.2f}; TSN against TSN "
        f"{ratio(seconds, 'tsn again', 'tsn'):.2f}; load {os.getloadavg()[0]:.1f})"
    )
    assert times <= 2.8


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32], ids=["features as stored", "features in fp32"]
)
@pytest.mark.parametrize(("frames", "turns"), [(3, 15), (25, 9)])
def test_a_step_against_the_literal_form(frames, turns, dtype):
    batch, turned = batch_of(frames, dtype), batch_of(frames, dtype, channels_first=True)
    contenders = {
        "tsn": (learner("tsn", "paper"), batch),
        "pooled": (learner("hgnl", "paper"), batch),
        "literal": (learner("hgnl", "paper", literal=True), batch),
        "literal, [batch, dim, time]": (learner("hgnl", "paper", literal=True), turned),
    }
    outputs = [trained.model.features(given.x) for trained, given in contenders.values()]
    for literal in outputs[2:]:
        torch.testing.assert_close(literal, outputs[1])  # the same model takes part twice
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-2)
    seconds = take_turns(contenders, turns=turns)
    figures = ", ".join(f"{name} {1e3 * median(each):.1f} ms" for name, each in seconds.items())
    same, laid_out = (ratio(seconds, name, "pooled") for name in list(contenders)[2:])
    best = min(of_best(seconds, name, "pooled") for name in list(contenders)[2:])
    print(
        f"\n{frames} frames, {dtype}: {figures}: pooled {same:.1f} times faster than the literal form on the same "
        f"features, {laid_out:.1f} on features laid out for it (best against best, the smaller of the two: {best:.1f}; "
        f"load {os.getloadavg()[0]:.1f})"
    )
    assert frames != 25 or same >= 6
