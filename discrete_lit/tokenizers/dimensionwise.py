"""Dimension-wise quantisation: a continuous tokenizer's latents as ids, without training (TokenBridge).

Wang et al., "Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation", 2025. Each channel of each
latent becomes an id of its own, by the levels of the normal law that latents are near to. With enough levels nothing
visible is lost, and a generator that predicts the ids of a place one after another has a plain cross-entropy.

A generator names the tokenizer as its `tokenizer`; for `discrete-lit tokenize` a checkpoint is written by

    package = "discrete_lit.tokenizers"
    vae = {"class_path": f"{package}.continuous_from_checkpoint", "init_args": {"checkpoint": "kl16.ckpt"}}
    arguments = {"tokenizer": vae, "levels": 64}
    save(instantiate({"class_path": f"{package}.DimensionwiseTokenizer", "init_args": arguments}), "levels.ckpt")

of `discrete_lit.checkpoints`.
"""

from typing import Any, Self

from einops import rearrange
from torch import Tensor

from discrete_lit.checkpoints import record_config
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.tokenizers.quantizers.normal_levels import NormalLevels
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer, Tokenizer, freeze


class DimensionwiseTokenizer(Tokenizer):
    """Make ids `(B, *grid, D)` of a continuous tokenizer's scaled latents `(B, D, *grid)`, each number by itself.

    The ids are of the latents' means; TokenBridge trains on those of samples. Levels are fine where latents have about
    unit deviation: give the tokenizer its scale.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.continuous_from_checkpoint` in a YAML.
        levels: B, ids of each number: 64 in TokenBridge.
        low: the least latent that has a level of its own; smaller ones take the lowest level.
        high: the largest one.
        std_range: deviations of the normal law to which `[low, high]` is mapped; see `NormalLevels`.

    Raises:
        ValueError: a discrete tokenizer, or a setting out of its range.
    """

    ordered_ids = True

    def __init__(
        self,
        tokenizer: ContinuousTokenizer,
        levels: int = 64,
        *,
        low: float = -5.0,
        high: float = 5.0,
        std_range: float = 3.0,
    ) -> None:
        super().__init__()
        if not isinstance(tokenizer, ContinuousTokenizer):
            raise ValueError(
                "a DimensionwiseTokenizer quantises the latents of a ContinuousTokenizer; a "
                f"{type(tokenizer).__name__} has none"
            )
        self.quantizer = NormalLevels(levels, low=low, high=high, std_range=std_range)
        self.tokenizer = freeze(tokenizer)
        self.vocab_size = levels
        self.makes_images = tokenizer.makes_images
        if tokenizer.hparams:
            # By the tokenizer's own configuration instead of its file's name, so that checkpoints load without that.
            described: dict[str, Any] = {name: tokenizer.hparams[name] for name in ("class_path", "init_args")}
            settings = {"levels": levels, "low": low, "high": high, "std_range": std_range}
            path = f"discrete_lit.tokenizers.{type(self).__name__}"
            record_config(self, {"class_path": path, "init_args": {"tokenizer": described, **settings}})

    @property
    def image_channels(self) -> int:
        """C of the images."""
        return int(getattr(self.tokenizer, "image_channels", 3))

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        channels, *grid = self.tokenizer.latent_shape(image_size)
        return (*grid, channels)

    @in_evaluation
    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer(rearrange(self.tokenizer.encode(images), "b d ... -> b ... d"))

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the latents `(B, D, *grid)` that ids `(B, *grid, D)` stand for."""
        self.check_tokens(tokens)
        return rearrange(self.quantizer.lookup(tokens), "b ... d -> b d ...")

    @in_evaluation
    def decode(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.decode(self.embed(tokens))

    def coding_state(self) -> dict[str, Tensor]:
        """The levels, and what the continuous tokenizer codes by."""
        inner = {f"tokenizer.{name}": value for name, value in self.tokenizer.coding_state().items()}
        return {"values": self.quantizer.values, **inner}

    def train(self, mode: bool = True) -> Self:
        """Set the mode as PyTorch does, but keep the frozen tokenizer in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self
