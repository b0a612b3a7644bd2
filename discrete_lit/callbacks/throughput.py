"""How fast a run trains, and how much of its time it waits for data."""

from collections.abc import Callable
from math import prod
from time import perf_counter
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from discrete_lit.distributed import all_reduce_sum, world_size
from discrete_lit.generators import Generator
from discrete_lit.lightning_internals import accumulates_gradients, logs_this_step
from discrete_lit.tokenizers import Tokenizer


class Throughput(Callback):
    """Logs speed over windows of `trainer.log_every_n_steps` optimizer steps, of all ranks together.

    `throughput/images_per_second` and `throughput/tokens_per_second` count what was trained on, tokens as images times
    the tokens of an image. `throughput/data_wait` is the share, in [0, 1], of the time that lies between the end of a
    batch and the start of the next. A gap in which validation ran or a checkpoint was written counts in neither; so
    does the wait for the very first batch.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._window = _Window()
        self._batch_started = 0.0
        self._batch_ended: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window = _Window()
        self._forget_gap()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_started = self._clock()
        if self._batch_ended is not None:
            self._window.waited += self._batch_started - self._batch_ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logs_now = logs_this_step(trainer) and not accumulates_gradients(trainer)
        if logs_now and pl_module.device.type == "cuda":
            # Kernels run behind the host's clock; the logger is about to wait for them in any case.
            torch.cuda.synchronize(pl_module.device)
        now = self._clock()
        self._window.worked += now - self._batch_started
        self._batch_ended = now
        images = len(batch["label"])
        self._window.images += images
        self._window.tokens += images * _tokens_per_image(pl_module, batch)
        if logs_now:
            pl_module.log_dict(self._window.rates(pl_module.device))
            self._window = _Window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_gap()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_gap()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._forget_gap()

    def _forget_gap(self) -> None:
        """The next batch starts without a wait."""
        self._batch_ended = None


class _Window:
    """Counts of this rank since the last log, times in seconds."""

    def __init__(self) -> None:
        self.images = 0
        self.tokens = 0
        self.worked = 0.0
        self.waited = 0.0

    def rates(self, device: torch.device) -> dict[str, float]:
        """What is logged; every rank calls it at the same step."""
        # float32 serves devices without float64; a window's counts stay far below what it resolves to 1e-6.
        mine = torch.tensor([self.images, self.tokens, self.worked, self.waited], dtype=torch.float32, device=device)
        images, tokens, worked, waited = all_reduce_sum(mine).tolist()
        seconds = max((worked + waited) / world_size(), 1e-9)
        return {
            "throughput/images_per_second": images / seconds,
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/data_wait": waited / max(worked + waited, 1e-9),
        }


def _tokens_per_image(module: LightningModule, batch: dict[str, Any]) -> int:
    if isinstance(module, Generator):
        return prod(module.token_shape)
    if isinstance(module, Tokenizer):
        return prod(module.token_shape(batch["image"].shape[-1]))
    return 0
