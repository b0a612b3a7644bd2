"""A step of several accumulated micro-batches, as that of one batch of all their samples.

`AccumulatedMean` makes the gradient of the step that of one weighted mean, whatever the weights of its micro-batches.
`check_accumulation` refuses what no micro-batches can give: terms that are computed from all samples of a batch at
once. Running statistics, which move once a step, are in `discrete_lit.core.modules`.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from lightning import LightningModule
from torch import Tensor, nn

from discrete_lit.core.modules import OfWholeBatch, whole_batch_terms


def micro_batches_of(module: LightningModule) -> int:
    """Count the batches whose gradients are accumulated for a step of a module; 1 where no Trainer trains it."""
    try:
        return getattr(module.trainer, "accumulate_grad_batches", 1)
    except RuntimeError:  # Lightning's, of a module without a Trainer
        return 1


Accumulation = Literal["exact", "by_micro_batch"]
"""How a step of several accumulated micro-batches is computed: that of one batch of all their samples (`"exact"`), or
what needs all samples of a batch at once of each micro-batch by itself (`"by_micro_batch"`)."""


def check_accumulation(module: LightningModule, accumulation: Accumulation, parts: Iterable[nn.Module]) -> None:
    """Refuse accumulated micro-batches that would be another training than one batch of all their samples.

    Args:
        module: with the Trainer; an `OfWholeBatch` says what it needs.
        accumulation: its setting.
        parts: what its training step computes with, which say so too.

    Raises:
        ValueError: an unknown `accumulation`, or an exact one of what needs all samples at once.
    """
    if accumulation not in get_args(Accumulation):
        raise ValueError(f"accumulation must be one of {', '.join(get_args(Accumulation))}, got {accumulation!r}")
    count = micro_batches_of(module)
    terms = list(module.whole_batch_terms()) if isinstance(module, OfWholeBatch) else []
    terms = list(dict.fromkeys([*terms, *(term for part in parts for term in whole_batch_terms(part))]))
    if count > 1 and terms and accumulation == "exact":
        raise ValueError(
            f"trainer.accumulate_grad_batches is {count}, and a step of {count} batches would not be that of one batch "
            f"of all their samples. These are computed from all samples of a batch at once: {'; '.join(terms)}. Set "
            f"trainer.accumulate_grad_batches to 1 and data.init_args.batch_size {count} times as large, or "
            "model.init_args.accumulation to by_micro_batch, which computes them of each micro-batch, as published "
            "code does"
        )


class AccumulatedMean:
    """Make the gradient of a step that of one weighted mean over all its micro-batches.

    Each micro-batch i has a loss `S_i / w_i`, a mean by weights that sum to w_i. Lightning takes the gradients of these
    losses, divided by the number k of micro-batches. But the mean of the joint batch is `sum S_i / sum w_i`: where the
    weights differ, as the numbers of masked tokens do, or the last step of an epoch has fewer micro-batches, it is
    another. So the loss i is multiplied by `w_i / w_1`, and the accumulated gradients by `k w_1 / sum w_i`.
    """

    def __init__(self) -> None:
        self._weights: list[Tensor | float] = []

    def loss(self, loss: Tensor, weight: Tensor | float) -> Tensor:
        """Give the loss to take the gradient of, for a micro-batch whose mean has this weight (on all ranks the same).

        The first one's is its own.
        """
        self._weights.append(weight)
        return loss if len(self._weights) == 1 else loss * (weight / self._weights[0])

    def end_step(self, parameters: Iterable[nn.Parameter], micro_batches: int) -> None:
        """Mend the gradients that were accumulated, behind the last micro-batch of a step.

        Args:
            parameters: with the gradients of Lightning's mean.
            micro_batches: k, what Lightning divided by.
        """
        weights, self._weights = self._weights, []
        if not isinstance(weights[0], Tensor) and micro_batches * weights[0] == sum(weights):
            return
        # Weights on a device stay there: the host would wait for the backward pass to know them.
        first, *rest = (weight.double() if isinstance(weight, Tensor) else weight for weight in weights)
        factor = micro_batches * first / sum(rest, first)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
