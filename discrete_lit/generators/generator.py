"""What a generator is: an objective over the token sequences of a frozen tokenizer, around one backbone."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from discrete_lit.backbones import Backbone, SequenceLayout
from discrete_lit.core.distributed import all_gather_rows, all_reduce_sum, rank, world_size
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.metrics.binned_mean import BinnedMean
from discrete_lit.optimization import configure_optimizers
from discrete_lit.samplers import Sampler
from discrete_lit.samplers.sampler import SamplerOutput, ScaleQuantizer
from discrete_lit.tokenizers.tokenizer import Tokenizer, freeze

_PROFILE_BINS = 4


@dataclass(frozen=True)
class TokenLosses:
    """The loss of every id of a sequence, three tensors `(B, N)`."""

    values: Tensor
    """Cross-entropy in nats, float32."""
    weights: Tensor
    """What the loss averages with; 0 for tokens that were not predicted."""
    coordinate: Tensor
    """In [0, 1]: the place along which validation splits the loss."""


class Likelihood(NamedTuple):
    """Log-likelihood of images in nats, `(B,)` float64, and what it is."""

    nats: Tensor
    kind: Literal["exact", "bound", "estimate"]
    standard_error: Tensor | None = None
    """Of an estimate by drawing, `(B,)` float64; None where it is not known."""


class Generator(LightningModule, ABC):
    """Models the tokens of a frozen tokenizer, given a class.

    Takes batches `{"image": ..., "label": ...}`, which it encodes, or `{"tokens": ..., "label": ...}`; `"index"`, the
    sample's place in the run, makes label dropout and corruption independent of the number of ranks.

    Logs `train/loss`; in validation `validation/loss` and the same by `coordinate_name` in four equal bins.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML.
        image_size: side of the images in pixels.
        num_classes: labels lie in [0, num_classes).
        layout: the sequence that the family makes of a token grid.
        backbone: called with the layout.
        sampler: how `sample` draws where nothing else is asked for.
        label_dropout: share of training labels replaced by the null label, for classifier-free guidance.
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
        seed: of corruption, orders, label dropout, and what a likelihood draws.
    """

    coordinate_name: str
    """What `TokenLosses.coordinate` is."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int,
        num_classes: int,
        layout: SequenceLayout,
        backbone: Callable[[SequenceLayout], Backbone],
        sampler: Sampler,
        label_dropout: float = 0.1,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                f"num_classes must be at least 1, got {num_classes}; one class makes a model of no classes"
            )
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {label_dropout}")
        if sampler.attention != layout.attention:
            raise ValueError(
                f"{type(sampler).__name__} samples backbones with {sampler.attention} attention; "
                f"{type(self).__name__} has {layout.attention}"
            )
        self.tokenizer = freeze(tokenizer)
        self.image_size = image_size
        self.num_classes = num_classes
        self.token_shape = tokenizer.token_shape(image_size)
        self.vocab_size = tokenizer.vocab_size
        self.length = layout.length
        self.backbone = backbone(layout)
        self.sampler = sampler
        self.label_dropout = label_dropout
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.seed = seed
        self.profile = BinnedMean(_PROFILE_BINS)
        self._sharded = False

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """Ids `(B, *token_shape)` as the sequences `(B, N)` of the backbone's layout, in raster order; -1 remains."""
        return tokens.flatten(1)

    def to_grid(self, sequences: Tensor) -> Tensor:
        """The inverse of `to_sequence`."""
        return sequences.reshape(-1, *self.token_shape)

    @abstractmethod
    def token_losses(self, tokens: Tensor, labels: Tensor, random: CounterRandom) -> TokenLosses:
        """The loss of each id of sequences `tokens (B, N)` given `labels (B,)`; `random` decides the corruption."""

    @abstractmethod
    def log_likelihood(self, tokens: Tensor, labels: Tensor, indices: Tensor | None = None) -> Likelihood:
        """log p(tokens | label) in nats, and whether it is exact.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            labels: `(B,)` int64 in [0, num_classes].
            indices: `(B,)` int64, each image's place in its data set: where the value is estimated, its random numbers
                belong to it, whatever the batch; 0 to B - 1 by default.
        """

    def loss(
        self, tokens: Tensor, labels: Tensor, random: CounterRandom | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss and its named terms.

        The mean runs over the weights of all ranks together, so that the average of the ranks' gradients is the
        gradient of the joint batch.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            labels: `(B,)` int64 in [0, num_classes].
            random: decides corruption; by default row i of the batch is sample i of this generator's seed.
        """
        if random is None:
            random = CounterRandom(self.seed, torch.arange(len(tokens), device=tokens.device))
        losses = self.token_losses(self.to_sequence(tokens), labels, random)
        mean_weight = all_reduce_sum(losses.weights.sum()) / world_size()
        return (losses.values * losses.weights).sum() / mean_weight, {}

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        sampler: Sampler | None = None,
        seed: int = 0,
        indices: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw the tokens of one image for each label.

        Args:
            labels: `(B,)` int64 in [0, num_classes]; `num_classes` is the null label.
            sampler: this generator's own by default.
            seed: with `indices`, it alone decides the draw, whatever the batch.
            indices: `(B,)` int64, each sample's index among all that are drawn; 0 to B - 1 by default.
            known: `(B, *token_shape)` int64, tokens to keep and -1 where one is to be drawn.

        Returns:
            `(B, *token_shape)` int64 in [0, K).
        """
        if indices is None:
            indices = torch.arange(len(labels), device=labels.device)
        return self.draw(labels, CounterRandom(seed, indices), sampler, known).tokens

    @torch.no_grad()
    def draw(
        self,
        labels: Tensor,
        random: CounterRandom,
        sampler: Sampler | None = None,
        known: Tensor | None = None,
        trace: bool = False,
    ) -> SamplerOutput:
        """As `sample`, with what it cost.

        Args:
            labels: `(B,)` int64 in [0, num_classes].
            random: one stream for each image.
            sampler: this generator's own by default.
            known: `(B, *token_shape)` int64, tokens to keep and -1 where one is to be drawn.
            trace: also give what every step did, in the order of the sequence.

        Returns:
            The sampler's output, its tokens `(B, *token_shape)`.

        Raises:
            ValueError: guidance, and a null label that was not learned; what the sampler refuses.
        """
        kept = None if known is None else self.to_sequence(known)
        draw = sampler or self.sampler
        if draw.guidance_scale != 1 and self.label_dropout == 0:
            raise ValueError(
                f"guidance_scale={draw.guidance_scale} needs a generator that learned the null label; this one was "
                "trained with label_dropout=0"
            )
        output = draw(self.sampled_backbone(), labels, random, kept, self.scale_quantizer(), self.denoiser(), trace)
        return replace(output, tokens=self.to_grid(output.tokens))

    def sampled_backbone(self) -> Backbone:
        """What samplers are given."""
        return self.backbone

    def scale_quantizer(self) -> ScaleQuantizer | None:
        """What makes a block-causal backbone's input while sampling."""
        return None

    def denoiser(self) -> Denoiser | None:
        """What samplers of diffusion need to know of the backbone, if it learned to undo noise."""
        return None

    def tokens_of(self, batch: dict[str, Any]) -> Tensor:
        """The ids `(B, *token_shape)` of a batch, encoded from its images where it holds no tokens.

        Raises:
            ValueError: a grid other than `token_shape`.
        """
        if "tokens" in batch:
            tokens = batch["tokens"]
        else:
            with torch.no_grad():
                tokens = self.tokenizer.encode(batch["image"])
        if tuple(tokens.shape[1:]) != self.token_shape:
            raise ValueError(
                f"the batch has token grids {tuple(tokens.shape[1:])}, this generator models {self.token_shape}: "
                f"model.init_args.image_size is {self.image_size}"
            )
        return tokens

    def train(self, mode: bool = True) -> Self:
        """As in PyTorch, but the tokenizer stays in eval mode: its codebook statistics must not move."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        random = self._random(batch, batch_idx)
        dropped = random.uniform(Purpose.LABEL_DROPOUT, 1)[:, 0] < self.label_dropout
        labels = batch["label"].masked_fill(dropped, self.num_classes)
        loss, terms = self.loss(self.tokens_of(batch), labels, random)
        named = {"train/loss": loss, **{f"train/{name}": term for name, term in terms.items()}}
        self.log_dict(named, sync_dist=True, batch_size=len(labels))
        return loss

    def on_validation_start(self) -> None:
        if self._sharded:
            self._check_equal_batches()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        sequences = self.to_sequence(self.tokens_of(batch))
        losses = self.token_losses(sequences, batch["label"], self._random(batch, batch_idx))
        self.profile.update(losses.values, losses.coordinate, losses.weights)

    def on_validation_epoch_end(self) -> None:
        total, weight = self.profile.compute()
        self.profile.reset()
        values = {"validation/loss": (total.sum() / weight.sum()).float()}
        edges = torch.linspace(0, 1, _PROFILE_BINS + 1).tolist()
        for place, (low, high) in enumerate(pairwise(edges)):
            if weight[place] > 0:
                values[f"validation/loss_by_{self.coordinate_name}/{low:.2f}-{high:.2f}"] = (
                    total[place] / weight[place]
                ).float()
        self.log_dict(values, sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] sampled for the labels of a batch, seeded by this generator's seed."""
        return self.tokenizer.decode(
            self.sample(batch["label"], seed=self.seed, indices=self._random(batch, batch_idx).indices)
        )

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer, self.scheduler)

    def configure_model(self) -> None:
        """Shard the backbone over the data-parallel ranks under `ModelParallelStrategy` (FSDP2)."""
        if self.device_mesh is not None and not self._sharded:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for block in self.backbone.fsdp_units():
                fully_shard(block, mesh=mesh)
            fully_shard(self.backbone, mesh=mesh)
            self._sharded = True

    def setup(self, stage: str) -> None:
        self._check_data()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.tokenizer.hparams:
            checkpoint["tokenizer_config"] = dict(self.tokenizer.hparams)

    def _random(self, batch: dict[str, Any], batch_idx: int) -> CounterRandom:
        labels = batch["label"]
        indices = batch.get("index")
        if indices is None:
            # A loader of the user's own: unique for every epoch, batch, rank and row, though another split into ranks
            # or batches draws differently; the ranks' equal batches follow one another. Up to 2^24 batches of 2^16
            # rows; validation repeats its masks every epoch.
            epoch = self.current_epoch if self.training else 0
            first = (epoch * 2**24 + batch_idx) * world_size() * 2**16 + rank() * len(labels)
            indices = first + torch.arange(len(labels), device=labels.device)
        return CounterRandom(self.seed, indices)

    def _check_equal_batches(self) -> None:
        """All ranks gather sharded parameters together: one with a validation batch more would wait for ever."""
        mine = torch.tensor([sum(self.trainer.num_val_batches)], device=self.device)
        counts = all_gather_rows(mine).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"the ranks have different numbers of validation batches, {counts}, and parameters are sharded: set "
                f"trainer.limit_val_batches to {min(counts)} or fewer, or another data.init_args.batch_size"
            )

    def _check_data(self) -> None:
        """Refuse token arrays of another tokenizer, and labels that this generator has no class for."""
        data = getattr(self.trainer, "datamodule", None)
        check_tokenizer = getattr(data, "check_tokenizer", None)
        if check_tokenizer is not None:
            check_tokenizer(self.tokenizer.fingerprint())
        classes = getattr(data, "num_classes", None)
        if classes is not None and classes > self.num_classes:
            raise ValueError(f"the data has {classes} classes, model.init_args.num_classes is {self.num_classes}")
