"""Stage ``select``: which samples of a round are kept, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, Field, model_validator

from curate import select as choose
from curate.decision import Decision, dedup, floors, listed, narrow, unsaid, whole
from curate.decision import picks as picked_by_hand
from curate.fuse import FUSIONS
from jobs import samples, votes
from jobs.embed import vectors_of
from jobs.named import guarded, known, yours
from jobs.pool import ask, pool, scorers
from jobs.progress import say
from jobs.refine import not_accepted
from jobs.run import Run, ids
from jobs.score import scores_of
from jobs.stage import Work, complete, units
from schemas.errors import WinnowError, about
from schemas.settings import Settings
from schemas.tables import TABLES
from storage.views import identifier

if TYPE_CHECKING:
    from jobs.recipe import Recipe


#: The name of a policy of curate/select.py, "sql", or a function of one's own that is called as those are.
PolicyName = Annotated[str, AfterValidator(lambda name: known("select.policy", name, {**choose.POLICIES, "sql": None}))]


class Select(Settings):
    """``policy``: how candidates are chosen; ``keep``: samples of each prompt; ``budget``: samples in all (null: no
    limit). ``fuse`` joins several ``scorers`` (null: those of ``score``), each compared ``within`` its prompt or over
    all candidates. ``sql``: of the policy of that name, a query over ``candidates`` (the columns of jobs/pool.py) that
    gives the ``sample_id`` of those to keep and, if you like, their ``rank``. ``strata``: the prompts' column whose
    values share the budget. ``floors``: least value by scorer. ``dedup``: the cosine similarity in ``space`` from which
    two samples count as one. ``picks``: "votes", for what people chose in ``winnow label``, or a file of sample ids,
    one a line, with "{round}" and "{arm}" in its name for those. What was picked is kept, but for floors and
    duplicates, and the policy is not asked."""

    policy: PolicyName = "best_of_n"
    scorers: tuple[str, ...] | None = None
    fuse: Literal["rank", "zscore"] = "rank"
    within: Literal["prompt", "all"] = "prompt"
    keep: int = Field(1, ge=1)
    budget: int | None = Field(None, ge=1)
    band: tuple[float, float] = (0.0, 0.5)
    floors: dict[str, float] = Field(default_factory=dict)
    dedup: float | None = Field(None, gt=0, le=1)
    sql: str | None = None
    strata: Literal["category", "cluster"] = "category"
    picks: str | None = None
    space: str | None = None

    @model_validator(mode="after")
    def _together(self) -> Select:
        low, high = self.band
        if not 0 <= low < high <= 1:
            raise WinnowError(f"select.band is [{low}, {high}]; give 0 <= low < high <= 1")
        if (self.policy == "sql") != (self.sql is not None):
            raise WinnowError("select.policy 'sql' and a query in select.sql go together; give both, or none")
        if self.budget is None and self.policy in ("top_k", "diverse", "strata"):
            raise WinnowError(f"select.policy {self.policy!r} needs select.budget; give the number of samples to keep")
        if self.budget is not None and self.policy == "sql":
            raise WinnowError(
                f"select.budget is {self.budget}, and the policy 'sql' keeps what its query gives; write LIMIT "
                f"{self.budget} there, and set select.budget to null"
            )
        if self.space is None and (self.policy == "diverse" or self.dedup is not None):
            what = "policy 'diverse'" if self.policy == "diverse" else "dedup"
            raise WinnowError(f"select.{what} needs a space; set select.space to an encoder of embed.encoders")
        return self

    @property
    def reads_scores(self) -> bool:
        """Whether the policy itself orders the candidates by their scores."""
        return self.policy in choose.POLICIES and self.policy != "random"


def select(run: Run) -> None:
    """Decide over the round's candidates; every reject is a row with its reason."""
    settings = run.recipe.select
    rows = samples.of(run, "train")
    used = needed(run)
    picks = picked(run, settings.picks)
    spec = ["select", settings.model_dump(mode="json", exclude={"picks"}), used, run.recipe.seed]
    spec += [] if picks is None else [sorted(picks.tolist())]
    work = units("selections", {"round": run.round, "selection": run.arm}, rows, len(rows), spec)
    complete(run, "select", "selections", work, lambda: _work(run, settings, used, picks))


