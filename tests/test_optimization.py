"""Parameter groups and learning-rate schedules."""

from copy import deepcopy
from functools import partial
from math import cos, pi
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import latent_generators
from lightning import LightningModule, Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

from discrete_lit import optimization
from discrete_lit.optimization import (
    MuonAdamW,
    WarmupCosine,
    WarmupLinear,
    WarmupPlateau,
    configure_apart,
    configure_optimizers,
    fuse_steps,
)
from discrete_lit.tokenizers import FSQ
from discrete_lit.tokenizers.networks import TransformerSize, ViTAutoencoder

ADAMW = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)


def names_by_decay(module) -> tuple[set[str], set[str]]:
    """The names of the decayed and of the other parameters, each of which must occur exactly once."""
    optimizer = module.configure_optimizers()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, others = [], []
    for group in optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.5)
        (decayed if group["weight_decay"] else others).extend(names[id(parameter)] for parameter in group["params"])
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert sorted(decayed + others) == sorted(trained)
    return set(decayed), set(others)


@pytest.mark.parametrize("conditioning", ["prefix", "adaln"])
@pytest.mark.parametrize("family", ["masked", "autoregressive"])
def test_generators_decay_matrices_alone(make_generator, family: str, conditioning: str) -> None:
    generator = make_generator(family, backbone={"conditioning": conditioning}, optimizer=ADAMW)
    decayed, others = names_by_decay(generator)
    assert not [name for name in decayed | others if name.startswith("tokenizer.")]
    assert "backbone.blocks.0.attention.query_key_value.weight" in decayed and "backbone.head.project.weight" in decayed
    tables = {"token_embedding.table.weight", "class_embedding.weight", "positions.embedding"}
    if (family, conditioning) == ("autoregressive", "adaln"):
        tables.add("start")
    assert {f"backbone.{name}" for name in tables} <= others
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    matrices = {name for name, parameter in generator.backbone.named_parameters() if parameter.ndim >= 2} - tables
    assert decayed == {f"backbone.{name}" for name in matrices}


# What each code excludes, by its own words, where a name of ours stands for one of theirs.
AS_PUBLISHED = {
    "linear": lambda name, shape: name.endswith(("table.weight", "class_embedding.weight", "positions.embedding")),
    # VAR: `para.ndim == 1 or name.endswith("bias")`, start token, positions and levels.
    "linear_and_classes": lambda name, shape: name.endswith(("table.weight", "positions.embedding", "start")),
    # RAR: `p.ndim < 2 or "ln" in n or "bias" in n or "embedding" in n or "embed" in n`; ours calls its
    # `adaln_before_head` a final modulation, and its `cls_token` a start.
    "rar": lambda name, shape: "embedding" in name or "final_modulation" in name,
    # BAR: the same words in `n.lower()`, so that its `adaLN_modulation`s have an "ln" too.
    "bar": lambda name, shape: "embedding" in name or "modulation" in name,
    "matrices": lambda name, shape: False,  # LlamaGen: `p.dim() < 2` alone
    # BitDance: `proj_in`, `cls_embedding`, `query_token`.
    "bitdance": lambda name, shape: "token_embedding" in name or "class_embedding" in name,
}


@pytest.mark.parametrize("rule", [*AS_PUBLISHED, "all"])
def test_weight_decay_as_published(make_generator, rule: str) -> None:
    switches = {"conditioning": "prefix_adaln", "registers": 1, "condition_positions": True, "target_positions": True}
    generator = make_generator("autoregressive", backbone=switches, optimizer=ADAMW, weight_decay_rule=rule)
    decayed, others = names_by_decay(generator)
    named = {f"backbone.{name}": value for name, value in generator.backbone.named_parameters()}
    excluded = AS_PUBLISHED.get(rule, lambda name, shape: False)
    if rule == "all":
        assert not others and decayed == set(named)
        return
    # Positions of the condition and of targets are tables, which no name of theirs decays.
    tables = ("condition_positions", "target_embedding", "start") if rule.startswith("linear") else ()
    tables = ("condition_positions", "target_embedding") if rule in ("rar", "bar") else tables
    assert decayed == {
        name
        for name, value in named.items()
        if value.ndim >= 2 and not excluded(name, value.shape) and not name.endswith(tables)
    }


