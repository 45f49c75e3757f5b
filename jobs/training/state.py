"""The state of a training run in a file: what a run that was stopped goes on from, to the bit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from schemas.errors import WinnowError
from storage.durable import storage_errors

MOMENTS = ("exp_avg", "exp_avg_sq")


def drafts_of(file: Path) -> list[Path]:
    """Where next states of the file are written first, by each process in its own; those that killed ones left."""
    return list(file.parent.glob(f"{file.stem}.*.draft"))


def checksum(step: int, tensors: dict[str, Tensor]) -> str:
    """The step and the sum of each float32 tensor's bits as integers, by name, which no single changed bit leaves as it
    is: taken where the tensors are, at the speed of their memory."""
    sums = {name: int(tensor.detach().view(torch.int32).sum(dtype=torch.int64)) for name, tensor in tensors.items()}
    return " ".join([f"step={step}", *(f"{name}={sums[name]}" for name in sorted(sums))])


@dataclass(frozen=True)
class State:
    """The trained weights [n], their moving average and AdamW's moments."""

    weights: nn.Parameter
    average: Tensor
    optimiser: torch.optim.AdamW

    def _tensors(self) -> dict[str, Tensor]:
        found = {"weights": self.weights.detach()}
        if self.average.data_ptr() != self.weights.data_ptr():
            found["average"] = self.average
        moments = self.optimiser.state.get(self.weights, {})  # there are none before the first step
        return found | {name: moments[name] for name in MOMENTS if name in moments}

    def keep(self, file: Path, step: int) -> None:
        """Write all of it, and that ``step`` steps are done, in place of the last state: the file is always whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}.draft")
        try:
            with storage_errors(file.parent, file.name):
                kept = self._tensors()
                save_file(kept, draft, metadata={"step": str(step), "sums": checksum(step, kept)})
                with open(draft, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(draft, file)
        finally:
            draft.unlink(missing_ok=True)

    @torch.no_grad()
    def resume(self, file: Path) -> int:
        """Take up the state of the file; returns the steps done, 0 where there is none."""
        if not file.exists():
            return 0
        try:
            with safe_open(file, "pt") as kept:
                step, names = int(kept.metadata()["step"]), set(kept.keys())
                if MOMENTS[0] in names:
                    # A fused AdamW counts on the device of its weights.
                    count = torch.tensor(float(step), device=self.weights.device)
                    moments = {name: torch.zeros_like(self.weights) for name in MOMENTS}
                    self.optimiser.state[self.weights] = {"step": count, **moments}
                if names != (ours := self._tensors()).keys():
                    raise ValueError(f"it holds {', '.join(sorted(names))}")
                for name, tensor in ours.items():
                    tensor.copy_(kept.get_tensor(name))
                if checksum(step, ours) != kept.metadata()["sums"]:
                    raise ValueError("it is damaged: its checksum is another")
            return step
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise WinnowError(
                f"{file}: the kept state cannot be read ({reason}); remove it to train this round from its start"
            ) from error
