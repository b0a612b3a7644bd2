"""The encoder of images for what they show: a vision transformer of patches, whose outputs a language model reads."""

from torch import Tensor, nn

from discrete_lit.backbones.blocks import Block, BlockSettings
from discrete_lit.backbones.layers import Norm


class VisionEncoder(nn.Module):
    """Encode images by a vision transformer without a class token (SigLIP's: Zhai et al., 2023; in Janus).

    Args:
        width: D.
        depth: blocks.
        heads: attention heads.
        image_size: side of the images in pixels.
        patch_size: side of a patch in pixels.
        mlp_hidden: inner width of the MLPs; 4 x width by default.
        image_channels: C of the images.
        norm_epsilon: of every LayerNorm.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        heads: int,
        image_size: int,
        patch_size: int,
        mlp_hidden: int | None = None,
        image_channels: int = 3,
        norm_epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        if min(width, depth, heads, patch_size) < 1 or width % heads or image_size < 1 or image_size % patch_size:
            raise ValueError(
                f"heads={heads} must divide width={width}, and patch_size={patch_size} image_size={image_size}; depth "
                f"must be at least 1, got {depth}"
            )
        self.image_size, self.image_channels, self.width = image_size, image_channels, width
        self.places = (image_size // patch_size) ** 2
        settings = BlockSettings(
            width=width,
            heads=heads,
            head_dim=width // heads,
            mlp_hidden=mlp_hidden or 4 * width,
            norm_epsilon=norm_epsilon,
        )
        self.patches = nn.Conv2d(image_channels, width, patch_size, stride=patch_size)
        self.positions = nn.Embedding(self.places, width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(depth))
        self.final_norm = Norm(width, "layer", epsilon=norm_epsilon)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` in [-1, 1] to features `(B, places, width)`.

        Raises:
            ValueError: images of another size.
        """
        expected = (self.image_channels, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected or not images.is_floating_point():
            raise ValueError(
                f"the encoder reads images {expected} in [-1, 1], got {images.dtype} {tuple(images.shape[1:])}"
            )
        x = self.patches(images.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)
