"""Which switches of `Transformer` go together: each check raises a ValueError that names the switches."""

from discrete_lit.backbones.backbone import IdHead, SequenceLayout
from discrete_lit.backbones.embeddings import InputKind


def check_sizes(*, width: int, depth: int, heads: int, head_dim: int | None, long_skips: bool) -> None:
    """Refuse widths and depths that do not divide."""
    if heads < 1 or (head_dim is None and width % heads):
        raise ValueError(f"width={width} is not a multiple of heads={heads}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if long_skips and depth % 2 == 0:
        raise ValueError(f"long_skips join the two halves around a middle block: depth must be odd, got {depth}")


def check_conditioning(
    layout: SequenceLayout,
    *,
    modulated: bool,
    tabled: bool,
    own_width: bool,
    norm_first: bool,
    offsets: bool,
    shared: bool,
    condition_width: int | None,
) -> None:
    """Refuse a conditioning without what it needs."""
    if modulated and not norm_first:
        raise ValueError("norm_first=false has no modulation: conditioning must be 'prefix'")
    if (offsets or shared) and not modulated:
        raise ValueError("condition_positions and shared_modulation need conditioning='adaln' or 'prefix_adaln'")
    if condition_width is not None and (own_width or offsets or shared):
        raise ValueError("condition_width is of conditioning='adaln' with neither offsets nor a shared modulation")
    if layout.timed and not (modulated or tabled):
        raise ValueError("a generator that tells the time needs conditioning='adaln', 'prefix_adaln' or 'adaln_tables'")


def check_context_prefix(
    layout: SequenceLayout, *, places: int, context_dim: int | None, class_alone: bool, plain: bool
) -> None:
    """Refuse vectors in front of a sequence that has something else there."""
    if places < 1 or context_dim is None or layout.attention != "causal" or layout.block_size > 1 or layout.any_order:
        raise ValueError(
            f"context_prefix={places} must be at least 1 and needs a context_dim and a causal sequence of single "
            "positions in one order"
        )
    if not class_alone or not plain:
        raise ValueError(
            "context_prefix stands in front of the sequence in place of the class: it needs conditioning='prefix' "
            "without registers, class_slots, class_repeats, visible_start, target_positions or position_instructions"
        )


def check_context_pool(
    layout: SequenceLayout, *, pool: tuple[int, int] | None, context_dim: int | None, alone: bool
) -> None:
    """Refuse vectors that are pooled to a class where there are none, or where a class stands in several places."""
    if pool is None:
        return
    if context_dim is None or not alone or layout.num_classes > 1 or layout.timed:
        raise ValueError(
            f"context_pool={list(pool)} pools the vectors of a context_dim to one, which takes the place of the class: "
            "it needs num_classes=1, no class_slots, no context_prefix, and no time"
        )


def check_tables(
    layout: SequenceLayout,
    *,
    tabled: bool,
    time_steps: int | None,
    norm_first: bool,
    condition_width: int | None,
    on_grid: bool,
    registers: int,
    in_front: bool,
) -> None:
    """Refuse `conditioning="adaln_tables"` and `mlp_on_grid` where they cannot be."""
    if tabled != (time_steps is not None) or (time_steps is not None and time_steps < 1):
        raise ValueError(
            f"time_steps, at least 1, is of conditioning='adaln_tables' and needed there, got {time_steps}"
        )
    if tabled and (not layout.timed or layout.attention != "bidirectional" or not norm_first or condition_width):
        raise ValueError(
            "conditioning='adaln_tables' needs a generator of bidirectional attention that tells the time "
            "(time_input='time'), norm_first=true, and no condition_width"
        )
    if on_grid and (layout.attention != "bidirectional" or registers or in_front or len(layout.grid) != 2):
        raise ValueError(
            f"mlp_on_grid=true needs a bidirectional sequence of a grid of two axes and nothing else, got "
            f"{layout.attention} attention, a grid of {layout.grid}, {registers} registers and "
            f"{'a' if in_front else 'no'} class in front"
        )


def check_layout(
    layout: SequenceLayout,
    *,
    target_positions: bool,
    target_rotations: bool,
    on_grid: bool,
    tied: bool,
    token_embedding: InputKind,
) -> None:
    """Refuse switches that belong to another kind of sequence."""
    if (layout.attention == "block_causal") != bool(layout.scales):
        raise ValueError(f"{layout.attention} attention does not go with scales={layout.scales}")
    if layout.scales and (layout.scales[0] != 1 or sum(layout.scales) != layout.positions):
        raise ValueError(f"scales={layout.scales} must begin with 1 and add up to the {layout.positions} positions")
    if target_positions and layout.attention != "causal":
        raise ValueError(f"target_positions belong to a causal sequence, this one is {layout.attention}")
    if target_rotations and (layout.attention != "causal" or layout.block_size > 1 or not on_grid):
        raise ValueError(
            "target_rotations belong to a causal sequence of single positions with positions='rope_2d' or "
            "'learned_rope_2d'"
        )
    if tied and (layout.input_dim is not None or token_embedding != "table"):
        raise ValueError("tied=true needs a table of token embeddings")
    several = layout.sub_tokens > 1 and layout.attention != "bidirectional"
    if several and layout.input_dim is None and not layout.delays:
        raise ValueError(
            f"several ids at a position need bidirectional attention, or vectors in their place in the input; this "
            f"sequence is {layout.attention}: a place_head predicts the sub-tokens of an id"
        )


def check_starts(
    layout: SequenceLayout,
    *,
    visible: int,
    registers: int,
    class_alone: bool,
    instructed: bool,
    plain: bool,
    class_slots: int,
    class_repeats: int,
    in_front: bool,
    hidden_positions: bool,
    place_head: bool,
) -> None:
    """Refuse elements in front of the sequence that do not go together."""
    blocks = layout.block_size
    if class_repeats < 1 or (class_repeats > 1 and (visible or not in_front)):
        raise ValueError(
            f"class_repeats={class_repeats} must be at least 1, and more need a class in front of the sequence, "
            "conditioning='prefix' or 'prefix_adaln', without visible_start"
        )
    if instructed and (layout.attention != "causal" or blocks > 1 or visible or not plain):
        raise ValueError(
            "position_instructions=true needs a causal sequence of single positions with positions='rope_2d', without "
            "visible_start, grid_vocab, or what else says where an element stands or what it predicts"
        )
    if visible and (layout.attention != "causal" or registers or not class_alone or class_slots > 1 or blocks > 1):
        raise ValueError(
            f"visible_start={visible} needs a causal sequence that begins with its class alone: "
            "conditioning='prefix', without registers, class_slots or blocks"
        )
    if class_slots < 1 or (class_slots > 1 and not class_alone):
        raise ValueError(f"class_slots={class_slots} must be at least 1, and more than one need conditioning='prefix'")
    if hidden_positions and (not place_head or visible):
        raise ValueError("hidden_positions are added to what a place_head reads, without visible_start: give one")


def check_blocks(layout: SequenceLayout, head: IdHead | None) -> None:
    """Refuse a head of another number of positions than the generator predicts together."""
    found = 1 if head is None else head.block_size
    if found != layout.block_size:
        name = "logits of each position" if head is None else f"{type(head).__name__}(block_size={found})"
        raise ValueError(
            f"the generator predicts {layout.block_size} positions at a time (its block_size), the backbone has "
            f"{name}: set block_size of both alike"
        )


def check_place_head(layout: SequenceLayout, *, head_transform: bool, head_bias: bool | str | None) -> None:
    """Refuse a head that predicts ids otherwise where there are logits."""
    if layout.attention != "causal":
        raise ValueError(f"a place_head predicts the next id of a causal sequence, this one is {layout.attention}")
    if head_transform or head_bias is not None:
        raise ValueError("head_transform and head_bias belong to logits of all ids: a place_head has its own")
