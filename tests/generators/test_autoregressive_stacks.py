"""RQ-Transformer: stacks of codes as elements of a sequence. The law, soft labels, and what is refused."""

from typing import Any

import pytest
import torch
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers
from helpers.random_weights import randomise
from torch.nn import functional as F

from discrete_lit.backbones import FactorisedHead
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators.autoregressive import SoftCodes
from discrete_lit.samplers import OpenMAGVIT2Sampler
from discrete_lit.samplers.raster import SubTokenSettings
from discrete_lit.tokenizers import RQVAE
from discrete_lit.tokenizers.networks import ConvAutoencoder

SIZE, CODES, DIM = 3, 2, 4
# The forms of the codes' embedding and of their logits.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": ({"token_embedding": "codes", "code_dim": DIM}, {"codes": "sum", "positions": True}),
    "newest code": ({"token_embedding": "codes", "code_dim": DIM}, {"codes": "newest", "shared_logits": True}),
    "own tables": ({"token_embedding": "codes", "code_dim": DIM}, {"heads": 4}),
    "shared tables": ({"token_embedding": "parts"}, {"shared_tables": True, "positions": True}),
}


def switches(form: str = "published", sizes: tuple[int, ...] = (SIZE,) * CODES) -> dict[str, Any]:
    embedding, head = FORMS[form]
    return {**embedding, "place_head": lambda block, size: FactorisedHead(block, size, sizes=sizes, depth=1, **head)}


def residual_tokenizer(depth: int = CODES, seed: int = 0) -> RQVAE:
    """Images of 2 x 4 pixels to 1 x 2 stacks."""

    def network(code_dim: int, latent_dim: int) -> ConvAutoencoder:
        return ConvAutoencoder(code_dim, latent_dim, channels=4, multipliers=(1, 1), blocks=1, norm_groups=2)

    torch.manual_seed(seed)
    tokenizer = RQVAE(network, SIZE, code_dim=DIM, depth=depth, shared_codebook=False, codebook_init="normal")
    return randomise(tokenizer, 0.6).eval()


@pytest.fixture
def make(make_generator):
    """`make(form, **arguments)`: a generator of 1 x 2 stacks of two codes of three, in eval mode."""

    def build(form: str = "published", **arguments: Any) -> Any:
        settings = {"tokenizer": residual_tokenizer(), "image_size": [2, 4], "stacked_codes": True, **arguments}
        return make_generator("autoregressive", spread=0.5, backbone=switches(form), **settings)

    return build


@torch.no_grad()
def law(generator: Any, label: int) -> torch.Tensor:
    """`(K^(N D),)` log-probability of every grid of codes, each factor from its own pass over what is before it."""
    backbone, head = generator.backbone, generator.backbone.place_head
    grids = all_sequences(SIZE, generator.length * CODES).reshape(-1, *generator.token_shape)
    labels, sequences = torch.full((len(grids),), label), generator.to_sequence(grids)
    total = torch.zeros(len(grids), dtype=torch.float64)
    for place in range(generator.length):
        hidden, codes = backbone(sequences[:, :place], labels)[:, -1:], grids.flatten(1, 2)[:, place : place + 1]
        for number in range(CODES):
            logits = head.sub_token_logits(hidden, codes[..., :number])[:, 0].double()
            total += logits.log_softmax(dim=-1).gather(1, codes[:, :, number])[:, 0]
    return total


@pytest.mark.parametrize("form", FORMS)
def test_samples_follow_the_likelihood_which_sums_to_one(make, form: str) -> None:
    """Passes over prefixes, the whole pass of the likelihood, and the sampler with its cache have one law."""
    generator = make(form)
    assert generator.token_shape == (1, 2, CODES) and generator.backbone.layout.grid == (1, 2)
    grids = all_sequences(SIZE, 4).reshape(-1, 1, 2, CODES)
    labels = torch.ones(len(grids), dtype=torch.int64)
    likelihood = generator.log_likelihood(grids, labels)
    assert likelihood.kind == "exact"
    torch.testing.assert_close(likelihood.nats, law(generator, 1), rtol=0, atol=1e-4)
    assert float(likelihood.nats.exp().sum()) == pytest.approx(1, abs=1e-5)
    drawn = generator.sample(torch.ones(20_000, dtype=torch.int64), seed=3)
    assert drawn.shape == (20_000, 1, 2, CODES)
    numbers = sequence_numbers(drawn.flatten(1), SIZE)
    assert chi_square_p_value(numbers, likelihood.nats.exp()) > 1e-3
    assert chi_square_p_value(numbers, generator.log_likelihood(grids, 0 * labels).nats.exp()) < 1e-6


