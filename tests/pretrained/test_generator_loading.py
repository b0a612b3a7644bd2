"""Published generators: what is dropped, what is refused, and the tokenizers that they get."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import published_generators as published
from safetensors.torch import save_file
from torch import Tensor

from discrete_lit.backbones.embeddings import grid_coordinates, rotary_table
from discrete_lit.pretrained import load_pretrained
from discrete_lit.pretrained.conversion import Arrangement, arrange, must_be_zero, reorder_chunks
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.taming import PERMUTERS
from discrete_lit.samplers import RasterSampler
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


@pytest.fixture
def net2net(taming_state: Callable[[], Tensors], tmp_path: Path) -> Callable[..., Any]:
    """`net2net(change, **reference)`: taming's GPT of 4 x 4 positions with its tokenizer, after a change."""

    def load(change: Callable[[Tensors], Any] | None = None, **reference: Any) -> Any:
        torch.manual_seed(0)
        state = published.tensors(published.taming_net2net(width=64, depth=2, ids=16, places=16), torch.randn)
        state |= {f"first_stage_model.{name}": value for name, value in taming_state().items()}
        if change is not None:
            change(state)
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "net2net.safetensors")
        return load_pretrained(tmp_path / "net2net.safetensors", "taming_net2net", reference)

    return load


FIVE_CLASSES: dict[str, Any] = {"cond_stage_config": {"target": "taming.modules.util.Labelator", "n_classes": 5}}


def test_no_null_label_was_trained(net2net: Callable[..., Any]) -> None:
    """With classes and without: guidance is refused."""
    with_classes = net2net(**FIVE_CLASSES)
    assert with_classes.num_classes == 5 and with_classes.label_dropout == 0
    for unconditional in ({"cond_stage_config": "__is_unconditional__"}, {"unconditional": True, "sos_token": 3}):
        generator = net2net(**unconditional)
        table = generator.backbone.token_embedding.table.weight
        assert generator.num_classes == 1
        start = table[unconditional.get("sos_token", 0)]
        assert torch.equal(generator.backbone.class_embedding.weight, torch.stack([start, torch.zeros(64)]))
        assert generator.sample(torch.zeros(2, dtype=torch.int64)).shape == (2, 4, 4)
        for each in (generator, with_classes):
            with pytest.raises(ValueError, match=r"guidance_scale=3\.0 needs a generator that learned the null label"):
                each.sample(torch.zeros(2, dtype=torch.int64), RasterSampler(guidance_scale=3.0))


# By taming's own code, on 4 x 4 positions.
ORDERS = {
    "Subsample": [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15],
    "ZCurve": [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15],
    "SpiralOut": [9, 5, 6, 10, 14, 13, 12, 8, 4, 0, 1, 2, 3, 7, 11, 15],
    "SpiralIn": [15, 11, 7, 3, 2, 1, 0, 4, 8, 12, 13, 14, 10, 6, 5, 9],
    "Random": [3, 13, 7, 2, 6, 10, 4, 1, 14, 0, 15, 9, 8, 12, 11, 5],
    "AlternateParsing": [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11, 15, 14, 13, 12],
}


def test_orders() -> None:
    assert {name: make(4, 4).flatten().tolist() for name, make in PERMUTERS.items()} == ORDERS
    assert PERMUTERS["ZCurve"](3, 5).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 10, 11, 12, 13, 4, 9, 14]
    assert PERMUTERS["AlternateParsing"](2, 3).flatten().tolist() == [0, 1, 2, 5, 4, 3]
    for name, sides in {"Subsample": (4, 6), "SpiralOut": (3, 3), "SpiralIn": (2, 4)}.items():
        with pytest.raises(ValueError, match=r"Subsample|a spiral needs a square grid of even sides"):
            PERMUTERS[name](*sides)


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("name", ["Subsample", "SpiralIn"])
@torch.no_grad()
def test_permuters(name: str, net2net: Callable[..., Any]) -> None:
    """By their names and by their tables in the file; element n has the n-th position embedding, wherever it stands."""

    def with_table(state: Tensors) -> None:
        state["permuter.forward_shuffle_idx"] = torch.tensor(ORDERS[name])
        state["permuter.backward_shuffle_idx"] = torch.tensor(ORDERS[name]).argsort()

    permuter = {"target": f"taming.modules.transformer.permuter.{name}", "params": {"H": 4, "W": 4}}
    raster = net2net(**FIVE_CLASSES)
    tokens, labels = torch.randint(16, (2, 16)), torch.tensor([0, 4])
    expected = raster.backbone(tokens[:, :-1], labels)
    for change, given in ((None, {"permuter_config": permuter}), (with_table, {})):
        generator = net2net(change, **FIVE_CLASSES, **given)
        assert generator.fixed_order.tolist() == ORDERS[name]
        assert torch.equal(generator.to_sequence(generator.to_grid(tokens)), tokens)
        torch.testing.assert_close(generator.sampled_backbone()(tokens[:, :-1], labels), expected)
    other = {**permuter, "target": "SpiralOut" if name != "SpiralOut" else "SpiralIn"}
    with pytest.raises(ValueError, match=r"has the permuter Spiral(Out|In), but the tensors have another order"):
        net2net(with_table, **FIVE_CLASSES, permuter_config=other)


