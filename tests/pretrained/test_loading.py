"""`load_pretrained`: what it refuses, and how it says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from discrete_lit.pretrained import FAMILIES, load_pretrained

State = dict[str, Tensor]


@pytest.fixture
def load(taming_state: Callable[[], State], tmp_path: Path) -> Callable[..., Any]:
    """`load(change, family, reference_config)`: after a change of the tensors."""

    def load(
        change: Callable[[State], Any] | None = None, family: str = "taming_vqgan", reference_config: Any = None
    ) -> Any:
        state = taming_state()
        if change is not None:
            change(state)
        save_file(state, tmp_path / "vqgan.safetensors")
        return load_pretrained(tmp_path / "vqgan.safetensors", family, reference_config)

    return load


@torch.no_grad()
def test_it_encodes_and_decodes_in_eval_mode(load: Callable[..., Any]) -> None:
    tokenizer = load()
    assert not tokenizer.training and tokenizer.token_shape(16) == (8, 8) and tokenizer.vocab_size == 16
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = tokenizer.encode(images)
    assert len(tokens.unique()) > 4 and tokenizer.decode(tokens).shape == images.shape


def test_weights_in_half_precision_become_float32(load: Callable[..., Any]) -> None:
    tokenizer = load(lambda state: state.update({name: value.half() for name, value in state.items()}))
    assert {value.dtype for value in tokenizer.network.state_dict().values()} == {torch.float32}


def test_what_only_training_used_is_dropped(load: Callable[..., Any]) -> None:
    training = {"loss.discriminator.main.0.weight": torch.zeros(1), "colorize": torch.zeros(1)}
    kept: State = {}

    def add(state: State) -> None:
        kept.update(state)
        state.update(training)

    def keep(state: State) -> None:
        state.clear()
        state.update(kept)

    with_training, without = load(add).state_dict(), load(keep).state_dict()
    assert with_training.keys() == without.keys()
    assert all(torch.equal(value, with_training[name]) for name, value in without.items())


def test_weights_that_are_not_finite_are_refused(load: Callable[..., Any]) -> None:
    """Those that are read: masks and losses beside them may hold minus infinity."""
    load(lambda state: state.update({"loss.mask": torch.tensor([-torch.inf])}))
    with pytest.raises(ValueError, match=r"are not all finite numbers, first in 'quant_conv\.bias'"):
        load(lambda state: state["quant_conv.bias"].fill_(torch.inf))
    with pytest.raises(ValueError, match=r"'quant_conv\.bias' is torch\.int8 instead of torch\.float32"):
        load(lambda state: state.update({"quant_conv.bias": state["quant_conv.bias"].to(torch.int8)}))


def test_a_network_without_attention(load: Callable[..., Any]) -> None:
    """LDM's vq-f4-noattn."""
    tokenizer = load(lambda state: [state.pop(name) for name in list(state) if "attn" in name])
    assert not [name for name in tokenizer.state_dict() if "attention" in name or "query" in name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("decoder.up.1.block.1.conv2.bias"),
            r"vqgan\.safetensors' do not fit: 'decoder\.up\.1\.block\.1\.conv2\.bias' is missing$",
        ),
        (lambda state: state.pop("encoder.mid.attn_1.k.weight"), r"'encoder\.mid\.attn_1\.k\.weight' is missing"),
        (lambda state: state.pop("decoder.conv_in.weight"), r"has no key 'decoder\.conv_in\.weight'"),
        (
            lambda state: state.update({"encoder.extra": torch.zeros(1), "quantize.used": torch.zeros(1)}),
            "'encoder.extra' is unexpected; 'quantize.used' is unexpected$",
        ),
        (
            lambda state: state.update({"encoder.norm_out.weight": torch.zeros(64)}),
            r"'encoder\.norm_out\.weight' has shape \(64,\) instead of \(32,\)",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if name.endswith("bias") and "decoder" in name],
            r"(?s)is missing; .* and \d+ more$",
        ),
        (
            lambda state: state.update({"encoder.down.1.block.0.conv1.weight": torch.zeros(48, 32, 3, 3)}),
            r"widths \[48\] that are no multiples of its first one, 32",
        ),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str, load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        load(change)


