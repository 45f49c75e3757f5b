"""What the network's evaluations are spent on, one method a row of the table, at equal budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STEPS = 8  # of one pass
LOOK = 10  # evaluations of the scorer guidance-gap: two at each of five levels
CLIP, GAP = "scene-clip", "guidance-gap:embedded"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """``sampling``: settings of ``generate``; of a prompt's images the best by ``pick`` among the ``first`` is taken
    (null: the only one), and ``refine`` is what it then goes through. ``budget``: evaluations a sample, at most."""

    name: str
    budget: int
    sampling: Settings = field(default_factory=dict)
    first: int = 1
    pick: str | None = None
    refine: Settings | None = None


def _early(n: int, keep: int, at: float, by: str = CLIP, **more: Any) -> Settings:
    return {"images_per_prompt": n, "reject": {"at": at, "keep": keep, "by": by}, **more}


def _refined(level: float, steps: int, accept: str = "always", loops: int = 1) -> Settings:
    return {"level": level, "steps": steps, "accept": accept, "loops": loops, "scorer": CLIP, "batch": 192}


GUIDED = {"guidance": 2.0}  # two evaluations a step
#: One store holds the images of the plain methods: a smaller N looks at the first of them.
MANY = {"images_per_prompt": 8}
ONE = Method("one pass", STEPS, MANY)
METHODS = (
    ONE,
    # 32 evaluations
    Method("best of 4", 32, MANY, 4, CLIP),  # first: the others are compared with it
    Method("more steps: 32", 32, {"images_per_prompt": 1, "steps": 32}),
    *(Method(f"best of 3 + refine, level {level}", 32, MANY, 3, CLIP, _refined(level, round(STEPS / level)))
      for level in (0.25, 0.5, 0.75)),
    Method("best of 3 + refine, level 0.5, if better", 32, MANY, 3, CLIP, _refined(0.5, 16, "better")),
    Method("early rejection: 1 of 7 after 4 steps", 32, _early(7, 1, 0.5)),
    Method("early rejection: 1 of 13 after 2 steps", 32, _early(13, 1, 0.25)),
    Method("early rejection: 2 of 6 after 4 steps, then the best", 32, _early(6, 2, 0.5), 2, CLIP),
    Method("early rejection: 1 of 5 after 4 steps + refine, level 0.5, if better", 32, _early(5, 1, 0.5),
           refine=_refined(0.5, 16, "better")),
    Method("guided, more steps: 16", 32, {"images_per_prompt": 1, "steps": 16, **GUIDED}),
    Method("guided, best of 2", 32, {"images_per_prompt": 2, **GUIDED}, 2, CLIP),
    Method("guided, early rejection by the largest gap: 1 of 3 after 4 steps", 32,
           _early(3, 1, 0.5, "largest-gap", **GUIDED)),
    Method("guided, early rejection by the smallest gap: 1 of 3 after 4 steps", 32,
           _early(3, 1, 0.5, "smallest-gap", **GUIDED)),
    Method("guided, early rejection by scene-clip: 1 of 3 after 4 steps", 32, _early(3, 1, 0.5, **GUIDED)),
    # 64 evaluations
    Method("best of 8", 64, MANY, 8, CLIP),
    Method("more steps: 64", 64, {"images_per_prompt": 1, "steps": 64}),
    Method("best of 3 by the guidance gap", 64, MANY, 3, GAP),
    Method("best of 7 + refine, level 0.5", 64, MANY, 7, CLIP, _refined(0.5, 16)),
    Method("best of 7 + refine, level 0.5, if better", 64, MANY, 7, CLIP, _refined(0.5, 16, "better")),
    Method("best of 4 + refine, level 0.5, 4 loops, if better", 64, MANY, 4, CLIP, _refined(0.5, 16, "better", 4)),
    Method("early rejection: 2 of 14 after 4 steps, then the best", 64, _early(14, 2, 0.5), 2, CLIP),
    Method("guided, early rejection by the largest gap: 1 of 7 after 4 steps", 64,
           _early(7, 1, 0.5, "largest-gap", **GUIDED)),
)  # fmt: skip
#: What a budget's other rows are compared with, beside one pass.
BEST = {32: "best of 4", 64: "best of 8"}
