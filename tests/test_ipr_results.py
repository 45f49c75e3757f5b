"""The benchmark as a whole, the model that ships, and the figures that are published."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.ipr import WEIGHTS, benchmarks
from jobs.ipr.__main__ import main
from jobs.ipr.benchmarks import BENCHMARKS, task
from jobs.ipr.measure import Bench, methods, rate
from jobs.ipr.model import RegionTransformer, Shape
from jobs.ipr.refine import refine
from jobs.ipr.sampler import Pass
from jobs.ipr.train import Training, load

TINY = {"shape": Shape(16, 1, 2), "training": Training(2, batch=4), "steps": 1, "again": 1, "budgets": (80,)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three benchmarks from end to end, with models that have learned nothing."""
    folder = tmp_path_factory.mktemp("ipr")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sudoku4", "even-pixels", "polygons"):
            patch.setitem(benchmarks.BENCHMARKS, name, replace(BENCHMARKS[name], **TINY))
        words = ["sudoku4", "even-pixels", "polygons", "--samples", "5", "--weights", str(folder / "weights")]
        assert main([*words, "--out", str(folder / "out")]) == 0
        first = (folder / "out" / "ipr.json").read_text()
        # Again, of what is there: the same figures, but for the time they took.
        assert main(["--samples", "5", "--weights", str(folder / "weights"), "--out", str(folder / "out")]) == 0
        timeless = [re.sub(r'"(seconds|load_before)": [\d.]+', "", text)
                    for text in (first, (folder / "out" / "ipr.json").read_text())]  # fmt: skip
        assert timeless[0] == timeless[1]
    return folder / "out"


def found(out: Path) -> dict[str, Any]:
    return json.loads((out / "ipr.json").read_text())


def test_a_benchmark_writes_its_figures_page_and_pictures(out: Path) -> None:
    page = (out / "ipr.md").read_text()
    assert set(found(out)) == {"sudoku4", "even-pixels", "polygons"}
    for name, one in found(out).items():
        assert f"## {name}\n" in page and (out / f"ipr-{name}.svg").read_text().startswith("<svg")
        assert one["n"] == 5 and one["machine"] and one["threads"] >= 1 and one["model"]["figures"]["cpu_seconds"] >= 0
        assert one["ceiling"]["rate"] > 0.7 and len(one["retention"]) == 4
        for row in one["rows"]:
            assert row["n"] == 5 and row["rate"] == row["valid"] / 5 and row["low"] <= row["rate"] <= row["high"]
            assert f"| {row['method']} |" in page and f"| {row['evaluations']} |" in page
    assert "not measured" in page


@pytest.mark.parametrize(("name", "regions"), [("sudoku4", 16), ("even-pixels", 16), ("polygons", 36)])
def test_methods_are_compared_at_equal_evaluations(out: Path, name: str, regions: int) -> None:
    """With one step a region: what each method asked of the model, counted by hand."""
    rows = [row for row in found(out)[name]["rows"] if not row["given"]]
    quarter = regions // 4
    for row in rows:
        k = row.get("iterations", 0)
        if row["method"] == "IPR" and row["fraction"] == 0.25:
            assert row["evaluations"] == regions + k * quarter
        if row["method"] == "whole image":
            assert row["evaluations"] == regions + 8 * k
        if row["method"] in ("least certain regions", "regions in conflict"):
            assert row["evaluations"] == regions + k * (quarter + 1)
        if row["method"] == "restart":
            assert row["evaluations"] == (k + 1) * regions
    assert {"parallel", "sequential"} <= {row["method"] for row in rows}


def test_no_method_has_more_evaluations_than_its_budget() -> None:
    for name, how in BENCHMARKS.items():
        regions = 81 if name == "sudoku9" else 36 if name == "polygons" else 16
        for method in methods(how, regions):
            count = max(1, round(method.fraction * regions))
            for mark in method.marks:
                assert method.again is not None
                look = method.choice in ("uncertain", "conflict")
                spent = method.start.length(regions) + mark * (method.again.length(count) + look)
                assert spent <= max(how.budgets)
        names = {(method.name, method.fraction) for method in methods(how, regions)}
        assert {("IPR", 0.25), ("whole image", 1.0), ("sequential", 0.0)} <= names


def test_given_regions_are_those_of_a_real_board_to_the_end() -> None:
    made = task("sudoku4")[0]
    torch.manual_seed(0)
    model = RegionTransformer(made.grid, Shape(16, 1, 2)).eval()
    bench = Bench(model, made, 30, 0, given=0.25)
    assert (bench.free.sum(1) == 12).all() and len(bench.free.unique(dim=0)) > 20
    x, _, _ = bench.start(Pass(1))
    (after,) = refine(bench.sampler(1), x, bench.free, 1, 1.0, Pass(1))
    others = made.grid.cut(made.draw(500, np.random.default_rng(0), "test")[0])
    known = {cell.tobytes() for cell in others.reshape(-1, 64)}
    for one in (x, after):
        assert torch.equal(one[~bench.free], bench.clues[~bench.free])
    assert np.mean([cell.tobytes() in known for cell in x[~bench.free].numpy()]) > 0.95


def test_the_rate_is_a_binomials() -> None:
    got = rate(np.array([True] * 30 + [False] * 90))
    assert got["valid"] == 30 and got["n"] == 120 and got["rate"] == 0.25
    assert got["se"] == pytest.approx((0.25 * 0.75 / 120) ** 0.5)
    from scipy.stats import binomtest

    interval = binomtest(30, 120).proportion_ci(method="wilson")
    assert (got["low"], got["high"]) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("words", [["chess"], ["sudoku4", "--data", "/nowhere/digits.npz"]])
def test_what_cannot_be_run_is_said_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("ipr: ") and said.count("\n") == 1


# What ships.


def test_the_shipped_model_is_small_and_far_above_chance() -> None:
    """Random digits are a board once in 4¹⁶ / 288, 15 million; where each row is right, once in 24⁴ / 288, 1,152."""
    assert (WEIGHTS / "sudoku4" / "model.safetensors").stat().st_size < 3e6
    model, config = load(WEIGHTS / "sudoku4")
    assert config["task"] == "sudoku4" and config["training"]["steps"] == BENCHMARKS["sudoku4"].training.steps
    bench = Bench(model, task("sudoku4")[0], 40, 5)
    x, evaluations, _ = bench.start(Pass(2))
    first = bench.valid(x).mean()
    *_, after = refine(bench.sampler(1), x, bench.free, 8, 0.25, Pass(2))
    assert evaluations == 32 and first > 0.2 and bench.valid(after).mean() > first
