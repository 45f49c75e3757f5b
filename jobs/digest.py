"""What a file or folder is, by its content."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


@lru_cache
def digest(path: Path) -> str:
    """16 hex digits of a file's content, or of all that a folder holds."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        with open(file, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(path).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]
