"""The card of a dataset or a model on the Hub: its metadata, and how it was made and measured, from the store."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from curate.weigh import effective_sample_size
from jobs import models
from jobs.images import decode
from jobs.metrics import HEADLINES, half_width, name_of, shown
from jobs.questions import Publish
from jobs.recipe import Recipe
from jobs.select import choosing
from jobs.summary import Source
from jobs.upload import Item, item
from schemas.errors import WinnowError

TEMPLATES = Path(__file__).parent / "templates"
COLUMNS, ROWS, TILE = 8, 4, 128  # of the sample grid; pixels
GRID = "assets/samples.png"
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A part of a dataset that loads by itself: its name, the patterns of its files, the files, and their rows."""

    name: str
    patterns: tuple[str, ...]
    items: list[Item]
    rows: int


@dataclass(frozen=True)
class Story:
    """What a card tells of: one round of one arm of a store, and what people answered about it."""

    source: Source
    summary: dict[str, Any]
    recipe: Recipe
    answers: Publish
    arm: str
    round: int
    repo: str

    def figures(self) -> list[dict[str, str]]:
        """Every metric of the base and of the round's model, with half the width of its 95 % interval."""
        base = self.summary["base"]
        rounds = {row["round"]: row["metrics"] for row in self.summary["arms"][self.arm]["rounds"]}
        mine = rounds.get(self.round, {})
        measured = mine.keys() | base.keys()
        names = [*(name for name in HEADLINES if name in measured), *sorted(measured - {*HEADLINES})]
        return [{"name": name_of(name), "base": _figure(name, base), "round": _figure(name, mine)} for name in names]

    def funnel(self) -> list[dict[str, Any]]:
        """By round: how many candidates there were and were kept, their weights and effective number."""
        found = self.source.rows(
            "SELECT round, count(*) AS candidates, count_if(kept) AS kept, list(weight) FILTER (WHERE kept) AS weights "
            "FROM selections WHERE selection = $arm AND round <= $round GROUP BY round ORDER BY round",
            arm=self.arm, round=self.round,
        )  # fmt: skip
        for row in found:
            weights = np.asarray(row.pop("weights") or [], float)
            sound = len(weights) > 0 and bool(np.isfinite(weights).all() and weights.any())
            row["mean"] = f"{weights.mean():.3f}" if sound else "–"
            row["effective"] = f"{effective_sample_size(weights):.0f}" if sound else "–"
        return found

    def scores(self) -> list[dict[str, Any]]:
        """By scorer: the mean over the round's kept and dropped candidates, and what it was used for."""
        selects = set(choosing(self.recipe))
        found = self.source.rows(
            "SELECT scorer, avg(value) FILTER (WHERE kept) AS kept, avg(value) FILTER (WHERE NOT kept) AS dropped "
            "FROM selections JOIN scores USING (sample_id) WHERE selection = $arm AND selections.round = $round "
            "GROUP BY scorer ORDER BY scorer",
            arm=self.arm, round=self.round,
        )  # fmt: skip
        return [
            {"scorer": row["scorer"], "kept": shown("", row["kept"]), "dropped": shown("", row["dropped"]),
             "use": "selects" if row["scorer"] in selects else "does not select"}
            for row in found
        ]  # fmt: skip

    def prompts(self) -> list[dict[str, Any]]:
        return self.source.rows(
            "SELECT source, count(*) AS n FROM prompts WHERE kept GROUP BY source ORDER BY n DESC, source LIMIT 5"
        )

    def sheet(self, split: str) -> list[Item]:
        """A picture of the first images by id, which is a hash: no pick. Of the kept candidates, or of the evaluation
        of the round's model."""
        kept = "IN (SELECT sample_id FROM selections WHERE kept AND selection = $arm AND round = $round)"
        where = f"sample_id {kept}" if split == "train" else "split = 'eval' AND arm = $arm AND round = $round"
        ids = self.source.rows(
            f"SELECT sample_id FROM samples WHERE {where} ORDER BY sample_id LIMIT {COLUMNS * ROWS}",
            arm=self.arm, round=self.round,
        )  # fmt: skip
        listed = ", ".join(str(row["sample_id"]) for row in ids) or "NULL"
        files = self.source.rows(
            f"SELECT image.bytes AS file FROM samples WHERE sample_id IN ({listed}) ORDER BY sample_id"
        )
        return [item(GRID, _grid([row["file"] for row in files]))] if files else []

    def common(self) -> dict[str, Any]:
        return {
            "repo": self.repo, "name": self.repo.partition("/")[2], "answers": self.answers, "recipe": self.recipe,
            "missing": self.answers.missing(), "story": self.summary["story"], "figures": self.figures(),
            "arm": self.arm, "round": self.round, "funnel": self.funnel(), "scores": self.scores(),
            "prompts": self.prompts(), "snapshot": self.source.snapshot.number,
        }  # fmt: skip


