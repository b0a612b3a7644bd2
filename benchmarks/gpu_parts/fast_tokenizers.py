"""How fast images become tokens and back, a VQGAN trains, and quantizers find their codes.

The tokenizers are those of the recipes in `lightning_configs/tokenizers`, with random weights, also of VGG-16.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from side_by_side.floors import joint_entropy_work, nearest_code_work
from side_by_side.memory import peak_of
from side_by_side.passes import VQGANPasses
from side_by_side.peers import vector_quantize_search
from side_by_side.published_shapes import autocast
from side_by_side.recipes import make_tokenizer
from side_by_side.timing import repeated
from torch import Tensor

from discrete_lit.backbones.execution import count_flops
from discrete_lit.generators.counted_step import count_step
from discrete_lit.tokenizers import VQGAN
from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import Autoencoder
from discrete_lit.tokenizers.quantizers import LookupFreeQuantizer, VectorQuantizer
from gpu_parts.part import Measurement, Setting, part
from gpu_parts.speed import against, measurement

PRECISION = torch.bfloat16
CONVOLUTIONS = "the network's products at the measured bfloat16 rate"
VECTOR_QUANTIZE = "vector-quantize-pytorch"
# Distances of at most so many pairs are held at once by the dense search: 2 GB of float32.
DENSE_PAIRS = 2**29


@part("tokenizers", kind="fast", seconds=16, what="VQ-16 of LlamaGen: encode, decode, a training step")
def tokenizers(setting: Setting) -> Iterator[Measurement]:
    batch, size = (1, 32) if setting.tiny else (64, 256)
    # The discriminator from the first step on, as it is for most of the training.
    tokenizer = make_tokenizer("llamagen_vq16_imagenet256", device=setting.device, tiny=setting.tiny)
    assert isinstance(tokenizer, VQGAN) and tokenizer.objective.adversarial is not None
    tokenizer.objective.adversarial.start_step = 0
    images = torch.rand(batch, 3, size, size, device=setting.device) * 2 - 1
    yield from encode_and_decode(setting, tokenizer, images)
    yield from training_step(setting, tokenizer, images[:16])


def encode_and_decode(setting: Setting, tokenizer: AutoencoderTokenizer, images: Tensor) -> Iterator[Measurement]:
    """Measure both ways with weights and images in both memory formats."""
    device, batch = setting.device, len(images)
    one = tokenizer.encode(images[:1])
    tokens = one.expand(batch, *one.shape[1:])
    z_channels = tokenizer.quantizer.dim
    grid = tuple(tokens.shape[1:])

    def encoding(network: Autoencoder) -> Callable[[], object]:
        return partial(network.encode, torch.zeros(images.shape, device=device))

    def decoding(network: Autoencoder) -> Callable[[], object]:
        return partial(network.decode, torch.zeros(batch, z_channels, *grid, device=device))

    ways: dict[str, tuple[Callable[[], object], Callable[[Autoencoder], Callable[[], object]]]] = {
        "encode": (lambda: tokenizer.encode(images), encoding),
        "decode": (lambda: tokenizer.decode(tokens), decoding),
    }
    for layout, memory_format in {
        "channels last": torch.channels_last,
        "channels first": torch.contiguous_format,
    }.items():
        tokenizer.to(memory_format=memory_format)
        images = images.contiguous(memory_format=memory_format)
        for way, (run, prepare) in ways.items():
            with torch.no_grad(), autocast(device, "bf16-mixed"):
                taken = repeated(run, repeats=1 if setting.tiny else 5, warmup=2)
            flops = count_flops(tokenizer.network, prepare)
            yield measurement(
                setting,
                f"{way}, {layout}",
                f"VQ-16, batch {batch}, {images.shape[2]} pixels, bf16",
                taken,
                amount=tokens.numel(),
                unit="tokens/s",
                least=flops / setting.machine.rate(PRECISION),
                least_of=CONVOLUTIONS,
            )
    tokenizer.to(memory_format=torch.contiguous_format)


def training_step(setting: Setting, tokenizer: VQGAN, images: Tensor) -> Iterator[Measurement]:
    """Measure a step of autoencoder and discriminator, beside the bare passes through their networks."""
    device, batch = setting.device, len(images)
    tokenizer.train()
    tokenizer.objective.prepare()
    optimizer = tokenizer.configure_optimizers()

    def step() -> None:
        with autocast(device, "bf16-mixed"):
            loss, _, _ = tokenizer.loss(images, step=1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    passes = VQGANPasses(tokenizer, images)

    def bare() -> None:
        with autocast(device, "bf16-mixed"):
            passes.run(1)

    repeats = 1 if setting.tiny else 5
    taken, alone = (repeated(run, repeats=repeats, warmup=2) for run in (step, bare))
    memory = peak_of(step) / 2**20
    least = count_step(tokenizer, {"image": images}) / setting.machine.rate(PRECISION)
    yield measurement(
        setting,
        "VQGAN training step",
        f"VQ-16 with PatchGAN and LPIPS, batch {batch}, {images.shape[2]} pixels, bf16",
        taken,
        amount=batch,
        unit="images/s",
        least=least,
        least_of="its products at the measured bfloat16 rate",
        peer=("the bare passes through its networks", alone.median),
        note=f"{memory:,.0f} MB at most above weights and moments; the losses and the discriminator are of float32",
    )


# --- Quantizers ---


@part("quantizers", kind="fast", seconds=8, what="nearest code at 16,384 and 262,144 codes; LFQ's entropy at 2^18")
def quantizers(setting: Setting) -> Iterator[Measurement]:
    latents = 512 if setting.tiny else 64 * 256
    for size, dim in ((256, 8),) if setting.tiny else ((16_384, 8), (262_144, 8), (16_384, 256)):
        yield nearest_code(setting, latents, size, dim)
    yield lookup_free(setting, latents, 8 if setting.tiny else 18)


@torch.no_grad()
def nearest_code(setting: Setting, latents: int, size: int, dim: int) -> Measurement:
    """Measure the search beside the one that holds all distances, and the other package's."""
    quantizer = VectorQuantizer(size, dim, codebook_init="uniform").eval().to(setting.device)
    codes = quantizer.codebook.codes.normal_()
    rows = torch.randn(latents, dim, device=setting.device)
    at_least = 0.0 if setting.tiny else 0.05
    ours = repeated(lambda: quantizer.encode(rows), at_least=at_least)
    memory = peak_of(lambda: quantizer.encode(rows)) / 2**20
    dense = repeated(lambda: dense_search(rows, codes), at_least=at_least)
    differ = int((quantizer.encode(rows) != dense_search(rows, codes)).sum())
    notes = [f"{memory:,.0f} MB at most, {differ} ids unlike the dense search's"]
    if size > 2**16:
        notes.append(f"{VECTOR_QUANTIZE} would hold {4e-9 * latents * size:.0f} GB of distances")
    else:
        theirs, why = against(
            "vector_quantize_pytorch",
            VECTOR_QUANTIZE,
            lambda: repeated(vector_quantize_search(codes, rows), at_least=at_least),
        )
        notes.append(why if theirs is None else f"{VECTOR_QUANTIZE} {1e3 * theirs.median:.3g} ms")
    work = nearest_code_work(latents, size, dim)
    least = work.seconds(bandwidth=setting.machine.bandwidth, rate=setting.machine.rate(torch.float32))
    return measurement(
        setting,
        "nearest code",
        f"{latents:,} latents, K = {size:,}, D = {dim}, float32",
        ours,
        least=least,
        least_of="one product of all pairs at the measured float32 rate",
        peer=("dense distances", dense.median),
        note="; ".join(notes),
    )


