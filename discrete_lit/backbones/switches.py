"""Which switches of the transformer go together."""

from discrete_lit.backbones.backbone import SequenceLayout
from discrete_lit.backbones.embedding import InputKind


def check_switches(
    layout: SequenceLayout,
    width: int,
    depth: int,
    heads: int,
    head_dim: int | None,
    norm_first: bool,
    modulated: bool,
    condition_positions: bool,
    shared_modulation: bool,
    condition_width: int | None,
    prefix: bool,
) -> None:
    if head_dim is None and width % heads:
        raise ValueError(f"width={width} is not a multiple of heads={heads}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if modulated and not norm_first:
        raise ValueError("norm_first=false has no modulation: conditioning must be 'prefix'")
    if (condition_positions or shared_modulation) and not modulated:
        raise ValueError("condition_positions and shared_modulation need conditioning='adaln' or 'prefix_adaln'")
    if condition_width is not None and (prefix or condition_positions or shared_modulation):
        raise ValueError("condition_width is of conditioning='adaln' with neither offsets nor a shared modulation")
    if layout.timed and not modulated:
        raise ValueError("a generator that tells the time needs conditioning='adaln' or 'prefix_adaln'")
    if (layout.attention == "block_causal") != bool(layout.scales):
        raise ValueError(f"{layout.attention} attention does not go with scales={layout.scales}")
    if layout.scales and (layout.scales[0] != 1 or sum(layout.scales) != layout.places):
        raise ValueError(f"scales={layout.scales} must begin with 1 and add up to the {layout.places} places")


def check_layout(
    layout: SequenceLayout, depth: int, target_positions: bool, embedding: InputKind, tied: bool, long_skips: bool
) -> None:
    if target_positions and layout.attention != "causal":
        raise ValueError(f"target_positions belong to a causal sequence, this one is {layout.attention}")
    if tied and (layout.input_dim is not None or embedding != "table"):
        raise ValueError("tied=true needs a table of token embeddings")
    if long_skips and depth % 2 == 0:
        raise ValueError(f"long_skips join the two halves around a middle block: depth must be odd, got {depth}")
    if layout.parts > 1 and layout.attention != "bidirectional":
        raise ValueError(
            f"several ids at a place need bidirectional attention, this sequence is {layout.attention}: a place_head "
            "predicts the parts of an id"
        )


def check_place_head(layout: SequenceLayout, head_transform: bool, head_bias: bool | str | None) -> None:
    if layout.attention != "causal":
        raise ValueError(f"a place_head predicts the next id of a causal sequence, this one is {layout.attention}")
    if head_transform or head_bias is not None:
        raise ValueError("head_transform and head_bias belong to logits of all ids: a place_head has its own")
