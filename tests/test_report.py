"""The report: true to the tables, whole in one file, harmless to open, and there for every half-done store."""

import base64
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs import recipe as recipes
from jobs import summary as summaries
from jobs.metrics import better
from jobs.plots import Line, curve
from jobs.recipe import Recipe
from jobs.report import renew, report, thinned
from jobs.run import Run
from jobs.votes import cast, strengths
from schemas.errors import WinnowError
from schemas.ids import sample_id
from schemas.tables import TABLES
from storage.commit import commit
from storage.layout import create, part_path
from storage.query import arrow
from storage.snapshot import Spent, latest, seal

CHROMIUM = shutil.which("chromium")
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
EVIL = "<script>alert(1)</script>"
EVAL = {1: EVIL, 2: "a red seven on a blue background"}
TRAIN = {3: '"><img src=x onerror=alert(1)> & more', 4: "a green three", 5: "a white eight left of a red two"}
METRICS = {  # by arm, from the base on
    "curated": {"judge_accuracy": (0.3, 0.5, 0.6, 0.55), "fd_real": (100.0, 60.0, 40.0, 46.0),
                "fd_d0": (5.0, 20.0, 30.0, 35.0), "diversity": (50.0, 45.0, 42.0, 40.0),
                "scene-clip": (0.6, 0.7, 0.8, 0.82), "scene-reader": (-3.0, -2.0, -1.5, -1.6)},
    "naive": {"judge_accuracy": (0.3, 0.29, 0.2, 0.1), "fd_real": (100.0, 130.0, 170.0, 250.0),
              "fd_d0": (5.0, 40.0, 80.0, 160.0), "diversity": (50.0, 40.0, 25.0, 10.0),
              "scene-clip": (0.6, 0.6, 0.55, 0.5), "scene-reader": (-3.0, -3.1, -4.0, -6.0)},
}  # fmt: skip
WIDTH = {"judge_accuracy": 0.05, "fd_real": 4.0, "fd_d0": 2.0, "diversity": 2.0}
ENDS = {"curated": ("rollback", "all 3 rounds done; best is round 2"), "naive": ("stop", "control arm, not judged")}


