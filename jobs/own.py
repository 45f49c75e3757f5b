"""Images that somebody else made, taken in as a round's candidates: a folder, Parquet files, or a Hub dataset.

A folder holds images and a ``metadata.jsonl`` (or .csv) of ``file_name`` and the caption, as Hugging Face's
"imagefolder" has it; Parquet files and Hub datasets have an image and a caption column. Files stay as they are.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from curate.wording import normalise
from jobs.images import decode
from jobs.progress import say
from jobs.prompts import chosen
from jobs.run import Run
from jobs.stage import Work, complete, units
from schemas.errors import WinnowError
from schemas.ids import sample_id
from schemas.tables import TABLES

if TYPE_CHECKING:
    from jobs.generate import Generate

IMAGE_COLUMN = "image"
HUB = "hub:"


def opened(source: str, column: str) -> Any:
    """The source as a dataset of two columns, ``image`` (a file's bytes or path, not decoded) and ``column``."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        if source.startswith(HUB):
            found = load_dataset(source.removeprefix(HUB), split="train")
        else:
            path = Path(source).expanduser()
            parquet = [str(path)] if path.is_file() else sorted(map(str, path.rglob("*.parquet")))
            if parquet and all(name.endswith(".parquet") for name in parquet):
                found = load_dataset("parquet", data_files=parquet, split="train")
            elif path.is_dir():
                found = load_dataset("imagefolder", data_dir=str(path), split="train")
            else:
                raise FileNotFoundError("no such file or folder")
    except Exception as error:  # datasets and the Hub's client have many of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise WinnowError(
            f"generate.source {source!r}: cannot be read ({reason}); give a folder of images with a metadata.jsonl, "
            "Parquet files, or hub:org/name"
        ) from error
    for name in (IMAGE_COLUMN, column):
        if name not in found.column_names:
            have = ", ".join(found.column_names)
            raise WinnowError(
                f"generate.source {source!r}: no column {name!r}, it has {have}; set generate.column to the captions', "
                "or give a folder's captions in its metadata.jsonl"
            )
    if getattr(found.features[column], "dtype", None) != "string":
        raise WinnowError(f"generate.source {source!r}: column {column!r} holds no text; set generate.column")
    found = found.select_columns([IMAGE_COLUMN, column])
    try:
        return found.cast_column(IMAGE_COLUMN, ImageFeature(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise WinnowError(f"generate.source {source!r}: column {IMAGE_COLUMN!r} holds no images ({error})") from error


def _file(images: Any, place: int, source: str) -> bytes:
    image = images[place][IMAGE_COLUMN]
    try:
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    except (OSError, TypeError) as error:
        raise WinnowError(f"generate.source {source!r}: row {place} has no image ({error}); remove it") from error


def take_in(run: Run, settings: Generate) -> bool:
    """The images of this round's prompts become its samples. Returns whether all of them are there."""
    assert settings.source is not None
    images = opened(settings.source, settings.column)
    texts = chosen(run, "train", settings.prompts)
    numbers = dict(zip(texts["text"].to_pylist(), texts["prompt_id"].to_pylist(), strict=True))
    rows: dict[int, dict[str, Any]] = {}  # by id: an image that comes twice is taken once
    for place, text in enumerate(images[settings.column]):
        text = normalise(text or "")  # as the prompts stage has it
        if text in numbers:
            content = hashlib.sha256(_file(images, place, settings.source)).hexdigest()
            number = sample_id(["own", content, numbers[text], run.round, run.arm])
            rows.setdefault(
                number, {"sample_id": number, "prompt_id": numbers[text], "prompt": text, "seed": 0, "place": place}
            )
    if not rows:
        raise WinnowError(
            f"generate.source {settings.source!r}: no image has one of the {len(numbers)} prompts of this round as its "
            f"{settings.column!r}; give its captions as prompts.source"
        )
    table = pa.Table.from_pylist(list(rows.values()))
    say(f"take in: {len(rows)} of {len(images)} images have a prompt of round {run.round} as their caption")
    folders = {"round": run.round, "arm": run.arm, "split": "train"}
    work = units("samples", folders, table, settings.batch, ["own", settings.source, run.round, run.arm])
    return complete(run, "take in", "samples", work, lambda: _work(run, settings.source or "", images))


def _work(run: Run, source: str, images: Any) -> Work:
    name = f"own:{source.removeprefix(HUB) if source.startswith(HUB) else Path(source).name}"

    def work(rows: pa.Table) -> pa.Table:
        done = []
        for row in rows.to_pylist():
            place = row.pop("place")
            file = _file(images, place, source)
            decode(file, f"generate.source {source!r} image {place}")
            with Image.open(io.BytesIO(file)) as image:
                width, height, kind = image.width, image.height, (image.format or "bin").lower()
            stored = {"bytes": file, "path": f"{row['sample_id']}.{kind}"}
            done.append(row | {"round": run.round, "arm": run.arm, "split": "train", "model": name, "width": width,
                               "height": height, "attempt": 0, "image": stored})  # fmt: skip
        return pa.Table.from_pylist(done, schema=TABLES["samples"].schema)

    return work
