"""Videos -> frozen-backbone features on disk (`python -m extract`)."""

import os
import sys

from extract.errors import InputError, RunError

__all__ = ["InputError", "RunError", "StrPath"]

StrPath = str | os.PathLike[str]

if sys.argv[:1] == ["-m"]:  # `python -m` is importing a package of ours to find the module to run
    from extract.commands import refuse_other_modules

    refuse_other_modules()
