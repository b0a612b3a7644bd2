"""Grids of images at each validation: reconstructions of the same images, and samples of the same seed.

Clips of frames are shown as strips of frames, and as a GIF, which plays.
`ImageGrid` says when a grid is made and where it goes, `ReconstructionGrid` and `SampleGrid` what it shows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from discrete_lit.callbacks.logged_media import log_gif, log_picture
from discrete_lit.core.images import MODALITIES, displayable, frames_of, to_uint8
from discrete_lit.core.moving_pictures import clips_side_by_side, gif_bytes
from discrete_lit.fsdp2 import whole_weights
from discrete_lit.generators import Generator, LatentGenerator, TokenDiffusionDecoder, Unified
from discrete_lit.samplers import AnySampler
from discrete_lit.tokenizers import ContinuousTokenizer, Tokenizer

_FRAME_RATE = 8.0


class ImageGrid(Callback, ABC):
    """Write a grid of images at each validation or test, to TensorBoard or W&B and, if asked for, as a PNG of the run.

    The images are made at the first validation batch, in eval mode and under the trainer's precision; modes and random
    states are afterwards as they were. Grey images are shown grey, RGBA with their transparency, and of other numbers
    of channels the first, as grey. Only rank 0 makes them, except where the parameters are sharded and every rank must
    take part. Of clips, the first `rows_of_clips` are shown as strips of their frames, and all play in a GIF, with 8
    frames a second and the tag `videos/<name>`.

    Args:
        count: images at most.
        columns: images in a row of the grid.
        save_png: also write `<default_root_dir>/images/<name>-<step>.png`, and of clips the GIF beside it.
    """

    name: str
    """Tag in the log (behind `images/`), and the stem of the file."""
    rows_of_clips = 8
    """The most clips that are shown as strips of frames."""

    def __init__(self, count: int, columns: int, *, save_png: bool) -> None:
        if count < 1 or columns < 1:
            raise ValueError(f"count and columns must be at least 1, got count={count} and columns={columns}")
        self.count = count
        self.columns = columns
        self.save_png = save_png

    @abstractmethod
    def applies_to(self, module: LightningModule) -> bool:
        """Tell whether there is anything to show of this kind of module."""

    @abstractmethod
    def make_images(self, module: LightningModule, batch: dict[str, Any]) -> Tensor:
        """Make the images `(n, C, H, W)` in [-1, 1], row after row of the grid, or clips `(n, C, T, H, W)`."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Inside the validation loop, not around it: there averaged weights are in place if the run keeps any.
        if batch_idx or dataloader_idx or trainer.sanity_checking or not self.applies_to(pl_module):
            return
        if not (trainer.is_global_zero or shards_weights(trainer)):
            return
        with as_in_validation(trainer, pl_module):
            pixels = to_uint8(displayable(self.make_images(pl_module, batch))).cpu()
        if not trainer.is_global_zero:
            return
        if pixels.ndim == 4:
            self._write(trainer, make_grid(pixels, nrow=self.columns, padding=1, pad_value=255))
            return
        strips = pixels[: self.rows_of_clips]
        self._write(trainer, make_grid(frames_of(strips), nrow=strips.shape[2], padding=1, pad_value=255))
        self._write_gif(trainer, pixels.movedim(1, -1).numpy())

    on_test_batch_end = on_validation_batch_end

    def _write(self, trainer: Trainer, grid: Tensor) -> None:
        pixels = rearrange(grid, "c h w -> h w c").numpy()
        log_picture(trainer, f"images/{self.name}", pixels)
        if self.save_png:
            folder = Path(trainer.default_root_dir) / "images"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{self.name}-{trainer.global_step:08d}.png")

    def _write_gif(self, trainer: Trainer, clips: np.ndarray) -> None:
        playing = clips_side_by_side(clips, min(self.columns, len(clips)))
        data = gif_bytes(playing, frame_rate=_FRAME_RATE)
        log_gif(trainer, f"videos/{self.name}", data, size=playing.shape[1:])
        if self.save_png:
            path = Path(trainer.default_root_dir) / "images" / f"{self.name}-{trainer.global_step:08d}.gif"
            path.write_bytes(data)