def picture(number: int, size: int) -> dict[str, Any]:
    colours = np.random.default_rng(number % 2**32).integers(0, 255, (size, size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours).save(out, "png")
    return {"bytes": out.getvalue(), "path": None}


class Builder:
    """Puts rows into a store as the stages do: a part a unit, sealed with the arm's recipe."""

    def __init__(self, root: Path, size: int = 8, **changes: Any) -> None:
        self.root, self.size = create(root), size
        recipe = recipes.load("embedded")
        self.recipe = recipes.override(recipe, [(["rounds"], 3), *(([key], value) for key, value in changes.items())])

    def put(self, table: str, arm: str, round: int, unit: str, rows: list[dict[str, Any]]) -> None:
        folders = {"round": round, "selection" if table in ("selections", "weights") else "arm": arm}
        data = pa.Table.from_pylist(rows, schema=TABLES[table].schema)
        part = commit(self.root, table, part_path(table, folders, unit, "0"), data)
        settings = self.recipe.for_arm("curated" if arm == "base" else arm)
        seal(self.root, table, [part], settings.model_dump(mode="json"), Spent(f"{table} of it", arm, round, 1.5))

    def samples(self, arm: str, round: int, split: str, prompts: dict[int, str], n: int = 2) -> list[int]:
        rows = []
        for prompt_id, prompt in prompts.items():
            for k in range(n):
                seed = sample_id([prompt_id, k, *([] if split == "eval" else [arm, round])])
                number = sample_id([arm, round, split, prompt_id, k])
                rows.append({
                    "sample_id": number, "round": round, "arm": arm, "split": split, "prompt_id": prompt_id,
                    "prompt": prompt, "seed": seed, "model": "embedded@1", "width": self.size, "height": self.size,
                    "attempt": 0, "image": picture(number, self.size),
                })  # fmt: skip
        self.put("samples", arm, round, split, rows)
        return [row["sample_id"] for row in rows]

    def scores(self, arm: str, round: int, scorer: str, values: dict[int, float]) -> None:
        rows = [{"sample_id": number, "round": round, "scorer": scorer, "revision": "1", "value": value,
                 "truncated": False} for number, value in values.items()]  # fmt: skip
        self.put("scores", arm, round, f"{scorer}-{len(rows)}", rows)

    def distances(self, arm: str, round: int, numbers: list[int]) -> None:
        distance = self.recipe.distance
        rows = [{"sample_id": number, "round": round, "space": distance.space, "metric": distance.name,
                 "reference": "d0", "value": 1 + number % 97 / 97} for number in numbers]  # fmt: skip
        self.put("distances", arm, round, "d", rows)

    def base(self) -> None:
        self.distances("base", 0, self.samples("base", 0, "reference", TRAIN, 10))
        judged = self.samples("base", 0, "eval", EVAL)
        self.scores("base", 0, "scene-judge", {number: float(i % 2) for i, number in enumerate(judged)})

    def measure(self, arm: str, round: int) -> None:
        rows = []
        for metric, values in METRICS[arm].items():
            half = WIDTH.get(metric, 0.1)
            # As the bootstrap has it: the interval of a Fréchet distance lies above the distance.
            up = 3 * half if metric.startswith("fd_") else 0
            rows.append({"round": round, "arm": arm, "metric": metric, "prompt_set": "held-out", "n": 4,
                         "value": values[round], "ci_low": values[round] - half + up,
                         "ci_high": values[round] + half + up})  # fmt: skip
        if round:
            rows.append(rows[0] | {"metric": "win_rate:judge_accuracy", "value": 0.5, "ci_low": None, "ci_high": None})
        self.put("evaluations", arm, round, "e", rows)

    def candidates(self, arm: str, round: int) -> None:
        numbers = self.samples(arm, round, "train", TRAIN, 4)
        if arm == "curated":
            self.scores(arm, round, "scene-clip", {number: (i % 4) / 4 for i, number in enumerate(numbers)})
            self.distances(arm, round, numbers)
        chosen = [
            {"selection": arm, "round": round, "sample_id": number, "kept": i % 4 == 3, "rank": 4 - i % 4,
             "reason": "" if i % 4 == 3 else f"rank {4 - i % 4} of 4 <b>for</b> its prompt"}
            for i, number in enumerate(numbers)
        ]  # fmt: skip
        self.put("selections", arm, round, "s", chosen)
        weights = [{"selection": arm, "round": round, "sample_id": row["sample_id"], "weight": 0.75}
                   for row in chosen if row["kept"]]  # fmt: skip
        self.put("weights", arm, round, "w", weights)

    def close(self, arm: str, round: int, last: bool) -> None:
        verdict, reason = ENDS[arm] if last else ("promote", "the newest is the best" if round else "the base")
        row = {"round": round, "arm": arm, "model": f"models/{arm}-{round}" if round else "embedded",
               "parent_model": None, "verdict": verdict, "reason": reason, "best_round": round,
               "seconds": 10.0 * round, "images": 12, "recipe": "embedded"}  # fmt: skip
        self.put("rounds", arm, round, "r", [row])

    def play(self, arm: str, rounds: int = 3) -> None:
        self.measure(arm, 0)
        self.close(arm, 0, False)
        for number in range(1, rounds + 1):
            self.candidates(arm, number)
            judged = self.samples(arm, number, "eval", EVAL)
            self.scores(arm, number, "scene-judge", {one: float(number > 1) for one in judged})
            self.measure(arm, number)
            self.close(arm, number, number == 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reported store of both arms over three rounds."""
    builder = Builder(tmp_path_factory.mktemp("store"))
    builder.base()
    builder.play("curated")
    builder.play("naive")
    assert report(builder.root) == builder.root / "report.html"
    return builder.root


def read(store: Path) -> tuple[str, dict[str, Any]]:
    html = (store / "report.html").read_text(encoding="utf-8")
    return html, json.loads((store / "summary.json").read_text(encoding="utf-8"))


def test_refined_images_stand_beside_their_parents(tmp_path: Path) -> None:
    """The largest gains first, with what was done; the sheet of a store without children has no such shelf."""
    builder = Builder(tmp_path / "s")
    builder.base()
    builder.measure("curated", 0)
    parents = builder.samples("curated", 1, "train", TRAIN, 4)
    children = [sample_id(["child", number]) for number in parents[:5]]
    made, notes = [], []
    for k, (number, parent) in enumerate(zip(children, parents, strict=False)):
        made.append({
            "sample_id": number, "round": 1, "arm": "curated", "split": "train", "prompt_id": 3, "prompt": TRAIN[3],
            "seed": k, "model": "embedded@1", "width": 8, "height": 8, "attempt": 0, "parent_id": parent,
            "refiner": f"{EVIL} t=400 loop 1", "image": picture(number, 8),
        })  # fmt: skip
        notes.append({
            "sample_id": number, "parent_id": parent, "round": 1, "mask": f"cells 4×4: {k}", "level": 0.4, "loop": 1,
            "evaluations": 5, "scorer": "scene-clip", "score_before": 0.25, "accepted": k != 1,
            "score_after": [0.5, 0.2, 0.75, 0.3, 0.6][k],
        })  # fmt: skip
    builder.put("samples", "curated", 1, "children", made)
    builder.put("refinements", "curated", 1, "notes", notes)
    builder.scores("curated", 1, "scene-clip", {number: i / 100 for i, number in enumerate([*parents, *children])})
    chosen = [{"selection": "curated", "round": 1, "sample_id": number, "kept": i % 2 == 0, "rank": 1, "reason": "r"}
              for i, number in enumerate([*parents, *children])]  # fmt: skip
    builder.put("selections", "curated", 1, "s", chosen)
    report(builder.root)
    html, _ = read(builder.root)
    check_closed(html)
    shelf = html.split("Before and after refinement", 1)[1].split("</details>")[0]
    shown = [int(number) for number in re.findall(r"· sample (\d+)", shelf)]
    assert shown == [number for k in (2, 4, 0) for number in (parents[k], children[k])]
    assert "cells 4×4: 2, level 0.40, loop 1, scene-clip 0.250 → 0.750, accepted" in shelf
    assert shelf.count("<b>before</b>") == shelf.count("<b>after</b>") == 3


def test_a_refined_image_whose_refinement_is_not_told_is_shown_all_the_same(tmp_path: Path) -> None:
    builder = Builder(tmp_path / "s")
    builder.base()
    builder.measure("curated", 0)
    [parent, *_] = builder.samples("curated", 1, "train", TRAIN, 4)
    child = {
        "sample_id": sample_id(["child"]), "round": 1, "arm": "curated", "split": "train", "prompt_id": 3,
        "prompt": TRAIN[3], "seed": 1, "model": "embedded@1", "width": 8, "height": 8, "attempt": 0,
        "parent_id": parent, "refiner": "whole", "image": picture(1, 8),
    }  # fmt: skip
    builder.put("samples", "curated", 1, "children", [child])
    chosen = [{"selection": "curated", "round": 1, "sample_id": number, "kept": True, "rank": 1, "reason": "r"}
              for number in (parent, child["sample_id"])]  # fmt: skip
    builder.put("selections", "curated", 1, "s", chosen)
    report(builder.root)
    shelf = read(builder.root)[0].split("Before and after refinement", 1)[1].split("</details>")[0]
    assert "<b>after</b>" in shelf and "level" not in shelf


def story(summary: dict[str, Any]) -> str:
    return "\n".join(summary["story"]).replace("\N{NO-BREAK SPACE}", " ")


class Tags(HTMLParser):
    """Every element that a page really has, and every address in an attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]


def check_closed(html: str) -> None:
    """Nothing is fetched, nothing runs, and the file is small."""
    assert len(html.encode()) < 10 * 2**20
    tags = Tags(html)
    assert all(link.startswith(("data:", "#", "reports/")) or link == "summary.json" for link in tags.links)
    assert not tags.names & {"script", "iframe", "object", "embed", "form"} and not tags.handlers
    assert "@import" not in html and "url(" not in html and "<b>for</b>" not in html
    for uri in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html):
        svg = base64.b64decode(uri).decode()
        assert "nan" not in svg.lower().split() and not re.search(r"""(?:href|src)=["'](?!#)""", svg)