def test_weight_decay_of_mar() -> None:
    """`len(param.shape) == 1 or name.endswith(".bias") or 'diffloss' in name` do not; its `mask_token` is (1, 1, D)."""
    generator = latent_generators.make("ContinuousMasked")
    generator.optimizer, generator.weight_decay_rule = ADAMW, "mar"
    decayed, others = names_by_decay(generator)
    assert {"backbone.mask_vector", "backbone.encoder_positions", "backbone.class_embedding.weight"} <= decayed
    assert {name for name in decayed | others if name.startswith("head.")} <= others
    assert all(name.startswith("head.") or name.endswith("bias") or "norm" in name for name in others)


def test_a_rule_of_weight_decay_that_is_not_known(make_generator) -> None:
    generator = make_generator("masked", optimizer=ADAMW, weight_decay_rule="biases")
    with pytest.raises(ValueError, match=r"weight_decay_rule='biases' is not known, accepted: linear, .*all"):
        generator.configure_optimizers()


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_gradients_of_a_sequence(make_generator, tmp_path, clip: float | None) -> None:
    """N times those of a token: plain gradient descent steps N times as far, unless a clip makes both as long."""
    batch = {"tokens": torch.randint(4, (4, 3)), "label": torch.arange(4) % 2, "index": torch.arange(4)}
    moved, logged = {}, {}
    for kind in ("token", "sequence"):
        torch.manual_seed(0)
        generator = make_generator("masked", optimizer=partial(torch.optim.SGD, lr=0.1), gradient_of=kind)
        before = torch.cat([value.detach().flatten().clone() for value in generator.backbone.parameters()])
        trainer = Trainer(
            accelerator="cpu",
            max_steps=1,
            gradient_clip_val=clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(generator.train(), DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
        after = torch.cat([value.detach().flatten() for value in generator.backbone.parameters()])
        moved[kind], logged[kind] = after - before, float(trainer.callback_metrics["train/loss"])
    assert logged["token"] == pytest.approx(logged["sequence"])
    expected = moved["token"] * (3 if clip is None else 1)
    torch.testing.assert_close(moved["sequence"], expected, rtol=1e-3, atol=1e-6)


def test_gradients_of_what_is_not_known(make_generator) -> None:
    with pytest.raises(ValueError, match="gradient_of='batch' is not known, accepted: token, sequence"):
        make_generator("masked", gradient_of="batch")


@pytest.mark.parametrize(
    ("kind", "arguments"), [("fsq", {}), ("vqvae", {}), ("vqvae", {"codebook_update": "gradient"})]
)
def test_tokenizers_decay_matrices_alone(make_tokenizer, kind: str, arguments) -> None:
    decayed, others = names_by_decay(make_tokenizer(kind, optimizer=ADAMW, **arguments))
    assert ("quantizer.codebook.codes" in others) == bool(arguments)
    assert all("norm" not in name and name.endswith("weight") for name in decayed)
    assert "network.encoder.conv_in.weight" in decayed and "network.encoder.conv_in.bias" in others


def test_a_weight_under_a_spectral_norm_decays() -> None:
    module = LightningModule()
    module.layer = spectral_norm(torch.nn.Conv1d(2, 2, 1))
    decayed, others = (
        {id(one) for one in group["params"]} for group in configure_optimizers(module, ADAMW, None).param_groups
    )
    assert decayed == {id(module.layer.parametrizations.weight.original)} and others == {id(module.layer.bias)}


def test_a_network_without_biases_and_gains(make_generator) -> None:
    """Nothing is left for the second group but the tables; an optimizer takes it all the same."""
    switches = {"bias": False, "conditioning": "adaln", "positions": "rope_1d"}
    decayed, others = names_by_decay(make_generator("masked", backbone=switches, optimizer=ADAMW))
    assert {name for name in others if "embedding" in name} == {
        "backbone.token_embedding.table.weight",
        "backbone.class_embedding.weight",
    }
    assert decayed


def test_the_scheduler_steps_after_every_batch(make_generator) -> None:
    scheduler = partial(WarmupCosine, warmup_steps=2, total_steps=6)
    configured = make_generator("masked", optimizer=ADAMW, scheduler=scheduler).configure_optimizers()
    assert isinstance(configured["optimizer"], torch.optim.AdamW)
    assert configured["lr_scheduler"]["interval"] == "step"
    assert isinstance(configured["lr_scheduler"]["scheduler"], WarmupCosine)


def test_no_optimizer(make_tokenizer) -> None:
    with pytest.raises(ValueError, match=r"FSQ has no optimizer: set model.init_args.optimizer, .*torch.optim.AdamW"):
        configure_optimizers(make_tokenizer(), None, None)


def steps_of(optimizer: torch.optim.Optimizer, count: int) -> list[torch.Tensor]:
    """The parameters after steps along fixed random gradients, of sizes far apart."""
    random = torch.Generator().manual_seed(1)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random) * 10.0 ** (3 * len(parameter) - 12)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def groups_of_parameters() -> list[dict]:
    random = torch.Generator().manual_seed(0)
    matrix, vector = (torch.randn(shape, generator=random).requires_grad_() for shape in ((4, 30), (5,)))
    return [{"params": [matrix]}, {"params": [vector], "weight_decay": 0.0, "lr": 0.03}, {"params": []}]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_steps_are_the_same_and_go_on_from_the_others(kind, monkeypatch) -> None:
    """Run on a CPU, which has this kernel too; a checkpoint of either kind is resumed by either."""
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}
    plain = kind(groups_of_parameters(), **settings)
    expected = steps_of(plain, 6)
    monkeypatch.setattr(optimization, "_FUSED_ON", {"cpu"})
    fused = kind(groups_of_parameters(), **settings)
    fuse_steps(fused)
    assert [group["fused"] for group in fused.param_groups] == [True] * 3
    assert not getattr(fused, "_step_supports_amp_scaling", False), "or Lightning clips no gradients"
    torch.testing.assert_close(steps_of(fused, 6), expected, rtol=1e-5, atol=1e-6)
    for first, second in ((plain, fused), (fused, plain)):
        resumed = kind(groups_of_parameters(), **settings)
        (fuse_steps if second is fused else lambda _: None)(resumed)
        for parameter, value in zip(parameters_of(resumed), parameters_of(first), strict=True):
            parameter.data.copy_(value)
        resumed.load_state_dict(deepcopy(first.state_dict()))
        torch.testing.assert_close(steps_of(resumed, 2), steps_of(first, 2), rtol=1e-5, atol=1e-6)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def test_which_steps_are_fused(monkeypatch) -> None:
    def fused(kind=torch.optim.AdamW, **settings) -> list[bool | None]:
        built = kind(groups_of_parameters(), lr=0.1, **settings)
        fuse_steps(built)
        return [group.get("fused") for group in built.param_groups]

    assert fused() == [None] * 3, "on a CPU"
    monkeypatch.setattr(optimization, "_FUSED_ON", {"cpu"})
    assert fused() == [True] * 3
    assert fused(fused=False) == [False] * 3 and fused(foreach=True) == fused(differentiable=True) == [None] * 3
    assert fused(torch.optim.SGD) == [None] * 3

    class Mine(torch.optim.AdamW):
        pass

    assert fused(Mine) == [None] * 3


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer` in `LightningModule`")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_of_fused_steps_are_clipped(make_generator, monkeypatch, precision: str, tmp_path) -> None:
    """Lightning refuses to where an optimizer was constructed as a fused one, under autocast in bfloat16 too."""
    monkeypatch.setattr(optimization, "_FUSED_ON", {"cpu"})
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *found, **more: norms.append(clip(*found, **more)) or norms[-1]
    )
    generator = make_generator("masked", optimizer=ADAMW)
    batch = {"tokens": torch.randint(4, (4, 3)), "label": torch.arange(4) % 2, "index": torch.arange(4)}
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        max_steps=2,
        gradient_clip_val=1e-3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(generator.train(), DataLoader([batch] * 2, batch_size=None))  # type: ignore[arg-type]
    assert trainer.optimizers[0].param_groups[0]["fused"] and len(norms) == 2
    assert sum(float(p.grad.square().sum()) for p in generator.backbone.parameters()) ** 0.5 == pytest.approx(1e-3)


def test_weight_decay_goes_along_half_a_cosine() -> None:
    """VAR's `lr_wd_annealing`: wd_end + (wd - wd_end)(1 + cos(pi i / (T - 1))) / 2 at the i-th of T steps."""

    def make() -> tuple[torch.optim.AdamW, WarmupLinear]:
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": decay} for decay in (0.05, 0.0)]
        optimizer = torch.optim.AdamW(groups, lr=1.0)
        return optimizer, WarmupLinear(optimizer, warmup_steps=2, total_steps=9, final_weight_decay=0.08)

    def go(optimizer: torch.optim.AdamW, scheduler: WarmupLinear, steps: int) -> list[tuple[float, ...]]:
        seen = []
        for _ in range(steps):
            seen.append(tuple(group["weight_decay"] for group in optimizer.param_groups))
            optimizer.step()
            scheduler.step()
        return seen

    one = make()
    seen = go(*one, 12)
    expected = [0.08 + (0.05 - 0.08) * (1 + cos(pi * min(i, 8) / 8)) / 2 for i in range(12)]
    assert [decay for decay, _ in seen] == pytest.approx(expected) and {none for _, none in seen} == {0.0}
    # A resume goes on.
    first, other = make(), make()
    go(*first, 4)
    for old, new in zip(first, other, strict=True):
        new.load_state_dict(old.state_dict())
    assert go(*other, 4) == seen[4:8]
    with pytest.raises(ValueError, match=r"final_weight_decay must be >= 0.* got 0.1 for SGD"):
        WarmupLinear(torch.optim.SGD([torch.zeros(1)]), warmup_steps=0, total_steps=9, final_weight_decay=0.1)


def rates(steps: int, schedule: type = WarmupCosine, **arguments) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, **arguments)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warmup_and_cosine() -> None:
    seen = rates(12, warmup_steps=4, total_steps=10, min_lr_factor=0.1)
    assert seen[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    expected = [2 * (0.1 + 0.9 * (1 + cos(pi * step / 6)) / 2) for step in range(7)]
    assert seen[4:11] == pytest.approx(expected)
    assert seen[4] == 2.0 and seen[10] == seen[11] == pytest.approx(0.2)


def test_without_warmup() -> None:
    assert rates(3, warmup_steps=0, total_steps=2) == pytest.approx([2.0, 1.0, 0.0], abs=1e-12)


def test_vars_line() -> None:
    """Of VAR: warm-up, full rate for 5% of what is left, then linear; written out from its definition."""
    total, warmup, final = 220, 20, 0.1
    seen = rates(total + 5, WarmupLinear, warmup_steps=warmup, total_steps=total, hold_steps=10, min_lr_factor=final)
    for step in range(warmup, total):
        rest = 1 - (step - warmup) / (total - warmup)
        expected = 1.0 if rest > 0.95 else final + (1 - final) * rest / 0.95
        assert seen[step] == pytest.approx(2 * expected), step
    assert seen[:2] == pytest.approx([0.1, 0.2]) and seen[total:] == pytest.approx([0.2] * 5)


def test_cosine_over_the_last_tenth() -> None:
    """Of Halton-MaskGIT."""
    seen = rates(102, warmup_steps=5, total_steps=100, hold_steps=85)
    assert seen[4:91] == [2.0] * 87
    assert seen[90:] == pytest.approx([1 + cos(pi * min(step, 10) / 10) for step in range(12)], abs=1e-12)


def test_a_plateau_after_a_warm_up() -> None:
    """The rate halves one step after so many without a loss a tenth lower; those of the warm-up do not count."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupPlateau(optimizer, warmup_steps=4, patience=2, min_lr=0.6)
    #         warm-up         lowest  better  -    -    -    halved, then its least
    losses = [0.1, 0.1, 0.1, 0.1, 5.0, 4.0, 3.7, 3.9, 3.61, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    seen = []
    for loss in losses:
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step(torch.tensor(loss))
    assert seen == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 0.6, 0.6])
    assert scheduler.get_last_lr() == [0.6]
    # A resume goes on from its state.
    other = WarmupPlateau(optimizer, warmup_steps=4, patience=2, min_lr=0.6)
    other.load_state_dict(scheduler.state_dict())
    assert other.num_bad_epochs == scheduler.num_bad_epochs and other.last_epoch == len(losses)


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_a_plateau_follows_the_training_loss(make_generator, tmp_path) -> None:
    """Lightning hands over `train/loss` behind every step."""
    seen: list[float] = []

    class Listening(WarmupPlateau):
        def step(self, metrics: Any, epoch: int | None = None) -> None:
            seen.append(float(metrics))
            super().step(metrics, epoch)

    batch = {"tokens": torch.randint(4, (4, 3)), "label": torch.arange(4) % 2, "index": torch.arange(4)}
    scheduler = partial(Listening, warmup_steps=1, patience=0, threshold=0.9)
    generator = make_generator("masked", optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=scheduler)
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(generator.train(), DataLoader([batch] * 4, batch_size=None))  # type: ignore[arg-type]
    assert len(seen) == 4 and seen[-1] == pytest.approx(float(trainer.callback_metrics["train/loss"]))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25  # full, then twice no loss a tenth as large


def test_settings_of_a_plateau() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    for settings, message in (
        ({"warmup_steps": -1, "patience": 2}, "warmup_steps and patience must be >= 0, got -1 and 2"),
        ({"warmup_steps": 1, "patience": 2, "factor": 1.0}, "got factor=1.0, threshold=0.1"),
        ({"warmup_steps": 1, "patience": 2, "threshold": 1.0}, "got factor=0.5, threshold=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            WarmupPlateau(optimizer, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": 1, "total_steps": 5, "hold_steps": 4}, "hold_steps must lie in .*, got 4 of 4"),
        ({"warmup_steps": 1, "total_steps": 5, "hold_steps": -1}, "hold_steps must lie in .*, got -1 of 4"),
        ({"warmup_steps": 5, "total_steps": 5}, "got 5 of 5"),
        ({"warmup_steps": -1, "total_steps": 5}, "got -1 of 5"),
        ({"warmup_steps": 1, "total_steps": 5, "min_lr_factor": 1.1}, r"min_lr_factor must lie in \[0, 1\]"),
    ],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(1, **arguments)


# Muon for hidden matrices, AdamW for everything else.

MUON = partial(
    MuonAdamW, lr=0.02, weight_decay=0.1, momentum=0.9, adamw_lr=0.01, adamw_betas=(0.8, 0.9), adamw_weight_decay=0.3
)


def muon_names(module) -> dict[str, set[str]]:
    optimizer = module.configure_optimizers()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, set[str]] = {"muon": set(), "decayed": set(), "others": set()}
    for group in optimizer.param_groups:
        kind = "muon" if group["muon"] else "decayed" if group["weight_decay"] else "others"
        assert group["lr"] == (0.02 if group["muon"] else 0.01)
        assert group["weight_decay"] == {"muon": 0.1, "decayed": 0.3, "others": 0.0}[kind]
        found[kind] |= {names[id(parameter)] for parameter in group["params"]}
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(name for kind in found.values() for name in kind)
    return found


@pytest.mark.parametrize("conditioning", ["added", "adaln"])
def test_muon_trains_the_matrices_of_the_blocks_alone(make_generator, conditioning: str) -> None:
    """The modulations of adaLN are linear layers of the blocks too."""
    generator = make_generator("autoregressive", backbone={"conditioning": conditioning}, optimizer=MUON)
    found = muon_names(generator)
    layers = {"attention.query_key_value", "attention.out", "mlp.expand", "mlp.contract"}
    layers |= {"modulation.project"} if conditioning == "adaln" else set()
    assert found["muon"] == {f"backbone.blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}
    assert "backbone.head.project.weight" in found["decayed"]
    assert {"backbone.token_embedding.table.weight", "backbone.blocks.0.mlp.expand.bias"} <= found["others"]


def test_muon_of_a_transformer_tokenizer() -> None:
    def network(code_dim: int, latent_dim: int) -> ViTAutoencoder:
        size = TransformerSize(8, 1, heads=2)
        return ViTAutoencoder(code_dim, latent_dim, patch_size=4, encoder=size, decoder=size)

    found = muon_names(FSQ(network, levels=[4, 3], optimizer=MUON))
    assert len(found["muon"]) == 2 * 4
    assert all(".blocks.0." in name for name in found["muon"])


def test_muon_needs_hidden_layers(make_tokenizer) -> None:
    """Convolutions have none."""
    with pytest.raises(ValueError, match="FSQ names no hidden linear layers for MuonAdamW"):
        make_tokenizer(optimizer=MUON).configure_optimizers()


def test_muon_alone_is_not_enough(make_generator) -> None:
    with pytest.raises(ValueError, match=r"Masked has other weights too: set .* \{class_path: MuonAdamW\}"):
        make_generator("masked", optimizer=partial(torch.optim.Muon, lr=0.1)).configure_optimizers()


def gradients(model: torch.nn.Module, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)


def two_layers() -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))


def muon_of(model: torch.nn.Sequential, adjust: str = "original") -> tuple[MuonAdamW, WarmupLinear]:
    first, second = model[0], model[1]
    groups = [
        {"params": [second.weight, second.bias], "weight_decay": 0.05},
        {"params": [first.weight], "muon": True},
        {"params": [first.bias], "lr": 0.5},
    ]
    optimizer = MUON(groups, adjust_lr_fn=adjust)
    return optimizer, WarmupLinear(optimizer, warmup_steps=2, total_steps=8)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
def test_both_optimizers_are_torchs_side_by_side(adjust: str) -> None:
    model, expected = two_layers(), two_layers()
    optimizer, schedule = muon_of(model, adjust)
    first, second = expected[0], expected[1]
    muon = torch.optim.Muon([first.weight], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust)
    adamw = torch.optim.AdamW(
        [
            {"params": [second.weight, second.bias], "weight_decay": 0.05},
            {"params": [first.bias], "lr": 0.5, "weight_decay": 0.3},
        ],
        lr=0.01,
        betas=(0.8, 0.9),
    )
    schedules = [WarmupLinear(each, warmup_steps=2, total_steps=8) for each in (muon, adamw)]
    for step in range(5):
        gradients(model, step)
        gradients(expected, step)
        for each in (optimizer, schedule, muon, adamw, *schedules):
            each.step()
        assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert schedule.get_last_lr() == [
        schedules[1].get_last_lr()[0],
        schedules[0].get_last_lr()[0],
        schedules[1].get_last_lr()[1],
    ]


def test_muon_goes_on_exactly_from_its_state(tmp_path) -> None:
    model = two_layers()
    optimizer, schedule = muon_of(model)
    for step in range(6):
        if step == 3:
            state = [each.state_dict() for each in (model, optimizer, schedule)]
            torch.save(state, tmp_path / "state.pt")
        gradients(model, step)
        optimizer.step()
        schedule.step()
    again = two_layers()
    resumed, its_schedule = muon_of(again)
    for each, state in zip((again, resumed, its_schedule), torch.load(tmp_path / "state.pt"), strict=True):
        each.load_state_dict(state)
    for step in range(3, 6):
        gradients(again, step)
        resumed.step()
        its_schedule.step()
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_muon_calls_a_closure_once_with_gradients() -> None:
    model = two_layers()
    optimizer, _ = muon_of(model)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        gradients(model, 0)
        return 3.0

    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    assert calls == [True]
    assert not any(map(torch.equal, before, model.parameters()))


def test_what_muon_refuses() -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"momentum of MuonAdamW must lie in \[0, 1\), got 1"):
        MuonAdamW(layer.parameters(), momentum=1.0)
    with pytest.raises(ValueError, match=r"whole matrices by Muon, and a parameter of the shape \(2,\) is no matrix"):
        MuonAdamW([{"params": [layer.bias], "muon": True}])


def test_muon_refuses_sharded_weights() -> None:
    """As FSDP2 makes them: the iterations need a whole matrix."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = two_layers()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"the shape \(6, 4\) is sharded: sharded training \(FSDP\) needs another"):
            MuonAdamW([{"params": [model[0].weight], "muon": True}])
    finally:
        dist.destroy_process_group()


def players(**settings) -> tuple[torch.optim.AdamW, list[torch.nn.Parameter]]:
    """An optimizer of a matrix and a bias each of two players, and the second's parameters."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    groups = [{"params": [one], **({"weight_decay": 0.0} if place % 2 else {})} for place, one in enumerate(parameters)]
    return torch.optim.AdamW(groups, lr=2.0, **settings), parameters[2:]


@pytest.mark.parametrize("common", [None, partial(WarmupLinear, warmup_steps=0, total_steps=8)])
def test_a_part_with_a_schedule_and_a_decay_of_its_own(common) -> None:
    optimizer, part = players(weight_decay=0.5)
    configured = optimizer
    if common is not None:
        configured = {"optimizer": optimizer, "lr_scheduler": {"scheduler": common(optimizer), "interval": "step"}}
    own = partial(WarmupCosine, warmup_steps=2, total_steps=4)
    configured = configure_apart(configured, part, weight_decay=0.1, scheduler=own, first_step=3)
    scheduler = configured["lr_scheduler"]["scheduler"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 0.1, 0.0]
    found = []
    for _ in range(8):
        found.append([group["lr"] for group in optimizer.param_groups])
        assert found[-1] == scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    expected = [2 * (1 - step / 8) for step in range(8)] if common else [2.0] * 8
    expected_apart = [1.0] * 4 + [2.0, 2.0, 1.0, 0.0]
    for rates, of_rest, of_part in zip(found, expected, expected_apart, strict=True):
        assert rates == pytest.approx([of_rest, of_rest, of_part, of_part])
    # Resumed, both go on.
    again, part = players(weight_decay=0.5)
    resumed = configure_apart(again, part, scheduler=own, first_step=3)["lr_scheduler"]["scheduler"]
    state = scheduler.state_dict()
    resumed.load_state_dict(state | {"last_epoch": 4})
    again.step()
    resumed.step()
    assert again.param_groups[2]["lr"] == pytest.approx(expected_apart[5])


def test_what_a_part_of_its_own_refuses() -> None:
    optimizer, part = players(weight_decay=0.0)
    with pytest.raises(
        ValueError, match=r"weight_decay=0.1 of a discriminator replaces the optimizer's, and AdamW has"
    ):
        configure_apart(optimizer, part, weight_decay=0.1)
    constant = partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5)
    with pytest.raises(ValueError, match="as WarmupCosine or WarmupLinear, got ConstantLR"):
        configure_apart(optimizer, part, scheduler=constant)
    configured = {"optimizer": optimizer, "lr_scheduler": {"scheduler": constant(optimizer), "interval": "step"}}
    with pytest.raises(ValueError, match="got ConstantLR"):
        configure_apart(configured, part, scheduler=partial(WarmupCosine, warmup_steps=2, total_steps=4))
