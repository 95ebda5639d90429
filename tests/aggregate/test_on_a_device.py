"""Training on a device that is not the CPU: no step reads values, because reading waits for the
device.

PyTorch's `meta` device replaces a GPU. Its tensors have no values that could be read, and they
cannot be combined with tensors on the CPU.
"""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from aggregate.data.features import Batch, StoredFeatures, to_device
from aggregate.endtoend import FrameModel, build_net
from aggregate.models import build
from aggregate.training.learner import Learner
from aggregate.training.loop import train_epoch
from aggregate.training.recipes import recipe
from small_models import AGGREGATORS, CLASSES, trunk_of
from stores import classes_store

META = torch.device("meta")
# Their batch norm counts the valid frames of a batch with a mask, which waits for the device.
COUNTING = {"txb", "nextvlad"}
HEADS = [
    *AGGREGATORS.items(),
    ("hgnl", {"g1": 4, "g2": 2, "attention": "softmax", "normalize": True, "start": "average"}),
]


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch) -> None:
    """`meta` does not support half precision."""
    real = torch.autocast

    def without(kind, *rest, **how):
        return nullcontext() if kind == "meta" else real(kind, *rest, **how)

    monkeypatch.setattr(torch, "autocast", without)


def learner(name: str, model: torch.nn.Module, **how) -> Learner:
    chosen = replace(recipe("cached", name, videos=1000), batch_size=8)
    return Learner(name, model, chosen, 5, 0, META, precision="fp32", **how)


@pytest.mark.parametrize("placement", ["device", "memory", "mmap"])
def test_an_epoch_of_every_head_waits_for_the_device_at_its_end_only(placement, tmp_path) -> None:
    """Videos are short, so there are masks too. The two heads whose batch norm counts valid frames
    are left out."""
    store = classes_store(tmp_path / "f.zarr", dim=64)
    features = StoredFeatures(store, np.arange(40), device=META, placement=placement, training=True)
    heads = [
        learner(
            name,
            build(name, dim=store.dim, num_classes=len(store.classes), standardize=True, **options),
        )
        for name, options in HEADS
    ]
    ended = []
    for head in heads:
        head.end_epoch = ended.append
    batches = list(features.train_batches(epoch=0, frames=3, batch_size=8, seed=0))
    assert {batch.x.device.type for batch in batches} == {"meta"}
    assert any(batch.mask is not None for batch in batches)
    train_epoch([head for head in heads if head.name not in COUNTING], batches, 0)
    train_epoch(
        [head for head in heads if head.name in COUNTING],
        [replace(one, mask=None) for one in batches],
        0,
    )
    assert ended == [0] * len(HEADS)


@pytest.mark.parametrize("model", ["hgnl", "stnet"])
def test_a_step_from_frames_looks_at_nothing_either(model) -> None:
    trunk = trunk_of()
    own = {"g1": 4, "g2": 2} if model == "hgnl" else {"frames_per_segment": 2}
    own |= {"name": model, "num_classes": len(CLASSES), "dropout": 0.5, "dim": trunk.dim}
    net = FrameModel(build_net(own, trunk.module), trunk.preprocessing)
    size, N = trunk.preprocessing.size, own.get("frames_per_segment", 1)
    x = torch.zeros(4, 3, N, size, size, 3, dtype=torch.uint8)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    one = learner(model, net, micro_batch=2)
    one.train_mode()
    one.step(Batch(x, mask, torch.arange(4), np.arange(4)), 0, 0)


def test_what_goes_to_a_gpu_is_pinned_and_not_waited_for(monkeypatch) -> None:
    done = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, *where, **how: done.append((*where, how)) or tensor
    )
    gpu = torch.device("cuda", 0)
    to_device(torch.zeros(3), gpu)
    assert done == ["pinned", (gpu, {"non_blocking": True})]
    done.clear()
    to_device(torch.zeros(3), torch.device("cpu"))
    assert done == [(torch.device("cpu"), {"non_blocking": True})]


def test_a_value_that_is_looked_at_is_noticed() -> None:
    """This shows that the tests above can fail."""
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones(2, device=META).all())
    with pytest.raises(RuntimeError, match="not on the expected device"):
        torch.ones(2, device=META) + torch.ones(2)
