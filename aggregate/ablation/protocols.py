"""Published protocols for frozen features, as options of aggregate.crossval."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Protocol = Literal["mveb", "vjepa2"]

PROTOCOLS: dict[str, dict[str, Any]] = {
    # embeddings-benchmark/mteb: scikit-learn's logistic regression, 8 videos per class, 10 draws.
    "mveb": {
        "agg": ("logreg",),
        "shots": 8,
        "repeats": 10,
        "C": (1.0,),
        "vector": "mean",
        "standardize": ("false",),
        "epochs": (100,),
    },
    # facebookresearch/vjepa2: the attentive probe of 4 blocks and 16 heads over a grid of rates and
    # decays.
    "vjepa2": {
        "agg": ("attentive",),
        "depth": (4,),
        "heads": (16,),
        "optimizer": ("adamw",),
        "lr": (5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
        "weight_decay": (0.01, 0.1, 0.4, 0.8),
        "epochs": (20,),
        "batch_size": (256,),
        "decay": ("cosine",),
        "warmup": (0.0,),
        "dropout": (0.0,),
        "standardize": ("false",),
    },
}


def protocol_in(args: Sequence[str]) -> str | None:
    """The value of --protocol on a command line, which sets the defaults that the others are parsed
    against."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--protocol")
    return parser.parse_known_args([one for one in args if one != "--"])[0].protocol


def describe_protocol(name: str, options: Any) -> str:
    """What the protocol sets, and the options that were given next to it, which win."""
    values: Mapping[str, Any] = PROTOCOLS[name]
    kept = {key: value for key, value in values.items() if getattr(options, key) == value}
    lines = [f"{name}: {', '.join(f'{_flag(key)} {_text(value)}' for key, value in kept.items())}"]
    for key in values.keys() - kept.keys():
        lines.append(
            f"NOT {name}'s: {_flag(key)} {_text(getattr(options, key))} ({name}: {_text(values[key])})"
        )
    return "\n          ".join([lines[0], *sorted(lines[1:])])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
