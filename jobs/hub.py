"""The Hugging Face Hub: revisions, files and folders of its repositories, and each way to be refused as one line.

Where it is stands in HF_ENDPOINT, the token in HF_TOKEN or where ``hf auth login`` put it; neither is ever printed.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.digest import digest
from schemas.errors import WinnowError

#: Settings and vocabularies of a model of transformers, and its weights: no pickles, no code, no other library's copy.
SETTINGS = ("*.json", "*.txt", "*.model")
WEIGHTS = ("model.safetensors", "model-*.safetensors")


def revision(repo: str, lead: str) -> str:
    """16 hex digits of the commit that the repository is at; without a network, of the one in the cache."""
    from huggingface_hub import HfApi

    try:
        with refusals(lead):
            return str(HfApi(endpoint=endpoint()).model_info(repo).sha)[:16]
    except _Unreachable:
        if (commit := _cached(repo)) is None:
            raise
        return commit[:16]


def file(repo: str, name: str, lead: str) -> Path:
    """One file of the repository, downloaded unless it is in the cache."""
    from huggingface_hub import hf_hub_download

    with refusals(lead, name):
        return Path(hf_hub_download(repo, name, endpoint=endpoint()))


def folder(repo: str, patterns: tuple[str, ...], lead: str) -> Path:
    """The files of the repository that match, as a folder in the cache."""
    from huggingface_hub import snapshot_download

    with refusals(lead):
        return Path(snapshot_download(repo, allow_patterns=list(patterns), endpoint=endpoint()))


class _Unreachable(WinnowError):
    """No answer, so what the cache holds will do."""


@contextmanager
def refusals(lead: str, name: str = "", cure: str = "give a local folder") -> Iterator[None]:
    """Turn what the Hub's client raises into WinnowError("LEAD the Hub …; cure"), such as "model 'a/b': the Hub …".
    ``name``: the file asked for; ``cure``: what helps while the Hub does not answer."""
    try:
        with quiet():
            yield
    except WinnowError:
        raise
    except Exception as error:  # the client underneath has errors of its own, and has changed before
        raise _refusal(lead, name, error, cure) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log of others, such as a line for each of the client's attempts: what matters is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _refusal(lead: str, name: str, error: BaseException, cure: str) -> WinnowError:
    from huggingface_hub import errors, get_token

    chain = _chain(error)

    def is_a(kind: type[BaseException]) -> bool:
        return any(isinstance(link, kind) for link in chain)

    answers = [link.response for link in chain if getattr(link, "response", None) is not None]
    status = answers[0].status_code if answers else None
    if is_a(errors.GatedRepoError):
        return WinnowError(
            f"{lead} the Hub's repository is gated; accept its terms on its page, then log in with 'hf auth login'"
        )
    if status == 401 and get_token():  # a repository that is missing or private is a 404 to those who are logged in
        return WinnowError(f"{lead} the Hub refuses the token; log in again with 'hf auth login', or unset HF_TOKEN")
    if is_a(errors.RepositoryNotFoundError) or status == 401:
        return WinnowError(
            f"{lead} the Hub has no such repository, or it is private; check the name, or log in with 'hf auth login'"
        )
    if is_a(errors.RemoteEntryNotFoundError) or is_a(errors.RevisionNotFoundError):
        return WinnowError(f"{lead} the Hub's repository has no {name or 'such file'}; check the name")
    if status == 403:
        return WinnowError(f"{lead} the Hub forbids access; check what the token may read and write")
    if status in (400, 409, 412, 413, 422):
        said = hidden(" ".join(str(getattr(error, "server_message", None) or error).split()))[:200]
        return WinnowError(f"{lead} the Hub refuses what it was sent ({said}); {cure}")
    if status is not None:
        return _Unreachable(f"{lead} the Hub answers with status {status}; try again later, or {cure}")
    if is_a(errors.OfflineModeIsEnabled):
        return _Unreachable(f"{lead} the Hub is not asked (HF_HUB_OFFLINE) and the cache has it not; unset it")
    reason = hidden(" ".join(str(chain[-1] or error).split()) or type(error).__name__)[:200]
    return _Unreachable(f"{lead} the Hub cannot be reached ({reason}); {cure}")


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and what it was raised from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def hidden(text: str) -> str:
    """The text without any token in it."""
    from huggingface_hub import get_token

    token = get_token()
    return re.sub(r"\bhf_\w+", "…", text.replace(token, "…") if token else text)


def endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _cached(repo: str) -> str | None:
    """The commit of the repository that the cache holds as its newest."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / "main"
    return place.read_text().strip() if place.is_file() else None


@dataclass(frozen=True)
class Weights:
    """A checkpoint file: ``name`` in the Hub's ``repo``, or, where ``local`` is given, that file or a folder that
    holds it (or its twin in safetensors). ``what`` begins every message."""

    what: str
    local: str
    repo: str
    name: str

    @cached_property
    def revision(self) -> str:
        """Changes whenever the weights do: of a local file its digest, of the Hub's its commit."""
        return digest(self.path) if self.local else revision(self.repo, f"{self.what}:")

    @cached_property
    def path(self) -> Path:
        if not self.local:
            return file(self.repo, self.name, f"{self.what}:")
        place = Path(self.local).expanduser()
        twins = (place, place / self.name, (place / self.name).with_suffix(".safetensors"))
        for twin in twins:
            if twin.is_file():
                return twin
        raise WinnowError(f"{self.what}: no {self.name} at {place}; give the checkpoint's file or its folder")

    def tensors(self) -> dict[str, Any]:
        """Its tensors by name."""
        from jobs.checkpoint import tensors

        return tensors(self.path, self.what)