def test_what_a_file_says_of_its_beginning(net2net: Callable[..., Any]) -> None:
    """The saved masks tell how many elements see each other."""

    def show(state: Tensors) -> None:
        for name in state:
            if name.endswith("attn.mask"):
                state[name][..., :3, :3] = 1

    def show_one(state: Tensors) -> None:
        state["transformer.blocks.1.attn.mask"][..., :3, :3] = 1

    three = {"transformer_config": {"params": {"n_unmasked": 3}}}
    assert net2net(**FIVE_CLASSES).backbone.visible_start == 0
    assert net2net(show, **FIVE_CLASSES).backbone.visible_start == 3
    assert net2net(show, **FIVE_CLASSES, **three).backbone.visible_start == 3
    with pytest.raises(ValueError, match="has n_unmasked=3, but the tensors have 0"):
        net2net(**FIVE_CLASSES, **three)
    with pytest.raises(ValueError, match=r"'attn\.mask' that is not causal behind its first elements"):
        net2net(show_one, **FIVE_CLASSES)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({}, r"do not tell how many classes there are: .* cond_stage_config: __is_unconditional__"),
        ({"cond_stage_config": "__is_first_stage__"}, "cond_stage_config='__is_first_stage__'; __is_unconditional__ "),
        ({"cond_stage_config": {"target": "taming.modules.misc.coord.CoordStage"}}, "CoordStage; Labelator are read"),
        ({**FIVE_CLASSES, "first_stage_config": {"n_embed": 8}}, r"first_stage_config\.n_embed=8, but the tensors"),
        ({**FIVE_CLASSES, "first_stage_config": {"nembed": 8}}, r"did you mean first_stage_config\.n_embed"),
        ({"unconditional": True, "sos_token": 16}, r"sos_token=16 in reference_config must lie in \[0, 16\)"),
        ({**FIVE_CLASSES, "permuter_config": {"target": "Zigzag"}}, "permuter_config.target=Zigzag; Identity and "),
    ],
)
def test_what_is_refused_of_tamings_models(reference: Any, message: str, net2net: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        net2net(**reference)


def test_the_number_of_llamagens_tokens(load: Callable[..., Any]) -> None:
    """From the file's own table, or asked for, unless the width is that of a model of 384 pixels alone."""
    with pytest.raises(ValueError, match="do not tell the number of tokens: give block_size in reference_config, 256 "):
        load("llamagen_gpt_c2i", block_size=None)
    table = {"freqs_cis": torch.cat([torch.zeros(1, 32, 2), rotary_table(grid_coordinates((6, 6)), 64)])}
    assert load("llamagen_gpt_c2i", lambda state: state.update(table), block_size=None).token_shape == (6, 6)
    with pytest.raises(ValueError, match="has block_size=64, but the tensors have 36"):
        load("llamagen_gpt_c2i", lambda state: state.update(table))
    with pytest.raises(ValueError, match=r"a table 'freqs_cis' that is not that of rope_base=100\.0"):
        load("llamagen_gpt_c2i", lambda state: state.update(table), block_size=36, rope_base=100)


@torch.no_grad()
def test_llamagens_settings(load: Callable[..., Any]) -> None:
    tokens, labels = torch.randint(16, (2, 63)), torch.tensor([0, 2])
    plain = load("llamagen_gpt_c2i", n_head=4)
    turned = load("llamagen_gpt_c2i", n_head=4, rope_base=100.0)
    assert not torch.allclose(turned.backbone(tokens, labels), plain.backbone(tokens, labels))

    def share(state: Tensors) -> None:
        """Heads 0 and 1, and 2 and 3, have the same keys and values, of which one is left."""
        for name, weight in state.items():
            if name.endswith("wqkv.weight"):
                query, *rest = weight.chunk(3)
                state[name] = torch.cat([query, *(part.unflatten(0, (4, 16))[::2].flatten(0, 1) for part in rest)])

    def repeat(state: Tensors) -> None:
        share(state)
        for name, weight in state.items():
            if name.endswith("wqkv.weight"):
                query, *rest = weight.split([64, 32, 32])
                both = [part.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1) for part in rest]
                state[name] = torch.cat([query, *both])

    shared, whole = load("llamagen_gpt_c2i", share, n_head=4, n_kv_head=2), load("llamagen_gpt_c2i", repeat, n_head=4)
    torch.testing.assert_close(shared.backbone(tokens, labels), whole.backbone(tokens, labels))
    with pytest.raises(ValueError, match="has n_kv_head=4, but the tensors have 2"):
        load("llamagen_gpt_c2i", share, n_head=4, n_kv_head=4)
    with pytest.raises(ValueError, match="which make 256 channels inside the MLP, but the tensors have 96"):
        load("llamagen_gpt_c2i", multiple_of=256)
    undropped = load("llamagen_gpt_c2i", class_dropout_prob=0)
    assert undropped.num_classes == 4 and undropped.label_dropout == 0


