"""The round: the whole story of Winnow, as RSIDiff tells it (arXiv 2502.09963, algorithm 1), with a guard.

    G_0 is the base model, D_0 its own samples.
    For r = 1, 2, …
        D_r  = samples of G_{r-1} on the prompts                        generate
        (and those that a condition names, made anew in part)           refine
        S_r  = the preferred ones                                       embed, score, select
        w(s) = 1 where s is near to D_0, less the farther it is         distance, weigh
        G_r  = G_{r-1} trained on S_r with weights w                    export, train
        Is G_r better on prompts it never saw, and no less varied?      evaluate
        Then go on from it; else go back to the best so far, and end.   guard

Every step reads what the ones before it sealed and adds rows of its own, so a round can be stopped anywhere and
taken up again: what is there is passed over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from curate.guard import Verdict
from jobs.distance import distance
from jobs.embed import embed
from jobs.evaluate import evaluate
from jobs.export import export
from jobs.generate import generate
from jobs.guard import guard
from jobs.progress import say
from jobs.prompts import prompts
from jobs.refine import refine
from jobs.run import Run
from jobs.score import score
from jobs.select import select
from jobs.train import train, trained_model
from jobs.weigh import weigh
from storage.snapshot import numbers


def prepare(run: Run) -> None:
    """What all rounds share: the prompts, D_0 in the space of the distances, and the base's own evaluation."""
    run.recipe.check_round()
    prompts(run, keep=True)
    generate(run, "reference")
    base = run.base()
    embed(base, "reference")
    distance(base, "reference")
    if run.recipe.train.method != "none":
        evaluate(run.at(0))
    guard(run.at(0))


def play(run: Run) -> Verdict:
    """One round of one arm, from its candidates to the verdict over its model."""
    began = time.perf_counter()
    generate(run)
    embed(run)
    score(run)
    if run.recipe.refine.where is not None:
        refine(run)
        embed(run)
        score(run)
    distance(run)
    select(run)
    weigh(run)
    export(run)
    if run.recipe.train.method != "none":
        train(run)
        evaluate(run)
    verdict = guard(run, seconds=time.perf_counter() - began)
    say(f"round {run.round} of {run.arm}: {verdict.verdict}: {verdict.reason}")
    return verdict


@dataclass(frozen=True)
class Outcome:
    """How an arm ended: the best round, its model, and the verdict that ended the loop."""

    arm: str
    best_round: int
    model: str
    verdict: str
    reason: str


def loop(run: Run, each: Callable[[Run], None] = lambda run: None) -> Outcome:
    """Rounds until the guard ends them or the recipe's number is reached; ``each`` is called after every round that
    adds to the store."""
    prepare(run)
    verdict = Verdict("promote", 0, "the base")
    number = 0
    while verdict.verdict == "promote" and number < run.recipe.rounds:
        number += 1
        sealed = numbers(run.store)
        verdict = play(run.at(number))
        if numbers(run.store) != sealed:
            each(run.at(number))
    best = run.at(verdict.best_round)
    return Outcome(run.arm, verdict.best_round, trained_model(best), verdict.verdict, verdict.reason)
