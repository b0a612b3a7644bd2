"""BitDance's published files: the EMA weights, the tokenizer beside them, the published evaluation and sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_cases import cases_of
from helpers.recipe_files import layered
from safetensors.torch import load_file, save_file

from discrete_lit.backbones import BinaryFlowHead, SequenceLayout, Transformer, ids_of_signs
from discrete_lit.pretrained import load_pretrained

GENERATORS = "lightning_configs/generators"


def written(case: Any, folder: Path, *, of_training: float = 0.0) -> Path:
    """A file as it is published: averaged and trained weights, of which only the former are read."""
    trained = {name: value + of_training for name, value in case.state.items()}
    torch.save({"ema": case.state, "model": trained, "steps": 3}, folder / "published.pt")
    return folder / "published.pt"


@pytest.mark.parametrize("case", cases_of(["bitdance", "bitdance_parallel"]))
def test_the_averaged_weights_are_read(case: Any, tmp_path: Path) -> None:
    generator = load_pretrained(written(case, tmp_path, of_training=1.0), case.family, case.arguments)
    expected = case.state["norm.weight"]
    assert torch.equal(generator.backbone.final_norm.weight, expected)


@pytest.mark.parametrize("case", cases_of(["bitdance"]))
def test_what_is_refused_by_name(case: Any, tmp_path: Path) -> None:
    file = written(case, tmp_path)
    for name, value, message in (
        ("time_shift", 2.0, "time_shift=2.0, but every model that is read has 1.0"),
        ("patch_size", 2, "patch_size=2, but every model that is read has 1"),
        ("perturb_schedule", "linear", "perturb_schedule=linear, but every model that is read has constant"),
        ("time_schedule", "cosine", "time_schedule='cosine'; logit_normal and uniform are read"),
        ("resolution", 256, "resolution=256 and down_size=16, but the tensors have a grid of"),
        ("n_head", 16, "n_head=16: heads of 2 channels do not turn on a grid"),
        ("parallel_num", 4, "parallel_num=4, which is not read"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pretrained(file, case.family, {**case.arguments, name: value})
    with pytest.raises(ValueError, match="is no bitdance_parallel checkpoint"):
        load_pretrained(file, "bitdance_parallel")


@pytest.mark.parametrize("case", cases_of(["bitdance"]))
def test_the_published_evaluation_is_the_sampler(case: Any, tmp_path: Path) -> None:
    plain = {name: value for name, value in case.arguments.items() if name != "sampling"}
    sampler = load_pretrained(written(case, tmp_path), case.family, plain).sampler
    assert (sampler.guidance_schedule, sampler.null_rows, sampler.solver) == ("linear", "own", None)
    uniform = load_pretrained(tmp_path / "published.pt", case.family, {**plain, "time_schedule": "uniform"})
    assert type(uniform.backbone.place_head.flow.objective._times).__name__ == "UniformTimes"
    undropped = load_pretrained(tmp_path / "published.pt", case.family, {**plain, "class_dropout_prob": 0.0})
    assert undropped.sampler.guidance_scale == 1.0


@pytest.mark.parametrize("case", cases_of(["bitdance"]))
@torch.no_grad()
def test_a_file_holds_its_tokenizer(case: Any, tmp_path: Path) -> None:
    """The ids of its signs are those that the generator models; a second tokenizer is refused."""
    other = next(case.values[0] for case in cases_of(["bitdance_ae"]))
    coder = load_pretrained(_file(other.state, tmp_path / "ae.safetensors"), "bitdance_ae", other.arguments)
    bits, own = coder.quantizer.dim, dict(case.state)
    # As many bits as the tokenizer has.
    for name, rows in (
        ("proj_in.w1.weight", (slice(None), slice(bits))),
        ("head.net.input_proj.weight", (slice(None), slice(bits))),
    ):
        own[name] = torch.cat([own[name]] * bits, dim=1)[rows].contiguous()
    for name in ("head.net.final_layer.linear.weight", "head.net.final_layer.linear.bias"):
        own[name] = torch.cat([own[name]] * bits)[:bits].contiguous()
    arguments = {**case.arguments, "latent_dim": bits, "down_size": 2, "resolution": 6}
    both = {**own, **{f"vae.{name}": value for name, value in other.state.items()}}
    generator = load_pretrained(_file(both, tmp_path / "both.safetensors"), "bitdance", arguments)
    assert generator.token_shape == (3, 3) and generator.vocab_size == 2**bits
    images = torch.rand(2, 3, *[generator.image_size] * 2) * 2 - 1
    latents = torch.where(coder.network.encoder(images) > 0, 1.0, -1.0)
    assert torch.equal(generator.tokenizer.encode(images), ids_of_signs(latents))
    assert generator.tokenizer.decode(generator.sample(torch.tensor([0, 1]))).shape == images.shape
    with pytest.raises(ValueError, match="holds its own tokenizer: give no other"):
        load_pretrained(tmp_path / "both.safetensors", "bitdance", arguments, coder)


def _file(state: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    assert load_file(path).keys() == state.keys()
    return path


@pytest.mark.parametrize(("recipe", "millions"), [("bitdance_b", 242), ("bitdance_b_4x", 260)])
def test_the_recipes_have_the_published_sizes(recipe: str, millions: int) -> None:
    """242 and 260 million are published."""
    settings = layered(f"{GENERATORS}/{recipe}_imagenet256.yaml")["model"]["init_args"]
    switches, block_size = dict(settings["backbone"]["init_args"]), settings.get("block_size", 1)
    given = switches["place_head"]["init_args"]
    switches["place_head"] = lambda block, size: BinaryFlowHead(block, size, **given)
    layout = SequenceLayout(
        2**32, (16, 16), num_classes=1000, attention="causal", any_order=block_size > 1, block_size=block_size
    )
    with torch.device("meta"):
        own = Transformer(layout, **switches)
    assert round(sum(parameter.numel() for parameter in own.parameters()) / 1e6) == millions
