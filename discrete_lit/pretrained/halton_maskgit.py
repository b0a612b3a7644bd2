"""Halton-MaskGIT, of valeoai/Halton-MaskGIT (once valeoai/Maskgit-pytorch): class-conditional masked generators."""

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    class_count,
    generator_conversion,
    head_count,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

# The number of heads, by width; those of width 512 have 85 channels.
_HEADS = {384: 6, 512: 6, 768: 12, 1024: 16}
# Steps of the published evaluation; its guidance differs from model to model.
_STEPS = 32
_BLOCK = [
    ("attention.query_key_value.weight", "attn.{wq|wk|wv}.weight"),
    ("attention.out.weight", "attn.wo.weight"),
    ("attention_norm.weight", "ln1.weight"),
    ("mlp_norm.weight", "ln2.weight"),
    ("mlp.expand.weight", "ff.{w1|w3}.weight"),
    ("mlp.contract.weight", "ff.w2.weight"),
    ("modulation.project.{rest}", "mlp.1.{rest}"),
]
_RULES = [
    ("token_embedding.table.weight", "tok_emb.weight"),
    ("class_embedding.weight", "cls_emb.weight"),
    ("start", "reg_tokens.weight"),
    ("positions.embedding", "pos_emb.weight"),
    *in_blocks("transformer.layers.{block}", _BLOCK),
    ("final_norm.{rest}", "last_norm.norm_final.{rest}"),
    ("final_modulation.project.{rest}", "last_norm.mlp.1.{rest}"),
    ("head.bias", "head.bias"),
]


@register(
    "halton_maskgit",
    marks=("tok_emb.weight", "cls_emb.weight", "reg_tokens.weight", "last_norm.norm_final.weight"),
    wrappers=("model_state_dict",),
)
def halton_maskgit(state: State, settings: Settings) -> Conversion:
    """Convert `ImageNet_256_{tiny,small,base,large}.pth`, or `ImageNet_384_{small,base,large}.pth`.

    The reference has a logit for the mask id too, which no sampled image keeps: ours does not have it.
    """
    rows, width = state["tok_emb.weight"].shape
    vocab_size, length = rows - 1, len(state["pos_emb.weight"])
    grid, registers = square(state, length), len(state["reg_tokens.weight"])
    num_classes, depth = class_count(state, state["cls_emb.weight"]), state.count("transformer.layers.{}")
    found = {
        "input_size": grid[0],
        "hidden_dim": width,
        "codebook_size": vocab_size,
        "depth": depth,
        "nclass": num_classes,
        "register": registers,
    }
    settings.agree(found)
    settings.agree({"proj": 1}, "every published model has")
    settings.without_effect(IN_TRAINING, "dropout")
    inner, hidden = (len(state[f"transformer.layers.0.{name}.weight"]) for name in ("attn.wq", "ff.w1"))
    heads = head_count(settings, "heads", _HEADS.get(width, max(1, width // 64)), inner)
    # The reference rounds two thirds of it up.
    mlp_dim = settings.take("mlp_dim", 4 * width)
    if "mlp_dim" in settings and 256 * -(-(2 * mlp_dim // 3) // 256) != hidden:
        raise ValueError(f"reference_config has mlp_dim={mlp_dim}, but the tensors have {hidden} channels there")
    settings.without_effect("the reference rounds it to what the tensors have", "mlp_dim")
    backbone = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "head_dim": inner // heads,
        "mlp_hidden": hidden,
        "mlp": "swiglu",
        "norm": "rms",
        "norm_epsilon": 1e-5,
        "norm_affine": True,
        "final_norm_bias": True,
        "conditioning": "adaln",
        "registers": registers,
        "qk_norm": "full_rms",
        "bias": False,
        "head_bias": True,
        "tied": True,
    }

    def tied(embedding: Tensor, head: Tensor) -> list[Tensor]:
        if not torch.equal(embedding, head):
            raise ValueError(f"{state.source!r} has 'head.weight' other than 'tok_emb.weight', to which it is tied")
        return [embedding]

    def after_registers(table: Tensor) -> list[Tensor]:
        """Put the registers first: in the published model they come last, without a position."""
        return [torch.cat([table.new_zeros(registers, width), table])[None]]

    arrangements = [
        Arrangement(["tok_emb.weight", "head.weight"], ["tok_emb.weight"], tied),
        Arrangement(["head.bias"], ["head.bias"], lambda bias: [bias[:vocab_size]]),
        Arrangement(["pos_emb.weight"], ["pos_emb.weight"], after_registers),
        Arrangement(["reg_tokens.weight"], ["reg_tokens.weight"], lambda table: [table[None]]),
    ]
    sampling = settings.section("sampler")
    sampling.without_effect(
        "they are settings of the sampler that one samples with",
        *("sched_mode", "sched_pow", "sm_temp", "sm_temp_min", "sm_temp_max", "temp_pow", "temp_warmup"),
        *("randomize", "r_temp", "top_k"),
    )
    sampler = sampled_by("HaltonSampler", steps=sampling.take("step", min(_STEPS, length)), **_guidance(sampling))
    return generator_conversion(
        "Masked",
        state,
        tokens=Tokens(vocab_size, grid),
        num_classes=num_classes,
        backbone=backbone,
        rules=_RULES,
        arrangements=arrangements,
        sampler=sampler,
    )


def _guidance(sampling: Settings) -> dict[str, float]:
    """Return our guidance scale: the reference's w counts from 0."""
    return {"guidance_scale": 1 + sampling.take("w", 0.0)} if "w" in sampling else {}
