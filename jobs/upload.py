"""A set of files as a repository of the Hub, or as a folder: entirely, or not to be seen.

On the Hub they go to a branch of their own first, some at a time, so that an upload that was stopped goes on where it
was. Once each is there with the right hash, one commit brings all of them onto ``main``, and a tag marks it: whoever
reads ``main`` or a tag finds the files of before or all of the new ones.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.hub import endpoint, refusals
from jobs.progress import bar
from schemas.errors import WinnowError
from storage.content import sha256_of
from storage.durable import storage_errors

SUMS = "SHA256SUMS"  # as ``sha256sum --check`` reads it
UPLOAD = "winnow-upload-"  # and a digest: the branch that files come to first
HUBS_OWN = {".gitattributes", "README.md"}  # in a repository that is new, or that somebody has only begun to describe
BATCH_BYTES, BATCH_FILES = 2**30, 100  # in a commit on the branch: what is uploaded again where it breaks off


@dataclass(frozen=True)
class Item:
    """A file of a publication: its ``path`` there, its content or where that lies, its size and its SHA-256."""

    path: str
    content: bytes | Path
    bytes: int
    sha256: str

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def item(path: str, content: bytes | Path, sha256: str | None = None) -> Item:
    """``content`` at ``path``; the SHA-256 of a file is taken at its word where it is given, and checked on arrival.
    WinnowError where the file is missing."""
    if isinstance(content, bytes):
        return Item(path, content, len(content), hashlib.sha256(content).hexdigest())
    if not content.is_file():
        raise WinnowError(f"{content}: is missing; 'winnow verify' names the cure")
    return Item(path, content, content.stat().st_size, sha256 or sha256_of(content))


def summed(items: Sequence[Item]) -> list[Item]:
    """The items in the order of their paths, and the list of their SHA-256."""
    ordered = sorted(items, key=lambda one: one.path)
    return [*ordered, item(SUMS, "".join(f"{one.sha256}  {one.path}\n" for one in ordered).encode())]


def to_folder(items: Sequence[Item], folder: Path) -> None:
    """Write the items into ``folder``, all or nothing; WinnowError where it holds something, or a file is not as it
    should be."""
    folder = folder.resolve()  # "." has no name, and a link is no folder to be replaced
    with (
        storage_errors(folder.parent, folder), _beside(folder) as draft, bar("publish (dry run)", len(items)) as advance
    ):  # fmt: skip
        for one in items:
            place = draft / one.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(one.content, Path):
                shutil.copyfile(one.content, place)
            else:
                place.write_bytes(one.content)
            _check(one, sha256_of(place))
            advance()


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder that takes the place of ``folder``, which holds nothing yet, once the block has filled it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WinnowError(f"{folder}: exists and is not empty; give another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as staging:
        draft = Path(staging) / folder.name
        draft.mkdir()
        yield draft
        os.replace(draft, folder)


def to_hub(items: Sequence[Item], repo: str, kind: str, private: bool, tag: str | None = None) -> tuple[str, str]:
    """Make ``main`` of the repository (``kind``: "dataset" or "model") hold the items, and tag it (by default by their
    content). Only what is not there yet is uploaded; what an earlier publication held and this one does not is removed,
    and files of others stay. Returns (commit, tag).

    Raises WinnowError where the Hub refuses, the repository is open to all although ``private``, it holds files that
    were not published from here, the tag names something else, or a file is not as it should be.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    lead = f"{kind} {repo}:"
    if not get_token():
        raise WinnowError(f"{lead} there is no token of the Hub; log in with 'hf auth login', or set HF_TOKEN")
    disable_progress_bars()
    with refusals(lead, cure="run the same command again, it goes on from there"):
        return _Upload(HfApi(endpoint=endpoint()), repo, kind).run(items, private, tag)


