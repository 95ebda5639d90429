"""A training step: its gradients, and how it changes the weights."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from aggregate import train
from aggregate.data.features import Batch, balanced_order
from aggregate.models import Dropout, build
from aggregate.training.learner import Learner, clip_gradients
from aggregate.training.recipes import (
    Recipe,
    choose_precision,
    class_weights,
    make_optimizer,
    parameter_groups,
    recipe,
    set_lr,
)
from extract import InputError
from extract.store import FeatureStore
from stores import classes_store


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    network(torch.randn(8, 40)).square().sum().backward()
    return network


@pytest.mark.parametrize("largest_norm", [0.1, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(largest_norm):
    ours, theirs = small_network(), small_network()
    ours[2].bias.grad = theirs[2].bias.grad = None
    clip_gradients(ours.parameters(), largest_norm)
    before = nn.utils.clip_grad_norm_(theirs.parameters(), largest_norm)
    assert (before > largest_norm) == (largest_norm < 1)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is other.grad is None or torch.equal(mine.grad, other.grad)


def test_the_fused_optimizer_takes_the_steps_of_the_plain_one():
    ours, theirs = small_network(), small_network()
    chosen = recipe("cached", "tsn", videos=100, weight_decay=0.1)
    fused = make_optimizer(parameter_groups(ours, chosen), chosen)
    plain = torch.optim.SGD(parameter_groups(theirs, chosen), lr=chosen.lr, momentum=0.9)
    start = copy.deepcopy(ours.state_dict())
    for _ in range(20):
        fused.step()
        plain.step()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, start[name])


def learner(*, dropout: float = 0.0, seed: int = 0, **changes) -> Learner:
    """A learner of a small TSN, always with the same weights."""
    torch.manual_seed(5)
    model = build("tsn", dim=16, num_classes=3, dropout=dropout)
    chosen = Recipe("sgd", lr=0.1, weight_decay=0.0, epochs=4, batch_size=8, dropout=dropout)
    return Learner(
        "tsn", model, chosen, steps_per_epoch=4, seed=seed, device=torch.device("cpu"), **changes
    )


def batch_of(videos: int) -> Batch:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(videos, 4, 16)).astype("f2"))
    return Batch(x, None, torch.from_numpy(rng.integers(0, 3, videos)), np.arange(videos))


def update(learner: Learner, batch: Batch, epoch: int = 0, step: int = 0) -> torch.Tensor:
    """The change of all weights by a step, concatenated."""
    before = nn.utils.parameters_to_vector(learner.model.parameters()).clone()
    learner.step(batch, epoch, step)
    return (nn.utils.parameters_to_vector(learner.model.parameters()) - before).detach()


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(micro_batch):
    batch = batch_of(7)
    whole = update(learner(), batch)
    assert whole.norm() > 1e-3
    torch.testing.assert_close(
        update(learner(micro_batch=micro_batch), batch), whole, rtol=1e-4, atol=1e-7
    )


def test_the_learning_rate_changes_with_every_step():
    one = learner()
    for step in range(4):
        one.step(batch_of(4), 1, step)
        assert one.optimizer.param_groups[0]["lr"] == 0.1 * one.recipe.factor(1 + step / 4)
    assert one.recipe.factor(1) > one.recipe.factor(1.25) > one.recipe.factor(1.75)


def test_of_equal_errors_the_first_epoch_is_kept():
    one = learner()
    kept = []
    for epoch, error in enumerate((0.6, 0.5, 0.5, 0.7, 0.4)):
        one.step(batch_of(4), epoch, 0)
        one.keep_best(error, epoch)
        kept.append(one.best_epoch)
    assert kept == [0, 1, 1, 1, 4]
    one.step(batch_of(4), 4, 1)
    one.load_best()
    assert all(
        torch.equal(value, one.best_state[name]) for name, value in one.net.state_dict().items()
    )


def test_the_randomness_of_a_step_is_a_function_of_seed_epoch_step_and_rank():
    def drawn(*, seed: int = 0, epoch: int = 0, step: int = 0, rank: int = 0) -> torch.Tensor:
        one = learner(dropout=0.5, seed=seed, rank=rank)
        one.recipe = replace(
            one.recipe, milestones=(3,)
        )  # until then the learning rate is the same
        return update(one, batch_of(8), epoch, step)

    same = drawn()
    assert torch.equal(drawn(), same)
    for changed in ({"seed": 1}, {"epoch": 1}, {"step": 1}, {"rank": 1}):
        assert not torch.equal(drawn(**changed), same), changed


def test_matrices_decay_and_biases_do_not():
    network = small_network()
    chosen = recipe("paper", "tsn", videos=100, weight_decay=0.1)
    decay = {
        id(p): group["weight_decay"]
        for group in parameter_groups(network, chosen)
        for p in group["params"]
    }
    for name, parameter in network.named_parameters():
        assert decay[id(parameter)] == (0.1 if name.endswith("weight") else 0), name


def test_a_group_keeps_its_part_of_the_learning_rate():
    chosen = recipe("paper", "tsn", videos=100, lr=0.2)
    groups = parameter_groups(small_network(), chosen) + parameter_groups(
        small_network(), chosen, lr_scale=0.1
    )
    optimizer = make_optimizer(groups, chosen)
    set_lr(optimizer, chosen, 20)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.02, 0.02, 0.002, 0.002]
    )


def test_dropout_keeps_the_share_and_the_mean_and_follows_the_seed():
    dropout = Dropout(0.3)
    x = torch.ones(200, 500, requires_grad=True)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x))
    assert abs(float((first == 0).float().mean()) - 0.3) < 0.01
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.7])
    first.sum().backward()
    assert torch.equal(x.grad, first.detach())
    assert torch.equal(dropout.eval()(x), x)


def test_the_backward_pass_casts_only_what_the_forward_pass_cast():
    """Products of the aggregator stay in fp32 in both passes, for every precision of the
    classifier."""
    gradients = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = build("attentive", dim=64, num_classes=5, dropout=0.0)
        chosen = recipe("cached", "attentive", videos=100)
        learner = Learner("", model, chosen, 1, 0, torch.device("cpu"), precision=precision)
        learner.train_mode()
        F_v = []
        model.aggregator.register_forward_hook(lambda *values, F_v=F_v: F_v.append(values[2]))
        x = torch.randn(8, 3, 64, generator=torch.Generator().manual_seed(1)).half()
        learner.step(Batch(x, None, torch.arange(8) % 5, np.arange(8)), 0, 0)
        assert F_v[0].dtype == torch.float32
        gradients.append(model.aggregator.layers[0].mlp[0].weight.grad)
    with_bf16 = gradients[1]
    as_bf16 = with_bf16.bfloat16().float()
    assert (with_bf16 != as_bf16).float().mean() > 0.9, "the gradient was computed in bf16"
    assert ((gradients[0] - with_bf16).norm() / gradients[0].norm()) < 0.02


# -- balance -----------------------------------------------------------------------------------------------------------


def test_a_balanced_order_has_every_class_equally_often():
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    order = balanced_order(labels, np.random.default_rng(0))
    assert len(order) == 100
    assert sorted(np.bincount(labels[order]).tolist()) == [33, 33, 34]
    for label, times in (
        (0, 1),
        (1, 2),
        (2, 4),
    ):  # no video is repeated before all others of its class were used
        counts = np.bincount(order[labels[order] == label], minlength=100)[labels == label]
        assert counts.max() == times
        assert counts.max() - counts.min() <= 1


def test_classes_weigh_by_their_effective_number():
    weights = class_weights([1000, 10, 0], "loss")
    effective = [(1 - 0.999**count) / 0.001 for count in (1000, 10)]
    assert weights[0] / weights[1] == pytest.approx(effective[1] / effective[0])
    assert weights[0] + weights[1] == pytest.approx(2)
    assert weights[2] == 0
    assert class_weights([3, 1], "sampler") is class_weights([3, 1], "none") is None


@pytest.mark.parametrize("balance", ["sampler", "loss"])
def test_balance_helps_rare_classes(balance, tmp_path):
    """The set is imbalanced on purpose: 60, 12 and 5 videos to train on, and equally many of each
    class to validate."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.repeat([0, 1, 2], [60, 12, 5]), np.repeat([0, 1, 2], 30)])
    features = np.eye(3, 16)[labels][:, None] * 1.5 + rng.normal(size=(len(labels), 4, 16)) * 2
    FeatureStore.from_arrays(
        tmp_path / "f.zarr",
        features.astype(np.float32),
        lengths=np.full(len(labels), 4),
        labels=labels,
        classes=["a", "b", "c"],
        splits=["train"] * 77 + ["val"] * 90,
    )
    found = {}
    for name in ("none", balance):
        out = tmp_path / name
        train.main(
            train.Options(
                agg="tsn", features=str(tmp_path / "f.zarr"), out=out, balance=name, epochs=20
            )
        )
        found[name] = json.loads((out / "results.json").read_text())["tsn"]["4"]["mean_class"][
            "value"
        ]
    assert found[balance] > found["none"] + 0.02


