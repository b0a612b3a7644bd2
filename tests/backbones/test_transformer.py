"""The shared transformer: masks, cache, conditioning, precision, for every combination of its switches."""

from itertools import product

import pytest
import torch
from torch import Tensor

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.backbones.blocks import MLP

SWITCHES = [
    {"positions": positions, "conditioning": conditioning, "norm": norm, "mlp": mlp, "qk_norm": qk_norm}
    for positions, conditioning, norm, mlp, qk_norm in product(
        ("learned", "rope_1d", "rope_2d"), ("prefix", "adaln"), ("layer", "rms"), ("gelu", "swiglu"), (None, "rms")
    )
]
each_combination = pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(str(v) for v in s.values()))
each_conditioning = pytest.mark.parametrize("conditioning", ["prefix", "adaln"])
LABELS = torch.tensor([0, 2])


def ids(count: int, vocab_size: int = 5) -> Tensor:
    return torch.randint(vocab_size, (2, count))


@each_combination
@torch.no_grad()
def test_cached_logits_are_the_full_ones(make_backbone, switches) -> None:
    """Sequences of 6: all at once, one by one, and by prefills of several tokens."""
    backbone = make_backbone("causal", **switches)
    tokens = ids(5)
    full = backbone(tokens, LABELS)
    assert full.shape == (2, 6, 5)
    for cuts in ([0, 1, 2, 3, 4, 5], [0, 5], [3, 4, 5], [1, 4, 5], [2, 5]):
        cache, rows, seen = backbone.new_cache(LABELS), [], 0
        for end in cuts:
            rows.append(backbone(tokens[:, seen:end], LABELS, cache))
            seen = end
        assert rows[0].shape[1] == cuts[0] + 1
        torch.testing.assert_close(torch.cat(rows, dim=1), full, rtol=0, atol=1e-5)
        assert cache.filled == 6


@each_combination
@torch.no_grad()
def test_causal_rows_see_the_past_alone_and_all_of_it(make_backbone, switches) -> None:
    backbone = make_backbone("causal", **switches)
    tokens = ids(5)
    before = backbone(tokens, LABELS)
    for position in range(5):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 5
        difference = (backbone(changed, LABELS) - before).abs().amax(dim=(0, 2))
        assert (difference[: position + 1] <= 1e-6).all()
        assert (difference[position + 1 :] > 1e-4).all()


@each_combination
@torch.no_grad()
def test_bidirectional_rows_see_every_token(make_backbone, switches) -> None:
    backbone = make_backbone("bidirectional", **switches)
    tokens = ids(6, vocab_size=6)  # the mask id among them
    before = backbone(tokens, LABELS)
    assert before.shape == (2, 6, 5)
    for position in range(6):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 6
        assert ((backbone(changed, LABELS) - before).abs().amax(dim=(0, 2)) > 1e-4).all()


@each_combination
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@torch.no_grad()
def test_every_row_depends_on_the_label_and_on_its_position(make_backbone, switches, attention) -> None:
    backbone = make_backbone(attention, **switches)
    tokens = torch.zeros(2, 5 if attention == "causal" else 6, dtype=torch.int64)
    logits = backbone(tokens, LABELS)
    assert ((logits[0] - logits[1]).abs().amax(dim=-1) > 1e-4).all()


@each_conditioning
@pytest.mark.parametrize("positions", ["learned", "rope_1d", "rope_2d"])
@torch.no_grad()
def test_bidirectional_tokens_may_not_be_permuted(make_backbone, conditioning, positions) -> None:
    backbone = make_backbone("bidirectional", conditioning=conditioning, positions=positions)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5]])
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    permuted = backbone(tokens[:, order], LABELS[:1])
    assert (permuted - backbone(tokens, LABELS[:1])[:, order]).abs().max() > 1e-2


@each_conditioning
@torch.no_grad()
def test_too_many_tokens_are_refused(make_backbone, conditioning) -> None:
    for positions in ("learned", "rope_1d", "rope_2d"):
        backbone = make_backbone("causal", conditioning=conditioning, positions=positions)
        with pytest.raises(ValueError, match="positions for 6 elements"):
            backbone(ids(6), LABELS)
        for filled, more in ((5, 1), (5, 3), (3, 3)):
            cache = backbone.new_cache(LABELS)
            backbone(ids(filled), LABELS, cache)
            with pytest.raises(ValueError, match="positions for 6 elements"):
                backbone(ids(more), LABELS, cache)
    with pytest.raises(ValueError, match="bidirectional backbone reads at most 6"):
        make_backbone("bidirectional", conditioning=conditioning)(ids(7), LABELS)


