"""The operations of a training step, counted without computing one."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from discrete_lit.accumulation import AccumulatedMean
from discrete_lit.backbones.execution import count_flops
from discrete_lit.core.distributed import alone
from discrete_lit.core.modules import RunningStatistics
from discrete_lit.generators.generator import Generator
from discrete_lit.generators.latent_generator import LatentGenerator
from discrete_lit.tokenizers import ContinuousTokenizer, Tokenizer
from discrete_lit.tokenizers.autoencoder import ImageAutoencoder
from discrete_lit.tokenizers.quantizers.codebook import Codebook


def count_step(module: LightningModule, batch: dict[str, Any], batch_idx: int = 0) -> int:
    """Count the floating-point operations of a training step's forward and backward pass, see `count_flops`.

    Every position counts where which ones do depends on the data. Where a step draws how many places it masks, as
    MAR's do, those of the mean share count.

    Args:
        module: a `Generator`, a `LatentGenerator`, a `Tokenizer` or an `ImageAutoencoder`; it stays as it is.
        batch: its tensors give their shapes alone.
        batch_idx: of the step.

    Raises:
        ValueError: another module, or one that steps its optimizers itself.
        Exception: whatever a step raises that needs to see data.
    """
    known = (Generator, LatentGenerator, Tokenizer, ImageAutoencoder)
    if not isinstance(module, known) or not module.automatic_optimization:
        raise ValueError("not a generator, tokenizer or autoencoder whose loss the trainer minimises")

    # Here, since there are no numbers among tensors without data.
    shares = {
        name: part.mean_step_share() for name, part in module.named_modules() if isinstance(part, LatentGenerator)
    }

    def prepare(copy: LightningModule) -> Callable[[], None]:
        for name, share in shares.items():
            cast(LatentGenerator, copy.get_submodule(name)).fixed_share = share
        for part in _modules_of(copy):
            if isinstance(part, LightningModule):
                part.log = part.log_dict = _nothing
            if isinstance(part, Generator | LatentGenerator | ImageAutoencoder):
                part.accumulated = AccumulatedMean()
            if isinstance(part, RunningStatistics):
                part.forget_step()
            if isinstance(part, Tokenizer):
                part.check_tokens = _nothing
            if isinstance(part, Tokenizer | ContinuousTokenizer):
                part.check_images = _nothing
            if isinstance(part, Generator | LatentGenerator):
                part.check_labels = _nothing
            if isinstance(part, LatentGenerator):
                part.check_scale = _nothing
            if isinstance(part, Codebook):
                part.prepare = part.observe = _nothing
            if hasattr(part, "activation_checkpointing"):
                cast(Any, part).activation_checkpointing = False
        inputs = {name: _without_data(value) for name, value in batch.items()}

        def step() -> None:
            _loss_of(copy.training_step(inputs, batch_idx)).backward()

        return step

    with alone():
        return count_flops(module, prepare, gradients=True)


def _modules_of(module: nn.Module) -> Iterator[nn.Module]:
    """A module, all that it consists of, and those that it keeps in a list, as a teacher that is not to be saved."""
    for part in module.modules():
        yield part
        for value in vars(part).values():
            for each in value if isinstance(value, list) else ():
                if isinstance(each, nn.Module):
                    yield from _modules_of(each)


def _loss_of(outputs: Any) -> Tensor:
    """The loss among what a training step gives: a tensor, or a dictionary that holds it."""
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for what a step does beside its computation: logs and checks of its inputs."""


def _without_data(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, dtype=dtype, device=value.device)
