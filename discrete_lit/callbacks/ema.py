"""EMA of the weights: the average is validated, published and measured, while the raw weights are trained."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from discrete_lit.core.lightning_internals import averaged_model
from discrete_lit.core.modules import at_least_float32


class ExponentialMovingAverage(WeightAveraging):
    """Keeps an exponential moving average of all weights and floating-point buffers, an EMA codebook's too.

    Other buffers, as counters and flags, are copied, and so is one whose shape has changed. Buffers that no checkpoint
    saves, as tables that a network makes for the images that come, are left alone. After each optimizer step an average
    moves by `(1 - decay) (weight - average)`; the first step sets it. Averages of half-precision weights are float32,
    in which so small a move is not lost.

    Validation runs on the averages, and the module has them after training. A checkpoint's `state_dict` holds the
    averages, so `discrete_lit.load` gives those; the raw weights are beside them, and a resume goes on from these
    exactly.

    Args:
        decay: in [0, 1).
        warmup: let the decay grow with the number n of steps so far as `min(decay, (1 + n) / (10 + n))`, so that the
            start is forgotten in a short run too.

    Raises:
        ValueError: a decay out of its range; in use, sharded training (FSDP), or weights that were not there when
            training began.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay of ExponentialMovingAverage must lie in [0, 1), got {decay}")
        super().__init__()
        self.decay = decay
        self.warmup = warmup
        self._average_is_in_use = False
        # The averages by name, while the module has them rounded to half precision.
        self._unrounded: dict[str, Tensor] = {}

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
        average = averaged_model(self)
        if average is not None and stage == "fit":
            for _, tensor in _state(average.module):
                tensor.data = at_least_float32(tensor.data) if tensor.is_floating_point() else tensor.data
            # Torch's pairs tensors by their place, and bears no other shapes.
            average.update_parameters = self._move  # type: ignore[method-assign]
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
        if averaged_model(self) is not None:
            self._exchange(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if averaged_model(self) is not None:
            self._exchange(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Exchanged rather than copied: a checkpoint may still be written.
        self._exchange(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._average_is_in_use:
            self._exchange(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        exchanged = self._average_is_in_use
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if exchanged and "current_model_state" in checkpoint:
            raw, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            average = {name: self._unrounded.get(_plain(name), value) for name, value in average.items()}
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, raw

    @contextmanager
    def in_use(self, module: LightningModule) -> Iterator[None]:
        """Let the module have the averages meanwhile; afterwards it has its raw weights again, to the bit.

        Nothing changes where there are no averages, or the module has them already, as in validation.
        """
        if averaged_model(self) is None or self._average_is_in_use:
            yield
            return
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module)

    @torch.no_grad()
    def _move(self, model: nn.Module) -> None:
        """Move the averages towards the weights of a model."""
        averaged = averaged_model(self)
        assert averaged is not None
        count = int(averaged.n_averaged)
        moving: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for _, average, weight in self._pairs(model):
            if average.shape != weight.shape:
                average.data = at_least_float32(weight) if weight.is_floating_point() else weight.clone()
            elif count and (average.is_floating_point() or average.is_complex()):
                averages, weights = moving[average.dtype]
                averages.append(average)
                weights.append(weight.to(average))
            else:
                average.copy_(weight)
        decay = min(self.decay, (1 + count) / (10 + count)) if self.warmup else self.decay
        for averages, weights in moving.values():
            get_ema_multi_avg_fn(decay)(averages, weights, count)
        averaged.n_averaged += 1

    @torch.no_grad()
    def _exchange(self, module: LightningModule) -> None:
        """Give the module the averages and keep its raw weights in their place, or the other way round."""
        unrounded, self._unrounded = self._unrounded, {}
        for name, average, weight in self._pairs(module):
            if average.shape != weight.shape:
                average.data, weight.data = weight.data, average.data
                continue
            kept = average.clone()
            average.copy_(unrounded.get(name, weight))
            weight.copy_(kept)
            if kept.dtype != weight.dtype and not self._average_is_in_use:
                self._unrounded[name] = kept
        self._average_is_in_use = not self._average_is_in_use

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Give the name, the average and the weight of all that is averaged or copied."""
        averaged = averaged_model(self)
        assert averaged is not None
        averages = dict(_state(averaged.module))
        for name, weight in _state(model):
            if name not in averages:
                raise ValueError(
                    f"ExponentialMovingAverage: {name} was not there when training began: make it in the model's "
                    "constructor or in configure_model"
                )
            yield name, averages[name], weight


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the parameters and the saved buffers of a module, each once, by the name that it has uncompiled."""
    seen = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield _plain(name), value


def _plain(name: str) -> str:
    """Leave out what `torch.compile` puts into the names of a module's tensors."""
    return name.replace("_orig_mod.", "")
