"""The grid of configurations that lists of options describe, grouped by the batches they share."""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from aggregate.ablation.options import LISTS, PROBES, GridOptions
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.configurations import Configuration, configured
from aggregate.training.options import TrainOptions, unused_flags
from extract import InputError
from extract.cli import check_ranges
from extract.commands import flag_of, spaced
from extract.store import FeatureStore

_BOOLEANS = {"true": True, "false": False}  # in lists of options they are text


class Plan(NamedTuple):
    """Configurations to train, and the reason for each combination that cannot be built."""

    configurations: list[Configuration]
    skipped: dict[str, str]


def group_into_passes(
    configurations: Iterable[Configuration], *, at_once: int
) -> list[list[Configuration]]:
    """Configurations that share their batches, at most `at_once` in a pass."""
    by_batches: dict[Hashable, list[Configuration]] = {}
    for configuration in configurations:
        by_batches.setdefault(configuration.batch_key, []).append(configuration)
    passes = []
    for group in by_batches.values():
        count = -(-len(group) // at_once)
        passes += [group[start::count] for start in range(count)]
    return passes


def candidates(options: GridOptions, store: FeatureStore, init: Checkpoint | None = None) -> Plan:
    """All combinations of the listed options, for one seed and all videos."""
    combinations = _combinations(options)
    varied = [name for name in LISTS if len({getattr(each, name) for each in combinations}) > 1]
    plan = Plan([], {})
    for combination in combinations:
        configuration = configured(name_of(combination, varied), combination, videos=len(store))
        try:
            with torch.device("meta"):
                width = configuration.model(store).classifier.in_features
            if init is not None:
                init_width = init.state_dict["classifier.weight"].shape[1]
                if width != init_width:
                    raise InputError(f"--init classifies {init_width} features, this model {width}")
            plan.configurations.append(configuration)
        except InputError as error:
            plan.skipped[configuration.name] = str(error)
    if not plan.configurations:
        name, reason = next(iter(plan.skipped.items()))
        raise InputError(f"no configuration can be built; {name}: {reason}")
    return plan


def check_lists(options: GridOptions, store: FeatureStore) -> None:
    """InputError for an empty list, an option that applies to none of --agg, or a value out of
    range."""
    check_ranges(options)
    own = [PROBES.get(agg) or {*LISTS} - {*unused_flags(agg)} for agg in options.agg]
    for field in fields(options):
        values = getattr(options, field.name)
        if field.name in ("seeds", *LISTS) and field.default and not values:
            raise InputError(f"{flag_of(field.name)} needs at least one value")
        is_listed = field.name in {*LISTS}.union(*PROBES.values())
        if is_listed and values != field.default and not any(field.name in flags for flags in own):
            raise InputError(
                f"{flag_of(field.name)} {spaced(values)} does not apply to --agg "
                f"{spaced(options.agg)}"
            )
    for frames in options.frames:
        if frames > store.frames_per_video:
            raise InputError(
                f"--frames {frames}: {store.path} holds {store.frames_per_video} frames per video"
            )


def _combinations(options: GridOptions) -> list[TrainOptions]:
    """Each distinct combination once. Flags that an aggregator lacks keep their default."""
    defaults = {field.name: field.default for field in fields(TrainOptions)}
    values = {name: getattr(options, name) for name in defaults if hasattr(options, name)}
    lists = [
        [_BOOLEANS.get(value, value) for value in values.pop(name)] or [None] for name in LISTS
    ]
    combinations: dict[TrainOptions, None] = {}
    for listed in itertools.product(*lists):
        chosen: dict[str, Any] = dict(zip(LISTS, listed, strict=True))
        chosen |= {name: defaults[name] for name in unused_flags(chosen["agg"])}
        combinations[TrainOptions(**chosen, **values | {"out": None})] = None
    return list(combinations)


def name_of(options: TrainOptions, varied: Sequence[str]) -> str:
    """`hgnl g1=4 g2=2`: the aggregator and those of the `varied` options that it has."""
    names = [name for name in varied if name not in {"agg", *unused_flags(options.agg)}]
    return " ".join([options.agg, *(f"{name}={_text(getattr(options, name))}" for name in names)])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