def test_summary_equals_sql(whole: Path) -> None:
    _, summary = read(whole)
    told = {
        (name, row["round"], metric): (figure["value"], figure["ci_low"], figure["ci_high"])
        for name, arm in summary["arms"].items() for row in arm["rounds"] for metric, figure in row["metrics"].items()
    }  # fmt: skip
    rows = arrow(whole, "SELECT * FROM evaluations").to_pylist()
    assert told == {(r["arm"], r["round"], r["metric"]): (r["value"], r["ci_low"], r["ci_high"]) for r in rows}
    assert summary["base"]["fd_real"]["value"] == 100.0
    assert summary["images"] == arrow(whole, "SELECT count(*) AS n FROM samples")["n"][0].as_py()
    assert summary["seconds"] == 120.0
    assert summary["snapshot"] == len(list((whole / "snapshots").iterdir()))
    assert summary["recipe"] == "embedded"


def test_without_children_there_is_no_shelf_of_them(whole: Path) -> None:
    assert "Before and after" not in read(whole)[0]


def test_each_arm_ends_as_its_own_recipe_says(whole: Path) -> None:
    """The newest snapshot holds the naive recipe; the curated arm is still judged by its own."""
    arms = read(whole)[1]["arms"]
    assert list(arms) == ["curated", "naive"]
    curated, naive = arms["curated"], arms["naive"]
    assert (curated["judged"], curated["best_round"], curated["kept_round"]) == (True, 2, 2)
    assert (curated["verdict"], curated["model"], curated["finished"]) == ("rollback", "models/curated-2", True)
    assert (naive["judged"], naive["best_round"], naive["kept_round"]) == (False, 0, 3)
    assert (naive["verdict"], naive["model"]) == ("stop", "models/naive-3")


