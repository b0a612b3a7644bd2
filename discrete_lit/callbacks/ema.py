"""EMA of the weights: the average is validated, published and measured, while the raw weights are trained."""

import warnings
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim.swa_utils import PARAM_LIST, get_ema_multi_avg_fn

from discrete_lit.core.lightning_internals import averaged_model, exchange_with_average


class ExponentialMovingAverage(WeightAveraging):
    """Keeps an exponential moving average of all weights and floating-point buffers, an EMA codebook's too.

    Other buffers, as counters and flags, are copied. After each optimizer step an average moves by
    `(1 - decay) (weight - average)`; the first step sets it. Validation runs on the averages, and the module has them
    after training. A checkpoint's `state_dict` holds the averages, so `discrete_lit.load` gives those; the raw weights
    are beside them, and a resume goes on from these exactly.

    Args:
        decay: in [0, 1).
        warmup: let the decay grow with the number n of steps so far as `min(decay, (1 + n) / (10 + n))`, so that the
            start is forgotten in a short run too.

    Raises:
        ValueError: a decay out of its range; in use, sharded training (FSDP).
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay of ExponentialMovingAverage must lie in [0, 1), got {decay}")
        super().__init__(multi_avg_fn=self._move)
        self.decay = decay
        self.warmup = warmup
        self._average_is_in_use = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "ExponentialMovingAverage does not support sharded training: leave it out of trainer.callbacks, or use "
                "lightning_configs/trainer/ddp.yaml in place of fsdp.yaml"
            )
        with warnings.catch_warnings():
            # Of any module that could be sharded, also where it is not.
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model")
            super().setup(trainer, pl_module, stage)
        # Before every callback that may save and end the run behind a batch: the average belongs to that batch. A new
        # list, for the old one is being gone through.
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = averaged_model(self)
        assert average is not None
        # It was copied before the module moved to its device.
        average.to(pl_module.device)
        # On the host: it is asked at every step.
        average.n_averaged = average.n_averaged.cpu()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._average_is_in_use ^= averaged_model(self) is not None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._average_is_in_use ^= averaged_model(self) is not None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Exchanged rather than copied: a checkpoint may still be written.
        exchange_with_average(self, pl_module)
        self._average_is_in_use = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._average_is_in_use:
            exchange_with_average(self, pl_module)
            self._average_is_in_use = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        exchanged = self._average_is_in_use
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if exchanged and "current_model_state" in checkpoint:
            raw, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, raw

    def _move(self, averages: PARAM_LIST, weights: PARAM_LIST, steps: Tensor | int) -> None:
        """Move averages of one device and dtype, in place."""
        if not averages[0].is_floating_point():
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(weight)
            return
        model = averaged_model(self)
        assert model is not None
        count = int(model.n_averaged)  # `steps` is a copy on the device: reading it would wait for it
        decay = min(self.decay, (1 + count) / (10 + count)) if self.warmup else self.decay
        get_ema_multi_avg_fn(decay)(averages, weights, count)
