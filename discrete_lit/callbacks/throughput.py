"""Throughput of training: how fast a run is, how well it uses its device (MFU), and `Compile` to make it faster."""

import re
import resource
import sys
from collections.abc import Callable
from math import prod
from time import perf_counter
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from discrete_lit.backbones.execution import compile_blocks
from discrete_lit.core.distributed import all_gather_rows
from discrete_lit.core.images import MODALITIES
from discrete_lit.core.lightning_internals import accumulates_gradients, logs_this_step
from discrete_lit.generators import Generator, LatentGenerator, SegmentGenerator
from discrete_lit.generators.counted_step import count_step
from discrete_lit.tokenizers import Tokenizer
from discrete_lit.tokenizers.autoencoder import ImageAutoencoder

# Dense peak of a device in 10^12 operations a second: products of bfloat16 or float16, of TensorFloat-32, of float32.
# From NVIDIA's data sheets of the A100 and A10 (2021), H100, L40S and L4 (2023), and H200 (2024); where one gives
# numbers with sparsity, half of them. The first name that is found counts.
_PEAKS: dict[str, tuple[float, float, float]] = {
    r"\bH200 NVL\b": (835.5, 417.5, 60.0),
    r"\bH200\b": (989.5, 494.5, 67.0),
    r"\bH100 NVL\b": (835.5, 417.5, 60.0),
    r"\bH100 PCIe\b": (756.0, 378.0, 51.0),
    r"\bH100\b": (989.5, 494.5, 67.0),
    r"\bA100\b": (312.0, 156.0, 19.5),
    r"\bL40S\b": (362.0, 183.0, 91.6),
    r"\bL4\b": (121.0, 60.0, 30.3),
    r"\bA10\b": (125.0, 62.5, 31.2),
}


