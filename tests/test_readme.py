"""The README's own examples, run as they stand there."""

import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    """The `file=` blocks, each written under its name and imported."""
    folder = tmp_path_factory.mktemp("examples")
    found = re.findall(r"```python file=(\w+)\.py\n(.*?)```", README, flags=re.DOTALL)
    for name, code in found:
        (folder / f"{name}.py").write_text(code)
    sys.path.insert(0, str(folder))
    yield {name: importlib.import_module(name) for name, _ in found}
    sys.path.remove(str(folder))
    for name, _ in found:
        del sys.modules[name]


def fit(model: dict, folder: Path, *options: str) -> Path:
    """Two batches by the command; the checkpoint."""
    from discrete_lit.cli.commands import main

    settings = {
        "run_dir": str(folder),
        "model": model,
        "data": {"class_path": "helpers.synthetic_data.SyntheticImages", "init_args": {"count": 8, "batch_size": 4}},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_steps": 2,
            "limit_val_batches": 1,
        },
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(file), *options])
    return folder / "checkpoints" / "last.ckpt"


def test_the_example_from_python_runs(tmp_path: Path) -> None:
    """On an untrained generator of the quickstart's shapes in the place of its checkpoint."""
    import torch

    import discrete_lit.generators  # noqa: F401 (the configurations below name its classes without a package)
    from discrete_lit.checkpoints import instantiate, save

    network = {"channels": 4, "multipliers": [1, 1, 1], "blocks": 1, "attention": False, "norm_groups": 2}
    tokenizer = {
        "class_path": "FSQ",
        "init_args": {"levels": [8, 6, 5], "network": {"class_path": "ConvAutoencoder", "init_args": network}},
    }
    save(instantiate(tokenizer), tmp_path / "tokenizer.ckpt")
    backbone = {"class_path": "Transformer", "init_args": {"width": 8, "depth": 1, "heads": 2}}
    generator = {
        "tokenizer": {
            "class_path": "discrete_lit.tokenizers.from_checkpoint",
            "init_args": {"checkpoint": str(tmp_path / "tokenizer.ckpt")},
        },
        "image_size": 32,
        "num_classes": 10,
        "backbone": backbone,
    }
    save(instantiate({"class_path": "Masked", "init_args": generator}), tmp_path / "generator.ckpt")

    example = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    checkpoint = "runs/quickstart/masked/checkpoints/last.ckpt"
    assert checkpoint in example
    values: dict[str, Any] = {}
    exec(example.replace(checkpoint, str(tmp_path / "generator.ckpt")), values)
    assert values["tokens"].shape == (3, 8, 8)
    assert values["images"].shape == (3, 3, 32, 32)
    assert values["likelihood"].nats.shape == (3,) and values["likelihood"].kind == "bound"
    again = values["generator"].sample(values["labels"], sampler=values["HaltonSampler"](steps=8, guidance_scale=2.5))
    assert torch.equal(again, values["tokens"])


def test_the_two_examples_are_about_sixty_lines(examples: dict[str, ModuleType]) -> None:
    lengths = {name: len(Path(str(module.__file__)).read_text().splitlines()) for name, module in examples.items()}
    assert lengths.keys() == {"my_tokenizer", "my_generator"}
    assert max(lengths.values()) <= 75


def test_both_train_reload_and_sample_by_the_command(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    import torch

    import discrete_lit
    from discrete_lit.cli.commands import main

    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {"channels": 4, "multipliers": [1, 1], "blocks": 1, "attention": False, "norm_groups": 2},
    }
    tokenizer_settings = {
        "class_path": "my_tokenizer.BinaryAutoencoder",
        "init_args": {"bits": 5, "network": network, "optimizer": optimizer},
    }
    tokenizer_file = fit(tokenizer_settings, tmp_path / "tokenizer")
    tokenizer = discrete_lit.load(tokenizer_file, trust=("my_tokenizer",))
    assert tokenizer.vocab_size == 32
    ids = torch.arange(32).reshape(2, 4, 4)
    quantized = tokenizer.quantizer(tokenizer.quantizer.lookup(ids))
    assert torch.equal(quantized.tokens, ids)

    generator_settings = {
        "class_path": "my_generator.Checkerboard",
        "init_args": {
            "tokenizer": {
                "class_path": "discrete_lit.tokenizers.from_checkpoint",
                "init_args": {"checkpoint": str(tokenizer_file)},
            },
            "image_size": 8,
            "num_classes": 2,
            "backbone": {
                "class_path": "discrete_lit.backbones.Transformer",
                "init_args": {"width": 8, "depth": 1, "heads": 2},
            },
            "optimizer": optimizer,
        },
    }
    generator_file = fit(generator_settings, tmp_path / "generator", "--trust", "my_tokenizer")
    trust = ["--trust", "my_tokenizer", "--trust=my_generator"]
    output = str(tmp_path / "generator")
    main(["sample", "--ckpt_path", str(generator_file), "--num_samples", "4", "--output", output, *trust])
    assert (tmp_path / "generator" / "samples.npz").is_file()


def test_the_generators_likelihood_is_a_distribution_and_its_sampler_draws_from_it(
    examples: dict[str, ModuleType], make_grid_tokenizer, make_backbone
) -> None:
    import torch

    from discrete_lit.core.random import CounterRandom

    generator = examples["my_generator"].Checkerboard(
        make_grid_tokenizer(3, (2, 2)),
        image_size=2,
        num_classes=2,
        backbone=lambda layout: make_backbone(layout.attention, layout.vocab_size, layout.grid, layout.num_classes),
    )
    states = torch.tensor(list(itertools.product(range(3), repeat=4)))
    # `discrete-lit evaluate` passes each image's index.
    indices = torch.arange(len(states))
    likelihood = generator.log_likelihood(states, torch.ones(len(states), dtype=torch.int64), indices=indices)
    nats = likelihood.nats
    assert likelihood.kind == "exact"
    assert float(nats.exp().sum()) == pytest.approx(1, abs=1e-6)

    count = 20_000
    labels = torch.ones(count, dtype=torch.int64)
    drawn = generator.sampler(generator.backbone, labels, CounterRandom(0, torch.arange(count))).tokens
    place = (drawn * torch.tensor([27, 9, 3, 1])).sum(dim=1)
    observed, expected = torch.bincount(place, minlength=81).double(), nats.exp() * count
    # 80 degrees of freedom: the chance of more than 150 is 4e-6.
    assert float(((observed - expected) ** 2 / expected).sum()) < 150