class ReconstructionGrid(ImageGrid):
    """Show rows of original images, each above the row of its reconstructions; for autoencoders and decoders of images.

    A `TokenDiffusionDecoder` decodes the tokens of each image, with the same noise at every validation. The images are
    the first ones of the first validation batch. Written as in `ImageGrid`, tag `images/reconstructions`.

    Args:
        count: originals at most.
        columns: images in a row.
        save_png: also write a PNG into the run's folder.
    """

    name = "reconstructions"

    def __init__(self, count: int = 16, columns: int = 8, *, save_png: bool = False) -> None:
        super().__init__(count, columns, save_png=save_png)

    def applies_to(self, module: LightningModule) -> bool:
        if isinstance(module, Tokenizer | ContinuousTokenizer):
            return module.makes_images or module.modality == "video"
        return isinstance(module, TokenDiffusionDecoder) and module.tokenizer.modality != "audio"

    def make_images(self, module: LightningModule, batch: dict[str, Any]) -> Tensor:
        originals = next(batch[name] for name in MODALITIES if name in batch)[: self.count]
        if isinstance(module, TokenDiffusionDecoder):
            shown = {name: values[: self.count] for name, values in batch.items() if isinstance(values, Tensor)}
            labels = module.labels_of(shown)
            reconstructions = module.decode(module.tokens_of(shown), labels, seed=module.seed)
        else:
            assert isinstance(module, Tokenizer | ContinuousTokenizer)
            reconstructions = module.decode(module.encode(originals))
        if originals.ndim == 5:  # each clip beside its reconstruction
            return rearrange(torch.stack((originals.float(), reconstructions)), "kind b ... -> (b kind) ...")
        both = torch.stack((self._whole_rows(originals), self._whole_rows(reconstructions)))
        return rearrange(both, "kind (row column) c h w -> (row kind column) c h w", column=self.columns)

    def _whole_rows(self, images: Tensor) -> Tensor:
        """Fill the last row with white, or its reconstructions would move beside it."""
        missing = -len(images) % self.columns
        return torch.cat((images.float(), images.new_ones((missing, *images.shape[1:]), dtype=torch.float32)))


class SampleGrid(ImageGrid):
    """Show samples of a fixed seed, decoded by the generator's tokenizer; for generators of images alone.

    The labels are spread evenly over the classes and repeat in the same order, so that with as many columns as classes
    each column is a class. A generator with a text encoder is given the captions of the first validation batch, and
    their labels. Written as in `ImageGrid`, tag `images/samples`.

    Args:
        count: samples.
        columns: images in a row.
        seed: of the draw.
        sampler: the generator's own by default.
        save_png: also write a PNG into the run's folder.
    """

    name = "samples"

    def __init__(
        self,
        count: int = 40,
        columns: int = 10,
        *,
        seed: int = 0,
        sampler: AnySampler | None = None,
        save_png: bool = False,
    ) -> None:
        super().__init__(count, columns, save_png=save_png)
        self.seed = seed
        self.sampler = sampler

    def applies_to(self, module: LightningModule) -> bool:
        if not isinstance(module, Generator | LatentGenerator | Unified) or isinstance(module, TokenDiffusionDecoder):
            return False
        return module.tokenizer.makes_images or module.tokenizer.modality == "video"

    def make_images(self, module: LightningModule, batch: dict[str, Any]) -> Tensor:
        assert isinstance(module, Generator | LatentGenerator | Unified)
        condition: Any = self.labels(module.num_classes).to(module.device)
        if module.reads_text and "caption" in batch:
            order = [image % len(batch["caption"]) for image in range(self.count)]
            texts = [batch["caption"][image] for image in order]
            if isinstance(module, Unified):
                condition = module.prompts_of(texts)
            else:
                labels = module.labels_of(batch)[order] if module.num_classes > 1 else None
                condition = module.condition_of_texts(texts, labels=labels)
        return module.tokenizer.decode(module.sample(condition, cast(Any, self.sampler), seed=self.seed))

    def labels(self, num_classes: int) -> Tensor:
        """Spread labels evenly over the classes, as many as there are images for, over and over: `(count,)` int64."""
        shown = min(self.count, num_classes)
        classes = torch.arange(shown) * num_classes // shown
        return classes[torch.arange(self.count) % shown]


@contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """Put a module into eval mode; afterwards every submodule's mode and the random states are as before."""
    training = {part: part.training for part in module.modules()}
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        module.eval()
        try:
            yield
        finally:
            for part, mode in training.items():
                part.training = mode


@contextmanager
def as_in_validation(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Compute something beside the run: in eval mode and the trainer's precision, without gradients, `undisturbed`.

    Sharded weights are there as a whole; where they are sharded all ranks have to come here.
    """
    with undisturbed(module), torch.no_grad(), trainer.precision_plugin.val_step_context(), whole_weights(module):
        yield


def shards_weights(trainer: Trainer) -> bool:
    """Whether the weights are sharded, so that every rank has to take part in whatever is computed with them."""
    return isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
