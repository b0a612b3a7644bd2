"""The stack of transformer blocks in the autoencoders that have no convolutions."""

from dataclasses import dataclass

from torch import Tensor, nn

from discrete_lit.backbones.blocks import Block, BlockSettings
from discrete_lit.backbones.norms import Norm

# Of every LayerNorm, as in the published networks.
_EPSILON = 1e-5


@dataclass(frozen=True)
class TransformerSize:
    """Size of an encoder or a decoder.

    Attributes:
        width: D of the sequence; a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
        mlp_hidden: inner width of the MLPs; 4 x width by default.
    """

    width: int
    depth: int
    heads: int
    mlp_hidden: int | None = None

    @property
    def hidden(self) -> int:
        """Inner width of the MLPs."""
        return 4 * self.width if self.mlp_hidden is None else self.mlp_hidden


class TransformerBlocks(nn.Module):
    """Pre-norm blocks in which every element sees every other, with LayerNorm, GELU and biases.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        if size.width % size.heads:
            raise ValueError(f"width={size.width} is not a multiple of heads={size.heads}")
        self.blocks = nn.ModuleList(
            Block(BlockSettings(size.width, size.heads, size.width // size.heads, size.hidden, norm_epsilon=_EPSILON))
            for _ in range(size.depth)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, n, D) -> (B, n, D)
        for block in self.blocks:
            x = block(x)
        return x


def layer_norm(width: int) -> Norm:
    """A LayerNorm beside the blocks, of the same kind as theirs."""
    return Norm(width, "layer", epsilon=_EPSILON)


def tanh_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """Two linear layers with a tanh between them, the last ones of these networks."""
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))


def initialise(network: nn.Module) -> None:
    """Normal weights of deviation 0.02, truncated at two absolute units, and zero biases (ViT's)."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
