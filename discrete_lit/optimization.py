"""Optimizers and learning-rate schedules of everything that is trained: generators, tokenizers, classifiers.

`configure_optimizers` says which weights decay and at which rate each module learns. `MuonAdamW` trains the matrices of
hidden layers by Muon and everything else by AdamW. `WarmupCosine` and `WarmupLinear` are the schedules of the published
recipes: a warm-up, a full rate, and a decay to a smaller rate that stays. `WarmupPlateau` lowers the rate where the
loss no longer falls.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from math import cos, pi
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

_DECAYED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


WeightDecayRule = Literal["linear", "linear_and_classes", "titok", "rar", "bar", "matrices", "mar", "bitdance", "all"]
"""Which parameters weight decay acts on; see `decayed_parameters`."""

# Rules by the number of dimensions, and the parts of names that do not decay.
_MATRICES_BUT: dict[str, tuple[str, ...]] = {
    "matrices": (),
    "mar": (".head.network.",),
    "bitdance": (".token_embedding.", ".class_embedding.", ".queries"),
}
# Rules by the kind of layer: the parts of names that do not decay, and the parameters beside layers that do.
_LINEAR_BUT: dict[str, tuple[str, ...]] = {
    "titok": (".patch_embedding.", ".code_embedding."),
    "rar": (".final_modulation.",),
    "bar": ("modulation.", ".ratio_embedding.", ".place_head.output."),
}
_LINEAR_AND = {"linear_and_classes": ".class_embedding.weight", "rar": ".start", "bar": ".start"}


def configure_optimizers(
    module: LightningModule,
    optimizer: OptimizerCallable | None,
    scheduler: LRSchedulerCallable | None,
    *,
    learning_rate_ratios: Sequence[tuple[nn.Module, float]] = (),
    hidden_layers: Iterable[nn.Module] = (),
    weight_decay_rule: WeightDecayRule = "linear",
) -> Any:
    """Build what Lightning's `configure_optimizers` returns: one optimizer, and a scheduler that steps by the batch.

    Args:
        module: the module to train.
        optimizer: from parameter groups to an optimizer.
        scheduler: from an optimizer to a scheduler.
        learning_rate_ratios: submodules with parameter groups of their own, and the ratio of their learning rate to
            the optimizer's.
        hidden_layers: the modules whose linear layers are hidden ones, as the blocks of a transformer are; their
            weights are what `MuonAdamW` trains by Muon.
        weight_decay_rule: which parameters decay, see `decayed_parameters`.

    Raises:
        ValueError: no optimizer was given, a rule that is not known, Muon for a module without hidden layers, or
            torch's Muon, which trains nothing but matrices.
    """
    if optimizer is None:
        raise ValueError(
            f"{type(module).__name__} has no optimizer: set model.init_args.optimizer, "
            "for instance {class_path: torch.optim.AdamW, init_args: {lr: 3.0e-4}}"
        )
    decayed = decayed_parameters(module, weight_decay_rule)
    separate = {id(parameter) for submodule, _ in learning_rate_ratios for parameter in submodule.parameters()}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in separate]
    parts = [(rest, 1.0), *((list(submodule.parameters()), ratio) for submodule, ratio in learning_rate_ratios)]
    groups, ratios = _groups(parts, decayed, hidden=())
    try:
        built = optimizer(groups)
    except ValueError as error:
        if "Muon only supports" not in str(error):
            raise
        raise ValueError(
            f"torch.optim.Muon trains matrices alone, and {type(module).__name__} has other weights too: set "
            "model.init_args.optimizer to {class_path: MuonAdamW}, which trains those by AdamW"
        ) from error
    if isinstance(built, MuonAdamW):
        hidden = {
            id(layer.weight)
            for unit in hidden_layers
            for layer in unit.modules()
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad
        }
        if not hidden - separate:
            raise ValueError(
                f"{type(module).__name__} names no hidden linear layers for MuonAdamW to train by Muon: set "
                "model.init_args.optimizer to {class_path: AdamW} or another"
            )
        groups, ratios = _groups(parts, decayed, hidden=hidden - separate)
        built = optimizer(groups)
    for group, ratio in zip(built.param_groups, ratios, strict=True):
        group["lr"] *= ratio
    fuse_steps(built)
    if scheduler is None:
        return built
    # A schedule that follows the loss is told of it; others do not read the name.
    return {
        "optimizer": built,
        "lr_scheduler": {"scheduler": scheduler(built), "interval": "step", "monitor": "train/loss"},
    }


def decayed_parameters(module: nn.Module, rule: WeightDecayRule = "linear") -> set[int]:
    """Find the parameters that weight decay acts on.

    - `"linear"`: weights of linear and convolution layers; never biases, gains, embeddings, positions, start tokens and
      codebooks (minGPT, TiTok's generator). Decay would shrink the rows of a table that a batch does not touch.
    - `"linear_and_classes"`: also class embeddings (VAR).
    - `"titok"`: not the embeddings of patches and of codes, linear layers with "embed" in their names (TiTok's
      tokenizers).
    - `"rar"`: also registers and start tokens, but not the modulation before the logits, whose name in RAR's code has
      the "ln" that its norms are told by.
    - `"bar"`: also registers and start tokens, but no modulation, for the same reason; nor the embedding of the mask
      ratio and the output of its head, which have "embed" in their names (BAR).
    - `"matrices"`: all of two or more dimensions, embeddings among them (nanoGPT, LlamaGen, IBQ, Open-MAGVIT2).
    - `"mar"`: as `"matrices"`, with the vector of masked positions, which is one of three dimensions in MAR's code, but
      without a diffusion head (MAR, xAR, TokenBridge).
    - `"bitdance"`: as `"matrices"`, without the embeddings of tokens and classes and the queries of a block (BitDance).
    - `"all"`: every parameter (MaskBit, Halton-MaskGIT).

    Args:
        module: what is trained.
        rule: one of these.

    Returns:
        Identities (`id`) of the parameters.

    Raises:
        ValueError: another rule.
    """
    if rule not in get_args(WeightDecayRule):
        raise ValueError(f"weight_decay_rule={rule!r} is not known, accepted: {', '.join(get_args(WeightDecayRule))}")
    if rule == "all":
        return {id(parameter) for parameter in module.parameters()}
    if rule in _MATRICES_BUT:
        return {
            id(parameter)
            for name, parameter in module.named_parameters()
            if (parameter.ndim >= 2 or (rule == "mar" and name.endswith("mask_vector")))
            and not any(part in f".{name}" for part in _MATRICES_BUT[rule])
        }
    decayed = {id(_trained_weight(layer)) for layer in module.modules() if isinstance(layer, _DECAYED)}
    for name, parameter in module.named_parameters():
        if rule in _LINEAR_AND and f".{name}".endswith(_LINEAR_AND[rule]):
            decayed.add(id(parameter))
        if any(part in f".{name}" for part in _LINEAR_BUT.get(rule, ())):
            decayed.discard(id(parameter))
    return decayed


def _trained_weight(layer: nn.Module) -> nn.Parameter:
    """The weight of a layer, or what it is computed from under a spectral norm."""
    if is_parametrized(layer, "weight"):
        kept = layer.parametrizations["weight"]  # type: ignore[index]
        # Weight normalisation has two: the length, and the direction before its norm.
        return kept.original1 if hasattr(kept, "original1") else kept.original  # type: ignore[return-value, union-attr]
    return layer.weight  # type: ignore[return-value]


def configure_apart(
    configured: Any,
    parameters: Iterable[nn.Parameter],
    *,
    weight_decay: float | None = None,
    scheduler: Callable[[Optimizer], LambdaLR] | None = None,
    first_step: int = 0,
) -> Any:
    """Give the parameter groups of a part, as a discriminator, a weight decay and a learning-rate schedule of its own.

    Args:
        configured: what `configure_optimizers` gave, with the part in groups of its own.
        parameters: those of the part.
        weight_decay: of those of its groups that decay; None leaves it.
        scheduler: from an optimizer to a scheduler, whose steps count from `first_step` on; None leaves the common one.
        first_step: the step of the Trainer that is the part's step 0.

    Returns:
        `configured`, changed.

    Raises:
        ValueError: a scheduler that is no `LambdaLR`, or beside one that is none; a `weight_decay` where the optimizer
            has none to replace.
    """
    optimizer: Optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    own = {id(parameter) for parameter in parameters}
    places = [place for place, group in enumerate(optimizer.param_groups) if any(id(p) in own for p in group["params"])]
    if weight_decay is not None:
        decaying = [group for group in (optimizer.param_groups[place] for place in places) if group.get("weight_decay")]
        if not decaying:
            raise ValueError(
                f"weight_decay={weight_decay} of a discriminator replaces the optimizer's, and "
                f"{type(optimizer).__name__} has none here: set weight_decay in optimizer.init_args too"
            )
        for group in decaying:
            group["weight_decay"] = weight_decay
    if scheduler is None:
        return configured
    if not isinstance(configured, dict):
        common: Any = LambdaLR(optimizer, lambda step: 1.0)
        configured = {"optimizer": optimizer, "lr_scheduler": {"scheduler": common, "interval": "step"}}
    common = configured["lr_scheduler"]["scheduler"]
    # The ratio of its rate at each step, from a scheduler of an optimizer that trains nothing.
    apart = scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    for found in (common, apart):
        if not isinstance(found, LambdaLR):
            raise ValueError(
                "a learning-rate schedule of its own needs schedulers of the kind LambdaLR on both sides, as "
                f"WarmupCosine or WarmupLinear, got {type(found).__name__}"
            )
    (ratio,) = apart.lr_lambdas
    for place in places:
        common.lr_lambdas[place] = lambda step: ratio(max(step - first_step, 0))
        optimizer.param_groups[place]["lr"] = common.base_lrs[place] * common.lr_lambdas[place](0)
    common._last_lr = [group["lr"] for group in optimizer.param_groups]
    return configured


def _groups(
    parts: Sequence[tuple[list[nn.Parameter], float]], decayed: Collection[int], *, hidden: Collection[int]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Divide the trained parameters into groups, and give the learning-rate ratio of each group.

    Args:
        parts: parameters and their ratio.
        decayed: identities of the parameters with weight decay.
        hidden: of those that Muon trains, which have a group of their own, the first of its part.
    """
    groups: list[dict[str, Any]] = []
    ratios: list[float] = []
    for parameters, ratio in parts:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        matrices = [parameter for parameter in trained if id(parameter) in hidden]
        others = [parameter for parameter in trained if id(parameter) not in hidden]
        if matrices:
            groups.append({"params": matrices, "muon": True})
        groups += [
            {"params": [parameter for parameter in others if id(parameter) in decayed]},
            {"params": [parameter for parameter in others if id(parameter) not in decayed], "weight_decay": 0.0},
        ]
        ratios += [ratio] * (2 + bool(matrices))
    return groups, ratios


class MuonAdamW(Optimizer):
    """Trains hidden matrices by Muon and all other parameters by AdamW, as one optimizer.

    Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) steps along the momentum of a
    matrix with its singular values brought to about 1, by five Newton-Schulz iterations. It is meant for the matrices
    of hidden layers: embeddings, heads, gains, biases and positions belong to AdamW. The two are `torch.optim.Muon` and
    `torch.optim.AdamW`; this class is what a Trainer, a learning-rate schedule, a gradient clip and a checkpoint take
    for a single optimizer.

    In a configuration, `optimizer: {class_path: MuonAdamW, init_args: {lr: 3.0e-3}}` is enough: `configure_optimizers`
    forms the groups of what the model names as its hidden layers. Elsewhere, a group with `"muon": True` is Muon's.

    The step of an A x B matrix is multiplied as `adjust_lr_fn` says: `"original"` by sqrt(max(1, A / B)), Jordan's;
    `"match_rms_adamw"` by 0.2 sqrt(max(A, B)), with which Muon takes AdamW's learning rate and decay (Liu et al., "Muon
    is Scalable for LLM Training", 2025); `"spectral_unclamped"` by sqrt(A / B) (Bernstein, "Deriving Muon", 2025).

    Args:
        params: parameters, or groups of them; Muon's are marked `"muon": True`. A group may have settings of its own.
        lr: learning rate of Muon's groups.
        weight_decay: of Muon's groups, decoupled.
        momentum: of Muon, in [0, 1); Nesterov's.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: how the shape of a matrix changes its step.
        adamw_lr: learning rate of the other groups; `lr` by default.
        adamw_betas: of the other groups.
        adamw_eps: of the other groups.
        adamw_weight_decay: of the other groups, decoupled; `weight_decay` by default.

    Raises:
        ValueError: a setting out of its range, a parameter of Muon's that is no matrix, or one that is sharded (FSDP):
            the iterations need a whole matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral_unclamped"] = "original",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum of MuonAdamW must lie in [0, 1), got {momentum}")
        # A parameter that is of no group: an optimizer wants one, and what counts here are its settings and its step.
        none = [nn.Parameter(torch.zeros(1, 1))]
        self._muon = torch.optim.Muon(
            none, lr=lr, weight_decay=weight_decay, momentum=momentum, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn
        )
        self._adamw = torch.optim.AdamW(
            none,
            lr=lr if adamw_lr is None else adamw_lr,
            betas=adamw_betas,
            eps=adamw_eps,
            weight_decay=weight_decay if adamw_weight_decay is None else adamw_weight_decay,
        )
        super().__init__(params, {"muon": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        by_muon = param_group.get("muon", False)
        # The settings of a group that it does not give itself; a copy, as of betas.
        settings = {**(self._muon if by_muon else self._adamw).defaults, "muon": by_muon}
        super().add_param_group({**settings, **param_group})
        for parameter in self.param_groups[-1]["params"] if by_muon else ():
            if isinstance(parameter, DTensor) or parameter.ndim != 2:
                reason = "is sharded" if isinstance(parameter, DTensor) else "is no matrix"
                raise ValueError(
                    f"MuonAdamW trains whole matrices by Muon, and a parameter of the shape {tuple(parameter.shape)} "
                    f"{reason}: sharded training (FSDP) needs another optimizer, as {{class_path: AdamW}}"
                )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make a step of all groups; `closure` computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner, by_muon in ((self._muon, True), (self._adamw, False)):
            # The same dictionaries: schedules, checkpoints and resumes see and set what the steps read.
            inner.param_groups = [group for group in self.param_groups if group["muon"] is by_muon]
            inner.state = self.state
            inner.step()
        return loss


def is_trained(module: LightningModule) -> bool:
    """Say whether a Trainer trains a module, and so calls its hooks."""
    try:
        return isinstance(module.trainer, Trainer)
    except RuntimeError:  # Lightning's, of a module without a Trainer
        return False


def evaluation_stage(module: LightningModule) -> str:
    """Name what a module measures now, as its logs begin: `"test"` in a Trainer's test, else `"validation"`."""
    return "test" if is_trained(module) and module.trainer.testing else "validation"


# Where torch has one kernel for a step of Adam that is worth it; tests add the CPU's.
_FUSED_ON = frozenset({"cuda"})


def fuse_steps(optimizer: Optimizer) -> None:
    """Let `torch.optim.Adam` and `AdamW` step by one kernel where all their parameters lie on a CUDA device.

    It reads and writes each number once, where torch's default makes about ten passes over all of them. What the
    configuration says of `fused`, `foreach`, `capturable` or `differentiable` stands. The option is set in the groups,
    not in the constructor: one that was constructed so also takes over the scaling of float16, and Lightning then
    refuses to clip gradients, even in bfloat16.

    Args:
        optimizer: changed in place; others than these two stay as they are.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    chosen = ("fused", "foreach", "capturable", "differentiable")
    for group in optimizer.param_groups:
        simple = not any(group[name] for name in chosen) and group["fused"] is None and group["foreach"] is None
        if not simple or any(p.device.type not in _FUSED_ON or not p.is_floating_point() for p in group["params"]):
            return
    for group in optimizer.param_groups:
        group["fused"] = True


class WarmupDecay(LambdaLR, ABC):
    """Warms up linearly to the optimizer's learning rate, holds it, and lets it decay to a fraction of itself.

    Args:
        optimizer: given by the configuration.
        warmup_steps: batches until the full rate.
        total_steps: batches until the final rate, which stays from there on.
        min_lr_factor: ratio of the final rate to the full one, in [0, 1].
        hold_steps: batches of the full rate between the warm-up and the decay.
        final_weight_decay: of the groups that have a weight decay: it goes there along half a cosine, from the first
            batch to the last of `total_steps` (VAR's largest model: 0.05 to 0.08); None leaves it as it is.

    Raises:
        ValueError: a setting out of its range, or a final weight decay of an optimizer that has none.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        total_steps: int,
        min_lr_factor: float = 0.0,
        hold_steps: int = 0,
        final_weight_decay: float | None = None,
    ) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"warmup_steps must lie in [0, total_steps), got {warmup_steps} of {total_steps}")
        if not 0 <= hold_steps < total_steps - warmup_steps:
            raise ValueError(
                f"hold_steps must lie in [0, total_steps - warmup_steps), got {hold_steps} of "
                f"{total_steps - warmup_steps}"
            )
        if not 0 <= min_lr_factor <= 1:
            raise ValueError(f"min_lr_factor must lie in [0, 1], got {min_lr_factor}")
        if final_weight_decay is not None and (
            final_weight_decay < 0 or not any(group.get("weight_decay") for group in optimizer.param_groups)
        ):
            raise ValueError(
                f"final_weight_decay must be >= 0, and the optimizer have a weight_decay to begin with: got "
                f"{final_weight_decay} for {type(optimizer).__name__}"
            )
        self.total_steps, self.final_weight_decay = total_steps, final_weight_decay
        self.first_weight_decays: list[float] = []
        decay_start = warmup_steps + hold_steps

        def ratio(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min(1.0, max(step - decay_start, 0) / (total_steps - decay_start))
            return min_lr_factor + (1 - min_lr_factor) * self.decay(progress)

        super().__init__(optimizer, ratio)

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next batch."""
        super().step(epoch)
        if self.final_weight_decay is None or self.last_epoch == 0:
            return
        groups = self.optimizer.param_groups
        # Only now: a part, as a discriminator, may have been given another one behind the constructor.
        self.first_weight_decays = self.first_weight_decays or [group["weight_decay"] for group in groups]
        left = (1 + cos(pi * min(1.0, self.last_epoch / max(self.total_steps - 1, 1)))) / 2
        for group, first in zip(groups, self.first_weight_decays, strict=True):
            if first:
                group["weight_decay"] = self.final_weight_decay + (first - self.final_weight_decay) * left

    @abstractmethod
    def decay(self, progress: float) -> float:
        """Return a number that falls from 1 at the beginning of the decay, `progress` 0, to 0 at its end, 1."""


class WarmupCosine(WarmupDecay):
    """Warms up linearly, holds the full learning rate, and lets it decay along half a cosine (RAR, Halton-MaskGIT)."""

    def decay(self, progress: float) -> float:
        return (1 + cos(pi * progress)) / 2


class WarmupLinear(WarmupDecay):
    """Warms up linearly, holds the full learning rate, and lets it decay along a line (VAR)."""

    def decay(self, progress: float) -> float:
        return 1 - progress


class WarmupPlateau(ReduceLROnPlateau):
    """Warms up linearly, then lowers the learning rate each time that the loss has stopped falling (VQ-Diffusion).

    It looks at the training loss of every step, of the batch of all ranks, and counts the steps since one was lower
    than the lowest before by `threshold`. The host waits for the loss of each step.

    Args:
        optimizer: given by the configuration.
        warmup_steps: batches until the full rate; losses in them do not count.
        patience: steps without a lower loss that are waited for; the next one lowers the rate.
        factor: of the rate, each time, in (0, 1).
        threshold: the fraction by which a loss must be lower, in [0, 1).
        min_lr: the smallest rate, of every parameter group.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        patience: int,
        factor: float = 0.5,
        threshold: float = 0.1,
        min_lr: float = 0.0,
    ) -> None:
        if warmup_steps < 0 or patience < 0:
            raise ValueError(f"warmup_steps and patience must be >= 0, got {warmup_steps} and {patience}")
        if not 0 < factor < 1 or not 0 <= threshold < 1:
            raise ValueError(
                f"factor must lie in (0, 1) and threshold in [0, 1), got factor={factor}, threshold={threshold}"
            )
        super().__init__(optimizer, factor=factor, patience=patience, threshold=threshold, min_lr=min_lr)
        self.warmup_steps = warmup_steps
        self.full_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._warm_up()

    def step(self, metrics: Any, epoch: int | None = None) -> None:
        """Count a step with this loss, a number or a scalar tensor."""
        if self.last_epoch < self.warmup_steps:
            self.last_epoch += 1
            self._warm_up()
        else:
            super().step(metrics, epoch)

    def _warm_up(self) -> None:
        ratio = min(1.0, (self.last_epoch + 1) / max(self.warmup_steps, 1))
        for group, rate in zip(self.optimizer.param_groups, self.full_rates, strict=True):
            group["lr"] = rate * ratio
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
