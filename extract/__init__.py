"""Videos -> frozen-backbone features on disk (`python -m extract`)."""

import sys

from extract.errors import InputError, RunError

__all__ = ["InputError", "RunError"]

if sys.argv[:1] == ["-m"]:
    from extract.commands import refuse_other_modules

    refuse_other_modules()