class Throughput(Callback):
    """Logs speed over windows of `trainer.log_every_n_steps` optimizer steps, of all ranks together.

    `throughput/images_per_second` and `throughput/tokens_per_second` count what was trained on, tokens as images times
    the tokens of an image. `throughput/data_wait` is the fraction, in [0, 1], of the time that lies between the end of
    a batch and the start of the next. A gap in which validation ran or a checkpoint was written counts in neither; so
    does the wait for the very first batch.

    `throughput/teraflops_per_device` is 10^12 floating-point operations a second of one device, as torch's
    `FlopCounterMode` counts those of a training step: forward and backward pass, a frozen tokenizer's encoding, without
    what activation checkpointing computes again. `throughput/mfu` is that as a fraction of the device's peak: the model
    FLOPs utilisation (Chowdhery et al., "PaLM", 2022, appendix B). It is left out where the peak is not known, and both
    where a step cannot be counted: of modules of other kinds than generators, tokenizers and autoencoders. Of a
    `SegmentGenerator`, such as `Unified`, they are those of its transformer, at the elements that it read (its
    `step_flops`).
    `throughput/peak_memory_gib` is the most that any rank has held since its start: what torch's allocator gave on a
    CUDA device, on a processor the resident memory of the process; in GiB.

    Args:
        clock: seconds, monotonic.
        peak_flops: of one device at the precision of training, in operations a second; by default what the data sheet
            says of a GPU that is known.

    Raises:
        ValueError: a peak that is not positive.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter, *, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops must be positive operations a second of one device, got {peak_flops}")
        self.peak_flops = peak_flops
        # Operations of a training step by the shapes of its batch; None once a step could not be counted.
        self._step_flops: dict[Any, int] | None = {}
        self._clock = clock
        self._window = _Window()
        self._batch_started = 0.0
        self._batch_ended: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window = _Window()
        self._step_flops = {}
        self._forget_gap()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batch_ended is not None:
            self._window.waited += self._clock() - self._batch_ended
        self._window.flops += self._flops(pl_module, batch, batch_idx)
        self._batch_started = self._clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logs_now = logs_this_step(trainer) and not accumulates_gradients(trainer)
        if logs_now and pl_module.device.type == "cuda":
            # Kernels run behind the host's clock; the logger is about to wait for them in any case.
            torch.cuda.synchronize(pl_module.device)
        now = self._clock()
        if isinstance(pl_module, SegmentGenerator):
            self._window.flops += pl_module.step_flops()
        self._window.worked += now - self._batch_started
        self._batch_ended = now
        images = next(len(batch[name]) for name in ("tokens", "latents", *MODALITIES) if name in batch)
        self._window.images += images
        self._window.tokens += images * _tokens_per_image(pl_module, batch)
        if logs_now:
            peak = self.peak_flops or known_peak(pl_module.device, str(trainer.precision))
            pl_module.log_dict(self._window.rates(pl_module.device, peak))
            self._window = _Window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_gap()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_gap()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._forget_gap()

    def _flops(self, module: LightningModule, batch: Any, batch_idx: int) -> int:
        """Operations of the training step to come; counted once for each kind of step."""
        if self._step_flops is None or isinstance(module, SegmentGenerator):
            return 0  # how many elements a sequence of segments has, its step knows when it is done
        try:
            kind = _kind_of_step(module, batch)
            if kind not in self._step_flops:
                self._step_flops[kind] = count_step(module, batch, batch_idx)
            return self._step_flops[kind]
        # A step that its user wrote can fail without data in any way; no figure is worth a run.
        except Exception as error:
            self._step_flops = None
            rank_zero_info(
                f"Throughput: the operations of {type(module).__name__}'s training step cannot be counted without "
                f"data, so throughput/teraflops_per_device and throughput/mfu are not logged ({error})"
            )
            return 0

    def _forget_gap(self) -> None:
        """The next batch starts without a wait."""
        self._batch_ended = None


class Compile(Callback):
    """Compiles the blocks of a generator's backbone in place, for training, validation and the samples drawn there.

    Parameters keep their names: a checkpoint of a compiled run is one of an uncompiled run, and either goes on from the
    other's.

    Args:
        backend: of `torch.compile`.
        mode: of `torch.compile`.
    """

    def __init__(self, backend: str = "inductor", mode: str | None = None) -> None:
        self.options: dict[str, Any] = {"backend": backend, "mode": mode}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Generator | LatentGenerator):
            raise ValueError(f"Compile compiles the backbone of a Generator, this is a {type(pl_module).__name__}")
        compile_blocks(pl_module.backbone, **self.options)


class _Window:
    """Counts of this rank since the last log, times in seconds."""

    def __init__(self) -> None:
        self.images = 0
        self.tokens = 0
        self.flops = 0
        self.worked = 0.0
        self.waited = 0.0

    def rates(self, device: torch.device, peak_flops: float | None) -> dict[str, float]:
        """Compute what is logged; every rank calls it at the same step."""
        mine = [self.images, self.tokens, self.flops, self.worked, self.waited, peak_memory(device)]
        # float32 serves devices without float64; it resolves every count of a window to 1e-6.
        ranks = all_gather_rows(torch.tensor([mine], dtype=torch.float32, device=device))
        images, tokens, flops, worked, waited, _ = ranks.sum(dim=0).tolist()
        spent = max(worked + waited, 1e-9)  # of all ranks
        seconds = spent / len(ranks)
        rates = {
            "throughput/images_per_second": images / seconds,
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/data_wait": waited / spent,
            "throughput/peak_memory_gib": float(ranks[:, -1].max()) / 2**30,
        }
        if flops:
            rates["throughput/teraflops_per_device"] = flops / spent / 1e12
            if peak_flops is not None:
                rates["throughput/mfu"] = flops / spent / peak_flops
        return rates


def known_peak(device: torch.device, precision: str) -> float | None:
    """Look up the dense peak of a device in operations a second; None where it is not known.

    Args:
        device: the one of this process.
        precision: the trainer's, as in `"bf16-mixed"`.
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """Look up the dense peak of a device by its name, as CUDA gives it, see `known_peak`."""
    for pattern, (half, tensor_float, full) in _PEAKS.items():
        if re.search(pattern, name):
            if precision.startswith(("bf16", "16")):
                return half * 1e12
            if precision.startswith("32"):
                return (full if torch.get_float32_matmul_precision() == "highest" else tensor_float) * 1e12
    return None


def peak_memory(device: torch.device) -> int:
    """Measure the most bytes that this process has held: of torch's allocator on CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # KiB on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kind_of_step(module: LightningModule, batch: dict[str, Any]) -> Any:
    """Tell steps of different cost apart: by the shapes of the batch, and by what a discriminator does in it."""
    shapes = tuple((name, tuple(value.shape)) for name, value in batch.items() if isinstance(value, Tensor))
    adversarial = module.objective.adversarial if isinstance(module, ImageAutoencoder) else None
    if adversarial is None:
        return shapes
    step = module.global_step
    penalised = adversarial.r1_weight > 0 and step % adversarial.r1_every == 0
    return shapes, adversarial.trains(step), adversarial.warmup(step) > 0, penalised


def _tokens_per_image(module: LightningModule, batch: dict[str, Any]) -> int:
    if isinstance(module, Generator):
        return prod(module.token_shape)
    if isinstance(module, Tokenizer):
        size = tuple(next(batch[name] for name in MODALITIES if name in batch).shape[2:])
        if len(size) == 2 and module.modality == "video":  # images are clips of one frame
            size = (1, *size)
        return prod(module.token_shape(size[0] if len(size) == 1 and module.modality == "image" else size))
    return 0
