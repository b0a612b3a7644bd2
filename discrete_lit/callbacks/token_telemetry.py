"""Per-token losses, entropies and attention maps of fixed samples, as pictures in TensorBoard or W&B."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from discrete_lit.callbacks.image_grids import as_in_validation
from discrete_lit.callbacks.logged_media import log_picture
from discrete_lit.core.images import displayable, to_uint8
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import Generator, SuperResolution, Unified
from discrete_lit.generators.token_predictions import (
    TokenPredictions,
    attention_layers,
    attention_of,
    largest_nats,
    map_shapes,
    predictions_of,
    predicts_ids,
)

# Viridis at nine places: it rises evenly in brightness, so that it is read in grey and by colour-blind eyes too.
_COLOURS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    dtype=np.float64,
)
_NOT_PREDICTED = (200, 200, 200)
_QUERY = (230, 60, 30)
_SIDE = 112  # pixels of a map's longer side at least
_HEADER, _GAP = 28, 4
_BINS = 4


class TokenTelemetry(Callback):
    """Log what a generator of ids thinks of each token of the same few images, every some optimizer steps.

    The images are the first ones of the first batch that the run sees: of validation where the run begins with a sanity
    check (`num_sanity_val_steps`), else of training. They go into the checkpoint, so that a resumed run shows the same.
    Masks and noise are the same each time too. The network is the one that is trained, in eval mode and under the
    trainer's precision, not its average. It logs to TensorBoard or W&B

    - `telemetry/loss_and_entropy`: beside each image, -log p of each id and the entropy of the predicted distribution,
      both from 0 to the log K of a guess; grey where the id was read, not predicted. Bit groups of an id add up.
      Next-scale models have a map for each scale. Ids that are predicted in sub-tokens have no entropy here.
    - `telemetry/attention/layer_<i>`: how strongly the prediction of a position (framed) attends to the others, each
      map over its own maximum.

    and to every logger the means `telemetry/loss`, `telemetry/entropy`, and `telemetry/loss_by_<coordinate>/<bin>`: by
    quarter of the position, the mask ratio or the time, or by scale.

    Training is not changed: modes and random states are put back, no gradient is recorded, compiled code is not
    touched. Rank 0 works alone. Where the weights are sharded (FSDP) every rank makes the passes, and rank 0 writes;
    attention is then logged as long as the blocks are sharded one by one, as `ModelParallelStrategy` does.

    Args:
        every_n_steps: optimizer steps from one record to the next.
        count: images.
        layers: numbers of blocks whose attention is shown, from 0; the last one by default, `[]` for none.
        heads: numbers of heads, whose mean is shown; all by default.
        queries: positions whose predictions are looked at, in raster order; of next-scale models scale after scale. By
            default the one at a quarter, the middle and three quarters.

    Raises:
        ValueError: a setting below its least value; when the run begins, a layer, head or position that is not there.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        count: int = 4,
        *,
        layers: list[int] | None = None,
        heads: list[int] | None = None,
        queries: list[int] | None = None,
    ) -> None:
        if every_n_steps < 1 or count < 1:
            raise ValueError(f"every_n_steps and count must be at least 1, got {every_n_steps} and {count}")
        for name, given in (("layers", layers), ("heads", heads), ("queries", queries)):
            if given is not None and (len(set(given)) < len(given) or any(number < 0 for number in given)):
                raise ValueError(f"{name} must be different numbers from 0 on, got {given}")
        if heads == [] or queries == []:
            raise ValueError("heads and queries need a number each; layers=[] shows no attention")
        self.every_n_steps, self.count = every_n_steps, count
        self.layers, self.heads, self.queries = layers, heads, queries
        self._samples: dict[str, Any] | None = None
        self._last_step = -1

    # The samples.

    def state_dict(self) -> dict[str, Any]:
        return {} if self._samples is None else {"samples": self._samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._samples = state_dict.get("samples", self._samples)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not predicts_ids(pl_module):
            warnings.warn(
                f"TokenTelemetry shows predictions of ids, of which a {type(pl_module).__name__} makes none: nothing "
                "is logged",
                stacklevel=2,
            )
            return
        assert isinstance(pl_module, Generator | Unified)
        self._check(pl_module)

    def _check(self, module: Generator | Unified) -> None:
        known = attention_layers(module)
        positions = sum(height * width for height, width in map_shapes(module))
        if self.layers and not known:
            raise ValueError(
                f"layers={self.layers}: attention is shown of a Transformer or of Unified, and this backbone is a "
                f"{type(module.backbone).__name__} that it is not known for; layers=[] shows none"
            )
        heads = next((attention.heads for attention in known.values()), None)
        limits = {"layers": (self.layers, len(known)), "queries": (self.queries, positions)}
        if heads is not None:
            limits["heads"] = (self.heads, heads)
        for name, (given, limit) in limits.items():
            if given and max(given) >= limit:
                raise ValueError(f"{name}={given}, accepted: numbers from 0 to {limit - 1}")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            self._keep(trainer, pl_module, batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._keep(trainer, pl_module, batch)

    def _keep(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Keep the first samples of the first batch, as ids and with all that they are given."""
        if self._samples is not None or not self._takes_part(trainer, module):
            return
        assert isinstance(module, Generator | Unified)
        rows = {name: value[: self.count] for name, value in batch.items() if hasattr(value, "__getitem__")}
        with as_in_validation(trainer, module):
            tokens = module.data_of(rows, module.random_of(rows, 0))
        if not isinstance(module, SuperResolution):  # which is also given the small image of each
            rows.pop("image", None)
        rows["tokens"] = tokens
        self._samples = {
            name: value.detach().cpu().clone() if isinstance(value, Tensor) else value for name, value in rows.items()
        }

    def _takes_part(self, trainer: Trainer, module: LightningModule) -> bool:
        return predicts_ids(module) and (trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy))

    # The record.

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step in (0, self._last_step) or not self._takes_part(trainer, pl_module):
            return
        assert isinstance(pl_module, Generator | Unified)
        self._last_step = step
        with as_in_validation(trainer, pl_module):
            scalars, pictures = self.record(pl_module)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step)
        for tag, picture in pictures.items():
            log_picture(trainer, tag, picture)

    def record(self, module: Generator | Unified) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Make the scalars, and the pictures `(H, W, 3)` uint8, of the samples that were kept, by tag."""
        assert self._samples is not None, "a batch comes before the first record"
        device = module.device
        batch = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in self._samples.items()}
        tokens = batch["tokens"]
        # The same masks and noise at every record, whatever else the run has drawn.
        random = CounterRandom(module.seed, torch.arange(len(tokens), device=device))
        condition: Any = module.condition_of(batch, random)
        predictions = predictions_of(module, tokens, condition, random)
        shown = None
        if module.tokenizer.makes_images:
            shown = to_uint8(displayable(module.tokenizer.decode(tokens))).movedim(1, -1).cpu().numpy()
        pictures = {"telemetry/loss_and_entropy": self._loss_and_entropy(module, predictions, shown)}
        known = list(attention_layers(module))
        layers = known[-1:] if self.layers is None else self.layers
        if layers:
            queries = self._queries(module)
            weights = attention_of(module, tokens, condition, random, layers=layers, queries=queries)
            for layer, of_heads in weights.items():
                mean = of_heads[:, self.heads or slice(None)].mean(dim=1)  # (B, Q, P)
                pictures[f"telemetry/attention/layer_{layer}"] = _attention(module, mean, queries, shown)
        return _means(module, predictions), pictures

    def _queries(self, module: Generator | Unified) -> list[int]:
        if self.queries is not None:
            return self.queries
        (height, width), before = map_shapes(module)[-1], 0
        before = sum(h * w for h, w in map_shapes(module)[:-1])
        places = [(height // 4, width // 4), (height // 2, width // 2), (3 * height // 4, 3 * width // 4)]
        return list(dict.fromkeys(before + row * width + column for row, column in places))

    @staticmethod
    def _loss_and_entropy(
        module: Generator | Unified, predictions: TokenPredictions, shown: np.ndarray | None
    ) -> np.ndarray:
        most = largest_nats(module)
        columns: list[tuple[str, list[np.ndarray]]] = []
        for name, values in (("loss", predictions.nats), ("entropy", predictions.entropy)):
            if values is None:
                continue
            titles = _titles(module, f"{name}, 0 to {most:.2f} nats")
            maps = _maps(module, values.float() / most)
            known = _maps(module, predictions.predicted.float())
            for title, each, predicted in zip(titles, maps, known, strict=True):
                columns.append((title, [_coloured(*pair) for pair in zip(each, predicted, strict=True)]))
        return _panel(columns, shown)


def _means(module: Generator | Unified, predictions: TokenPredictions) -> dict[str, float]:
    """Average over the positions that are predicted: all, and by quarter of the coordinate, or by scale."""
    predicted, coordinate = predictions.predicted, predictions.coordinate
    nats = predictions.nats.double()
    means = {"telemetry/loss": float(nats[predicted].mean())}
    if predictions.entropy is not None:
        means["telemetry/entropy"] = float(predictions.entropy.double()[predicted].mean())
    shapes = map_shapes(module)
    bins = len(shapes) if len(shapes) > 1 else _BINS
    number = (coordinate * bins).long().clamp(0, bins - 1)
    for each in range(bins):
        inside = predicted & (number == each)
        if bool(inside.any()):
            means[f"telemetry/loss_by_{module.coordinate_name}/{each}"] = float(nats[inside].mean())
    return means


# Pictures.


def _titles(module: Generator | Unified, title: str) -> list[str]:
    shapes = map_shapes(module)
    if len(shapes) == 1:
        return [title]
    return [title if not number else f"{h} x {w}" for number, (h, w) in enumerate(shapes)]


def _maps(module: Generator | Unified, values: Tensor) -> list[np.ndarray]:
    """Lay values `(B, P)` out as maps `(B, h, w)`, one for each scale where there are scales."""
    shapes = map_shapes(module)
    parts = values.split([height * width for height, width in shapes], dim=1)
    return [part.unflatten(1, shape).cpu().numpy() for part, shape in zip(parts, shapes, strict=True)]


def _coloured(values: np.ndarray, predicted: np.ndarray | None = None) -> np.ndarray:
    """Colour a map `(h, w)` of values in [0, 1]: `(h, w, 3)` uint8; grey where nothing was predicted."""
    places = values.clip(0, 1) * (len(_COLOURS) - 1)
    channels = [np.interp(places, np.arange(len(_COLOURS)), _COLOURS[:, channel]) for channel in range(3)]
    colours = np.stack(channels, axis=-1).round().astype(np.uint8)
    if predicted is not None:
        colours[predicted == 0] = _NOT_PREDICTED
    return colours


def _attention(
    module: Generator | Unified, weights: Tensor, queries: Sequence[int], shown: np.ndarray | None
) -> np.ndarray:
    """Draw weights `(B, Q, P)`: a row for each image, a map for each query and scale, each over its own maximum."""
    columns: list[tuple[str, list[np.ndarray]]] = []
    shapes = map_shapes(module)
    starts = np.cumsum([0, *(height * width for height, width in shapes)])
    for column, query in enumerate(queries):
        of_query = weights[:, column].float()
        largest = of_query.max(dim=1, keepdim=True).values.clamp(min=torch.finfo(of_query.dtype).tiny)
        # At the beginning of a causal sequence no position is seen, but the class alone.
        share = float(of_query.sum(dim=1).mean())
        for number, each in enumerate(_maps(module, of_query / largest)):
            height, width = shapes[number]
            at = query - int(starts[number])
            inside = 0 <= at < height * width
            title = f"from {divmod(at, width)}: {share:.0%} on ids" if inside else f"{height} x {width}"
            framed = divmod(at, width) if inside else None
            columns.append((title, [_framed(_coloured(one), framed) for one in each]))
    return _panel(columns, shown)


def _framed(picture: np.ndarray, cell: tuple[int, int] | None) -> np.ndarray:
    """Enlarge a map so that its cells have eight pixels, and frame one of them."""
    enlarged = picture.repeat(8, axis=0).repeat(8, axis=1)
    if cell is not None:
        top, left = 8 * cell[0], 8 * cell[1]
        enlarged[top : top + 8, [left, left + 7]] = _QUERY
        enlarged[[top, top + 7], left : left + 8] = _QUERY
    return enlarged


def _panel(columns: Sequence[tuple[str, list[np.ndarray]]], shown: np.ndarray | None) -> np.ndarray:
    """Put maps beside the images that they are of, with titles above: `(H, W, 3)` uint8.

    Args:
        columns: title and one map for each image.
        shown: the images `(B, h, w, C)` uint8; None where the ids make none.
    """
    if shown is not None:
        pictures = [
            np.asarray(Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each).convert("RGB"))
            for each in shown
        ]
        columns = [("decoded ids", pictures), *columns]
    largest = max(columns, key=lambda column: column[1][0].shape[0] * column[1][0].shape[1])[1][0]
    height, width = shown.shape[1:3] if shown is not None else largest.shape[:2]
    times = max(1, -(-_SIDE // max(height, width)))
    cell = (width * times, height * times)
    font = ImageFont.load_default()
    bar = _coloured(np.linspace(0, 1, cell[0])[None].repeat(6, axis=0))
    count = len(columns[0][1])
    size = (len(columns) * (cell[0] + _GAP) - _GAP, _HEADER + count * (cell[1] + _GAP) - _GAP)
    panel = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(panel)
    for number, (title, maps) in enumerate(columns):
        left = number * (cell[0] + _GAP)
        draw.text((left + 1, 1), title, fill="black", font=font)
        if number or shown is None:
            panel.paste(Image.fromarray(bar), (left, _HEADER - 9))
        for row, each in enumerate(maps):
            picture = Image.fromarray(each).resize(cell, Image.Resampling.NEAREST)
            panel.paste(picture, (left, _HEADER + row * (cell[1] + _GAP)))
    return np.asarray(panel)