def test_effects_and_story(whole: Path) -> None:
    summary = read(whole)[1]
    effects = {(e["arm"], e["which"], e["against"], e["metric"]): e for e in summary["effects"]}
    up = effects["curated", "best", "base", "judge_accuracy"]
    assert (up["before"], up["after"], up["beyond_noise"]) == (0.3, 0.6, True)
    assert up["change"] == pytest.approx(0.3)
    assert effects["naive", "last", "base", "judge_accuracy"]["change"] == pytest.approx(-0.2)
    assert effects["curated", "best", "naive round 3", "fd_real"]["change"] == pytest.approx(-210)
    told = story(summary)
    assert "curated, best in round 2 of 3, against the base: judged accuracy rises from 30.0 % to 60.0 %" in told
    assert "naive, after round 3, against the base: judged accuracy falls from 30.0 % to 10.0 %, worse" in told
    assert "verdict on round 3 of curated: rollback" in told
    assert "The model of curated to keep is that of round 2 (models/curated-2)." in told


def test_an_effect_that_is_not_there_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {metric: (values[0],) * 4 for metric, values in METRICS["curated"].items()}
    monkeypatch.setitem(METRICS, "curated", flat | {"judge_accuracy": (0.3, 0.31, 0.32, 0.31)})
    builder = Builder(tmp_path / "s")
    builder.base()
    builder.play("curated")
    report(builder.root)
    _, summary = read(builder.root)
    told = story(summary)
    assert summary["arms"]["curated"]["best_round"] == 0
    assert "judged accuracy shows no change beyond noise (30.0 % → 31.0 %)" in told
    assert "No round of curated beat the base." in told and "to keep is the base itself" in told
    assert "rises" not in told and "better" not in told


