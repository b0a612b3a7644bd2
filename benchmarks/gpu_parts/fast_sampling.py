"""How fast samples come: token by token, masked, scale by scale and by diffusion, beside the floors of their passes.

The networks are those of the recipes in `lightning_configs/generators`, with random weights, in bfloat16 autocast.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from side_by_side.floors import Work, decoding_seconds
from side_by_side.host_work import HostWork, host_work_between_passes
from side_by_side.passes import bare_passes
from side_by_side.peers import generate, installed, transformers_llama
from side_by_side.published_shapes import LlamaSizes, autocast
from side_by_side.recipes import make_generator
from side_by_side.timing import Repeated, repeated, timed
from torch import Tensor

from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import Generator
from discrete_lit.samplers import Sampler
from discrete_lit.samplers.categorical import draw_categorical
from discrete_lit.samplers.sampler import SamplerOutput
from gpu_parts.part import Measurement, Setting, part
from gpu_parts.speed import compile_backbone, measurement, missing, uncompile

PRECISION = torch.bfloat16
DECODING_FLOOR = "weights and filled cache read once a token at the measured bandwidth, or the products' rate"
PASSES_FLOOR = "the passes' products at the measured bfloat16 rate"


class Draws:
    """Draws of a generator at one batch size.

    Args:
        generator: in eval mode.
        batch: images.
        device: of the generator.
        sampler: the recipe's by default.
    """

    def __init__(self, generator: Generator, batch: int, device: torch.device, sampler: Sampler | None = None) -> None:
        self.generator, self.batch, self.device = generator, batch, device
        self.sampler = sampler or generator.sampler
        self.labels = torch.arange(batch, device=device) % generator.num_classes

    @torch.no_grad()
    def __call__(self) -> SamplerOutput:
        with autocast(self.device, "bf16-mixed"):
            return self.generator.draw(self.labels, CounterRandom(0, self.labels), self.sampler)

    def rows(self) -> int:
        """Sequences in a pass: two for each image where the sampler guides."""
        return self.batch * (2 if self.sampler.guidance_scale != 1 else 1)


# --- Token by token ---


@part("sample_rar", kind="fast", seconds=85, what="RAR-B token by token with guidance, in images a second")
def sample_rar(setting: Setting) -> Iterator[Measurement]:
    yield from sample_token_by_token(setting, "RAR-B", "rar_b_imagenet256")


@part("sample_llamagen", kind="fast", seconds=60, what="LlamaGen-B token by token with guidance, in images a second")
def sample_llamagen(setting: Setting) -> Iterator[Measurement]:
    yield from sample_token_by_token(setting, "LlamaGen-B", "llamagen_b_imagenet256")


def sample_token_by_token(setting: Setting, name: str, recipe: str) -> Iterator[Measurement]:
    """Measure the arms at one batch size, the peer, what the host does for a token, then the other batch sizes.

    What has no time left is left out.
    """
    device, tiny = setting.device, setting.tiny
    generator = make_generator(recipe, device=device, tiny=tiny)
    middle, others = (2, (1, 3)) if tiny else (64, (256, 1))

    def row(arm: str, batch: int, taken: Repeated, peer: tuple[str, float] | None = None, **more: object) -> Measurement:
        backbone = generator.backbone
        least = decoding_seconds(
            backbone, 2 * batch, PRECISION, bandwidth=setting.machine.bandwidth, rate=setting.machine.rate(PRECISION)
        )
        return measurement(
            setting,
            f"sample, {arm}",
            f"{name}, batch {batch}, guided, {backbone.layout.length} tokens, bf16",
            taken,
            amount=batch,
            unit="images/s",
            least=least,
            least_of=DECODING_FLOOR,
            peer=peer,
            **more,  # type: ignore[arg-type]
        )

    draws = Draws(generator, middle, device)
    eager = repeated(draws, repeats=2)
    yield row("eager", middle, eager)
    work = host_work_between_passes(generator.backbone, draws, device, passes=_some_passes(generator))
    yield from host_rows(setting, f"{name}, batch {middle}, eager, a token", work, _passes_between(generator))

    peer_name = "transformers' Llama, static cache"
    if installed("transformers"):
        llama = _llama_like(generator, setting)
        prompt = torch.randint(generator.vocab_size, (2 * middle, 1), device=device)
        peer = partial(_no_grad, partial(generate, llama, prompt, generator.length))
        seconds = repeated(peer, repeats=2).median
        parameters = sum(parameter.numel() for parameter in llama.parameters()) / 1e6
        yield row("eager", middle, eager, (f"{peer_name}, eager, {parameters:.0f}M, as many rows", seconds))
    else:
        yield row("eager", middle, eager, note=missing("transformers"))

    compile_backbone(generator.backbone, setting)
    compiling = timed(draws).wall
    yield row("compiled", middle, repeated(draws, repeats=2), note=f"compiled in {compiling:.0f} s")
    for batch in others:
        draws = Draws(generator, batch, device)
        yield row("compiled", batch, repeated(draws, repeats=1 if batch == 1 else 2))
    uncompile(generator.backbone)


def _no_grad(run: Callable[[], object]) -> object:
    with torch.no_grad():
        return run()


def _llama_like(generator: Generator, setting: Setting) -> torch.nn.Module:
    """`transformers`' Llama with the depth, width and heads of a generator's backbone, and as many parameters."""
    backbone = generator.backbone
    width, depth = backbone.width, backbone.depth  # type: ignore[attr-defined]
    matrices = sum(parameter.numel() for parameter in backbone.blocks.parameters() if parameter.ndim == 2)  # type: ignore[attr-defined]
    hidden = round((matrices / depth - 4 * width**2) / (3 * width) / 64) * 64
    sizes = LlamaSizes(
        width=width,  # type: ignore[arg-type]
        depth=depth,  # type: ignore[arg-type]
        heads=backbone.heads,  # type: ignore[arg-type]
        hidden=max(hidden, 64),
        codes=generator.vocab_size,
        length=generator.length,
    )
    return transformers_llama(setting.device, PRECISION, sizes)


def _some_passes(generator: Generator) -> tuple[int, int]:
    """Passes in the middle of a sequence."""
    return generator.length // 2, generator.length // 2 + _passes_between(generator)


def _passes_between(generator: Generator) -> int:
    return min(8, generator.length // 4)


def host_rows(setting: Setting, case: str, work: HostWork, steps: int) -> Iterator[Measurement]:
    """Rows of what the host did in a number of steps: launches of a step, and waits of all of them."""
    what = "launches" if setting.device.type == "cuda" else "operations"
    yield Measurement(
        name=f"host, {what} a step", case=case, value=work.launches / steps, unit="launches", better="lower"
    )
    yield Measurement(
        name="host, waits for the device in the loop",
        case=f"{case}, {steps} steps",
        value=work.waits,
        unit="waits",
        better="lower",
        target="none",
        met=setting.met(work.waits == 0),
    )


# --- Several tokens a pass ---


@part("sample_parallel", kind="fast", seconds=50, what="MaskGIT, VAR-d16 and SEDD-186M: a share of the matrix rate")
def sample_parallel(setting: Setting) -> Iterator[Measurement]:
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "MaskGIT, 8 steps": ("maskgit_imagenet256", {}),
        "VAR-d16, ten scales": ("var_d16_imagenet256", {}),
        # The recipe has 128 steps, which are alike.
        "SEDD-186M, 16 steps": ("sedd_absorb", {"steps": 16}),
    }
    for name, (recipe, sampler) in cases.items():
        generator = make_generator(recipe, device=setting.device, tiny=setting.tiny, sampler=sampler)
        yield from passes_and_draws(setting, name, generator)
        del generator
    yield from draw_precision(setting)


def passes_and_draws(setting: Setting, name: str, generator: Generator) -> Iterator[Measurement]:
    """Measure a sampler and the passes of its network alone, as written and compiled, and what the host does."""
    device, batch = setting.device, 2 if setting.tiny else 64
    draws = Draws(generator, batch, device)
    made = draws()
    rows, passes = draws.rows(), made.sequential_passes
    guided = rows > batch
    least = Work(flops=made.flops * batch).seconds(
        bandwidth=setting.machine.bandwidth, rate=setting.machine.rate(PRECISION)
    )
    case = f"{name}, batch {batch}{', guided' if guided else ''}, {generator.backbone.layout.length} tokens, bf16"
    bare = bare_passes(generator.backbone, draws.labels, passes, guided=guided)

    def run_passes() -> None:
        with torch.no_grad(), autocast(device, "bf16-mixed"):
            bare()

    for arm in ("eager", "compiled"):
        compiling = ""
        if arm == "compiled":
            compile_backbone(generator.backbone, setting)
            compiling = f"compiled in {timed(draws).wall:.0f} s"
        repeats = 2 if setting.tiny else 5
        alone, whole = (repeated(run, repeats=repeats) for run in (run_passes, draws))
        each = 1e3 / passes
        yield measurement(
            setting,
            f"passes alone, {arm}",
            case,
            alone,
            amount=batch,
            unit="images/s",
            least=least,
            least_of=PASSES_FLOOR,
            note=f"{each * alone.median:.2f} ms a pass",
        )
        yield measurement(
            setting,
            f"sample, {arm}",
            case,
            whole,
            amount=batch,
            unit="images/s",
            least=least,
            least_of=PASSES_FLOOR,
            share=0.6 if arm == "compiled" else None,
            note="; ".join(
                text for text in (f"{each * (whole.median - alone.median):.2f} ms a pass beside it", compiling) if text
            ),
        )
        if arm == "eager":
            first, last = (1, passes - 1) if passes > 2 else (0, 1)
            work = host_work_between_passes(generator.backbone, draws, device, passes=(first, last))
            yield from host_rows(setting, f"{name}, batch {batch}, eager, a pass", work, last - first)


def draw_precision(setting: Setting) -> Iterator[Measurement]:
    """Measure the draw of ids, which sums probabilities in float64, beside one that sums them in float32."""
    rows = 64 if setting.tiny else 64 * 256
    for size in (32,) if setting.tiny else (1024, 16_384):
        logits = torch.randn(rows, size, device=setting.device)
        uniforms = torch.rand(rows, dtype=torch.float64, device=setting.device)
        probabilities = logits.softmax(dim=-1)
        singly = repeated(partial(draw_in_float32, logits, uniforms.float()), at_least=0.02)
        race = repeated(partial(torch.multinomial, probabilities, 1), at_least=0.02)
        # It reads the logits at least once.
        least = Work(bytes=logits.nbytes).seconds(bandwidth=setting.machine.bandwidth, rate=1)
        yield measurement(
            setting,
            "draw of ids, float64 sums",
            f"{rows:,} rows of {size:,} ids",
            repeated(partial(draw_categorical, logits, uniforms), at_least=0.02),
            least=least,
            least_of="logits read once",
            peer=("the same with float32 sums", singly.median),
            note=f"torch.multinomial of given probabilities, without their softmax: {1e3 * race.median:.3g} ms",
        )


def draw_in_float32(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw ids by inversion with float32 sums, which lose the rarest: what the precision of the draw is compared with.

    Args:
        logits: `(n, K)`.
        uniforms: `(n,)` in [0, 1).
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return found[:, 0].clamp(max=logits.shape[-1] - 1)
