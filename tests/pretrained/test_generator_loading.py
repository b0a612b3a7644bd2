"""Published generators: what is dropped, what is refused, and the tokenizers that they get."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import published_generators as published
from safetensors.torch import save_file
from torch import Tensor

from discrete_lit.pretrained import load_pretrained
from discrete_lit.pretrained.conversion import Arrangement, arrange, must_be_zero, reorder_chunks
from discrete_lit.pretrained.reading import State
from discrete_lit.tokenizers import TokenGrid

Tensors = dict[str, Tensor]
SMALL = {"width": 64, "depth": 2, "hidden": 96, "ids": 16, "classes": 3}
SIZES: dict[str, dict[str, Any]] = {
    "llamagen_gpt_c2i": SMALL,
    "rar": {**SMALL, "places": 64, "heads": 16},
    "halton_maskgit": {**SMALL, "places": 64, "heads": 1},
    "titok_imagebert": {**SMALL, "places": 12},
    "titok_uvitbert": {**SMALL, "depth": 3, "places": 12},
    "maskbit_lfqbert": {
        "width": 64,
        "depth": 2,
        "hidden": 96,
        "bits": 4,
        "groups": 2,
        "classes": 3,
        "places": 64,
    },
    "var_transformer": {"depth": 1, "ids": 16, "classes": 3, "sides": (1, 2, 3), "shared": True, "code_dim": 4},
}
REFERENCE: dict[str, dict[str, Any]] = {
    "llamagen_gpt_c2i": {"block_size": 64},
    "var_transformer": {"patch_nums": [1, 2, 3]},
}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    """`load(family, change, tokenizer, **reference)`: a tiny checkpoint after a change of its tensors."""

    def load(
        family: str, change: Callable[[Tensors], Any] | None = None, tokenizer: Any = None, **reference: Any
    ) -> Any:
        torch.manual_seed(0)
        state = published.tensors(getattr(published, family)(**SIZES[family]), lambda shape: torch.randn(shape) * 0.1)
        if change is not None:
            change(state)
        save_file(state, tmp_path / "generator.safetensors")
        reference = {**REFERENCE.get(family, {}), **reference}
        return load_pretrained(tmp_path / "generator.safetensors", family, reference, tokenizer)

    return load


def rename(state: Tensors, names: Callable[[str], str]) -> None:
    renamed = {names(name): value for name, value in state.items()}
    state.clear()
    state.update(renamed)


@pytest.mark.parametrize("family", [family for family in SIZES if family != "var_transformer"])
def test_it_samples_ids_without_a_tokenizer(family: str, load: Callable[..., Any]) -> None:
    generator = load(family)
    assert isinstance(generator.tokenizer, TokenGrid) and generator.num_classes == 3 and generator.vocab_size == 16
    tokens = generator.sample(torch.tensor([0, 3]))
    assert tokens.shape == (2, *generator.token_shape) and len(tokens.unique()) > 1
    assert generator.token_shape == ((12,) if "titok" in family else (8, 8))
    with pytest.raises(ValueError, match="loaded without its tokenizer"):
        generator.tokenizer.decode(tokens)


def test_prefixes_of_training_are_taken_off(load: Callable[..., Any]) -> None:
    plain = load("halton_maskgit")
    wrapped = load("halton_maskgit", lambda state: rename(state, lambda name: f"module._orig_mod.{name}"))
    assert all(torch.equal(value, wrapped.state_dict()[name]) for name, value in plain.state_dict().items())


def test_old_files_hold_the_numbers_of_positions(load: Callable[..., Any]) -> None:
    plain = load("titok_imagebert")
    numbers = {"model.embeddings.position_ids": torch.arange(512)[None]}
    old = load("titok_imagebert", lambda state: state.update(numbers))
    assert old.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.fixture
def tokenizer(taming_state: Callable[[], Tensors], tmp_path: Path) -> Any:
    """16 codes on a grid of half the image's side."""
    save_file(taming_state(), tmp_path / "tokenizer.safetensors")
    return load_pretrained(tmp_path / "tokenizer.safetensors", "taming_vqgan")