def dense_search(latents: Tensor, codes: Tensor) -> Tensor:
    """Find the nearest codes by their distances, in chunks whose distances fit in memory: ids `(n,)`."""
    lengths = codes.square().sum(dim=1)
    chunks = latents.split(max(1, DENSE_PAIRS // len(codes)))
    return torch.cat([torch.addmm(lengths, rows, codes.T, alpha=-2).argmin(dim=1) for rows in chunks])


def lookup_free(setting: Setting, latents: int, bits: int) -> Measurement:
    """Measure LFQ's losses in training, forward and backward, beside the other package's on fewer vectors."""
    quantizer = LookupFreeQuantizer(bits).train().to(setting.device)
    rows = torch.randn(1, latents, bits, device=setting.device)
    at_least = 0.0 if setting.tiny else 0.05

    def losses(inputs: Tensor) -> None:
        inputs = inputs.detach().requires_grad_()
        torch.stack(list(quantizer(inputs).losses.values())).sum().backward()

    ours = repeated(lambda: losses(rows), at_least=at_least)
    memory = peak_of(lambda: losses(rows)) / 2**20
    few, each = rows[:, : min(latents, 1024)], ours.median / latents
    theirs, why = against(
        "vector_quantize_pytorch", VECTOR_QUANTIZE, lambda: _their_lookup_free(setting, few, bits, each)
    )
    notes = [f"{memory:,.0f} MB at most", theirs or why]
    work = joint_entropy_work(latents, bits)
    least = work.seconds(bandwidth=setting.machine.bandwidth, rate=setting.machine.rate(torch.float32))
    return measurement(
        setting,
        "LFQ, losses and their gradient",
        f"{latents:,} latents of {bits} bits, float32",
        ours,
        least=least,
        least_of="three products of the halves of the bits at the measured float32 rate, or their reads",
        note="; ".join(notes),
    )


def _their_lookup_free(setting: Setting, rows: Tensor, bits: int, ours: float) -> str:
    """What vector-quantize-pytorch takes for each vector, on few: it holds the probability of every code for each."""
    from vector_quantize_pytorch import LFQ

    theirs = LFQ(dim=bits, entropy_loss_weight=0.1, commitment_loss_weight=0.25).train().to(setting.device)

    def losses() -> None:
        theirs(rows.detach().requires_grad_())[2].backward()

    each = repeated(losses, repeats=3).median / rows.shape[1]
    return f"{VECTOR_QUANTIZE} on {rows.shape[1]:,}: {1e6 * each:.3g} us a vector, {each / ours:.3g} times ours"
