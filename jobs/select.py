"""Stage ``select``: which samples of a round are kept, and why the others are not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from curate import select as choose
from curate.fuse import FUSIONS
from jobs import samples, votes
from jobs.embed import vectors_of
from jobs.refine import not_accepted
from jobs.run import Run, ids
from jobs.score import scores_of
from jobs.stage import Work, complete, units
from schemas.errors import WinnowError
from schemas.settings import Settings
from schemas.tables import TABLES

if TYPE_CHECKING:
    from jobs.recipe import Recipe


class Select(Settings):
    """``keep``: samples of each prompt; ``budget``: samples in all (null: no limit). ``fuse`` joins several
    ``scorers`` (null: those of ``score``), each compared ``within`` its prompt or over all candidates.
    ``floors``: least value by scorer. ``dedup``: the
    cosine similarity in ``space`` from which two samples count as one. ``picks``: "votes", for what
    people chose in ``winnow label``, or a file of sample ids, one a line, with "{round}" and "{arm}" in its name for
    those. What was picked is kept, but for floors and duplicates, and the policy is not asked."""

    policy: Literal["best_of_n", "top_k", "quantile_band", "diverse", "random"] = "best_of_n"
    scorers: tuple[str, ...] | None = None
    fuse: Literal["rank", "zscore"] = "rank"
    within: Literal["prompt", "all"] = "prompt"
    keep: int = Field(1, ge=1)
    budget: int | None = Field(None, ge=1)
    band: tuple[float, float] = (0.0, 0.5)
    floors: dict[str, float] = Field(default_factory=dict)
    dedup: float | None = Field(None, gt=-1, le=1)
    picks: str | None = None
    space: str | None = None

    @model_validator(mode="after")
    def _together(self) -> Select:
        low, high = self.band
        if not 0 <= low < high <= 1:
            raise WinnowError(f"select.band is [{low}, {high}]; give 0 <= low < high <= 1")
        if self.budget is None and self.policy in ("top_k", "diverse"):
            raise WinnowError(f"select.policy {self.policy!r} needs select.budget; give the number of samples to keep")
        if self.space is None and (self.policy == "diverse" or self.dedup is not None):
            what = "policy 'diverse'" if self.policy == "diverse" else "dedup"
            raise WinnowError(f"select.{what} needs a space; set select.space to an encoder of embed.encoders")
        return self


def select(run: Run) -> None:
    """Decide over the round's candidates; every reject is a row with its reason."""
    settings = run.recipe.select
    rows = samples.of(run, "train")
    used = _scorers(run)
    picks = picked(run, settings.picks) if settings.picks else None
    spec = ["select", settings.model_dump(mode="json", exclude={"picks"}), used, run.recipe.seed]
    spec += [] if picks is None else [sorted(picks.tolist())]
    work = units("selections", {"round": run.round, "selection": run.arm}, rows, len(rows), spec)
    complete(run, "select", "selections", work, lambda: _work(run, settings, used, picks))


def _scorers(run: Run) -> tuple[str, ...]:
    settings = run.recipe.select
    if settings.policy == "random" and not settings.floors:
        return ()
    return selecting(run.recipe)


def selecting(recipe: Recipe) -> tuple[str, ...]:
    """The scorers that order the candidates."""
    return recipe.score.scorers if recipe.select.scorers is None else recipe.select.scorers