def test_cache_refuses_more_than_it_holds(make_backbone) -> None:
    cache = make_backbone("causal").new_cache(LABELS[:1])
    with pytest.raises(ValueError, match="holds 6 positions, 7 were asked for"):
        cache.layer(0).append(torch.zeros(1, 2, 7, 8), torch.zeros(1, 2, 7, 8))


@torch.no_grad()
def test_adaln_zero_starts_as_the_identity(make_backbone) -> None:
    """No block changes the stream, so the logits are the head of the normalised embeddings, for any label."""
    backbone = make_backbone("bidirectional", spread=None, conditioning="adaln", norm="rms")
    tokens = ids(6)
    embedded = backbone.token_embedding(tokens) + backbone.positions.embedding
    scale = embedded.square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt()
    torch.testing.assert_close(backbone(tokens, LABELS), backbone.head(embedded * scale))


@each_combination
def test_every_parameter_is_trained(make_backbone, switches) -> None:
    for attention, count in (("causal", 5), ("bidirectional", 6)):
        backbone = make_backbone(attention, **switches).train()
        backbone(ids(count), LABELS).square().sum().backward()
        unused = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
        assert not unused
        if backbone.positions.embedding is not None:
            assert (backbone.positions.embedding.grad.abs().amax(dim=-1) > 0).all()


@each_conditioning
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@torch.no_grad()
def test_bfloat16_autocast_gives_close_float32_logits(make_backbone, conditioning, mlp) -> None:
    backbone = make_backbone(
        "causal", conditioning=conditioning, mlp=mlp, qk_norm="rms", positions="rope_2d", spread=0.1
    )
    tokens = ids(5)
    exact = backbone(tokens, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        logits = backbone(tokens, LABELS)
        cache = backbone.new_cache(LABELS)
        cached = torch.cat([backbone(tokens[:, :2], LABELS, cache), backbone(tokens[:, 2:], LABELS, cache)], dim=1)
    assert logits.dtype == cached.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.03)
    torch.testing.assert_close(cached, logits, rtol=0, atol=0.03)
    # The head itself runs in float32: its outputs are not rounded to bfloat16.
    assert (logits.bfloat16().float() != logits).double().mean() > 0.9


