"""Draws of several samplers, step by step, as one HTML page: `discrete-lit watch`.

A `Watched` is one panel of the page: a generator, its sampler and, of a hybrid, the diffusion decoder behind it.
`draw_panel` runs it with a trace and keeps of every step the ids, what changed, the confidence, what was spent and the
decoded image; `write_page` puts panels and the exact toy into the template `watch.html` beside this file.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.files import atomic_write_text
from discrete_lit.core.images import displayable, to_uint8
from discrete_lit.core.random import CounterRandom
from discrete_lit.evaluation.favoured_colours import FavouredColours, FavouredColoursBackbone, total_variations
from discrete_lit.generators import Generator, TokenDiffusionDecoder
from discrete_lit.samplers import (
    AncestralSampler,
    GuidedSolver,
    MaskGITSampler,
    RasterSampler,
    Sampler,
    SamplerOutput,
    TraceStep,
)

LARGEST_PAGE = 5_000_000
"""Bytes."""
_LARGEST_IMAGE = 96
_TEMPLATE = Path(__file__).with_name("watch.html")
_CHOICE_TEMPERATURES = (0.5, 4.5)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One panel: who draws.

    Raises:
        ValueError: tokens that are not one id for each position of a grid, a tokenizer that makes no images, a sampler
            of another kind, or a decoder of other tokens.
    """

    name: str
    generator: Generator
    sampler: Sampler | None = None
    """The generator's own by default."""
    decoder: TokenDiffusionDecoder | None = None
    """Decodes the last ids, step by step, after the generator."""
    decoder_sampler: GuidedSolver | None = None
    """The decoder's own by default."""

    def __post_init__(self) -> None:
        generator = self.generator
        if not generator.tokenizer.makes_images:
            raise ValueError(f"{self.name}: its tokenizer {type(generator.tokenizer).__name__} makes no images to show")
        layout = generator.backbone.layout
        whole = generator.token_shape if len(generator.token_shape) < 3 else None
        if whole is None or layout.length != int(np.prod(whole)):
            raise ValueError(
                f"{self.name}: a {type(generator).__name__} has {layout.length} ids for tokens "
                f"{generator.token_shape}; a page shows one id for each position of a grid"
            )
        if self.sampler is not None and not isinstance(self.sampler, generator.sampler_kind):
            raise ValueError(
                f"{self.name}: {type(self.sampler).__name__} does not draw from a {type(generator).__name__}, which "
                f"needs a {generator.sampler_kind.__name__}"
            )
        if self.decoder is not None:
            self.decoder.check_source(generator.tokenizer, generator.image_size, num_classes=generator.num_classes)

    @property
    def scales(self) -> list[tuple[int, int]] | None:
        """Height and width of each scale of a next-scale generator."""
        quantizer = self.generator.scale_quantizer()
        return None if quantizer is None else [tuple(size) for size in quantizer.sizes]  # type: ignore[attr-defined]

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of ids, of scales the last."""
        if self.scales is not None:
            return self.scales[-1]
        shape = self.generator.token_shape
        if len(shape) == 2:
            return shape[0], shape[1]
        side = isqrt(shape[0])
        return (side, side) if side * side == shape[0] else (1, shape[0])


def check_together(panels: Sequence[Watched], classes: Sequence[int]) -> None:
    """Refuse panels that cannot stand side by side.

    Raises:
        ValueError: two grids, two image sizes, or a class that one of them does not have.
    """
    for what, of in (("grid", lambda panel: panel.grid), ("image size", lambda panel: panel.generator.image_size)):
        found = {panel.name: of(panel) for panel in panels}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name} has {value}" for name, value in found.items())
            raise ValueError(f"checkpoints must have one {what} to be shown side by side: {listed}")
    for panel in panels:
        count = panel.generator.num_classes
        wrong = [label for label in classes if not 0 <= label < count]
        if wrong:
            raise ValueError(f"classes holds {wrong[0]}, accepted by {panel.name}: int in [0, {count})")


# One panel.


@torch.inference_mode()
def draw_panel(panel: Watched, classes: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """Draw an image of each class for each seed, and keep every step.

    The image of seed s and the i-th class is sample i of `discrete-lit sample --seed s --labels classes`.

    Args:
        panel: who draws.
        classes: labels.
        seeds: of the draws.

    Returns:
        `name`, `detail` and `shades` (of ids, in [0, 255]), and `draws` by "class/seed": `frames`, each the ids
        (-1 where none is drawn), the changed positions, the confidence and its rank, calls and passes; and `strip`, a
        PNG with the image of each frame beside the next.
    """
    draws, used = {}, set()
    sampler = panel.sampler or panel.generator.sampler
    labels = torch.tensor(list(classes))
    for seed in seeds:
        random = CounterRandom(seed, torch.arange(len(labels)))
        output = panel.generator.draw(labels, random, sampler, trace=True)
        frames = _frames(output, panel.scales, panel.generator.vocab_size)
        images = [decoded_frame(panel, tokens) for tokens in _tokens_of_frames(output)]
        if panel.decoder is not None:
            later, more = _decoder_frames(panel, output, labels, random)
            for own, added in zip(frames, later, strict=True):
                own.extend({**own[-1], "d": [], **frame} for frame in added)
            images += more
        for row, label in enumerate(classes):
            draws[f"{label}/{seed}"] = {
                "frames": frames[row],
                "strip": _strip([image[row] for image in images]),
            }
            used |= {token for frame in frames[row] for token in frame["ids"]}
    return {
        "name": panel.name,
        "detail": _describe(panel, sampler),
        "shades": _shades(panel.generator, used - {-1}),
        "grid": list(panel.grid),
        "draws": draws,
    }


def _describe(panel: Watched, sampler: Sampler) -> str:
    steps = getattr(sampler, "steps", None)
    parts = [type(panel.generator).__name__, type(sampler).__name__]
    if steps is not None:
        parts.append(f"{steps} steps")
    if sampler.guidance_scale != 1:
        parts.append(f"guidance {sampler.guidance_scale:g}")
    if panel.decoder is not None:
        parts.append("then a diffusion decoder")
    return ", ".join(parts)


def _tokens_of_frames(output: SamplerOutput) -> list[Tensor]:
    assert output.trace is not None and output.trace_start is not None
    return [output.trace_start, *(step.tokens for step in output.trace)]


def _frames(output: SamplerOutput, scales: list[tuple[int, int]] | None, vocab_size: int) -> list[list[dict[str, Any]]]:
    """List the frames of each sequence: the start, then one a step."""
    assert output.trace is not None and output.trace_start is not None
    start = output.trace_start
    nothing = torch.full(start.shape, torch.nan, dtype=torch.float64)
    before = TraceStep(
        tokens=start,
        changed=torch.zeros(start.shape, dtype=torch.bool),
        confidence=nothing,
        network_calls=0,
        sequential_passes=0,
    )
    steps = (before, *output.trace)
    every = torch.stack([step.confidence for step in steps])  # (steps, B, N)
    found = []
    for row in range(len(start)):
        values = every[:, row]
        order = values[values.isfinite()].sort().values
        confidence = nothing[row].clone()
        frames = []
        for number, step in enumerate(steps):
            ids = torch.where(step.tokens[row] < vocab_size, step.tokens[row], -1)
            new = step.confidence[row]
            confidence = torch.where(new.isfinite() & (ids >= 0), new, confidence).masked_fill(ids < 0, torch.nan)
            rank = torch.searchsorted(order, confidence.nan_to_num()) / max(len(order) - 1, 1)
            here, size = slice(None), None
            if scales is not None:
                here, size = _scale_at(scales, max(number - 1, 0))
            frames.append(
                {
                    "ids": ids[here].tolist(),
                    "d": step.changed[row][here].nonzero()[:, 0].tolist(),
                    "c": [round(value, 2) if isfinite(value) else None for value in confidence[here].tolist()],
                    "r": [round(255 * min(value, 1.0)) for value in rank[here].tolist()],
                    "calls": step.network_calls,
                    "passes": step.sequential_passes,
                    **({} if size is None else {"size": list(size)}),
                }
            )
        found.append(frames)
    return found


def _scale_at(scales: list[tuple[int, int]], number: int) -> tuple[slice, tuple[int, int]]:
    lengths = [height * width for height, width in scales]
    number = min(number, len(scales) - 1)
    start = sum(lengths[:number])
    return slice(start, start + lengths[number]), scales[number]


def decoded_frame(panel: Watched, tokens: Tensor) -> np.ndarray:
    """Decode ids `(B, N)`, some not drawn yet, to uint8 images `(B, H, W, C + 1)`, transparent where none is drawn."""
    generator = panel.generator
    tokenizer: Any = generator.tokenizer
    drawn = tokens < generator.vocab_size
    filled = torch.where(drawn, tokens, 0)
    opacity = drawn.any(dim=1)[:, None, None, None].float()
    if panel.scales is not None:
        # Scales that are not drawn add nothing to f_hat.
        quantizer, start, f_hat = tokenizer.quantizer, 0, 0.0
        for number, (height, width) in enumerate(panel.scales):
            here = slice(start, start := start + height * width)
            weight = drawn[:, here].all(dim=1).float()[:, None, None, None]
            f_hat = f_hat + weight * quantizer.contribution(number, filled[:, here])
        images = tokenizer.to_images(tokenizer.outputs(rearrange(f_hat, "b d h w -> b h w d")))
    else:
        if not bool(drawn.all()):
            filled = torch.where(drawn, tokens, _central_id(generator))
        images = tokenizer.decode(generator.to_grid(filled))
        if len(generator.token_shape) == 2:
            opacity = generator.to_grid(drawn)[:, None].float()
    opacity = F.interpolate(opacity, size=images.shape[-2:], mode="nearest")
    return _pixels(images, opacity)


def _central_id(generator: Generator) -> int:
    """The id whose code is nearest to the mean of 1,024 codes: what stands where nothing is drawn, and is not shown."""
    ids = torch.arange(min(generator.vocab_size, 1024), device=generator.device)
    codes = _codes(generator, ids)
    return int((codes - codes.mean(dim=0)).square().sum(dim=1).argmin())


def _codes(generator: Generator, ids: Tensor) -> Tensor:
    """Look up the codes `(n, D)` of ids `(n,)`."""
    quantizer = generator.scale_quantizer()
    if quantizer is not None:
        return quantizer.code_table()[ids].float()  # type: ignore[attr-defined]
    length = generator.length
    rows = F.pad(ids, (0, -len(ids) % length)).view(-1, *generator.token_shape)
    return rearrange(generator.tokenizer.embed(rows).flatten(2), "b d n -> (b n) d")[: len(ids)].float()


def _shades(generator: Generator, ids: set[int]) -> dict[str, int]:
    """Give each id a shade in [0, 255]: its rank along the first principal component of the codes."""
    listed = sorted(ids)
    codes = _codes(generator, torch.tensor(listed))
    centred = codes - codes.mean(dim=0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    rank = (centred @ axes[0]).argsort().argsort()
    return {
        str(token): round(255 * int(place) / max(len(listed) - 1, 1)) for token, place in zip(listed, rank, strict=True)
    }


def _decoder_frames(
    panel: Watched, output: SamplerOutput, labels: Tensor, random: CounterRandom
) -> tuple[list[list[dict[str, Any]]], list[np.ndarray]]:
    """Run the decoder with a trace: for each sequence the frames that follow, and the images of all."""
    decoder = panel.decoder
    assert decoder is not None
    own_labels = labels if decoder.num_classes > 1 else torch.zeros_like(labels)
    drawn = decoder.draw(own_labels, random, panel.decoder_sampler, tokens=output.tokens, trace=True)
    assert drawn.estimates is not None
    frames, images = [], []
    last = drawn.estimates[-1]
    shown = drawn.estimates
    for number, step in enumerate(shown):
        latents = drawn.tokens if step is last else step.estimate
        pixels = decoder.tokenizer.decode(latents.float())
        images.append(_pixels(pixels, torch.ones_like(pixels[:, :1])))
        frames.append(
            {
                "calls": output.network_calls + step.network_calls,
                "passes": output.sequential_passes + step.sequential_passes,
                "decoder": [number + 1, len(shown)],
            }
        )
    return [frames for _ in labels], images


def _pixels(images: Tensor, opacity: Tensor) -> np.ndarray:
    """Make uint8 `(B, H, W, 2 or 4)`, at most 96 pixels wide, of images in [-1, 1] and opacities in [0, 1]."""
    shown = displayable(to_uint8(images))[:, :3]
    alpha = (255 * opacity).to(torch.uint8)
    both = torch.cat((shown, alpha), dim=1)
    largest = max(both.shape[-2:])
    if largest > _LARGEST_IMAGE:
        size = [max(1, side * _LARGEST_IMAGE // largest) for side in both.shape[-2:]]
        both = F.interpolate(both.float(), size=size, mode="area").round().to(torch.uint8)
    return rearrange(both, "b c h w -> b h w c").numpy()


def _strip(images: Sequence[np.ndarray]) -> str:
    """Put images beside one another in a PNG, as a data URI."""
    joined = np.concatenate(images, axis=1)
    return _png(Image.fromarray(joined, "LA" if joined.shape[-1] == 2 else "RGBA"))


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# The toy.


def toy_panels(law: FavouredColours, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Draw from the exact conditionals by the package's own samplers, step by step.

    Args:
        law: the truth.
        seeds: of the draws.

    Returns:
        Panels as of `draw_panel`, without images; draws by "0/seed".
    """
    masks = FavouredColoursBackbone(law)
    causal, uniform = FavouredColoursBackbone(law, attention="causal"), FavouredColoursBackbone(law, noise="uniform")
    raster = RasterSampler()
    cases: list[tuple[str, str, FavouredColoursBackbone, Sampler]] = [
        ("Autoregressive", "one position after another: exact, 16 passes", causal, raster),
        ("MaskGIT", "keeps the most confident, 8 rounds", masks, MaskGITSampler(steps=8, choice_temperature=4.5)),
        ("Diffusion of masks", "unmasks at random, 8 steps", masks, AncestralSampler(steps=8)),
        ("Uniform diffusion", "starts from noise, edits everywhere, 8 steps", uniform, AncestralSampler(steps=8)),
        ("Hybrid", "ids as the autoregressive one; then each is smoothed by its neighbours", causal, raster),
    ]
    panels = []
    side = isqrt(law.length)
    for name, detail, backbone, sampler in cases:
        draws = {}
        for seed in seeds:
            random = CounterRandom(seed, torch.arange(1))
            denoiser = None if backbone is causal else backbone.denoiser()
            label = torch.zeros(1, dtype=torch.int64)
            output = sampler(backbone, label, random, denoiser=denoiser, trace=True)
            frames = _frames(output, None, law.colours)[0]
            if name == "Hybrid":
                steps = 4
                frames += [
                    {
                        **frames[-1],
                        "d": [],
                        "passes": frames[-1]["passes"] + number,
                        "calls": frames[-1]["calls"] + number,
                        "smooth": number / steps,
                        "decoder": [number, steps],
                    }
                    for number in range(1, steps + 1)
                ]
            draws[f"0/{seed}"] = {"frames": frames}
        panels.append({"name": name, "detail": detail, "grid": [side, side], "draws": draws})
    return panels


