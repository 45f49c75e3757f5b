"""Which samples a stage works on: those of one round, arm and split, without and with their images."""

from __future__ import annotations

import pyarrow as pa

from jobs.run import Run
from schemas.errors import WinnowError


def of(run: Run, split: str) -> pa.Table:
    """sample_id, prompt_id, prompt of the run's samples in a fixed order; WinnowError where there are none."""
    found = run.query(
        "SELECT sample_id, prompt_id, prompt FROM samples WHERE round = $round AND arm = $arm AND split = $split "
        "ORDER BY prompt_id, sample_id",
        round=run.round, arm=run.arm, split=split,
    )  # fmt: skip
    if not found.num_rows:
        raise WinnowError(
            f"samples: round {run.round} of arm {run.arm!r} has no {split} samples; run 'winnow generate' first"
        )
    return found


def with_images(run: Run, rows: pa.Table) -> pa.Table:
    """The same rows, in the same order, with their image files."""
    wanted = rows["sample_id"]
    found = run.query(
        "SELECT sample_id, image FROM samples WHERE sample_id IN (SELECT unnest($ids))", ids=wanted.to_pylist()
    )
    place = {number: i for i, number in enumerate(found["sample_id"].to_pylist())}
    order = [place[number] for number in wanted.to_pylist()]
    return rows.append_column("image", found["image"].take(pa.array(order)))
