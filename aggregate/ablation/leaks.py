"""Nearly identical videos on both sides of a fold; and the mean feature of each video."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from aggregate.ablation.folds import Fold
    from extract.store import FeatureStore

FALSE_ALARMS = 0.02  # the expected fraction of videos that get a pair by chance
PAIR_ALL = 65_536  # the largest number of rows of which all pairs are compared
ROWS_PER_READ = 256
PRINTED = 3  # number of pairs that the warning names


def mean_features(store: "FeatureStore", rows: "np.ndarray") -> "np.ndarray":
    """The mean of view 0 over the frames of each video, float32 [n, D], for `rows` int [n].

    Repeated frames of a short video count once. ROWS_PER_READ videos are in memory at a time.
    """
    import numpy as np

    from extract.cli import progress

    means = np.empty((len(rows), store.dim), np.float32)
    frames = np.arange(store.frames_per_video)
    for start in progress(range(0, len(rows), ROWS_PER_READ), unit="block", leave=False):
        part = slice(start, start + ROWS_PER_READ)
        mask = store.mask(rows[part], frames)
        weights = mask / mask.sum(axis=1, keepdims=True)
        features = store.gather(rows[part], frames).astype(np.float32)
        means[part] = np.einsum("btd,bt->bd", features, weights.astype(np.float32))
    return means


def describe_crossing_pairs(
    store: "FeatureStore", folds: "Sequence[Fold]", features: str | Sequence[str]
) -> str:
    """A warning about pairs of nearly identical videos, of which a fold tests one and trains on the
    other.

    Empty if there are none, and for stores of more than PAIR_ALL videos, because those take too
    long. `features` are the paths in the command that the warning recommends.
    """
    import numpy as np

    from aggregate.duplicates import near_duplicates
    from aggregate.metrics import independent_units
    from aggregate.scores import group_keys
    from extract.commands import command_line

    rows = np.unique(np.concatenate([part for fold in folds for part in (fold.test, fold.train)]))
    rows = rows[store.usable[rows]]
    if len(rows) > PAIR_ALL:
        return ""
    units = independent_units(group_keys(store.ids[rows], store.groups[rows]))
    try:
        pairs = near_duplicates(mean_features(store, rows), units, false_alarms=FALSE_ALARMS)
    except (ArithmeticError, ValueError, MemoryError) as error:  # NaN features, for example
        return f"near-duplicates across folds were not searched: {error}"
    first, second = rows[pairs.rows].T
    crossing = np.zeros(len(pairs), bool)
    for fold in folds:
        crossing |= np.isin(first, fold.test) & np.isin(second, fold.train)
        crossing |= np.isin(second, fold.test) & np.isin(first, fold.train)
    if not crossing.any():
        return ""
    examples = [
        f"{store.ids[a]} | {store.ids[b]}"
        for a, b in zip(first[crossing], second[crossing], strict=True)
    ]
    return (
        f"warning: {len(examples):,} pairs of nearly identical videos cross the folds (about "
        f"{FALSE_ALARMS / 2 * len(rows):.0f} would by chance), so results may be too good; the "
        f"closest: {', '.join(examples[:PRINTED])}. Look at them: "
        + command_line("aggregate.audit", features=features)
    )