def test_a_checkpoint_of_another_family(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"is no llamagen_vq checkpoint \(it has no .*\): it looks like taming_vqgan"):
        load(family="llamagen_vq")
    with pytest.raises(ValueError, match=r"\(it has 'model_ema.decay'\): it looks like ibq$"):
        load(lambda state: state.update({"model_ema.decay": torch.zeros(())}))
    with pytest.raises(ValueError, match="it looks like none of the known families"):
        load(lambda state: [state.pop(name) for name in list(state) if not name.startswith("decoder.mid")])


def test_a_weight_without_its_running_mean(load: Callable[..., Any]) -> None:
    def add_means(state: State) -> None:
        means = {f"model_ema.{name.replace('.', '')}": value.clone() for name, value in state.items()}
        state.update(means)
        del state["model_ema.encoderconv_inbias"]

    with pytest.raises(ValueError, match=r"has 'encoder\.conv_in\.bias' but not its running mean 'model_ema\.encoderc"):
        load(add_means, "ibq")


def test_a_prefix_of_the_tokenizer_in_a_larger_file(load: Callable[..., Any]) -> None:
    """Of all names, or of those of a part: then the others are named. A file of another family stays refused."""

    def behind(prefix: str, **others: Tensor) -> Callable[[State], Any]:
        def rename(state: State) -> None:
            renamed = {prefix + name: value for name, value in state.items()} | others
            state.clear()
            state.update(renamed)

        return rename

    torch.manual_seed(0)
    plain = load()
    for prefix in ("first_stage_model.", "model.module.", "state_dict.any._orig_mod."):
        torch.manual_seed(0)
        other = load(behind(prefix))
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())
    with pytest.warns(UserWarning, match=r"the part first_stage_model\.\* is read; the others are not: diffusion"):
        load(behind("first_stage_model.", **{"diffusion.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"is no taming_vqgan checkpoint .*: it looks like taming_net2net"):
        gpt = {"transformer.tok_emb.weight": torch.zeros(1), "transformer.pos_emb": torch.zeros(1)}
        load(behind("first_stage_model.", **gpt))


@pytest.mark.parametrize(
    ("resolutions", "resolution", "message"),
    [([8], 16, None), ([8, 1], 16, None), ([], 16, r"attn_resolutions=\[\] at resolution=16"), ([8], 32, r"at \[16\]")],
)
def test_the_levels_with_attention_are_compared(
    resolutions: list[int], resolution: int, message: str | None, load: Callable[..., Any]
) -> None:
    config = {"ddconfig": {"attn_resolutions": resolutions, "resolution": resolution, "dropout": 0.1}}
    if message is None:
        load(reference_config=config)
        return
    with pytest.raises(ValueError, match=message):
        load(reference_config=config)


def test_an_unknown_family() -> None:
    with pytest.raises(ValueError, match=r"family='taming_vqgam' is not known; did you mean 'taming_vqgan'\? The fam"):
        load_pretrained("nowhere.ckpt", "taming_vqgam")
    assert {"taming_vqgan", "llamagen_vq", "var_vqvae"} < FAMILIES.keys()


PUBLISHED = {"model": {"target": "taming.models.vqgan.VQModel", "params": {"embed_dim": 4, "n_embed": 16}}}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_published_configuration_is_compared_with_the_tensors(
    suffix: str, load: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / f"model.{suffix}"
    file.write_text(json.dumps(PUBLISHED) if suffix == "json" else yaml.safe_dump(PUBLISHED))
    load(reference_config=str(file))
    with pytest.raises(ValueError, match="reference_config has n_embed=1024, but the tensors have 16"):
        load(reference_config={"n_embed": 1024})
    with pytest.raises(ValueError, match=r"has ddconfig.ch_mult=\[1, 2\], but the tensors have \[1, 1\]"):
        load(reference_config={"ddconfig": {"ch_mult": (1, 2)}})


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no reference_config at"), ("[1, 2]", "holds a list"), ("{a: [", "is neither YAML nor JSON")],
)
def test_a_reference_config_that_cannot_be_read(
    content: str | None, message: str, load: Callable[..., Any], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "model.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(reference_config=tmp_path / "model.yaml")


@torch.no_grad()
def test_ids_and_sizes_out_of_range(load: Callable[..., Any]) -> None:
    tokenizer = load()
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 16\), got \[0, 16\]"):
        tokenizer.decode(torch.tensor([[[0, 16]]]))
    with pytest.raises(ValueError, match="image_size=15 is not a multiple of the down-sampling 2"):
        tokenizer.encode(torch.zeros(1, 3, 15, 16))
