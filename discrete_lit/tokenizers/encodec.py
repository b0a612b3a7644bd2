"""EnCodec: a tokenizer of waveforms (Défossez et al., "High Fidelity Neural Audio Compression", 2022).

    waveform -> SEANet -> latents, one for each frame of `hop` samples -> residual quantizer -> `depth` codes a frame
    codes -> their sum -> SEANet -> waveform

A frame's first codes say most: training that leaves out the last ones (`training_books`) makes one codec of several bit
rates, `books * log2(K) * sample_rate / hop` bits a second each.
"""

from collections.abc import Callable, Sequence
from math import log2
from typing import Any, Literal, cast

import torch
from einops import rearrange
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric

from discrete_lit.accumulation import Accumulation
from discrete_lit.core.images import ImageSize
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import augmentation_uniforms
from discrete_lit.metrics.codebook_usage import CodebookUsage
from discrete_lit.metrics.spectral import SCALES, SISNR, SpectralDistance
from discrete_lit.optimization import WeightDecayRule, evaluation_stage
from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer, Reconstruction
from discrete_lit.tokenizers.losses.audio_objective import AudioObjective, GradientBalancer, WaveformLoss
from discrete_lit.tokenizers.losses.spectrogram_discriminator import SpectrogramAdversarialLoss
from discrete_lit.tokenizers.networks import SEANet
from discrete_lit.tokenizers.networks.network import LayerInitialization
from discrete_lit.tokenizers.quantizers import ResidualQuantizer


