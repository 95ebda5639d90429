"""python -m extract: a folder of videos in, a feature store out."""

import sys
from dataclasses import replace

from extract.cli import run_command
from extract.options import Options


def main(options: Options) -> int:
    from extract.backbone.weights import recorded_backbone
    from extract.workers.driver import extract

    name = recorded_backbone(options.weights)
    if name is not None and options.backbone == Options.backbone:
        options = replace(options, backbone=name)
    return extract(options)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m extract"))
