"""From the last hidden states to logits."""

from typing import Literal

import torch
from torch import Tensor, nn

from discrete_lit.backbones.linear import Linear, full_precision_linear
from discrete_lit.backbones.norms import Norm


class Head(nn.Module):
    """Logits in float32.

    Args:
        width: D.
        places: of the grid.
        outputs: K for each part.
        transform: a linear layer, GELU and LayerNorm first, BERT's.
        bias: a learned offset of the logits: none, one for all places, or one of each place (MaskBit's BERT).
        tied: the weight is the token embedding's.
        epsilon: of the transform's norm.
    """

    def __init__(
        self,
        width: int,
        places: int,
        outputs: int,
        transform: bool,
        bias: bool | Literal["place"],
        tied: bool,
        epsilon: float,
    ) -> None:
        super().__init__()
        self.transform = None
        if transform:
            self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), Norm(width, "layer", epsilon=epsilon))
        self.project = None if tied else Linear(width, outputs, bias=False, autocast=False)
        shape = (places, outputs) if bias == "place" else (outputs,)
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, hidden: Tensor, tied: Tensor | None = None) -> Tensor:
        """`(B, n, D)` to `(B, n, outputs)`; `tied` is the embedding's weight `(outputs, D)`."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if self.project is not None:
            logits = self.project(hidden).float()
        else:
            assert tied is not None
            logits = full_precision_linear(hidden, tied).float()
        return logits if self.bias is None else logits + self.bias.float()
