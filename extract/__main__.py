"""python -m extract: a folder of videos in, a feature store out."""

import sys
from dataclasses import replace

from extract.cli import run_command
from extract.options import Options


def main(options: Options) -> int:
    from extract.workers.driver import extract

    if str(options.weights).endswith(".pt") and options.backbone == Options.backbone:
        from extract.backbone.weights import (
            recorded_backbone,
        )  # imports timm, which a second start does not need

        name = recorded_backbone(options.weights)
        if name is not None:
            options = replace(options, backbone=name)
    return extract(options)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m extract"))
