"""``winnow explain``: one sample's story, from its prompt to its weight, for programs and for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curate.distance import METRICS, nearest
from jobs import samples
from jobs.distance import REFERENCE
from jobs.embed import vectors_of
from jobs.run import Run
from jobs.sealed import recipe_of, sample_row
from schemas.errors import WinnowError
from storage.layout import check
from storage.query import arrow

NEIGHBOURS = 3


def explain(store: Path, sample: int) -> dict[str, Any]:
    """Where a sample comes from, how it scored, why it was kept or dropped and what it weighs: ``sample`` (its row
    without the image), ``lineage`` (its ancestors, the parent first), ``refinement``, ``children``, ``scores`` with the
    rank within the prompt, ``distances``, ``nearest`` (rows of D_0, compared as by the first of the distances),
    ``selections``, ``shards``; and ``draft``, what early rejection decided of it, alone where that ended it."""
    draft = _draft(store, sample)
    if draft and not draft["kept"]:
        return {"draft": draft}
    row = sample_row(store, sample)
    run = Run(store, recipe_of(store, row))
    del row["image"]

    def asked(sql: str, **params: Any) -> list[dict[str, Any]]:
        return run.query(sql, id=sample, **params).to_pylist()

    distances = asked("SELECT space, metric, reference, value FROM distances WHERE sample_id = $id ORDER BY ALL")
    return {
        "sample": row,
        "draft": draft,
        "lineage": asked(
            "WITH RECURSIVE up AS (SELECT parent_id AS id, 1 AS steps FROM samples WHERE sample_id = $id UNION ALL "
            "SELECT parent_id, steps + 1 FROM up JOIN samples ON sample_id = up.id WHERE steps < 100) "
            "SELECT sample_id, round, seed, refiner FROM up JOIN samples ON sample_id = up.id ORDER BY steps"
        ),
        "refinement": next(iter(asked("SELECT * FROM refinements WHERE sample_id = $id")), None),
        "children": asked("SELECT sample_id, accepted FROM refinements WHERE parent_id = $id ORDER BY loop"),
        "scores": asked(
            "WITH mates AS (SELECT scorer, value, sample_id, count(*) OVER (PARTITION BY scorer) AS mates, "
            "rank() OVER (PARTITION BY scorer ORDER BY value DESC) AS rank FROM scores JOIN samples USING (sample_id) "
            "WHERE prompt_id = $prompt AND samples.round = $round AND arm = $arm AND split = $split) "
            "SELECT scorer, value, rank, mates FROM mates WHERE sample_id = $id ORDER BY scorer",
            prompt=row["prompt_id"], round=row["round"], arm=row["arm"], split=row["split"],
        ),
        "distances": distances,
        "nearest": _nearest(run, row, distances[0]) if distances else [],
        "selections": asked(
            "SELECT selection, round, kept, rank, weight, reason FROM selections WHERE sample_id = $id ORDER BY round"
        ),
        "shards": asked(
            "SELECT DISTINCT regexp_replace(path, '/[^/]*$', '') AS folder FROM shards JOIN selections "
            "USING (selection) WHERE sample_id = $id AND kept AND format = 'parquet' AND (shards.round = "
            "selections.round OR ($later AND shards.round > selections.round)) ORDER BY shards.round, folder",
            later=run.recipe.export.accumulate,
        ),
    }  # fmt: skip


def _nearest(run: Run, row: dict[str, Any], distance: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of D_0, or of its images of the same prompt, that lie nearest by the metric and in the space of a
    distance, where both are embedded."""
    sample, space = row["sample_id"], distance["space"]
    metric = distance["metric"].rpartition("-")[2]
    metric = metric if metric in METRICS else "l2"  # of Mahalanobis: it compares no two rows
    one = run.query("SELECT vector FROM embeddings WHERE sample_id = $id AND encoder = $e", id=sample, e=space)
    if not one.num_rows:
        return []
    try:
        numbers, reference = vectors_of(run.base(), space, "reference")
        if distance["reference"] != REFERENCE:
            mine = samples.of(run.base(), "reference")["prompt_id"].to_numpy() == row["prompt_id"]
            numbers, reference = numbers[mine], reference[mine]
        index, far = nearest(one["vector"].to_pylist(), reference, min(NEIGHBOURS + 1, len(reference)), metric)
    except WinnowError:  # no D_0, or of another revision of the encoder: 'winnow distance' says so, the rest is told
        return []
    near = [(int(numbers[i]), float(d)) for i, d in zip(index[0], far[0], strict=True) if numbers[i] != sample]
    prompts = run.query("SELECT sample_id, prompt FROM samples WHERE sample_id IN (SELECT unnest($ids))",
                        ids=[number for number, _ in near]).to_pylist()  # fmt: skip
    text = {row["sample_id"]: row["prompt"] for row in prompts}
    how = {"metric": metric, "space": space}
    return [{"sample_id": n, "distance": d, **how, "prompt": text[n]} for n, d in near[:NEIGHBOURS]]


