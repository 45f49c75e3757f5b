"""The stage: children of chosen samples are rows that every later stage sees, and a rerun ends like an unbroken run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ForkServer, files, rows, sets

from jobs import recipe as recipes
from jobs.distance import distance, distances_of
from jobs.embed import embed
from jobs.explain import explain, words
from jobs.generate import generate
from jobs.refine import refine
from jobs.round import play, prepare
from jobs.run import Run
from jobs.score import score
from jobs.select import select
from schemas.errors import WinnowError
from storage.layout import create
from storage.snapshot import latest
from storage.verify import verify

SMALL: dict[str, Any] = {
    "threads": 1, "rounds": 1, "generate.prompts": 12, "generate.images_per_prompt": 2, "generate.steps": 4,
    "generate.batch": 8, "generate.retries": 8, "reference.prompts": 12, "reference.images_per_prompt": 2,
    "embed.batch": 16, "score.batch": 16, "distance.k": 3, "refine.steps": 6, "refine.batch": 4, "train.method": "none",
    "guard.enabled": False,
}  # fmt: skip
WHERE = '"rank:scene-clip" = 1'
HOW: dict[str, Any] = {
    "refine.where": WHERE, "refine.loops": 2, "refine.mask": "random", "refine.level": [0.4, 0.8],
    "refine.accept": "better", "refine.scorer": "scene-clip",
}  # fmt: skip


def run_in(store: Path) -> Run:
    recipe = recipes.override(recipes.load("embedded-fast"), sets(SMALL))
    return Run(create(store), recipe.for_arm("curated"))


def begun(store: Path) -> Run:
    """A round up to its scores."""
    run = run_in(store)
    prepare(run)
    generate(run)
    embed(run)
    score(run)
    return run


def refining(run: Run, **how: Any) -> Run:
    given = recipes.override(run.recipe, sets(HOW | {f"refine.{key}": value for key, value in how.items()}))
    return replace(run, recipe=given)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Read, and copied by those that add to it."""
    return begun(tmp_path_factory.mktemp("scored") / "store")


@pytest.fixture
def copy(scored: Run, tmp_path: Path) -> Run:
    import shutil

    return replace(scored, store=Path(shutil.copytree(scored.store, tmp_path / "store")))


def test_a_round_with_refined_children(copy: Run) -> None:
    """From the scores on: what was made before stays as it is, children are embedded, scored, measured and chosen from,
    all but those that were not accepted, which say why."""
    before = files(copy.store / "tables")
    old = {part.path for part in latest(copy.store).parts}
    run = refining(copy)
    assert refine(run)
    asked = rows(run.store, "SELECT s.sample_id, prompt_id, value FROM samples s JOIN scores USING (sample_id) WHERE "
                            "s.round = 1 AND split = 'train' AND parent_id IS NULL")  # fmt: skip
    best = {p: max(row["value"] for row in asked if row["prompt_id"] == p) for p in {row["prompt_id"] for row in asked}}
    chosen = {row["sample_id"] for row in asked if row["value"] == best[row["prompt_id"]]}
    made = rows(run.store, "SELECT * EXCLUDE (image) FROM samples WHERE parent_id IS NOT NULL ORDER BY ALL")
    notes = {row["sample_id"]: row for row in rows(run.store, "SELECT * FROM refinements")}
    assert len(made) == 2 * len(chosen) == len(notes) and {row["sample_id"] for row in made} == set(notes)
    by_id = {row["sample_id"]: row for row in made}
    for row in made:
        note = notes[row["sample_id"]]
        assert row["parent_id"] == note["parent_id"]
        assert (row["round"], row["arm"], row["split"]) == (1, "curated", "train")
        assert row["refiner"] == f"random t={1000 * note['level']:.0f} loop {note['loop']}"
        assert note["accepted"] is (note["score_after"] > note["score_before"]) and note["evaluations"] >= 2
        if note["loop"] == 1:
            assert row["parent_id"] in chosen
            stored = next(r["value"] for r in asked if r["sample_id"] == row["parent_id"])
            assert note["score_before"] == pytest.approx(stored, abs=1e-4)
        else:  # a loop goes on from the last image that was accepted
            first = by_id.get(row["parent_id"])
            assert notes[first["sample_id"]]["accepted"] if first else row["parent_id"] in chosen
    refused = {number for number, note in notes.items() if not note["accepted"]}
    assert refused and refused != set(notes)

    with pytest.raises(WinnowError, match="48 of|24 of .* are scored by 'scene-clip'; run 'winnow score'"):
        select(run)
    with pytest.raises(WinnowError, match="are embedded by 'scene-clip'; run 'winnow embed'"):
        distance(run)
    embed(run), score(run), distance(run), select(run)
    again = {row["sample_id"]: row["value"] for row in rows(run.store, "SELECT * FROM scores")}
    for number, note in notes.items():
        assert again[number] == pytest.approx(note["score_after"], abs=2e-3)
    choice = {row["sample_id"]: row for row in rows(run.store, "SELECT * FROM selections")}
    assert set(choice) == {row["sample_id"] for row in asked} | set(notes)
    for number in refused:
        assert not choice[number]["kept"] and choice[number]["reason"] == "refinement not accepted"
    kept = {number for number, row in choice.items() if row["kept"]}
    assert kept & set(notes) and not kept & refused
    for prompt in best:  # the best of all that may be chosen
        mates = [row["sample_id"] for row in [*asked, *made] if row["prompt_id"] == prompt]
        allowed = [number for number in mates if number not in refused]
        assert kept & set(mates) == {max(allowed, key=lambda number: again[number])}
    measured = rows(run.store, "SELECT sample_id FROM distances JOIN samples USING (sample_id) WHERE split = 'train'")
    assert {row["sample_id"] for row in measured} == set(choice)

    after = files(run.store / "tables")
    assert before.items() <= after.items()
    new = {part.path for part in latest(run.store).parts} - old
    assert {path.split("/")[1] for path in new if "/from-refine/" in path} == {
        "samples", "embeddings", "scores", "distances"
    }
    assert verify(run.store).ok
    embed(run), score(run), refine(run), embed(run), score(run), distance(run), select(run)
    assert files(run.store / "tables") == after

    number = next(iter(sorted(kept & set(notes))))
    assert explain(run.store, number)["lineage"][0]["sample_id"] == notes[number]["parent_id"]
    told, note = words(explain(run.store, number)), notes[number]
    assert f"refined from {note['parent_id']}" in told and note["mask"] in told and "accepted" in told
    assert f"level {note['level']:.3f}" in told and f"loop {note['loop']}" in told
    assert f"{note['score_before']:.4f} → {note['score_after']:.4f}" in told
    assert "not accepted" in words(explain(run.store, sorted(refused)[0]))