@torch.no_grad()
def test_the_loss_is_that_of_a_code(make) -> None:
    generator = make()
    tokens, labels = torch.randint(SIZE, (7, 1, 2, CODES)), torch.arange(7) % 2
    loss, _ = generator.loss(tokens, labels)
    nats = generator.log_likelihood(tokens, labels).nats
    assert float(loss) == pytest.approx(float(-nats.mean() / 4), abs=1e-5)


def test_inputs_are_sums_of_the_tokenizers_codes(make) -> None:
    """With the bias once a code; and the head reads what the codes so far add up to."""
    generator = make()
    backbone, tables = generator.backbone, generator.tokenizer.code_tables()
    assert tables.shape == (CODES, SIZE, DIM) and torch.equal(backbone.token_embedding.vectors, tables)
    codes = torch.tensor([[[[2, 0], [1, 1]]]])
    embedded = backbone.token_embedding(generator.to_sequence(codes))
    project = backbone.token_embedding.project
    by_hand = project.weight @ (tables[0, 2] + tables[1, 0]) + 2 * project.bias
    torch.testing.assert_close(embedded[0, 0], by_hand)
    read = backbone.place_head._embedded(torch.tensor([[[2, 0]]]))
    summed = torch.stack((tables[0, 2], tables[0, 2] + tables[1, 0]))
    torch.testing.assert_close(read[0, 0], backbone.place_head.code_projection(summed))
    # The vectors are the frozen tokenizer's: kept with the generator, not trained.
    assert "token_embedding.vectors" in backbone.state_dict()
    assert "token_embedding.vectors" not in dict(backbone.named_parameters())


def test_known_stacks_are_kept(make) -> None:
    generator = make()
    known = torch.tensor([[[[1, 2], [-1, -1]]]]).expand(500, -1, -1, -1)
    drawn = generator.sample(torch.zeros(500, dtype=torch.int64), known=known)
    assert (drawn[:, 0, 0] == torch.tensor([1, 2])).all() and len(drawn[:, 0, 1].unique(dim=0)) > 4
    with pytest.raises(ValueError, match="known must give all codes of a position"):
        generator.sample(torch.tensor([0]), known=torch.tensor([[[[1, -1], [-1, -1]]]]))


def test_settings_of_each_depth(make) -> None:
    """Greedy first codes, and second ones that are not."""
    sampler = OpenMAGVIT2Sampler([SubTokenSettings(top_k=1), SubTokenSettings()])
    drawn = make().sample(torch.zeros(300, dtype=torch.int64), sampler)
    assert len(drawn[:, 0, 0, 0].unique()) == 1 and len(drawn[:, 0, 0, 1].unique()) > 1


# --- Soft labels ---


