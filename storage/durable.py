"""Files that are there entirely or not at all, also after a power cut: staging, fsync, create-only link.

No library that Winnow writes with calls fsync, and a rename before the data is on disk leaves an empty file.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import WinnowError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sync(path: Path) -> None:
    """Flush one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folders(root: Path, path: Path) -> None:
    """Flush the folders from that of `path` up to `root`: a new name lasts once its folder is flushed."""
    folder = path.parent
    while folder != root and root in folder.parents:
        sync(folder)
        folder = folder.parent
    sync(root)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself last."""
    for here, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(here) / name)
        sync(Path(here))


@contextmanager
def staged(root: Path, name: str) -> Iterator[Path]:
    """A path in staging/ that no other writer has; what is left there at the end is removed."""
    draft = root / "staging" / f"{os.getpid()}-{uuid.uuid4().hex[:12]}-{Path(name).name}"
    draft.parent.mkdir(exist_ok=True)
    try:
        yield draft
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def publish(root: Path, draft: Path, relative: str) -> bool:
    """Give the file `draft` its final name unless that is taken. True: ours; False: another was first."""
    final = root / relative
    final.parent.mkdir(parents=True, exist_ok=True)
    sync(draft)
    try:
        os.link(draft, final)
    except FileExistsError:
        return False
    sync_folders(root, final)
    return True


@contextmanager
def storage_errors(root: Path, path: Path | str, full_only: bool = False) -> Iterator[None]:
    """Turn an OSError (with `full_only`: of a full disk) into one line: path, space left, cure."""
    try:
        yield
    except Exception as error:
        full = _is_full(error)
        if not full and (full_only or not isinstance(error, OSError)):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        cure = "check that the folder exists, may be written, and that its file system has hard links"
        if full:
            cure = "free space (or raise the file-size limit or quota) and run again"
        raise WinnowError(f"{path}: {reason}{_left(root)}; {cure}; everything committed is safe") from error


def _is_full(error: BaseException | None) -> bool:
    """Whether the disk is full. Writers in other languages say it in words only (safetensors), or say nothing and
    have the OSError as what they were raised from (torch)."""
    while error is not None:
        number = getattr(error, "errno", None)
        found = re.search(r"\(os error (\d+)\)", str(error))
        if number in _FULL or (found and int(found[1]) in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _left(root: Path) -> str:
    try:
        return f", {shutil.disk_usage(root).free / 2**20:,.0f} MiB left"
    except OSError:
        return ""
