"""Which samples a stage works on: those of one round, arm and split, without and with their images."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from jobs.run import Run
from schemas.errors import WinnowError
from storage.query import arrow
from storage.snapshot import Snapshot, latest

#: The folder of parts over samples that were refined from others.
CHILDREN = {"from": "refine"}


def of(run: Run, split: str, snapshot: Snapshot | None = None) -> pa.Table:
    """sample_id, prompt_id, prompt, seed, parent_id of the run's samples in a fixed order, as of a snapshot (null: the
    newest); WinnowError where there are none."""
    found = arrow(
        run.store,
        "SELECT sample_id, prompt_id, prompt, seed, parent_id FROM samples WHERE round = $round AND arm = $arm "
        "AND split = $split ORDER BY prompt_id, sample_id",
        {"round": run.round, "arm": run.arm, "split": split},
        (snapshot or latest(run.store)).of_round(run.round),
    )  # fmt: skip
    if not found.num_rows:
        raise WinnowError(
            f"samples: round {run.round} of arm {run.arm!r} has no {split} samples; run 'winnow generate"
            f"{'' if split == 'train' else f' --split {split}'}' first"
        )
    return found


def sets(run: Run, split: str) -> list[tuple[dict[str, str], pa.Table]]:
    """The rows of ``of`` in the sets that became samples one after the other, those that were sampled and their refined
    children, each with the folders that its parts have beyond the usual: what was made of the first set stays as it is
    when the second comes."""
    rows = of(run, split)
    child = rows["parent_id"].is_valid()
    both = [({}, rows.filter(pc.invert(child))), (CHILDREN, rows.filter(child))]
    return [(folders, some) for folders, some in both if some.num_rows]


def with_images(run: Run, rows: pa.Table, snapshot: Snapshot | None = None) -> pa.Table:
    """The same rows, in the same order, with their image files, as of a snapshot (null: the newest). Rows of other
    rounds than the run's say which in a ``round`` column: row groups of the rest are not read."""
    wanted = rows["sample_id"]
    rounds = sorted(set(rows["round"].to_pylist())) if "round" in rows.column_names else [run.round]
    found = arrow(
        run.store,
        "SELECT sample_id, image FROM samples WHERE round BETWEEN $first AND $last "
        "AND sample_id IN (SELECT unnest($ids))",
        {"first": rounds[0], "last": rounds[-1], "ids": wanted.to_pylist()}, snapshot,
    )  # fmt: skip
    place = {number: i for i, number in enumerate(found["sample_id"].to_pylist())}
    # One slice a row, no copy: taking them would put all into one chunk, whose 32-bit offsets end at 2 GB.
    images = found["image"]
    slices = [images.slice(place[number], 1).chunk(0) for number in wanted.to_pylist()]
    return rows.append_column("image", pa.chunked_array(slices, images.type))
