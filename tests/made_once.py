"""Keeps under .cache what takes long to make: made by one test process, once for what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import fcntl
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def made_once(kind: str, parts: Iterable[bytes], suffix: str, make: Callable[[Path], None]) -> Path:
    """Returns the file that `make` writes, whole; from the cache if nothing that it is made of has changed.

    Args:
        kind: folder of .cache.
        parts: what it is made of.
        suffix: of the file.
        make: writes the file at the path that it is given.
    """
    key = hashlib.sha256()
    for part in parts:
        key.update(hashlib.sha256(part).digest())
    folder = ROOT / ".cache" / kind
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key.hexdigest()[:24]}{suffix}"
    # Of several processes one makes it; the others wait for it.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            make(partial)
            partial.rename(path)
    return path
