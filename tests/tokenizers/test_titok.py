"""TiTok in one stage and in two."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from helpers.tiny_runs import QUIET, run, write_settings
from torch.nn import functional as F

import discrete_lit
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.tokenizers import TiTok, from_checkpoint
from discrete_lit.tokenizers.networks import ConvAutoencoder, TransformerSize
from discrete_lit.tokenizers.quantizers import FiniteScalarQuantizer, VectorQuantizer
from discrete_lit.tokenizers.titok import ProxyDecoder, TiTokAutoencoder

CONVOLUTIONS = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {
        "channels": 4,
        "multipliers": [1, 1, 1],
        "blocks": 1,
        "attention": False,
        "norm_groups": 2,
        "pixels": "unit",
    },
}
PROXY = {
    "class_path": "discrete_lit.tokenizers.VQVAE",
    "init_args": {"codebook_size": 9, "code_dim": 4, "network": CONVOLUTIONS},
}
NETWORK = {
    "class_path": "discrete_lit.tokenizers.titok.TiTokAutoencoder",
    "init_args": {
        "image_size": 8,
        "patch_size": 4,
        "latent_tokens": 3,
        "encoder": {"width": 16, "depth": 1, "heads": 2},
        "decoder": {"width": 16, "depth": 1, "heads": 2},
    },
}
WITH_PROXY = {
    **NETWORK,
    "init_args": {
        **NETWORK["init_args"],
        "proxy": {
            "class_path": "discrete_lit.tokenizers.titok.ProxyDecoder",
            "init_args": {"codebook_size": 9, "code_dim": 4, "network": CONVOLUTIONS},
        },
    },
}
QUANTIZER = {
    "class_path": "discrete_lit.tokenizers.quantizers.VectorQuantizer",
    "init_args": {"codebook_size": 6, "dim": 3, "codebook_update": "gradient", "normalize": True},
}


def titok(network: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    arguments = {"network": network, "quantizer": QUANTIZER, "optimizer": optimizer, **arguments}
    return copy.deepcopy({"class_path": "discrete_lit.tokenizers.TiTok", "init_args": arguments})


def fit(model: dict[str, Any], folder: Path, *arguments: Any, max_steps: int = 2) -> Path:
    data = {"class_path": "helpers.synthetic_data.SyntheticImages", "init_args": {"count": 8, "batch_size": 4}}
    trainer = {**QUIET, "max_steps": max_steps, "val_check_interval": 1}
    folder.mkdir(exist_ok=True)
    file = write_settings(folder / "settings.yaml", {"model": model, "data": data, "trainer": trainer})
    run("fit", "--config", file, "--run_dir", folder, *arguments)
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained convolutional tokenizer: 8 x 8 pixels to 2 x 2 of 9 ids."""
    module = instantiate(copy.deepcopy(PROXY))
    randomise(module, 0.5)
    path = tmp_path_factory.mktemp("proxy") / "proxy.ckpt"
    save(module, path)
    return path


