"""One transformer over text and image: each is drawn given the other, from one sequence that holds both.

The sequence is made of segments (`discrete_lit.backbones.segments`), and the published models are settings of one:

- Chameleon (Team Chameleon, "Mixed-Modal Early-Fusion Foundation Models", 2024): ids of a discrete tokenizer, one
  vocabulary, text and image in either order.
- Emu3 (Wang et al., "Next-Token Prediction is All You Need", 2024): `image_format="rows"`, the size in front of the
  image, and the end of a row behind each.
- Janus (Wu et al., "Decoupling Visual Encoding", 2024): the backbone's `own_embeddings` and `own_heads`;
  `null_text="padding"`; a `vision` encoder reads the images that are to be described.
- Transfusion (Zhou et al., "Predict the Next Token and Diffuse Images with One Multi-Modal Model", 2024): a continuous
  tokenizer; its latents are an island that sees itself both ways, and is drawn by flow matching.
- Show-o (Xie et al., "One Single Transformer to Unify Multimodal Understanding and Generation", 2024):
  `image_prediction="masked"`, ids that see each other, and are predicted where they stand, from masks.
- VAR's images (Tian et al., "Visual Autoregressive Modeling", 2024) behind a text: `image_prediction="scales"`, the ids
  of a scale all at once, given the scales before it.

With `thought_length` the model writes a text between the caption and the image before it draws: "2+3", then "5", then
the picture. A thought can be read, edited, and given.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from discrete_lit.backbones.segment_sequence import SegmentPart, SegmentSequence, assemble, pack
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.segments import PositionCount, SegmentLayout
from discrete_lit.backbones.vision_encoder import VisionEncoder
from discrete_lit.core.images import ImageSize, normal_size
from discrete_lit.core.modules import OfWholeBatch, at_least_float32, in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, random_subset, streams_of
from discrete_lit.diffusion import CosineSchedule, MaskSchedule
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.gaussian_losses import DenoisingLoss, TrainingTimes
from discrete_lit.generators.continuous_masked import Patches
from discrete_lit.generators.generator import Likelihood
from discrete_lit.generators.next_scale import scale_quantizer_of
from discrete_lit.generators.published_layout import Vocabulary, published_layout
from discrete_lit.generators.segment_losses import (
    SegmentLosses,
    SoftmaxOver,
    id_losses,
    island_columns,
    masked_losses,
    scale_losses,
)
from discrete_lit.generators.text_and_image import CaptionIds, split_thoughts, text_and_image_layout
from discrete_lit.generators.text_and_image_sequences import NullText, TextAndImageSequences
from discrete_lit.metrics.binned_mean import BinnedMean
from discrete_lit.optimization import evaluation_stage
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.samplers.segment_by_segment import SegmentSampler
from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer
from discrete_lit.tokenizers.text_tokenizer import TextTokenizer
from discrete_lit.tokenizers.tokenizer import ContinuousTokenizer, Tokenizer, freeze

_DESCRIBING = ("given_image", "caption")
"""The segments of sequences in which an image is described, where they are of a kind of their own (Show-o)."""
_THOUGHT = 1
"""The stream of random numbers that thoughts are drawn by: a picture is the same after its thought, given or drawn."""


@dataclass(frozen=True, kw_only=True)
class UnifiedOutput(SamplerOutput):
    """Images that were drawn, as their ids or latents, what they cost, and the thoughts that they follow."""

    thoughts: CaptionIds | None = None
    """The thoughts of a model that has them, given or drawn."""


class Unified(TextAndImageSequences, OfWholeBatch):
    """Model the sequence of a caption and an image, or of an image and its caption, one element after another.

    A batch is `{"image": (B, C, H, W), "caption": ...}`, which the frozen tokenizer encodes, or has its ids,
    `"tokens": (B, *token_shape)`, or its latents, `"latents": (B, D, H, W)`. The captions are B strings, or ids of the
    text tokenizer `(B, L)` with `"caption_length": (B,)`.

    The loss of ids is the mean of their cross-entropies, by the weights of their segments. The loss of latents is the
    squared error of flow matching, the mean over images, times `image_weight`, and is added to it (Transfusion, eq. 4),
    as is the mean cross-entropy of masked ids (Show-o, eq. 5), or of ids in scales. Each segment's is logged as
    `loss_of/<segment>`.

    Args:
        tokenizer: frozen here; of ids, or a continuous one.
        image_size: of the images in pixels: the side of a square, or `[height, width]`.
        text_tokenizer: makes ids of captions; a checkpoint carries it.
        text_length: the most ids of a caption, its begin and end among them.
        backbone: called with the layout.
        order: `"both"`: the caption first, or the image, as each sample has it, so that each is drawn given the other;
            `"text_first"`: the caption first always.
        image_first: probability that training puts the image first, of order `"both"`.
        image_format: of ids: `"plain"`, begin, ids, end; or `"rows"` as Emu3, with the size in front and an end of each
            row.
        image_attention: of latents: whether they see each other both ways (Transfusion) or those before (JanusFlow).
        image_prediction: of ids: `"next"`, one after another; `"masked"`, several at once (Show-o), where an image in
            front of its caption has no masks; or `"scales"`, of a tokenizer of scales such as `MultiScaleVQ`, one scale
            after another (VAR).
        mask_schedule: the law of the share that training masks of an image, m(t) at a uniform t, of `"masked"`
            prediction; the cosine by default.
        positions: how elements are counted, see `SegmentLayout`.
        layout: in the place of the one that these settings make: a text segment `"text"`, then an `"image"`.
        vocabulary: where ids stand in the vocabulary of a published model; by default those of the text come first.
        vision: reads the images that `caption` describes, in the place of their ids, of a vocabulary with `features`.
            Its part of the model is loaded, not trained.
        softmax_over: in training: `"allowed"`, the ids that may stand in the place, which sampling draws from; or
            `"vocabulary"`, all (Chameleon).
        text_weight: of the ids of text in the mean.
        image_weight: of those of the image; or of the mean error of its latents (Transfusion has 5), of its masked
            ids, or of those in scales.
        z_loss: weight of the mean squared logarithm of the softmax's denominator (Chameleon has 1e-5).
        null_text: what a dropped caption is: `"empty"`, or `"padding"` of its length (Janus).
        packed_length: elements of rows into which training packs samples; each has its row by default.
        patch_size: side of the squares of latents that are one vector.
        denoiser: how the network's prediction of vectors is read; by default the velocity on straight lines.
        times: how times of training are drawn; uniformly by default.
        caption_noise: the largest time of latents in front of the caption that they are to explain (Transfusion: 0.5).
        thought_length: the most ids of a thought, its begin and end among them, of order `"text_first"`; None for no
            thoughts.
        thought_separator: a caption of a batch is what is asked, this, and the thought: `"2+3=5"`.
        thought_weight: of the ids of thoughts in the mean.
        sampler: how `sample`, `think` and `caption` draw where nothing else is asked for.
        training: `label_dropout`, here the probability that a caption in front of its image is dropped; `optimizer`,
            `scheduler`, `weight_decay_rule` and `seed` of `ClassConditionalTraining`.

    Raises:
        ValueError: a setting out of its range, or that this kind of tokenizer has no use for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | ContinuousTokenizer,
        image_size: ImageSize,
        *,
        text_tokenizer: TextTokenizer,
        text_length: int,
        backbone: Callable[[SegmentLayout], SegmentTransformer],
        order: Literal["both", "text_first"] = "both",
        image_first: float = 0.5,
        image_format: Literal["plain", "rows"] = "plain",
        image_attention: Literal["bidirectional", "causal"] = "bidirectional",
        image_prediction: Literal["next", "masked", "scales"] = "next",
        mask_schedule: MaskSchedule | None = None,
        positions: PositionCount = "sequence",
        layout: SegmentLayout | None = None,
        vocabulary: Vocabulary | None = None,
        vision: VisionEncoder | None = None,
        softmax_over: SoftmaxOver = "allowed",
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        z_loss: float = 0.0,
        null_text: NullText = "empty",
        packed_length: int | None = None,
        patch_size: int = 1,
        denoiser: GaussianDenoiser | None = None,
        times: TrainingTimes | None = None,
        caption_noise: float = 0.5,
        thought_length: int | None = None,
        thought_separator: str = "=",
        thought_weight: float = 1.0,
        sampler: SegmentSampler | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        _check_settings(
            {
                "order": order,
                "image_format": image_format,
                "image_prediction": image_prediction,
                "softmax_over": softmax_over,
                "null_text": null_text,
            },
            lengths={"text_length": text_length, "thought_length": thought_length},
            image_first=image_first,
            caption_noise=caption_noise,
            z_loss=z_loss,
        )
        self.text = text_tokenizer
        self.tokenizer = freeze(tokenizer)
        self.image_size = normal_size(image_size)
        self.order, self.image_first = order, image_first if order == "both" else 0.0
        self.text_length, self.thought_length = text_length, thought_length
        self.thought_separator = thought_separator
        self.softmax_over: SoftmaxOver = softmax_over
        self.null_text: NullText = null_text
        self.z_loss = z_loss
        self.image_weight = image_weight
        self.caption_noise = caption_noise
        self.patches: Patches | None = None
        if isinstance(tokenizer, ContinuousTokenizer):
            if image_format != "plain" or image_prediction != "next" or layout is not None or vocabulary is not None:
                raise ValueError(
                    "image_format, image_prediction, layout and vocabulary are of a tokenizer of ids, this one is "
                    "continuous"
                )
            self.content = "latents"
            self.latent_shape = tuple(tokenizer.latent_shape(image_size))
            self.patches = Patches(self.latent_shape, patch_size)
        else:
            if patch_size != 1:
                raise ValueError(f"patch_size={patch_size} is of latents, this tokenizer makes ids")
            self.token_shape = tuple(tokenizer.token_shape(image_size))
        scales = None
        if image_prediction == "scales":
            scales = scale_quantizer_of(tokenizer, reader="image_prediction='scales'")
        if vocabulary is not None:
            layout = published_layout(
                vocabulary,
                self.text,
                text_length=self.text_length,
                grid=self.token_shape,
                codes=tokenizer.vocab_size,  # type: ignore[union-attr]
                interleaved=order == "both",
                rows=image_format == "rows",
                weights=(text_weight, image_weight),
            )
        features = None if vocabulary is None else vocabulary.features
        if features != (None if vision is None else (vision.places, vision.width)):
            raise ValueError(f"vision makes the features of a vocabulary, {features}: give both alike, or neither")
        self.vision = None if vision is None else vision.eval().requires_grad_(False)
        self.layout = layout or text_and_image_layout(
            self.text,
            self.text_length,
            grid=self.patches.grid if self.patches is not None else self.token_shape,
            codes=None if self.patches is not None else tokenizer.vocab_size,  # type: ignore[union-attr]
            dim=scales.dim if scales is not None else None if self.patches is None else self.patches.dim,
            scales=() if scales is None else tuple(scales.lengths),
            interleaved=order == "both",
            rows=image_format == "rows",
            attention=image_attention,
            positions=positions,
            text_weight=text_weight,
            image_weight=image_weight,
            thought_length=thought_length,
            thought_weight=thought_weight,
            masked=image_prediction == "masked",
        )
        expected = ("text", "image") if thought_length is None else ("text", "thought", "image")
        names = tuple(segment.name for segment in self.layout.segments)
        # Beside them, what stands in the place of an image that is described, or a sequence of its own for that.
        if names not in (expected, (*expected, "features"), (*expected, *_DESCRIBING)):
            raise ValueError(f"the layout of this Unified has the segments {', '.join(expected)} in this order")
        self.image = self.layout["image"]
        if (image_prediction == "masked") != (self.image.mask_id is not None):
            raise ValueError(
                "image_prediction='masked' goes with a layout whose image has a mask_id, and with no other"
            )
        if (scales is not None) != (self.image.codes is not None):
            raise ValueError("image_prediction='scales' goes with a layout whose image has codes, and with no other")
        if mask_schedule is not None and self.image.mask_id is None:
            raise ValueError("mask_schedule is of image_prediction='masked'")
        self.mask_schedule = mask_schedule or CosineSchedule()
        self.apart = self.patches is not None or self.image.mask_id is not None or scales is not None
        self.packed_length = packed_length
        if packed_length is not None and packed_length < self.layout.length:
            raise ValueError(
                f"packed_length={packed_length} is shorter than the longest sample, of {self.layout.length} elements"
            )
        self.build_network(backbone, sampler)
        self.denoiser = denoiser or GaussianDenoiser(RectifiedPath(), prediction="velocity")
        self.objective = DenoisingLoss(self.denoiser, times=times)
        self.segment_means = nn.ModuleDict({segment.name: BinnedMean(1) for segment in self.layout.segments})
        self.register_buffer("codes", torch.tensor(list(self.image.ids), dtype=torch.int64), persistent=False)

    @property
    def scale_quantizer(self) -> MultiScaleResidualQuantizer | None:
        return None if self.image.codes is None else scale_quantizer_of(self.tokenizer)

    @property
    def island_weight(self) -> float:
        return self.image_weight

    def frozen_networks(self) -> Iterable[nn.Module]:
        return () if self.vision is None else (self.vision,)

    # Batches.

    def data_of(self, batch: dict[str, Any], random: CounterRandom) -> Tensor:
        """Return the ids `(B, *token_shape)` or the latents `(B, D, H, W)` of a batch.

        Raises:
            ValueError: neither, nor images to encode; or of another shape.
        """
        name = "tokens" if self.patches is None else "latents"
        if name in batch:
            data = batch[name]
        elif "image" in batch:
            with torch.no_grad():
                data = self.tokenizer.encode(batch["image"], *(() if self.patches is None else (random,)))
        else:
            raise ValueError(f'a batch holds {", ".join(map(str, batch))}: Unified needs "image" or "{name}"')
        self.check_data(data)
        return data if self.patches is None else at_least_float32(data)

    def condition_of(self, batch: dict[str, Any], random: CounterRandom) -> CaptionIds:
        """Return the captions of a batch.

        Raises:
            ValueError: a batch without, as many as there are images, or one that is too long.
        """
        given, lengths = self.texts_in(batch), batch.get("caption_length")
        if isinstance(given, Tensor) and lengths is None:
            raise ValueError('the "caption" of a batch is ids: give "caption_length" (B,) too')
        if self.thought_length is None:
            captions = self.captions_of(given, lengths)
        elif isinstance(given, Tensor):
            raise ValueError(
                'the "caption" of a batch is ids, and a model with thoughts reads texts, which it takes apart at '
                f"{self.thought_separator!r}"
            )
        else:
            asked, thoughts = split_thoughts(given, self.thought_separator)
            captions = self.captions_of(asked, thoughts=thoughts)
        rows = next(batch[name] for name in ("tokens", "latents", "image") if name in batch)
        if len(captions) != len(rows):
            raise ValueError(f"a batch has {len(rows)} images and {len(captions)} captions")
        return captions

    # The loss.

    def whole_batch_terms(self) -> list[str]:
        return ["two means, of the ids of captions and of images (image_weight)"] if self.apart else []

    def segment_losses(
        self, data: Tensor, condition: CaptionIds, random: CounterRandom, *, dropped: Tensor | None = None
    ) -> dict[str, SegmentLosses]:
        """Cost the prediction of a batch, by segment.

        Args:
            data: ids `(B, *token_shape)`, or latents `(B, D, H, W)`.
            condition: the captions.
            random: decides the order, masks, times and noise.
            dropped: bool `(B,)`, the samples whose caption is dropped where it stands in front of the image.
        """
        self.check_data(data)
        captions, count, device = condition, len(data), data.device
        first = torch.zeros(count, dtype=torch.bool, device=device)
        if self.order == "both":
            first = random.uniform(Purpose.ORDER, 1)[:, 0] < self.image_first
        closed: Tensor | bool = True
        if dropped is not None:
            dropped = dropped & ~first
            captions = self.dropped(captions, dropped)
            # Behind the image of a dropped caption stands no end: else an image in front would have no caption.
            closed = ~dropped
        read, flow, masked = data, None, None
        if self.patches is not None:
            flow = self._noised(data, first, random)
            read = self.patches.join(flow.x_t)
        elif self.image.mask_id is not None:
            masked = self._masked(first, random)
        sequence = self.sequences(
            read,
            captions,
            image_first=first if self.order == "both" else None,
            times=None if flow is None else flow.t,
            masked=masked,
            closed=closed if self.order == "both" else True,
        )
        if self.packed_length is not None and self.training:
            sequence = pack(sequence, self.packed_length, padding=self.grammar.done)
        hidden = self.backbone(sequence)
        losses = id_losses(self.backbone, sequence, hidden, softmax_over=self.softmax_over, silent=dropped)
        if flow is not None:
            losses["image"] = self._flow_losses(hidden, sequence, flow)
        if masked is not None:
            ids = self.codes[data.flatten(1)]
            losses["image"] = masked_losses(
                self.backbone,
                sequence,
                hidden,
                name="image",
                ids=ids,
                masked=masked,
                softmax_over=self.softmax_over,
            )
        if self.image.codes is not None:
            values, _ = scale_losses(self.backbone, sequence, hidden, name="image", ids=data.flatten(1))
            losses["image"] = SegmentLosses(values.flatten(), torch.ones_like(values.flatten()), None)
        self.step_passes = (self.shape_of(sequence, losses),)
        return losses

    def _masked(self, image_first: Tensor, random: CounterRandom) -> Tensor:
        """Choose the ids `(B, P)` of images that are masked, one at least; none in front of a caption."""
        share = self.mask_schedule.mask_probability(random.uniform(Purpose.MASK_RATIO, 1))
        counts = (self.image.positions * share).round().clamp(min=1).masked_fill(image_first[:, None], 0)
        return random_subset(random.uniform(Purpose.MASK_ORDER, self.image.positions), counts)

    def _noised(self, data: Tensor, image_first: Tensor, random: CounterRandom) -> "_Flow":
        assert self.patches is not None
        vectors = self.patches.cut(at_least_float32(data))
        t = self.objective.times(random.uniform(Purpose.DIFFUSION_TIME, 1)[:, 0])
        t = torch.where(image_first, t * self.caption_noise, t)
        noise = random.normal(Purpose.DIFFUSION_NOISE, vectors[0].numel()).view_as(vectors).to(vectors.dtype)
        return _Flow(vectors, noise, self.denoiser.path.add_noise(vectors, noise, t), t)

    def _flow_losses(self, hidden: Tensor, sequence: SegmentSequence, flow: "_Flow") -> SegmentLosses:
        rows, columns, owner = island_columns(self.backbone, sequence, "image")
        output = self.backbone.predict_vectors(hidden[rows, columns], segment="image")
        terms = self.objective(
            at_least_float32(output), flow.data[owner], flow.noise[owner], x_t=flow.x_t[owner], t=flow.t[owner]
        )
        values = torch.stack(list(terms.values())).sum(dim=0)
        return SegmentLosses(values, torch.ones_like(values), None)

    # Validation.

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        random = self.random_of(batch, batch_idx)
        losses = self.segment_losses(self.data_of(batch, random), self.condition_of(batch, random), random)
        for name, each in losses.items():
            mean: Any = self.segment_means[name]
            mean.update(each.values, torch.zeros_like(each.values), torch.ones_like(each.values))

    def on_validation_epoch_end(self) -> None:
        """Log the loss as training weighs it, and that of each segment."""
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for name, mean in self.segment_means.items():
            total, weight = mean.compute()  # type: ignore[operator]
            mean.reset()  # type: ignore[operator]
            if float(weight) > 0:
                sums[name] = total.sum(), weight.sum()
        apart = {"image"} if self.apart else set()
        weights = {name: self.layout[name].loss_weight for name in sums if name not in apart}
        total, count = (
            torch.stack([weight * sums[name][part] for name, weight in weights.items()]).sum() for part in (0, 1)
        )
        loss = total / count.clamp(min=torch.finfo(count.dtype).tiny)
        for name in apart & sums.keys():
            loss = loss + self.image_weight * sums[name][0] / sums[name][1]
        figures = {"loss": loss, **{f"loss_of/{name}": total / weight for name, (total, weight) in sums.items()}}
        stage = evaluation_stage(self)
        self.log_dict({f"{stage}/{name}": value.float() for name, value in figures.items()}, sync_dist=True)

    # The likelihood.

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(
        self, data: Tensor, captions: CaptionIds, *, of: Literal["image", "text"] = "image"
    ) -> Likelihood:
        """Give log p of the ids of the images given the captions, or of the captions given the images, exact.

        It is of the law that `sample` and `caption` draw from without filters and guidance.

        Args:
            data: ids `(B, *token_shape)`, or latents, which are given as they are.
            captions: of the images.
            of: which of them.

        Raises:
            ValueError: the likelihood of latents or of masked ids, or of a caption that stands in front of its image.
        """
        if of not in ("image", "text") or (of == "image" and self.apart and self.image.codes is None):
            raise ValueError(
                f"of={of!r}: a likelihood is of 'image', where it has ids that are predicted one after another, or "
                "scale by scale, or of 'text'"
            )
        if of == "text" and self.order != "both":
            raise ValueError("of='text' needs order='both': here the caption stands in front of the image")
        self.check_data(data)
        first = torch.full((len(data),), of == "text", device=data.device)
        sequence = self.sequences(data, captions, image_first=first if self.order == "both" else None)
        hidden = self.backbone(sequence)
        if of == "image" and self.image.codes is not None:
            values, owner = scale_losses(self.backbone, sequence, hidden, name=of, ids=data.flatten(1))
            nats = torch.zeros(len(data), dtype=torch.float64, device=data.device)
            return Likelihood(nats.index_add(0, owner, -values.double().sum(dim=1)), "exact")
        forbidden = self.grammar.forbidden_events((of,)) if of == "text" else None
        return Likelihood(self.nats_of((of,), sequence, hidden=hidden, forbidden=forbidden), "exact")

    # Sampling.

    @torch.no_grad()
    def think(
        self,
        condition: CaptionIds,
        sampler: SegmentSampler | None = None,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
    ) -> list[str]:
        """Draw the thought behind each caption, which `sample` with the same arguments draws before the image.

        `captions_of(texts, thoughts=...)` takes it, or an edited one, in place of what the model would write.

        Args:
            condition, sampler, seed, indices: as of `sample`.

        Raises:
            ValueError: a model without thoughts, or guidance of them.
        """
        random = streams_of(condition, seed=seed, indices=indices)
        return self.texts_of(self._thought_of(condition, random, sampler)[0])

    def _thought_of(
        self, condition: CaptionIds, random: CounterRandom, sampler: SegmentSampler | None
    ) -> tuple[CaptionIds, SamplerOutput]:
        """Draw thoughts; what is given with the condition is not looked at."""
        sampler = sampler or self.sampler
        if self.thought_length is None:
            raise ValueError(f"this {type(self).__name__} has no thoughts: it was trained without a thought_length")
        if sampler.contexts(("thought",)) > 1:
            raise ValueError("thoughts are drawn without guidance: a dropped caption has none")
        prompt = self.sequences(None, replace(condition, thoughts=None), closed=False)
        drawn = sampler(self.backbone, [prompt], random, segments=("thought",), stream=_THOUGHT)
        return self.text_in(drawn.sequence, "thought"), drawn.costing(drawn.sequence.ids)

    def draw(
        self, condition: CaptionIds, random: CounterRandom, sampler: SegmentSampler | None = None
    ) -> UnifiedOutput:
        """Draw images as `sample` does, and report what they cost, and their thoughts."""
        sampler = sampler or self.sampler
        contexts = self.contexts_of(sampler, ("image",))
        thinking = None
        if self.thought_length is not None and condition.thoughts is None:
            thoughts, thinking = self._thought_of(condition, random, sampler)
            condition = replace(condition, thoughts=thoughts)
        null = self.null_captions(condition)
        if condition.negative is not None:
            null = replace(condition.negative, thoughts=null.thoughts)
        begun = "image" if self.order == "both" else None
        drawn = sampler(
            self.backbone,
            [self.sequences(None, captions, closed=False, begun=begun) for captions in (condition, null)[:contexts]],
            random,
            segments=("image",),
            denoiser=self.denoiser,
            quantizer=self.scale_quantizer,
        )
        in_scales = drawn.codes.get("image")
        images = self.images_of(drawn.sequence) if in_scales is None else in_scales.view(-1, *self.token_shape)
        return UnifiedOutput(**vars(drawn.costing(images, before=thinking)), thoughts=condition.thoughts)

    @torch.no_grad()
    def caption(
        self,
        data: Tensor,
        sampler: SegmentSampler | None = None,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
    ) -> list[str]:
        """Draw a text for each image.

        Args:
            data: ids `(B, *token_shape)`, or latents `(B, D, H, W)`; of a model with `vision`, the images.
            sampler, seed, indices: as of `sample`.

        Raises:
            ValueError: a generator of order `"text_first"`, or guidance, which no training prepared.
        """
        if not self.describes:
            raise ValueError("texts are drawn by generators of order='both': here the caption stands in front")
        sampler = sampler or self.sampler
        segment = "text" if self.order == "both" else _DESCRIBING[1]
        if sampler.contexts((segment,)) > 1:
            raise ValueError("captions are drawn without guidance: training never leaves out their image")
        random = streams_of(data, seed=seed, indices=indices)
        drawn = sampler(self.backbone, [self.given_image(data)], random, segments=(segment,)).sequence
        return self.texts_of(self.text_in(drawn, segment))

    @property
    def describes(self) -> bool:
        """Whether `caption` draws texts."""
        return self.order == "both" or _DESCRIBING[1] in (segment.name for segment in self.layout.segments)

    def given_image(self, data: Tensor) -> SegmentSequence:
        """Begin the sequences of given images, behind which a text follows; `data` as of `caption`."""
        if self.vision is not None:
            return assemble(self.grammar, [SegmentPart(segment="features", content=self.vision(data))], closed=False)
        self.check_data(data)
        if self.order != "both":
            given = SegmentPart(segment=_DESCRIBING[0], content=self.codes[data.flatten(1)])
            return assemble(self.grammar, [given])
        return self.sequences(data, None, closed=False)


class _Flow(NamedTuple):
    """The vectors of a batch's images, and their noise."""

    data: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor


def _check_settings(
    choices: Mapping[str, str],
    *,
    lengths: Mapping[str, int | None],
    image_first: float,
    caption_noise: float,
    z_loss: float,
) -> None:
    accepted = {
        "order": ("both", "text_first"),
        "image_format": ("plain", "rows"),
        "image_prediction": ("next", "masked", "scales"),
        "softmax_over": ("allowed", "vocabulary"),
        "null_text": ("empty", "padding"),
    }
    for name, given in choices.items():
        if given not in accepted[name]:
            raise ValueError(f"{name} must be one of {', '.join(accepted[name])}, got {given!r}")
    for name, length in lengths.items():
        if length is not None and length < 3:
            raise ValueError(f"{name}={length} leaves no room for a text beside its begin and end")
    if not 0 <= image_first <= 1 or not 0 <= caption_noise <= 1 or z_loss < 0:
        raise ValueError(
            "image_first and caption_noise must lie in [0, 1], and z_loss be at least 0, got "
            f"{image_first}, {caption_noise} and {z_loss}"
        )
