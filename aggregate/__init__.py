"""Features (or frames) -> checkpoints -> scores (`python -m aggregate.train`)."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
# `python -m` searches the working folder first: a user's own extract.py there is not our package.
if any(
    (spec := find_spec(name)) is None or spec.origin != str(ROOT / name / "__init__.py")
    for name in ("extract",)
):
    sys.path.insert(0, str(ROOT))
if sys.argv[:1] == ["-m"]:
    from extract.commands import refuse_other_modules

    refuse_other_modules()
