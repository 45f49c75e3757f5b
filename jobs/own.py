"""Images that somebody else made, taken in as a round's candidates or as D_0: a folder, Parquet files, a Hub dataset.

A folder holds images and a ``metadata.jsonl`` (or .csv) of ``file_name`` and the caption, as Hugging Face's
"imagefolder" has it; Parquet files and Hub datasets have an image and a caption column. Files stay as they are.
"embedded" names real scenes of the embedded world.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from curate.groups import codes, ranks
from curate.wording import normalise
from jobs.images import decode
from jobs.progress import say
from jobs.prompts import chosen
from jobs.run import Run
from jobs.stage import Work, complete, units
from jobs.world import WEIGHTS
from schemas.errors import WinnowError
from schemas.ids import sample_id
from schemas.tables import TABLES

if TYPE_CHECKING:
    from jobs.evaluate import Reference
    from jobs.generate import Generate, Split

IMAGE_COLUMN = "image"
HUB = "hub:"


def opened(source: str, column: str, key: str) -> Any:
    """The source as a dataset of two columns, ``image`` (a file's bytes or path, not decoded) and ``column``; ``key``:
    the recipe's table that names them."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        if source == "embedded":
            found = load_dataset("parquet", data_files=str(WEIGHTS / "scenes.parquet"), split="train")
        elif source.startswith(HUB):
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
            f"{key}.source {source!r}: cannot be read ({reason}); give a folder of images with a metadata.jsonl, "
            "Parquet files, or hub:org/name"
        ) from error
    for name in (IMAGE_COLUMN, column):
        if name not in found.column_names:
            have = ", ".join(found.column_names)
            raise WinnowError(
                f"{key}.source {source!r}: no column {name!r}, it has {have}; set {key}.column to the captions', "
                "or give a folder's captions in its metadata.jsonl"
            )
    if getattr(found.features[column], "dtype", None) != "string":
        raise WinnowError(f"{key}.source {source!r}: column {column!r} holds no text; set {key}.column")
    found = found.select_columns([IMAGE_COLUMN, column])
    try:
        return found.cast_column(IMAGE_COLUMN, ImageFeature(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise WinnowError(f"{key}.source {source!r}: column {IMAGE_COLUMN!r} holds no images ({error})") from error


def _file(images: Any, place: int, named: str) -> bytes:
    image = images[place][IMAGE_COLUMN]
    try:
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    except (OSError, TypeError) as error:
        raise WinnowError(f"{named}: row {place} has no image ({error}); remove it") from error


def take_in(run: Run, split: Split, settings: Generate | Reference, most: int | None) -> bool:
    """The images of this split's prompts become its samples, no more than ``most`` of each (None: all of them). Returns
    whether all of them are there."""
    source, key = settings.source, "reference" if split == "reference" else "generate"
    assert source is not None
    named = f"{key}.source {source!r}"
    images = opened(source, settings.column, key)
    texts = chosen(run, "train", settings.prompts)
    numbers = dict(zip(texts["text"].to_pylist(), texts["prompt_id"].to_pylist(), strict=True))
    rows: dict[int, dict[str, Any]] = {}  # by id: an image that comes twice is taken once
    for place, text in enumerate(images[settings.column]):
        text = normalise(text or "")  # as the prompts stage has it
        if text in numbers:
            content = hashlib.sha256(_file(images, place, named)).hexdigest()
            number, in_d0 = (sample_id(["own", content, numbers[text], of.round, of.arm]) for of in (run, run.base()))
            row = {"sample_id": number, "prompt_id": numbers[text], "prompt": text, "seed": 0, "place": place}
            rows.setdefault(number, row | {"order": in_d0})
    if not rows:
        raise WinnowError(
            f"{named}: no image has one of the {len(numbers)} prompts of this round as its "
            f"{settings.column!r}; give its captions as prompts.source"
        )
    say(f"take in: {len(rows)} of {len(images)} images have a prompt of round {run.round} as their caption")
    table = pa.Table.from_pylist(list(rows.values()))
    if most is not None:  # those of the lowest hashes, which prefer none; in every round those that D_0 has
        place = ranks(codes(table["prompt_id"].to_numpy()), table["order"].to_numpy())
        table = table.filter(pa.array(place <= most))
    table = table.drop_columns("order")
    folders = {"round": run.round, "arm": run.arm, "split": split}
    work = units("samples", folders, table, run.recipe.generate.batch, ["own", source, run.round, run.arm])
    return complete(run, f"take in {split}", "samples", work, lambda: _work(run, split, source, named, images))


def _work(run: Run, split: Split, source: str, named: str, images: Any) -> Work:
    name = f"own:{source.removeprefix(HUB) if source.startswith(HUB) else Path(source).name}"

    def work(rows: pa.Table) -> pa.Table:
        done = []
        for row in rows.to_pylist():
            place = row.pop("place")
            file = _file(images, place, named)
            width, height = decode(file, f"{named} image {place}").size
            with Image.open(io.BytesIO(file)) as image:
                kind = (image.format or "bin").lower()
            stored = {"bytes": file, "path": f"{row['sample_id']}.{kind}"}
            done.append(row | {"round": run.round, "arm": run.arm, "split": split, "model": name, "width": width,
                               "height": height, "attempt": 0, "image": stored})  # fmt: skip
        return pa.Table.from_pylist(done, schema=TABLES["samples"].schema)

    return work
