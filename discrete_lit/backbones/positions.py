"""Positions along the sequence or along each axis of the grid.

Rotary ones (Su et al., "RoFormer", 2021), and fixed sines and cosines (Vaswani et al., "Attention Is All You Need",
2017).
"""

import torch
from torch import Tensor


def rotary_table(coordinates: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Angles for positions with one or more coordinates; each coordinate turns an equal share of the pairs.

    Args:
        coordinates: `(n, axes)`, integer places.
        head_dim: a multiple of 2 x axes.
        base: the wavelengths are 2 pi base^(2i / d).

    Returns:
        `(n, head_dim / 2, 2)` float32: cosine and sine of every pair.

    Raises:
        ValueError: a head width that does not divide.
    """
    axes = coordinates.shape[1]
    if head_dim % (2 * axes):
        raise ValueError(f"rotary positions over {axes} axes need a head width divisible by {2 * axes}, got {head_dim}")
    pairs = head_dim // (2 * axes)
    frequencies = base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = (coordinates.double()[..., None] * frequencies).flatten(1)  # (n, axes * pairs)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of `x (B, heads, n, head_dim)` by `table (n, head_dim / 2, 2)`."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2).to(x.dtype)


def grid_coordinates(grid: tuple[int, ...]) -> Tensor:
    """`(N, axes)` int64: the place of every token of a raster-ordered grid."""
    return torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(-1, len(grid))


def sine_cosine_table(coordinates: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """Fixed embeddings of positions with one or more coordinates; each coordinate fills an equal share of the width.

    Args:
        coordinates: `(n, axes)`, integer places.
        width: D; a multiple of 2 x axes.
        base: the wavelengths are 2 pi base^(2i / d).

    Returns:
        `(n, D)` float32: for each axis the sines of all wavelengths, then the cosines.

    Raises:
        ValueError: a width that does not divide.
    """
    axes = coordinates.shape[1]
    if width % (2 * axes):
        raise ValueError(f"sine-cosine positions over {axes} axes need a width divisible by {2 * axes}, got {width}")
    waves = width // (2 * axes)
    frequencies = base ** -(torch.arange(waves, dtype=torch.float64) / waves)
    angles = coordinates.double()[..., None] * frequencies  # (n, axes, waves)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1).float()
