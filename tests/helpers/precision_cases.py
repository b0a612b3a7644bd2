"""Every tokenizer, generator and sampler at a tiny size with random weights, for tests of precision and mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from discrete_lit.backbones import BinaryFlowHead, FactorisedHead, MaskedBitHead, SequenceLayout, Transformer
from discrete_lit.diffusion import (
    DiscretizedGaussianProcess,
    HybridProcess,
    LogLinearSchedule,
    ScoreHead,
    UniformProcess,
)
from discrete_lit.diffusion.losses import ContinuousBound, ScoreEntropy
from discrete_lit.diffusion.solvers import EulerMaruyama
from discrete_lit.generators import Autoregressive, DiscreteDiffusion, Generator, Masked, NextScale
from discrete_lit.samplers import (
    AncestralSampler,
    BARSampler,
    BinaryFlowSampler,
    DiffusionSampler,
    EulerSampler,
    FirstHittingSampler,
    HaltonConfidenceSampler,
    HaltonSampler,
    MaskBitSampler,
    MaskGITSampler,
    NextScaleSampler,
    OpenMAGVIT2Sampler,
    PredictorCorrectorSampler,
    PuritySampler,
    RandARSampler,
    RandomOrderSampler,
    RasterSampler,
    RemaskingSampler,
    Sampler,
    SelfCorrectionSampler,
    SubTokenSettings,
    TauLeapingSampler,
    TiTokSampler,
)
from discrete_lit.tokenizers import (
    DVAE,
    FSQ,
    KLVAE,
    LFQ,
    RQVAE,
    VQGAN,
    VQVAE,
    Characters,
    ColourPalette,
    DimensionwiseTokenizer,
    HybridVQ,
    MultiScaleVQ,
    PixelLevels,
    TiTok,
    TokenGrid,
)
from discrete_lit.tokenizers.losses import AdversarialLoss
from discrete_lit.tokenizers.losses.discriminators import PatchGAN
from discrete_lit.tokenizers.losses.perceptual import LPIPS
from discrete_lit.tokenizers.networks import ConvAutoencoder, ViTAutoencoder
from discrete_lit.tokenizers.networks.vit import TransformerSize
from discrete_lit.tokenizers.quantizers import (
    BinarySphericalQuantizer,
    GumbelQuantizer,
    IndexBackpropagationQuantizer,
    SimVectorQuantizer,
    VectorQuantizer,
)
from discrete_lit.tokenizers.titok import TiTokAutoencoder
from helpers.random_weights import randomise

SIDE = 16
SIZE = TransformerSize(width=32, depth=1, heads=2)


def convolutional(code_dim: int, latent_dim: int, **settings: Any) -> ConvAutoencoder:
    tiny = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "norm_groups": 4, "attention": False}
    return ConvAutoencoder(code_dim, latent_dim, **{**tiny, **settings})


def adaptive(code_dim: int, latent_dim: int) -> ConvAutoencoder:
    return convolutional(code_dim, latent_dim, adaptive_norm=True, attention=True)


def distribution(code_dim: int, latent_dim: int) -> ConvAutoencoder:
    return convolutional(code_dim, latent_dim, out_channels=6)


def vit(code_dim: int, latent_dim: int) -> ViTAutoencoder:
    return ViTAutoencoder(code_dim, latent_dim, encoder=SIZE, decoder=SIZE, patch_size=8)


def titok(code_dim: int, latent_dim: int) -> TiTokAutoencoder:
    return TiTokAutoencoder(
        code_dim, latent_dim, image_size=SIDE, latent_tokens=4, patch_size=8, encoder=SIZE, decoder=SIZE
    )


def adversarial() -> AdversarialLoss:
    return AdversarialLoss(PatchGAN(width=8, layers=1, norm="sync"), lecam_weight=0.1, r1_weight=0.1, r1_every=1)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "VQVAE": lambda: VQVAE(convolutional, 8, code_dim=3, codebook_init="normal", revive_below=0.1),
    "VQVAE on the sphere, ViT": lambda: VQVAE(
        vit, 8, code_dim=4, codebook_init="normal", codebook_update="gradient", normalize=True, gradient="rotation"
    ),
    "VQGAN": lambda: VQGAN(
        adaptive,
        VectorQuantizer(8, 3, codebook_init="normal", entropy_weight=0.1),
        perceptual_loss=LPIPS("random"),
        adversarial_loss=adversarial(),
    ),
    "VQGAN with SimVQ": lambda: VQGAN(convolutional, SimVectorQuantizer(8, 3)),
    "VQGAN with IBQ": lambda: VQGAN(convolutional, IndexBackpropagationQuantizer(8, 3)),
    "VQGAN with Gumbel-softmax": lambda: VQGAN(convolutional, GumbelQuantizer(8, 3)),
    "VQGAN with BSQ": lambda: VQGAN(convolutional, BinarySphericalQuantizer(4)),
    "RQVAE": lambda: RQVAE(convolutional, 8, code_dim=3, depth=2, codebook_init="normal"),
    "MultiScaleVQ": lambda: MultiScaleVQ(convolutional, 8, code_dim=3, scales=[1, 2, 8]),
    "HybridVQ": lambda: HybridVQ(convolutional, 8, code_dim=3, scales=[1, 2, 8]),
    "LFQ": lambda: LFQ(convolutional, 4),
    "FSQ": lambda: FSQ(convolutional, [4, 3, 5]),
    "DVAE": lambda: DVAE(distribution, 8, code_dim=3),
    "TiTok": lambda: TiTok(titok, VectorQuantizer(8, 4, codebook_init="normal", normalize=True)),
    "PixelLevels": lambda: PixelLevels(levels=256),
    "PixelLevels, grey": lambda: PixelLevels(levels=16, grey=True),
    "ColourPalette": lambda: ColourPalette([[-0.9, 0.1, 0.3], [0.7, 0.2, -0.5], [0.0, 0.9, 0.9]]),
    "Characters": lambda: Characters(),
    "TokenGrid": lambda: TokenGrid(8, (2, 3)),
    "KLVAE": lambda: KLVAE(convolutional, latent_channels=4, kl_weight=1e-6),
    "DimensionwiseTokenizer": lambda: DimensionwiseTokenizer(
        KLVAE(convolutional, latent_channels=4, kl_weight=1e-6), 16
    ),
}


def make_tokenizer(name: str, spread: float = 0.3) -> Any:
    torch.manual_seed(0)
    module = TOKENIZERS[name]()
    randomise(module, spread)
    if hasattr(module, "objective"):
        module.objective.prepare()
    return module.eval()


GRID = (2, 3)


def network(**switches: Any) -> Callable[[SequenceLayout], Transformer]:
    return lambda layout: Transformer(layout, width=16, depth=2, heads=2, **switches)


def parts(block: Any, vocab_size: int) -> FactorisedHead:
    return FactorisedHead(block, vocab_size, sizes=(2, 4), depth=1)


def bits(block: Any, vocab_size: int) -> MaskedBitHead:
    return MaskedBitHead(block, vocab_size, width=12, depth=1)


def flow(block_size: int) -> Callable[[Any, int], BinaryFlowHead]:
    solver = EulerMaruyama(4, last_step=0.05, last_drift="velocity")
    settings: Any = {"width": 16, "depth": 2, "modulations": 1, "block_size": block_size, "solver": solver}
    return lambda block, vocab_size: BinaryFlowHead(block, vocab_size, **settings)


def bit_dance(block_size: int) -> Generator:
    switches: Any = {"class_slots": 2, "token_embedding": "bits_mlp", "embedding_norm": "rms", "norm": "rms"}
    return on_grid(
        Autoregressive,
        block_size=block_size,
        perturb_rate=0.2,
        sampler=BinaryFlowSampler(guidance_scale=2.0),
        backbone=network(**switches, hidden_positions=True, place_head=flow(block_size)),
    )


def on_grid(kind: type[Generator], **settings: Any) -> Generator:
    fixed = {"tokenizer": TokenGrid(8, GRID), "image_size": 4, "num_classes": 2}
    return kind(**{**fixed, "backbone": network(), **settings})


def levels() -> TokenGrid:
    tokenizer = TokenGrid(8, GRID)
    tokenizer.ordered_ids = True
    return tokenizer


TIMED = {"backbone": network(conditioning="adaln", positions="rope_1d"), "time_input": "time"}
GENERATORS: dict[str, Callable[[], Generator]] = {
    "Autoregressive": lambda: on_grid(Autoregressive),
    "Autoregressive, LlamaGen": lambda: on_grid(
        Autoregressive,
        backbone=network(norm="rms", mlp="swiglu", bias=False, positions="rope_2d", start_rotation="zero"),
    ),
    "Autoregressive, RAR": lambda: on_grid(
        Autoregressive,
        order="random_annealed",
        backbone=network(
            conditioning="prefix_adaln", target_positions=True, condition_positions=True, registers=1, qk_norm="layer"
        ),
    ),
    "Autoregressive, Open-MAGVIT2": lambda: on_grid(
        Autoregressive, backbone=network(token_embedding="parts", place_head=parts, norm="rms", mlp="swiglu")
    ),
    "Autoregressive, BAR": lambda: on_grid(
        Autoregressive, backbone=network(token_embedding="bits", place_head=bits, norm="rms", qk_norm="rms")
    ),
    "Autoregressive, RandAR": lambda: on_grid(
        Autoregressive,
        order="random",
        backbone=network(norm="rms", mlp="swiglu", positions="rope_2d", position_instructions=True),
    ),
    "Autoregressive, BitDance": lambda: bit_dance(1),
    "Autoregressive, BitDance in blocks": lambda: bit_dance(3),
    "Masked": lambda: on_grid(Masked, sampler=MaskGITSampler(steps=3)),
    "Masked, BERT": lambda: on_grid(
        Masked,
        sampler=MaskGITSampler(steps=3),
        backbone=network(norm_first=False, embedding_norm=True, head_transform=True, tied=True),
    ),
    "Masked, MaskBit": lambda: on_grid(
        Masked,
        tokenizer=TokenGrid(16, GRID),
        bit_groups=2,
        sampler=MaskBitSampler(steps=3, guidance_scale=1.0),
        backbone=network(token_embedding="bits", norm_first=False, head_bias="place"),
    ),
    "Masked, Halton-MaskGIT": lambda: on_grid(
        Masked,
        sampler=HaltonSampler(steps=3),
        backbone=network(conditioning="adaln", norm="rms", qk_norm="full_rms", registers=1, tied=True, mlp="swiglu"),
    ),
    "NextScale": lambda: NextScale(
        tokenizer=make_tokenizer("MultiScaleVQ"),
        image_size=SIDE,
        num_classes=2,
        backbone=network(
            conditioning="prefix_adaln", attention_bias="query_value", qk_norm="unit", shared_modulation=True
        ),
    ),
    "DiscreteDiffusion": lambda: on_grid(DiscreteDiffusion, **TIMED),
    "DiscreteDiffusion, SEDD": lambda: on_grid(
        DiscreteDiffusion,
        backbone=network(conditioning="adaln", condition_width=8, positions="rope_1d"),
        schedule=LogLinearSchedule(),
        head=ScoreHead(),
        loss=ScoreEntropy(),
        time_input="total_noise",
    ),
    "DiscreteDiffusion, uniform": lambda: on_grid(
        DiscreteDiffusion, process=UniformProcess, loss=ContinuousBound(), **TIMED
    ),
    "DiscreteDiffusion, hybrid": lambda: on_grid(
        # Learned positions tell elements apart also in a sequence of equal ids, where a sampler would have to choose
        # between elements that only rounding tells apart.
        DiscreteDiffusion,
        process=lambda size: HybridProcess(size, 0.5),
        loss=ContinuousBound(),
        backbone=network(conditioning="adaln"),
        time_input="time",
    ),
    "DiscreteDiffusion, Gaussian": lambda: on_grid(
        DiscreteDiffusion,
        tokenizer=levels(),
        process=lambda size: DiscretizedGaussianProcess(size, 0.3),
        loss=ContinuousBound(),
        schedule=LogLinearSchedule(),
        **TIMED,
    ),
}


def make_generator(name: str, spread: float = 0.3) -> Generator:
    torch.manual_seed(0)
    generator = GENERATORS[name]()
    randomise(generator.backbone, spread)
    head: nn.Module | None = generator.backbone.place_head
    if head is not None:
        randomise(head, spread / 3)  # its conditions and inputs multiply
    return generator.eval()


SAMPLERS: dict[str, tuple[str, Callable[[], Sampler]]] = {
    "RasterSampler": ("Autoregressive", lambda: RasterSampler(guidance_scale=2.0)),
    "BARSampler": ("Autoregressive, BAR", lambda: BARSampler(bit_counts=(1, 2))),
    "RandARSampler": ("Autoregressive, RandAR", lambda: RandARSampler(3, guidance_scale=2.0)),
    "BinaryFlowSampler": ("Autoregressive, BitDance", lambda: BinaryFlowSampler(guidance_scale=2.0)),
    "OpenMAGVIT2Sampler": (
        "Autoregressive, Open-MAGVIT2",
        lambda: OpenMAGVIT2Sampler(parts=[SubTokenSettings(guidance_scale=2.0), SubTokenSettings(top_k=3)]),
    ),
    "MaskGITSampler": ("Masked", lambda: MaskGITSampler(steps=3, guidance_scale=2.0)),
    "TiTokSampler": ("Masked, BERT", lambda: TiTokSampler(steps=3)),
    "MaskBitSampler": ("Masked, MaskBit", lambda: MaskBitSampler(steps=3)),
    "HaltonSampler": ("Masked, Halton-MaskGIT", lambda: HaltonSampler(steps=3, top_p=0.9)),
    "HaltonConfidenceSampler": ("Masked, Halton-MaskGIT", lambda: HaltonConfidenceSampler(steps=3)),
    "RandomOrderSampler": ("Masked", lambda: RandomOrderSampler(steps=3)),
    "NextScaleSampler": ("NextScale", lambda: NextScaleSampler(guidance_scale=2.0)),
    "DiffusionSampler": ("DiscreteDiffusion, SEDD", lambda: DiffusionSampler(steps=4, guidance_law="score")),
    "AncestralSampler": ("DiscreteDiffusion, uniform", lambda: AncestralSampler(steps=4, guidance_scale=2.0)),
    "EulerSampler": ("DiscreteDiffusion, hybrid", lambda: EulerSampler(steps=4)),
    "TauLeapingSampler": ("DiscreteDiffusion, Gaussian", lambda: TauLeapingSampler(steps=4)),
    "FirstHittingSampler": ("DiscreteDiffusion", lambda: FirstHittingSampler()),
    "PuritySampler": ("DiscreteDiffusion", lambda: PuritySampler(4, purity_weight=0.5)),
    "RemaskingSampler": ("DiscreteDiffusion", lambda: RemaskingSampler(steps=4, strategy="conf")),
    "SelfCorrectionSampler": (
        "DiscreteDiffusion, hybrid",
        lambda: SelfCorrectionSampler(correction_steps=4, correction_tokens=3, steps=4),
    ),
    "PredictorCorrectorSampler": (
        "DiscreteDiffusion, uniform",
        lambda: PredictorCorrectorSampler(corrector="gibbs", steps=4),
    ),
}


def make_sampled(name: str) -> tuple[Generator, Sampler]:
    """The generator that a sampler draws from, and the sampler."""
    generator, build = SAMPLERS[name]
    return make_generator(generator), build()
