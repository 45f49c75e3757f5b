"""``winnow tournament``: several policies over the same candidates, compared before a GPU-hour is spent on any."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curate import weigh as law
from curate.drift import frechet_distance
from curate.overlap import overlaps, spread
from jobs import samples
from jobs.distance import distances_of
from jobs.embed import vectors_of
from jobs.run import Run, ids
from jobs.score import scores_of
from jobs.select import decide, needed, picked
from jobs.weigh import by_advantage, scale_of
from schemas.errors import WinnowError, about
from schemas.settings import Settings

OWN = "recipe"  # the policy of the recipe itself


class Tournament(Settings):
    """``policies``: by name, what each has otherwise in ``select``; {}: the recipe's own beside the usual ones, each
    with as large a budget as that one keeps."""

    policies: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names(self) -> Tournament:
        if OWN in self.policies:
            raise WinnowError(f"tournament.policies {OWN!r}: the recipe's own has that name; take another")
        return self


def tournament(run: Run, names: tuple[str, ...] = ()) -> pa.Table:
    """One row a policy, nothing of it kept in the store; ``names``: those to compare, the recipe's own always among
    them.

    kept, prompts: how many samples, of how many prompts; ess: their effective sample size under the recipe's weights,
    NULL where all of those vanish; distance: their mean distance to D_0; fd_d0: the Fréchet distance; spread: their
    variance in that space (or else that of ``select``, or the first encoder's), where all candidates have 1;
    score:NAME: their mean score; all of these NULL of a single sample or none. overlap: by policy the share of samples
    in common (Jaccard).
    """
    rows = samples.of(run, "train")
    own = _decided(run, OWN, {}, rows)
    entered = run.recipe.tournament.policies or usual(run, max(1, int(own.sum())))
    unknown = [name for name in names if name not in (*entered, OWN)]
    if unknown:
        raise WinnowError(f"policy {unknown[0]!r}: not in the tournament; there are {', '.join([OWN, *entered])}")
    kept = {OWN: own}
    kept |= {name: _decided(run, name, entered[name], rows) for name in entered if name in (names or entered)}
    shared = overlaps(np.stack(list(kept.values())))
    measured = _measures(run, rows)
    return pa.Table.from_pylist([
        {"policy": name, "kept": int(mask.sum()), "prompts": len(np.unique(rows["prompt_id"].to_numpy()[mask])),
         **{key: measure(mask) if mask.sum() > 1 else None for key, measure in measured.items()},
         "overlap": dict(zip(kept, shared[i].tolist(), strict=True))}
        for i, (name, mask) in enumerate(kept.items())
    ])  # fmt: skip


def usual(run: Run, budget: int) -> dict[str, dict[str, Any]]:
    """The policies that the recipe's scorers and encoders allow, by name."""
    select, spaces = run.recipe.select, run.recipe.embed.encoders
    plain = {"sql": None, "picks": None, "floors": {}, "dedup": None, "budget": budget}
    found = {name: {"policy": name} | plain for name in ("best_of_n", "quantile_band", "top_k", "random")}
    if spaces:
        found["diverse"] = {"policy": "diverse", "space": select.space or spaces[0]} | plain
    if len(select.scorers or run.recipe.score.scorers) > 1:
        found["pareto"] = {"policy": "pareto"} | plain
    return found


def _decided(run: Run, name: str, changes: dict[str, Any], rows: pa.Table) -> np.ndarray:
    """Which candidates [N] the policy of this name keeps, with its changes to ``select``."""
    from jobs.recipe import override  # which holds these settings itself

    with about(f"policy {name!r}"):
        other = replace(run, recipe=override(run.recipe, [(["select", key], value) for key, value in changes.items()]))
        settings = other.recipe.select
        return decide(other, settings, needed(other), rows, picked(other, settings.picks)).kept


def _measures(run: Run, rows: pa.Table) -> dict[str, Any]:
    """What is measured of the kept ones, by name: a function of their mask [N]."""
    recipe = run.recipe
    found: dict[str, Any] = {}
    if recipe.weigh.by == "advantage":
        found["ess"] = partial(_size, by_advantage(run, ids(rows)))
    if recipe.distance.space is not None:
        _, far = distances_of(run, "train")
        if recipe.weigh.by == "distance":
            found["ess"] = partial(_size, law.damped(far, *scale_of(run)))
        found["distance"] = lambda mask: float(far[mask].mean())
    if space := next(filter(None, (recipe.distance.space, recipe.select.space, *recipe.embed.encoders)), None):
        _, x = vectors_of(run, space, "train")
        if recipe.distance.space is not None:
            _, d0 = vectors_of(run.base(), space, "reference")
            found["fd_d0"] = lambda mask: frechet_distance(x[mask], d0)
        if whole := spread(x):
            found["spread"] = lambda mask: spread(x[mask]) / whole
    for name, values in scores_of(run, "train", recipe.score.scorers).items():
        found[f"score:{name}"] = lambda mask, values=values: float(values[mask].mean())
    return found


def _size(weights: np.ndarray, mask: np.ndarray) -> float | None:
    """Effective sample size of the kept ones; None where no weight is left, which 'winnow weigh' refuses."""
    return law.effective_sample_size(weights[mask]) if weights[mask].max() >= law.LEAST else None
