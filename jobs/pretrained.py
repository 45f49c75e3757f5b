"""transformers models: from a local folder or a Hub id, safetensors alone, and complete or refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs import devices, hub
from jobs.checkpoint import refuse_gap
from jobs.digest import digest
from schemas.errors import WinnowError


class Pretrained:
    """``name``: a folder as ``save_pretrained`` writes it, or a Hub id. ``what`` begins every message. ``weights``:
    False where only a tokenizer or processor is wanted."""

    def __init__(self, what: str, name: str, weights: bool = True) -> None:
        self.what, self.name = what, name
        self.files = (*hub.SETTINGS, *hub.WEIGHTS) if weights else hub.SETTINGS
        self.local = Path(name).expanduser().is_dir()
        if not self.local and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise WinnowError(f"{what}: no such folder; give a model's folder or a Hub id 'org/name'")
        if self.local and weights and not (Path(name).expanduser() / "config.json").is_file():
            raise WinnowError(f"{what}: the folder has no config.json; give a folder that transformers wrote")
        self.revision = digest(Path(name).expanduser()) if self.local else hub.revision(name, f"{what}:")

    @cached_property
    def folder(self) -> Path:
        """Where the model lies, downloaded if need be."""
        if self.local:
            return Path(self.name).expanduser()
        return hub.folder(self.name, self.files, f"{self.what}:")

    def model(self, kind: Any) -> Any:
        """The model in float32, ready to be asked, as ``kind`` (such as AutoModel) loads it."""
        with self.errors():
            model, report = kind.from_pretrained(self.folder, output_loading_info=True, use_safetensors=True)
        refuse_gap(self.what, report["missing_keys"], len(model.state_dict()))
        return model.float().to(devices.device()).eval()

    def part(self, kind: Any) -> Any:
        """Its processor, tokenizer or image processor."""
        with self.errors():
            return kind.from_pretrained(self.folder)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What transformers raises, as one line; its own report of what fits and what does not stays unsaid."""
        from safetensors import SafetensorError
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise WinnowError(f"{self.what}: cannot be loaded ({reason}); check the folder or the Hub id") from error
        finally:
            logging.set_verbosity(before)


def pooled(output: Any) -> Tensor:
    """The feature itself [N, D]: transformers 4 returns it bare, 5 as part of an object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def too_long(tokenizer: Any, texts: list[str], limit: int) -> list[bool]:
    """Where a text has more than ``limit`` tokens, marks included: cut to ``limit``, it lost some."""
    ids = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    return [len(each) > limit for each in ids]
