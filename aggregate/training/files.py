"""Files of a run or an ablation: tables as CSV, and files that appear whole or not at all."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def csv_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A table with a heading; a row may lack columns, which stay empty."""
    columns: dict[str, None] = {}
    for row in sorted(rows, key=len, reverse=True):
        columns |= dict.fromkeys(row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