def test_groups_of_bits_with_tables(tmp_path: Path) -> None:
    """MaskBit's BERT with `codebook_splits`: a table and a bias for each group, before a last norm or not."""
    shapes = published.maskbit_lfqbert(width=64, depth=2, hidden=96, bits=4, groups=2, classes=3, places=16)
    kept = {name: shape for name, shape in shapes.items() if not name.startswith(("input_", "bits_", "prediction"))}
    kept |= {f"tok_emb_list.{group}.weight": (5, 64) for group in range(2)}
    kept |= {f"bias.{group}": (16, 4) for group in range(2)}
    for norm in ({}, {"norm_after_transformer.weight": (64,), "norm_after_transformer.bias": (64,)}):
        torch.manual_seed(0)
        state = published.tensors(kept | norm, lambda shape: torch.randn(shape) * 0.1)
        save_file(state, tmp_path / "bert.safetensors")
        generator: Any = load_pretrained(tmp_path / "bert.safetensors", "maskbit_bert", {"codebook_size": 16})
        assert generator.vocab_size == 16 and generator.bit_groups.groups == 2 and generator.length == 32
        assert (generator.backbone.final_norm is not None) == bool(norm)
        ids = torch.randint(5, (2, 32))
        embedded = generator.backbone.token_embedding(ids)
        tables = [state[f"tok_emb_list.{group}.weight"][ids[:, group::2]] for group in range(2)]
        torch.testing.assert_close(embedded, tables[0] + tables[1])
        weight = generator.backbone.token_embedding.logit_weight()
        assert torch.equal(weight, torch.cat([state[f"tok_emb_list.{group}.weight"][:4] for group in range(2)]))
        assert torch.equal(generator.backbone.head.bias, torch.cat([state["bias.0"], state["bias.1"]], dim=1))
        assert generator.sample(torch.tensor([0, 3])).max() < 16
        with pytest.raises(ValueError, match=f"has use_prenorm={not norm}, but the tensors have {bool(norm)}"):
            load_pretrained(tmp_path / "bert.safetensors", "maskbit_bert", {"use_prenorm": not norm})
        with pytest.raises(ValueError, match="has codebook_splits=1, but the tensors have 2"):
            load_pretrained(tmp_path / "bert.safetensors", "maskbit_bert", {"codebook_splits": 1})


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
        ("halton_maskgit", {"heads": 3}, "heads=3, which does not divide the 64 channels"),
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
