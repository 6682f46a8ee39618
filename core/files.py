"""Writing files so that nothing half-written is ever seen under its final name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` if the block succeeds, remove it if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # temporary files are private; this one is as open as any other
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replaceable(folder: Path, marker: str) -> bool:
    """Whether a folder may be written here: here is nothing, an empty folder, or one that holds the file `marker`."""
    if not folder.exists() or (folder / marker).is_file():
        return True
    return folder.is_dir() and not any(folder.iterdir())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; put it in `path`'s place if the block succeeds.

    An existing folder is moved aside first and comes back if the last rename fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for path_inside in temporary.rglob("*"):
            path_inside.chmod((0o777 if path_inside.is_dir() else 0o666) & ~_umask())
        old = temporary.with_suffix(".old")
        if path.exists():
            path.replace(old)
        try:
            temporary.replace(path)
        except BaseException:
            if old.exists():
                old.replace(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
