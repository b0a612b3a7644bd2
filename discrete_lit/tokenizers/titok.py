"""TiTok (Yu et al., "An Image is Worth 32 Tokens for Reconstruction and Generation", NeurIPS 2024)."""

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.image_autoencoder import Reconstruction
from discrete_lit.tokenizers.losses.frozen import FrozenNetwork
from discrete_lit.tokenizers.networks import ConvAutoencoder, TiTokAutoencoder
from discrete_lit.tokenizers.quantizers import Quantizer
from discrete_lit.tokenizers.tokenizer import from_checkpoint


class TiTok(AutoencoderTokenizer):
    """A row of a few tokens for a whole image.

    Trained in one stage like any autoencoder, or in the paper's two, whose network has a `proxy`:

    1. `proxy_tokenizer`: the decoder predicts the ids that another, frozen tokenizer (the paper's is MaskGIT's) gives
       the patches. The loss is their cross-entropy, `train/proxy`, and the quantizer's terms; no pixel loss applies.
    2. `first_stage`: what stage 1 learned begins; encoder and quantizer stay as they are, and the decoder with the
       proxy's is trained on the pixels.

    Args:
        network: called with the quantizer's `dim` and `latent_dim`.
        quantizer: the paper's is a `VectorQuantizer` of 4096 codes of width 12 on the unit sphere.
        proxy_tokenizer: for stage 1, the checkpoint of the other tokenizer, with a `ConvAutoencoder`. It is read when
            training starts.
        first_stage: for stage 2, the checkpoint of stage 1. It is read when training starts.
        training: settings of `ImageAutoencoder`: the losses, the optimizer, the scheduler.

    Raises:
        ValueError: both stages at once, or one without a proxy in the network.
    """

    network: TiTokAutoencoder

    def __init__(
        self,
        network: Callable[[int, int], TiTokAutoencoder],
        quantizer: Quantizer,
        proxy_tokenizer: str | None = None,
        first_stage: str | None = None,
        **training: Any,
    ) -> None:
        super().__init__(network, quantizer, **training)
        if proxy_tokenizer is not None and first_stage is not None:
            raise ValueError("proxy_tokenizer makes this stage 1 of two, first_stage makes it stage 2: set one of them")
        if (proxy_tokenizer or first_stage) and self.network.proxy is None:
            raise ValueError("training in two stages needs a network with a proxy: set network.init_args.proxy")
        if proxy_tokenizer and (self.objective.perceptual or self.objective.adversarial):
            raise ValueError("with proxy_tokenizer no pixels are compared: leave out perceptual_loss, adversarial_loss")
        self.first_stage = first_stage
        self.proxy_tokenizer = None
        if proxy_tokenizer is not None:
            assert self.network.proxy is not None
            self.proxy_tokenizer = FrozenNetwork(lambda: _read_proxy(proxy_tokenizer))
            self.network.proxy.requires_grad_(False)
        if first_stage is not None:
            self.network.encoder.requires_grad_(False)
            self.quantizer.requires_grad_(False)

    def setup(self, stage: str) -> None:
        """Take the proxy's decoder, for stage 1.

        Raises:
            ValueError: no such checkpoint, or one that does not fit.
        """
        super().setup(stage)
        if stage == "fit" and self.proxy_tokenizer is not None:
            self._begin_from_proxy(cast(AutoencoderTokenizer, self.proxy_tokenizer.prepare()))

    def on_fit_start(self) -> None:
        """Take what stage 1 learned, for stage 2, unless a run goes on from its own checkpoint.

        Raises:
            ValueError: no such checkpoint, or one that does not fit.
        """
        if self.first_stage is not None and self.trainer.ckpt_path is None:
            self._begin_from_first_stage(self.first_stage)

    def _begin_from_proxy(self, tokenizer: AutoencoderTokenizer) -> None:
        network = self.network
        patches = (network.patch_grid, network.patch_grid)
        if tokenizer.token_shape(network.image_size) != patches:
            raise ValueError(
                f"the proxy tokenizer makes {tokenizer.token_shape(network.image_size)} ids of {network.image_size} "
                f"pixels, and this network has {patches} patches: set network.init_args.patch_size"
            )
        assert network.proxy is not None
        codes = tokenizer.quantizer.lookup(torch.arange(tokenizer.vocab_size)[None])[0]
        network.proxy.copy_from(codes, cast(ConvAutoencoder, tokenizer.network))

    def _begin_from_first_stage(self, checkpoint: str) -> None:
        first = from_checkpoint(checkpoint)
        if not isinstance(first, TiTok):
            raise ValueError(f"first_stage={checkpoint!r} holds a {type(first).__name__}, not a TiTok")
        try:
            self.network.load_state_dict(first.network.state_dict(), strict=True)
            self.quantizer.load_state_dict(first.quantizer.state_dict(), strict=True)
        except RuntimeError as error:
            raise ValueError(f"first_stage={checkpoint!r} is a TiTok of other sizes: {error}") from error

    def train(self, mode: bool = True) -> Self:
        """As in PyTorch, but in stage 2 encoder and quantizer stay in eval mode: no code may move."""
        super().train(mode)
        if self.first_stage is not None:
            self.network.encoder.eval()
            self.quantizer.eval()
        return self

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Reconstruction]:
        if self.proxy_tokenizer is None:
            return super().loss(images)
        with torch.no_grad():
            ids = self.proxy_tokenizer.on(images.device).encode(images)  # (B, h, w)
        quantized = self.quantizer(self.network.encode(images).movedim(1, -1))
        logits = self.network.proxy_logits(quantized.codes.movedim(-1, 1)).float()  # (B, K', h, w)
        terms = {"proxy": F.cross_entropy(logits, ids), **quantized.losses}
        # Pixels are for validation alone.
        assert self.network.proxy is not None
        outputs = logits if self.training else self.network.proxy(logits).float()
        made = Reconstruction(outputs, quantized.losses, quantized.tokens)
        return torch.stack(list(terms.values())).sum(), terms, made

    def reconstruct(self, images: Tensor) -> Reconstruction:
        made = super().reconstruct(images)
        if self.first_stage is not None:
            made.losses = {}  # of what does not learn
        return made


def _read_proxy(checkpoint: str) -> AutoencoderTokenizer:
    """The frozen tokenizer whose ids stage 1 predicts.

    Raises:
        ValueError: not a checkpoint of a tokenizer around a `ConvAutoencoder`.
    """
    tokenizer = from_checkpoint(checkpoint)
    if not (isinstance(tokenizer, AutoencoderTokenizer) and isinstance(tokenizer.network, ConvAutoencoder)):
        raise ValueError(
            f"proxy_tokenizer={checkpoint!r} holds a {type(tokenizer).__name__}; the proxy must be a tokenizer around "
            "a ConvAutoencoder"
        )
    return tokenizer