def test_children_without_distances_are_not_weighed_by_those_of_others(copy: Run, winnow: Callable[..., Any]) -> None:
    run = refining(copy)
    distance(run), refine(run), embed(run), score(run)
    with pytest.raises(WinnowError, match=r"distances: \d+ of \d+ train samples of round 1 have .*'winnow distance'"):
        distances_of(run, "train")
    # And a round that nothing is selected of can be compared.
    assert "kept: 0 of 0 samples, 0 prompts → 0 of 0" in winnow("diff", 1, 1, "--store", run.store).out


def test_really_different_sets_are_refused_and_more_of_the_same_is_not(copy: Run) -> None:
    refine(refining(copy, where="true", limit=4, loops=1))
    count = "SELECT count(*) AS n FROM refinements"
    for other in ({"level": 0.5}, {"limit": 3}, {"loops": 2}, {"model": "embedded", "guidance": 2}):
        with pytest.raises(WinnowError, match="is sealed already, made with other settings"):
            refine(refining(copy, **({"where": "true", "limit": 4, "loops": 1} | other)))
    assert rows(copy.store, count) == [{"n": 4}]
    refine(refining(copy, where="true", limit=5, loops=1))
    assert rows(copy.store, count) == [{"n": 5}]
    embed(copy)
    with pytest.raises(WinnowError, match="sealed already"):
        embed(replace(copy, recipe=recipes.override(copy.recipe, sets({"embed.batch": 7}))))
    with pytest.raises(WinnowError, match="sealed already"):
        generate(replace(copy, recipe=recipes.override(copy.recipe, sets({"generate.steps": 3}))))


def test_what_is_lost_of_refined_images_is_made_again(copy: Run) -> None:
    run = refining(copy, where='"rank:scene-clip" <= 1', limit=4, loops=1)
    refine(run), embed(run), score(run), distance(run), select(run)
    for folder in ("refinements", "samples/round-1/arm-curated/split-train/from-refine"):
        part = next((run.store / "tables" / folder).rglob("*.parquet"))
        kept = part.read_bytes()
        part.unlink()
        assert refine(run) and part.read_bytes() == kept and verify(run.store).ok


def test_a_round_that_is_selected_is_not_refined(copy: Run) -> None:
    distance(copy), select(copy)
    with pytest.raises(WinnowError, match=r"round 1 of 'curated' is selected already.*before 'winnow select'"):
        refine(refining(copy))


@pytest.mark.parametrize(("where", "expected"), [
    ("true", 24), ("false", 0), ('"scene-clip" IS NOT NULL AND width = 16 -- all', 24), ("prompt LIKE '%no such%'", 0),
    ("distance IS NULL", 24), (WHERE, 12), ('"rank:scene-clip" <= 2', 24),
    ("sample_id IN (SELECT sample_id FROM scores WHERE scorer = 'scene-clip' AND value > -1e9)", 24),
])  # fmt: skip
def test_conditions(scored: Run, where: str, expected: int) -> None:
    from jobs.refine import chosen

    found = chosen(refining(scored), refining(scored, where=where).recipe.refine)
    assert found.num_rows == expected


