"""What the rounds of a store chose from: galleries, histograms and the lineage of a sample, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate import weigh as law
from jobs import plots
from jobs.recipe import Recipe
from jobs.run import BASE
from jobs.select import fuse, selecting
from jobs.summary import Source

TILES = 6  # in a shelf of a gallery


def selected(source: Source, arm: str | None) -> list[int]:
    """The rounds in which an arm has selected."""
    found = source.rows("SELECT DISTINCT round FROM selections WHERE selection = $arm ORDER BY round", arm=arm)
    return [row["round"] for row in found]


@dataclass(frozen=True)
class Candidates:
    """What a round chose from: the rows of its selection, and their selection score where there is one."""

    round: int
    rows: pa.Table
    score: np.ndarray | None

    def gallery(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Shelves of tiles: best, median and worst by the selection score, rejects with their reasons, and refined
        images beside what they were refined from."""
        kept = self.rows["kept"].to_numpy(zero_copy_only=False)
        if self.score is None:
            first = np.flatnonzero(kept)[:TILES]
            shelves = [("kept", first)]
        else:
            order = np.argsort(-self.score, kind="stable")
            middle = max(0, len(order) // 2 - TILES // 2)
            shelves = [("best", order[:TILES]), ("median", order[middle : middle + TILES]), ("worst", order[-TILES:])]
        reasons: dict[str, int] = {}
        rejected = np.flatnonzero(~kept)
        for i in rejected:  # one of each reason first, then more of them in the order of their ids
            reasons.setdefault(self.rows["reason"][int(i)].as_py(), int(i))
        first_of_each = list(reasons.values())
        more = [int(i) for i in rejected[: 2 * TILES] if int(i) not in first_of_each]
        shelves.append(("rejected", np.asarray([*first_of_each, *more][:TILES], int)))
        shelves.append(("refined", self._refined()))
        return [(name, [self.tile(int(i)) for i in places]) for name, places in shelves if len(places)]

    def _refined(self) -> np.ndarray:
        """Pairs of rows, before and after, those with the largest gain of the refinement's scorer first."""
        parents = {number: i for i, number in enumerate(self.rows["sample_id"].to_pylist())}
        pairs = [
            (-(row["score_after"] or 0) + (row["score_before"] or 0), parents[row["parent_id"]], i)
            for i, row in enumerate(self.rows.select(["parent_id", "score_before", "score_after"]).to_pylist())
            if row["parent_id"] in parents
        ]
        return np.asarray([i for _, *pair in sorted(pairs)[: TILES // 2] for i in pair], int)

    def tile(self, i: int) -> dict[str, Any]:
        return self.rows.slice(i, 1).to_pylist()[0] | {"score": None if self.score is None else float(self.score[i])}


def candidates(source: Source, recipe: Recipe | None, arm: str, number: int) -> Candidates:
    """The candidates of one round of an arm."""
    rows = source.table(
        "SELECT sample_id, prompt_id, prompt, kept, rank, weight, selections.reason, measured.value AS distance, "
        "samples.parent_id, mask, level, loop, scorer, score_before, score_after, accepted "
        "FROM selections JOIN samples USING (sample_id) LEFT JOIN refinements USING (sample_id) "
        "LEFT JOIN (SELECT sample_id, value FROM distances WHERE space = $space AND metric = $metric) AS measured "
        "USING (sample_id) WHERE selection = $arm AND selections.round = $round ORDER BY sample_id",
        arm=arm, round=number, space=recipe.distance.space if recipe else None,
        metric=recipe.distance.name if recipe else None,
    )  # fmt: skip
    return Candidates(number, rows, _selection_score(source, recipe, rows))


def _selection_score(source: Source, recipe: Recipe | None, rows: pa.Table) -> np.ndarray | None:
    """The number that the selection went by: one scorer's, or several fused; None where not all rows have it."""
    if recipe is None or not recipe.select.reads_scores:
        return None
    columns = []
    for scorer in selecting(recipe):
        found = source.table(
            "SELECT sample_id, value FROM scores WHERE scorer = $scorer AND sample_id IN (SELECT unnest($ids))",
            scorer=scorer, ids=rows["sample_id"].to_pylist(),
        ).sort_by("sample_id")  # fmt: skip
        if not found.num_rows or found.num_rows != rows.num_rows:
            return None
        columns.append(found["value"].to_numpy())
    return fuse(recipe.select, columns, rows["prompt_id"].to_numpy()) if columns else None


def histograms(source: Source, recipe: Recipe | None, chosen: list[Candidates]) -> list[tuple[int, list[str]]]:
    """By round: scores of the kept and the dropped, weights of the kept, distances beside D_0's own."""
    own = np.empty(0)
    if recipe and recipe.distance.space:
        own = source.table(
            "SELECT value FROM distances JOIN samples USING (sample_id) WHERE arm = $base AND split = 'reference' "
            "AND space = $space AND metric = $metric",
            base=BASE, space=recipe.distance.space, metric=recipe.distance.name,
        )["value"].to_numpy()  # fmt: skip
    beta = None
    if recipe and recipe.weigh.by == "distance":
        beta = recipe.weigh.beta
        beta = law.threshold(own, recipe.weigh.quantile) if beta is None and len(own) else beta
    by_round = []
    for one in chosen:
        kept = one.rows["kept"].to_numpy(zero_copy_only=False)
        distance = one.rows["distance"].to_numpy(zero_copy_only=False).astype(float)
        weight = one.rows["weight"].to_numpy(zero_copy_only=False).astype(float)[kept]
        charts = []
        if one.score is not None:
            groups = [("kept", one.score[kept]), ("dropped", one.score[~kept])]
            charts.append(plots.histogram("Selection score", f"round {one.round}", groups))
        if np.isfinite(weight).any():
            groups = [("kept", weight)]
            charts.append(plots.histogram("Training weight", f"round {one.round}, of the kept", groups))
        if np.isfinite(distance).any():
            groups = [("kept", distance[kept]), ("D₀ to itself", own)]
            mark = None if beta is None else ("β", beta)
            subtitle = f"round {one.round}" + ("" if beta is None else "; full weight up to β")
            charts.append(plots.histogram("Distance to D₀", subtitle, groups, mark))
        if charts:
            by_round.append((one.round, charts))
    return by_round


def lineage(source: Source, chosen: list[Candidates]) -> dict[str, Any] | None:
    """All that led to one kept sample: the best scored one of the newest round."""
    for one in reversed(chosen):
        kept = np.flatnonzero(one.rows["kept"].to_numpy(zero_copy_only=False))
        if len(kept):
            best = kept[0] if one.score is None else kept[np.argmax(one.score[kept])]
            tile = one.tile(int(best))
            number = tile["sample_id"]
            [row] = source.rows("SELECT * EXCLUDE (image) FROM samples WHERE sample_id = $id", id=number)
            scores = source.rows("SELECT scorer, value FROM scores WHERE sample_id = $id ORDER BY scorer", id=number)
            return {"sample": row | tile | {"round": row["round"]}, "selected_in": one.round, "scores": scores,
                    "parents": _parents(source, row["parent_id"])}  # fmt: skip
    return None


def _parents(source: Source, parent: int | None) -> list[int]:
    chain: list[int] = []
    while parent is not None and parent not in chain and len(chain) < 20:
        chain.append(parent)
        found = source.rows("SELECT parent_id FROM samples WHERE sample_id = $id", id=parent)
        parent = found[0]["parent_id"] if found else None
    return chain
