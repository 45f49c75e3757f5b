"""Training that is stopped, shared or watched ends where it would have ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, ForkServer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training_loop import examples

from jobs import models
from jobs.generate import Generate
from jobs.train import Train
from jobs.training.cache import build
from jobs.training.loop import Trainer, fine_tune
from jobs.training.watch import Watch
from schemas.errors import WinnowError

SETTINGS = Train(steps=30, batch=4, lr=1e-3, lr_floor=0.1, ema=0.9, checkpoint=3, prompt_dropout=0.3)
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 0.0]


def train_and_save(model: str, progress: str, out: str, **how: Any) -> None:
    """What the other processes run."""
    pipe = models.load(model)
    settings = SETTINGS.model_copy(update=how)
    data = build(pipe, examples(WEIGHTS), Path(progress).with_suffix(".cache"))
    fine_tune(pipe, data, settings, 7, Path(progress))
    save_file({k: v.contiguous() for k, v in pipe.unet.state_dict().items()}, out)


def steps_done(progress: Path) -> int:
    with safe_open(progress, "pt") as state:
        return int(state.metadata()["step"])


def test_killed_and_resumed_gives_the_same_weights_to_the_bit(
    stable_diffusion: Path, forks: ForkServer, tmp_path: Path
) -> None:
    call, log = "test_training_resume:train_and_save", tmp_path / "log"
    first = (tmp_path / "a.safetensors", tmp_path / "a.out")
    forks.start(call, str(stable_diffusion), *map(str, first), log=log)
    assert forks.wait() == 0, log.read_text()

    progress, out = tmp_path / "b.safetensors", tmp_path / "b.out"
    steps: list[int] = []  # where each killed run had come to
    for _ in range(20):
        before = progress.stat().st_mtime_ns if progress.exists() else 0
        child = forks.start(call, str(stable_diffusion), str(progress), str(out), log=log)
        while not out.exists():  # the kill comes right after the next checkpoint
            now = progress.stat().st_mtime_ns if progress.exists() else 0
            if now != before:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.002)
        status = forks.wait()
        if status != -9:
            assert status == 0, log.read_text()
            break
        steps.append(steps_done(progress))
    assert len(steps) >= 2 and steps == sorted(set(steps)) and not any(step % 3 for step in steps), steps
    base = load_file(stable_diffusion / "unet" / "diffusion_pytorch_model.safetensors")
    whole, resumed = load_file(first[1]), load_file(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert max((whole[name] - base[name]).abs().max().item() for name in whole) > 1e-4  # it did learn
    # The last states, too: weights, average and both moments of the optimiser at step 27.
    states = load_file(first[0]), load_file(progress)
    assert states[0].keys() == states[1].keys() and steps_done(first[0]) == steps_done(progress) == 27
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0].keys() == {"weights", "average", "exp_avg", "exp_avg_sq"}
    assert all(len(whole) > 20_000 and whole.any() for whole in states[0].values())


def test_two_processes_end_with_the_weights_of_one(stable_diffusion: Path, tmp_path: Path) -> None:
    """Over gloo; the batch of 5 does not divide by two."""
    code = (
        "import sys; import torch; torch.set_num_threads(1)\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from accelerate import PartialState\n"
        "from test_training_resume import train_and_save\n"
        "model, home, steps = sys.argv[1:]\n"
        "rank = PartialState(cpu=True).process_index\n"
        "how = {'batch': 5, 'steps': int(steps), 'lr': 1e-4}\n"
        "train_and_save(model, f'{home}/{rank}.safetensors', f'{home}/{rank}.out', **how)\n"
    )
    script = tmp_path / "two.py"
    script.write_text(code)
    for home, processes in (("one", 1), ("two", 2)):
        (tmp_path / home).mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        done = subprocess.run(
            [sys.executable, *launch, str(script), str(stable_diffusion), str(tmp_path / home), "8"],
            cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, two, twin = (load_file(tmp_path / name) for name in ("one/0.out", "two/0.out", "two/1.out"))
    base = load_file(stable_diffusion / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(two[name], twin[name]) for name in two)
    moved = torch.cat([(one[name] - base[name]).abs().flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    # Adam divides by the gradient's size, so rounding in a gradient near 0 shows as a share of the learning rate.
    assert moved.max() > 2e-4 and apart.quantile(0.99) < 1e-6 and apart.max() < 2e-4
    assert (tmp_path / "two" / "0.safetensors").exists() and not (tmp_path / "two" / "1.safetensors").exists()


def test_more_processes_than_rows_of_a_batch_are_refused(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from jobs import devices

    pipe = models.load(str(stable_diffusion))
    data = build(pipe, examples(WEIGHTS), tmp_path / "cache")
    monkeypatch.setattr(devices, "processes", lambda: SimpleNamespace(num_processes=8, process_index=0))
    with pytest.raises(WinnowError, match=r"train\.batch is 4, for 8 processes; give at least as many"):
        Trainer(pipe, data, SETTINGS, 7)


def test_a_damaged_state_says_how_to_go_on(stable_diffusion: Path, tmp_path: Path) -> None:
    pipe = models.load(str(stable_diffusion))
    data, progress = build(pipe, examples(WEIGHTS), tmp_path / "cache"), tmp_path / "p.safetensors"
    Trainer(pipe, data, SETTINGS, 7).state.keep(progress, 5)
    whole = progress.read_bytes()
    flipped = whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:]
    later = whole.replace(b'"step":"5"', b'"step":"9"')
    assert later != whole
    for damage in (b"abc" * 100, whole[:-50], b"", flipped, later):
        progress.write_bytes(damage)
        with pytest.raises(WinnowError, match=r"p\.safetensors: the kept state cannot be read .*remove it to train"):
            fine_tune(pipe, data, SETTINGS, 7, progress)


def test_weights_that_are_all_held_back_are_refused(stable_diffusion: Path, tmp_path: Path) -> None:
    pipe, settings = models.load(str(stable_diffusion)), SETTINGS.model_copy(update={"validation": 0.5, "watch": 5})
    data = build(pipe, examples([1.0] * 8), tmp_path / "cache")
    data.weights[Trainer(pipe, data, settings, 7).kept] = 0
    with pytest.raises(WinnowError, match="holds back every row of a weight above 0"):
        Trainer(pipe, data, settings, 7)


def test_a_model_that_drops_at_random_goes_on_alike(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(progress: Path, steps: int) -> dict[str, torch.Tensor]:
        pipe = models.load(str(stable_diffusion))
        for module in pipe.unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        torch.manual_seed(steps)  # what the process drew before is nobody's business
        data = build(pipe, examples(WEIGHTS), tmp_path / "cache")
        with monkeypatch.context() as patch:
            if steps < SETTINGS.steps:  # as a kill right after the checkpoint
                patch.setattr(Trainer, "check", lambda self, step: None if step <= steps else 1 / 0)
            fine_tune(pipe, data, SETTINGS, 7, progress)
        return dict(pipe.unet.state_dict())

    whole = play(tmp_path / "a.safetensors", SETTINGS.steps)
    with pytest.raises(ZeroDivisionError):
        play(tmp_path / "b.safetensors", 6)
    resumed = play(tmp_path / "b.safetensors", SETTINGS.steps)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_look_after_a_resume_tells_no_mean_of_some_of_the_steps(stable_diffusion: Path, tmp_path: Path) -> None:
    lines = []
    for stopped in (False, True):
        pipe = models.load(str(stable_diffusion))
        data = build(pipe, examples(WEIGHTS), tmp_path / "cache")
        watch = Watch(tmp_path, "reports/x", 9, (), Generate())
        file = tmp_path / "reports" / "x" / "losses.jsonl"
        if stopped:
            file.write_text('{"step": 9, "tr')  # of a disk that was full
            Trainer(pipe, data, SETTINGS, 7).state.keep(tmp_path / "p.safetensors", 3)
        fine_tune(pipe, data, SETTINGS, 7, tmp_path / "p.safetensors", "train", watch)
        (tmp_path / "p.safetensors").unlink(missing_ok=True)
        lines.append([json.loads(line) for line in file.read_text().splitlines()])
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert "train" in lines[0][0] and "train" not in lines[1][0] and "train" in lines[1][1]


def test_watching_changes_nothing_and_shows_what_there_is(stable_diffusion: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"steps": 12, "validation": 0.5})
    made = []
    for watched in (False, True):
        pipe = models.load(str(stable_diffusion))
        data = build(pipe, examples([1.0] * 8), tmp_path / "cache")
        watch = Watch(tmp_path, "reports/x", 5, WORDS[:3], Generate(steps=2, guidance=2.0, batch=2))
        fine_tune(pipe, data, settings, 7, tmp_path / f"{watched}.safetensors", "train", watch if watched else None)
        made.append(pipe.unet.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    lines = [json.loads(line) for line in (tmp_path / "reports" / "x" / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert all(0 < line["train"] < 10 and 0 < line["validation"] < 10 for line in lines)
    sheets = sorted((tmp_path / "reports" / "x").glob("*.png"))
    assert [sheet.name for sheet in sheets] == ["sheet-00005.png", "sheet-00010.png", "sheet-00012.png"]
    pixels = [np.asarray(Image.open(sheet), int) for sheet in sheets]
    assert pixels[0].shape == (32, 4 * 32, 3) and pixels[0][:, :96].std() > 2 and (pixels[0][:, 96:] == 255).all()
    assert (pixels[0] != pixels[2]).any()

    # The last validation loss is that of the model that training ended with, of rows that it never saw.
    from jobs.training.watch import validation

    pipe.unet.load_state_dict(made[1])
    trainer = Trainer(pipe, data, settings, 7)
    assert validation(trainer) == pytest.approx(lines[-1]["validation"], rel=1e-5)
    assert validation(trainer) == validation(trainer)
    assert 0 < len(trainer.held_back) < 6 and sorted([*trainer.kept, *trainer.held_back]) == list(range(8))


def test_rows_that_are_held_back_are_never_trained_on(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, seen = models.load(str(stable_diffusion)), []
    data = build(pipe, examples([1.0] * 8), tmp_path / "cache")
    inner = Trainer.batch

    def spy(self: Trainer, step: int, rows: np.ndarray) -> Any:
        seen.extend(rows.tolist())
        return inner(self, step, rows)

    monkeypatch.setattr(Trainer, "batch", spy)
    settings = SETTINGS.model_copy(update={"steps": 6, "validation": 0.5})
    fine_tune(pipe, data, settings, 7, tmp_path / "p.safetensors")
    held = set(Trainer(pipe, data, settings, 7).held_back)
    assert held and set(seen) == set(range(8)) - held
    # The very rows, in another round's order and among others: none is trained on that was held back once.
    more = build(pipe, examples([1.0] * 20)[::-1], tmp_path / "cache")
    later = Trainer(pipe, more, settings, 8)
    assert {data.sample_ids[row] for row in held} <= {more.sample_ids[row] for row in later.held_back}