def needed(run: Run) -> tuple[str, ...]:
    """The scorers that every candidate must have been scored by."""
    settings, recipe = run.recipe.select, run.recipe
    if settings.policy == "sql":  # which of two duplicates is the better one, a query does not say
        return () if settings.dedup is None else selecting(recipe) or recipe.score.scorers
    return () if settings.policy == "random" and not settings.floors else selecting(recipe)


def selecting(recipe: Recipe) -> tuple[str, ...]:
    """The scorers that order the candidates; of a query, those that it names and those that stand beside it."""
    select, made = recipe.select, recipe.score.scorers
    if select.sql is not None:
        return tuple(name for name in made if name in (select.scorers or ()) or _named(name, select.sql))
    return made if select.scorers is None else select.scorers


def choosing(recipe: Recipe) -> tuple[str, ...]:
    """The scorers that have a say in what is trained on, and how much it counts: as order, as floor, in early
    rejection, in refinement or as weight."""
    select, reject, refine = recipe.select, recipe.generate.reject, recipe.refine
    orders = select.policy != "random" or recipe.weigh.by == "advantage"
    names = [*(selecting(recipe) if orders else ()), *select.floors]
    names += [reject.scorer] if reject and reject.scorer else []
    if refine.where is not None:
        names += [name for name in recipe.score.scorers if _named(name, refine.where)]
        names += [refine.scorer] if refine.accept == "better" and refine.scorer else []
    return tuple(dict.fromkeys(names))


def _named(scorer: str, sql: str) -> bool:
    """Whether a query reads this scorer's column, by whatever case."""
    return scorer.casefold() in sql.casefold()


def picked(run: Run, name: str | None) -> np.ndarray | None:
    """The sample ids that people picked, in votes or in a file, int64; WinnowError where there are none, or a line of
    the file is none. None where they are not asked."""
    if name is None:
        return None
    if name == "votes":
        return votes.picked(run)
    path = Path(name.replace("{round}", str(run.round)).replace("{arm}", run.arm)).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
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
        if not decision.kept.any():
            none, cure = "keeps none", "change select"
            if settings.floors:
                none, cure = f"and floors {settings.floors} leave none", "lower them"
            raise WinnowError(
                f"select: policy {settings.policy!r} {none} of {n} samples; the commonest reason is "
                f"{Counter(decision.reason.tolist()).most_common(1)[0][0]!r}; {cure}, or make more samples"
            )
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
) -> Decision:
    """What people picked, or else what no refinement refused; then floors, near duplicates and the policy: each over
    what the one before left."""
    numbers, groups = ids(rows), rows["prompt_id"].to_numpy()
    scores = scores_of(run, "train", tuple(dict.fromkeys([*used, *settings.floors])))
    fused = np.zeros(len(numbers))
    if used:
        fused = fuse(settings, [scores[name] for name in used], groups)
    elif settings.reads_scores and picks is None:
        raise WinnowError(f"select.policy {settings.policy!r} needs scores; name scorers in score.scorers")
    features = vectors_of(run, settings.space, "train")[1] if settings.space else None

    everything = np.ones(len(numbers), bool)
    before = Decision(everything, np.zeros(len(numbers), np.int64), unsaid(len(numbers)))
    if picks is not None:
        strangers = picks[~np.isin(picks, numbers)]
        if len(strangers):
            raise WinnowError(
                f"select.picks: sample {strangers[0]} is no candidate of round {run.round} of {run.arm!r}, nor are "
                f"{len(strangers) - 1} others; remove them"
            )
        before = picked_by_hand(numbers, picks)
    elif len(refused := not_accepted(run)):
        out = np.isin(numbers, refused)
        reason = np.where(out, "refinement not accepted", "").astype(object)
        before = Decision(~out, before.rank, reason)
    if settings.floors:
        left = before.kept
        named = {name: scores[name][left] for name in settings.floors}
        before = narrow(before, floors(named, settings.floors))
    if settings.dedup is not None and before.kept.any():
        assert features is not None
        left = before.kept
        before = narrow(before, dedup(features[left], settings.dedup, fused[left], numbers[left]))
    left = before.kept
    if not left.any():
        return before
    if picks is not None:
        return narrow(before, choose.best_of_n(fused[left], groups[left], numbers[left], k=len(numbers)))
    if settings.policy == "sql":
        return narrow(before, _asked(run, settings, numbers[left]))
    options: dict[str, Any] = {}
    if settings.policy in ("best_of_n", "random", "quantile_band", "strata", "pareto"):
        options["k"] = settings.keep
    if settings.policy == "quantile_band":
        options["low"], options["high"] = settings.band
    elif settings.policy == "strata":
        options["strata"] = _strata(run, settings, groups[left])
    elif settings.policy == "pareto":
        options["columns"] = np.stack([scores[name][left] for name in used], axis=1)
    policy = choose.POLICIES.get(settings.policy) or _own(settings.policy)
    some, seed = None if features is None else features[left], run.seed("select", run.arm, run.round) % 2**31
    return narrow(before, policy(fused[left], groups[left], numbers[left], some, settings.budget, seed, **options))


