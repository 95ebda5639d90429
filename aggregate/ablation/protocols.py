"""Published evaluation protocols for frozen features, as options of aggregate.crossval."""

import argparse
from collections.abc import Sequence
from typing import Any, Literal

from extract.commands import flag_of, spaced

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
    """The value of --protocol on a command line. It sets the defaults of other options, so it is
    parsed before them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--protocol")
    return parser.parse_known_args([arg for arg in args if arg != "--"])[0].protocol


def describe_protocol(name: str, options: Any) -> str:
    """The options that the protocol sets, and those that the user overrides."""
    kept, overridden = [], []
    for key, value in PROTOCOLS[name].items():
        chosen = getattr(options, key)
        if chosen == value:
            kept.append(f"{flag_of(key)} {spaced(value)}")
        else:
            overridden.append(
                f"NOT {name}'s: {flag_of(key)} {spaced(chosen)} ({name}: {spaced(value)})"
            )
    return "\n          ".join([f"{name}: {', '.join(kept)}", *sorted(overridden)])
