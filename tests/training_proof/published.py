"""What the authors' training code does, for each recipe that names a published number; read from the code itself.

Commits: LlamaGen ce98ec41, VAR 78b95394, vaex c08db77e, 1d-tokenizer 942a96fb, maskbit 5ea3d733, Halton-MaskGIT
f61b0a13, SEED-Voken b9a17eac, rq-vae-transformer 341395e5, SEDD 0605786d, md4 b9fbf292, maskgit 1db23594,
latent-diffusion a506df57, taming-transformers 3ba01b24, google-research (d3pm) 30adf0ec, mar fe470ac2, xAR 121e9c93,
TokenBridge 3ede2818, DiT ed81ce22, BitDance 4c5ea901, VQ-Diffusion d1d39487, GIDD f67acc96. SiT's training is taken
from DiT's code, which it is built on. BAR faf903f.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

from training_proof import crops, laws
from training_proof import initial_weights as initial
from training_proof.crops import Law
from training_proof.initial_weights import Kind
from training_proof.laws import Average, Decays, Schedule

# What stands in a cell in place of a law.
NOT_PUBLISHED = "not published"
OURS = "our choice"
# Of `training_proof.losses`.
BY_FORMULA = "the loss and its gradient by their formula"
LOGITS = f"logits; {BY_FORMULA}"


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A case of the reference outputs: what the authors' own code gave.

    Attributes:
        family: of the case.
        losses: outputs that are losses.
        gradients: how many of its gradients are compared.
        outputs: of a case without a loss, what is compared instead.
    """

    family: str
    losses: tuple[str, ...] = ("loss",)
    gradients: int = 0
    outputs: str = ""


@dataclass(frozen=True, kw_only=True)
class Published:
    """The authors' training. A string in place of a law is what the table says instead.

    Attributes:
        golden: what holds our loss and gradient against theirs.
        rate: the full learning rate.
        schedule: its ratio at each step.
        clip: of the gradient's norm; None for none.
        decay: the weight decay.
        decays: which parameters it acts on; None for none.
        last_decay: where it goes to along half a cosine; None where it stays.
        crop: the law of the training crop, or which stored crops training reads.
        images: widths and heights for the chi-squared test.
        average: decay of the EMA at each update; None for none.
        weights: what the network begins with.
        differs: by column, why ours is another.
    """

    golden: Golden | str
    rate: float = 0.0
    schedule: Schedule | str
    clip: float | None = None
    decay: float = 0.0
    decays: Decays | str | None = None
    last_decay: float | None = None
    crop: Law | str
    images: Sequence[tuple[int, int]] = crops.IMAGES
    average: Average | str | None
    weights: Sequence[Kind] | str
    differs: dict[str, str] = field(default_factory=dict)


# Which parameters decay, in the authors' words where a name of ours stands for one of theirs.
_TABLES = r"table|class_embedding|positions|start|registers|target_embedding"
# minGPT: linear layers alone.
_MINGPT = laws.without(laws.matrices, _TABLES)
# VAR: all but one-dimensional ones, the start token, positions and levels (one table here), `scale_mul`.
_VAR = laws.without(laws.matrices, r"positions|start")
# 1d-tokenizer: no "ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed" in the name.
_1D_TOKENIZER = laws.without(laws.matrices, r"embedding|table|positions|norm|mask")
# RAR: the same, but `cls_token` (our start) decays, and `adaln_before_head` has an "ln" in its name.
_RAR = laws.without(laws.matrices, r"embedding|final_modulation|positions")
# BAR: RAR's words in the name in lower case, so that each `adaLN_modulation` has an "ln" too; its head's output and
# embedding of the mask ratio are an `output_embed` and a `t_embedder`.
_BAR = laws.without(
    laws.matrices,
    r"table|class_embedding|target_embedding|positions|bit_embedding|ratio_embedding|modulation|place_head\.output",
)
_TITOK = laws.without(laws.matrices, r"quantizer|codebook|tokens?$|embedding|positions")
# MAR: none with `diffloss` in the name.
_NO_DIFFLOSS = laws.without(laws.matrices, r"^head\.")
# BitDance: none of `proj_in`, `cls_embedding` and `query_token`.
_BITDANCE_MATRICES = laws.without(laws.matrices, r"token_embedding|class_embedding|queries")

