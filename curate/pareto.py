"""Which samples are outdone: another of their prompt is as good by every scorer and better by one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from curate.arrays import Floats, Ints


def beaten_by(columns: Floats, code: Ints, ids: NDArray) -> Ints:
    """For each row of columns [N, S], higher is better, a row of its group [N] that outdoes it: [N], -1 for none.

    The row named is on the front itself, and ids [N] break ties, so that the order of the rows never matters.
    """
    # From the highest first column down, ties by the next: whoever outdoes a row comes before it, and someone on the
    # front outdoes it too, so that a row is compared with the front alone.
    order = np.lexsort((ids, *(-columns[:, j] for j in reversed(range(columns.shape[1]))), code))
    result = np.full(len(code), -1, np.int64)
    for rows in np.split(order, np.flatnonzero(np.diff(code[order])) + 1):
        values = columns[rows]
        front = [0]
        for i in range(1, len(rows)):
            ahead = values[front]
            beats = (ahead >= values[i]).all(axis=1) & (ahead > values[i]).any(axis=1)
            first = int(beats.argmax())
            if beats[first]:
                result[rows[i]] = rows[front[first]]
            else:
                front.append(i)
    return result
