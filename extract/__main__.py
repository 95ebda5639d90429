"""python -m extract: a folder of videos in, a feature store out."""

from dataclasses import replace

from extract.cli import run_as_script
from extract.options import Options


def main(options: Options) -> int:
    from extract.workers.driver import extract

    weights = str(options.weights)
    if weights.endswith(".pt") and options.backbone is None:
        # Imports timm, which a run that continues a store may not need.
        from extract.backbone.weights import recorded_backbone

        options = replace(options, backbone=recorded_backbone(weights))
    return extract(options)


if __name__ == "__main__":
    run_as_script()