def test_the_precision_that_auto_is_does_not_depend_on_load():
    cpu = torch.device("cpu")
    assert choose_precision("bf16", cpu, 16) == "bf16"
    assert choose_precision("auto", cpu, 16) == "fp32"
    large = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    assert choose_precision("auto", cpu, 256) == large
    assert choose_precision("auto", torch.device("cuda"), 16) == "bf16"


def test_precision_is_part_of_the_run(tmp_path):
    classes_store(tmp_path / "f.zarr")
    wanted = train.Options(
        agg="tsn", features=str(tmp_path / "f.zarr"), out=tmp_path / "a", epochs=1, precision="bf16"
    )
    train.main(wanted)
    with pytest.raises(InputError, match="precision"):
        train.main(replace(wanted, precision="fp32"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": -1.0}, "--warmup -1.0: expected at least 0"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1: expected less than 1"),
    ],
)
def test_values_of_a_recipe_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        recipe("cached", "tsn", videos=100, **changes)


def test_the_learning_rate_falls_as_the_recipe_says():
    linear = recipe("paper", "tsn", videos=100, decay="linear", warmup=2.0, epochs=12)
    assert linear.milestones == ()
    assert [round(linear.factor(epoch), 3) for epoch in (1, 2, 7, 12)] == [0.5, 1.0, 0.5, 0.0]
    assert "decay linear, warmup 2.0" in str(linear)
    assert recipe("cached", "tsn", videos=100, warmup=0.0).factor(0) == 1
    cosine = recipe("cached", "tsn", videos=100, warmup=2.0, epochs=12)
    assert [round(cosine.factor(epoch), 3) for epoch in (1, 2, 7, 12)] == [0.5, 1.0, 0.5, 0.0]
    steps = recipe("paper", "tsn", videos=100)
    assert [round(steps.factor(epoch), 3) for epoch in (0, 19.9, 20, 29.9, 30)] == [
        1,
        1,
        0.1,
        0.1,
        0.01,
    ]
    assert recipe("paper", "tsn", videos=100, epochs=20).milestones == (10, 15)
    assert "label smoothing 0.1" in str(recipe("cached", "tsn", videos=100, label_smoothing=0.1))