@pytest.fixture(scope="module")
def first(proxy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(titok(WITH_PROXY, proxy_tokenizer=str(proxy)), tmp_path_factory.mktemp("first"))


def weights(module: torch.nn.Module, *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if name.startswith(prefixes)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


def test_one_stage_learns() -> None:
    """Four images of one colour each become rows of tokens and are given back."""

    def network(code_dim: int, latent_dim: int) -> TiTokAutoencoder:
        size = TransformerSize(32, 1, heads=2)
        shape = {"image_size": 8, "patch_size": 4, "latent_tokens": 3}
        return TiTokAutoencoder(code_dim, latent_dim, encoder=size, decoder=size, **shape)

    tokenizer = TiTok(network, FiniteScalarQuantizer([5, 5, 5]), optimizer=partial(torch.optim.Adam, lr=2e-3)).train()
    randomise(tokenizer.network, 0.1)  # the deviation 0.02 suits wide networks
    colours = torch.tensor([[0.9, 0.9, 0.9], [-0.9, -0.9, -0.9], [0.9, -0.9, -0.9], [-0.9, -0.9, 0.9]])
    images = colours[:, :, None, None].expand(-1, -1, 8, 8)
    optimizer = tokenizer.configure_optimizers()
    for _ in range(240):
        loss = tokenizer.loss(images)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.eval()
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        assert F.mse_loss(tokenizer.decode(tokens), images) < 0.1
    assert tokens.shape == (4, *tokenizer.token_shape(8)) == (4, 3)
    assert len(tokens.unique(dim=0)) == 4


def test_stage_1_predicts_the_proxys_ids(proxy: Path) -> None:
    module = instantiate(titok(WITH_PROXY, proxy_tokenizer=str(proxy)))
    assert isinstance(module, TiTok)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    ids = from_checkpoint(str(proxy)).encode(images)
    loss, terms, made = module.train().loss(images)
    assert set(terms) == {"proxy", "commitment", "codebook"}
    torch.testing.assert_close(loss, torch.stack(list(terms.values())).sum())
    logits = module.network.proxy_logits(module.embed(made.tokens))
    expected = -logits.log_softmax(dim=1).gather(1, ids[:, None]).mean()
    torch.testing.assert_close(terms["proxy"], expected)
    assert module.eval().loss(images)[2].outputs.shape == images.shape
    perceptual = {"class_path": "discrete_lit.tokenizers.losses.LPIPS", "init_args": {"weights_path": "random"}}
    with pytest.raises(ValueError, match="no pixels are compared: leave out perceptual_loss"):
        instantiate(titok(WITH_PROXY, proxy_tokenizer=str(proxy), perceptual_loss=perceptual))


def test_what_each_stage_trains(proxy: Path) -> None:
    """Exactly the parameters that are to learn have a gradient: DDP needs no search for unused ones."""
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    frozen = {
        "proxy_tokenizer": ("network.proxy.",),
        "first_stage": ("network.encoder.", "quantizer."),
    }
    for stage, prefixes in frozen.items():
        module = instantiate(titok(WITH_PROXY, **{stage: str(proxy)})).train()
        assert isinstance(module, TiTok)
        module.loss(images)[0].backward()
        for name, parameter in module.named_parameters():
            learns = not name.startswith(prefixes)
            assert parameter.requires_grad == learns and (parameter.grad is not None) == learns, (stage, name)


def test_two_stages(proxy: Path, first: Path, tmp_path: Path) -> None:
    other, one = from_checkpoint(str(proxy)), discrete_lit.load(first)
    decoder = "network.decoder."
    assert isinstance(one, TiTok)
    assert torch.equal(one.network.proxy.codebook, other.quantizer.lookup(torch.arange(9)[None])[0])
    assert equal(
        {name.removeprefix("network.proxy."): value for name, value in weights(one, "network.proxy.network.").items()},
        weights(other, decoder),
    )

    stage_1 = tmp_path / "stage_1.ckpt"
    stage_1.write_bytes(first.read_bytes())
    last = fit(titok(WITH_PROXY, first_stage=str(stage_1)), tmp_path / "second")
    stage_1.unlink()
    two = discrete_lit.load(last)
    assert isinstance(two, TiTok)
    kept = ("network.encoder.", "quantizer.")
    assert len(weights(one, *kept)) > 10 and equal(weights(one, *kept), weights(two, *kept))
    for learns in ("network.decoder.", "network.proxy.network.", "network.proxy.codebook"):
        before, after = weights(one, learns), weights(two, learns)
        assert not equal(before, after)
        assert max(float((before[name] - after[name]).abs().max()) for name in before) < 0.05  # two small steps away
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(one.encode(images), two.encode(images))
    assert two.decode(two.encode(images)).shape == images.shape

    fit(titok(WITH_PROXY, first_stage=str(stage_1)), tmp_path / "second", "--ckpt_path", "last", max_steps=3)


def test_the_quantizer_of_stage_2_does_not_move() -> None:
    quantizer = {**QUANTIZER, "init_args": {"codebook_size": 6, "dim": 3, "codebook_init": "normal"}}
    module = instantiate(titok(WITH_PROXY, quantizer=quantizer, first_stage="stage_1.ckpt")).train()
    assert isinstance(module, TiTok)
    before = {name: value.clone() for name, value in weights(module, "quantizer.").items()}
    _, terms, _ = module.loss(torch.rand(3, 3, 8, 8))
    assert equal(before, weights(module, "quantizer."))
    assert set(terms) == {"reconstruction"}
    assert module.network.decoder.training and not module.network.encoder.training


def direct(codebook_size: int = 9, patch_size: int = 4, channels: int = 4, proxy: bool = True, **arguments) -> TiTok:
    """A TiTok of the configuration above with some sizes changed, without the parsing."""
    convolutions = {**CONVOLUTIONS["init_args"], "channels": channels}
    decoder = ProxyDecoder(codebook_size, 4, network=partial(ConvAutoencoder, **convolutions)) if proxy else None
    size = TransformerSize(16, 1, heads=2)
    shape = {"image_size": 8, "patch_size": patch_size, "latent_tokens": 3}
    network = partial(TiTokAutoencoder, encoder=size, decoder=size, proxy=decoder, **shape)
    return TiTok(network, VectorQuantizer(**QUANTIZER["init_args"]), **arguments)


def test_stages_that_do_not_fit(proxy: Path, first: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set one of them"):
        direct(proxy_tokenizer="a", first_stage="b")
    with pytest.raises(ValueError, match="needs a network with a proxy"):
        direct(proxy=False, first_stage="b")
    for module, message in (
        (direct(proxy_tokenizer=str(tmp_path / "none.ckpt")), "no checkpoint at"),
        (direct(proxy_tokenizer=str(first)), "holds a TiTok; the proxy must be a tokenizer around a Conv"),
        (direct(10, proxy_tokenizer=str(proxy)), r"codebook of shape \(9, 4\), this network's proxy one of \(10, 4\)"),
        (direct(channels=8, proxy_tokenizer=str(proxy)), "the proxy tokenizer's decoder is another"),
        (
            direct(patch_size=2, proxy_tokenizer=str(proxy)),
            r"\(2, 2\) ids of 8 pixels, and this network has \(4, 4\) p",
        ),
        (direct(first_stage=str(proxy)), "holds a VQVAE, not a TiTok"),
        (direct(10, first_stage=str(first)), "is a TiTok of other sizes"),
    ):
        module._trainer = type("Trainer", (), {"ckpt_path": None})()
        with pytest.raises(ValueError, match=message):
            module.setup("fit")
            module.on_fit_start()
