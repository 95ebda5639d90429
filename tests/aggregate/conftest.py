"""Fixtures that several files of training tests share."""

import pytest

from stores import classes_store


@pytest.fixture(scope="session")
def features(tmp_path_factory) -> str:
    """A store on which training is hard enough that configurations differ. No test may change
    it."""
    path = tmp_path_factory.mktemp("features") / "feats.zarr"
    classes_store(path, noise=4.0)
    return str(path)