@torch.no_grad()
def test_initialisation() -> None:
    """GPT-2's: 0.02 everywhere, less on the residual outputs, no bias; logits near the uniform law."""
    layout = SequenceLayout(64, (4, 4), num_classes=10, attention="causal")
    backbone = Transformer(layout, width=64, depth=8, heads=4)
    parameters = dict(backbone.named_parameters())
    assert float(parameters["blocks.3.attention.query_key_value.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(parameters["blocks.3.attention.out.weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(parameters["blocks.3.mlp.contract.weight"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(parameters["positions.embedding"].std()) == pytest.approx(0.02, rel=0.1)
    assert all((value == 0).all() for name, value in parameters.items() if name.endswith("bias"))
    logits = backbone(torch.randint(64, (4, 15)), torch.arange(4))
    assert float(logits.softmax(dim=-1).amax()) < 0.1


def test_sizes() -> None:
    layout = SequenceLayout(7, (2, 2), num_classes=3, attention="bidirectional", mask_token=True)
    assert (layout.length, layout.mask_id, layout.null_label) == (4, 7, 3)
    assert Transformer(layout, width=768, depth=1, heads=12, mlp="swiglu").blocks[0].mlp.contract.in_features == 2048
    backbone = Transformer(layout, width=32, depth=1, heads=2, bias=False, norm="layer")
    assert not [name for name, _ in backbone.named_parameters() if name.endswith("bias")]
    assert backbone.token_embedding.table.num_embeddings == 8 and backbone.head.project.out_features == 7
    assert (
        Transformer(
            SequenceLayout(7, (2, 2), num_classes=3, attention="causal"), width=32, depth=1, heads=2
        ).token_embedding.table.num_embeddings
        == 7
    )


def test_dropout_acts_in_training_alone(make_backbone) -> None:
    backbone = make_backbone("causal", dropout=0.5)
    tokens = ids(5)
    assert torch.equal(backbone(tokens, LABELS), backbone(tokens, LABELS))
    backbone.train()
    assert not torch.equal(backbone(tokens, LABELS), backbone(tokens, LABELS))


PLACES = {
    "taming": ("embeddings", "attention_weights", "attention_output", "mlp_output"),
    "LlamaGen": ("embeddings", "attention_output", "mlp_output"),
    "RAR": ("attention_weights", "attention_output", "mlp_hidden", "mlp_output"),
    "Halton-MaskGIT": ("attention_weights", "attention_output", "mlp_hidden"),
    "SEDD": ("attention_output", "mlp_output"),
}


@pytest.mark.parametrize("places", [None, *PLACES.values()], ids=["default", *PLACES])
@pytest.mark.parametrize("norm_first", [True, False])
def test_places_of_dropout(norm_first: bool, places: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count what is dropped by its shape: D = 16 with an MLP of 24, in two blocks."""
    layout = SequenceLayout(5, (2, 2), num_classes=2, attention="causal")
    switches = {} if places is None else {"dropout_places": places}
    network = Transformer(
        layout, width=16, depth=2, heads=2, mlp_hidden=24, norm_first=norm_first, dropout=0.25, **switches
    ).train()
    dropped: list[str] = []
    functional, attend = torch.nn.functional.dropout, torch.nn.functional.scaled_dot_product_attention

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if training and p == 0.25:
            dropped.append(f"width {input.shape[-1]}")
        return functional(input, p, training, inplace)

    def attention(*args: Tensor, dropout_p: float = 0.0, **settings) -> Tensor:
        dropped.extend(["weights"] * (dropout_p == 0.25))
        return attend(*args, dropout_p=dropout_p, **settings)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    network(torch.randint(5, (3, 3)), torch.zeros(3, dtype=torch.int64))
    expected = places or PLACES["taming"]
    outputs = ("attention_output" in expected) + ("mlp_output" in expected)
    assert dropped.count("weights") == 2 * ("attention_weights" in expected)
    assert dropped.count("width 16") == 2 * outputs + ("embeddings" in expected)
    assert dropped.count("width 24") == 2 * ("mlp_hidden" in expected)
    if "embeddings" in expected:
        assert dropped[0] == "width 16"


def test_a_place_of_dropout_that_is_not_known() -> None:
    layout = SequenceLayout(5, (2, 2), num_classes=2, attention="causal")
    with pytest.raises(ValueError, match="dropout_places has 'mlp', accepted: embeddings, attention_weights, "):
        Transformer(layout, width=16, depth=1, heads=2, dropout_places=["mlp_output", "mlp"])


@pytest.mark.parametrize("settings", [{"dropout": 1.0}, {"dropout": float("nan")}, {"norm_epsilon": 0.0}])
def test_settings_out_of_their_range(settings: dict[str, float]) -> None:
    layout = SequenceLayout(5, (2, 2), num_classes=2, attention="causal")
    (name,) = settings
    with pytest.raises(ValueError, match=f"^{name} must"):
        Transformer(layout, width=16, depth=1, heads=2, **settings)


def test_widths_that_do_not_divide(make_backbone) -> None:
    layout = SequenceLayout(5, (2, 2), num_classes=2, attention="causal")
    for heads in (3, 0, -2):
        with pytest.raises(ValueError, match=f"width=16 is not a multiple of heads={heads}"):
            Transformer(layout, width=16, depth=1, heads=heads)
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        Transformer(layout, width=12, depth=1, heads=2, positions="rope_2d")


def test_drop_path_leaves_out_whole_branches_in_training_alone() -> None:
    """Every sample's branch is left out with the probability of its block, which grows from 0 to `drop_path`."""
    layout = SequenceLayout(5, (2, 3), num_classes=2, attention="bidirectional", mask_token=True)
    backbone = Transformer(layout, width=16, depth=3, heads=2, drop_path=0.5)
    assert [float(block.dropout[1].kept) for block in backbone.blocks] == [1, 0.75, 0.5]
    torch.manual_seed(0)
    branches = backbone.blocks[1].train()._drop(torch.ones(20_000, 2, 3)).flatten(1)
    assert torch.equal(branches, branches[:, :1].expand_as(branches))
    left_out = branches[:, 0] == 0
    torch.testing.assert_close(branches[~left_out], torch.full_like(branches[~left_out], 1 / 0.75))
    assert abs(left_out.float().mean() - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5
    assert torch.equal(backbone.blocks[1].eval()._drop(branches), branches)


# Squared ReLU, digits of ids, a class that is added, and outputs that begin at 0.

QUICK = {
    "mlp": "relu_squared",
    "norm": "rms",
    "qk_norm": "rms",
    "bias": False,
    "embedded_digits": [3, 2],
    "conditioning": "added",
}


@torch.no_grad()
def test_squared_relu() -> None:
    mlp = MLP(4, 8, kind="relu_squared", bias=True)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(mlp(x), mlp.contract(mlp.expand(x).clamp(min=0) ** 2))


@torch.no_grad()
def test_an_added_class_and_digits_in_a_cache(make_backbone) -> None:
    backbone = make_backbone("causal", vocab_size=6, **QUICK)
    tokens = ids(5, 6)
    full = backbone(tokens, LABELS)
    assert full.shape == (2, 6, 6)
    cache, rows = backbone.new_cache(LABELS), []
    for start, end in ((0, 2), (2, 3), (3, 5)):
        rows.append(backbone(tokens[:, start:end], LABELS, cache))
    torch.testing.assert_close(torch.cat(rows, dim=1), full, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_added_class_stands_at_every_position(make_backbone) -> None:
    """It is what another table of ids would be, each of whose rows has the class added; and takes no element."""
    backbone = make_backbone("bidirectional", conditioning="added")
    assert backbone.starts == 0 and backbone.elements == 6
    tokens, labels = ids(6), torch.tensor([1, 1])
    expected = backbone(tokens, labels)
    table, classes = backbone.token_embedding.table.weight, backbone.class_embedding.weight
    table.add_(classes[1])
    classes.zero_()
    torch.testing.assert_close(backbone(tokens, labels), expected)


@torch.no_grad()
def test_digits_are_added_to_the_table_of_ids() -> None:
    layout = SequenceLayout(6, (2, 2), num_classes=2, attention="bidirectional", mask_token=True)
    backbone = Transformer(layout, width=8, depth=1, heads=2, embedded_digits=[3, 2], tied=True)
    embedding = backbone.token_embedding
    first, second = embedding.digit_tables
    rows = [embedding.table.weight[k] + first.weight[k % 3] + second.weight[k // 3] for k in range(6)]
    # The mask id has no digits.
    torch.testing.assert_close(embedding(torch.arange(7)), torch.stack([*rows, embedding.table.weight[6]]))
    torch.testing.assert_close(embedding.logit_weight(), torch.stack(rows))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedded_digits": [2, 2]}, "multiply to 4"),
        ({"embedded_digits": [4, 2], "token_embedding": "bits"}, r"embedded_digits=\[4, 2\] belong to .*'table'"),
        ({"conditioning": "added", "condition_width": 4}, "condition_width is of conditioning='adaln'"),
        ({"conditioning": "added", "visible_start": 2}, "visible_start=2 needs a causal sequence that begins with"),
    ],
)
def test_digits_and_an_added_class_that_do_not_fit(settings, message: str) -> None:
    layout = SequenceLayout(8, (2, 2), num_classes=2, attention="causal")
    with pytest.raises(ValueError, match=message):
        Transformer(layout, width=16, depth=1, heads=2, **settings)


@pytest.mark.parametrize("initialization", ["gpt2", "sedd"])
def test_branches_that_begin_at_zero_are_trained_behind_a_gate_too(make_backbone, initialization: str) -> None:
    """A branch whose gate and last layer were both 0 would stand still for ever."""
    settings = {**QUICK, "conditioning": "adaln", "zero_outputs": True, "initialization": initialization}
    backbone = make_backbone("bidirectional", vocab_size=6, spread=None, **settings).train()
    tokens = ids(6, 6)
    begun = {name: parameter.detach().clone() for name, parameter in backbone.blocks.named_parameters()}
    assert torch.equal(backbone(tokens, LABELS), torch.zeros(2, 6, 6))
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(backbone(tokens, LABELS).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    moved = {name for name, parameter in backbone.blocks.named_parameters() if not torch.equal(begun[name], parameter)}
    assert any(name.endswith("query_key_value.weight") for name in moved)
    assert any(name.endswith("contract.weight") for name in moved)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_outputs_that_begin_at_zero(make_backbone, attention: str) -> None:
    """All ids are equally probable, whatever the input, and every weight is trained after two steps."""
    backbone = make_backbone(attention, vocab_size=6, spread=None, zero_outputs=True, **QUICK).train()
    tokens = ids(5 if attention == "causal" else 6, 6)
    assert torch.equal(backbone(tokens, LABELS), torch.zeros(2, 6, 6))
    assert torch.equal(backbone.blocks[1](torch.ones(1, 6, 16)), torch.ones(1, 6, 16))
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backbone(tokens, LABELS)[..., 0].square().sub(1).square().sum().backward()
        backbone(tokens, LABELS)[..., 0].sum().backward()
        optimizer.step()
    assert not [name for name, weight in backbone.named_parameters() if not weight.grad.abs().sum() > 0]
