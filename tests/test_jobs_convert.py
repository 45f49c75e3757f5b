"""``winnow convert``: tensors come over bit by bit, nothing in a checkpoint is run, nothing is overwritten."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.checkpoint import tensors
from jobs.convert import convert
from jobs.scorers.aesthetic import Aesthetic
from schemas.errors import WinnowError

HEADS = Path(__file__).parents[2] / "shared" / "data" / "weights"


def checkpoint() -> dict[str, torch.Tensor]:
    shared = torch.randn(4, 6)
    return {
        "full": torch.randn(3, 5),
        "half": torch.randn(7).half(),
        "numbers": torch.arange(9),
        "bfloat": torch.randn(2, 2).bfloat16(),
        "one": shared,
        "same": shared,
        "part": shared[1:3],
        "turned": torch.randn(5, 2).T,
        "scalar": torch.tensor(2.6592),
        "empty": torch.zeros(0, 3),
        "empty too": torch.zeros(0),
    }


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_every_tensor_comes_over(tmp_path: Path, winnow: Callable[..., Any], wrapped: bool, form: str) -> None:
    state = checkpoint()
    payload = {"state_dict": state, "epoch": 3, "name": "x"} if wrapped else state
    torch.save(payload, tmp_path / "a.pt", _use_new_zipfile_serialization=form == "zip")
    said = winnow("convert", tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert said.status == 0 and said.out == f"{tmp_path / 'a.safetensors'}: {len(state)} tensors\n" and not said.err
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.safetensors"]  # no drafts are left
    both = tensors(tmp_path / "a.pt", "x"), tensors(tmp_path / "a.safetensors", "x")
    assert all(torch.equal(both[0][name], both[1][name]) for name in state)


def test_what_is_negated_or_conjugated_later_is_so_in_the_file(tmp_path: Path) -> None:
    numbers = torch.tensor([1.0, 2.0])
    named = {"a": torch._neg_view(numbers), "b": torch.tensor([1 + 2j]).conj().imag}
    torch.save(named, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found["a"].tolist() == [-1.0, -2.0] and found["b"].tolist() == [-2.0]


def test_once_more_is_the_same_and_something_else_is_refused(tmp_path: Path, winnow: Callable[..., Any]) -> None:
    torch.save(checkpoint(), tmp_path / "a.pt")
    torch.save(checkpoint(), tmp_path / "b.pt")
    target = tmp_path / "a.safetensors"
    assert winnow("convert", tmp_path / "a.pt", target).status == 0
    before = target.read_bytes(), target.stat().st_mtime_ns
    assert winnow("convert", tmp_path / "a.pt", target).status == 0
    assert "holds something else already; choose another name" in winnow("convert", tmp_path / "b.pt", target).line
    assert before == (target.read_bytes(), target.stat().st_mtime_ns)
    assert winnow("convert", target, tmp_path / "again.safetensors").status == 0
    assert (tmp_path / "again.safetensors").read_bytes() == before[0]


class Trap:
    """What an attacker pickles: unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, winnow: Callable[..., Any], form: str) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"a": torch.zeros(2), "b": Trap(str(sprung))}, tmp_path / "a.pt",
               _use_new_zipfile_serialization=form == "zip")  # fmt: skip
    line = winnow("convert", tmp_path / "a.pt", tmp_path / "a.safetensors").line
    assert "holds more than tensors (posix.mkdir), which may run code" in line
    assert not sprung.exists() and not (tmp_path / "a.safetensors").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert sprung.is_dir()  # so the trap was a true one


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        (torch.zeros(1), "holds a Tensor, not tensors by name"),
        ({"a": torch.zeros(1), "epoch": 3}, "holds a int under 'epoch'"),
        ({"a": {"b": torch.zeros(1)}}, "holds a dict under 'a'"),
        ({1: torch.zeros(1)}, "holds a Tensor under 1"),
        ({"state_dict": {}}, "holds nothing"),
        (torch.nn.Linear(2, 2), "holds more than tensors (torch.nn.modules.linear.Linear)"),
    ],
    ids=["list", "tensor", "number", "nested", "unnamed", "empty", "module"],
)
def test_what_is_no_dict_of_tensors_is_refused(
    tmp_path: Path, winnow: Callable[..., Any], payload: Any, why: str
) -> None:
    torch.save(payload, tmp_path / "a.pt")
    assert why in winnow("convert", tmp_path / "a.pt", tmp_path / "a.safetensors").line
    assert not (tmp_path / "a.safetensors").exists()


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path, winnow: Callable[..., Any]) -> None:
    target = tmp_path / "a.safetensors"
    assert "no such file; give a checkpoint" in winnow("convert", tmp_path / "a.pt", target).line
    for content, why in ((b"", ""), (b"hello", "no checkpoint"), (b"PK\x03\x04 and no more", "")):
        (tmp_path / "a.pt").write_bytes(content)
        assert f"a.pt cannot be read ({why}" in winnow("convert", tmp_path / "a.pt", target).line
    torch.save(checkpoint(), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "cut.pt cannot be read" in winnow("convert", tmp_path / "cut.pt", target).line
    assert "does not end in .safetensors" in winnow("convert", tmp_path / "a.pt", tmp_path / "b.pt").line
    assert "No such file or directory" in winnow("convert", tmp_path / "a.pt", tmp_path / "no" / "a.safetensors").line
    torch.save({"a": torch.zeros(3, 3).to_sparse()}, tmp_path / "sparse.pt")
    assert "holds a sparse or quantised tensor under 'a'" in winnow("convert", tmp_path / "sparse.pt", target).line
    torch.save({"a": torch.zeros(3, dtype=torch.complex128)}, tmp_path / "complex.pt")
    assert "complex128; convert it by hand" in winnow("convert", tmp_path / "complex.pt", target).line
    torch.save({"__metadata__": torch.zeros(3)}, tmp_path / "named.pt")
    assert "a tensor is named __metadata__" in winnow("convert", tmp_path / "named.pt", target).line
    assert not target.exists()


def convert_in_another_process(source: str, target: str) -> None:
    assert convert(Path(source), Path(target)) == 1


def test_a_kill_leaves_no_half_file(tmp_path: Path, forks: Any) -> None:
    """Killed at each file operation in turn, the target is whole or not there."""
    torch.save({"a": torch.randn(50, 50)}, tmp_path / "a.pt")
    target = tmp_path / "out" / "a.safetensors"
    target.parent.mkdir()
    outcomes = []
    while (-9, True) not in outcomes or outcomes[-1] != (0, True):
        log = tmp_path / "log"
        forks.start("test_jobs_convert:convert_in_another_process", str(tmp_path / "a.pt"), str(target),
                    log=log, events=len(outcomes) + 1)  # fmt: skip
        status = forks.wait()
        assert status in (0, -9), log.read_text()
        if there := target.exists():
            assert list(load_file(target)) == ["a"]
            target.unlink()
        outcomes.append((status, there))
        assert len(outcomes) < 2000
    assert (-9, False) in outcomes


@pytest.mark.parametrize(("version", "pattern"), [("v1", "aesthetic_v1*.pth"), ("v2", "aesthetic_v2*.pth")])
def test_the_true_heads_are_converted_and_score_alike(
    tmp_path: Path, winnow: Callable[..., Any], version: Any, pattern: str
) -> None:
    head = next(HEADS.glob(pattern), None) if HEADS.is_dir() else None
    if head is None:
        pytest.skip(f"{pattern} is not here")
    said = winnow("convert", head, tmp_path / "head.safetensors")
    assert said.out.endswith(f": {2 if version == 'v1' else 10} tensors\n")
    features = torch.nn.functional.normalize(torch.randn(8, 768), dim=1)
    pickled, converted = Aesthetic(version, str(head)), Aesthetic(version, str(tmp_path / "head.safetensors"))
    assert torch.equal(pickled.of(features), converted.of(features))
    other = Aesthetic("v2" if version == "v1" else "v1", str(head))
    with pytest.raises(WinnowError, match="lacks|does not know"):
        other.of(features)
