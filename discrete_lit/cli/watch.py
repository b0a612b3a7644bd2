"""`discrete-lit watch`: samplers filling the same grid side by side, as one HTML page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discrete_lit.checkpoints import load
from discrete_lit.evaluation.watched_draws import Watched, check_together, draw_panel, write_page
from discrete_lit.generators import Generator
from discrete_lit.generators.token_diffusion_decoder import decoder_from_checkpoint
from discrete_lit.samplers import GuidedSolver, Sampler


@dataclass(frozen=True, kw_only=True)
class WatchedCheckpoint:
    """A checkpoint, and how it is sampled where it is not by its own sampler."""

    ckpt_path: str
    """Checkpoint of a Generator of ids."""
    sampler: Sampler | None = None
    """The generator's own by default."""
    decoder: str | None = None
    """Checkpoint of a `TokenDiffusionDecoder` of the same tokens: the hybrid."""
    decoder_sampler: GuidedSolver | None = None
    """The decoder's own by default."""


def watch(
    output: str,
    *,
    checkpoints: dict[str, str | WatchedCheckpoint] | None = None,
    classes: list[int] | None = None,
    seeds: list[int] | None = None,
) -> dict[str, Any]:
    """Write a page on which samplers fill the same grid side by side, step by step.

    The page is one HTML file of at most 5 MB that needs no network. Its first tab is a toy whose conditionals are
    exact, and needs no checkpoint. The second shows real draws: of each step the ids, the changed positions, the
    confidence, the network calls and sequential passes so far, and the decoded image.

    Args:
        output: the HTML file to write.
        checkpoints: by the name that the page shows: the path of a generator's checkpoint; or a mapping of `ckpt_path`
            and, where wanted, `sampler`, `decoder` and `decoder_sampler`. All must have one grid.
        classes: labels to choose from on the page; the first three by default.
        seeds: to choose from; 0 and 1 by default. Seed s and the i-th class are sample i that `discrete-lit
            sample` draws with this seed and these labels.

    Returns:
        `output` and `bytes`.

    Raises:
        ValueError: what is no generator's checkpoint, one of other tokens than ids on a grid or without images,
            checkpoints of two grids, a class that one of them does not have, a repeated class or seed, or a page above
            5 MB.
    """
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"output={output!r} is a folder, accepted: the path of an HTML file")
    if not checkpoints and (classes is not None or seeds is not None):
        raise ValueError("classes and seeds are of checkpoints: give checkpoints too")
    labels = [0, 1, 2] if classes is None else classes
    numbers = [0, 1] if seeds is None else seeds
    for name, given in (("classes", labels), ("seeds", numbers)):
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name}={given}, accepted: at least one, each once")
    panels = [_panel(name, given) for name, given in (checkpoints or {}).items()]
    if classes is None and panels:
        labels = labels[: min(panel.generator.num_classes for panel in panels)]
    check_together(panels, labels)
    drawn = [draw_panel(panel, labels, numbers) for panel in panels]
    path.parent.mkdir(parents=True, exist_ok=True)
    size = write_page(path, drawn, classes=labels, seeds=numbers)
    print(f"page: {path} ({size / 1e6:.1f} MB)")
    return {"output": str(path), "bytes": size}


def _panel(name: str, given: str | WatchedCheckpoint) -> Watched:
    if isinstance(given, str):
        given = WatchedCheckpoint(ckpt_path=given)
    generator = load(given.ckpt_path)
    if not isinstance(generator, Generator):
        raise ValueError(
            f"checkpoints.{name}: {given.ckpt_path!r} holds a {type(generator).__name__}, not a Generator of ids"
        )
    if given.decoder is None and given.decoder_sampler is not None:
        raise ValueError(f"checkpoints.{name}: decoder_sampler is of a decoder: give decoder too")
    return Watched(
        name=name,
        generator=generator.eval(),
        sampler=given.sampler,
        decoder=None if given.decoder is None else decoder_from_checkpoint(given.decoder),
        decoder_sampler=given.decoder_sampler,
    )
