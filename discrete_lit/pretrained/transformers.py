"""Published generators: their configuration around the shared transformer, and names that several layouts share."""

from collections.abc import Sequence
from math import isqrt
from typing import Any

from torch import Tensor

from discrete_lit.pretrained.arranging import Arrangement, arrange
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.registry import Conversion, Tokens
from discrete_lit.pretrained.renaming import Renaming

Rules = Sequence[tuple[str, str]]

# timm's names of a block.
TIMM_BLOCK: Rules = (
    ("attention.query_key_value.{rest}", "attn.qkv.{rest}"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
    ("attention_norm.{rest}", "norm1.{rest}"),
    ("mlp_norm.{rest}", "norm2.{rest}"),
    ("mlp.expand.{rest}", "mlp.fc1.{rest}"),
    ("mlp.contract.{rest}", "mlp.fc2.{rest}"),
)


def in_blocks(theirs: str, rules: Rules, ours: str = "blocks.{block}") -> list[tuple[str, str]]:
    """The rules of every block, of which `theirs` is the published name."""
    return [(f"{ours}.{own}", f"{theirs}.{published}") for own, published in rules]


def sampled_by(kind: str, **settings: Any) -> dict[str, Any]:
    """The configuration of a sampler: the published evaluation's, where it is known."""
    return {"class_path": f"discrete_lit.samplers.{kind}", "init_args": settings}


def generator(
    kind: str,
    state: State,
    tokens: Tokens,
    num_classes: int,
    backbone: dict[str, Any],
    rules: Rules,
    arrangements: Sequence[Arrangement] = (),
    dropped: Sequence[str] = (),
    kept: Sequence[str] = (),
    tokenizer: Conversion | None = None,
    **options: Any,
) -> Conversion:
    """The conversion of a generator.

    Args:
        kind: our class.
        state: published tensors.
        tokens: of its tokenizer.
        num_classes: labels that it knows.
        backbone: switches of the `Transformer`.
        rules: from names of the backbone to published ones, after the arrangements.
        arrangements: of the published tensors.
        dropped, kept, tokenizer: as in `Conversion`.
        options: other arguments of our class.
    """
    transformer = {"class_path": "discrete_lit.backbones.Transformer", "init_args": backbone}
    config = {
        "class_path": f"discrete_lit.generators.{kind}",
        "init_args": {"num_classes": num_classes, "backbone": transformer, **options},
    }
    arranged = arrange(state, arrangements)
    return Conversion(config, arranged, Renaming(rules), dropped, kept, tokens, tokenizer)


def class_count(state: State, embedding: Tensor, before: int = 0) -> int:
    """Classes of an embedding with rows for `before` other ids, the classes, and no class.

    Raises:
        ValueError: no class at all.
    """
    count = len(embedding) - before - 1
    if count < 1:
        raise ValueError(f"{state.source!r} has {len(embedding)} embeddings for {before} ids: no class is among them")
    return count


def square(state: State, places: int) -> tuple[int, int]:
    """The token grid of a square image.

    Raises:
        ValueError: a number of tokens that is no square.
    """
    side = isqrt(places)
    if side**2 != places:
        raise ValueError(f"{state.source!r} has {places} tokens, which is no square grid")
    return side, side
