"""RQ-Transformer's checkpoints: the tokenizer that they need, the forms that are read, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import Case, published
from helpers.golden_cases import cases_of
from helpers.golden_stacked import logits_of
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.checkpoints import instantiate
from discrete_lit.pretrained import load_pretrained
from discrete_lit.samplers import RasterSampler
from discrete_lit.tokenizers import RQVAE

rq_transformer = pytest.mark.parametrize("case", cases_of(["rq_transformer"]))
WIDTH, HEADS, SIZE, CODES, SIDE, CLASSES = 8, 2, 5, 3, 2, 4


def without_codebooks(case: Case, folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({name: value for name, value in case.state.items() if not name.startswith("aux.")}, file)
    return file


def tokenizer_of(case: Case) -> RQVAE:
    """An RQ-VAE with the codebook of a case."""
    rows, dim = case.state["aux.quantizer.codebooks.0.weight"].shape
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {"channels": 4, "multipliers": [1], "blocks": 1, "norm_groups": 2},
    }
    depth = case.inputs["codes"].shape[-1]
    arguments = {"network": network, "codebook_size": rows - 1, "code_dim": dim, "depth": depth}
    tokenizer = instantiate({"class_path": "discrete_lit.tokenizers.RQVAE", "init_args": arguments})
    tokenizer.quantizer.codebooks[0].codes.data.copy_(case.state["aux.quantizer.codebooks.0.weight"][:-1])
    return tokenizer.eval()


@rq_transformer
@torch.no_grad()
def test_the_published_file_needs_its_tokenizer(case: Case, tmp_path: Path) -> None:
    file = without_codebooks(case, tmp_path)
    with pytest.raises(ValueError, match="runs on the codes of its tokenizer: give it as tokenizer"):
        load_pretrained(file, case.family, case.arguments)
    generator = load_pretrained(file, case.family, case.arguments, tokenizer_of(case))
    logits = logits_of(generator, case.inputs["codes"], case.inputs["cond"][:, 0])
    torch.testing.assert_close(logits, case.expected["logits"], rtol=0, atol=1e-4)
    images = generator.tokenizer.decode(generator.sample(case.inputs["cond"][:, 0]))
    assert images.shape[:2] == (len(case.inputs["cond"]), 3)


@rq_transformer
def test_settings_of_the_training(case: Case, tmp_path: Path) -> None:
    loss = {"type": "soft_target_cross_entropy", "stochastic_codes": True, "temp": 0.5}
    generator = published(case, tmp_path)(loss=loss)
    assert generator.soft_labels == 0.5 and generator.label_dropout == 0
    assert published(case, tmp_path)().soft_labels is None
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a generator that learned the null label"):
        generator.sample(case.inputs["cond"][:, 0], RasterSampler(guidance_scale=2.0))


@rq_transformer
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_size_cond": 2}, "block_size_cond=2, but the tensors have 1"),
        ({"block_size": [9, 1, 3]}, r"block_size=\[9, 1, 3\], but the tensors have 9 positions of 4 codes"),
        ({"vocab_size": [32, 32, 32, 16]}, r"vocab_size=\[32, 32, 32, 16\], but the tensors have \[32, 32, 32, 32\]"),
        ({"input_emb_vqvae": False}, "input_emb_vqvae=False, but the tensors have True"),
        ({"loss": {"type": "soft_target_cross_entropy", "stochastic_codes": False}}, "loss.stochastic_codes=False"),
        ({"scaled_head_emb_vqvae": True}, "scaled_head_emb_vqvae=True, but every model that is read has False"),
    ],
)
def test_what_is_refused(case: Case, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    arguments = {**case.constructor["config"], **changed}
    with pytest.raises(ValueError, match=message):
        published(case, tmp_path)(config=arguments)


def random_state(*, code_inputs: bool) -> dict[str, Tensor]:
    """A model whose tokens have a table for each depth, at the head or everywhere, and each depth logits of its own."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.4

    state = {
        "cond_emb.weight": random(CLASSES, WIDTH),
        "pos_emb_cond": random(1, 1, WIDTH),
        "pos_emb_hw": random(1, SIDE**2, WIDTH),
        "pos_emb_d": random(1, CODES, WIDTH),
        "tok_emb.weight": random(CODES * SIZE, WIDTH),
        "tok_emb.offsets": torch.arange(CODES) * SIZE,
        "classifier.layer_norm.weight": 1 + random(WIDTH),
        "classifier.layer_norm.bias": random(WIDTH),
        "classifier.linear.weight": random(CODES, WIDTH, SIZE),
        "classifier.linear.bias": random(CODES, SIZE),
    }
    for stack in ("body", "head"):
        block = f"{stack}_transformer.blocks.0"
        for part in ("attn.key", "attn.query", "attn.value", "attn.proj"):
            state |= {f"{block}.{part}.weight": random(WIDTH, WIDTH), f"{block}.{part}.bias": random(WIDTH)}
        state |= {f"{block}.mlp.0.weight": random(4 * WIDTH, WIDTH), f"{block}.mlp.0.bias": random(4 * WIDTH)}
        state |= {f"{block}.mlp.2.weight": random(WIDTH, 4 * WIDTH), f"{block}.mlp.2.bias": random(WIDTH)}
        for norm in ("ln1", "ln2"):
            state |= {f"{block}.{norm}.weight": 1 + random(WIDTH), f"{block}.{norm}.bias": random(WIDTH)}
    if code_inputs:
        state |= {"input_mlp.weight": random(WIDTH, 6), "input_mlp.bias": random(WIDTH)}
        state |= {f"aux.quantizer.codebooks.{depth}.weight": random(SIZE + 1, 6) for depth in range(CODES)}
    return state


