"""xAR, of OliverRensu/xAR: next-cell prediction of KL-16's latents by flow matching."""

from math import isqrt

import torch
from torch import Tensor

from discrete_lit.backbones.cell_transformer import CellLayout
from discrete_lit.backbones.embeddings import grid_coordinates, rotary_table
from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, arrange, register, reorder_chunks
from discrete_lit.pretrained.layouts import IN_TRAINING, class_count, in_blocks, square
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

# Steps and guidance of the published figures: xAR-B, by its width, and the larger two.
_EVALUATION = {768: (40, 2.7), 1024: (50, 2.3), 1280: (50, 2.2)}
_BLOCK = [
    ("attention.query_key_value.{rest}", "attn.qkv.{rest}"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
    ("mlp.expand.{rest}", "mlp.{fc1_g|fc1_x}.{rest}"),
    ("mlp.contract.{rest}", "mlp.fc2.{rest}"),
    ("modulation.project.{rest}", "ada_lin.1.{rest}"),
]
_RULES = [
    ("class_embedding.weight", "class_emb.weight"),
    ("time_embedding.layers.{layer}.{rest}", "time_embed.mlp.{layer}.{rest}"),
    ("input_projection.{rest}", "z_proj.{rest}"),
    ("encoder_positions", "encoder_pos_embed_learned"),
    ("input_norm.{rest}", "z_proj_ln.{rest}"),
    *in_blocks("encoder_blocks.{block}", _BLOCK, ours="encoder.{block}"),
    ("encoder_norm.{rest}", "encoder_norm.{rest}"),
    ("decoder_projection.{rest}", "decoder_embed.{rest}"),
    ("decoder_positions", "decoder_pos_embed_learned"),
    *in_blocks("decoder_blocks.{block}", _BLOCK, ours="decoder.{block}"),
    ("decoder_norm.{rest}", "decoder_norm.{rest}"),
    ("output.{rest}", "pred.{rest}"),
]
# Theirs are two gates, two scales and two shifts; ours shift, scale and gate of the attention, then of the MLP.
_MODULATION = (4, 2, 0, 5, 3, 1)


@register(
    "xar",
    marks=("z_proj_ln.weight", "pred.weight", "mask", "encoder_blocks.0.ada_lin.1.weight"),
    wrappers=("model_ema", "model"),
)
def xar(state: State, settings: Settings) -> Conversion:
    """Convert `xAR-B.pth`, `xAR-L.pth` or `xAR-H.pth`, or a checkpoint of the repository's training."""
    width, channels = state["z_proj.weight"].shape
    length = state["encoder_pos_embed_learned"].shape[1]
    grid = square(state, length)
    cell_side = _cell_side(state, grid)
    layout = CellLayout(
        channels=channels,
        grid=grid,
        cell_size=(cell_side, cell_side),
        num_classes=class_count(state, state["class_emb.weight"]),
    )
    head_dim = state["encoder_blocks.0.attn.rope.freqs_cos"].shape[1]
    if width % head_dim:
        raise ValueError(f"{state.source!r} turns {head_dim} channels of each head, which do not divide its {width}")
    heads = width // head_dim
    depths = {half: state.count(f"{half}_blocks.{{}}") for half in ("encoder", "decoder")}
    hidden = len(state["encoder_blocks.0.mlp.fc1_g.weight"])
    settings.agree(
        {
            "encoder_embed_dim": width,
            "encoder_depth": depths["encoder"],
            "encoder_num_heads": heads,
            "decoder_embed_dim": width,
            "decoder_depth": depths["decoder"],
            "decoder_num_heads": heads,
            "vae_embed_dim": channels,
            "class_num": layout.num_classes,
            "clusters": layout.cells,
        }
    )
    settings.agree({"patch_size": 1}, "every model that is read has")
    ratio = settings.take("mlp_ratio", 4.0)
    if int(width * ratio * 2 / 3) != hidden:
        raise ValueError(f"reference_config has mlp_ratio={ratio}, but the tensors have an inner width of {hidden}")
    stride, side = settings.take("vae_stride", 16), settings.optional("img_size", int)
    if side is not None and side != grid[0] * stride:
        raise ValueError(
            f"reference_config has img_size={side} and vae_stride={stride}, but the tensors have {grid[0]} x {grid[1]} "
            "places"
        )
    settings.without_effect("no norm of the model is made by it", "norm_layer")
    settings.without_effect("nothing reads it", "diffusion_batch_mul")
    settings.without_effect(IN_TRAINING, "attn_dropout", "proj_dropout")
    sampling = settings.section("sampling")
    steps, guidance = _EVALUATION.get(width, (50, 1.0))
    steps = sampling.take("num_steps", steps)
    if steps < 2:
        raise ValueError(f"reference_config has sampling.num_steps={steps}, but at least 2 are needed")
    # Below 1 the code does not guide, and neither does it at 1.
    guidance = max(1.0, float(sampling.take("cfg", guidance)))

    def check_rotations(*tables: Tensor) -> list[Tensor]:
        coordinates = grid_coordinates(grid).T.reshape(1, 2, *grid)
        expected = rotary_table(layout.to_cells(coordinates).flatten(0, 2), head_dim).repeat_interleave(2, dim=1)
        if not all(
            table.shape == expected.shape[:2] and torch.allclose(table.float(), expected[..., part], atol=1e-4)
            for part, table in enumerate(tables)
        ):
            raise ValueError(f"{state.source!r} has other rotations than those of the places in the order of the cells")
        return []

    positions = ("encoder_pos_embed_learned", "decoder_pos_embed_learned")
    arranged = arrange(
        state,
        [
            *(Arrangement([name], [name], lambda table: [table[0]]) for name in positions),
            Arrangement(["mask"], [], lambda mask: []),
            *(
                Arrangement(
                    [f"{half}_blocks.{{block}}.attn.rope.freqs_{part}" for part in ("cos", "sin")], [], check_rotations
                )
                for half in depths
            ),
            *(
                reorder_chunks(f"{half}_blocks.{{block}}.ada_lin.1.{kind}", _MODULATION)
                for half in depths
                for kind in ("weight", "bias")
            ),
        ],
    )
    return Conversion(
        config={
            "class_path": "discrete_lit.generators.NextCell",
            "init_args": {
                "num_classes": layout.num_classes,
                "cell_size": cell_side,
                "backbone": {
                    "class_path": "discrete_lit.backbones.CellTransformer",
                    "init_args": {
                        "width": width,
                        "depth": depths["encoder"],
                        "heads": heads,
                        "decoder_depth": depths["decoder"],
                        "mlp_hidden": hidden,
                    },
                },
                "sampler": {
                    "class_path": "discrete_lit.samplers.NextCellSampler",
                    "init_args": {
                        "solver": {
                            "class_path": "discrete_lit.diffusion.solvers.EulerMaruyama",
                            "init_args": {"steps": steps},
                        },
                        "guidance_scale": guidance,
                    },
                },
                "label_dropout": settings.take("label_drop_prob", 0.1),
            },
        },
        tensors=arranged,
        renaming=Renaming(_RULES),
        dropped=("*.attn.rope.freqs",),
        latents=(channels, *grid),
    )


def _cell_side(state: State, grid: tuple[int, int]) -> int:
    """Read the side of a cell from the mask, `(1, 1, N, N)`: 0 where a place sees another, else minus infinity.

    Raises:
        ValueError: a mask that is no such one.
    """
    seen = (state["mask"] == 0).flatten(0, -2)
    length = grid[0] * grid[1]
    if seen.shape == (length, length):
        places = int(seen[0].sum())
        side = isqrt(places)
        cell = torch.arange(length) // max(places, 1)
        if side > 0 and side**2 == places and not grid[0] % side and torch.equal(seen, cell[:, None] >= cell):
            return side
    raise ValueError(f"{state.source!r} has a 'mask' that is not that of square cells one after another")