def anywhere(text: str) -> str:
    """The text with ~ for the home folder: where somebody lives is nobody's business."""
    home = Path.home()
    if len(home.parts) < 2:  # the root is where everything lies
        return text
    return re.sub(rf"(?<![\w.~-]){re.escape(str(home))}(?![\w-])", "~", text)


def _makers(configs: Sequence[Config]) -> list[str]:
    """What made the images that are published, as their rows name it: models, and sources that were taken in."""
    files = [one.content for config in configs if config.name in ("default", "samples") for one in config.items]
    found: set[str] = set()
    for file in files:
        try:
            found.update(pq.read_table(file, columns=["model"])["model"].unique().to_pylist())
        except (OSError, pa.ArrowException) as error:
            raise WinnowError(f"{file}: not readable ({error}); 'winnow verify' names the cure") from error
    return sorted(found)


def dataset(story: Story, what: str, configs: Sequence[Config]) -> tuple[str, list[Item]]:
    """The card of a dataset, and the files that it shows."""
    makers = _makers(configs)
    own = [name for name in makers if name.startswith("own:")]
    made = [name for name in makers if name not in own]
    images = sum(config.rows for config in configs if config.name in ("default", "samples"))
    head = {
        "license": story.answers.license,
        "pretty_name": story.repo.partition("/")[2],
        "task_categories": ["text-to-image"],
        "size_categories": [next((name for most, name in SIZES if images < most), "n>1T")],
        "tags": ["image", *([] if own else ["synthetic"]), "winnow"],
        "source_model": made or None,
        "source_model_license": story.answers.source_license,
        "configs": [_loading(config) for config in configs],
        "dataset_info": [_info(config) for config in configs],
    }
    sheet = story.sheet("train")
    return _render("dataset.md", head, story, what=what, configs=configs, images=images, made=made, own=own,
                   grid=GRID if sheet else None), sheet  # fmt: skip


def model(story: Story, lora: bool) -> tuple[str, list[Item]]:
    """The card of a trained model, or of a LoRA, and the files that it shows."""
    base = story.recipe.model
    public = base.count("/") == 1 and isinstance(models.locate(base), str)
    head = {
        "license": story.answers.license,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", *(["lora"] if lora else []), "synthetic", "winnow"],
        "base_model": base if public else None,
        "base_model_relation": ("adapter" if lora else "finetune") if public else None,
        "source_model": base,
        "source_model_license": story.answers.source_license,
    }
    sheet = story.sheet("eval")
    return _render("model.md", head, story, lora=lora, base=base, grid=GRID if sheet else None), sheet


def _render(template: str, head: dict[str, Any], story: Story, **more: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    told = {key: value for key, value in head.items() if value is not None}
    info = told.pop("dataset_info", None)
    front = anywhere(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=120))
    if info is not None:  # whose names of columns have to be those of the files
        front += yaml.safe_dump({"dataset_info": info}, sort_keys=False, allow_unicode=True, width=120)
    body = environment.get_template(template).render(**story.common(), **more)
    return f"---\n{front}---\n\n{anywhere(body)}"


def _figure(metric: str, figures: dict[str, Any]) -> str:
    if metric not in figures:
        return "–"
    half = half_width(figures[metric])
    text = shown(metric, figures[metric]["value"])
    return text if half is None else f"{text} ± {shown(metric, half, 3 if half >= 100 else 2)}"


def _loading(config: Config) -> dict[str, Any]:
    paths = config.patterns[0] if len(config.patterns) == 1 else list(config.patterns)
    default = {"default": True} if config.name == "samples" else {}
    return {"config_name": config.name, "data_files": [{"split": "train", "path": paths}]} | default


def _info(config: Config) -> dict[str, Any]:
    """Columns and sizes, as ``datasets`` writes and checks them."""
    from datasets import Features

    heads = [pq.read_metadata(one.content) for one in config.items]
    features = Features.from_arrow_schema(heads[0].schema.to_arrow_schema())
    size = sum(head.row_group(i).total_byte_size for head in heads for i in range(head.num_row_groups))
    return {
        "config_name": config.name,
        "features": features._to_yaml_list(),
        "splits": [{"name": "train", "num_bytes": size, "num_examples": config.rows}],
        "download_size": sum(one.bytes for one in config.items),
        "dataset_size": size,
    }


def _grid(files: Sequence[bytes]) -> bytes:
    """Images as tiles of TILE pixels on a white PNG; small ones are enlarged pixel by pixel."""
    rows = -(-len(files) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * TILE), "white")
    for i, file in enumerate(files):
        tile = decode(file)
        scale = TILE // max(tile.size)
        if scale > 1:
            tile = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
        tile.thumbnail((TILE - 4, TILE - 4))
        sheet.paste(tile, (i % COLUMNS * TILE + (TILE - tile.width) // 2, i // COLUMNS * TILE))
    out = io.BytesIO()
    sheet.save(out, "png", optimize=True)
    return out.getvalue()
