"""Small files of a store that Zarr does not know, on a disk or on object storage."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from extract import InputError, RunError
from extract.durable import os_errors_as_run_error, replace_file, sync
from extract.store.layout import is_remote

# Their errors are not OSError; everything else that storage raises is.
_NETWORK_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "requests"}


def is_network_error(error: BaseException) -> bool:
    """Whether a library for object storage raised it: no network, no bucket, no permission."""
    return type(error).__module__.partition(".")[0] in _NETWORK_LIBRARIES


@contextmanager
def network_errors_named(url: str | Path) -> Iterator[None]:
    """Errors of the libraries for object storage come out as one sentence with the URL."""
    try:
        yield
    except ImportError as error:
        if not is_remote(url):
            raise
        raise InputError(f"{url}: {error}") from None
    except Exception as error:
        if not is_network_error(error):
            raise
        raise RunError(
            f"{url} cannot be reached ({type(error).__name__}: {error!s:.200}); "
            "check network, address and credentials, and run the same command again"
        ) from None


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    import fsspec

    with network_errors_named(url):
        return fsspec.core.url_to_fs(url)


def read_object(path: str) -> bytes | None:
    """The content of a file or an object; None if there is none."""
    try:
        if not is_remote(path):
            return Path(path).read_bytes()
        system, name = file_system(path)
        with network_errors_named(path):
            return system.cat_file(name)
    except FileNotFoundError:
        return None


def write_object(path: str, content: bytes) -> None:
    """Write a file or an object, which appears whole or not at all. Raises RunError."""
    if is_remote(path):
        system, name = file_system(path)
        with network_errors_named(path):
            system.pipe_file(name, content)
    else:
        replace_file(path, content)


def remove_object(path: str) -> None:
    """Remove a file or an object; one that does not exist is not an error."""
    if is_remote(path):
        system, name = file_system(path)
        with network_errors_named(path):
            if system.exists(name):
                system.rm_file(name)
    elif os.path.lexists(path):
        with os_errors_as_run_error(path):
            os.unlink(path)
            sync(os.path.dirname(path))


def names_in(path: str) -> set[str]:
    """The names directly in a folder, or below a prefix; an empty set if there is none."""
    try:
        if not is_remote(path):
            return set(os.listdir(path))
        system, name = file_system(path)
        with network_errors_named(path):
            system.invalidate_cache()
            return {entry.rpartition("/")[2] for entry in system.ls(name, detail=False)}
    except FileNotFoundError:
        return set()