def picked(run: Run, name: str) -> np.ndarray:
    """The sample ids that people picked, in votes or in a file, int64; WinnowError where there are none, or a line of
    the file is none."""
    if name == "votes":
        return votes.picked(run)
    path = Path(name.replace("{round}", str(run.round)).replace("{arm}", run.arm)).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        found = np.array([int(line) for line in lines if line], np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise WinnowError(
            f"select.picks {path}: cannot be read ({error}); write the ids of the samples to keep, one a line: "
            f'winnow sql "SELECT sample_id, prompt FROM samples WHERE round = {run.round}"'
        ) from error
    if not len(found):
        raise WinnowError(f"select.picks {path}: is empty; write the ids of the samples to keep, one a line")
    return np.unique(found)


def _work(run: Run, settings: Select, used: tuple[str, ...], picks: np.ndarray | None) -> Work:
    def work(rows: pa.Table) -> pa.Table:
        decision = decide(run, settings, used, rows, picks)
        n = rows.num_rows
        columns = {
            "selection": pa.array([run.arm] * n),
            "round": pa.array(np.full(n, run.round, np.int32)),
            "sample_id": rows["sample_id"],
            "kept": pa.array(decision.kept),
            "rank": pa.array(decision.rank.astype(np.int32), mask=decision.rank == 0),
            "reason": pa.array([str(reason) for reason in decision.reason]),
        }
        return pa.table(columns, schema=TABLES["selections"].schema)

    return work


def fuse(settings: Select, columns: list[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """The one score [N] that candidates are ordered by, from that of each scorer [N]; a single one stays as it is."""
    if len(columns) == 1:
        return columns[0]
    peers = groups if settings.within == "prompt" else np.zeros_like(groups)
    return FUSIONS[settings.fuse](np.stack(columns, axis=1), peers)


def decide(
    run: Run, settings: Select, used: tuple[str, ...], rows: pa.Table, picks: np.ndarray | None = None
) -> choose.Decision:
    """What people picked, or else what no refinement refused; then floors, near duplicates and the policy: each over
    what the one before left."""
    numbers, groups = ids(rows), rows["prompt_id"].to_numpy()
    scores = scores_of(run, "train", tuple(dict.fromkeys([*used, *settings.floors])))
    fused = np.zeros(len(numbers))
    if used:
        fused = fuse(settings, [scores[name] for name in used], groups)
    elif settings.policy != "random":
        raise WinnowError(f"select.policy {settings.policy!r} needs scores; name scorers in score.scorers")
    features = vectors_of(run, settings.space, "train")[1] if settings.space else None

    everything = np.ones(len(numbers), bool)
    before = choose.Decision(everything, np.zeros(len(numbers), np.int64), np.full(len(numbers), "", object))
    if picks is not None:
        strangers = picks[~np.isin(picks, numbers)]
        if len(strangers):
            raise WinnowError(
                f"select.picks: sample {strangers[0]} is no candidate of round {run.round} of {run.arm!r}, nor are "
                f"{len(strangers) - 1} others; remove them"
            )
        before = choose.picks(numbers, picks)
    elif len(refused := not_accepted(run)):
        out = np.isin(numbers, refused)
        reason = np.where(out, "refinement not accepted", "").astype(object)
        before = choose.Decision(~out, before.rank, reason)
    if settings.floors:
        left = before.kept
        named = {name: scores[name][left] for name in settings.floors}
        before = choose.narrow(before, choose.floors(named, settings.floors))
    if settings.dedup is not None:
        assert features is not None
        left = before.kept
        before = choose.narrow(before, choose.dedup(features[left], settings.dedup, fused[left], numbers[left]))
    left = before.kept
    if not left.any():
        raise WinnowError(f"select: floors {settings.floors} leave none of {len(left)} samples; lower them")
    if picks is None:
        policy, budget = settings.policy, settings.budget
        options = {
            "best_of_n": {"k": settings.keep},
            "random": {"k": settings.keep},
            "quantile_band": {"k": settings.keep, "low": settings.band[0], "high": settings.band[1]},
        }.get(policy, {})
    else:
        policy, budget, options = "best_of_n", None, {"k": len(numbers)}
    seed = run.seed("select", run.arm, run.round) % 2**31
    some = None if features is None else features[left]
    choice = choose.POLICIES[policy]
    after = choice(fused[left], groups[left], numbers[left], some, budget, seed, **options)
    return choose.narrow(before, after)
