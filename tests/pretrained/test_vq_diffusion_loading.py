"""VQ-Diffusion's checkpoints: the forms that are read, held against the equations, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import Case, published
from helpers.golden_cases import cases_of
from helpers.golden_replacing import level_of
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.pretrained import load_pretrained

vq_diffusion = pytest.mark.parametrize("case", cases_of(["vq_diffusion"]))
WIDTH, HEADS, SIZE, SIDE, STEPS = 8, 2, 5, 2, 10


def tables(steps: int = STEPS) -> dict[str, Tensor]:
    """The noise of alpha_init_type='alpha1', in the formulas of its code."""
    kept = torch.linspace(0.99999, 0.000009, steps, dtype=torch.float64)
    masked = torch.linspace(0.000009, 0.99999, steps, dtype=torch.float64)
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a = kept / torch.cat((one, kept[:-1]))
    c = 1 - (1 - masked) / (1 - torch.cat((none, masked[:-1])))
    kept, masked = torch.cat((kept, one)), torch.cat((masked, none))
    made = {
        "at": a,
        "bt": (1 - a - c) / SIZE,
        "ct": c,
        "cumprod_at": kept,
        "cumprod_bt": (1 - kept - masked) / SIZE,
        "cumprod_ct": masked,
        "1_min_ct": 1 - c,
        "1_min_cumprod_ct": 1 - masked,
    }
    return {f"log_{name}": value.log().float() for name, value in made.items()}


def random_state(*, rows: int | None, waves: bool, on_grid: bool, sides: tuple[int, int]) -> dict[str, Tensor]:
    """A model of one block: tables of so many classes or none, fixed waves or a table of the time."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.4

    block, embedding = "transformer.blocks.0", "transformer.content_emb"
    kernel = (3, 3) if on_grid else ()
    first, second = ("mlp.conv1", "mlp.conv2") if on_grid else ("mlp.0", "mlp.2")
    state = tables() | {
        "Lt_history": torch.rand(STEPS, generator=generator),
        "Lt_count": torch.full((STEPS,), 20.0),
        f"{embedding}.emb.weight": random(SIZE + 1, WIDTH),
        f"{embedding}.height_emb.weight": random(sides[0], WIDTH),
        f"{embedding}.width_emb.weight": random(sides[1], WIDTH),
        f"{block}.ln1.linear.weight": random(2 * WIDTH, WIDTH),
        f"{block}.ln1.linear.bias": random(2 * WIDTH),
        f"{block}.{first}.weight": random(4 * WIDTH, WIDTH, *kernel),
        f"{block}.{first}.bias": random(4 * WIDTH),
        f"{block}.{second}.weight": random(WIDTH, 4 * WIDTH, *kernel),
        f"{block}.{second}.bias": random(WIDTH),
        "transformer.to_logits.0.weight": 1 + random(WIDTH),
        "transformer.to_logits.0.bias": random(WIDTH),
        "transformer.to_logits.1.weight": random(SIZE, WIDTH),
        "transformer.to_logits.1.bias": random(SIZE),
    }
    for part in ("key", "query", "value", "proj"):
        state |= {f"{block}.attn.{part}.weight": random(WIDTH, WIDTH), f"{block}.attn.{part}.bias": random(WIDTH)}
    if not waves:
        state[f"{block}.ln1.emb.weight"] = random(STEPS, WIDTH)
    if rows is None:
        state |= {f"{block}.ln2.weight": 1 + random(WIDTH), f"{block}.ln2.bias": random(WIDTH)}
    else:
        state |= {
            f"{block}.ln2.emb.weight": random(rows, WIDTH),
            f"{block}.ln2.linear.weight": random(2 * WIDTH, WIDTH),
            f"{block}.ln2.linear.bias": random(2 * WIDTH),
        }
    return state


