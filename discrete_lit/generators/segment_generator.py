"""Generators over sequences of segments, as of text and image: what they all do, whatever the segments are.

A sequence has texts in it, so that its condition is a part of itself. A family says which segments there are, makes
sequences of a batch, costs their elements by segment (`segment_losses`), and draws some of them behind others (`draw`).
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from discrete_lit.backbones.segment_grammar import SegmentGrammar
from discrete_lit.backbones.segment_sequence import SegmentSequence
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.segments import SegmentLayout
from discrete_lit.checkpoints import loadable
from discrete_lit.core.random import CounterRandom, streams_of
from discrete_lit.generators.segment_losses import SegmentLosses, SoftmaxOver, id_losses, mean_loss, without_prior
from discrete_lit.generators.training import ClassConditionalTraining
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.samplers.segment_by_segment import SegmentSampler
from discrete_lit.tokenizers.text_tokenizer import TextTokenizer


class PassShape(NamedTuple):
    """The size of one pass of the network in a training step: what it reads and what it predicts."""

    rows: int
    elements: int
    """The elements of each row, padding among them."""
    vectors: bool
    """Whether there are vectors among them."""
    outputs: int
    """Numbers that are predicted, in all rows: logits, and channels of vectors."""


@loadable
class SegmentGenerator(ClassConditionalTraining):
    """Model the segments of a sequence, one element after another, by one transformer over all of them.

    The loss of ids is the mean of their cross-entropies, by the weights of their segments. Where a segment is `apart`,
    the mean of its own losses, times `island_weight`, is added to that. Each segment's is logged as
    `loss_of/<segment>`.

    Args:
        training: `label_dropout`, here the probability that a text is dropped, and the other settings of
            `ClassConditionalTraining`.

    Raises:
        ValueError: a text encoder, whose vectors no segment is made of.
    """

    reads_labels = False
    num_classes = 1
    sampler_kind = SegmentSampler
    coordinate_name = "position"

    # A family sets these attributes; those behind `layout` by `build_network`.
    text: TextTokenizer
    text_length: int
    softmax_over: SoftmaxOver
    layout: SegmentLayout
    backbone: SegmentTransformer
    grammar: SegmentGrammar
    sampler: SegmentSampler
    z_loss: float = 0.0
    """Weight of the mean squared logarithm of the softmax's denominator."""
    apart: bool = False
    """Whether there is a segment whose losses have a mean of their own: latents, masked ids, or ids in scales."""
    step_passes: Sequence[PassShape] = ()
    """The shapes of the passes of the last step."""

    def __init__(self, **training: Any) -> None:
        super().__init__(**training)
        if self.text_encoder is not None:
            raise ValueError("text_encoder makes vectors to attend to; this generator reads captions as ids")

    def build_network(
        self, backbone: Callable[[SegmentLayout], SegmentTransformer], sampler: SegmentSampler | None
    ) -> None:
        """Build the network over the layout, and keep the sampler that draws from it where no other is asked for."""
        self.backbone = backbone(self.layout)
        self.grammar = self.backbone.grammar
        self.sampler = sampler or SegmentSampler()

    def frozen_networks(self) -> Iterable[nn.Module]:
        """Give the networks beside the tokenizer that are loaded, not trained: here none."""
        return ()

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in PyTorch, but keep the tokenizer and all frozen networks in eval mode."""
        super().train(mode)
        for network in self.frozen_networks():
            network.eval()
        return self

    @property
    def reads_text(self) -> bool:
        """Captions stand in the sequence itself."""
        return True

    @property
    def island_weight(self) -> float:
        """The weight of the mean of the segment that is `apart`."""
        return 1.0

    # Batches and sequences.

    def texts_in(self, batch: dict[str, Any]) -> Any:
        """Return the captions of a batch, as it holds them.

        Raises:
            ValueError: there are none.
        """
        if "caption" not in batch:
            raise ValueError(
                f'a batch holds {", ".join(map(str, batch))} and no "caption": {type(self).__name__} models sequences '
                "with their texts"
            )
        return batch["caption"]

    def _inside(self, sequence: SegmentSequence, segment: str) -> Tensor:
        """`(B, N)` bool: the elements at the positions of a segment."""
        grammar = self.grammar
        return (grammar.place_of[sequence.states] >= 0) & (
            grammar.segment_of[sequence.states] == self.layout.number(segment)
        )

    # The loss.

    @abstractmethod
    def segment_losses(
        self, data: Any, condition: Any, random: CounterRandom, *, dropped: Tensor | None = None
    ) -> dict[str, SegmentLosses]:
        """Cost the prediction of a batch, by segment; arguments as of `loss`."""

    def loss(
        self, data: Any, condition: Any, random: CounterRandom | None = None, *, dropped: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Average the losses of a batch, over all ranks together.

        Args:
            data: what `data_of` gives.
            condition: the texts, as `condition_of` gives them.
            random: decides what training leaves to chance, such as the order of segments, times and noise; by default
                row i of the batch is sample i of this generator's seed.
            dropped: bool `(B,)`, the samples whose text is dropped where it stands in front.

        Returns:
            The training loss, a scalar, and its terms: `loss_of/<segment>`, and `z_loss` where it has a weight.
        """
        if random is None:
            random = streams_of(data, seed=self.seed)
        losses = self.segment_losses(data, condition, random, dropped=dropped)
        total, terms, weight = mean_loss(losses, island_weight=self.island_weight, z_loss=self.z_loss)
        # Two means by two weights, whose ratio changes with the texts, are no mean by one.
        self.loss_weight = float(len(data)) if self.apart else weight
        return total, terms

    def shape_of(self, sequence: SegmentSequence, losses: Mapping[str, SegmentLosses]) -> PassShape:
        """Say how much a pass over a sequence read, and what it predicted for these losses."""
        rows, elements = sequence.ids.shape
        outputs = sum(self._outputs(name, each) for name, each in losses.items())
        return PassShape(rows, elements, bool(sequence.vectors), outputs)

    def _outputs(self, name: str, losses: SegmentLosses) -> int:
        """Count the logits of a segment's losses, or the channels of its vectors."""
        segment, each = self.layout[name], len(losses.values)
        if segment.codes is not None:
            return each * segment.codes
        if segment.input_dim is not None:
            return each * segment.positions * segment.input_dim
        return each * (self.backbone.shared_ids if self.softmax_over == "vocabulary" else len(segment.allowed_ids))

    def step_flops(self) -> int:
        """Count the floating-point operations of the transformer in the last training step, forward and backward.

        At all elements that it read, padding among them, and of what it predicted. How images were encoded before is
        not counted.
        """
        total = 0
        for rows, elements, vectors, outputs in self.step_passes:
            blocks = self.backbone.flops(elements, elements)
            # Most of what comes in needs no gradient.
            before = self.backbone.input_flops(elements, vectors)
            total += rows * (3 * blocks + 2 * before) + 6 * self.backbone.width * outputs
        return total

    def validation_losses(self, data: Any, condition: Any, random: CounterRandom) -> tuple[Tensor, Tensor, Tensor]:
        return without_prior(self.segment_losses(data, condition, random))

    # The likelihood.

    def nats_of(
        self,
        segments: Collection[str],
        sequence: SegmentSequence,
        *,
        hidden: Tensor,
        forbidden: Tensor | None = None,
    ) -> Tensor:
        """Sum log p of the ids of some segments for each sample, of the law that samplers draw from: `(B,)` float64.

        Args:
            segments: their names.
            sequence: of B samples, each in a row of its own.
            hidden: `(B, N, D)`, what the network makes of it.
            forbidden: events that may not happen, as of `id_losses`.
        """
        owners: list[tuple[str, Tensor]] = []
        losses = id_losses(
            self.backbone,
            sequence,
            hidden,
            softmax_over="allowed",
            segments=segments,
            forbidden=forbidden,
            owners=owners,
        )
        nats = torch.zeros(len(sequence), dtype=torch.float64, device=hidden.device)
        for name, each in losses.items():
            owner = torch.cat([owner for owned, owner in owners if owned == name])
            nats = nats.index_add(0, owner, -each.values.double())
        return nats

    # Sampling.

    @abstractmethod
    def draw(self, condition: Any, random: CounterRandom, sampler: SegmentSampler | None = None) -> SamplerOutput:
        """Draw as `sample` does, and report what it cost."""

    @torch.no_grad()
    def sample(
        self,
        condition: Any,
        sampler: SegmentSampler | None = None,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Draw what follows each text.

        Args:
            condition: the texts, as `condition_of_texts` makes them.
            sampler: this generator's own by default.
            seed: with `indices`, it alone decides the draw, whatever the batch.
            indices: `(B,)` int64, each sample's index among all that are drawn; 0 to B - 1 by default.

        Returns:
            `(B, *token_shape)` int64 in [0, K), or latents `(B, D, H, W)`; `tokenizer.decode` makes images of them.

        Raises:
            ValueError: guidance of a model that never learned to do without a text.
        """
        return self.draw(condition, streams_of(condition, seed=seed, indices=indices), sampler).tokens

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Sample images, or clips, in [-1, 1] for the texts of a batch, by this generator's seed."""
        random = self.random_of(batch, batch_idx)
        texts = self.condition_of(batch, random)
        return self.tokenizer.decode(self.sample(texts, seed=self.seed, indices=random.indices))

    def contexts_of(self, sampler: SegmentSampler, segments: Sequence[str]) -> int:
        """Count what the network is asked given where these segments are drawn: a text; and none, for guidance.

        Raises:
            ValueError: guidance that training did not prepare, or by an image.
        """
        contexts = sampler.contexts(segments)
        if contexts > 1 and self.label_dropout == 0:
            raise ValueError(
                "guidance needs a generator that learned to do without captions; this one was trained with "
                "label_dropout=0"
            )
        if contexts > 2:
            raise ValueError("image_guidance_scale guides by an image that is given beside the text; here is none")
        return contexts

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe both tokenizers in the checkpoint, so that it loads without their files."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["text_tokenizer_config"] = self.text.config()
