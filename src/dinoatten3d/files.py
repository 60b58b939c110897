"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Give the SHA-256 of a file's bytes in hexadecimal; of a folder (a DICOM series), that of all its files'."""
    if path.is_dir():  # names count too: they order the slices where nothing else does
        files = sorted(found for found in path.rglob("*") if found.is_file())
        return hashlib.sha256("".join(f"{f.relative_to(path)}\0{sha256(f)}\n" for f in files).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """Give the first 12 hexadecimal digits of the SHA-256 of JSON-able parts, independent of key order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; NaN becomes null, so that any reader takes it."""
    write_text(path, json.dumps(_without_nan(content), indent=1) + "\n")


@contextmanager
def whole_folder(folder: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `folder` that takes its place when the block ends without an error.

    Everything in it has reached the disk before it does. With `keep_existing`, one that another process finished
    meanwhile stays (for caches, whose content is the same).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("r+b") as stream:
                    os.fsync(stream.fileno())
        temporary.chmod(0o755)
        try:
            temporary.replace(folder)
        except OSError:
            if not folder.is_dir():
                raise
            if not keep_existing:
                told = "another process made this folder meanwhile; it was left as it is, choose another place"
                raise FileExistsError(errno.EEXIST, told, str(folder)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
