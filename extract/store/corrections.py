"""Corrections of the labels, classes, splits and groups of rows that are in a store already.

They do not depend on pixels, so nothing is decoded. A correction changes several files, but readers
must see all of it or nothing, also after kill -9 and a power cut:

    write `correction.json` -> rewrite the arrays -> rewrite the classes -> remove `correction.json`

While `correction.json` exists, every reader takes its columns and classes instead of those in the
arrays. The next extraction completes an interrupted correction.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from extract import InputError
from extract.store.layout import (
    ROW_ARRAYS,
    ROWS_PER_CHUNK,
    as_column,
    checksum,
    chunk_names,
    create_row_array,
    every_chunk,
    store_attributes,
)
from extract.store.objects import names_in, read_object, remove_object, write_object

NAME = "correction.json"


def read_correction(store: str) -> dict[str, Any]:
    """`classes` and `columns` (by name) of an unfinished correction; {} if there is none."""
    path = _path(store)
    content = read_object(path)
    if content is None:
        return {}
    with contextlib.suppress(ValueError, KeyError, AttributeError):
        record = json.loads(content)
        if record.pop("checksum") == checksum(record):
            return record
    raise InputError(f"{path} is damaged; copy the store again, or extract into another folder")


def correct(store: Any, classes: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
    """Replace the classes and whole columns (`labels`, `splits`, `groups`) in one atomic step.

    The caller must hold the store's lock.
    """
    lists = {name: values.tolist() for name, values in columns.items()}
    record = {"classes": list(classes), "columns": lists}
    content = json.dumps(record | {"checksum": checksum(record)})
    write_object(_path(store.path), content.encode())
    store.correction = record
    complete_correction(store)


def complete_correction(store: Any) -> None:
    """Write an unfinished correction into the arrays."""
    if not store.correction:
        return
    for name, values in store.correction["columns"].items():
        every_chunk(store.array(name))[: len(values)] = as_column(name, values)
        store.__dict__.pop(name, None)  # the cached column
    store.classes = tuple(store.correction["classes"])
    store.group.attrs.put(store_attributes(store.classes, store.provenance))
    remove_object(_path(store.path))
    store.correction = {}


def upgrade(store: Any) -> None:
    """Bring an older store to the current schema: write its missing arrays and chunks, then the
    schema's name."""
    if not store.missing_columns:
        return
    views, frames, _ = store.video_shape
    for name in store.missing_columns:
        create_row_array(store.group, name, len(store), views=views, frames=frames)
    for name in set(ROW_ARRAYS) - set(store.missing_columns):
        present = names_in(f"{store.path.rstrip('/')}/{name}")
        for number, chunk in enumerate(chunk_names(name, len(store))):
            if chunk not in present:  # older versions did not write chunks of fill values
                rows = slice(number * ROWS_PER_CHUNK, (number + 1) * ROWS_PER_CHUNK)
                every_chunk(store.array(name))[rows] = ROW_ARRAYS[name][2]
    store.group.attrs.put(store_attributes(store.classes, store.provenance))
    store.missing_columns = ()


def _path(store: str) -> str:
    return f"{store.rstrip('/')}/{NAME}"
