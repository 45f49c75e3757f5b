"""What the studies ask: which arms are compared, over how many rounds, beside which figure of the RSIDiff paper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jobs.recipe import merge
from schemas.errors import WinnowError

Changes = dict[str, Any]

#: The embedded default with three fifths of its candidates and half its steps, so that many arms can be compared.
SMALL: Changes = {
    "generate": {"images_per_prompt": 20},
    "select": {"keep": 5},
    "train": {"steps": 425},
    "evaluate": {"images_per_prompt": 20},
}
NO_PREFERENCE: Changes = {"select": {"policy": "random"}}
NO_WEIGHTS: Changes = {"weigh": {"by": "nothing"}}
FEW_PROMPTS: Changes = {"generate": {"prompts": 36, "images_per_prompt": 80}, "select": {"keep": 20}}
QUOTA: Changes = {"select": {"policy": "diverse", "space": "scene-clip", "budget": 720}}
NEON: Changes = {"train": {"neon": 0.1, "neon_on": "candidates"}}
REPLACE: Changes = {"export": {"accumulate": False}}
REAL: Changes = {"reference": {"source": "embedded", "images_per_prompt": 16}}
QUARTER: Changes = {**REAL, "export": {"reference_share": 0.25}}
AS_MANY: Changes = {**REAL, "export": {"reference_share": 1.0}}
AFRESH: Changes = merge(AS_MANY, REPLACE)
TWICE_AFRESH: Changes = merge(AFRESH, {"export": {"reference_share": 2.0}})
LONGER: Changes = {"train": {"steps": 1700}}
REAL_ALONE: Changes = {
    **NO_WEIGHTS, **REPLACE, "generate": {"source": "embedded"}, "select": {"policy": "random", "keep": 16},
}  # fmt: skip
FEW_BESIDE: Changes = {  # all of them, where 5 are selected of each prompt
    "reference": {"source": "embedded", "images_per_prompt": 1}, "export": {"reference_share": 0.2},
}  # fmt: skip
FEW_AFRESH: Changes = merge(FEW_BESIDE, REPLACE)
FEW_ALONE: Changes = merge(REAL_ALONE, {"generate": {"source_limit": 1}})


@dataclass(frozen=True)
class Study:
    """``arms``: by name what each changes in the recipe, once ``common`` has; the first is what the others are compared
    with. ``paper``: what RSIDiff (arXiv 2502.09963) found where it asked the same."""

    question: str
    paper: str
    arms: dict[str, Changes]
    rounds: int = 3
    common: Changes = field(default_factory=lambda: SMALL)


STUDIES = {
    "ablation": Study(
        "What does each part do?",
        "Figure 7: the whole is best, removing any one part costs much, and without all three the model falls below "
        "the base. Its poorer prompts are templates of one concept; here they are a quarter of the captions, four "
        "times as often, since the embedded captions are made and there is nothing to filter.",
        {
            "all": {}, "few prompts": FEW_PROMPTS, "no preference": NO_PREFERENCE, "no weights": NO_WEIGHTS,
            "none": {**FEW_PROMPTS, **NO_PREFERENCE, **NO_WEIGHTS},
        },
    ),
    "size": Study(
        "How many samples should a round select?",
        "Figure 8, of 5,000: 300 beat 100; 1,000 and 2,000 lead at first, slow down after round 3 and may decline.",
        {"5 of 20": {}, "1 of 20": {"select": {"keep": 1}}, "2 of 20": {"select": {"keep": 2}},
         "10 of 20": {"select": {"keep": 10}}},
    ),
    "weights": Study(
        "How far from D₀ may a sample be, and how fast does its weight fall beyond?",
        "Figures 10 and 11: performance varies with β and σ²; β = 35 and σ² = 2 of its distance are best.",
        {
            "β at 90 %": {}, "β at 50 %": {"weigh": {"quantile": 0.5}}, "β at 98 %": {"weigh": {"quantile": 0.98}},
            "σ² = 0.01": {"weigh": {"sigma2": 0.01}}, "σ² = 1": {"weigh": {"sigma2": 1.0}},
        },
    ),
    "accumulation": Study(
        "Train on the selections of all rounds, or on the last one alone?",
        "Not asked: each of its rounds trains on its own selection.",
        {"accumulate": {}, "replace": REPLACE},
    ),
    "reference": Study(
        "Does a share of D₀ beside the selection help?",
        "Not asked: its rounds train on the selection alone.",
        {"0": {}, **{f"{share:g}": {"export": {"reference_share": share}} for share in (0.25, 0.5, 1.0)}},
    ),
    "mix": Study(
        "What would another choice do in the place of one of the default's?",
        "Not asked.",
        {
            "the default": {}, "a quota for each cluster": QUOTA, "Neon, w = 0.1": NEON,
            "a quota, and Neon": {**QUOTA, **NEON},
            "any 5 of the better half": {"select": {"policy": "quantile_band"}},
            "any 5 above a floor": {"select": {"policy": "random", "floors": {"scene-clip": 0.88}}},
            "Neon, w = 0.5": {"train": {"neon": 0.5, "neon_on": "candidates"}},
            "even sampling steps": {"generate": {"shift": None}}, "twice the training": {"train": {"steps": 850}},
        },
    ),
    "real": Study(
        "What do real scenes, of the handwriting that the base was trained on, add to eight rounds?",
        "Not asked: its rounds see no real image.",
        {
            "the default": {}, "a quarter": QUARTER, "as many": AS_MANY, "as many, replace": AFRESH,
            "as many, no preference": {**AS_MANY, **NO_PREFERENCE, **NO_WEIGHTS}, "real scenes alone": REAL_ALONE,
        },
        rounds=8,
    ),
    "few": Study(
        "What do real scenes add to eight rounds, where there is one for each caption?",
        "Not asked: its rounds see no real image.",
        {"the default": {}, "all of them": FEW_BESIDE, "all of them, replace": FEW_AFRESH,
         "real scenes alone": FEW_ALONE},
        rounds=8,
    ),
    "whole": Study(
        "How near to real handwriting do eight rounds of the whole size come, with real scenes?",
        "Not asked: its rounds see no real image.",
        {"as many, replace": AFRESH, "real scenes alone": REAL_ALONE,
         "as many, replace, twice the training": merge(AFRESH, LONGER),
         "twice as many, replace, twice the training": merge(TWICE_AFRESH, LONGER),
         "real scenes alone, twice the training": merge(REAL_ALONE, LONGER)},
        rounds=8,
        common={},
    ),
}  # fmt: skip


#: All that ``winnow study`` knows; "effect" compares no arms, and plays the embedded default itself.
NAMES = ("effect", *STUDIES)


def named(name: str) -> Study:
    if name not in STUDIES:
        raise WinnowError(f"study {name!r}: unknown; there are {', '.join(NAMES)}")
    return STUDIES[name]
