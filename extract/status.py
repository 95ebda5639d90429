"""python -m extract.status feats.zarr: the contents of a store, failures, size and speed."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from extract.cli import run_as_script


@dataclass(frozen=True)
class Options:
    """Show counts by split, failure reasons, size and speed of a feature store."""

    store: Annotated[str, tyro.conf.Positional]
    """The feature store."""


def main(options: Options) -> int:
    from extract.store import FeatureStore
    from extract.store.summary import status_table

    print(status_table(FeatureStore.open(options.store)))
    return 0


if __name__ == "__main__":
    run_as_script()
