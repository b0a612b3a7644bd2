"""Clips to listen to at each validation, and their spectrograms."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from discrete_lit.callbacks.image_grids import as_in_validation, shards_weights
from discrete_lit.callbacks.logged_media import log_picture, log_sound
from discrete_lit.core.audio import to_int16
from discrete_lit.generators import Generator
from discrete_lit.metrics.spectral import spectrogram_image
from discrete_lit.samplers import Sampler
from discrete_lit.tokenizers import EnCodec


class AudioExamples(Callback):
    """Write clips and spectrograms at each validation or test to TensorBoard or W&B, as `audio/` and `spectrograms/`.

    Of a codec the first clips of the first validation batch, once, and their reconstructions; of a generator of audio
    samples of a fixed seed, whose labels go through the classes, or with the captions of that batch. Other modules are
    left alone.

    Args:
        count: clips.
        seed: of a generator's samples.
        sampler: of a generator's samples; its own by default.

    Raises:
        ValueError: no clips.
    """

    def __init__(self, count: int = 4, *, seed: int = 0, sampler: Sampler | None = None) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count, self.seed, self.sampler = count, seed, sampler
        self._shown = False

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        codec = pl_module if isinstance(pl_module, EnCodec) else getattr(pl_module, "tokenizer", None)
        if batch_idx or dataloader_idx or trainer.sanity_checking or not isinstance(codec, EnCodec):
            return
        if not (trainer.is_global_zero or shards_weights(trainer)):
            return
        with as_in_validation(trainer, pl_module):
            clips = self._clips(pl_module, batch)
        for name, waveforms in clips.items() if trainer.is_global_zero else ():
            for number, waveform in enumerate(waveforms.float().cpu()):
                self._write(trainer, f"{name}_{number}", waveform, codec.sample_rate)

    on_test_batch_end = on_validation_batch_end

    def _clips(self, module: LightningModule, batch: Any) -> dict[str, Tensor]:
        if isinstance(module, EnCodec):
            originals = batch["audio"][: self.count]
            made = {"reconstruction": module.reconstruct_by(originals, module.books)}
            first, self._shown = not self._shown, True
            return {"original": originals, **made} if first else made
        assert isinstance(module, Generator)
        condition: Any = (torch.arange(self.count) % module.num_classes).to(module.device)
        if module.reads_text and "caption" in batch:
            texts = [batch["caption"][number % len(batch["caption"])] for number in range(self.count)]
            condition = module.condition_of_texts(texts, labels=condition if module.num_classes > 1 else None)
        tokens = module.sample(condition, self.sampler, seed=self.seed)
        return {"sample": module.tokenizer.decode(tokens)}

    @staticmethod
    def _write(trainer: Trainer, name: str, waveform: Tensor, sample_rate: int) -> None:
        # TensorBoard's player is of one channel.
        mono = to_int16(waveform.mean(dim=0)).float() / 32767
        log_sound(trainer, f"audio/{name}", mono.numpy(), sample_rate=sample_rate)
        picture = spectrogram_image(waveform)[..., None] * 255
        log_picture(trainer, f"spectrograms/{name}", picture.round().byte().numpy())
