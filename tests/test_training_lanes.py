"""Two halves of a batch side by side are the batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training_loop import folder, gradient, start
from test_training_resume import train_and_save

from jobs import models
from jobs.families import family
from jobs.training.flat import Flat
from jobs.training.lanes import Lanes

__all__ = ["folder"]


@pytest.fixture
def two() -> Iterator[None]:
    """Two cores."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@contextmanager
def pair(folder: Path, tmp_path: Path, weights: list[float], **how: Any) -> Iterator[list[Any]]:
    """Trainers of one lane and of two, of the same start."""
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(start(folder, tmp_path, weights, precision="float32", **how))
        assert len(made[-1].lanes.pipes) == (1 if how.get("micro_batch") == 1 else threads)
    with made[-1].lanes:
        yield made


@pytest.mark.parametrize(
    "how",
    [{}, {"method": "lora"}, {"micro_batch": 3}, {"micro_batch": 1}, {"checkpointing": True}, {"prompt_dropout": 0.5}],
    ids=str,
)
def test_two_lanes_give_the_gradient_of_one(folder: Path, tmp_path: Path, two: None, how: dict[str, Any]) -> None:
    weights = [2.0, 1.0, 0.0, 0.5, 1.5]
    with pair(folder, tmp_path, weights, **how) as trainers:
        whole, halves = (gradient(one, [0, 1, 2, 3, 4]) for one in trainers)
    scale = float(whole.abs().max())
    assert scale > 1e-3
    assert (whole - halves).abs().max() <= 1e-6 * max(1.0, scale)
    assert torch.get_num_threads() == 2


def test_the_twin_has_the_same_parameters_and_takes_every_step(folder: Path, tmp_path: Path, two: None) -> None:
    with pair(folder, tmp_path, [1.0] * 4, lr=1e-3, ema=0.5, clip=1.0) as (one, both):
        for step in range(4):
            losses = [trainer.step(step, trainer.batch(step, np.arange(4))) for trainer in (one, both)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    own, twin = (family(pipe).model(pipe) for pipe in both.lanes.pipes)
    assert own is both.model and twin is not own
    for (name, p), (other, q) in zip(own.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other and p.data_ptr() == q.data_ptr() and not q.grad.any()
    moved = [(p - b).abs().max() for p, b in zip(both.flat.parameters, models.load(str(folder)).unet.parameters(),
                                                 strict=True)]  # fmt: skip
    assert max(moved) > 1e-3
    assert both.pipe.unet is own and both.pipe.config["unet"] == models.load(str(folder)).config["unet"]


def test_training_on_two_cores_repeats_to_the_bit(stable_diffusion: Path, tmp_path: Path, two: None) -> None:
    made = []
    for name in "ab":
        train_and_save(str(stable_diffusion), str(tmp_path / f"{name}.state"), str(tmp_path / name), checkpoint=0)
        made.append(load_file(tmp_path / name))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def lanes_of(pipe: Any, rows: int = 4) -> Lanes:
    return Lanes(pipe, family(pipe), Flat(list(pipe.unet.parameters())), rows)


def test_a_model_with_dropout_and_passes_of_one_row_are_not_shared_out(stable_diffusion: Path, two: None) -> None:
    pipe = models.load(str(stable_diffusion))
    assert len(lanes_of(pipe).pipes) == 2
    assert len(lanes_of(pipe, rows=1).pipes) == 1
    next(module for module in pipe.unet.modules() if isinstance(module, torch.nn.Dropout)).p = 0.1
    assert len(lanes_of(pipe).pipes) == 1


@pytest.mark.parametrize("bad", [0, 3])
def test_an_error_in_either_half_is_raised_and_the_cores_come_back(stable_diffusion: Path, two: None, bad: int) -> None:
    pipe = models.load(str(stable_diffusion))
    lanes = lanes_of(pipe)
    seen = []

    def work(pipe: Any, rows: slice) -> int:
        seen.append((rows.start, rows.stop))
        if rows.start <= bad < rows.stop:
            raise ValueError(f"row {bad}")
        return rows.start

    with pytest.raises(ValueError, match=f"row {bad}"), lanes:
        lanes(work, slice(0, 4))
    assert torch.get_num_threads() == 2
    assert set(seen) <= {(0, 2), (2, 4)}


def test_samples_are_in_their_order_and_a_single_one_is_not_shared_out(stable_diffusion: Path, two: None) -> None:
    pipe = models.load(str(stable_diffusion))
    lanes = lanes_of(pipe)
    for p in lanes.pipes:
        for q in family(p).model(p).parameters():
            q.grad.fill_(1)

    def work(pipe: Any, rows: slice) -> tuple[Any, list[int], int]:
        return pipe, list(range(rows.start, rows.stop)), torch.get_num_threads()

    with lanes:
        assert lanes(work, slice(3, 8)) == [(lanes.pipes[0], [3, 4, 5], 1), (lanes.pipes[1], [6, 7], 1)]
        assert all((p.grad == 2).all() for p in pipe.unet.parameters())
        assert lanes(work, slice(7, 8)) == [(pipe, [7], 1)]
    assert lanes(work, slice(3, 8)) == [(pipe, [3, 4, 5, 6, 7], 2)]