def _own(name: str) -> Callable[..., Decision]:
    """A policy of one's own; what it gives is checked."""
    policy = yours("policy", name)

    def decided(scores: np.ndarray, *others: Any) -> Decision:
        given = guarded("policy", name, policy)(scores, *others)
        if not isinstance(given, Decision):
            raise WinnowError(f"policy {name!r}: gave a {type(given).__name__}; it must return a Decision")
        with about(f"policy {name!r}"):
            return whole(given, len(scores))

    return decided


def _asked(run: Run, settings: Select, numbers: np.ndarray) -> Decision:
    """What the query of the policy "sql" gives, among these candidates."""
    found = scorers(run)
    try:
        # On lines of its own: a comment in it must not hide what follows.
        answer = ask(run, f"WITH candidates AS ({pool(run, found)}) SELECT * FROM (\n{settings.sql}\n)")
        if "sample_id" not in answer.column_names:
            raise WinnowError(f"sql: it gives {', '.join(answer.column_names)}, and no sample_id")
        chosen = answer["sample_id"].cast(pa.int64()).fill_null(-1).to_numpy()
        rank = answer["rank"].cast(pa.int64()).fill_null(0).to_numpy() if "rank" in answer.column_names else None
        if len(np.unique(chosen)) < len(chosen):
            raise WinnowError("sql: it gives a sample twice")
        return whole(listed(numbers, chosen, rank), len(numbers))
    except (WinnowError, pa.ArrowException) as error:
        reason = " ".join(str(error).removeprefix("sql: ").split())[:300]
        raise WinnowError(
            f"select.sql {settings.sql!r}: {reason}; write a query over candidates such as SELECT sample_id FROM "
            f"candidates WHERE {identifier('rank:' + found[0]) if found else 'width'} = 1"
        ) from error


def _strata(run: Run, settings: Select, groups: np.ndarray) -> np.ndarray:
    """The value of the prompts' column for each candidate, by its prompt [N]: a string, "" where there is none."""
    rows = run.query(f"SELECT prompt_id, coalesce({identifier(settings.strata)}::VARCHAR, '') AS name FROM prompts")
    names = dict(zip(rows["prompt_id"].to_pylist(), rows["name"].to_pylist(), strict=True))
    if not any(names.values()):
        say(f"select: no prompt has a {settings.strata}, so that all are one stratum; prompts.balance gives them some")
    return np.array([names.get(group, "") for group in groups.tolist()], dtype=str)
