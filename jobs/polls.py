"""What people's votes amount to, for the report."""

from __future__ import annotations

from typing import Any

from jobs.summary import Source
from jobs.votes import KEEP


def polls(source: Source) -> list[dict[str, Any]]:
    """A question each: how many ``votes`` of how many ``voters`` stand, ``undecided`` ones among them, the ``rates`` of
    win_rates (each pair once, from the winner's side) and the newest ``strengths``. Of picks, only the counts."""
    counts = source.rows(
        "SELECT question, count(*) AS votes, count(DISTINCT voter) AS voters, count_if(choice = 'skip') AS undecided, "
        "count_if(choice = 'keep') AS kept FROM opinions GROUP BY question ORDER BY question"
    )
    rates = source.rows(
        "SELECT * FROM win_rates WHERE rate > 0.5 OR (rate = 0.5 AND contestant < opponent) "
        "ORDER BY rate DESC, contestant, opponent"
    )
    strengths = source.rows("SELECT * FROM strengths ORDER BY strength DESC, contestant")
    return [
        count | {"picks": count["question"] == KEEP,
                 "rates": [row for row in rates if row["question"] == count["question"]],
                 "strengths": [row for row in strengths if row["question"] == count["question"]]}
        for count in counts
    ]  # fmt: skip