def test_html_is_whole_and_harmless(whole: Path) -> None:
    html, _ = read(whole)
    check_closed(html)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    charts = 7 + 3 * 3 + 1  # a curve a metric, three histograms a round, the time
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,', html)) == charts
    assert len(re.findall(r'href="data:image/svg\+xml;base64,[^"]+" download="winnow [^"]+\.svg"', html)) == charts
    assert "held-out scorer" in html and "training scorer" in html
    assert "prefers-color-scheme: dark" in html and "image-rendering: pixelated" in html
    for number in range(1, 4):
        assert f"<summary>Round {number}</summary>" in html


def test_contact_sheet_compares_the_same_seeds(whole: Path) -> None:
    html, _ = read(whole)
    sheet = html[html.index('id="sheet"') : html.index('id="candidates"')]
    shown = [int(number) for number in re.findall(r"sample (\d+)\"", sheet)]
    rows = arrow(whole, f"SELECT prompt_id, seed FROM samples WHERE sample_id IN ({', '.join(map(str, shown))})")
    assert len(shown) == 2 * 7  # two prompts by the base and two arms of three rounds
    assert len(set(zip(rows["prompt_id"].to_pylist(), rows["seed"].to_pylist(), strict=True))) == 2
    assert "✓" in sheet and "✗" in sheet


def test_again_gives_the_same_bytes(whole: Path) -> None:
    before = (whole / "report.html").read_bytes(), (whole / "summary.json").read_bytes()
    report(whole)
    assert before == ((whole / "report.html").read_bytes(), (whole / "summary.json").read_bytes())


