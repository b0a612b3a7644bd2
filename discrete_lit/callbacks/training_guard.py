"""A guard against the silent failures of training: codebook collapse, a loss or gradient that is not finite (NaN), and
a loss that jumps."""

import json
import logging
from collections import defaultdict, deque
from math import ceil, isfinite
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from discrete_lit.callbacks.logged_media import log_text
from discrete_lit.core.distributed import all_reduce_sum, rank, world_size
from discrete_lit.core.files import atomic_write_text
from discrete_lit.core.host_copies import HostCopy
from discrete_lit.core.images import MODALITIES
from discrete_lit.core.lightning_internals import logs_this_step
from discrete_lit.core.modules import forget_statistics_step
from discrete_lit.metrics.codebook_usage import MOST_COUNTED, CodebookUsage
from discrete_lit.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

# 4 K ids that are drawn evenly show 98% of the K.
_DRAWS_FOR_EACH_ID = 4
# The losses that a new one is compared with, and how many of them there must be.
_COMPARED, _FEWEST_COMPARED = 256, 64
# Of normal values, the deviation over the median distance from the median.
_DEVIATIONS = 1.4826


class TrainingStopped(RuntimeError):
    """The training guard ended the run."""


class TrainingGuard(Callback):
    """Watches the codebook's usage, the loss and its gradient, and warns, skips a batch or ends the run; ranks act
    together.

    For a tokenizer, whose training step gives `{"loss": ..., "tokens": ...}`, it logs `train/codebook_usage` (fraction
    of the K ids that occur) and `train/perplexity` (exp of the entropy in nats) of the training batches of all ranks,
    over windows of at least `window` batches and 4 K ids; above K = 2^24 it counts nothing. A usage below
    `min_codebook_usage` is a warning in the log and, as text, in TensorBoard or W&B, or ends the run.

    Where a batch's loss is not finite on any rank, its step, terms, keys and indices go to
    `<default_root_dir>/alarms/`, with the images in it that are not finite, into the log, and to TensorBoard or W&B.
    Then the run ends before the optimizer's step, or the batch is skipped on all ranks: buffers are put back as they
    were before it, and the optimizer leaves all weights and its own state alone; with accumulated batches, those of the
    same step are lost too. The check waits once a batch, for the device's forward pass alone: it has the backward pass
    to do meanwhile.

    A gradient that is not finite behind a finite loss is treated in the same way. To skip such a batch, the host waits
    for the backward pass before each step; to end the run it looks at the gradient one batch later, and before every
    checkpoint, so that none with broken weights is written. Under 16-mixed, whose scaler looks for such gradients
    itself, it is left to that.

    A loss that is far above the last 256 (its distance from their median more than `spike` standard deviations of
    theirs, by their median distance from it) is a warning, once in 256 batches, with the same file; see
    `discrete-lit replay`, which runs the batch of such a file again.

    Args:
        min_codebook_usage: in [0, 1]; 0 never warns.
        window: the fewest batches that usage is measured over.
        on_collapse: what happens at a low usage.
        on_nonfinite: what happens at a loss that is not finite.
        most_skipped: bad batches in a row that end the run: the weights themselves must be broken.
        spike: standard deviations above the median that make a spike; 0 looks for none.
        on_spike: what happens at one. Where a loss changes on purpose, such as where a discriminator begins, there is
            one too.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        min_codebook_usage: float = 0.1,
        window: int = 100,
        *,
        on_collapse: Literal["warn", "stop"] = "warn",
        on_nonfinite: Literal["stop", "skip"] = "stop",
        most_skipped: int = 10,
        spike: float = 20.0,
        on_spike: Literal["warn", "stop"] = "warn",
    ) -> None:
        if not 0 <= min_codebook_usage <= 1:
            raise ValueError(f"min_codebook_usage of TrainingGuard must lie in [0, 1], got {min_codebook_usage}")
        if window < 1 or most_skipped < 1:
            raise ValueError(
                f"window and most_skipped of TrainingGuard must be at least 1, got {window} and {most_skipped}"
            )
        self.min_codebook_usage = min_codebook_usage
        self.window = window
        self.on_collapse = on_collapse
        self.on_nonfinite = on_nonfinite
        if not 0 <= spike < float("inf"):
            raise ValueError(f"spike of TrainingGuard must be at least 0, got {spike}")
        self.most_skipped = most_skipped
        self.spike = spike
        self.on_spike = on_spike
        # Of the last step, not looked at yet: whether its gradient was finite, and what made it.
        self._gradient: tuple[HostCopy, dict[str, Any], Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._usage: CodebookUsage | None = None
        self._batches_left = 0
        self._figures: dict[str, Tensor] = {}
        self._skips_step = False
        self._skipped_in_a_row = 0
        self._is_bad = False
        # Of each loss of a batch: with a discriminator there are two.
        self._losses: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_COMPARED))
        self._loss_number = 0
        self._quiet = 0
        self._scales = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._gradient = None
        self._place: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._loss_number = batch, 0
        self._place = _place_of(trainer, batch_idx)
        self._before = _BeforeBatch(pl_module) if self.on_nonfinite == "skip" else None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach()
        self._over_ranks = HostCopy(all_reduce_sum(torch.stack(((~self._loss.isfinite()).float(), self._loss.float()))))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Asked behind the backward pass, so that the device has it to do while the host waits.
        self._look_at_gradient(trainer)  # before the loss, which a broken gradient breaks too
        bad_ranks, loss = self._over_ranks.values()
        self._loss_number += 1
        self._is_bad = bad_ranks > 0
        if self._is_bad:
            self._skip(trainer, pl_module, "loss")
            return
        if self._skips_step:
            forget_statistics_step(pl_module)
        self._compare(trainer, loss / world_size())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._skips_step and not self._scales:
            self._watch_gradient(trainer, pl_module, optimizer)
        if self._skips_step:
            for parameter in pl_module.parameters():
                parameter.grad = None
            self._skips_step = False
        elif not self._is_bad:
            self._skipped_in_a_row = 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look_at_gradient(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_at_gradient(trainer)

    def _skip(self, trainer: Trainer, pl_module: LightningModule, what: str) -> None:
        """Report a bad batch, and leave it out or end the run."""
        self._skipped_in_a_row += 1
        message = self._report(trainer, float(self._loss), what=what, place=self._place, batch=_describe(self._batch))
        if self.on_nonfinite == "stop":
            raise TrainingStopped(message)
        if self._skipped_in_a_row >= self.most_skipped:
            raise TrainingStopped(f"{message} These were {self._skipped_in_a_row} bad batches in a row.")
        assert self._before is not None
        self._before.restore()
        # What the other micro-batches of the step saw is not taken either.
        forget_statistics_step(pl_module)
        self._skips_step = True

    def _watch_gradient(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin to copy whether the gradient of a step is finite; to skip a batch, wait for it."""
        given = [
            weight.grad for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None
        ]
        if not given:
            return
        norm = torch.nn.utils.get_total_norm(given)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        copied = HostCopy(all_reduce_sum((~norm.isfinite()).float()))
        if self.on_nonfinite == "stop":
            self._look_at_gradient(trainer)  # of another optimizer
            self._gradient = copied, self._place, self._batch
        elif copied.values() > 0:
            self._skip(trainer, pl_module, "gradient")

    def _look_at_gradient(self, trainer: Trainer) -> None:
        """End the run if the gradient of the last step was not finite."""
        watched, self._gradient = self._gradient, None
        if watched is not None and watched[0].values() > 0:
            _, place, batch = watched
            message = self._report(trainer, None, what="gradient", place=place, batch=_describe(batch))
            raise TrainingStopped(f"{message} No checkpoint was written since: the weights are no numbers either.")

    def _compare(self, trainer: Trainer, loss: float) -> None:
        """Compare a loss, the mean over ranks, with those before it."""
        self._quiet = max(0, self._quiet - 1)
        losses = self._losses[self._loss_number]
        if self.spike and len(losses) >= _FEWEST_COMPARED and not self._quiet:
            middle = median(losses)
            deviation = _DEVIATIONS * median(abs(value - middle) for value in losses)
            # Losses that hardly differ would make a spike of anything.
            if loss - middle > self.spike * max(deviation, 1e-3 * abs(middle)):
                self._quiet = _COMPARED
                facts = f"{loss:.4g}, and the last {len(losses)} were about {middle:.4g}"
                batch = _describe(self._batch)
                message = self._report(
                    trainer, float(self._loss), what="loss", place=self._place, batch=batch, spike=facts
                )
                if self.on_spike == "stop":
                    raise TrainingStopped(message)
        losses.append(loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = outputs.get("tokens") if isinstance(outputs, dict) else None
        if isinstance(pl_module, Tokenizer) and tokens is not None and pl_module.vocab_size <= MOST_COUNTED:
            self._count(trainer, pl_module.vocab_size, tokens)
        if self._figures and logs_this_step(trainer):
            pl_module.log_dict(self._figures)

    def _count(self, trainer: Trainer, vocab_size: int, tokens: Tensor) -> None:
        """Count the ids of a batch, and look at the usage where the window ends with it."""
        if self._usage is None:
            self._usage = CodebookUsage(vocab_size).to(tokens.device)
        if self._batches_left == 0:
            of_a_batch = int(all_reduce_sum(torch.tensor(tokens.numel(), device=tokens.device)))
            self._batches_left = max(self.window, ceil(_DRAWS_FOR_EACH_ID * vocab_size / max(of_a_batch, 1)))
        if self._is_bad:
            return
        self._usage.update(tokens)
        self._batches_left -= 1
        if self._batches_left:
            return
        usage, perplexity = self._usage.compute()
        self._usage.reset()
        self._figures = {"train/codebook_usage": usage, "train/perplexity": perplexity}
        if self.min_codebook_usage and float(usage) < self.min_codebook_usage:
            message = (
                f"the codebook collapses: of its {vocab_size} ids {float(usage):.1%} were used in the training batches "
                f"up to step {trainer.global_step}, less than min_codebook_usage={self.min_codebook_usage:.1%} "
                f"(perplexity {float(perplexity):.1f})"
            )
            _announce(trainer, message)
            if self.on_collapse == "stop":
                raise TrainingStopped(message)

    def _report(
        self,
        trainer: Trainer,
        loss: float | None,
        *,
        what: str,
        place: dict[str, Any],
        batch: dict[str, Any],
        spike: str | None = None,
    ) -> str:
        """Write down what is known of the batches of all ranks, and say so in a message.

        Args:
            trainer: of the run.
            loss: of this rank; None where it is not known any more.
            what: is not finite, or jumps.
            place: of the batch in the run.
            batch: keys and indices of it.
            spike: the jump of the loss in words; None where something is not finite.
        """
        mine = {"rank": rank(), "loss": None if loss is None else _plain(loss), **batch}
        everyone: list[Any] = [None] * world_size()
        if world_size() > 1:
            dist.all_gather_object(everyone, mine)
        else:
            everyone = [mine]
        terms = {name: _plain(float(value)) for name, value in trainer.callback_metrics.items() if "train/" in name}
        report = {"what": "spike" if spike else what, **place, "terms": terms, "ranks": everyone}
        name = f"{report['what']}-{place['total_batch']:08d}.json"
        file = Path(trainer.default_root_dir) / "alarms" / name
        if trainer.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(file, json.dumps(report, indent=2) + "\n")
        broken = [name for found in everyone for name in found["not_finite"]]
        cause = (
            f"images with pixels that are not finite numbers: {', '.join(map(str, broken))}"
            if broken
            else ("its images are finite numbers")
        )
        found = (
            f"jumps at step {place['step']}: {spike}" if spike else f"is not finite at step {place['step']}; {cause}"
        )
        message = f"the {what} of a batch {found}. Its keys and terms are in {file}."
        _announce(trainer, message)
        return message


def _place_of(trainer: Trainer, batch_idx: int) -> dict[str, Any]:
    """Say where a batch stands in the run: what `discrete-lit replay` finds it by."""
    return {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "batch": batch_idx,
        "total_batch": trainer.fit_loop.total_batch_idx,
    }


class _BeforeBatch:
    """Keeps what a batch may change of a module beside its weights, to restore it.

    That is the buffers of the submodules that train, and the plain attributes of these, such as a flag that the codes
    have been started.
    """

    def __init__(self, module: LightningModule) -> None:
        owners = [part for part in module.modules() if part.training and any(True for _ in part.buffers(recurse=False))]
        self.buffers = [(buffer, buffer.clone()) for part in owners for buffer in part.buffers(recurse=False)]
        self.attributes = [
            (part, {name: value for name, value in vars(part).items() if isinstance(value, bool | int | float)})
            for part in owners
        ]

    def restore(self) -> None:
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        for part, values in self.attributes:
            vars(part).update(values)


def _describe(batch: Any) -> dict[str, Any]:
    """Keys and indices of a batch, and the names of its images that are not finite."""
    batch = batch if isinstance(batch, dict) else {}
    found = {name: _listed(batch[name]) for name in ("key", "index") if name in batch}
    images = next((batch[name] for name in MODALITIES if name in batch), None)
    broken: list[Any] = []
    if isinstance(images, Tensor) and images.is_floating_point():
        indices = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
        names = found.get("key") or found.get("index") or list(range(len(images)))
        broken = [names[index] for index in indices]
    return {**found, "not_finite": broken}


def _listed(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _plain(value: float) -> float | str:
    """The value as JSON can hold it, which has no word for what is not finite."""
    return value if isfinite(value) else str(value)


@rank_zero_only
def _announce(trainer: Trainer, message: str) -> None:
    _log.warning(message)
    log_text(trainer, "alarm", message)
