"""Heads that predict an id in parts: laws that sum to 1, losses, costs, and no tensor as large as the vocabulary."""

from functools import partial
from itertools import permutations

import pytest
import torch
from helpers.random_weights import randomise
from helpers.recipe_files import layered
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit import backbones
from discrete_lit.backbones import (
    BlockSettings,
    FactorisedHead,
    MaskedBitHead,
    SequenceLayout,
    SubTokenHead,
    Transformer,
)
from discrete_lit.backbones.backbone import SubTokens
from discrete_lit.core.random import CounterRandom

BLOCK = BlockSettings(width=8, heads=2, head_dim=4, mlp_hidden=16)


def factorised(vocab_size: int, sizes: tuple[int, ...], block: BlockSettings = BLOCK) -> FactorisedHead:
    return randomise(FactorisedHead(block, vocab_size, sizes=sizes), 0.6).eval()


def masked_bits(vocab_size: int, **settings) -> MaskedBitHead:
    return randomise(MaskedBitHead(BLOCK, vocab_size, **{"width": 12, "depth": 2, **settings}), 0.2).eval()


HEADS = {
    "two parts": lambda: factorised(24, (4, 6)),
    "three parts": lambda: factorised(24, (2, 4, 3)),
    "one part": lambda: factorised(16, (16,)),
    "gated RMS blocks": lambda: factorised(
        16,
        (4, 4),
        BlockSettings(
            width=8,
            heads=2,
            head_dim=4,
            mlp_hidden=16,
            norm="rms",
            mlp="swiglu",
            bias=False,
            modulation="own",
            drop_path=0.5,
        ),
    ),
    "bits": lambda: masked_bits(16),
    "one bit": lambda: masked_bits(2),
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> SubTokenHead:
    return HEADS[request.param]()


def size_of(head: SubTokenHead) -> int:
    return int(torch.tensor(head.sub_tokens.sizes).prod())


@pytest.mark.parametrize("sizes", [(2,), (64, 4096), (3, 5, 2), (2,) * 18, (2**31, 2**31)])
def test_parts_there_and_back(sizes: tuple[int, ...]) -> None:
    total = 1
    for size in sizes:
        total *= size
    split = SubTokens(sizes, total)
    ids = torch.cat((torch.randint(total, (4, 50)), torch.tensor([[0, total - 1]] * 4)), dim=1)
    parts = split.split(ids)
    assert parts.shape == (4, 52, len(sizes))
    assert (parts >= 0).all() and (parts < torch.tensor(sizes)).all()
    assert torch.equal(split.join(parts), ids)


def test_the_first_part_is_the_least_significant() -> None:
    assert SubTokens((64, 4096), 2**18).split(torch.tensor([0b000000000101_000011])).tolist() == [[3, 5]]


@torch.no_grad()
def test_law_of_an_id_sums_to_one(head: SubTokenHead) -> None:
    """Each factor from its own pass over the parts before it; `log_likelihood` is their sum."""
    # Ids share their first parts, whose factors must not differ by the rounding of another row of the same product.
    head, size = head.double(), size_of(head)
    ids, hidden = torch.arange(size)[None], torch.randn(3, 1, 8, dtype=torch.float64)
    values = head.log_likelihood(hidden.expand(-1, size, -1), ids.expand(3, -1))
    torch.testing.assert_close(values.double().exp().sum(dim=1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    for row in range(3):
        for number in (0, size // 2, size - 1):
            total, parts = 0.0, head.sub_tokens.split(torch.tensor([[number]]))
            for part in range(len(head.sub_tokens)):
                logits = head.sub_token_logits(hidden[row : row + 1], parts[..., :part])
                assert logits.shape == (1, 1, head.sub_tokens.sizes[part]) and logits.dtype == torch.float64
                total += float(logits.log_softmax(dim=-1)[0, 0, parts[0, 0, part]])
            assert float(values[row, number]) == pytest.approx(total, abs=1e-12)
    assert values.std(dim=1).min() > 0.05 and values.std(dim=0).min() > 1e-4  # it depends on the id and on the state


@torch.no_grad()
def test_places_do_not_mix(head: SubTokenHead) -> None:
    hidden, ids = torch.randn(2, 5, 8), torch.randint(size_of(head), (2, 5))
    whole = head.log_likelihood(hidden, ids)
    torch.testing.assert_close(head.log_likelihood(hidden[1:, 3:4], ids[1:, 3:4]), whole[1:, 3:4])


@torch.no_grad()
def test_more_places_than_an_attention_kernel_takes_at_once(monkeypatch) -> None:
    head, hidden, ids = factorised(24, (4, 6)), torch.randn(3, 5, 8), torch.randint(24, (3, 5))
    whole, lengths = head.log_likelihood(hidden, ids), []
    monkeypatch.setattr("discrete_lit.backbones.sub_token_heads._MOST_SEQUENCES", 4)
    head.blocks[0].register_forward_pre_hook(lambda module, inputs: lengths.append(len(inputs[0])))
    torch.testing.assert_close(head.log_likelihood(hidden, ids), whole)
    assert lengths == [4, 4, 4, 3]


@torch.no_grad()
def test_training_loss_of_parts_is_their_likelihood() -> None:
    head = factorised(24, (4, 6)).train()
    hidden, ids = torch.randn(2, 5, 8), torch.randint(24, (2, 5))
    values, weights = head.losses(hidden, ids, CounterRandom(0, torch.arange(2)))
    torch.testing.assert_close(values, -head.log_likelihood(hidden, ids))
    assert torch.equal(weights, torch.ones(2, 5))


@torch.no_grad()
def exact_bound(head: MaskedBitHead, hidden: torch.Tensor, number: int) -> tuple[float, torch.Tensor]:
    """log p of an id when its bits are revealed one by one: the mean over all orders, and that of each order."""
    bits = head.sub_tokens.split(torch.tensor([[number]]))
    totals = []
    for order in permutations(range(head.bits)):
        visible, total = torch.full_like(bits, head.masked_bit), 0.0
        for bit in order:
            total += float(head.bit_logits(hidden, visible).log_softmax(dim=-1)[0, 0, bit, bits[0, 0, bit]])
            visible[..., bit] = bits[..., bit]
        totals.append(total)
    return sum(totals) / len(totals), torch.tensor(totals)


@torch.no_grad()
def test_validation_loss_of_bits_is_an_unbiased_bound() -> None:
    head, hidden = masked_bits(8), torch.randn(1, 1, 8)
    for number in (0, 5):
        mean, orders = exact_bound(head, hidden, number)
        assert orders.std() > 0.01
        assert float(head.log_likelihood(hidden, torch.tensor([[number]]))) == pytest.approx(float(orders[0]), abs=1e-5)
        random = CounterRandom(3, torch.arange(500))
        values, weights = head.losses(hidden.expand(500, 40, -1), torch.full((500, 40), number), random)
        assert torch.equal(weights, torch.ones(500, 40))
        assert abs(float(values.mean()) + mean) < 4 * float(values.std()) / 20_000**0.5


@torch.no_grad()
def test_training_loss_of_bits_weighs_those_that_were_not_masked() -> None:
    head = masked_bits(16, unmasked_weight=0.25).train()
    hidden, ids, random = torch.randn(200, 3, 8), torch.randint(16, (200, 3)), CounterRandom(1, torch.arange(200))
    masked, _ = head._masks(3, random)
    counts = masked.sum(dim=-1)
    assert masked.shape == (200, 3, 4) and counts.unique().tolist() == [1, 2, 3, 4]
    share = (0.8 * torch.randn(200_000)).sigmoid()
    expected = (4 * share).round().clamp(min=1).mean()
    assert float(counts.double().mean()) == pytest.approx(float(expected), abs=0.15)
    bits = head.sub_tokens.split(ids)
    logits = head.bit_logits(hidden, bits.masked_fill(masked, head.masked_bit))
    nats = -logits.log_softmax(dim=-1).gather(-1, bits[..., None])[..., 0]
    bit_weights = torch.where(masked, 1.0, 0.25)
    values, weights = head.losses(hidden, ids, random)
    mean_of_a_bit = (nats * bit_weights).sum() / bit_weights.sum()
    assert float((values * weights).sum() / weights.sum()) == pytest.approx(4 * float(mean_of_a_bit), rel=1e-5)
    again = head.losses(hidden[[7, 150]], ids[[7, 150]], CounterRandom(1, torch.tensor([7, 150])))
    torch.testing.assert_close(again[0], values[[7, 150]])  # masks belong to the sample


def test_untrained_bits_know_only_the_masked_share_and_the_place() -> None:
    """adaLN begins at zero: the head is then a function of its input bits alone."""
    head = MaskedBitHead(BLOCK, 16, width=12, depth=2)
    modulations = [module for module in head.modules() if type(module).__name__ == "Modulation"]
    assert len(modulations) >= 2
    for module in modulations:
        assert not module.project.weight.any() and not module.project.bias.any()


@pytest.mark.parametrize("make", ["two parts", "three parts", "gated RMS blocks", "bits"])
@torch.no_grad()
def test_flops_of_a_place(make: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    head = HEADS[make]().requires_grad_(False)
    backbone = Transformer(SequenceLayout(5, (2, 3), num_classes=2, attention="causal"), width=8, depth=1, heads=2)
    backbone.place_head = head
    for known in range(len(head.sub_tokens)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            head.sub_token_logits(torch.randn(1, 1, 8), torch.zeros(1, 1, known, dtype=torch.int64))
        assert backbone.head_flops(1, known) == counter.get_total_flops() > 0
        assert backbone.head_flops(2, known) == 2 * counter.get_total_flops()


@torch.no_grad()
def test_logits_are_float32_under_autocast(head: SubTokenHead) -> None:
    hidden, known = torch.randn(2, 3, 8), torch.zeros(2, 3, len(head.sub_tokens) - 1, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.sub_token_logits(hidden.bfloat16(), known).dtype == torch.float32
        assert head.log_likelihood(hidden.bfloat16(), torch.zeros(2, 3, dtype=torch.int64)).dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """The most elements, and the longest dimension, of any tensor that is made."""

    elements = 0
    dimension = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
                self.dimension = max(self.dimension, *value.shape, 0)
        return result


@pytest.mark.parametrize(
    ("embedding", "make"),
    [
        ("parts", lambda block, size: FactorisedHead(block, size, sizes=(64, 4096))),
        ("bits", lambda block, size: FactorisedHead(block, size, sizes=(64, 64, 64))),
        ("bits", lambda block, size: MaskedBitHead(block, size, width=32)),
    ],
)
def test_no_tensor_as_large_as_the_vocabulary(embedding: str, make) -> None:
    """Training at 2^18 ids: parameters, activations and gradients."""
    from discrete_lit.samplers import RasterSampler

    torch.manual_seed(0)
    layout = SequenceLayout(2**18, (3, 3), num_classes=5, attention="causal")
    with LargestTensor() as largest:
        backbone = Transformer(layout, width=16, depth=1, heads=2, token_embedding=embedding, place_head=make)
        assert backbone.place_head is not None
        ids, labels = torch.randint(2**18, (2, 9)), torch.tensor([1, 5])
        hidden = backbone(ids[:, :-1], labels)
        values, _ = backbone.place_head.losses(hidden, ids, CounterRandom(0, torch.arange(2)))
        values.mean().backward()
        with torch.no_grad():
            tokens = RasterSampler(guidance_scale=2.0)(backbone, labels, CounterRandom(0, torch.arange(2))).tokens
    assert hidden.shape == (2, 9, 16) and values.shape == (2, 9)
    assert all(value.grad is not None for value in backbone.parameters())
    assert 0 <= tokens.min() and tokens.max() < 2**18 and len(tokens.unique()) > 9
    assert largest.dimension <= 4096 and largest.elements <= 2 * 9 * 4096


@torch.no_grad()
def test_cached_hidden_states_are_those_without_a_cache() -> None:
    layout = SequenceLayout(64, (2, 3), num_classes=2, attention="causal")
    for conditioning in ("prefix", "adaln", "prefix_adaln"):
        backbone = Transformer(
            layout,
            width=8,
            depth=2,
            heads=2,
            token_embedding="bits",
            conditioning=conditioning,
            place_head=lambda b, k: masked_bits(k),
        )
        randomise(backbone, 0.4).eval()
        tokens, labels = torch.randint(64, (3, 5)), torch.arange(3)
        whole, cache = backbone(tokens, labels), backbone.new_cache(labels)
        rows = [backbone(tokens[:, max(place - 1, 0) : place], labels, cache) for place in range(6)]
        torch.testing.assert_close(torch.cat(rows, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "vocab_size", "published"), [("open_magvit2_ar_b", 2**18, 343e6), ("bar_b", 2**16, 415e6)]
)
def test_recipes_have_the_published_sizes(recipe: str, vocab_size: int, published: float) -> None:
    """To half a percent."""
    arguments = layered(f"lightning_configs/generators/{recipe}_imagenet256.yaml")["model"]["init_args"]
    layout = SequenceLayout(vocab_size, (16, 16), num_classes=1000, attention="causal", any_order="order" in arguments)
    switches = arguments["backbone"]["init_args"]
    head = switches["place_head"]
    make = getattr(backbones, head["class_path"].rpartition(".")[2])
    with torch.device("meta"):
        own = Transformer(layout, **{**switches, "place_head": partial(make, **head["init_args"])})
    assert sum(value.numel() for value in own.parameters()) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FactorisedHead(BLOCK, 24, sizes=(4, 5)), r"sizes=\[4, 5\], which multiply to 20"),
        (lambda: FactorisedHead(BLOCK, 24, sizes=(24, 1)), "must have 2 or more values each, and 24 together"),
        (lambda: FactorisedHead(BLOCK, 24, sizes=()), "must have 2 or more values each, and 24 together"),
        (lambda: FactorisedHead(BLOCK, 24, sizes=(4, 6), depth=0), "depth must be at least 1, got 0"),
        (
            lambda: MaskedBitHead(BLOCK, 24),
            "MaskedBitHead needs a vocabulary that is a power of 2, the tokenizer's is 24",
        ),
        (
            lambda: MaskedBitHead(BLOCK, 1),
            "MaskedBitHead needs a vocabulary that is a power of 2, the tokenizer's is 1",
        ),
        (lambda: MaskedBitHead(BLOCK, 16, depth=0), "depth and width must be at least 1, got 0 and 2048"),
        (lambda: MaskedBitHead(BLOCK, 16, unmasked_weight=1.5), r"unmasked_weight must lie in \[0, 1\], got 1.5"),
        (lambda: MaskedBitHead(BLOCK, 16, told_ratio="exact"), "told_ratio must be 'masked' or 'drawn', got 'exact'"),
        (
            lambda: FactorisedHead(BLOCK, 16, sizes=(4, 4), start_rotation="one"),
            "start_rotation must be 'none' or 'zero', got 'one'",
        ),
    ],
)
def test_settings_that_do_not_fit(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("attention", "switches", "message"),
    [
        ("bidirectional", {}, "a place_head predicts the next id of a causal sequence, this one is bidirectional"),
        ("causal", {"head_bias": True}, "head_transform and head_bias belong to logits of all ids"),
        ("causal", {"head_transform": True}, "head_transform and head_bias belong to logits of all ids"),
        ("causal", {"tied": True}, "tied=true needs a table"),
        (
            "causal",
            {"place_head": partial(FactorisedHead, sizes=(4, 4), shared_tables=True)},
            "shared_tables=true needs the tables of token_embedding='parts'",
        ),
        ("causal", {"target_rotations": True}, "target_rotations belong to a causal sequence of single positions"),
        ("causal", {"class_repeats": 0}, "class_repeats=0 must be at least 1"),
        ("causal", {"class_repeats": 2, "conditioning": "added"}, "class_repeats=2 must be at least 1, and more need"),
        ("causal", {"token_embedding": "table"}, "token_embedding='table' has a row for each of the 16 ids"),
    ],
)
def test_switches_that_do_not_go_with_a_place_head(attention: str, switches: dict, message: str) -> None:
    layout = SequenceLayout(16, (2, 3), num_classes=2, attention=attention, mask_token=attention == "bidirectional")
    with pytest.raises(ValueError, match=message):
        Transformer(
            layout, width=8, depth=1, heads=2, **{"token_embedding": "bits", "place_head": MaskedBitHead, **switches}
        )


def test_parts_without_a_place_head() -> None:
    with pytest.raises(ValueError, match="token_embedding='parts' embeds the sub-tokens that a place_head predicts"):
        Transformer(
            SequenceLayout(16, (2, 3), num_classes=2, attention="causal"),
            width=8,
            depth=1,
            heads=2,
            token_embedding="parts",
        )