def test_ceiling_of_real_scenes(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"parts": {"real": {"judge_accuracy": 0.97, "diversity": 61.5, "scenes": 9}}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    monkeypatch.setattr(summaries, "WEIGHTS", tmp_path)
    with summaries.opened(whole) as source:
        summary = summaries.summarise(source)
    assert summary["real"] == {"judge_accuracy": 0.97, "diversity": 61.5}
    assert "97.0 % of real scenes." in story(summary)


def test_the_distance_of_real_scenes_is_that_of_as_many() -> None:
    """What nothing can come below, since of few images the distance is above 0."""
    recipe = recipes.load("embedded")
    real = summaries.real_figures(recipe)
    assert 10 < real["fd_real"] < summaries.real_figures(recipes.load("embedded-fast"))["fd_real"]
    others: dict[str, Any] = {
        "images_per_prompt": {"evaluate": {"images_per_prompt": 57}}, "real": {"evaluate": {"real": "mine.parquet"}},
        "prompts": {"prompts": {"held_out": 0.5}}, "space": {"evaluate": {"space": "scene-clip", "judge": None}},
        "source": {"prompts": {"source": "mine.txt"}},
    }  # fmt: skip
    for changes in others.values():
        other = Recipe.model_validate(recipes.merge(recipe.model_dump(), changes))
        assert "fd_real" not in summaries.real_figures(other)


STAGES = ["nothing", "prompts", "reference", "measured", "closed", "one arm", "naive only", "unscored", "half a round"]


@pytest.mark.parametrize("stage", STAGES)
def test_partial_stores(tmp_path: Path, stage: str) -> None:
    builder = Builder(tmp_path / "s")
    if stage == "prompts":
        row = {"prompt_id": 1, "text": EVIL, "source": "x", "split": "eval", "kept": True}
        builder.put("prompts", "curated", 0, "p", [row])
    elif stage == "reference":
        builder.samples("base", 0, "reference", TRAIN)
    elif stage != "nothing":
        builder.base()
    if stage in ("measured", "closed", "half a round"):
        builder.measure("curated", 0)
    if stage in ("closed", "half a round"):
        builder.close("curated", 0, False)
    if stage == "half a round":
        builder.samples("curated", 1, "train", TRAIN)
    if stage == "one arm":
        builder.play("curated", 1)
    if stage == "naive only":
        builder.play("naive", 2)
    if stage == "unscored":
        builder.candidates("naive", 1)
    report(builder.root)
    html, summary = read(builder.root)
    check_closed(html)
    assert summary["story"]
    if stage == "one arm":
        assert not summary["arms"]["curated"]["finished"]
        assert "curated is not finished; so far, the model of curated to keep is that of round 1" in story(summary)


def test_numbers_and_pictures_that_are_missing(tmp_path: Path) -> None:
    builder = Builder(tmp_path / "s")
    builder.base()
    name = "mine <i>, 評価, 10$ a_piece, and a name that goes on and on"
    row = {"round": 0, "arm": "curated", "metric": name, "prompt_set": "held-out", "n": 4, "value": 1.0,
           "ci_low": float("nan"), "ci_high": None}  # fmt: skip
    builder.put("evaluations", "curated", 0, "e", [row])
    broken = {"sample_id": 7, "round": 1, "arm": "curated", "split": "eval", "prompt_id": 1, "prompt": EVIL,
              "seed": sample_id([1, 0]), "model": "m", "width": 8, "height": 8, "attempt": 0,
              "image": {"bytes": b"no picture", "path": None}}  # fmt: skip
    builder.put("samples", "curated", 1, "broken", [broken])
    builder.put("evaluations", "curated", 1, "e", [row | {"round": 1, "ci_low": None}])
    report(builder.root)
    html, summary = read(builder.root)
    check_closed(html)
    assert summary["base"][name] == {"value": 1.0, "ci_low": None, "ci_high": None, "n": 4}
    assert summary["arms"]["curated"]["best_round"] is None
    assert "no image" in html and "mine &lt;i&gt;" in html and "nan" not in html.lower().split("<body>")[1][:20000]


def test_a_store_without_a_recipe(tmp_path: Path) -> None:
    root = create(tmp_path / "s")
    row = {"round": 0, "arm": "mine", "metric": "fd_real", "prompt_set": "held-out", "value": 3.0, "n": 4}
    data = pa.Table.from_pylist([row], schema=TABLES["evaluations"].schema)
    seal(root, "evaluate", [commit(root, "evaluations", part_path("evaluations", {}, "0", "0"), data)], {})
    report(root)
    html, summary = read(root)
    check_closed(html)
    assert summary["recipe"] is None and summary["base"]["fd_real"]["value"] == 3.0


def test_many_rounds_are_thinned_out() -> None:
    rounds = list(range(1, 51))
    shown = thinned(rounds, best=33)
    assert {1, 33, 50} <= set(shown) and len(shown) <= 8
    assert thinned(rounds[:8]) == rounds[:8]


def test_large_images_are_shrunk(tmp_path: Path) -> None:
    builder = Builder(tmp_path / "s", size=640)  # noise, which compresses worst
    builder.base()
    builder.play("curated", 1)
    report(builder.root)
    html, _ = read(builder.root)
    check_closed(html)
    assert "data:image/webp;base64," in html and "picture pixels" not in html


def test_what_decides_stands_open_and_the_rest_is_folded(whole: Path) -> None:
    html, _ = read(whole)
    curves = html[html.index('id="curves"') : html.index('id="figures"')]
    first, folded = curves.split("<details>", 1)
    for title in ("Judged accuracy", "Fréchet distance to real images", "Fréchet distance to D₀", "Diversity"):
        assert f'alt="{title}' in first
    assert 'alt="scene-clip' in folded and 'alt="Win rate over the base, judged' in first
    assert "lower is better; the guard decides by it" in html


def test_alarms_are_told_beside_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hacked = {"judge_accuracy": (0.3, 0.5, 0.6, 0.4), "scene-clip": (0.6, 0.7, 0.8, 1.5)}
    monkeypatch.setitem(METRICS, "curated", METRICS["curated"] | hacked)
    alarm = "reward hacking: since round 2 scene-clip rose while held-out judge_accuracy fell from 0.6 to 0.4"
    monkeypatch.setitem(ENDS, "curated", ("rollback", f"best is round 2; {alarm}"))
    builder = Builder(tmp_path / "s")
    builder.base()
    builder.play("curated")
    report(builder.root)
    _, summary = read(builder.root)
    assert summary["arms"]["curated"]["alarms"] == [alarm]
    told = story(summary)
    assert "verdict on round 3 of curated: rollback (best is round 2)." in told
    assert f"Alarms on that round, which do not decide: {alarm}." in told


def test_votes_stand_in_the_report(whole: Path, tmp_path: Path) -> None:
    assert "People's votes" not in read(whole)[0]
    builder = Builder(tmp_path / "s")
    builder.base()
    builder.play("curated", 1)
    one, two = (
        arrow(builder.root, f"SELECT sample_id FROM samples WHERE arm = '{arm}' AND split = 'eval' ORDER BY sample_id")
        for arm in ("base", "curated")
    )
    sides = list(zip(one["sample_id"].to_pylist(), two["sample_id"].to_pylist(), strict=True))
    for voter in ("ada", "bob"):
        for i, (left, right) in enumerate(sides):
            cast(builder.root, voter, "appeal", left, right, "left" if i == 0 else "right")
        cast(builder.root, voter, "faithfulness", *sides[0], "skip")
    cast(builder.root, EVIL.replace("/", ""), "keep", sides[0][1], None, "keep")
    strengths(builder.root)
    report(builder.root)
    html, _ = read(builder.root)
    check_closed(html)
    votes = html[html.index('id="votes"') : html.index('id="sheet"')].replace("\N{NO-BREAK SPACE}", " ")
    assert "8 votes of 2 voters." in votes and "2 votes of 2 voters, 2 for neither." in votes
    assert "1 vote of 1 voter: 1 keep, 0 drop." in votes
    assert re.search(r"<td>curated round 1</td><td>base</td><td class=.n.>75\.0 %</td>", votes)
    assert votes.index("curated round 1</td><td class") < votes.index("base</td><td class=\"n\">−")
    # The page of votes says the same as the table.
    [rate] = arrow(builder.root, "SELECT * FROM win_rates WHERE contestant <> 'base'").to_pylist()
    assert f"{100 * rate['ci_low']:.1f} % to {100 * rate['ci_high']:.1f} %" in votes


def test_time_and_size_are_those_of_the_store(whole: Path) -> None:
    html, summary = read(whole)
    snapshot = latest(whole)
    spent = sum(one.seconds for one in snapshot.spent)
    assert sum(sum(took.values()) for took in summary["stages"].values()) == pytest.approx(spent)
    assert summary["stages"]["samples of it"] == {"base": 3.0, "curated": 9.0, "naive": 9.0}
    assert sum(table["bytes"] for table in summary["tables"].values()) == sum(part.bytes for part in snapshot.parts)
    assert "The store does not say how long" not in html


def test_a_lost_part_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    builder = Builder(tmp_path / "s")
    builder.base()
    builder.play("curated", 1)
    report(builder.root)
    _, before = read(builder.root)
    lost = [part.path for part in latest(builder.root).parts if part.table == "scores" and "/round-1/" in part.path]
    for path in lost:
        (builder.root / path).unlink()
    report(builder.root)
    html, after = read(builder.root)
    check_closed(html)
    assert after["lost"] == sorted(lost) and len(lost) == 2
    assert "2 sealed parts are missing" in story(after) and lost[0] in html and 'role="alert"' in html
    assert after["arms"]["curated"]["rounds"] == before["arms"]["curated"]["rounds"]
    gone = [part.path for part in latest(builder.root).parts if part.table == "evaluations"]
    for path in gone:
        (builder.root / path).unlink()
    report(builder.root)
    assert not read(builder.root)[1]["base"]


def test_a_report_that_cannot_be_written_does_not_end_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = Builder(tmp_path / "s")
    builder.base()
    (builder.root / "report.html").mkdir()
    with pytest.raises(WinnowError):
        report(builder.root)
    renew(Run(builder.root, builder.recipe, 2, "curated"))
    said = capsys.readouterr().err
    assert said.startswith("no report of round 2 of curated: ") and "'winnow report' tries again" in said


def test_what_training_left_to_look_at_is_linked(tmp_path: Path) -> None:
    builder = Builder(tmp_path / "s")
    builder.base()
    folder = builder.root / "reports" / "curated-r1 <b>"
    folder.mkdir()
    for name in ("sheet-00050.png", "sheet-00100.png", "losses.jsonl"):
        (folder / name).write_bytes(b"")
    report(builder.root)
    html, _ = read(builder.root)
    links = [link for link in Tags(html).links if not link.startswith(("data:", "#"))]
    assert links == ["summary.json", "reports/curated-r1%20%3Cb%3E/sheet-00100.png",
                     "reports/curated-r1%20%3Cb%3E/losses.jsonl"]  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_opens_it_without_complaint(
    whole: Path, chromium: Any, tmp_path: Path, scheme: str, width: int
) -> None:
    """No errors, no requests, every picture drawn, nothing wider than the screen, and prompts stay text."""
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    address = (whole / "report.html").as_uri()
    page.goto(address)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.wait_for_function("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    page.screenshot(path=tmp_path / "report.png")  # of the window: the browser fails to capture pages of such length
    assert problems == [] and {url for url in asked if not url.startswith("data:")} == {address}
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("script").count() == 0 and page.locator("img[onerror]").count() == 0
    assert page.locator("#sheet th", has_text=EVIL).count() == 1
    ground = Image.open(tmp_path / "report.png").convert("L").getpixel((2, 2))
    assert ground > 230 if scheme == "light" else ground < 40
    with page.expect_download() as saved:
        page.locator("#curves .save").first.click()
    assert saved.value.suggested_filename.endswith(".svg")
    assert Path(saved.value.path()).read_text().startswith("<svg")
    context.close()


@pytest.mark.parametrize("count", [2, 5, 9])
def test_a_legend_of_many_arms_hides_nothing_and_is_whole(count: int) -> None:
    lines = [Line(f"the arm of number {n}", [0, 1], [1.0, n], [0.1, 0.1]) for n in range(count)]
    svg = ET.fromstring(base64.b64decode(curve("Accuracy", "judged", lines).partition(",")[2]))
    height = float(svg.attrib["viewBox"].split()[3])
    at = {}
    for one in svg.iter("{http://www.w3.org/2000/svg}text"):
        at["".join(one.itertext())] = (float(one.attrib["x"]), float(one.attrib["y"]))
    named = [at[line.name] for line in lines]
    assert all(x > 0 and y < height for x, y in named)
    assert len(set(named)) == count
    left, low = at["round"]
    assert all(y > low and (x > left + 30 or y > low + 8) for x, y in named)


def test_scales_of_tens_are_numbered_in_full() -> None:
    lines = [Line("ours", [10_000, 1_000_000], [5.0, 500.0], [0.0, 0.0])]
    svg = ET.fromstring(base64.b64decode(curve("Time", "seconds", lines, axis="samples", tens=True).partition(",")[2]))
    said = {"".join(one.itertext()) for one in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert said == {"Time", "seconds", "samples", "10", "100", "10,000", "100,000", "1,000,000"}


def test_diversity_is_neither_better_nor_worse_in_any_space() -> None:
    assert better("diversity", 1.0) is None and better("diversity@vae", 1.0) is None
    assert better("fd_real@vae", 1.0) is False and better("scene-clip", 1.0) is True


def test_an_arms_recipe_is_that_of_its_last_round_by_number(tmp_path: Path) -> None:
    """Round 10 comes after round 9, and before it by the letters of its folder."""
    store = create(tmp_path / "store")
    recipe = recipes.load("embedded-fast")
    blank = {pa.int32(): 0, pa.int64(): 1, pa.float64(): 0.5, pa.string(): "x", pa.bool_(): True}
    for number in (9, 10):
        row = {field.name: blank.get(field.type) for field in TABLES["rounds"].schema}
        made = pa.Table.from_pylist([row | {"round": number, "arm": "curated"}], schema=TABLES["rounds"].schema)
        path = part_path("rounds", {"round": number, "arm": "curated"}, "0", str(number))
        changed = recipe.model_copy(update={"seed": number}).model_dump(mode="json")
        seal(store, "guard", [commit(store, "rounds", path, made)], changed)
    with summaries.opened(store) as source:
        found = summaries.recipe_of(source, "curated")
    assert found is not None and found.seed == 10