def test_the_given_tokenizer_is_in_the_generator_and_in_its_file(
    load: Callable[..., Any], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import discrete_lit
    from discrete_lit.checkpoints import save
    from discrete_lit.cli.commands import main

    generator = load("rar", tokenizer=tokenizer)
    assert generator.image_size == 16 and generator.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert generator.tokenizer is not tokenizer
    save(tokenizer, tmp_path / "tokenizer.ckpt")
    command = f"import --weights {tmp_path}/generator.safetensors --family rar --output {tmp_path}/ours.ckpt"
    main([*command.split(), "--tokenizer", f"{tmp_path}/tokenizer.ckpt"])
    assert "8 x 8 tokens of 16 ids from a VQGAN" in capsys.readouterr().out
    imported = discrete_lit.load(tmp_path / "ours.ckpt")
    tokens = generator.sample(torch.tensor([1, 2]))
    assert torch.equal(imported.sample(torch.tensor([1, 2])), tokens)
    assert torch.equal(imported.tokenizer.decode(tokens), tokenizer.decode(tokens))


def test_tokenizers_that_do_not_fit(load: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gives no square image up to 2048 pixels the token shape \(12,\)"):
        load("titok_uvitbert", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has 17 ids, the generator was trained on 16"):
        load("rar", tokenizer=TokenGrid(17, (8, 8)))
    with pytest.raises(ValueError, match="TokenGrid was not built from a configuration"):
        load("rar", tokenizer=TokenGrid(16, (8, 8)))
    with pytest.raises(ValueError, match="runs on the codes of its tokenizer: give it as tokenizer"):
        load("var_transformer")
    with pytest.raises(ValueError, match="family='taming_vqgan' is a tokenizer itself: give no tokenizer"):
        load_pretrained(tmp_path / "tokenizer.safetensors", "taming_vqgan", tokenizer=tokenizer)


def test_a_file_with_its_own_tokenizer(taming_state: Callable[[], Tensors], tokenizer: Any, tmp_path: Path) -> None:
    shapes = published.taming_net2net(width=64, depth=2, ids=16, places=64)
    state = published.tensors(shapes, torch.randn)
    state |= {f"first_stage_model.{name}": value for name, value in taming_state().items()}
    file = tmp_path / "net2net.safetensors"
    save_file(state, file)
    reference = {"cond_stage_config": {"target": "taming.modules.util.Labelator", "params": {"n_classes": 5}}}
    generator: Any = load_pretrained(file, "taming_net2net", reference)
    table = state["transformer.tok_emb.weight"]
    assert torch.equal(generator.backbone.class_embedding.weight, torch.cat([table[:5], torch.zeros(1, 64)]))
    assert torch.equal(
        generator.tokenizer.quantizer.codebook.codes, state["first_stage_model.quantize.embedding.weight"]
    )
    with pytest.raises(ValueError, match="holds its own tokenizer: give no other"):
        load_pretrained(file, "taming_net2net", reference, tokenizer)
    with pytest.raises(ValueError, match=r"n_classes=17 in reference_config must lie in \[1, 16\]"):
        load_pretrained(file, "taming_net2net", {"cond_stage_config": {"n_classes": 17}})
    with pytest.raises(ValueError, match="do not tell how many classes there are"):
        load_pretrained(file, "taming_net2net")


@torch.no_grad()
def test_a_modulation_that_all_blocks_share(load: Callable[..., Any]) -> None:
    """It is that of blocks of their own whose offsets are the shared one plus theirs."""
    from discrete_lit.checkpoints import instantiate

    network = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_kernel": 3}
    arguments = {
        "network": {"class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder", "init_args": network},
        "codebook_size": 16,
        "code_dim": 4,
        "scales": [1, 2, 3],
        "phi_kernels": 1,
    }
    tokenizer = instantiate({"class_path": "discrete_lit.tokenizers.MultiScaleVQ", "init_args": arguments}).eval()

    def own(state: Tensors) -> None:
        weight, bias = state.pop("shared_ada_lin.1.weight"), state.pop("shared_ada_lin.1.bias")
        offset = state.pop("blocks.0.ada_gss").flatten()
        state |= {"blocks.0.ada_lin.1.weight": weight, "blocks.0.ada_lin.1.bias": bias + offset}

    shared, separate = (load("var_transformer", change, tokenizer) for change in (None, own))
    assert shared.backbone.shared_modulation is not None and separate.backbone.shared_modulation is None
    labels = torch.tensor([0, 2])
    tokens = shared.sample(labels)
    vectors = tokenizer.quantizer.teacher_forcing(tokens)
    torch.testing.assert_close(shared.backbone(vectors, labels), separate.backbone(vectors, labels))
    assert torch.equal(separate.sample(labels), tokens)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("rar", lambda state: state.pop("blocks.1.attn.q_norm.bias"), r"'blocks\.1\.attn\.q_norm\.bias' is missing$"),
        ("rar", lambda state: state.update({"blocks.0.extra": torch.ones(1)}), r"'blocks\.0\.extra' is unexpected$"),
        ("rar", lambda state: state.update({"embeddings.weight": torch.ones(17, 64)}), "no class is among them"),
        ("rar", lambda state: state.update({"pos_embed": torch.ones(1, 1034, 64)}), "10 tokens, which is no square"),
        (
            "halton_maskgit",
            lambda state: state["head.weight"].add_(1),
            r"'head\.weight' other than 'tok_emb\.weight', to which it is tied",
        ),
        ("halton_maskgit", lambda state: state.pop("head.weight"), r"has no key 'head\.weight'"),
        ("maskbit_lfqbert", lambda state: state["bits_to_indices"].mul_(2), "bit k does not count 2\\^k"),
        (
            "titok_imagebert",
            lambda state: state.pop("model.embeddings.token_type_embeddings.weight"),
            r"has no key 'model\.embeddings\.token_type_embeddings\.weight'",
        ),
        (
            "var_transformer",
            lambda state: state["blocks.0.attn.zero_k_bias"].add_(1),
            r"blocks\.\{block\}\.attn\.zero_k_bias holds other numbers than 0",
        ),
        (
            "var_transformer",
            lambda state: state.update({"lvl_embed.weight": torch.ones(4, 64)}),
            "4 scales with 14 tok",
        ),
    ],
)
def test_weights_that_do_not_fit(family: str, change: Any, message: str, load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        load(family, change)


@pytest.mark.parametrize(
    ("family", "reference", "message"),
    [
        ("llamagen_gpt_c2i", {"dim": 32}, "has dim=32, but the tensors have 64"),
        ("llamagen_gpt_c2i", {"model_type": "t2i"}, "has model_type=t2i, but the published class-conditional"),
        ("llamagen_gpt_c2i", {"block_size": 60}, "has block_size=60, which is no square grid"),
        ("halton_maskgit", {"heads": 3}, "queries of 64 channels, which heads=3 does not divide"),
        ("halton_maskgit", {"proj": 2}, "has proj=2, but every published model has 1"),
        ("titok_uvitbert", {"num_hidden_layers": 4}, "has num_hidden_layers=4, but the tensors have 3"),
        ("maskbit_lfqbert", {"codebook_splits": 1}, "has codebook_splits=1, but the tensors have 2"),
        ("var_transformer", {"attn_l2_norm": False}, "has attn_l2_norm=False, but the tensors have True"),
    ],
)
def test_a_configuration_that_does_not_fit(family: str, reference: Any, message: str, load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        load(family, **reference)


def test_the_configuration_of_all_parts_of_a_model(load: Callable[..., Any]) -> None:
    """1d-tokenizer's YAML says both: the tokenizer's vocabulary is none of the generator's arguments."""
    parts = {"vq_model": {"token_size": 1}, "generator": {"hidden_size": 64, "num_attention_heads": 8}}
    assert load("titok_imagebert", config={"model": parts}).backbone.heads == 8
    parts["vq_model"] |= {"codebook_size": 17}
    with pytest.raises(ValueError, match=r"has vq_model\.codebook_size=17, but the tensors have 16"):
        load("titok_imagebert", config={"model": parts})


def test_arrangements_use_up_what_they_take() -> None:
    state = State({"a.0.x": torch.arange(4), "a.1.x": torch.arange(4, 8), "zero": torch.zeros(2)}, "file")
    halves = Arrangement(["a.{layer}.{rest}"], ["first.{layer}", "second.{layer}"], lambda value: value.chunk(2))
    arranged = arrange(state, [reorder_chunks("a.{layer}.x", (2, 3, 0, 1)), halves, must_be_zero("zero")])
    assert {name: value.tolist() for name, value in arranged.items()} == {
        "first.0": [2, 3],
        "second.0": [0, 1],
        "first.1": [6, 7],
        "second.1": [4, 5],
    }
    assert len(state) == 3
    with pytest.raises(ValueError, match=r"'file' has no key 'b\.0'"):
        arrange(state, [Arrangement(["a.{layer}.x", "b.{layer}"], [], lambda x, y: [])])
    with pytest.raises(ValueError, match=r"weights of 'file' do not fit: zero: .*"):
        arrange(state, [Arrangement(["zero"], ["zero"], lambda value: [value.reshape(3)])])
