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


def draft_of(file: Path) -> Path:
    """Where the next state of the file is written first; what a killed process left there is written over."""
    return file.with_suffix(".draft")


@dataclass(frozen=True)
class State:
    """The trained weights, their moving average and AdamW's moments, each in the order of ``parameters``."""

    parameters: list[nn.Parameter]
    average: list[Tensor]
    optimiser: torch.optim.AdamW

    def _tensors(self) -> dict[str, Tensor]:
        found = {}
        for i, (parameter, average) in enumerate(zip(self.parameters, self.average, strict=True)):
            found[f"parameter.{i}"] = parameter.detach()
            if average.data_ptr() != parameter.data_ptr():
                found[f"average.{i}"] = average
            moments = self.optimiser.state.get(parameter, {})  # a weight that no gradient reached has none
            found |= {f"{name}.{i}": moments[name] for name in MOMENTS if name in moments}
        return found

    def keep(self, file: Path, step: int) -> None:
        """Write all of it, and that ``step`` steps are done, in place of the last state: the file is always whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_of(file)
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        try:
            with storage_errors(file.parent, file.name):
                save_file(tensors, draft, metadata={"step": str(step)})
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
                for i, (parameter, average) in enumerate(zip(self.parameters, self.average, strict=True)):
                    parameter.copy_(kept.get_tensor(f"parameter.{i}"))
                    if average.data_ptr() != parameter.data_ptr():
                        average.copy_(kept.get_tensor(f"average.{i}"))
                    if f"{MOMENTS[0]}.{i}" in names:
                        moments = {name: kept.get_tensor(f"{name}.{i}").to(parameter.device) for name in MOMENTS}
                        # A fused AdamW counts on the device of its weights.
                        self.optimiser.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device)}
                        self.optimiser.state[parameter] |= moments
                if len(names) != len(self._tensors()):
                    raise ValueError(f"it holds {len(names)} tensors, this model {len(self._tensors())}")
            return step
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise WinnowError(
                f"{file}: the kept state cannot be read ({reason}); remove it to train this round from its start"
            ) from error