# The page.


def write_page(
    path: Path, panels: Sequence[dict[str, Any]], *, classes: Sequence[int] = (), seeds: Sequence[int] = (0,)
) -> int:
    """Write the page: the toy, and the panels of checkpoints if there are any.

    Args:
        path: of the HTML file.
        panels: as `draw_panel` makes them.
        classes: labels of the draws.
        seeds: of the draws.

    Returns:
        Its size in bytes.

    Raises:
        ValueError: a draw without its images, or a page above 5 MB.
    """
    for panel in panels:
        for name, draw in panel["draws"].items():
            if not draw.get("strip"):
                raise ValueError(f"{panel['name']}: the draw {name} has a trace without images, a page shows both")
    law, toy_seeds = FavouredColours(), list(range(6))
    curves = total_variations(law, _CHOICE_TEMPERATURES)
    data = {
        "toy": {
            "panels": toy_panels(law, toy_seeds),
            "classes": [0],
            "seeds": toy_seeds,
            "favourites": law.favourites,
            "curves": curves,
        },
        "models": {"panels": list(panels), "classes": list(classes), "seeds": list(seeds)} if panels else None,
    }
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    page = _TEMPLATE.read_text(encoding="utf-8")
    for mark, content in (("<!--STILL-->", _still(panels, curves)), ("/*DATA*/null", text)):
        assert page.count(mark) == 1, f"the template has {mark} once"
        page = page.replace(mark, content)
    size = len(page.encode())
    if size > LARGEST_PAGE:
        draws = max(len(panels[0]["draws"]), 1)
        raise ValueError(
            f"the page would have {size / 1e6:.1f} MB, accepted: at most {LARGEST_PAGE / 1e6:g}; it shows "
            f"{len(panels)} checkpoints with {draws} draws each: give fewer classes or seeds"
        )
    atomic_write_text(path, page)
    return size