_RESIZED = crops.random_crop()
_MIRRORED = crops.mirrored(_RESIZED)
_CENTER = crops.mirrored(crops.center_crop)
TEN = "one of ten stored crops"
FLIP = "the stored centre crop or its mirror image"
STORED = "the stored centre crop"
TEXT = "chunks of text"
_TINY_IMAGES = ((crops.SIZE, crops.SIZE),)


def _all_columns(value: str) -> Published:
    """Make an entry that says the same in every column."""
    return Published(golden=value, schedule=value, decays=value, crop=value, average=value, weights=value)


# Nothing but weights, sampling or a paper.
_UNRELEASED = _all_columns(NOT_PUBLISHED)
_TAMING_VQGAN = Published(
    golden=Golden(family="taming_vqgan", losses=("emb_loss",), gradients=4),
    rate=4.5e-6 * 96,
    schedule=laws.constant(),
    crop=_RESIZED,
    average=None,
    weights=initial.TAMING_VQGAN,
)
_SEED_VOKEN = Published(
    golden=Golden(family="ibq", losses=("quant_loss_raw", "entropy_loss_raw")),
    rate=1e-4,
    schedule=laws.drops(250 * 5004, 300 * 5004),
    crop=_RESIZED,
    average=laws.fixed(0.999),
    weights=initial.IBQ_VQGAN,
)
_TITOK_STAGE_1 = Published(
    golden=Golden(family="titok", losses=(), outputs="ids and images"),
    rate=1e-4,
    schedule=laws.cosine(10_000, 1_000_000, 0.1),
    clip=1.0,
    decay=1e-4,
    decays=_TITOK,
    crop=_MIRRORED,
    average=laws.counted_before(0.999),
    weights=initial.TITOK,
)
_LLAMAGEN = Published(
    golden=Golden(family="llamagen_gpt_c2i", losses=(), outputs=LOGITS),
    rate=1e-4,
    schedule=laws.constant(),
    clip=1.0,
    decay=0.05,
    decays=laws.matrices,
    crop=TEN,
    average=None,
    weights=initial.LLAMAGEN,
)
_IBQ_AR = Published(
    golden=Golden(family="ibq_ar", gradients=4),
    rate=3e-4,
    schedule=laws.var_line(6, 300, 768, 0.1),
    clip=1.0,
    decay=0.05,
    decays=laws.matrices,
    crop=_RESIZED,
    average=None,
    weights=initial.IBQ,
)
_VAR_D16 = Published(
    golden=Golden(family="var_transformer", losses=(), outputs=LOGITS),
    rate=3e-4,
    schedule=laws.var_line(4, 200, 768, 0.1),
    clip=2.0,
    decay=0.05,
    decays=_VAR,
    crop=crops.random_crop(1.125),
    average=None,
    weights=initial.var(1e-3),
)
_MAR = Published(
    golden=Golden(family="mar", losses=("diff_loss",)),
    rate=8e-4,
    schedule=laws.constant(62_500),
    clip=3.0,
    decay=0.02,
    decays=_NO_DIFFLOSS,
    crop=_CENTER,
    average=laws.fixed(0.9999),
    weights=initial.MAR,
)
_DIT = Published(
    golden=Golden(family="dit"),
    rate=1e-4,
    schedule=laws.constant(),
    crop=_CENTER,
    average=laws.fixed(0.9999),
    weights=initial.DIT,
)
_SEDD = Published(
    golden=Golden(family="sedd_absorb"),
    rate=3e-4,
    schedule=laws.constant(2500),
    clip=1.0,
    crop=TEN,
    average=laws.counted_after(0.9999),
    weights=initial.SEDD,
)
_D3PM = Published(
    golden=f"✓ {BY_FORMULA}",
    rate=2e-4,
    schedule=laws.constant(),
    clip=693.1,  # theirs is 1, of bits of a step: 1000 ln 2 times smaller
    crop=_CENTER,
    images=_TINY_IMAGES,
    average=laws.fixed(0.9999),
    weights=OURS,
)
# Of its text model; the bound is that of pixels too.
_MD4_LOSSES = Golden(family="md4", losses=("loss", "loss_diff", "loss_recon", "diffusion_loss"), gradients=4)
_BITDANCE_B = Published(
    golden=Golden(family="bitdance", losses=("loss", "loss_eval"), gradients=7),
    rate=6e-4,
    schedule=laws.cosine(20_000, 1_000_000, 1 / 60),
    clip=1.0,
    decay=0.05,
    decays=_BITDANCE_MATRICES,
    crop=crops.mirrored(crops.adm_random_crop(0.8)),
    average=laws.fixed(0.9999),
    weights=initial.BITDANCE,
)

