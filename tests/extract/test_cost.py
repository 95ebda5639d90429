"""What an extraction costs elsewhere, by hand."""

from extract.workers.cost import cost


def test_kinetics_700_by_hand():
    assert cost(650_000, views=1, frames=25, dim=2048, decode_seconds=0.105) == (
        f"{650_000 * 25 / 5000 / 3600:.3g} H100 hours (assumed: 5,000 frames/s), {650_000 * 0.105 / 3600:.3g} CPU-core "
        f"hours of decoding (so 21 cores feed one H100), {650_000 * 25 * 2048 * 2 / 1e9:.3g} GB"
    )


def test_more_views_cost_the_backbone_and_the_disk_and_decoding_nothing():
    one, ten = (
        cost(100_000, views=views, frames=25, dim=8, decode_seconds=0.1) for views in (1, 10)
    )
    assert "0.139 H100 hours" in one
    assert "1.39 H100 hours" in ten
    assert "2.78 CPU-core hours" in one
    assert "2.78 CPU-core hours" in ten
    assert one.endswith(", 0.04 GB")
    assert ten.endswith(", 0.4 GB")
