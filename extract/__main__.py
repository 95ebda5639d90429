"""python -m extract: a folder of videos in, a feature store out."""

import sys

from extract.cli import run_command
from extract.options import Options


def main(options: Options) -> int:
    from extract.workers.driver import extract

    return extract(options)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m extract"))
