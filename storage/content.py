"""What a file or a folder holds, as a hash: equal ones hold the same bytes."""

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """The 64 hex digits of a file's SHA-256; OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(path: Path) -> str:
    """16 hex digits of a file's content, or of all that a folder holds."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        total.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return total.hexdigest()[:16]
