"""How fast samples come: token by token, masked, scale by scale and by diffusion, beside the floors of their passes.

The networks are those of the recipes in `lightning_configs/generators`, with random weights, in bfloat16 autocast.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from side_by_side.floors import Work, decoding_seconds
from side_by_side.host_work import HostWork, host_work, host_work_between_passes
from side_by_side.passes import bare_passes
from side_by_side.peers import generate, transformers_llama
from side_by_side.published_shapes import sizes_of
from side_by_side.recipes import make_generator
from side_by_side.timing import Repeated, repeated, timed
from torch import Tensor

from discrete_lit.backbones.execution import cast_once
from discrete_lit.core.random import CounterRandom
from discrete_lit.core.synchronisation import checked_at_the_end
from discrete_lit.generators import Generator, GraphedDraw
from discrete_lit.samplers.categorical import draw_categorical
from discrete_lit.samplers.sampler import SamplerOutput
from gpu_parts.part import Measurement, Setting, part
from gpu_parts.speed import against, compile_backbone, measurement, uncompile

PRECISION = torch.bfloat16
DECODING_FLOOR = "weights and filled cache read once a token at the measured bandwidth, or the products' rate"
PASSES_FLOOR = "the passes' products at the measured bfloat16 rate"


def precision(device: torch.device) -> torch.autocast:
    """bfloat16, as `--precision bf16-mixed` has it.

    Samplers cast the weights themselves, once. Autocast's own memory of casts must be off where a graph is recorded,
    and what is compiled with it on is compiled again with it off: so it is off throughout.
    """
    return torch.autocast(device.type, PRECISION, cache_enabled=False)


class Draws:
    """Draws of a generator at one batch size, each of the same samples.

    Args:
        generator: in eval mode.
        batch: images.
        device: of the generator.
        graphed: as one CUDA graph each, where the device has them.
    """

    def __init__(self, generator: Generator, batch: int, device: torch.device, *, graphed: bool = False) -> None:
        self.generator, self.batch, self.device = generator, batch, device
        self.labels = torch.arange(batch, device=device) % generator.num_classes
        self.indices = torch.arange(batch, device=device)
        self.graphed = GraphedDraw(generator, batch_size=batch) if graphed else None

    @torch.no_grad()
    def __call__(self) -> SamplerOutput:
        with precision(self.device):
            if self.graphed is not None:
                return self.graphed(self.labels, self.indices)
            return self.generator.draw(self.labels, CounterRandom(0, self.indices))

    def measure(self, repeats: int) -> tuple[Repeated, str]:
        """Seconds of a draw, and a note: what went before the first measured one, or why there is no graph."""
        first = timed(self).wall
        if self.graphed is None:
            return repeated(self, repeats=repeats, warmup=0), f"first draw {first:.1f} s"
        recording = timed(self).wall
        if self.graphed.reason is not None:
            return repeated(self, repeats=repeats, warmup=0), f"no graph: {self.graphed.reason}"
        return repeated(self, repeats=repeats, warmup=0), f"first draw {first:.1f} s, recorded in {recording:.1f} s"


# --- Token by token ---


@part("sample_rar", kind="fast", seconds=70, what="RAR-B token by token with guidance, in images a second")
def sample_rar(setting: Setting) -> Iterator[Measurement]:
    yield from sample_token_by_token(setting, "RAR-B", "rar_b_imagenet256")


@part("sample_llamagen", kind="fast", seconds=60, what="LlamaGen-B token by token with guidance, in images a second")
def sample_llamagen(setting: Setting) -> Iterator[Measurement]:
    yield from sample_token_by_token(setting, "LlamaGen-B", "llamagen_b_imagenet256")


LLAMA = "transformers' Llama, static cache"
# Seconds of a GPU's host for each block of the peer, which compiles all of its network at once.
PEER_COMPILES = 1.5


def sample_token_by_token(setting: Setting, name: str, recipe: str) -> Iterator[Measurement]:
    """Measure the ways to draw at one batch size beside the peer, what the host does, and the other batch sizes.

    Other batch sizes are drawn by graphs of the blocks as written. The peer is measured compiled, too, where there is
    time left.
    """
    device, tiny = setting.device, setting.tiny
    middle, others, few, more = (2, (1,), 1, 1) if tiny else (64, (256, 1), 2, 5)
    generator = make_generator(recipe, device=device, tiny=tiny)
    backbone = generator.backbone

    def row(arm: str, batch: int, taken: Repeated, note: str, **settings: Any) -> Measurement:
        least = decoding_seconds(
            backbone, 2 * batch, PRECISION, bandwidth=setting.machine.bandwidth, rate=setting.machine.rate(PRECISION)
        )
        case = f"{name}, batch {batch}, guided, {backbone.layout.length} tokens, bf16"
        floor = {"amount": batch, "unit": "images/s", "least": least, "least_of": DECODING_FLOOR}
        return measurement(setting, f"sample, {arm}", case, taken, note=note, **floor, **settings)

    theirs, without = against("transformers", "transformers", lambda: Llama(generator, 2 * middle, device, few))
    peer = None
    if theirs is not None:
        peer = (f"{LLAMA}, {theirs.millions:.0f}M, {2 * middle} rows, not compiled", theirs.seconds.median)

    eager = Draws(generator, middle, device)
    yield row("eager", middle, *eager.measure(few), peer=peer)
    first, steps = generator.length // 2, min(8, generator.length // 4)
    work = host_work_between_passes(backbone, eager, device, passes=(first, first + steps))
    yield from host_rows(setting, f"{name}, batch {middle}, eager, a token", work, steps)
    graph = Draws(generator, middle, device, graphed=True)
    yield row("CUDA graph", middle, *graph.measure(more), peer=peer, share=0.5, times=3.0)
    del graph

    compile_backbone(backbone, setting)
    compiled = Draws(generator, middle, device)
    yield row("compiled blocks", middle, *compiled.measure(few), peer=peer)
    graph = Draws(generator, middle, device, graphed=True)
    taken, note = graph.measure(more)
    both = "CUDA graph of compiled blocks"
    yield row(both, middle, taken, "; ".join(text for text in (note, without) if text), peer=peer, share=0.5, times=3.0)
    del graph
    uncompile(backbone)

    for batch in others:
        yield row("CUDA graph", batch, *Draws(generator, batch, device, graphed=True).measure(more))
    if theirs is not None and setting.seconds_left() > PEER_COMPILES * len(list(backbone.fsdp_units())):
        compiling, seconds = theirs.compile()
        peer = (f"{LLAMA}, {2 * middle} rows, compiled in {compiling:.0f} s", seconds.median)
        yield row(f"{both}, against the compiled peer", middle, taken, "", peer=peer, times=3.0)


class Llama:
    """`transformers`' Llama with the depth, width and weights of a generator's backbone, and what its draws take.

    Args:
        generator: ours.
        rows: sequences, which are drawn without guidance.
        device: where it is made.
        repeats: draws that are measured.
    """

    def __init__(self, generator: Generator, rows: int, device: torch.device, repeats: int) -> None:
        llama = transformers_llama(device, PRECISION, sizes_of(generator.backbone))
        prompt = torch.randint(generator.vocab_size, (rows, 1), device=device)
        self.draw = partial(generate, llama, prompt, generator.length)
        self.millions = sum(parameter.numel() for parameter in llama.parameters()) / 1e6
        self.repeats = repeats
        self.seconds = repeated(self.draw, repeats=repeats)

    def compile(self) -> tuple[float, Repeated]:
        """The seconds until it is compiled, and those of a draw then."""
        run = partial(self.draw, compiled=True)
        return timed(run).wall, repeated(run, repeats=self.repeats)


def graph_row(setting: Setting, case: str, draws: Draws) -> Measurement:
    """A row of what the host launches in a whole draw by a graph, which has been recorded."""
    work = host_work(draws, setting.device)
    note = f"{work.graphs} graphs and {work.launches} launches beside them, {work.waits} waits"
    return Measurement(
        name="host, launches of a draw",
        case=case,
        value=work.graphs + work.launches,
        unit="launches",
        better="lower",
        note=note,
    )


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


@part("sample_parallel", kind="fast", seconds=57, what="MaskGIT, VAR-d16 and SEDD-186M, as a share of the matrix rate")
def sample_parallel(setting: Setting) -> Iterator[Measurement]:
    yield from draw_precision(setting)
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "MaskGIT, 8 steps": ("maskgit_imagenet256", {}),
        # The recipe has 128 steps, which are alike.
        "SEDD-186M, 16 steps": ("sedd_absorb", {"steps": 16}),
        "VAR-d16, ten scales": ("var_d16_imagenet256", {}),
    }
    for name, (recipe, sampler) in cases.items():
        generator = make_generator(recipe, device=setting.device, tiny=setting.tiny, sampler=sampler)
        yield from passes_and_draws(setting, name, generator)
        del generator


def passes_and_draws(setting: Setting, name: str, generator: Generator) -> Iterator[Measurement]:
    """Measure the passes of a network alone and a sampler's draws, as written, compiled and as a graph of that."""
    device, batch = setting.device, 2 if setting.tiny else 64
    draws = Draws(generator, batch, device)
    made = draws()
    guided, passes = generator.sampler.guidance_scale != 1, made.sequential_passes
    repeats = 1 if setting.tiny else 4
    least = Work(flops=made.flops * batch).seconds(
        bandwidth=setting.machine.bandwidth, rate=setting.machine.rate(PRECISION)
    )
    case = f"{name}, batch {batch}{', guided' if guided else ''}, {generator.backbone.layout.length} tokens, bf16"

    def measure_passes() -> Repeated:
        with torch.no_grad(), precision(device):
            network = cast_once(generator.backbone)
            return repeated(bare_passes(network, draws.labels, passes, guided=guided), repeats=repeats)

    def row(arm: str, taken: Repeated, note: str, share: float | None = None) -> Measurement:
        floor = {"amount": batch, "unit": "images/s", "least": least, "least_of": PASSES_FLOOR}
        return measurement(setting, arm, case, taken, share=share, note=note, **floor)

    for blocks in ("as written", "compiled"):
        compiling = ""
        if blocks == "compiled":
            compile_backbone(generator.backbone, setting)
            compiling = f"compiled in {timed(draws).wall:.0f} s"
        alone = measure_passes()
        yield row(f"passes alone, blocks {blocks}", alone, f"{1e3 * alone.median / passes:.2f} ms a pass")
        whole = repeated(draws, repeats=repeats)
        beside = f"{1e3 * (whole.median - alone.median) / passes:.2f} ms a pass beside it"
        yield row(f"sample, blocks {blocks}", whole, "; ".join(text for text in (beside, compiling) if text))
        if blocks == "as written":
            first, last = (1, passes - 1) if passes > 2 else (0, 1)
            work = host_work_between_passes(generator.backbone, draws, device, passes=(first, last))
            yield from host_rows(setting, f"{name}, batch {batch}, blocks as written, a pass", work, last - first)
    graph = Draws(generator, batch, device, graphed=True)
    taken, note = graph.measure(repeats)
    yield row("sample, CUDA graph of compiled blocks", taken, note, share=0.6)
    yield graph_row(setting, f"{name}, batch {batch}, CUDA graph, a whole draw", graph)


def draw_precision(setting: Setting) -> Iterator[Measurement]:
    """Measure the draw of ids, which sums probabilities in float64, beside one that sums them in float32."""
    rows = 64 if setting.tiny else 64 * 256
    for size in (32,) if setting.tiny else (1024, 16_384):
        logits = torch.randn(rows, size, device=setting.device)
        uniforms = torch.rand(rows, dtype=torch.float64, device=setting.device)
        probabilities = logits.softmax(dim=-1)
        singly = repeated(partial(draw_in_float32, logits, uniforms.float()), at_least=0.02)
        race = repeated(partial(torch.multinomial, probabilities, 1), at_least=0.02)
        # As in a sampler, which looks at the end of a draw whether all logits were numbers.
        with checked_at_the_end():
            ours = repeated(partial(draw_categorical, logits, uniforms), at_least=0.02)
        # It reads the logits at least once.
        least = Work(bytes=logits.nbytes).seconds(bandwidth=setting.machine.bandwidth, rate=1)
        yield measurement(
            setting,
            "draw of ids, float64 sums",
            f"{rows:,} rows of {size:,} ids",
            ours,
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
