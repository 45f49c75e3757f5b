"""The benchmark of scale, small: ours agrees with all pairs, and theirs does the same work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import rows, sets
from scipy.spatial.distance import cdist

from bench import by_hand, scale
from bench.selection import part
from jobs import recipe as recipes
from jobs.distance import distance
from jobs.explain import explain
from jobs.run import Run
from jobs.select import select
from jobs.similar import similar
from schemas.errors import WinnowError
from schemas.tables import embedding_schema
from storage.snapshot import seal

SMALL = {"ROUND": 60, "PROMPT": 5, "D0": 120, "DIM": 8, "K": 4, "CLUSTERS": 6}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in SMALL.items():
        monkeypatch.setattr(scale, name, value)
    return scale.build(tmp_path, 120)


def measuring(store: Path, **changes: Any) -> Run:
    settings = {f"distance.{key}": value for key, value in changes.items()} | {"reference.images_per_prompt": 5}
    return Run(store, recipes.override(scale.recipe(), sets(settings)))


def vectors(store: Path, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = rows(store, "SELECT sample_id, prompt_id, vector FROM embeddings JOIN samples USING (sample_id) "
                        f"WHERE {where} ORDER BY sample_id")  # fmt: skip
    return tuple(np.array([row[key] for row in found]) for key in ("sample_id", "prompt_id", "vector"))  # type: ignore


def distances(store: Path, where: str) -> np.ndarray:
    found = rows(store, "SELECT value FROM distances JOIN samples USING (sample_id) "
                        f"WHERE {where} ORDER BY sample_id")  # fmt: skip
    return np.array([row["value"] for row in found])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("index", ["exact", "auto"])
def test_all_that_is_timed_keeps_and_weighs_the_same(
    store: Path, tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.distance.EXACT", 100)  # so that auto finds D_0 too large for all pairs, as one of 50,000
    stages = scale.ours(store, 120, index)
    assert ("the index finds" in capsys.readouterr().err) == (index == "auto")
    assert list(stages) == ["D_0", "distance", "select", "weigh", "export"]
    _, _, d0 = vectors(store, "split = 'reference'")
    _, _, x = vectors(store, "split = 'train'")
    near, found = np.sort(cdist(x, d0), axis=1)[:, :4].mean(axis=1), distances(store, "split = 'train'")
    if index == "exact":
        np.testing.assert_allclose(found, near, rtol=1e-5)
    else:  # what an index misses makes no distance smaller, and it misses little
        assert (found >= near * (1 - 1e-5)).all() and np.mean(found / near) < 1.02
    kept = rows(store, "SELECT sample_id, weight FROM selections WHERE kept ORDER BY sample_id")
    assert len(kept) == 24

    assert list(by_hand.curate(store, 2, scale.K, list(scale.SCORERS))) == list(stages)
    other = pq.read_table(tmp_path / by_hand.OUT).sort_by("sample_id").to_pylist()
    assert [row["sample_id"] for row in other] == [row["sample_id"] for row in kept]
    mine, others = (np.array([row["weight"] for row in side]) for side in (kept, other))
    if index == "exact":
        np.testing.assert_allclose(mine, others, rtol=1e-4)
    else:
        assert np.abs(mine - others).mean() < 0.05 * others.mean()  # β errs as the distances do
    exported = [pq.read_table(path) for path in (store / "shards").rglob("*.parquet")]
    assert sum(table.num_rows for table in exported) == 24


def test_each_row_and_line_is_of_its_own_side(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = {"ours": 1.0, "exact": 4.0, "theirs": 8.0}  # seconds a sample, and twice as much in MiB

    def apart(who: str, store: Path, size: int) -> dict[str, Any]:
        return {"distance": {"seconds": pace[who] * size, "peak": 2 * pace[who] * size}}

    drawn: list[scale.Line] = []
    monkeypatch.setattr(scale, "SIZES", (60, 120))
    monkeypatch.setattr(scale, "_apart", apart)
    monkeypatch.setattr(scale, "curve", lambda title, said, lines, **_: drawn.extend(lines) or "data:,")
    found = scale.run()
    for row in found:
        mine = pace["ours" if "by index" in row.name else "exact"]
        size, unit = int(row.name.rpartition(" ")[2]), 2 if row.unit == "MiB" else 1
        assert (row.ours, row.theirs, row.ratio) == (mine * size * unit, 8 * size * unit, mine / 8)
    assert len({row.name for row in found}) == len(found) == 2 * 2 * 2
    scale.plot([asdict(row) for row in found])
    assert [(line.name, list(line.rounds), list(line.values)) for line in drawn] == [
        ("ours, by index", [60, 120], [60, 120]), ("ours, all pairs", [60, 120], [240, 480]),
        (scale.PEER, [60, 120], [480, 960]),
    ]  # fmt: skip


@pytest.mark.parametrize(("who", "by_index"), [("ours", True), ("exact", False)])
def test_a_side_runs_alone_over_links_to_the_same_files(
    store: Path, who: str, by_index: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.distance.EXACT", 100)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    own = store.parent / "own" / "store"
    shutil.copytree(store, own, copy_function=os.link)
    scale.main(who, "120", str(own))
    said = capsys.readouterr()
    assert set(json.loads(said.out)) == {"D_0", "distance", "select", "weigh", "export"}
    assert ("the index finds" in said.err) == by_index
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("module", ["bench.by_hand", "bench.__main__"])
def test_scikit_learn_has_all_threads(module: str) -> None:
    # It sets BLAS to one thread while it searches, and beside FAISS's BLAS that is OpenMP itself, and so its search.
    code = (
        f"import {module}\nfrom sklearn.utils._openmp_helpers import _openmp_effective_n_threads as threads\n"
        "from threadpoolctl import threadpool_limits\nbefore = threads()\n"
        "with threadpool_limits(1, 'blas'): assert threads() == before > 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("index", ["ivf", "ivfpq", "hnsw"])
def test_an_index_serves_every_round(store: Path, index: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = measuring(store, index=index)
    distance(run.base(), "reference"), distance(run), distance(run.at(2))
    _, _, d0 = vectors(store, "split = 'reference'")
    for number in (1, 2):
        where = f"split = 'train' AND samples.round = {number}"
        near = np.sort(cdist(vectors(store, where)[2], d0), axis=1)[:, :4].mean(axis=1)
        found = distances(store, where)
        assert (found >= near * (1 - 1e-5)).all() and np.median(found / near) < 1.02
    own = np.sort(cdist(d0, d0), axis=1)[:, 1:5].mean(axis=1)
    found = distances(store, "split = 'reference'")
    assert (found >= own * (1 - 1e-5)).all() and np.median(found / own) < 1.02
    assert capsys.readouterr().err.count("of the 4 nearest of D_0") == 3


@pytest.mark.parametrize(("many", "copied", "by_index"), [(100, 2**30, True), (500, 2**30, False), (100, 999, False)])
def test_auto_takes_an_index_for_a_large_d0_whose_copy_is_no_burden(
    store: Path, many: int, copied: int, by_index: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("jobs.distance.EXACT", many)
    monkeypatch.setattr("jobs.distance.COPIED", copied)
    distance(measuring(store).base(), "reference"), distance(measuring(store))
    assert ("the index finds" in capsys.readouterr().err) == by_index


def test_distances_matched_by_prompt(store: Path) -> None:
    run = measuring(store, match="prompt", k=2)
    distance(run.base(), "reference"), distance(run)
    _, theirs, d0 = vectors(store, "split = 'reference'")
    _, mine, x = vectors(store, "split = 'train' AND samples.round = 1")
    pairs = np.where(mine[:, None] == theirs, cdist(x, d0), np.inf)
    np.testing.assert_allclose(
        distances(store, "split = 'train' AND samples.round = 1"), np.sort(pairs, axis=1)[:, :2].mean(axis=1), rtol=1e-5
    )
    own = np.where(theirs[:, None] == theirs, cdist(d0, d0), np.inf)
    np.fill_diagonal(own, np.inf)
    np.testing.assert_allclose(
        distances(store, "split = 'reference'"), np.sort(own, axis=1)[:, :2].mean(axis=1), rtol=1e-5
    )
    assert rows(store, "SELECT DISTINCT reference FROM distances") == [{"reference": "d0-prompt"}]


def test_a_round_reads_no_part_of_another(store: Path) -> None:
    for path in (store / "tables").rglob("round-2/**/*.parquet"):
        path.write_bytes(b"unreadable")
    run = measuring(store)
    distance(run.base(), "reference"), distance(run)
    with pytest.raises(WinnowError, match="cannot be read"):
        distance(run.at(2))


def test_a_selection_of_nothing_is_refused(store: Path) -> None:
    run = measuring(store)
    asked = sets({"select.policy": "sql", "select.sql": "SELECT sample_id FROM candidates WHERE distance < 0"})
    with pytest.raises(WinnowError, match="keeps none of 60 samples.*not among what the query gives"):
        select(Run(store, recipes.override(run.recipe, asked)))


def longer(store: Path, run: Run) -> None:
    """Sample 999 in the run's round, with a vector of 9 numbers, where the others have 8."""
    at = {"round": run.round, "arm": "curated", "split": "train"}
    image = {"bytes": b"\x89PNG\r\n\x1a\n", "path": "a.png"}
    sample = {"sample_id": np.array([999]), **at, "prompt_id": 1, "prompt": "more", "seed": 1, "model": "made-up",
              "width": 8, "height": 8, "attempt": 0, "refiner": None, "parent_id": None, "image": [image]}  # fmt: skip
    vector = {"sample_id": np.array([999]), "round": run.round, "encoder": scale.SPACE, "revision": "1",
              "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(9, np.float16)), 9)}  # fmt: skip
    parts = [part(store, "samples", at, sample), part(store, "embeddings", at, vector, embedding_schema(9))]
    seal(store, "more", parts, run.recipe.model_dump(mode="json"))


def test_vectors_of_two_lengths_are_refused(store: Path) -> None:
    run = measuring(store)
    longer(store, run)
    distance(run.base(), "reference")
    with pytest.raises(WinnowError, match="have (8 and 9|9 and 8) numbers"):
        distance(run)
    with pytest.raises(WinnowError, match="have 9 and 8 numbers"):
        similar(store, 999)


def test_a_sample_of_another_length_than_d0_is_named_and_explained(store: Path) -> None:
    run = measuring(store)
    longer(store, run.at(9))
    distance(run.base(), "reference")
    with pytest.raises(WinnowError, match=f"distance of round 9 of 'curated' to d0.*{scale.SPACE}.*9 columns where 8"):
        distance(run.at(9))
    assert explain(store, 999)["nearest"] == []