# By the names of recipes, in which `*` stands for anything; the first that matches.
PUBLISHED: dict[str, Published] = {
    "tokenizers/hart_*": replace(
        _UNRELEASED,
        golden=Golden(family="hart_tokenizer", losses=("loss_total", "loss_recon", "vq_loss"), gradients=4),
    ),
    "tokenizers/ibq_*": _SEED_VOKEN,
    "tokenizers/magvit2_lfq18_*": replace(
        _SEED_VOKEN,
        golden=Golden(family="magvit2_lfq", losses=("train_entropy_loss_raw",)),
        schedule=laws.drops(200 * 5004, 250 * 5004),
        weights=initial.WITHOUT_CODES,
    ),
    "tokenizers/kl16_*": replace(
        _TAMING_VQGAN,
        golden=Golden(family="va_vae", losses=("loss_early", "loss_late", "disc_loss"), gradients=6),
        rate=4.5e-6 * 192,
        crop=crops.random_crop(1.5),
        weights=initial.WITHOUT_CODES,
    ),
    "tokenizers/ldm_f8_*": replace(_TAMING_VQGAN, rate=4.5e-6 * 80, crop=crops.random_crop(1.5)),
    "tokenizers/llamagen_vq16_*": replace(
        _TAMING_VQGAN,
        golden=Golden(family="llamagen_vq", losses=("train_vq_loss", "train_commit_loss", "train_entropy_loss")),
        rate=1e-4,
        clip=1.0,
        crop=crops.mirrored(crops.adm_random_crop(0.8)),
        weights=initial.LLAMAGEN_VQ,
    ),
    "tokenizers/rqvae_*": replace(
        _TAMING_VQGAN,
        golden=Golden(family="rq_vae", losses=("loss_total", "loss_recon", "quant_loss"), gradients=3),
        rate=4e-5,
        schedule=laws.constant(5005),
        crop=_MIRRORED,
        weights=initial.WITHOUT_CODES,
    ),
    "tokenizers/taming_f16_*": _TAMING_VQGAN,
    "tokenizers/titok_*_stage1_*": _TITOK_STAGE_1,
    "tokenizers/titok_*_stage2_*": replace(
        _TITOK_STAGE_1, schedule=laws.cosine(5000, 500_000, 0.1), weights="those of stage 1"
    ),
    "tokenizers/va_vae_*": replace(
        _UNRELEASED,
        golden=Golden(family="va_vae", losses=("loss_early", "loss_late", "disc_loss"), gradients=6),
        schedule=OURS,
        decays=OURS,
        crop=OURS,
        average=OURS,
        weights=initial.WITHOUT_CODES,
    ),
    "tokenizers/var_*": replace(
        _UNRELEASED,
        golden=Golden(family="var_vqvae", losses=(), outputs="ids and images"),
        rate=3e-4,
        schedule=laws.vaex_cosine(4170, 417_000, 0.3),
        clip=10.0,
        decay=5e-3,
        decays=laws.vaex_decays,
        crop=crops.random_crop(1.125),
        average=laws.vaex_average(0.9999),
        weights=initial.VAEX,
    ),
    "tokenizers/vit_vqgan_*": _UNRELEASED,
    "generators/bar_b_*": Published(
        golden=Golden(family="bar", gradients=5),
        rate=4e-4,
        schedule=laws.cosine(62_500, 250_000, 0.025),
        clip=16.0,  # theirs is 1, of a mean over 16 bits
        decay=0.03,
        decays=_BAR,
        crop=FLIP,
        average=None,
        weights=initial.BAR,
    ),
    "generators/bitdance_b_4x_*": replace(
        _BITDANCE_B, golden=Golden(family="bitdance_parallel", losses=("loss", "loss_eval"), gradients=8)
    ),
    "generators/bitdance_b_*": _BITDANCE_B,
    "generators/char_text": Published(
        golden=_MD4_LOSSES,
        rate=5e-4,
        schedule=laws.cosine(2000, 1_000_000),
        decay=0.03,
        decays=laws.all_decay,
        crop=TEXT,
        average=laws.fixed(0.9999),
        weights=OURS,
    ),
    "generators/d3pm_gaussian": replace(_D3PM, golden=OURS),
    "generators/d3pm_*": _D3PM,
    "generators/discon_*": _UNRELEASED,
    "generators/muse_*": _UNRELEASED,
    "generators/dit_*": _DIT,
    "generators/sit_*": replace(_DIT, golden=Golden(family="sit", gradients=4)),
    "generators/gidd_*": Published(
        golden=Golden(family="gidd", losses=("loss_dynamic", "loss_clip", "loss_none"), gradients=4),
        rate=5e-4,
        schedule=laws.cosine(10_000, 500_000, 0.1),
        clip=1.0,
        decay=0.02,
        decays=laws.all_decay,
        crop=TEXT,
        average=None,
        weights=_SEDD.weights,
    ),
    "generators/halton_*": Published(
        golden=Golden(family="halton_maskgit", losses=(), outputs=LOGITS),
        rate=1e-4,
        schedule=laws.last_tenth(2500, 1_500_000),
        clip=1.0,
        decay=0.03,
        decays=laws.all_decay,
        crop=STORED,
        average=None,
        weights=initial.HALTON,
    ),
    "generators/hart_*": replace(_UNRELEASED, golden=Golden(family="hart", losses=("diff_loss",), gradients=3)),
    "generators/ibq_ar_*": _IBQ_AR,
    "generators/open_magvit2_ar_*": replace(
        _IBQ_AR,
        golden=Golden(family="open_magvit2_ar", losses=("loss", "loss_pre", "loss_post"), gradients=4),
        weights=initial.LLAMAGEN,
    ),
    "generators/ldm8_*": Published(
        golden=Golden(family="ldm", gradients=3),
        rate=1e-6 * 64,
        schedule=laws.constant(),
        decay=0.01,
        decays=laws.all_decay,
        crop=_RESIZED,
        average=laws.counted_after(0.9999),
        weights=initial.LDM,
    ),
    "generators/llamagen_*": _LLAMAGEN,
    "generators/mar_*": _MAR,
    "generators/maskbit_*": Published(
        golden=Golden(family="maskbit_lfqbert", losses=(), outputs=LOGITS),
        rate=1e-4,
        schedule=laws.cosine(5000, 1_350_000, 0.1),
        clip=1.0,
        decay=0.045,
        decays=laws.all_decay,
        crop=crops.mirrored(crops.random_resized_crop(0.8)),
        images=crops.NEARLY_SQUARE,
        average=laws.counted_before(0.999),
        weights=initial.MASKBIT,
    ),
    "generators/maskgit_*": replace(
        _UNRELEASED,
        golden=Golden(family="maskgit_flax", losses=(), gradients=3, outputs="logits"),
        rate=1e-4,
        schedule=laws.constant(5000),
        average=laws.fixed(0.999),
        weights=initial.CUT_BERT,
    ),
    "generators/md4_cifar10": replace(
        _D3PM,
        golden=_MD4_LOSSES,
        schedule=laws.cosine(100, 2_000_000),
        clip=None,
        decay=0.01,
        decays=laws.all_decay,
        crop=crops.center_crop,
    ),
    "generators/rar_*": Published(
        golden=Golden(family="rar", losses=(), outputs=LOGITS),
        rate=4e-4,
        schedule=laws.cosine(62_500, 250_000, 0.025),
        clip=1.0,
        decay=0.03,
        decays=_RAR,
        crop=TEN,
        average=None,
        weights=initial.BERT,
    ),
    "generators/sedd_uniform": replace(_SEDD, golden=Golden(family="sedd_uniform")),
    "generators/sedd_*": _SEDD,
    "generators/taming_gpt_*": Published(
        golden=Golden(family="taming_net2net", losses=(), outputs=LOGITS),
        rate=4.5e-6 * 64,
        schedule=laws.constant(),
        decay=0.01,
        decays=_MINGPT,
        crop=_RESIZED,
        average=None,
        weights=initial.TAMING,
    ),
    "generators/titok_l32_generator_*": Published(
        golden=Golden(family="titok_imagebert", losses=(), outputs=LOGITS),
        rate=2e-4,
        schedule=laws.cosine(10_000, 500_000, 0.05),
        clip=1.0,
        decay=0.03,
        decays=_1D_TOKENIZER,
        crop=FLIP,
        average=laws.counted_before(0.999),
        weights=initial.BERT,
    ),
    # The training code of the second stage was not released; its configurations were, and the transform of the data.
    "generators/rq_transformer_*": replace(
        _UNRELEASED,
        golden=Golden(family="rq_transformer", losses=("loss", "loss_soft"), gradients=6),
        rate=5e-4,
        schedule=laws.cosine(0, 100 * laws.IMAGES // 2048),
        clip=1.0,
        decay=1e-4,
        decays=laws.all_decay,
        crop=_MIRRORED,
        average=None,
    ),
    "generators/vq_diffusion_*": Published(
        golden=Golden(family="vq_diffusion", gradients=3),
        rate=4.5e-4,
        schedule=laws.plateau(5000, 100_000, start=3e-6 / 4.5e-4),
        # `ClipGradNorm` clips from its `start_iteration` 0 on; its `end_iteration` 5,000 has no effect.
        clip=0.5,
        decay=0.045,
        decays=laws.all_decay,
        crop=crops.dall_e_crop,
        images=((40, 12), (12, 12)),
        average=laws.every(25, 0.99),
        weights=initial.VQ_DIFFUSION,
    ),
    "generators/tokenbridge_*": replace(
        _MAR,
        golden=Golden(family="tokenbridge", gradients=8),
        rate=4e-4,
        schedule=laws.cosine(62_500, 250_000),
        decays=laws.matrices,
        weights=initial.TOKENBRIDGE,
    ),
    "generators/var_d16_*": _VAR_D16,
    "generators/var_d20_*": replace(_VAR_D16, schedule=laws.var_line(5, 250, 768, 0.1)),
    "generators/var_d24_*": replace(
        _VAR_D16, rate=2.4e-4, schedule=laws.var_line(7, 350, 768, 0.01), weights=initial.var(1e-4)
    ),
    "generators/var_d30_*": replace(
        _VAR_D16, rate=3.2e-4, schedule=laws.var_line(7, 350, 1024, 0.01), last_decay=0.08, weights=initial.var(1e-5)
    ),
    "generators/xar_*": replace(
        _MAR,
        golden=Golden(family="xar", gradients=4),
        rate=4e-4,
        schedule=laws.cosine(62_500, 500_000, 0.025, hold=312_500),
        clip=1.0,
        decays=laws.matrices,
        weights=initial.XAR,
    ),
}


def published(recipe: str) -> Published | None:
    """Find the entry of a recipe; None where there is none yet."""
    return next((entry for pattern, entry in PUBLISHED.items() if fnmatch(recipe, pattern)), None)
