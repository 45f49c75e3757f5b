"""The benchmark as a whole, the model that ships, and the figures that are published."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.ipr import WEIGHTS, benchmarks
from jobs.ipr.__main__ import main
from jobs.ipr.benchmarks import BENCHMARKS, build, task
from jobs.ipr.measure import Bench, Method, budgets, measure, methods, rate
from jobs.ipr.model import RegionTransformer, Shape
from jobs.ipr.page import choices, findings
from jobs.ipr.refine import refine
from jobs.ipr.sampler import Pass
from jobs.ipr.train import Training, load
from schemas.errors import WinnowError

HOME = Path(__file__).parent.parent
TINY = {
    "shape": Shape(16, 1, 2), "training": Training(2, batch=4), "start": Pass(1), "again": Pass(1),
    "iterations": (4, 16),
}  # fmt: skip


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
        assert one["ceiling"]["rate"] > 0.7 and len(one["retention"]) == 6
        for row in one["rows"]:
            assert row["n"] == 5 and row["rate"] == row["valid"] / 5 and row["low"] <= row["rate"] <= row["high"]
            assert f"| {row['method']} |" in page and f"| {row['evaluations']} |" in page
    assert "not measured" in page


@pytest.mark.parametrize(("name", "regions"), [("sudoku4", 16), ("even-pixels", 16), ("polygons", 25)])
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
        regions = 81 if name == "sudoku9" else 25 if name == "polygons" else 16
        for method in methods(how, regions):
            count = max(1, round(method.fraction * regions))
            for mark in method.marks:
                assert method.again is not None
                look = method.choice in ("uncertain", "conflict")
                spent = method.start.length(regions) + mark * (method.again.length(count) + look)
                assert spent <= max(budgets(how, regions))
        names = {(method.name, method.fraction) for method in methods(how, regions)}
        assert {("IPR", 0.25), ("whole image", 1.0), ("sequential", 0.0)} <= names
        # The sequential sampler gets all that IPR spends, but for less than one more step of each region.
        passes = [method.start for method in methods(how, regions) if method.name == "sequential"]
        for budget, one in zip(budgets(how, regions), passes[1:], strict=True):
            assert one.length(regions) <= budget < replace(one, steps=one.steps + 1).length(regions)
            assert one.overlap == how.start.overlap


def test_findings_compare_the_last_iteration_with_the_best_of_the_others() -> None:
    def row(method: str, valid: float, evaluations: int, **more: float) -> dict[str, Any]:
        return {"method": method, "rate": valid, "se": 0.03, "evaluations": evaluations, "given": 0.0} | more

    ipr = {"fraction": 0.25, "level": 1.0}
    rows = [
        row("IPR", 0.9, 50, **ipr), row("IPR", 0.8, 100, **ipr), row("IPR", 0.99, 100, fraction=0.5, level=1.0),
        row("sequential", 0.6, 100), row("sequential", 0.5, 48), row("sequential", 0.95, 101),
        row("whole image", 0.82, 60, fraction=1.0, level=0.3), row("whole image", 0.7, 100, fraction=1.0, level=0.5),
    ]  # fmt: skip
    [line] = findings({"rows": rows})
    assert "0% given, 100 evaluations: IPR is valid in 80.0 ± 3.0 %" in line
    assert "+20.0 ± 4.2 over sequential (60.0 ± 3.0, 100)" in line  # the one of 101 evaluations is not asked
    assert "-2.0 ± 4.2 over whole image at level 0.3 (82.0 ± 3.0, 60)" in line and "restart" not in line
    rows += [row("least certain regions", 0.85, 49), row("least certain regions", 0.95, 99)]
    assert choices({"rows": rows}) == [
        "- Least certain regions instead of random ones, in points (evaluations): "
        "-5.0 ± 4.2 (49 and 50); +15.0 ± 4.2 (99 and 100)."
    ]


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


def test_a_model_is_not_measured_on_other_handwriting(tmp_path: Path) -> None:
    """Its slices may hold what the model has seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmarks.BENCHMARKS, "sudoku4", replace(BENCHMARKS["sudoku4"], **TINY))
        build("sudoku4", None, 1, tmp_path)
    config = json.loads((tmp_path / "sudoku4" / "config.json").read_text())
    assert config["handwriting"] == "scikit-learn digits" and "sudoku4 --train" in config["made_by"]
    np.savez(tmp_path / "ink.npz", images=np.zeros((1000, 28, 28), np.uint8), labels=np.arange(1000) % 10)
    with pytest.raises(WinnowError, match=r"learned from scikit-learn digits, not ink\.npz"):
        measure("sudoku4", tmp_path, 4, 0, str(tmp_path / "ink.npz"))


def test_a_measurement_that_was_killed_goes_on(tmp_path: Path) -> None:
    """Of two runs, the second makes what the first has not; the figures are those of one run, but for the time."""
    ran: list[str] = []
    inner = Bench.run

    def run(self: Bench, method: Method) -> Any:
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(method.name)
        return inner(self, method)

    def timeless(figures: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in figures["rows"]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmarks.BENCHMARKS, "even-pixels", replace(BENCHMARKS["even-pixels"], **TINY))
        build("even-pixels", None, 1, tmp_path)
        whole = measure("even-pixels", tmp_path, 4, 0)[0]
        assert not (tmp_path / "even-pixels.state").exists()
        with patch.context() as stop:
            stop.setattr(Bench, "run", run)
            with pytest.raises(KeyboardInterrupt):
                measure("even-pixels", tmp_path, 4, 0)
        with open(tmp_path / "even-pixels.state" / "rows.jsonl", "a") as notes:
            notes.write('{"cut": [{"rate": 0.5}')
        first, second = ran, []
        patch.setattr(Bench, "run", lambda *given: (second.append(given[1].name), inner(*given))[1])
        again = measure("even-pixels", tmp_path, 4, 0)[0]
    assert timeless(again) == timeless(whole) and not (tmp_path / "even-pixels.state").exists()
    every = [method.name for method in methods(replace(BENCHMARKS["even-pixels"], **TINY), 16)]
    assert first == every[:5] and second == every[5:]


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


def test_the_published_figures_are_whole() -> None:
    figures = found(HOME / "results")
    page = (HOME / "results" / "ipr.md").read_text()
    assert "sudoku4" in figures
    for name, one in figures.items():
        assert one["n"] >= 500 and all(row["n"] == one["n"] for row in one["rows"])
        assert (HOME / "results" / f"ipr-{name}.svg").exists()
        for row in one["rows"]:
            assert f"{100 * row['rate']:.1f} ± {100 * row['se']:.1f}" in page
    for picture in (HOME / "results").glob("ipr-*.png"):
        with Image.open(picture) as image:
            assert image.size[0] > 100 and picture.stat().st_size < 150_000


def test_the_readme_quotes_the_published_figures() -> None:
    text = (HOME / "README.md").read_text().split("## Iterative partial refinement")[1].split("\n## ")[0]
    rows = [row for row in found(HOME / "results")["sudoku4"]["rows"] if not row["given"]]
    shares = {(f"{row['evaluations']}", f"{100 * row['rate']:.1f} ± {100 * row['se']:.1f} %") for row in rows}
    quoted = re.findall(r"\| (\d+) \| ([\d.]+ ± [\d.]+ %) \|", text)
    assert len(quoted) >= 6 and set(quoted) <= shares
