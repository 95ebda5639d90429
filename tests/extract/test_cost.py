"""What an extraction costs elsewhere, by hand."""

import pytest

from extract.workers.cost import cost


def test_kinetics_700_by_hand():
    whole = cost(650_000, views=1, frames=25, dim=2048, decode_seconds=0.105)
    assert whole.h100_hours == pytest.approx(650_000 * 25 / 5000 / 3600)
    assert whole.core_hours == pytest.approx(650_000 * 0.105 / 3600)
    assert whole.size == 650_000 * 25 * 2048 * 2
    assert str(whole) == (
        "0.903 H100 hours (assumed: 5,000 frames/s), 19 CPU-core hours of decoding (so 21 cores feed one H100), 66.6 GB"
    )


def test_more_views_cost_the_backbone_and_the_disk_and_decoding_nothing():
    one, ten = (cost(1000, views=views, frames=25, dim=8, decode_seconds=0.1) for views in (1, 10))
    assert (ten.h100_hours, ten.size, ten.core_hours) == pytest.approx(
        (10 * one.h100_hours, 10 * one.size, one.core_hours)
    )
