"""Training of generators by Lightning: from batches to steps, logs, optimizers, sharded weights and checkpoints.

Nothing here depends on the family. What a family models, and how, is the contract of `generator.py` for tokens, and of
`latent_generator.py` for continuous latents.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Self

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from discrete_lit.accumulation import AccumulatedMean, Accumulation, check_accumulation, micro_batches_of
from discrete_lit.backbones.condition import Condition, check_parts, plain
from discrete_lit.backbones.text_transformer import TextTransformer
from discrete_lit.core.distributed import all_gather_rows, means_over_ranks, rank, world_size
from discrete_lit.core.images import ImageSize
from discrete_lit.core.lightning_internals import accumulates_gradients
from discrete_lit.core.modules import accumulate_statistics, end_statistics_step
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.metrics.binned_mean import BinnedMean
from discrete_lit.optimization import WeightDecayRule, configure_optimizers, evaluation_stage, is_trained
from discrete_lit.tokenizers.text_encoder import TextEncoder
from discrete_lit.tokenizers.tokenizer import freeze

_PROFILE_BINS = 4


class ClassConditionalTraining(LightningModule, ABC):
    """Trains, validates and predicts on batches of images, or of what their tokenizer makes of them, given a class.

    A batch is `{"image": (B, C, H, W), "label": (B,)}`, which the frozen tokenizer encodes, or holds what it would
    give, with labels of any integer type or bool; a model of one class needs none. With `"index": (B,)`, each sample's
    position in the run, label dropout and corruption belong to the sample, and do not depend on the number of ranks.

    A step of several accumulated micro-batches is that of one batch of all their samples: the loss is the mean over
    all that is predicted in them, by weight.

    It logs `train/loss` and the named terms of the loss; in validation `validation/loss`, the same in four equal bins
    of the coordinate of the losses, and what `validation_figures` makes of it; in a test the same under `test/`.

    Args:
        label_dropout: probability that a training label is replaced by the null label, for classifier-free guidance.
        optimizer: from parameters to an optimizer; needed to train.
        scheduler: from an optimizer to a scheduler, stepped after every batch.
        weight_decay_rule: which parameters the optimizer's weight decay acts on, see
            `discrete_lit.optimization.decayed_parameters`.
        seed: of corruption, orders, label dropout, and what a likelihood draws.
        text_encoder: frozen here; turns the `"caption"` of a batch into the `"context"` that a backbone with a
            `context_dim` attends to. A checkpoint carries it. With one class the labels of the data are not read.
        accumulation: of micro-batches (`trainer.accumulate_grad_batches`). `"exact"`: a step is that of one batch of
            all their samples, or refused; `"by_micro_batch"` takes the mean of their losses where it cannot be.
        text_transformer: trained with the backbone, between the text encoder and it: called with the encoder's width
            and, of `TextIds`, its number of ids. The backbone then attends to what this makes.

    Raises:
        ValueError: a probability outside [0, 1], a text_transformer without a text_encoder, or ids without one.
    """

    # A generator sets these attributes and defines these methods.
    tokenizer: Any
    backbone: Any
    image_size: ImageSize
    num_classes: int
    coordinate_name: str
    content = "tokens"
    """The name, in batches and of the arrays that `discrete-lit tokenize` makes, of what is modelled."""
    empty_text_is_null: bool = True
    """Whether an empty text is the null condition; not where a sample is given more than a class and a text."""
    reads_labels: bool = True
    """Whether the labels of data are looked at; False for a model of one class that any data will do for."""
    loss_weight: Tensor | float
    """The weight of the newest loss among the micro-batches of a step: that of all it predicts, summed over ranks."""

    gradient_scale: int = 1
    """A factor of the loss whose gradients are taken, which no log shows."""

    @abstractmethod
    def data_of(self, batch: dict[str, Any], random: CounterRandom) -> Tensor:
        """Return what is modelled of a batch, `(B, ...)`, encoded from its images where it holds nothing else."""

    @abstractmethod
    def validation_losses(self, data: Tensor, condition: Any, random: CounterRandom) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cost of each prediction, its weight, and where it stands from 0 to 1: three of one shape."""

    @abstractmethod
    def loss(
        self, data: Tensor, condition: Any, random: CounterRandom | None = None, /, *, dropped: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    @abstractmethod
    def sample(self, condition: Any, /, *, seed: int = 0, indices: Tensor | None = None) -> Tensor: ...

    def __init__(
        self,
        *,
        label_dropout: float = 0.1,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        weight_decay_rule: WeightDecayRule = "linear",
        seed: int = 0,
        text_encoder: TextEncoder | None = None,
        text_transformer: Callable[[int, int | None], TextTransformer] | None = None,
        accumulation: Accumulation = "exact",
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {label_dropout}")
        self.label_dropout = label_dropout
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.weight_decay_rule: WeightDecayRule = weight_decay_rule
        self.seed = seed
        self.text_encoder = None if text_encoder is None else freeze(text_encoder)
        if text_transformer is not None and text_encoder is None:
            raise ValueError("text_transformer reads what a text_encoder makes of captions: give that too")
        if text_transformer is None and text_encoder is not None and text_encoder.id_count is not None:
            raise ValueError(
                f"{type(text_encoder).__name__} makes ids, which a backbone cannot attend to: give a text_transformer, "
                "which embeds them"
            )
        self.text_transformer: TextTransformer | None = None
        if text_transformer is not None and text_encoder is not None:
            self.text_transformer = text_transformer(text_encoder.dim, text_encoder.id_count)
        self.profile = BinnedMean(_PROFILE_BINS)
        self.accumulation: Accumulation = accumulation
        self.accumulated = AccumulatedMean()
        self.micro_batches = 1
        self._sharded = False
        self._checks: list[Callable[[], None]] = []

    @property
    def reads_text(self) -> bool:
        """Whether it is told by texts what to draw."""
        return self.text_encoder is not None

    # Batches.

    def random_of(self, batch: dict[str, Any], batch_idx: int) -> CounterRandom:
        """Return one stream of random numbers for each sample of a batch, told apart by its `"index"`.

        Without one, as from a loader of the user's own, epoch, batch, rank and row tell samples apart: up to 2^24
        batches of 2^16 rows. Another split into ranks or batches then draws differently, and validation corrupts its
        samples in every epoch as in the first.
        """
        rows = _rows_of(batch)
        indices = batch.get("index")
        if indices is None:
            epoch = self.current_epoch if self.training else 0
            # The equal batches of the ranks follow one another.
            first = (epoch * 2**24 + batch_idx) * world_size() * 2**16 + rank() * len(rows)
            indices = first + torch.arange(len(rows), device=rows.device)
        return CounterRandom(self.seed, indices)

    def labels_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the labels `(B,)` int64 of a batch; those of a model of one class, where it has none, are 0.

        Raises:
            ValueError: a batch without labels, or labels that are no whole numbers in [0, num_classes).
        """
        if "label" in batch and self.reads_labels:
            labels = torch.as_tensor(batch["label"])
            self.check_labels(labels, names=batch.get("key", batch.get("index")), count=_count_of(batch))
            return labels.long()
        if self.num_classes == 1:
            rows = _rows_of(batch)
            return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        raise ValueError(f"a batch holds {', '.join(map(str, batch))} and no label: {self._needs_labels()}")

    def condition_of(self, batch: dict[str, Any], random: CounterRandom) -> Any:
        """Return the labels `(B,)` of a batch, or these with the grid and the vectors that the backbone reads.

        Raises:
            ValueError: no labels, a part that is missing or that the backbone does not read, or ids out of range.
        """
        labels, vocab = self.labels_of(batch), getattr(self.backbone, "grid_vocab", None)
        given = self.context_of(batch)
        self._check_part(batch, "grid", vocab, given="grid" in batch)
        if vocab is None:
            return Condition(labels=labels, **given) if given else labels
        grid = torch.as_tensor(batch["grid"]).flatten(1)
        self._check_grid(grid)
        condition = Condition(labels=labels, grid=grid, **given)
        dim = getattr(self.backbone, "context_dim", None)
        check_parts(condition, places=self.backbone.layout.positions, grid_vocab=vocab, context_dim=dim)
        return replace(condition, grid=grid.long())

    def context_of(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the vectors of a batch that the backbone attends to: `"context"` and, if they have one, its mask.

        Raises:
            ValueError: vectors, or captions to make them of, are missing, or the backbone does not read them.
        """
        given = {name: torch.as_tensor(batch[name]) for name in ("context", "context_mask") if name in batch}
        if self.text_encoder is not None and "context" not in given:
            if "caption" not in batch:
                raise ValueError(
                    f"a batch holds {', '.join(map(str, batch))} and no caption, which this {type(self).__name__} "
                    "reads: set data.init_args.captions, or make arrays of data that has it"
                )
            self._check_text_width()
            given["context"], given["context_mask"] = self.text_encoder(batch["caption"])
        dim = getattr(self.backbone, "context_dim", None)
        self._check_part(batch, "context", dim, given="context" in given)
        if not given:
            return given
        read = dim if self.text_transformer is None or self.text_encoder is None else self.text_encoder.dim
        count = len(next(iter(given.values())))
        of_all = Condition(labels=torch.zeros(count, dtype=torch.int64), **given)
        check_parts(of_all, places=0, grid_vocab=None, context_dim=read)
        if self.text_transformer is not None:
            given["context"] = self.text_transformer(given["context"], given.get("context_mask"))
        return given

    def _check_part(self, batch: dict[str, Any], name: str, size: int | None, *, given: bool) -> None:
        """Raise a ValueError where a part of a condition is missing, or where the backbone does not read it."""
        if given != (size is not None):
            setting = {"grid": "grid_vocab", "context": "context_dim"}[name]
            raise ValueError(
                f'a batch holds {", ".join(map(str, batch))}, {"with a" if size is None else "and no"} "{name}"; '
                f"backbone.init_args.{setting} of this {type(self).__name__} is {size or 'not set'}"
            )

    def condition_of_texts(
        self, texts: Sequence[str], *, labels: Tensor | None = None, negative: Sequence[str] | None = None
    ) -> Condition:
        """Make the condition of B texts, for `sample` and `draw`.

        Args:
            texts: B prompts; an empty one stands for none.
            labels: `(B,)`; by default, of a generator of one class, 0, and the null label of an empty text where that
                is the null condition.
            negative: B texts that guidance leads away from; by default from no text at all.

        Raises:
            ValueError: this generator reads no text, or a text is too long.
        """
        context, mask = self._encoded(texts)
        if labels is None:
            if self.num_classes > 1:
                raise ValueError(
                    f"this {type(self).__name__} reads {self.num_classes} classes beside texts: give labels"
                )
            # The null label stands beside no text, as it does where training dropped it.
            labels = torch.where(mask.any(dim=1) | (not self.empty_text_is_null), 0, self.num_classes)
        vectors, valid = (None, None) if negative is None else self._encoded(negative)
        return Condition(labels=labels, context=context, context_mask=mask, negative=vectors, negative_mask=valid)

    def _empty_texts(self, condition: Any) -> Tensor | None:
        """Say of which samples `(B,)` the text is empty, and with it the whole condition; None where it may not be."""
        if self.text_encoder is None or self.num_classes > 1 or not self.empty_text_is_null:
            return None
        return ~condition.valid().any(dim=1)

    def without_empty_texts(self, condition: Any) -> Any:
        """Give the condition in which the null one stands where a text is empty, as training drops it there."""
        empty = self._empty_texts(condition)
        if empty is None:
            return condition
        null_id = getattr(self.backbone, "grid_vocab", None)
        return condition.dropped(empty, null_label=self.num_classes, null_id=null_id)

    def _encoded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts for the backbone: the vectors that it attends to, and which of them are valid."""
        if self.text_encoder is None:
            raise ValueError(
                f"this {type(self).__name__} reads no text: it was trained without a text_encoder, which a backbone "
                "with a context_dim attends to"
            )
        self._check_text_width()
        vectors, valid = self.text_encoder(texts)
        return vectors if self.text_transformer is None else self.text_transformer(vectors, valid), valid

    def _check_text_width(self) -> None:
        """Raise a ValueError where the backbone does not read the vectors that are made of texts."""
        found = getattr(self.backbone, "context_dim", None)
        maker, name, dim = self.text_encoder, "text_encoder", getattr(self.text_encoder, "dim", None)
        if self.text_transformer is not None:
            maker, name, dim = self.text_transformer, "text_transformer", self.text_transformer.width
        if maker is not None and found != dim:
            raise ValueError(
                f"backbone.init_args.context_dim is {found or 'not set'}, and the {type(maker).__name__} of {name} "
                f"makes vectors of {dim}: set it to that"
            )

    def _check_grid(self, grid: Tensor) -> None:
        """Raise a ValueError for ids of a grid that are out of range, where they lie on the host."""
        vocab = getattr(self.backbone, "grid_vocab", None)
        if vocab is None or grid.device.type != "cpu" or not grid.numel():
            return
        if int(grid.min()) < 0 or int(grid.max()) >= vocab:
            raise ValueError(
                f'the "grid" of a batch has ids in [{int(grid.min())}, {int(grid.max())}], they must lie in '
                f"[0, {vocab}): backbone.init_args.grid_vocab"
            )

    def _needs_labels(self) -> str:
        return (
            f"{type(self).__name__} models {self.num_classes} classes and needs labels, which this data has not. A "
            "folder needs a subfolder per class; shards need .cls entries, and a manifest.json or data.num_classes; a "
            'DataModule of your own must give "label". Or set model.init_args.num_classes to 1: a model of no classes'
        )

    def check_labels(self, labels: Tensor, *, names: Any = None, count: int | None = None) -> None:
        """Refuse labels that are no classes of this model.

        The values of those that lie on a device are not looked at: it would wait for all that was queued before.

        Args:
            labels: `(B,)`.
            names: of the samples, for the message; by default their positions.
            count: B, where it is known otherwise; a single label would be that of every sample.

        Raises:
            ValueError: labels that are no whole numbers in [0, num_classes), or not one for each sample.
        """
        expected = f"they must be whole numbers in 0..{self.num_classes - 1}"
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or count not in (None, len(labels)):
            samples = "sample" if count is None else f"of {count} samples"
            raise ValueError(f"the labels are {labels.dtype} {tuple(labels.shape)}; {expected}, one for each {samples}")
        if labels.device.type == "cpu":
            outside = ((labels < 0) | (labels >= self.num_classes)).nonzero().flatten().tolist()
            if outside:
                name = outside[0] if names is None else names[outside[0]]
                name = int(name) if isinstance(name, Tensor) else name
                raise ValueError(
                    f"{len(outside)} of {len(labels)} labels are no classes of this {type(self).__name__}: label "
                    f"{int(labels[outside[0]])} of sample {name!r}; {expected}"
                )

    def check_draw(self, labels: Tensor, guidance_scale: float) -> None:
        """Refuse labels and guidance that this generator cannot be sampled with.

        Raises:
            ValueError: as for `draw`.
        """
        if guidance_scale != 1 and self.label_dropout == 0:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a generator that learned the null label; this one was "
                "trained with label_dropout=0"
            )
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"the labels are {labels.dtype} {tuple(labels.shape)}; they must be whole numbers in "
                f"0..{self.num_classes}, one for each sample"
            )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check labels and ids while they are on the host: on a device it would wait for all that was queued before."""
        if not isinstance(batch, dict):
            return batch
        if "grid" in batch:
            self._check_grid(torch.as_tensor(batch["grid"]))
        return {**batch, "label": self.labels_of(batch)} if "label" in batch else batch

    # Steps and what they log.

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        random = self.random_of(batch, batch_idx)
        dropped = random.uniform(Purpose.LABEL_DROPOUT, 1)[:, 0] < self.label_dropout
        condition = self.condition_of(batch, random)
        empty = self._empty_texts(condition)
        if empty is not None:
            dropped = dropped | empty
        self.micro_batches, self.loss_weight = micro_batches_of(self), 1.0
        loss, terms = self.loss(self._data_checked_later(batch, random), condition, random, dropped=dropped)
        named = {"train/loss": loss, **{f"train/{name}": term for name, term in terms.items()}}
        self.log_dict(means_over_ranks(named), batch_size=len(condition))
        scaled = loss if self.gradient_scale == 1 else loss * self.gradient_scale
        return scaled if self.micro_batches == 1 else self.accumulated.loss(scaled, self.loss_weight)

    def _data_checked_later(self, batch: dict[str, Any], random: CounterRandom) -> Tensor:
        """Return `data_of` a training batch, whose images are checked behind its backward pass: until then the host
        need not wait for the device."""
        if not is_trained(self):
            return self.data_of(batch, random)
        self._checks = self.tokenizer.late_checks = []
        try:
            return self.data_of(batch, random)
        finally:
            self.tokenizer.late_checks = None

    def on_after_backward(self) -> None:
        checks, self._checks = self._checks, []
        for check in checks:
            check()
        if self.micro_batches > 1 and not accumulates_gradients(self.trainer):
            self.accumulated.end_step(self.parameters(), self.micro_batches)
            end_statistics_step(self)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        random = self.random_of(batch, batch_idx)
        condition = self.without_empty_texts(self.condition_of(batch, random))
        values, weights, coordinate = self.validation_losses(self.data_of(batch, random), condition, random)
        self.profile.update(values, coordinate, weights)

    def on_validation_epoch_end(self) -> None:
        total, weight = self.profile.compute()
        self.profile.reset()
        mean = total.sum() / weight.sum()
        figures = {"loss": mean}
        edges = torch.linspace(0, 1, _PROFILE_BINS + 1).tolist()
        for number, (low, high) in enumerate(pairwise(edges)):
            if weight[number] > 0:
                figures[f"loss_by_{self.coordinate_name}/{low:.2f}-{high:.2f}"] = total[number] / weight[number]
        figures |= self.validation_figures(mean)
        stage = evaluation_stage(self)
        self.log_dict({f"{stage}/{name}": value.float() for name, value in figures.items()}, sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure what validation does, and log it under `test/`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def validation_figures(self, mean_loss: Tensor) -> dict[str, Tensor]:
        """Return further figures to log, by name, given the mean loss of validation, float64."""
        return {}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Sample images `(B, C, H, W)` in [-1, 1] for the labels, and the texts, of a batch, by this generator's
        seed."""
        indices = self.random_of(batch, batch_idx).indices
        told = Condition(labels=self.labels_of(batch), **self.context_of(batch))
        condition = plain(self.without_empty_texts(told))
        return self.tokenizer.decode(self.sample(condition, seed=self.seed, indices=indices))

    # Modules, optimizers and checkpoints.

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in PyTorch, but keep the tokenizer in eval mode: its codebook statistics must not move."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def configure_optimizers(self) -> Any:
        return configure_optimizers(
            self,
            self.optimizer,
            self.scheduler,
            hidden_layers=self.backbone.fsdp_units(),
            weight_decay_rule=self.weight_decay_rule,
        )

    def configure_model(self) -> None:
        """Shard the backbone over the data-parallel ranks under `ModelParallelStrategy` (FSDP2)."""
        if self.device_mesh is not None and not self._sharded:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = self.device_mesh["data_parallel"]
            of_text = [] if self.text_transformer is None else [self.text_transformer]
            for network in (*self.trained_networks(), *of_text):
                for block in network.fsdp_units():
                    fully_shard(block, mesh=mesh)
                fully_shard(network, mesh=mesh)
                for method in getattr(network, "fsdp_methods", ()):
                    register_fsdp_forward_method(network, method)
            self._sharded = True

    def trained_networks(self) -> Iterable[Any]:
        """Give the networks that are trained, which FSDP shards: here the backbone.

        Each has its `fsdp_units`, and in `fsdp_methods` the names of methods that are called in place of `forward`.
        """
        return (self.backbone,)

    def drawing_networks(self) -> Iterable[Any]:
        """Give the networks that a draw evaluates, the tokenizer's left out: here those that are trained."""
        return self.trained_networks()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe tokenizer and text encoder in the checkpoint, so that it loads without their files."""
        if self.tokenizer.hparams:
            checkpoint["tokenizer_config"] = dict(self.tokenizer.hparams)
        if self.text_encoder is not None:
            checkpoint["text_encoder_config"] = dict(self.text_encoder.hparams)

    # Checks before a run.

    def setup(self, stage: str) -> None:
        """Refuse latents for ids and the other way round, data of another image size, arrays of another tokenizer, and
        labels without a class here."""
        if stage == "fit":
            # A quantizer that it looks codes up in trains nothing.
            check_accumulation(self, self.accumulation, self.trained_networks())
            accumulate_statistics(self, micro_batches_of(self) > 1)
        # That labels are looked at before the transfer concerns nobody; a DataModule's own hook still goes first.
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")
        data = getattr(self.trainer, "datamodule", None)
        content = getattr(data, "content", None)
        if content not in (None, self.content):
            raise ValueError(
                f"data is {type(data).__name__}, which holds {content}, and {type(self).__name__} models "
                f"{self.content}: make arrays of them by `discrete-lit tokenize` with the checkpoint of "
                "model.init_args.tokenizer"
            )
        check_tokenizer = getattr(data, "check_tokenizer", None)
        if check_tokenizer is not None:
            check_tokenizer(self.tokenizer.fingerprint())
        self._check_text_width()
        check_text_encoder = getattr(data, "check_text_encoder", None)
        if check_text_encoder is not None and self.text_encoder is not None:
            check_text_encoder(self.text_encoder.fingerprint())
        # Rows of ids, TiTok's or those of several scales, do not show the size of their images.
        size = getattr(data, "image_size", None)
        if size is not None and size != self.image_size:
            raise ValueError(f"the data has images of {size} pixels, model.init_args.image_size is {self.image_size}")
        classes = getattr(data, "num_classes", None) if self.reads_labels else None
        if classes == 0 and self.num_classes > 1:
            raise ValueError(self._needs_labels())
        if classes is not None and classes > self.num_classes:
            raise ValueError(f"the data has {classes} classes, model.init_args.num_classes is {self.num_classes}")

    def on_validation_start(self) -> None:
        """Refuse uneven ranks: all gather sharded weights together, and would wait for ever for a batch more of one."""
        self._check_even(self.trainer.num_val_batches, "val")

    def on_test_start(self) -> None:
        self._check_even(self.trainer.num_test_batches, "test")

    def _check_even(self, batches: list[int | float], loop: str) -> None:
        if not self._sharded:
            return
        mine = torch.tensor([sum(batches)], device=self.device)
        counts = all_gather_rows(mine).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"the ranks have different numbers of validation batches, {counts}, and parameters are sharded: set "
                f"trainer.limit_{loop}_batches to {min(counts)} or fewer, or another data.init_args.batch_size"
            )


def _count_of(batch: dict[str, Any]) -> int | None:
    """The number of rows of tokens, latents or images in a batch, where it has any."""
    return next((len(batch[name]) for name in ("tokens", "latents", "image", "audio", "video") if name in batch), None)


def _rows_of(batch: dict[str, Any]) -> Tensor:
    """A tensor with a row for each sample of a batch."""
    return next(batch[name] for name in ("label", "tokens", "latents", "image", "audio", "video") if name in batch)
