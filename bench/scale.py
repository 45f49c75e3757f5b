"""Curation at scale: distance, select, weigh and export over rounds of made-up samples, in one command.

    python -m bench scale                 the curve from 10,000 to 1,000,000 samples, and the same by hand
    python -m bench.scale ours N          one size, in this process: seconds and peak memory by stage
    python -m bench.scale exact N         the same, its distances by all pairs

Rounds of 10,000 samples: small images, five scores, 768 numbers in float16 that form clusters; D_0 has 50,000. Each
round's samples are measured by their 10 nearest of D_0, one of each prompt's ten is kept by rank fusion of the five
scores, weighed by its distance, and all kept ones are exported. Ours finds the nearest through an index, as it does by
default for a D_0 of this size (95 % of them or more, by its own measure), and once more by all pairs, as theirs does
(bench/by_hand.py). All read the same Parquet files, in a process of their own, and write theirs to the same disk.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bench.peak import Peak
from bench.ratio import Ratio
from bench.selection import part, random_file
from jobs import recipe as recipes
from jobs.plots import Line, curve
from jobs.recipe import Recipe
from jobs.run import BASE, Run
from schemas.tables import embedding_schema
from storage.commit import Part
from storage.layout import create
from storage.snapshot import seal

SIZES = (10_000, 100_000, 1_000_000)
ROUND, PROMPT, D0, DIM, K = 10_000, 10, 50_000, 768, 10
CLUSTERS, FILE = 500, 400  # bytes an image file
SPACE, SCORERS = "open_clip:made/up", tuple(f"open_clip:made/up-{i}" for i in range(5))
FIRST = 10**9  # of the ids of D_0, whose prompts are those of the first rounds
WAYS = {"ours": "by index", "exact": "all pairs"}  # of ours, and how each finds the nearest
PEER = "pandas + scikit-learn + datasets"


def recipe(index: str = "auto") -> Recipe:
    changes: dict[str, Any] = {
        "embed.encoders": [SPACE], "score.scorers": list(SCORERS), "distance.space": SPACE, "distance.kind": "knn",
        "distance.k": K, "select.policy": "best_of_n", "select.keep": 1, "select.fuse": "rank",
        "distance.metric": "l2", "distance.index": index, "select.scorers": None, "select.budget": None,
        "weigh.by": "distance", "export.formats": ["parquet"], "export.accumulate": True, "export.rows": ROUND,
        "export.encode": None,
    }  # fmt: skip
    found = recipes.override(recipes.load("refine-only"), [(key.split("."), value) for key, value in changes.items()])
    return found.for_arm("curated")


def build(folder: Path, samples: int) -> Path:
    """A store of so many samples and D_0, sealed as if its rounds had been generated, embedded and scored."""
    store = create(folder / "store")
    parts = list(_round(store, 0, BASE, "reference", FIRST + np.arange(D0), ()))
    for number in range(1, samples // ROUND + 1):
        parts += _round(store, number, "curated", "train", (number - 1) * ROUND + np.arange(ROUND), SCORERS)
    seal(store, "made up", parts, recipe().model_dump(mode="json"))
    return store


def clustered(n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows [n, DIM] float16 around centres that are always the same."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, DIM), dtype=np.float32)
    vectors = rng.standard_normal((n, DIM), dtype=np.float32)
    vectors += centres[rng.integers(0, CLUSTERS, n)]
    return vectors.astype(np.float16)


def _round(
    store: Path, number: int, arm: str, split: str, ids: np.ndarray, scorers: tuple[str, ...]
) -> Iterator[Part]:
    n, rng, file = len(ids), np.random.default_rng([number, 7]), random_file(FILE)
    at: dict[str, str | int] = {"round": number, "arm": arm, "split": split}
    prompts = ids % FIRST // PROMPT
    columns = {
        "sample_id": ids, **at, "prompt_id": prompts, "prompt": [f"a scene, number {i}" for i in prompts],
        "seed": ids, "model": "made-up", "width": 8, "height": 8, "attempt": 0, "refiner": None, "parent_id": None,
        "image": [{"bytes": file(i), "path": f"{i}.png"} for i in ids.tolist()],
    }  # fmt: skip
    yield part(store, "samples", at, columns)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(clustered(n, rng).reshape(-1)), DIM)
    columns = {"sample_id": ids, "round": number, "encoder": SPACE, "revision": "1", "vector": flat}
    yield part(store, "embeddings", at | {"encoder": SPACE}, columns, embedding_schema(DIM))
    quality = rng.standard_normal(n)
    for name in scorers:
        columns = {"sample_id": ids, "scorer": name, "revision": "1", "value": quality + rng.standard_normal(n),
                   "truncated": False, "round": number}  # fmt: skip
        yield part(store, "scores", at | {"scorer": name}, columns)


def ours(store: Path, samples: int, index: str = "auto") -> dict[str, Any]:
    """All stages over all rounds; by stage the seconds, and its peak of memory in MiB."""
    from jobs.distance import distance
    from jobs.export import export
    from jobs.select import select
    from jobs.weigh import weigh

    run, watch = Run(store, recipe(index)), Peak()
    rounds = [run.at(number) for number in range(1, samples // ROUND + 1)]
    watch("D_0", lambda: distance(run.base(), "reference"))
    for stage in (distance, select, weigh):
        watch(stage.__name__, lambda stage=stage: [stage(one) for one in rounds])
    watch("export", lambda: export(rounds[-1]))
    return watch.found


def run() -> list[Ratio]:
    """Seconds and memory, ours by both ways beside theirs, at each size; by stage in the words."""
    found = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            store = build(Path(name), size)
            sides = {who: _apart(who, store, size) for who in (*WAYS, "theirs")}
        for who, way in WAYS.items():
            mine, other = sides[who], sides["theirs"]
            stages = f"Ours: {_said(mine)}. Theirs: {_said(other)}"
            for title, what, key, total, unit in (
                ("end to end", stages, "seconds", sum, "s"),
                ("peak memory", "of the stage that takes most", "peak", max, "MiB"),
            ):
                own, others = (total(stage[key] for stage in side.values()) for side in (mine, other))
                name = f"{title}, ours ({way}) / {PEER} (all pairs), {size:,}"
                found.append(Ratio(name, what, own, others, *(3 * [own / others]), 1, unit))
    return found


def plot(rows: list[dict[str, Any]]) -> bytes:
    """An SVG of the seconds in `run`'s rows over the samples, both on scales of tens."""
    by_way = {
        way: [row for row in rows if row["name"].startswith(f"end to end, ours ({way})")] for way in WAYS.values()
    }
    seconds = {f"ours, {way}": [row["ours"] for row in some] for way, some in by_way.items()}
    seconds[PEER] = [row["theirs"] for row in by_way[WAYS["ours"]]]
    lines = [Line(who, SIZES, values, [0.0] * len(SIZES)) for who, values in seconds.items()]
    uri = curve("Curation from end to end", f"seconds, D₀ of {D0:,}", lines, axis="samples", tens=True)
    return base64.b64decode(uri.partition(",")[2])


def _said(side: dict[str, Any]) -> str:
    return "; ".join(f"{stage} {at['seconds']:.1f} s, {at['peak']:.0f} MiB" for stage, at in side.items())


def _apart(who: str, store: Path, samples: int) -> dict[str, Any]:
    """One side in a process of its own, over the same files in a folder of its own."""
    own = store.parent / who / "store"
    shutil.copytree(store, own, copy_function=os.link)  # a store's files are never written again
    ways = {"theirs": ["bench.by_hand", str(own), str(samples // ROUND), str(K), *SCORERS]}
    words = ways.get(who, ["bench.scale", who, str(samples), str(own)])
    said = subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(said.stdout.splitlines()[-1])


def main(who: str, samples: str, store: str = "") -> None:
    side = partial(ours, index={"ours": "auto", "exact": "exact"}[who])
    if store:
        print(json.dumps(side(Path(store), int(samples))))
        return
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(side(build(Path(name), int(samples)), int(samples)), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