def _draft(store: Path, sample: int) -> dict[str, Any] | None:
    """What early rejection decided of it, and its place among the images of its prompt; null where there was none."""
    found = arrow(
        check(store),
        "SELECT * FROM (SELECT *, count(*) OVER (PARTITION BY round, arm, prompt_id) AS n, rank() OVER (PARTITION BY "
        "round, arm, prompt_id ORDER BY value DESC NULLS LAST) AS place FROM drafts) WHERE sample_id = $id",
        {"id": sample},
    ).to_pylist()  # fmt: skip
    return found[0] if found else None


def _compared(draft: dict[str, Any]) -> str:
    value = "no number" if draft["value"] is None else f"{draft['value']:.4f}"
    return (
        f"early rejection after step {draft['step']}, by {draft['criterion']}: {value}, rank {draft['place']} of "
        f"{draft['n']} for its prompt; {'went on' if draft['kept'] else 'ended there'}, {draft['evaluations']} network "
        "evaluations"
    )


def words(story: dict[str, Any]) -> str:
    """The story as lines of text."""
    draft = story["draft"]
    if draft and not draft["kept"]:
        where = f"round {draft['round']}, arm {draft['arm']}"
        begun = f"candidate {draft['sample_id']} of {where}, begun from seed {draft['seed']}, never finished"
        return "\n".join([begun, f"prompt: {draft['prompt']}", _compared(draft)])
    row = story["sample"]
    lines = [
        f"sample {row['sample_id']}: {row['width']}×{row['height']}, {row['split']} sample of round {row['round']}, "
        f"arm {row['arm']}",
        f"prompt: {row['prompt']}",
        f"made by {row['model']} from seed {row['seed']}"
        + (f", attempt {row['attempt'] + 1}" if row["attempt"] else "")
        + (f", refined from {row['parent_id']} by {row['refiner']}" if row["parent_id"] else ""),
    ]
    lines += [_compared(draft)] if draft else []
    if len(story["lineage"]) > 1:
        lines.append(f"lineage: {' ← '.join(str(one['sample_id']) for one in story['lineage'])}")
    if (note := story["refinement"]) is not None:
        change = ""
        if note["score_after"] is not None:
            change = f"; {note['scorer']}: {note['score_before']:.4f} → {note['score_after']:.4f}"
        lines.append(
            f"refinement, loop {note['loop']}: {note['mask']}, level {note['level']:.3f}, {note['evaluations']} "
            f"network evaluations{change}; {'accepted' if note['accepted'] else 'not accepted'}"
        )
    if children := story["children"]:
        names, taken = ", ".join(str(one["sample_id"]) for one in children), sum(one["accepted"] for one in children)
        lines.append(f"refined into {names}: {taken} of {len(children)} accepted")
    for one in story["scores"]:
        lines.append(
            f"score {one['scorer']}: {one['value']:.4f}, rank {one['rank']} of {one['mates']} for its prompt"
        )
    for one in story["distances"]:
        lines.append(f"distance to {one['reference']} in {one['space']}: {one['value']:.4f} ({one['metric']})")
    if story["nearest"]:
        near = ", ".join(f"{one['sample_id']} ({one['distance']:.4f})" for one in story["nearest"])
        lines.append(f"nearest in {story['distances'][0]['reference']} by {story['nearest'][0]['metric']}: {near}")
    for one in story["selections"]:
        what = f"kept with weight {one['weight']:.4f}" if one["kept"] and one["weight"] is not None else (
            "kept, not weighed yet" if one["kept"] else f"dropped: {one['reason']}"
        )  # fmt: skip
        lines.append(f"selection {one['selection']}, round {one['round']}: {what}")
    if story["shards"]:
        lines.append(f"trained on in {', '.join(one['folder'] for one in story['shards'])}")
    return "\n".join(lines)
