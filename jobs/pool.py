"""The pool of a round's candidates as one relation, for conditions and queries that people write in SQL."""

from __future__ import annotations

import pyarrow as pa

from jobs.run import Run
from storage.query import arrow, user_query
from storage.snapshot import Snapshot
from storage.views import identifier, literal

SECONDS = 60  # that a user's query may take


def scorers(run: Run, snapshot: Snapshot | None = None) -> list[str]:
    """The scorers that the round's candidates have scores of."""
    return arrow(
        run.store,
        "SELECT DISTINCT scorer FROM scores JOIN samples USING (sample_id) WHERE samples.round = $round AND arm = $arm "
        "AND split = 'train' ORDER BY scorer", {"round": run.round, "arm": run.arm}, snapshot,
    )["scorer"].to_pylist()  # fmt: skip


def pool(run: Run, found: list[str], where: str = "true") -> str:
    """SQL of the candidates: the columns of ``samples`` without the image, ``category`` and ``cluster`` of the prompt,
    ``distance``, and for each scorer of ``found`` its score, "NAME", and the place by it among the images of the
    prompt, "rank:NAME"; NULL where there is none."""
    values = [f"max(value) FILTER (WHERE scorer = {literal(name)}) AS {identifier(name)}" for name in found]
    places = [
        f"CASE WHEN {identifier(name)} IS NOT NULL THEN rank() OVER (PARTITION BY prompt_id ORDER BY "
        f"{identifier(name)} DESC NULLS LAST) END AS {identifier('rank:' + name)}"
        for name in found
    ]
    columns = ["samples.* EXCLUDE (image)", "category", "cluster", "distance", *map(identifier, found), *places]
    far = run.recipe.distance
    return (
        f"SELECT {', '.join(columns)} FROM samples "
        "LEFT JOIN (SELECT prompt_id, category, cluster FROM prompts) USING (prompt_id) "
        f"LEFT JOIN (SELECT {', '.join(['sample_id', *values])} FROM scores GROUP BY sample_id) USING (sample_id) "
        "LEFT JOIN (SELECT sample_id, max(value) AS distance FROM distances WHERE "
        f"space = {literal(far.space or '')} AND metric = {literal(far.name)} GROUP BY sample_id) USING (sample_id) "
        f"WHERE samples.round = {run.round} AND arm = {literal(run.arm)} AND split = 'train' AND {where}"
    )


def ask(run: Run, sql: str, snapshot: Snapshot | None = None) -> pa.Table:
    """The answer to a query with what a user wrote in it: in the sandbox, WinnowError for what it refuses."""
    return user_query(run.store, sql, snapshot, seconds=SECONDS)