@pytest.mark.parametrize("where", [
    "", "no_such_column > 3", "prompt", "1; DROP TABLE samples", "true); SELECT (1", ")", "true) UNION SELECT 3 --",
    "true); COPY samples TO '/tmp/stolen.parquet'; SELECT (1", "(SELECT count(*) FROM read_text('/etc/passwd')) > 0",
    "/* ", "sample_id IN (SELECT", "getenv('HOME') = '/root'", "true) -- \n; ATTACH 'x.db", "'", "\x00",
])  # fmt: skip
def test_hostile_conditions_are_one_line(scored: Run, winnow: Callable[..., Any], where: str, tmp_path: Path) -> None:
    before = files(scored.store)
    recipe = tmp_path / "small.yaml"
    import yaml

    recipe.write_text(yaml.safe_dump(json.loads(scored.recipe.model_dump_json())))
    said = winnow("refine", "--recipe", recipe, "--store", scored.store, "--where", where)
    assert "refine.where" in said.line, said.err
    assert files(scored.store) == before and not Path("/tmp/stolen.parquet").exists()


def test_refine_without_a_condition_says_so(scored: Run) -> None:
    with pytest.raises(WinnowError, match=r'refine\.where is null.*"true" for all'):
        refine(scored)


def test_shards_share_the_work(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = refining(copy, loops=1, where="true", limit=10)  # 3 units
    assert not refine(replace(run, shard=1, n_shards=2))
    assert "left to other shards" in capsys.readouterr().err
    assert rows(run.store, "SELECT count(*) AS n FROM samples WHERE parent_id IS NOT NULL") == [{"n": 0}]
    assert refine(replace(run, shard=0, n_shards=2))
    assert rows(run.store, "SELECT count(*) AS n FROM samples WHERE parent_id IS NOT NULL") == [{"n": 10}]


def killed(store: str) -> None:
    """What the killed processes run: refinement and all that follows it."""
    run = refining(run_in(Path(store)))
    refine(run), embed(run), score(run), distance(run), select(run)


CONTENT = [
    "SELECT sample_id, parent_id, refiner, seed, sha256(image.bytes) FROM samples ORDER BY ALL",
    "SELECT sample_id, parent_id, mask, level, loop, evaluations, accepted FROM refinements ORDER BY ALL",
    "SELECT sample_id, round(value, 3) FROM scores ORDER BY ALL",
    "SELECT sample_id, kept, rank, reason FROM selections ORDER BY ALL",
]


def test_killed_at_any_moment_it_ends_like_an_unbroken_run(copy: Run, forks: ForkServer, tmp_path: Path) -> None:
    import random
    import shutil

    whole = shutil.copytree(copy.store, tmp_path / "whole")
    forks.start("test_jobs_refine:killed", str(whole), log=tmp_path / "log")
    assert forks.wait() == 0, (tmp_path / "log").read_text()
    kills, rng = 0, random.Random(1)
    for _ in range(8):
        forks.start("test_jobs_refine:killed", str(copy.store), log=tmp_path / "log", events=rng.randint(5, 150))
        status = forks.wait()
        assert status in (0, -9), (tmp_path / "log").read_text()
        kills += status == -9
        # What can be seen of a refinement is always whole.
        assert rows(copy.store, "SELECT count(*) AS n FROM samples ANTI JOIN refinements USING (sample_id) "
                                "WHERE parent_id IS NOT NULL") == [{"n": 0}]  # fmt: skip
    forks.start("test_jobs_refine:killed", str(copy.store), log=tmp_path / "log")
    assert forks.wait() == 0, (tmp_path / "log").read_text()
    assert kills >= 3
    for sql in CONTENT:
        assert rows(copy.store, sql) == rows(whole, sql)
    found = verify(copy.store)
    assert found.ok and not [note for note in found.notes if note.startswith("tables/")]


def test_a_round_refines_where_its_recipe_says_so(copy: Run) -> None:
    run = refining(copy, loops=1, limit=6)
    assert play(run).verdict
    stages = [row["n"] for row in rows(run.store, "SELECT count(*) AS n FROM refinements")]
    assert stages == [6]
    kept = rows(run.store, "SELECT parent_id FROM curated")
    assert len(kept) == 12


def test_another_model_and_box(copy: Run) -> None:
    """Kept pixels are the parent's to the bit, in the stored files, too."""
    from jobs.images import decode

    run = refining(copy, where="true", limit=3, loops=1, mask="box", box=[0, 0, 1, 0.5], accept="always", scorer=None,
                   model="embedded", paste=0, guidance=2.0)  # fmt: skip
    refine(run)
    pairs = rows(run.store, "SELECT a.image AS child, b.image AS parent, r.* FROM refinements r JOIN samples a USING "
                            "(sample_id) JOIN samples b ON b.sample_id = r.parent_id")  # fmt: skip
    assert len(pairs) == 3
    for pair in pairs:
        child, parent = (np.asarray(decode(pair[who]["bytes"])) for who in ("child", "parent"))
        np.testing.assert_array_equal(child[8:], parent[8:])
        assert (child[:8] != parent[:8]).any()
        assert pair["scorer"] is None and pair["score_before"] is None and pair["accepted"]
        assert pair["mask"] == "box 0 0 1 0.5" and pair["evaluations"] % 2 == 0