def block_by_hand(state: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"])

    def norm(name: str, value: Tensor) -> Tensor:
        return F.layer_norm(value, (WIDTH,), state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"])

    normed = norm("ln1", x)
    query, key, value = (
        linear(f"attn.{name}", normed).unflatten(-1, (HEADS, -1)).transpose(-2, -3)
        for name in ("query", "key", "value")
    )
    weights = query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
    future = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
    mixed = weights.masked_fill(future, -torch.inf).softmax(dim=-1) @ value
    x = x + linear("attn.proj", mixed.transpose(-2, -3).flatten(-2))
    return x + linear("mlp.2", F.gelu(linear("mlp.0", norm("ln2", x))))


def logits_by_hand(state: dict[str, Tensor], codes: Tensor, labels: Tensor, *, code_inputs: bool) -> Tensor:
    """The paper's equations, position by position and depth by depth."""
    table = state["tok_emb.weight"].unflatten(0, (CODES, SIZE))
    flat = codes.flatten(1, 2)
    embedded = torch.stack([table[depth][flat[..., depth]] for depth in range(CODES)], dim=2)
    read = embedded
    if code_inputs:
        books = [state[f"aux.quantizer.codebooks.{depth}.weight"] for depth in range(CODES)]
        vectors = torch.stack([books[depth][flat[..., depth]] for depth in range(CODES)], dim=2)
        read = F.linear(vectors, state["input_mlp.weight"], state["input_mlp.bias"])
    start = state["cond_emb.weight"][labels][:, None] + state["pos_emb_cond"]
    inputs = torch.cat((start, (read.sum(dim=2) + state["pos_emb_hw"])[:, :-1]), dim=1)
    hidden = block_by_hand(state, "body_transformer.blocks.0", inputs)
    elements = torch.cat((hidden[:, :, None], embedded[:, :, :-1]), dim=2) + state["pos_emb_d"][0]
    hidden = block_by_hand(state, "head_transformer.blocks.0", elements)
    names = ("weight", "bias")
    normed = F.layer_norm(hidden, (WIDTH,), *(state[f"classifier.layer_norm.{name}"] for name in names))
    logits = torch.einsum("bndi,dik->bndk", normed, state["classifier.linear.weight"])
    return (logits + state["classifier.linear.bias"]).unflatten(1, (SIDE, SIDE))


@pytest.mark.parametrize("code_inputs", [False, True])
@torch.no_grad()
def test_tables_and_logits_of_each_depth(tmp_path: Path, code_inputs: bool) -> None:
    state = random_state(code_inputs=code_inputs)
    save_file(state, tmp_path / "model.safetensors")
    settings = {"body": {"block": {"n_head": HEADS}}, "head": {"block": {"n_head": HEADS}}, "shared_tok_emb": False}
    generator = load_pretrained(tmp_path / "model.safetensors", "rq_transformer", settings)
    codes, labels = torch.randint(SIZE, (3, SIDE, SIDE, CODES)), torch.arange(3)
    expected = logits_by_hand(state, codes, labels, code_inputs=code_inputs)
    torch.testing.assert_close(logits_of(generator, codes, labels), expected, rtol=0, atol=1e-4)


def test_models_of_texts_are_refused(tmp_path: Path) -> None:
    state = random_state(code_inputs=False) | {"pos_emb_cond": torch.zeros(1, 7, WIDTH)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is a model of texts \(block_size_cond=7\)"):
        load_pretrained(tmp_path / "model.safetensors", "rq_transformer")
