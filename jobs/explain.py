"""``winnow explain``: one sample's story, from its prompt to its weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.distance import REFERENCE
from jobs.embed import vectors_of
from jobs.run import Run
from jobs.sealed import recipe_of, sample_row
from storage.layout import check
from storage.query import arrow


def explain(store: Path, sample: int) -> str:
    """Lines that tell where a sample comes from, how it scored, why it was kept or dropped and what it weighs."""
    draft = _draft(store, sample)
    if draft and not draft["kept"]:
        where = f"round {draft['round']}, arm {draft['arm']}"
        begun = f"candidate {sample} of {where}, begun from seed {draft['seed']}, never finished"
        return "\n".join([begun, f"prompt: {draft['prompt']}", _compared(draft)])
    row = sample_row(store, sample)
    run = Run(store, recipe_of(store, row))
    lines = [
        f"sample {sample}: {row['width']}×{row['height']}, {row['split']} sample of round {row['round']}, "
        f"arm {row['arm']}",
        f"prompt: {row['prompt']}",
        f"made by {row['model']} from seed {row['seed']}"
        + (f", attempt {row['attempt'] + 1}" if row["attempt"] else "")
        + (f", refined from {row['parent_id']} by {row['refiner']}" if row["parent_id"] else ""),
    ]
    lines += [_compared(draft)] if draft else []
    lines += _refinement(run, sample)
    for score in run.query(
        "WITH mates AS (SELECT scorer, value, sample_id, count(*) OVER (PARTITION BY scorer) AS n, "
        "rank() OVER (PARTITION BY scorer ORDER BY value DESC) AS place FROM scores JOIN samples USING (sample_id) "
        "WHERE prompt_id = $prompt AND samples.round = $round AND arm = $arm AND split = $split) "
        "SELECT * FROM mates WHERE sample_id = $id ORDER BY scorer",
        id=sample, prompt=row["prompt_id"], round=row["round"], arm=row["arm"], split=row["split"],
    ).to_pylist():  # fmt: skip
        place = f"rank {score['place']} of {score['n']} for its prompt"
        lines.append(f"score {score['scorer']}: {score['value']:.4f}, {place}")
    for far in run.query("SELECT * FROM distances WHERE sample_id = $id", id=sample).to_pylist():
        lines.append(f"distance to {far['reference']} in {far['space']}: {far['value']:.4f} ({far['metric']})")
    lines += _neighbours(run, sample, row)
    for choice in run.query("SELECT * FROM selections WHERE sample_id = $id", id=sample).to_pylist():
        what = f"kept with weight {choice['weight']:.4f}" if choice["kept"] and choice["weight"] is not None else (
            "kept, not weighed yet" if choice["kept"] else f"dropped: {choice['reason']}"
        )  # fmt: skip
        lines.append(f"selection {choice['selection']}, round {choice['round']}: {what}")
    for shard in run.query(
        "SELECT path FROM shards JOIN selections USING (selection, round) WHERE sample_id = $id AND kept "
        "AND format = 'parquet'", id=sample,
    ).to_pylist():  # fmt: skip
        lines.append(f"trained on in {shard['path'].rsplit('/', 1)[0]}")
        break
    return "\n".join(lines)


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


def _refinement(run: Run, sample: int) -> list[str]:
    """How it was refined from its parent, and whether that was accepted; and how many children it has itself."""
    lines = []
    for note in run.query("SELECT * FROM refinements WHERE sample_id = $id", id=sample).to_pylist():
        change = ""
        if note["score_after"] is not None:
            change = f"; {note['scorer']}: {note['score_before']:.4f} → {note['score_after']:.4f}"
        lines.append(
            f"refinement, loop {note['loop']}: {note['mask']}, level {note['level']:.3f}, {note['evaluations']} "
            f"network evaluations{change}; {'accepted' if note['accepted'] else 'not accepted'}"
        )
    for children in run.query(
        "SELECT count(*) AS n, count_if(accepted) AS taken, string_agg(sample_id, ', ' ORDER BY loop) AS names "
        "FROM refinements WHERE parent_id = $id HAVING n > 0", id=sample,
    ).to_pylist():  # fmt: skip
        lines.append(f"refined into {children['names']}: {children['taken']} of {children['n']} accepted")
    return lines


def _neighbours(run: Run, sample: int, row: dict[str, object]) -> list[str]:
    """The samples of D_0 that lie nearest, where both are embedded."""
    from curate.distance import nearest

    space = run.recipe.distance.space
    one = run.query("SELECT vector FROM embeddings WHERE sample_id = $id AND encoder = $e", id=sample, e=space or "")
    if not one.num_rows:
        return []
    numbers, reference = vectors_of(run.base(), str(space), "reference")
    index, far = nearest(one["vector"].to_pylist(), reference, k=min(3, len(reference)))
    near = ", ".join(f"{numbers[i]} ({d:.4f})" for i, d in zip(index[0], far[0], strict=True))
    return [f"nearest in {REFERENCE}: {near}"]