class EnCodec(AutoencoderTokenizer):
    """Tokenize waveforms `(B, C, T)` in [-1, 1] by a residual quantizer: ids `(B, ceil(T / hop), books)`.

    `image_size`, where a size is asked for, is the number of samples in a list, `[T]`. What is decoded has whole
    frames: `ceil(T / hop) * hop` samples.

    Validation logs `validation/si_snr` (decibels) and `validation/spectral_distance` of the reconstructions, the usage
    and perplexity of each codebook (`depth_0`, ...), `validation/bits_per_second`, and what an ideal coder of each code
    by itself would need, `validation/entropy_bits_per_second`. With `training_books` also `validation/si_snr/books_<n>`
    of each number of books.

    Args:
        network: called with `code_dim`, twice.
        codebook_size: K of each codebook.
        code_dim: D, the width of a code.
        depth: codebooks.
        sample_rate: in hertz, of the waveforms; a run on data of another rate is refused.
        books: codes of a frame that `encode` gives, the first of them; all by default.
        training_books: numbers of books, of which each training step draws one; None trains with all.
        commitment_weight: of the commitment term of the quantizer, which is not balanced.
        decay: of the running means of the codes.
        codebook_init: where the codes begin, as for `VQVAE`.
        revive_below: codes with fewer latents a batch than this are replaced; 2 in EnCodec's code.
        autoencoder_steps: the first steps of a training leave the latents as they are; the codes then begin at latents
            that already say something. Until then reconstructions by codes are silence.
        waveform_weight, waveform_loss, spectral_weight, spectral_windows, spectral_log_weight: of `AudioObjective`.
        adversarial_loss: with a discriminator, when training.
        balancer: of the gradients at the decoder's output; None adds them up by their weights.
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
        weight_decay_rule, initialization, accumulation: see `ImageAutoencoder`.

    Raises:
        ValueError: a setting out of its range, or more books than there are codebooks.
    """

    modality = "audio"
    makes_images = False
    quantizer: ResidualQuantizer
    network: SEANet

    def __init__(
        self,
        network: Callable[[int, int], SEANet],
        codebook_size: int = 1024,
        *,
        code_dim: int = 128,
        depth: int = 8,
        sample_rate: int,
        books: int | None = None,
        training_books: Sequence[int] | None = None,
        commitment_weight: float = 1.0,
        decay: float = 0.99,
        codebook_init: Literal["data", "kmeans", "uniform", "normal"] = "kmeans",
        revive_below: float | None = 2.0,
        autoencoder_steps: int = 0,
        waveform_weight: float = 0.1,
        waveform_loss: WaveformLoss = "l1",
        spectral_weight: float = 2.0,
        spectral_windows: Sequence[int] = SCALES,
        spectral_log_weight: float = 0.0,
        adversarial_loss: SpectrogramAdversarialLoss | None = None,
        balancer: GradientBalancer | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        weight_decay_rule: WeightDecayRule = "linear",
        initialization: LayerInitialization | None = None,
        accumulation: Accumulation = "exact",
    ) -> None:
        quantizer = ResidualQuantizer(
            codebook_size,
            code_dim,
            depth=depth,
            shared_codebook=False,
            commitment_weight=commitment_weight,
            decay=decay,
            codebook_init=codebook_init,
            revive_below=revive_below,
        )
        super().__init__(
            network,
            quantizer,
            optimizer=optimizer,
            scheduler=scheduler,
            weight_decay_rule=weight_decay_rule,
            initialization=initialization,
            accumulation=accumulation,
        )
        if sample_rate < 1:
            raise ValueError(f"sample_rate must be at least 1 hertz, got {sample_rate}")
        if autoencoder_steps < 0:
            raise ValueError(f"autoencoder_steps must be at least 0, got {autoencoder_steps}")
        given = [*(training_books or ()), *(() if books is None else (books,))]
        if training_books in ((), []) or any(not 1 <= number <= depth for number in given):
            raise ValueError(
                f"books={books} and training_books={training_books}: this codec has {depth} codebooks (depth), numbers "
                f"of books are in 1..{depth}"
            )
        self.objective = AudioObjective(
            sample_rate,
            waveform_weight=waveform_weight,
            spectral_weight=spectral_weight,
            windows=spectral_windows,
            log_weight=spectral_log_weight,
            waveform_loss=waveform_loss,
            adversarial_loss=adversarial_loss,
            balancer=balancer,
        )
        self.sample_rate = sample_rate
        self.depth = depth
        self.books = books or depth
        self.autoencoder_steps = autoencoder_steps
        self.training_books = None if training_books is None else tuple(training_books)
        self.si_snr = SISNR()
        self.spectral_distance = SpectralDistance(sample_rate, windows=spectral_windows)
        self.si_snr_of_books = nn.ModuleDict({str(number): SISNR() for number in self.training_books or ()})

    # What a tokenizer is.

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        return self.network.hop

    @property
    def bits_per_second(self) -> float:
        """Bits of the codes of a second of audio: books * log2(K) * frames a second."""
        return self.books * log2(self.vocab_size) * self.sample_rate / self.hop

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return (*self.network.grid(image_size), self.books)

    @in_evaluation
    def encode(self, images: Tensor, *, books: int | None = None) -> Tensor:
        """Turn waveforms `(B, C, T)`, float in [-1, 1], into ids `(B, ceil(T / hop), books)`, int64 in [0, K).

        Args:
            images: the waveforms.
            books: codes of a frame; the codec's own number by default.

        Raises:
            ValueError: other channels than the codec's, no sample, samples that are not finite numbers, or more books
                than the codec has.
        """
        latents = self.latents(images)
        self.check_images(images)
        return self.quantizer.encode(latents, depth=self.books if books is None else books)

    @in_evaluation
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn ids `(B, n, books)`, int64 in [0, K), into waveforms `(B, C, n * hop)` in [-1, 1].

        Raises:
            ValueError: an id outside [0, K), or more books than the codec has.
        """
        self.check_tokens(tokens)
        return self.to_images(self.outputs(self.quantizer.lookup(tokens)))

    def streaming_decoder(self) -> Callable[[Tensor], Tensor]:
        """Make a function of the next frames' ids `(B, n, books)` that gives their samples, as `decode` of all would.

        Raises:
            ValueError: a network that is not causal.
        """
        decoder = self.network.streaming_decoder()

        @torch.no_grad()
        def decode(tokens: Tensor) -> Tensor:
            self.check_tokens(tokens)
            codes = rearrange(self.quantizer.lookup(tokens), "b n d -> b d n")
            return self.to_images(decoder(codes.to(self.network.dtype)))

        return decode

    def check_images(self, images: Tensor) -> None:
        """Raise a ValueError that names the waveforms `(B, C, T)` in which a sample is not a finite number."""
        try:
            super().check_images(images)
        except ValueError as error:
            raise ValueError(str(error).replace("images have pixels", "waveforms have samples")) from error

    def latents(self, images: Tensor) -> Tensor:
        """Waveforms `(B, C, T)` in [-1, 1] to the encoder's latents `(B, frames, D)`.

        Raises:
            ValueError: another shape, other channels than the codec's, or no sample.
        """
        if images.ndim != 3 or images.shape[1] != self.image_channels or images.shape[2] < 1:
            raise ValueError(
                f"this codec takes waveforms (B, {self.image_channels}, T) of T > 0 samples, got "
                f"{tuple(images.shape)}: set channels of the data, or audio_channels of the network"
            )
        return rearrange(self.network.encode(images.to(self.network.dtype)), "b d n -> b n d")

    def code_tables(self) -> Tensor:
        return self.quantizer.code_tables()[: self.books]

    def coding_state(self) -> dict[str, Tensor]:
        """The weights and buffers of network and quantizer, the number of books and the sample rate."""
        state = {name: value for name, value in super().coding_state().items() if not name.startswith("si_snr")}
        return state | {"books": torch.tensor((self.books, self.sample_rate))}

    def reconstruct_by(self, images: Tensor, books: int) -> Tensor:
        """Encode waveforms `(B, C, T)` by the first codes of each frame alone, and decode them: `(B, C, T)`."""
        return self.decode(self.encode(images, books=books))[..., : images.shape[-1]]

    # What an autoencoder is.

    def reconstruct(self, images: Tensor, *, step: int | None = None, index: Tensor | None = None) -> Reconstruction:
        if step is not None and step < self.autoencoder_steps:
            return Reconstruction(outputs=self.outputs(self.latents(images))[..., : images.shape[-1]])
        quantized = self.quantizer(self.latents(images), depth=self._books_at(step))
        outputs = self.outputs(quantized.z_q)[..., : images.shape[-1]]
        return Reconstruction(outputs=outputs, losses=quantized.losses, tokens=quantized.tokens)

    def _books_at(self, step: int | None) -> int:
        """The number of books of a training step, the same on all ranks; all in evaluation."""
        if step is None or self.training_books is None:
            return self.depth
        uniform = augmentation_uniforms(0, step, "number of books")[0]
        return self.training_books[int(uniform * len(self.training_books))]

    # Its training and validation by Lightning.

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_sample_rate(self.sample_rate, getattr(self.trainer, "datamodule", None))

    def fidelity(self, reconstructions: Tensor, images: Tensor) -> dict[str, Metric]:
        self.si_snr.update(reconstructions, images)
        self.spectral_distance.update(reconstructions, images)
        if self.si_snr_of_books:
            for number, metric in self.si_snr_of_books.items():
                cast(SISNR, metric).update(self.reconstruct_by(images, int(number)), images)
        of_books = {f"si_snr/books_{number}": cast(Metric, each) for number, each in self.si_snr_of_books.items()}
        return {"si_snr": self.si_snr, "spectral_distance": self.spectral_distance, **of_books}

    def on_validation_epoch_end(self) -> None:
        stage, frames = evaluation_stage(self), self.sample_rate / self.hop
        of_books = [
            cast(CodebookUsage, measured).compute()[1].log2()
            for name, measured in self.usage.items()
            if name.startswith("depth_")
        ]
        figures = {f"{stage}/bits_per_second": torch.tensor(self.depth * log2(self.vocab_size) * frames)}
        if of_books:
            figures[f"{stage}/entropy_bits_per_second"] = torch.stack(of_books).sum() * frames
        self.log_dict(figures, sync_dist=True)
        super().on_validation_epoch_end()


def check_sample_rate(sample_rate: int | None, data: Any) -> None:
    """Raise a ValueError where data have a sample rate that is not a codec's.

    Args:
        sample_rate: of the codec, in hertz; None of a tokenizer of something else.
        data: a DataModule; one that knows no rate, as of arrays, passes.
    """
    found = getattr(data, "sample_rate", sample_rate)
    if sample_rate is not None and found != sample_rate:
        raise ValueError(
            f"the data have {found} samples a second (data.init_args.sample_rate) and the codec was made for "
            f"{sample_rate}: set the data's to that, and files are resampled"
        )
