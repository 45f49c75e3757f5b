"""Models: from a name, a folder or a Hub id to a diffusers pipeline, and to the hash of what it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jobs import devices, hub
from jobs.digest import digest
from schemas.errors import WinnowError

#: Names for ``model:`` in a recipe; anything else is a folder or a Hub id such as "org/name".
MODELS = {"embedded": Path(__file__).parent / "world" / "weights" / "pipeline"}


def locate(name: str) -> Path | str:
    """The folder of a model, or its Hub id; WinnowError where a folder is named that is no pipeline."""
    path = MODELS.get(name, Path(name).expanduser())
    if (path / "model_index.json").is_file():
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


def load(name: str) -> Any:
    """The pipeline on the best device at hand, silent, in float32 on a CPU and bfloat16 on a GPU."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import deprecation_utils, logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    place = locate(name)
    # Newer diffusers warn about the old name of the argument, older ones do not know the new one.
    word = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
    try:
        pipe = DiffusionPipeline.from_pretrained(place, **{word: devices.dtype()})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise WinnowError(f"model {name!r}: cannot be loaded ({reason}); check the folder or the Hub id") from error
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it blanks pictures; what may be asked for is settled by the prompts
    return pipe.to(devices.device())