@dataclass(frozen=True)
class _Upload:
    api: Any
    repo: str
    kind: str

    def run(self, items: Sequence[Item], private: bool, tag: str | None) -> tuple[str, str]:
        there = {"repo_id": self.repo, "repo_type": self.kind}
        self.api.create_repo(**there, private=private, exist_ok=True)
        info = self.api.repo_info(**there)
        if private and info.private is False:
            raise WinnowError(f"{self.kind} {self.repo}: is open to all; publish with --public, or under another name")
        if not private and info.private:
            raise WinnowError(
                f"{self.kind} {self.repo}: is private, and stays so; open it on its page first, or publish without "
                "--public"
            )
        wanted = {one.path: one for one in items}
        content = wanted[SUMS].sha256[:12]
        tag, branch = tag or f"winnow-{content}", f"{UPLOAD}{content}"
        refs = self.api.list_repo_refs(**there)
        tagged = {ref.name: ref.target_commit for ref in refs.tags}
        if tag in tagged and self._changed(items, self._tree(tagged[tag])):
            raise WinnowError(f"{self.kind} {self.repo}: the tag {tag} names other files; give another --tag")

        tree = self._tree(info.sha)
        changed, stale = self._changed(items, tree), sorted(self._published(tree, info.sha) - wanted.keys())
        commit = info.sha
        if changed or stale:
            self._stage(changed, branch, info.sha)
            commit = self._move(changed, stale, branch, info.sha)
        if wrong := self._changed(items, self._tree(commit)):
            raise WinnowError(f"{self.kind} {self.repo}: {wrong[0].path} did not arrive as it is here; publish again")
        if tag not in tagged:
            self.api.create_tag(**there, tag=tag, revision=commit, exist_ok=True)
        # Those of uploads that were stopped, too: what was corrected since would stay to be read there.
        left = {ref.name for ref in refs.branches if ref.name.startswith(UPLOAD)}
        for name in sorted(left | ({branch} if changed or stale else set())):
            self.api.delete_branch(**there, branch=name)
        return commit, tag

    def _tree(self, revision: str) -> dict[str, Any]:
        found = self.api.list_repo_tree(self.repo, repo_type=self.kind, revision=revision, recursive=True)
        return {entry.path: entry for entry in found if hasattr(entry, "blob_id")}

    def _changed(self, items: Sequence[Item], tree: Mapping[str, Any]) -> list[Item]:
        return [one for one in items if not _same(one, tree.get(one.path))]

    def _published(self, tree: Mapping[str, Any], revision: str) -> set[str]:
        """What an earlier publication put into the tree."""
        if SUMS in tree:
            sums = Path(self.api.hf_hub_download(self.repo, SUMS, repo_type=self.kind, revision=revision))
            listed = {line[66:] for line in sums.read_text(encoding="utf-8").splitlines() if line[64:66] == "  "}
            if {"README.md", "recipe.yaml"} <= listed:
                return listed & tree.keys()
        if others := sorted(tree.keys() - HUBS_OWN):
            raise WinnowError(
                f"{self.kind} {self.repo}: holds {others[0]}, which was not published from here; give another name, or "
                "empty the repository"
            )
        return set()

    def _stage(self, changed: Sequence[Item], branch: str, start: str) -> None:
        """Bring what changed onto the branch, and look whether it arrived."""
        from huggingface_hub import CommitOperationAdd

        there = {"repo_id": self.repo, "repo_type": self.kind}
        self.api.create_branch(**there, branch=branch, revision=start, exist_ok=True)
        missing = self._changed(changed, self._tree(branch))
        with bar(f"publish {self.repo}", len(missing)) as advance:
            for some in _batches(missing):
                added = [CommitOperationAdd(one.path, one.content) for one in some]
                self.api.create_commit(**there, operations=added, commit_message="Upload", revision=branch)
                advance(len(some))
        tree = self._tree(branch)
        for one in changed:
            entry = tree.get(one.path)
            if not _same(one, entry):
                _check(one, entry.lfs.sha256 if entry and entry.lfs else hashlib.sha256(one.read()).hexdigest())
                raise WinnowError(f"{self.kind} {self.repo}: {one.path} did not arrive as it is here; publish again")

    def _move(self, changed: Sequence[Item], stale: Sequence[str], branch: str, head: str) -> str:
        """One commit that brings the branch's files onto ``main``, where that is still at ``head``."""
        from huggingface_hub import CommitOperationCopy, CommitOperationDelete

        copies = [CommitOperationCopy(one.path, one.path, src_revision=branch) for one in changed]
        gone = [CommitOperationDelete(path) for path in stale]
        done = self.api.create_commit(
            self.repo, repo_type=self.kind, operations=[*copies, *gone], commit_message="Publish with Winnow",
            parent_commit=head,
        )  # fmt: skip
        return str(done.oid)


def _same(one: Item, entry: Any) -> bool:
    """Whether a file of the Hub has the item's content; small ones are known there by the hash that git has."""
    if entry is None or entry.size != one.bytes:
        return False
    if entry.lfs:
        return bool(entry.lfs.sha256 == one.sha256)
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % one.bytes + one.read()).hexdigest())


def _check(one: Item, came: str) -> None:
    if came != one.sha256:
        raise WinnowError(
            f"{one.path}: its SHA-256 is {came[:12]}…, should be {one.sha256[:12]}…; 'winnow verify' names the cure"
        )


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for one in items:
        if batch and (len(batch) == BATCH_FILES or sum(b.bytes for b in batch) + one.bytes > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
