"""Networks of other packages in the sizes of ours, with random weights."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from side_by_side.published_shapes import LLAMAGEN_B, LlamaSizes


def installed(package: str) -> bool:
    """Tell whether a package, by the name that it is imported by, is there to compare with."""
    return importlib.util.find_spec(package) is not None


def x_transformer(sizes: LlamaSizes = LLAMAGEN_B) -> nn.Module:
    """`x-transformers`' decoder of a size: rotary positions, RMSNorm, SwiGLU, flash attention."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=sizes.width,
        depth=sizes.depth,
        heads=sizes.heads,
        attn_dim_head=sizes.width // sizes.heads,
        attn_flash=True,
        rotary_pos_emb=True,
        rotary_emb_dim=sizes.width // sizes.heads,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_mult=sizes.hidden / sizes.width,
        ff_no_bias=True,
    )
    return TransformerWrapper(
        num_tokens=sizes.codes, max_seq_len=sizes.length, attn_layers=layers, use_abs_pos_emb=False
    )


def transformers_llama(device: torch.device, dtype: torch.dtype, sizes: LlamaSizes = LLAMAGEN_B) -> nn.Module:
    """`transformers`' Llama of a size, in eval mode, all of it in one precision."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.codes,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        max_position_embeddings=2 * sizes.length,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        made = LlamaForCausalLM(config).eval()
    return nn.Module.to(made, device=device, dtype=dtype)


def generate(llama: nn.Module, prompt: Tensor, count: int, *, compiled: bool = False) -> Tensor:
    """Draw `count` tokens behind a prompt `(rows, n)` by `transformers`' `generate`, from the whole distribution.

    Its cache is static, as its documentation advises for speed.

    Args:
        llama: of `transformers_llama`.
        prompt: at least one id a row.
        count: of new tokens.
        compiled: let it compile, as it does by itself on a GPU.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return llama.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=True,
            top_k=0,
            cache_implementation="static",
            disable_compile=not compiled,
        )


def vector_quantize_search(codes: Tensor, latents: Tensor) -> Callable[[], Tensor]:
    """The search of vector-quantize-pytorch for the nearest codes in eval mode: its whole forward, which gives ids."""
    from vector_quantize_pytorch import VectorQuantize

    theirs = VectorQuantize(dim=codes.shape[1], codebook_size=len(codes)).eval().to(codes.device)
    theirs._codebook.embed.copy_(codes[None])
    return lambda: theirs(latents[None])[1][0]


def diffusers_dit(*, shared: bool) -> nn.Module:
    """`diffusers`' DiT of the size of DiT-B/2, on latents of 4 x 32 x 32, given one of 1,000 classes.

    Args:
        shared: all blocks use the first's embedding of time and class, as DiT's do; by itself each has its own.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=12,
        attention_head_dim=64,
        num_layers=12,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_eps=1e-6,
    )
    if shared:
        blocks: Any = model.transformer_blocks
        for block in blocks:
            block.norm1.emb = blocks[0].norm1.emb
    return model
