"""The tokenizer that is an autoencoder around a quantizer."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from discrete_lit.evaluation.codebook_usage import MOST_COUNTED, CodebookUsage
from discrete_lit.tokenizers.image_autoencoder import ImageAutoencoder, Reconstruction
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import Quantizer
from discrete_lit.tokenizers.quantizers.quantizer import Part
from discrete_lit.tokenizers.tokenizer import Tokenizer

# The name of all ids together among those of their parts.
_WHOLE = "all"


class AutoencoderTokenizer(ImageAutoencoder, Tokenizer):
    """Trained by the objective of an image autoencoder and the quantizer's terms.

    In validation it also logs `validation/codebook_usage` (share of the K ids that occur) and `validation/perplexity`
    (exp of the entropy of the ids in nats, between 1 and K), and both again, as `validation/codebook_usage/<part>`, of
    each part that the quantizer names: a codebook of several, a scale, a bit. Above K = 2^24 the parts alone.

    Args:
        network: called with the quantizer's `dim` and `latent_dim`.
        quantizer: from latents to ids and code vectors.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.
    """

    def __init__(self, network: Callable[[int, int], Autoencoder], quantizer: Quantizer, **training: Any) -> None:
        super().__init__(network(quantizer.dim, quantizer.latent_dim), **training)
        self.quantizer = quantizer
        self.vocab_size = quantizer.vocab_size
        self.usage = nn.ModuleDict()

    def token_shape(self, image_size: int) -> tuple[int, ...]:
        return self.quantizer.token_shape(self.network.grid(image_size))

    def coding_state(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if not name.startswith("objective.")}

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.quantizer.encode(self.network.encode(images).movedim(1, -1))

    def embed(self, tokens: Tensor) -> Tensor:
        self.check_tokens(tokens)
        return self.quantizer.lookup(tokens).movedim(-1, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.objective.images(self.network.decode(self.embed(tokens)).float())

    def parts(self, tokens: Tensor) -> dict[str, Part]:
        return self.quantizer.parts(tokens)

    def reconstruct(self, images: Tensor) -> Reconstruction:
        quantized = self.quantizer(self.network.encode(images).movedim(1, -1))
        outputs = self.network.decode(quantized.codes.movedim(-1, 1)).float()
        return Reconstruction(outputs, quantized.losses, quantized.tokens)

    def validate(self, made: Reconstruction) -> None:
        assert made.tokens is not None
        counted = self.parts(made.tokens)
        if self.vocab_size <= MOST_COUNTED:
            counted[_WHOLE] = Part(made.tokens, self.vocab_size)
        for name, part in counted.items():
            if name not in self.usage:
                self.usage[name] = CodebookUsage(part.size).to(self.device)
            cast(CodebookUsage, self.usage[name]).update(part.ids)

    def on_validation_epoch_end(self) -> None:
        for name, measured in self.usage.items():
            measured = cast(CodebookUsage, measured)
            usage, perplexity = measured.compute()
            measured.reset()
            suffix = "" if name == _WHOLE else f"/{name}"
            figures = {f"validation/codebook_usage{suffix}": usage, f"validation/perplexity{suffix}": perplexity}
            self.log_dict(figures, sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The ids `(B, *token_shape)` of a batch of images."""
        return self.encode(batch["image"])
