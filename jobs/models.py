"""Models: from a name, a folder or a Hub id to a diffusers pipeline, and to the hash of what it is."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import devices, hub
from jobs.digest import digest
from schemas.errors import WinnowError

if TYPE_CHECKING:
    import torch

LORA = "base.json"  # in the folder of a LoRA, see jobs.lora

#: Names for ``model:`` in a recipe; anything else is a folder or a Hub id such as "org/name".
MODELS = {"embedded": Path(__file__).parent / "world" / "weights" / "pipeline"}


def locate(name: str) -> Path | str:
    """The folder of a model, or its Hub id; WinnowError where a folder is named that is neither a pipeline nor a
    LoRA that Winnow trained."""
    path = MODELS.get(name, Path(name).expanduser())
    if (path / "model_index.json").is_file() or (path / LORA).is_file():
        return path
    if path.exists():
        raise WinnowError(f"model {name}: the folder has no model_index.json; give a diffusers pipeline folder")
    if name in MODELS:
        raise WinnowError(f"model {name!r}: {path} is missing; build it with 'make base DATA=mnist_train.npz'")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WinnowError(
            f"model {name!r}: no such folder; give a diffusers pipeline folder, a Hub id 'org/name', "
            f"or one of {', '.join(MODELS)}"
        )
    return name


def revision(name: str) -> str:
    """16 hex digits of a folder's contents, or the commit of a Hub model: equal names, equal weights."""
    place = locate(name)
    if isinstance(place, Path):
        return digest(place)
    return hub.revision(place, f"model {name!r}: no such folder, and")


def layers(name: str) -> tuple[str, Path | None]:
    """A model as its pipeline and the folder of the LoRA on it, if there is one; WinnowError where that belongs to
    another revision of the pipeline than there is now."""
    place = locate(name)
    if not isinstance(place, Path) or not (place / LORA).is_file():
        return name, None
    from jobs.lora import base_of

    base = base_of(place)
    now = revision(base.model)
    if now != base.revision:
        raise WinnowError(
            f"model {name}: its LoRA was trained on revision {base.revision} of {base.model}, there is {now}; "
            "restore that revision"
        )
    return base.model, place


def load(name: str, dtype: torch.dtype | dict[str, torch.dtype] | None = None) -> Any:
    """The pipeline on the best device at hand, silent, its LoRA on it; ``dtype``: by default the device's own, or one
    for each part and for the "default"."""
    base, adapter = layers(name)
    pipe = _pipeline(base, dtype)
    if adapter:
        from jobs import lora

        lora.load(pipe, adapter)
    return pipe


def _left_out(place: Path | str) -> dict[str, None]:
    """Optional parts that a saved pipeline goes without: diffusers wants to be told so again for SD3's T5."""
    if not isinstance(place, Path):
        return {}
    index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        return {}
    return {name: None for name in ("text_encoder_3", "tokenizer_3") if not (index.get(name) or [None])[0]}


@contextmanager
def _gaps() -> Iterator[list[str]]:
    """The weights that transformers draws at random since the files lack them: it only says so in its log."""
    found: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            rows = (line.split("|") for line in record.getMessage().splitlines())
            found.extend(row[0].strip() for row in rows if len(row) > 1 and "MISSING" in row[1])

    ear, log = Ear(), logging.getLogger("transformers")
    log.addHandler(ear)
    try:
        yield found
    finally:
        log.removeHandler(ear)


def _pipeline(name: str, dtype: torch.dtype | dict[str, torch.dtype] | None) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import deprecation_utils
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    place = locate(name)
    # Newer diffusers warn about the old name of the argument, older ones do not know the new one.
    word = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
    try:
        with _gaps() as gaps:
            pipe = DiffusionPipeline.from_pretrained(place, **{word: dtype or devices.dtype()}, **_left_out(place))
        pipe = pipe.to(devices.device())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise WinnowError(f"model {name!r}: cannot be loaded ({reason}); check the folder or the Hub id") from error
    if gaps:
        more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
        raise WinnowError(f"model {name!r}: weights are missing: {', '.join(gaps[:3])}{more}; restore the model")
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it blanks pictures; what may be asked for is settled by the prompts
    return pipe
