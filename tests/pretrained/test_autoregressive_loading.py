"""Published generators of SEED-Voken, BAR and MaskGIT's Flax files: what is read, and what is refused and why."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flax_files import packed, write_flax
from helpers.golden import Case
from helpers.golden_cases import cases_of
from safetensors.torch import save_file
from torch import Tensor

from discrete_lit.pretrained import load_pretrained
from discrete_lit.pretrained.flax_files import is_flax, read_flax
from discrete_lit.pretrained.reading import read_state


def load(case: Case, folder: Path, changes: dict[str, Tensor] | None = None, /, **said: Any) -> Any:
    save_file({**case.state, **(changes or {})}, folder / "published.safetensors")
    return load_pretrained(folder / "published.safetensors", case.family, {**case.arguments, **said})


@pytest.mark.parametrize("case", cases_of(["open_magvit2_ar"]))
def test_open_magvit2(case: Case, tmp_path: Path) -> None:
    generator = load(case, tmp_path)
    assert generator.token_shape == (4, 4) and generator.vocab_size == 64
    head = generator.backbone.place_head
    names = [name for name, _ in generator.named_parameters() if "tables" in name]
    assert head.shared[0] is generator.backbone.token_embedding.tables[0] and len(names) == 2
    with pytest.raises(ValueError, match=r"factorized_bits=\[6, 12\], but the tensors have \[2, 4\]"):
        load(case, tmp_path, factorized_bits=[6, 12])
    with pytest.raises(ValueError, match="block_size=15"):
        load(case, tmp_path, block_size=15)
    with pytest.raises(ValueError, match="multiple_of=256 and ffn_dim_multiplier=None, which make 256 channels"):
        load(case, tmp_path, multiple_of=256)


@pytest.mark.parametrize("case", cases_of(["open_magvit2_ar", "ibq_ar"]))
def test_a_lightning_file_with_the_tokenizer_beside(case: Case, tmp_path: Path) -> None:
    """The tokenizer is not read, which is said; the published YAML is read whole."""
    plain = load(case, tmp_path)
    state = {**case.state, "first_stage_model.decoder.conv_in.weight": torch.ones(2)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    config = {
        "model": {
            "class_path": "src.models.Net2NetTransformer",
            "init_args": {
                "cond_stage_key": "class_label",
                "transformer_config": {"target": "src.modules.GPT", "params": case.arguments},
                "first_stage_config": {"target": "src.models.VQModel", "params": {"n_embed": 64}},
            },
        },
        "trainer": {"max_epochs": 350},
    }
    with pytest.warns(UserWarning, match=r"the part transformer\.\* is read; the others are not: first_stage_model"):
        whole = load_pretrained(tmp_path / "last.ckpt", case.family, config)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("case", cases_of(["ibq_ar"]))
def test_ibq(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shared_aln=True, but every published model has False"):
        load(case, tmp_path, shared_aln=True)
    with pytest.raises(ValueError, match="n_layer=3, but the tensors have 2"):
        load(case, tmp_path, n_layer=3)
    with pytest.raises(ValueError, match=r"is no open_magvit2_ar checkpoint .*it looks like"):
        load_pretrained(tmp_path / "published.safetensors", "open_magvit2_ar")


@pytest.mark.parametrize("case", cases_of(["bar"]))
def test_bar(case: Case, tmp_path: Path) -> None:
    generator = load(case, tmp_path)
    assert generator.vocab_size == 64 and generator.backbone.starts == 4
    assert (generator.sampler.bit_counts, generator.sampler.choice_temperature) == ((1, 2, 3), 1.4)
    turns = "blocks.1.attn.rope.freqs_sin"
    with pytest.raises(ValueError, match="has other rotations than those of the places"):
        load(case, tmp_path, {turns: case.state[turns].roll(1, 0)})

    def with_model(**said: Any) -> dict[str, Any]:
        model = {**case.arguments["config"]["model"]}
        return {"config": {"model": {**model, "generator": {**model["generator"], **said}}}}

    with pytest.raises(ValueError, match="repeat_class_condition=32, but the tensors have 3"):
        load(case, tmp_path, **with_model(repeat_class_condition=32))
    with pytest.raises(ValueError, match="patch_size=2, but every model that is read has 1"):
        load(case, tmp_path, **with_model(patch_size=2))
    many = {"lm_head.output_embed.bias": torch.zeros(128), "lm_head.output_embed.weight": torch.zeros(128, 40)}
    with pytest.raises(ValueError, match="predicts 64 bits at a place, but an id has at most 62"):
        load(case, tmp_path, many)


@pytest.mark.parametrize("case", cases_of(["randar"]))
def test_randar(case: Case, tmp_path: Path) -> None:
    generator = load(case, tmp_path)
    assert (generator.sampler.steps, generator.sampler.order, generator.sampler.guidance_scale) == (6, "random", 4.0)
    assert load(case, tmp_path, num_inference_steps=-1).sampler.steps is None
    with pytest.raises(ValueError, match="cls_token_num=2, but the published models have 1"):
        load(case, tmp_path, cls_token_num=2)
    with pytest.raises(ValueError, match="block_size=12: accepted are square numbers of tokens"):
        load(case, tmp_path, block_size=12)
    with pytest.raises(ValueError, match=r"is no llamagen_gpt_c2i checkpoint .*it looks like randar"):
        load_pretrained(tmp_path / "published.safetensors", "llamagen_gpt_c2i")


@pytest.mark.parametrize("case", cases_of(["maskgit_flax"]))
def test_maskgit_flax(case: Case, tmp_path: Path) -> None:
    parts = {
        part: {name.removeprefix(f"{part}."): value for name, value in case.state.items() if name.startswith(part)}
        for part in ("transformer", "tokenizer")
    }
    file, vqgan = tmp_path / "maskgit_checkpoint", tmp_path / "tokenizer_checkpoint"
    write_flax(file, parts["transformer"])
    assert is_flax(file) and read_state(file).keys() == parts["transformer"].keys()
    with pytest.raises(ValueError, match="codebook_size=1024 and num_class=None do not fit the 43 rows"):
        load_pretrained(file, "maskgit_flax")
    with pytest.raises(ValueError, match="num_heads=8, but the tensors have 4"):
        load_pretrained(file, "maskgit_flax", {"codebook_size": 32, "transformer": {"num_heads": 8}})
    write_flax(vqgan, parts["tokenizer"])
    tokenizer = load_pretrained(vqgan, "maskgit_flax_tokenizer")
    assert tokenizer.token_shape(8) == (4, 4) and tokenizer.vocab_size == 32
    with pytest.raises(ValueError, match="conv_downsample=True, but every model that is read has False"):
        load_pretrained(vqgan, "maskgit_flax_tokenizer", {"conv_downsample": True})
    with_stride = {**parts["tokenizer"], "params.encoder.Conv_2.kernel": torch.zeros(4, 4, 32, 32)}
    write_flax(vqgan, with_stride)
    with pytest.raises(ValueError, match="is no VQGAN of MaskGIT's that halves the size by averages"):
        load_pretrained(vqgan, "maskgit_flax_tokenizer")
    with pytest.raises(ValueError, match="is no maskgit_flax checkpoint"):
        load_pretrained(vqgan, "maskgit_flax")


def test_flax_files(tmp_path: Path) -> None:
    """What Flax writes comes back; what is broken, or no checkpoint, is refused."""
    file = tmp_path / "checkpoint"
    tensors = {"params.a": torch.arange(300.0).view(3, 100), "params.b.c": torch.tensor(5, dtype=torch.int32)}
    write_flax(file, tensors)
    found = read_flax(file)["params"]
    assert torch.equal(found["a"], tensors["params.a"]) and torch.equal(found["b"]["c"], tensors["params.b.c"])
    whole = file.read_bytes()
    for share in (0.3, 0.9, 0.999):
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match="checkpoint' is truncated"):
            read_state(file)
    nested: Any = {"a": "b"}
    for _ in range(100):
        nested = {"a": nested}
    wrong_array = bytes([0x81, 0xA1, 0x61, 0xC7, 8, 1, 0x93, 0x91, 4, 0xA3]) + b"f99" + bytes([0xA0])
    for content, message in (
        (whole + b"\x00", "it is not one mapping"),
        (b"\x81\x05\x06", "it has a key that is no text"),
        (b"\x81\xa1a\xc1", "it has the byte 0xc1 at 3"),
        (b"\x81\xa1a\xd4\x02\x00", "an extension of the kind 2, where arrays alone are read"),
        (packed(nested), "nested more than 64 times"),
        (wrong_array, "holds an array that cannot be read"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_state(file)