def logits_by_hand(state: dict[str, Tensor], tokens: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
    """The network of the paper's appendix, of one block."""
    block = "transformer.blocks.0"

    def of(name: str) -> Tensor:
        return state[f"{block}.{name}"]

    def modulated(x: Tensor, name: str, vectors: Tensor) -> Tensor:
        scale, shift = F.linear(F.silu(vectors), of(f"{name}.linear.weight"), of(f"{name}.linear.bias"))[:, None].chunk(
            2, dim=-1
        )
        return F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift

    if f"{block}.ln1.emb.weight" in state:
        times = of("ln1.emb.weight")[steps]
    else:
        frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(WIDTH // 2) / (WIDTH // 2 - 1))
        angles = (steps / STEPS * 4000)[:, None] * frequencies
        times = torch.cat((angles.sin(), angles.cos()), dim=-1)
    rows, columns = (state[f"transformer.content_emb.{axis}_emb.weight"] for axis in ("height", "width"))
    positions = (rows[:, None] + columns[None]).reshape(-1, WIDTH)[: tokens.shape[1]]
    x = state["transformer.content_emb.emb.weight"][tokens] + positions
    normed = modulated(x, "ln1", times)
    query, key, value = (
        F.linear(normed, of(f"attn.{name}.weight"), of(f"attn.{name}.bias")).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    mixed = ((query @ key.transpose(-1, -2)) / (WIDTH // HEADS) ** 0.5).softmax(dim=-1) @ value
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), of("attn.proj.weight"), of("attn.proj.bias"))
    if f"{block}.ln2.weight" in state:
        normed = F.layer_norm(x, (WIDTH,), of("ln2.weight"), of("ln2.bias"))
    else:
        table = of("ln2.emb.weight")
        normed = modulated(x, "ln2", torch.cat((table, table.mean(dim=0, keepdim=True)))[labels])

    def activated(hidden: Tensor) -> Tensor:
        return hidden * torch.sigmoid(1.702 * hidden)

    if f"{block}.mlp.conv1.weight" in state:
        image = normed.transpose(1, 2).unflatten(-1, (SIDE, SIDE))
        hidden = activated(F.conv2d(image, of("mlp.conv1.weight"), of("mlp.conv1.bias"), padding=1))
        branch = F.conv2d(hidden, of("mlp.conv2.weight"), of("mlp.conv2.bias"), padding=1).flatten(2).transpose(1, 2)
    else:
        hidden = activated(F.linear(normed, of("mlp.0.weight"), of("mlp.0.bias")))
        branch = F.linear(hidden, of("mlp.2.weight"), of("mlp.2.bias"))
    last = "transformer.to_logits"
    x = F.layer_norm(x + branch, (WIDTH,), state[f"{last}.0.weight"], state[f"{last}.0.bias"])
    return F.linear(x, state[f"{last}.1.weight"], state[f"{last}.1.bias"])


SETTINGS: dict[str, Any] = {"transformer_config": {"params": {"content_spatial_size": [SIDE, SIDE], "n_head": HEADS}}}


@pytest.mark.parametrize(
    ("form", "classes"),
    [
        ({"rows": 3, "waves": False, "on_grid": True, "sides": (SIDE, SIDE)}, 3),
        ({"rows": 3, "waves": True, "on_grid": False, "sides": (SIDE, SIDE)}, 3),
        # The embedding of positions is that of a larger grid, as the published one of ImageNet.
        ({"rows": None, "waves": False, "on_grid": True, "sides": (3, 4)}, 1),
    ],
)
@torch.no_grad()
def test_the_network(tmp_path: Path, form: dict[str, Any], classes: int) -> None:
    state = random_state(**form)
    save_file(state, tmp_path / "model.safetensors")
    generator = load_pretrained(tmp_path / "model.safetensors", "vq_diffusion", SETTINGS)
    assert generator.num_classes == classes and generator.token_shape == (SIDE, SIDE)
    states, steps = torch.randint(SIZE + 1, (4, SIDE**2)), torch.tensor([0, 3, STEPS - 2, STEPS - 1])
    labels = torch.arange(4) % (classes + 1)  # the null class among them
    level = level_of(generator, steps)
    found = generator.backbone(states, labels, time=generator.denoiser().network_time(level))
    torch.testing.assert_close(found, logits_by_hand(state, states, steps, labels), rtol=0, atol=1e-4)
    torch.testing.assert_close(generator.importance.squares, state["Lt_history"])
    assert generator.sample(labels).shape == (4, SIDE, SIDE)


def test_a_null_class_of_its_own(tmp_path: Path) -> None:
    state = random_state(rows=4, waves=False, on_grid=True, sides=(SIDE, SIDE))
    save_file(state, tmp_path / "model.safetensors")
    settings = {**SETTINGS, "condition_emb_config": {"params": {"num_embed": 3}}}
    generator = load_pretrained(tmp_path / "model.safetensors", "vq_diffusion", settings)
    assert generator.num_classes == 3
    table = generator.backbone.norm_tables[0].class_table.weight
    assert torch.equal(table, state["transformer.blocks.0.ln2.emb.weight"])


@vq_diffusion
def test_published_files_and_configurations(case: Case, tmp_path: Path) -> None:
    """Weights beside those of the tokenizer, averages preferred; the arguments within a whole configuration."""
    trained = {f"transformer.{name}": value + 1 for name, value in case.state.items() if value.is_floating_point()}
    trained["content_codec.enc.weight"] = torch.zeros(1)
    torch.save({"model": trained, "ema": dict(case.state), "last_epoch": 3}, tmp_path / "imagenet.pth")
    whole = {
        "model": {
            "target": "image_synthesis.modeling.models.conditional_dalle.C_DALLE",
            "params": {
                "content_info": {"key": "image"},
                "guidance_scale": 3.0,
                "diffusion_config": {"target": "x.DiffusionTransformer", "params": case.constructor},
            },
        },
        "solver": {"base_lr": 3e-6},
    }
    generator = load_pretrained(tmp_path / "imagenet.pth", "vq_diffusion", whole)
    same = published(case, tmp_path)()
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in generator.state_dict().items())
    assert (generator.sampler.guidance_scale, same.sampler.guidance_scale) == (3.0, 1.0)
    assert generator.sampler.top_p == 0.86 and generator.sampler.steps == generator.objective.steps


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        (
            {},
            {},
            "nothing in .* tells the grid of the tokens: give reference_config with transformer_config.content_sp",
        ),
        ({}, {"content_seq_len": 5}, "has 5 tokens, which is no square grid"),
        ({}, {"content_spatial_size": [4, 1]}, "are equal where mlp_type is conv_mlp"),
        ({}, {"content_spatial_size": [9, 9]}, r"positions for 4 tokens, the grid \(9, 9\) has 81"),
        ({"log_at": torch.zeros(STEPS)}, {"content_seq_len": 4}, "log_at is not that of alpha_init_type='alpha1'"),
        ({"transformer.blocks.0.attn1.query.weight": torch.zeros(1)}, {"content_seq_len": 4}, "is a model of texts"),
    ],
)
def test_what_is_refused(tmp_path: Path, changed: dict[str, Tensor], settings: dict[str, Any], message: str) -> None:
    state = random_state(rows=3, waves=False, on_grid=True, sides=(SIDE, SIDE)) | changed
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "model.safetensors", "vq_diffusion", {"transformer_config": settings})
