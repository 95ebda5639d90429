"""Videos -> frozen-backbone features on disk (`python -m extract`)."""

import os
import sys
from typing import Any

from extract.errors import InputError, RunError

__all__ = ["InputError", "Record", "RunError", "StrPath"]

# Names and plain values, as in JSON: a row of a table, options, results, provenance.
Record = dict[str, Any]
StrPath = str | os.PathLike[str]

if sys.argv[:1] == ["-m"]:  # `python -m` is importing a package of ours to find the module to run
    from extract.commands import refuse_other_modules

    refuse_other_modules()
