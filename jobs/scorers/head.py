"""The head that ImageReward and the second aesthetic predictor share: a stack of linear layers without activations."""

from __future__ import annotations

from torch import Tensor, nn

#: Widths after the feature's 768. Dropout sits between the first ones while training, so the published names of the
#: layers skip numbers: layers.0, .2, .4, .6 and .7.
WIDTHS = (1024, 128, 64, 16, 1)


class Head(nn.Module):
    """Feature [N, 768] → value [N]."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        a, b, c, d, e = WIDTHS
        self.layers = nn.Sequential(
            nn.Linear(width, a), nn.Identity(), nn.Linear(a, b), nn.Identity(), nn.Linear(b, c), nn.Identity(),
            nn.Linear(c, d), nn.Linear(d, e),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(1)
