"""Corrections of what a listing says of videos: labels, classes, splits and groups of rows that are
there already.

They do not depend on pixels, so nothing is decoded. A correction changes several files and must be
seen whole or not at all, also after kill -9 and a power cut:

    write `correction.json` -> rewrite the arrays -> rewrite the classes -> remove `correction.json`

From the moment that `correction.json` has its name, every reader takes the columns and classes in
it instead of those in the arrays. The next extraction completes what was interrupted.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from extract import InputError
from extract.store.layout import (
    ROW_ARRAYS,
    ROWS_PER_CHUNK,
    checksum,
    chunk_names,
    create_row_array,
    every_chunk,
    store_attributes,
)
from extract.store.objects import names_in, read_object, remove_object, write_object

NAME = "correction.json"


def read_correction(store: str) -> dict[str, Any]:
    """`classes`, and `columns` by name, of a correction that is under way; {} if there is none."""
    path = _path(store)
    content = read_object(path)
    if content is None:
        return {}
    try:
        record = json.loads(content)
        if record.pop("checksum") == checksum(record):
            return record
    except (ValueError, KeyError, AttributeError):
        pass
    raise InputError(f"{path} is damaged; copy the store again, or extract into another folder")


def correct(store: Any, classes: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
    """Replace the classes and whole columns (`labels`, `splits`, `groups`): seen whole or not at
    all.

    For a driver that holds the store's lock.
    """
    lists = {name: values.tolist() for name, values in columns.items()}
    record = {"classes": list(classes), "columns": lists}
    content = json.dumps(record | {"checksum": checksum(record)})
    write_object(_path(store.path), content.encode())
    store.correction = record
    complete_correction(store)


def complete_correction(store: Any) -> None:
    """Enter a correction that is under way into the arrays."""
    if not store.correction:
        return
    for name, values in store.correction["columns"].items():
        dtype = ROW_ARRAYS[name][0]
        new = np.array(values, object if dtype is str else dtype)
        every_chunk(store.array(name))[: len(new)] = new
        store.__dict__.pop(name, None)  # what was read before is out of date
    store.classes = tuple(store.correction["classes"])
    store.group.attrs.put(store_attributes(store.classes, store.provenance))
    remove_object(_path(store.path))
    store.correction = {}


def upgrade(store: Any) -> None:
    """Bring a store of an older version to this one's schema: the arrays and chunks that it lacks,
    then its name."""
    if not store.missing_columns:
        return
    for name in store.missing_columns:
        views, frames = store.num_views, store.frames_per_video
        create_row_array(store.group, name, len(store), views=views, frames=frames)
    for name in set(ROW_ARRAYS) - set(store.missing_columns):
        present = names_in(f"{store.path.rstrip('/')}/{name}")
        for number, chunk in enumerate(chunk_names(name, len(store))):
            if chunk not in present:  # older versions left out chunks of fill values
                rows = slice(number * ROWS_PER_CHUNK, (number + 1) * ROWS_PER_CHUNK)
                every_chunk(store.array(name))[rows] = ROW_ARRAYS[name][2]
    store.group.attrs.put(store_attributes(store.classes, store.provenance))
    store.missing_columns = ()


def _path(store: str) -> str:
    return f"{store.rstrip('/')}/{NAME}"