@torch.no_grad()
def test_stochastic_codes_follow_their_law() -> None:
    quantizer = residual_tokenizer().quantizer
    latent = torch.randn(1, DIM)
    uniforms = torch.rand(20_000, CODES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, laws = quantizer.soft_encode(latent.expand(20_000, -1), temperature=0.7, uniforms=uniforms)
    residual, nats = latent[0], torch.zeros(SIZE**CODES, dtype=torch.float64)
    every, tables = all_sequences(SIZE, CODES), quantizer.code_tables()
    for number, row in enumerate(every):
        left = residual
        for depth, code in enumerate(row.tolist()):
            distances = (left - tables[depth]).square().sum(dim=1).double()
            nats[number] += (-distances / 0.7).log_softmax(dim=0)[code]
            left = left - tables[depth, code]
    assert chi_square_p_value(sequence_numbers(ids, SIZE), nats.exp()) > 1e-3
    chosen = laws.gather(-1, ids[..., None])[..., 0].double().log().sum(dim=-1)
    torch.testing.assert_close(chosen[:50], nats[sequence_numbers(ids[:50], SIZE)], rtol=0, atol=1e-4)
    nearest, sharp = quantizer.soft_encode(latent, temperature=1e-6, uniforms=uniforms[:1])
    assert torch.equal(nearest, quantizer.encode(latent)) and float(sharp.amax(dim=-1).min()) == 1


@torch.no_grad()
def test_soft_labels_train_on_images(make, monkeypatch) -> None:
    """The loss is the cross-entropy with the laws that the codes were drawn from, and validation is with the codes."""
    generator = make(soft_labels=0.5, label_dropout=0.0)
    batch = {"image": torch.rand(5, 3, 2, 4) * 2 - 1, "label": torch.arange(5) % 2}
    random = CounterRandom(0, torch.arange(5))
    assert torch.equal(generator.data_of(batch, random), generator.tokenizer.encode(batch["image"]))
    generator.train()
    data = generator.data_of(batch, random)
    assert isinstance(data, SoftCodes) and data.laws.shape == (5, 1, 2, CODES, SIZE)
    again = generator.data_of(batch, random)
    assert torch.equal(again.codes, data.codes)  # they belong to the sample
    loss, _ = generator.loss(data, batch["label"], random)
    head, sequence = generator.backbone.place_head, generator.to_sequence(data.codes)
    hidden = generator.backbone(sequence[:, :-1], batch["label"])
    split = head.sub_tokens.split(sequence)
    costs = [
        F.cross_entropy(head.sub_token_logits(hidden, split[..., :number]).flatten(0, 1), laws.flatten(0, 1))
        for number, laws in enumerate(data.laws.flatten(1, 2).unbind(dim=2))
    ]
    assert float(loss) == pytest.approx(float(torch.stack(costs).mean()), abs=1e-5)
    # Laws that are sure of their codes are hard labels.
    sure = SoftCodes(data.codes, F.one_hot(data.codes, SIZE).float())
    assert float(generator.loss(sure, batch["label"], random)[0]) == pytest.approx(
        float(generator.loss(data.codes, batch["label"], random)[0]), abs=1e-5
    )
    with pytest.raises(ValueError, match=r"soft_labels=0\.5 draws the codes of images by an RQVAE"):
        generator.data_of({"tokens": data.codes, "label": batch["label"]}, random)


def test_every_parameter_is_trained(make, assert_all_trained) -> None:
    assert_all_trained(make(label_dropout=0.5))


# --- What is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"soft_labels": 0.5, "stacked_codes": False}, "soft_labels=0.5 must be above 0, and needs stacked_codes"),
        ({"soft_labels": -1.0}, "soft_labels=-1.0 must be above 0"),
        ({"perturb_rate": 0.1}, "perturb_rate=0.1 flips bits of single ids: stacked_codes must be false"),
        ({"backbone": switches(sizes=(9,))}, r"needs a backbone whose place_head is a FactorisedHead of the 2 codes"),
        ({"backbone": {}}, r"sizes=\[3, 3\]; got none"),
        ({"token_shape": (4,), "tokenizer": None}, "needs tokens with the codes of a position as last axis"),
        ({"token_shape": (2, 50), "vocab_size": 9, "tokenizer": None}, r"9\^50 must be below 2\^63"),
    ],
)
def test_what_is_refused(make_generator, arguments: dict[str, Any], message: str) -> None:
    given = {
        "tokenizer": residual_tokenizer(),
        "image_size": [2, 4],
        "stacked_codes": True,
        "backbone": switches(),
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        make_generator("autoregressive", **given)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({**switches(), "code_dim": 5}, r"codes of 2 codebooks of 3 vectors of 5 \(code_dim\), the tokenizer has"),
        ({**switches(), "code_dim": None}, "needed there, got code_dim=None with token_embedding='codes'"),
        ({**switches("shared tables"), "code_dim": 4}, "got code_dim=4 with token_embedding='parts'"),
        ({"token_embedding": "codes", "code_dim": DIM}, "token_embedding='codes' embeds the sub-tokens that a place"),
        ({**switches(), "token_embedding": "parts", "code_dim": None}, "codes='sum' needs the code vectors of"),
    ],
)
def test_what_the_backbone_refuses(make_generator, backbone: dict[str, Any], message: str) -> None:
    given = {"tokenizer": residual_tokenizer(), "image_size": [2, 4], "stacked_codes": True}
    with pytest.raises(ValueError, match=message):
        make_generator("autoregressive", backbone=backbone, **given)


def test_codes_without_a_tokenizer_are_refused_before_training(make_generator) -> None:
    generator = make_generator(
        "autoregressive", vocab_size=SIZE, token_shape=(1, 2, CODES), stacked_codes=True, backbone=switches()
    )
    generator._trainer = type("Trainer", (), {"datamodule": None})()
    with pytest.raises(ValueError, match=r"reads the code vectors of the tokenizer, and a .* has none"):
        generator.setup("fit")
