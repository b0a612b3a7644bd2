"""Generators: objectives over token sequences around one backbone. Here is the contract that every family keeps.

A generator models the tokens x of a frozen tokenizer given a class y; where its backbone reads more than a class, given
a `Condition`, which is accepted wherever labels are. A family says

- which sequence it makes of a grid of tokens: its `SequenceLayout`, `to_sequence` and `to_grid`;
- what it costs to predict each token: `token_losses`, which corrupts a sequence and scores what the backbone predicts;
- how likely an image is: `log_likelihood`;
- which of the samplers draws from it unless another is asked for: `sampler`.

`loss`, `sample` and `draw` follow from these. `training.py` has the steps, logs and checks of Lightning.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones import Backbone, SequenceLayout
from discrete_lit.backbones.condition import Condition, as_condition, plain
from discrete_lit.checkpoints import load, loadable
from discrete_lit.core.distributed import all_reduce_sum, world_size
from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.random import CounterRandom, Purpose, random_subset, streams_of
from discrete_lit.diffusion.parameterization import Denoiser
from discrete_lit.generators.training import ClassConditionalTraining
from discrete_lit.samplers import Sampler
from discrete_lit.samplers.sampler import SamplerOutput, ScaleQuantizer
from discrete_lit.tokenizers.tokenizer import Tokenizer, freeze


class TokenLosses(NamedTuple):
    """The loss of every token of a batch of sequences: three tensors `(B, N)`."""

    values: Tensor
    """The cost of each token in nats, float32 or better."""
    weights: Tensor
    """The weight of each token in the mean; 0 for tokens that were not predicted."""
    coordinate: Tensor
    """Where the prediction stands on a scale from 0 to 1: the fraction of its image that was masked, the time of its
    noise, or how far along the sequence it is, as `coordinate_name` says. Validation logs the loss of each quarter."""


class Likelihood(NamedTuple):
    """The log-likelihood of images, and what kind of number it is."""

    nats: Tensor
    """log p(tokens | label) of each image, `(B,)` float64."""
    kind: Literal["exact", "bound", "estimate"]
    """Whether `nats` is log p itself, a lower bound of it (or an unbiased estimate of one), or an estimate of it."""
    standard_error: Tensor | None = None
    """The error of nats that were estimated by drawing, `(B,)` float64; None where it is not known."""


@loadable
class Generator(ClassConditionalTraining):
    """Models the tokens of a frozen tokenizer, given a class.

    A batch is `{"image": (B, C, H, W), "label": (B,)}`, which the tokenizer encodes, or `{"tokens": (B, *token_shape),
    "label": (B,)}`; the mean loss is that of a token. For a backbone with a `grid_vocab` it also has a `"grid"` of ids,
    aligned with the positions of the tokens, `(B, *token_shape)` or `(B, positions)`; for one with a `context_dim` a
    `"context"` of vectors to attend to, `(B, M, E)`, and a `"context_mask": (B, M)` of the valid ones unless all are.
    Label dropout drops all of it together. With a `text_encoder` the vectors are made of the batch's `"caption"`.

    Args:
        tokenizer: frozen here; `discrete_lit.tokenizers.from_checkpoint` in a YAML.
        image_size: of the images in pixels: the side of a square, or `[height, width]`.
        num_classes: labels lie in [0, num_classes); `num_classes` itself is the null label.
        layout: the sequence that the family makes of a token grid.
        backbone: called with the layout.
        sampler: how `sample` draws where nothing else is asked for.
        gradient_of: whose loss the gradients are of, in nats: the mean of a `"token"`, or the sum of a `"sequence"`, N
            times as much (SEDD). Adam takes the same steps with both, but for clipping, which sees gradients N times as
            large, and its epsilon. What is logged is a token's.
        training: `label_dropout`, `optimizer`, `scheduler`, `weight_decay_rule`, `seed` and `text_encoder` of
            `ClassConditionalTraining`.

    Raises:
        ValueError: no classes, gradients of anything else, or a sampler of backbones with another attention.
    """

    sampler_kind = Sampler
    """The class of the samplers that draw from this generator."""
    coordinate_name: str
    """The name of what `TokenLosses.coordinate` measures: mask_ratio, time, position or scale."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: ImageSize,
        *,
        num_classes: int,
        layout: SequenceLayout,
        backbone: Callable[[SequenceLayout], Backbone],
        sampler: Sampler,
        gradient_of: Literal["token", "sequence"] = "token",
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if gradient_of not in ("token", "sequence"):
            raise ValueError(f"gradient_of={gradient_of!r} is not known, accepted: token, sequence")
        if num_classes < 1:
            raise ValueError(
                f"num_classes must be at least 1, got {num_classes}; one class makes a model of no classes"
            )
        if sampler.attention != layout.attention:
            raise ValueError(
                f"{type(sampler).__name__} samples backbones with {sampler.attention} attention; "
                f"{type(self).__name__} has {layout.attention}"
            )
        self.tokenizer = freeze(tokenizer)
        self.image_size = normal_size(image_size)
        self.num_classes = num_classes
        self.reads_labels = num_classes > 1 or self.text_encoder is None
        self.token_shape = tokenizer.token_shape(image_size)
        self.vocab_size = tokenizer.vocab_size
        self.length = layout.length
        self.gradient_scale = 1 if gradient_of == "token" else layout.length
        self.backbone = backbone(layout)
        self.sampler = sampler

    # Batches.

    def tokens_of(self, batch: dict[str, Any]) -> Tensor:
        """Return the ids `(B, *token_shape)` of a batch, encoded from its images where it holds no tokens.

        Raises:
            ValueError: a batch without either, latents in place of ids, or a grid other than `token_shape`.
        """
        if "tokens" in batch:
            tokens = batch["tokens"]
        elif (coded := self.tokenizer.modality) in batch:
            with torch.no_grad():
                tokens = self.tokenizer.encode(batch[coded])
        else:
            raise ValueError(
                f'a batch holds {", ".join(map(str, batch))}: {type(self).__name__} needs "{coded}" or "tokens"; '
                "latents are for the generators of latents, as ContinuousMasked"
            )
        if tokens.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} models ids, integers in [0, {self.vocab_size}), got {tokens.dtype} "
                f"{tuple(tokens.shape)}: are these the latents of a continuous tokenizer?"
            )
        if tuple(tokens.shape[1:]) != self.token_shape:
            raise ValueError(
                f"the batch has token grids {tuple(tokens.shape[1:])}, this generator models {self.token_shape}: "
                f"model.init_args.image_size is {self.image_size}"
            )
        return tokens

    def data_of(self, batch: dict[str, Any], random: CounterRandom) -> Tensor:
        return self.tokens_of(batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        random = self.random_of(batch, batch_idx)
        condition = self.without_empty_texts(self.condition_of(batch, random))
        return self.tokenizer.decode(self.sample(condition, seed=self.seed, indices=random.indices))

    # The sequence.

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """Lay out token grids as sequences of the backbone's layout: here, in raster order.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K), or -1 where a token is not known, which stays -1.

        Returns:
            `(B, N)` int64.
        """
        return tokens.flatten(1)

    def to_grid(self, sequences: Tensor) -> Tensor:
        """Invert `to_sequence`: `(B, N)` to `(B, *token_shape)`."""
        return sequences.reshape(-1, *self.token_shape)

    # The loss.

    @abstractmethod
    def token_losses(self, tokens: Tensor, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        """Cost the prediction of each token: for training in training mode, and in eval mode for validation.

        Args:
            tokens: `(B, N)` int64, sequences as `to_sequence` makes them.
            condition: labels `(B,)` int64 in [0, num_classes], or these with what else the backbone reads.
            random: one stream for each sequence; it alone decides the corruption.
        """

    def loss(
        self,
        tokens: Tensor,
        condition: Condition | Tensor,
        random: CounterRandom | None = None,
        *,
        dropped: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Average the token losses of a batch, by their weights, over all ranks together.

        So the mean over ranks of their gradients is the gradient of the joint batch.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            condition: labels `(B,)`, integers in [0, num_classes), or these with what else the backbone reads.
            random: decides the corruption; by default row i of the batch is sample i of this generator's seed.
            dropped: bool `(B,)`, the samples whose condition the null one stands for; none by default.

        Returns:
            The training loss, a scalar, and further terms to log, by name.

        Raises:
            ValueError: a label that is no class; the null label is one that was `dropped`.
        """
        if random is None:
            random = streams_of(tokens, seed=self.seed)
        condition = as_condition(condition)
        self.check_labels(condition.labels, count=len(tokens))
        condition = replace(condition, labels=condition.labels.long())
        if dropped is not None:
            condition = condition.dropped(dropped, null_label=self.num_classes, null_id=self.backbone.grid_vocab)
        losses = self.losses_of(tokens, plain(condition), random)
        mean_weight = all_reduce_sum(losses.weights.sum().detach()) / world_size()
        self.loss_weight = mean_weight
        return (losses.values * losses.weights).sum() / mean_weight, {}

    def losses_of(self, data: Any, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        """Cost the prediction of each token of what `data_of` returned."""
        return self.token_losses(self.to_sequence(data), condition, random)

    def validation_losses(self, data: Tensor, condition: Condition | Tensor, random: CounterRandom) -> TokenLosses:
        return self.losses_of(data, condition, random)

    # The likelihood.

    @abstractmethod
    def log_likelihood(
        self, tokens: Tensor, condition: Condition | Tensor, *, indices: Tensor | None = None
    ) -> Likelihood:
        """Give log p(tokens | condition) in nats, and say whether it is exact.

        Args:
            tokens: `(B, *token_shape)` int64 in [0, K).
            condition: labels `(B,)` int64 in [0, num_classes], or all that the backbone reads.
            indices: `(B,)` int64, each image's position in its data set. Where the value is estimated, its random
                numbers belong to the index, whatever the batch; 0 to B - 1 by default.
        """

    # Sampling.

    @torch.no_grad()
    def sample(
        self,
        condition: Condition | Tensor,
        sampler: Sampler | None = None,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw the tokens of one image for each label.

        Args:
            condition: labels `(B,)` int64 in [0, num_classes], of which `num_classes` is the null label, or these with
                what else the backbone reads.
            sampler: this generator's own by default.
            seed: with `indices`, it alone decides the draw, whatever the batch.
            indices: `(B,)` int64, each sample's index among all that are drawn; 0 to B - 1 by default.
            known: `(B, *token_shape)` int64, tokens to keep and -1 where one is to be drawn.

        Returns:
            `(B, *token_shape)` int64 in [0, K).

        Raises:
            ValueError: the reasons of `draw`.
        """
        random = streams_of(as_condition(condition).labels.reshape(-1), seed=seed, indices=indices)
        return self.draw(condition, random, sampler, known=known).tokens

    @torch.no_grad()
    def draw(
        self,
        condition: Condition | Tensor,
        random: CounterRandom,
        sampler: Sampler | None = None,
        *,
        known: Tensor | None = None,
        trace: bool = False,
    ) -> SamplerOutput:
        """Draw as `sample` does, and report what it cost.

        Args:
            condition: labels `(B,)` int64 in [0, num_classes], or all that the backbone reads.
            random: one stream for each image.
            sampler: this generator's own by default.
            known: `(B, *token_shape)` int64, tokens to keep and -1 where one is to be drawn.
            trace: also return what every step did, in the order of the sequence.

        Returns:
            The sampler's output, its tokens `(B, *token_shape)`.

        Raises:
            ValueError: guidance was asked for and the null label was never learned, or the sampler refuses its input.
        """
        sampler = sampler or self.sampler
        condition = as_condition(condition)
        self.check_draw(condition.labels, sampler.guidance_scale)
        output = sampler(
            self.sampled_backbone(),
            plain(replace(condition, labels=condition.labels.long())),
            random,
            known=None if known is None else self.to_sequence(known),
            quantizer=self.scale_quantizer(),
            denoiser=self.denoiser(),
            trace=trace,
        )
        return output.with_tokens(self.to_grid(output.tokens))

    def read_tokenizer(self) -> None:
        """Copy what the backbone reads of the tokenizer, whose weights have changed: nothing, unless a family says."""

    def sampled_backbone(self) -> Backbone:
        """Give samplers the backbone, in this generator's own order where it has one."""
        return self.backbone

    def denoiser(self) -> Denoiser | None:
        """Tell samplers of diffusion what the backbone predicts; None for a backbone that did not learn to denoise."""
        return None

    def scale_quantizer(self) -> ScaleQuantizer | None:
        """Give the sampler of scales the quantizer that makes a scale's input; None for sequences without scales."""
        return None


def generator_from_checkpoint(checkpoint: str) -> Generator:
    """Load the frozen generator of a checkpoint, which another one is built on: the `discrete` of `DisCon`.

    Raises:
        ValueError: the file is missing, broken, or holds no Generator.
    """
    generator = load(checkpoint)
    if not isinstance(generator, Generator):
        raise ValueError(
            f"discrete.checkpoint={checkpoint!r} holds a {type(generator).__name__}, not a Generator of discrete tokens"
        )
    return generator.eval().requires_grad_(False)


def cross_entropies(logits: Tensor, tokens: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return -log p of each token in nats, `(B, N)`, given `logits (B, N, K)` and `tokens (B, N)`."""
    rows = rearrange(logits, "b n k -> (b n) k")
    values = F.cross_entropy(rows, tokens.flatten(), reduction="none", label_smoothing=label_smoothing)
    return values.view_as(tokens)


def subsets_of_all_sizes(random: CounterRandom, length: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw masked positions for a bound of log p over all orders: k of them, uniform in 1 ... N, chosen uniformly.

    The sizes of the evaluations are stratified: each lies in a part of 1 ... N of its own.

    Args:
        random: one stream for each sequence.
        length: N.
        count: evaluations.

    Yields:
        The positions `(B, N)` bool, and k `(B, 1)` float64.
    """
    shift = random.uniform(Purpose.LIKELIHOOD, 1)
    for evaluation in range(count):
        k = (((shift + evaluation / count) % 1) * length).floor() + 1
        yield random_subset(random.uniform(Purpose.LIKELIHOOD, length, evaluation + 1), k), k


def check_permutation(order: Iterable[int], length: int) -> None:
    """Raise a ValueError unless an order has each of the positions 0 to `length` - 1 once."""
    if sorted(order) != list(range(length)):
        raise ValueError(f"order must have each of the {length} positions 0 to {length - 1} once")
