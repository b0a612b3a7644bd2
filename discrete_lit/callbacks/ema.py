"""EMA of the weights: the average is validated, published and measured, while the raw weights are trained."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from discrete_lit.core.distributed import rank
from discrete_lit.core.lightning_internals import saves_one_file
from discrete_lit.core.modules import at_least_float32
from discrete_lit.fsdp2 import FSDP2Strategy

Warmup = bool | Literal["inclusive", "every_other"]


class ExponentialMovingAverage(Callback):
    """Keeps an exponential moving average of all weights and floating-point buffers, an EMA codebook's too.

    Other buffers, as counters and flags, are copied, and so is one whose shape has changed. Buffers that no checkpoint
    saves, as tables that a network makes for the images that come, are left alone. After each optimizer step, or every
    so many of them, an average moves by `(1 - decay) (weight - average)`; the first move sets it. Averages of
    half-precision weights are float32, in which so small a move is not lost. Of sharded weights (FSDP2) each rank
    averages its shard.

    Validation runs on the averages, and the module has them after training. A checkpoint's `state_dict` holds the
    averages, so `discrete_lit.load` gives those; the raw weights are beside them, and a resume goes on from these
    exactly.

    Args:
        decay: in [0, 1).
        warmup: let the decay grow with the number n of steps so far as `min(decay, (1 + n) / (10 + n))`, so that the
            start is forgotten in a short run too. n is 0 at the first step, whose weights the averages begin with;
            `"inclusive"` counts the step itself (LDM, SEDD), `"every_other"` is half of n (vaex), and the averages of
            both begin with the weights before it.
        every: optimizer steps between two moves; 25 in VQ-Diffusion, with a decay of 0.99.

    Raises:
        ValueError: a setting out of its range; in use, FSDP of the first kind, sharded checkpoints of another strategy
            than `FSDP2Strategy`, sharded weights in half precision, or weights that were not there when training began.
    """

    def __init__(self, decay: float = 0.999, warmup: Warmup = True, *, every: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay of ExponentialMovingAverage must lie in [0, 1), got {decay}")
        if warmup not in (True, False, "inclusive", "every_other"):
            raise ValueError(
                f"warmup of ExponentialMovingAverage must be true, false, 'inclusive' or 'every_other', got {warmup!r}"
            )
        if every < 1:
            raise ValueError(f"every of ExponentialMovingAverage must be at least 1 step, got {every}")
        super().__init__()
        self.decay = decay
        self.every = every
        self.warmup: Warmup = warmup
        self.averages: dict[str, Tensor] = {}
        """By name, since training began; while the module has them, the raw weights."""
        self._averaged_steps = 0
        self._last_step = 0
        self._in_use = False
        self._in_use_by_validation = False
        # The averages by name, while the module has them rounded to half precision.
        self._unrounded: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "ExponentialMovingAverage does not support FSDPStrategy: shard by FSDP2Strategy, as "
                "lightning_configs/trainer/fsdp.yaml does"
            )
        if not saves_one_file(trainer.strategy) and not isinstance(trainer.strategy, FSDP2Strategy):
            raise ValueError(
                f"ExponentialMovingAverage: sharded checkpoints of {type(trainer.strategy).__name__} hold no averages: "
                "let trainer.strategy be FSDP2Strategy, as lightning_configs/trainer/fsdp.yaml does"
            )
        self.averages, self._unrounded = {}, {}
        self._averaged_steps = self._last_step = 0
        self._in_use = self._in_use_by_validation = False
        # Before every callback that may save and end the run behind a batch: the average belongs to that batch. A new
        # list, for the old one is being gone through.
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)
        for name, average, weight in self._pairs(pl_module):
            # Of a checkpoint they may have been made before the module moved to its device.
            self.averages[name] = average.to(weight.device)
            if isinstance(weight, DTensor) and average.dtype != weight.dtype:
                raise ValueError(
                    f"ExponentialMovingAverage: {name} is sharded and of {weight.dtype}, in which its average would be "
                    "rounded by a resume: set trainer.precision to bf16-mixed or 32-true"
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._last_step:
            if trainer.global_step % self.every == 0:
                self._move(pl_module)
            self._last_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After training the module has them already.
        self._in_use_by_validation = bool(self.averages) and not self._in_use
        if self._in_use_by_validation:
            self._exchange(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._in_use_by_validation:
            self._exchange(pl_module)
        self._in_use_by_validation = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Exchanged rather than copied: a checkpoint may still be written.
        self._exchange(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._in_use:
            self._exchange(pl_module)

    @contextmanager
    def in_use(self, module: LightningModule) -> Iterator[None]:
        """Let the module have the averages meanwhile; afterwards it has its raw weights again, to the bit.

        Nothing changes where there are no averages, or the module has them already, as in validation.
        """
        if not self.averages or self._in_use:
            yield
            return
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the averages into `state_dict`, and the raw weights into `current_model_state`."""
        if not self.averages:
            return
        first = _first_names(pl_module)
        # Of a sharded checkpoint each rank writes its shards.
        own, kept = checkpoint["state_dict"], self._gathered() if saves_one_file(trainer.strategy) else self.averages

        def replaced(values: dict[str, Tensor]) -> dict[str, Any]:
            # Of sharded weights only rank 0 has any, and it alone writes.
            return {name: values.get(first.get(_plain(name), ""), value) for name, value in own.items()}

        averages, raw = (replaced(self._unrounded), replaced(kept)) if self._in_use else (replaced(kept), own)
        checkpoint["state_dict"], checkpoint["current_model_state"] = averages, raw
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._averaged_steps)}

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the averages, which the module was given, and give the module its raw weights."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # Sharded weights are loaded behind `on_fit_start`, where averages began with those from before.
        self.averages = {}
        self._begin(pl_module)
        if not {"current_model_state", "averaging_state"} <= checkpoint.keys():
            rank_zero_warn("The checkpoint holds no averages: ExponentialMovingAverage begins with its weights.")
            return
        self._averaged_steps = int(checkpoint["averaging_state"]["n_averaged"])
        # In the module half-precision ones are rounded. Of sharded weights, which are not, Lightning leaves none here.
        saved = {_plain(name): value for name, value in checkpoint.get("state_dict", {}).items()}
        for name, average in self.averages.items():
            if name in saved and saved[name].shape == average.shape:
                average.copy_(saved[name])
        raw = checkpoint["current_model_state"]
        if any(isinstance(weight, DTensor) for weight in pl_module.parameters()):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            whole = saves_one_file(trainer.strategy) or not any(isinstance(value, DTensor) for value in raw.values())
            set_model_state_dict(pl_module, raw, options=StateDictOptions(full_state_dict=whole))
        else:
            pl_module.load_state_dict(raw)

    # The averages.

    @torch.no_grad()
    def _begin(self, module: LightningModule) -> None:
        """Begin with the weights as they are, unless there are averages."""
        if not self.averages:
            self.averages = {
                name: (at_least_float32(value) if value.is_floating_point() else value).detach().clone()
                for name, value in _state(module)
            }

    @torch.no_grad()
    def _move(self, module: nn.Module) -> None:
        """Move the averages towards the weights of a module."""
        count = self._averaged_steps
        begun = count > 0 or isinstance(self.warmup, str)
        moving: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, average, weight in self._pairs(module):
            if average.shape != weight.shape:
                self.averages[name] = (at_least_float32(weight) if weight.is_floating_point() else weight).clone()
            elif begun and (average.is_floating_point() or average.is_complex()):
                averages, weights = moving[average.dtype]
                averages.append(_shard(average))
                weights.append(_shard(weight).to(average.dtype))
            else:
                _shard(average).copy_(_shard(weight))
        n = count + 1 if self.warmup == "inclusive" else count // 2 if self.warmup == "every_other" else count
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        for averages, weights in moving.values():
            get_ema_multi_avg_fn(decay)(averages, weights, count)
        self._averaged_steps += 1

    @torch.no_grad()
    def _exchange(self, module: LightningModule) -> None:
        """Give the module the averages and keep its raw weights in their place, or the other way round."""
        unrounded, self._unrounded = self._unrounded, {}
        for name, average, weight in self._pairs(module):
            if average.shape != weight.shape:
                self.averages[name], weight.data = weight.data, average
                continue
            kept = average.clone()
            _shard(average).copy_(_shard(unrounded.get(name, weight)))
            _shard(weight).copy_(_shard(kept))
            if kept.dtype != weight.dtype and not self._in_use:
                self._unrounded[name] = kept
        self._in_use = not self._in_use

    @torch.no_grad()
    def _gathered(self) -> dict[str, Tensor]:
        """Give what is kept by its names: of sharded weights all of them, on the CPU of rank 0 alone."""
        found = {}
        for name, value in self.averages.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if whole is value:
                found[name] = whole
            elif rank() == 0:
                found[name] = whole.cpu()
        return found

    def _pairs(self, module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Give the name, the average and the weight of all that is averaged or copied."""
        for name, weight in _state(module):
            if name not in self.averages:
                raise ValueError(
                    f"ExponentialMovingAverage: {name} was not there when training began: make it in the model's "
                    "constructor or in configure_model"
                )
            yield name, self.averages[name], weight


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the parameters and the saved buffers of a module, each once, by the name that it has uncompiled."""
    seen = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield _plain(name), value


def _first_names(module: nn.Module) -> dict[str, str]:
    """Give for the name of each tensor the one that `_state` has it by: the first of several of one tensor."""
    first: dict[int, str] = {}
    tensors = {n: v for n, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    return {_plain(name): first.setdefault(id(value), _plain(name)) for name, value in tensors.items()}


def _plain(name: str) -> str:
    """Leave out what `torch.compile` puts into the names of a module's tensors."""
    return name.replace("_orig_mod.", "")


def _shard(tensor: Tensor) -> Tensor:
    """Give the part of a sharded tensor that this rank has, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
