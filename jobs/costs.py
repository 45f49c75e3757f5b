"""What a run cost: the time of its stages, the rows and bytes of its tables."""

from __future__ import annotations

from typing import Any

from storage.snapshot import Snapshot

MANY = ("score", "embed")  # stages that are sealed once for each model that they use


def by_stage(snapshot: Snapshot) -> dict[str, dict[str, float]]:
    """By stage, the longest first, and arm: the seconds that all rounds took; {} where the store does not say."""
    took: dict[str, dict[str, float]] = {}
    for spent in snapshot.spent:
        name = spent.stage.partition(" ")[0]
        arms = took.setdefault(name if name in MANY else spent.stage, {})
        arms[spent.arm] = arms.get(spent.arm, 0.0) + spent.seconds
    longest = sorted(took, key=lambda stage: (-sum(took[stage].values()), stage))
    return {stage: {arm: round(seconds, 3) for arm, seconds in sorted(took[stage].items())} for stage in longest}


def by_table(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """By table, the largest first: ``parts``, ``rows`` and ``bytes``."""
    held: dict[str, dict[str, Any]] = {}
    for part in snapshot.parts:
        table = held.setdefault(part.table, {"parts": 0, "rows": 0, "bytes": 0})
        table["parts"] += 1
        table["rows"] += part.rows
        table["bytes"] += part.bytes
    return dict(sorted(held.items(), key=lambda item: (-item[1]["bytes"], item[0])))