def _still(panels: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]]) -> str:
    """Make the tables that a browser without JavaScript shows: the last images of the first draw, and the numbers."""
    rows = []
    for panel in panels:
        draw = next(iter(panel["draws"].values()))
        last = draw["frames"][-1]
        encoded = draw["strip"].partition(",")[2]
        strip = Image.open(io.BytesIO(base64.b64decode(encoded)))
        width = strip.width // len(draw["frames"])
        image = _png(strip.crop((strip.width - width, 0, strip.width, strip.height)))
        name = html.escape(panel["name"])
        rows.append(
            f'<tr><th scope="row">{name}</th><td><img src="{image}" width="96" alt="The image drawn by {name}"></td>'
            f"<td>{last['calls']}</td><td>{last['passes']}</td></tr>"
        )
    drawn = ""
    if rows:
        drawn = (
            "<table><caption>One draw of each checkpoint</caption><thead><tr><th>Sampler</th><th>Image</th>"
            f"<th>Network calls</th><th>Sequential passes</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )
    rounds = sorted({point[0] for curve in curves for point in curve["points"]})
    head = "".join(f"<th>{number}</th>" for number in rounds)
    body = ""
    for curve in curves:
        values = dict(map(tuple, curve["points"]))
        cells = "".join(f"<td>{values[number]:.3f}</td>" if number in values else "<td></td>" for number in rounds)
        body += f'<tr><th scope="row">{html.escape(curve["name"])}</th>{cells}</tr>'
    return (
        f"{drawn}<table><caption>Toy: total variation from the truth, by rounds</caption>"
        f"<thead><tr><th>Sampler</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
