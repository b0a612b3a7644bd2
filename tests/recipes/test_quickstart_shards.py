"""The quickstart's shards, from its YAML files."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from discrete_lit.cli.shards import shards
from discrete_lit.data.sources import EmbeddedSet, Source
from discrete_lit.data.sources.source import shuffled

ROOT = Path(__file__).parents[2]


def parser() -> ArgumentParser:
    result = ArgumentParser(exit_on_error=False)
    result.add_argument("--config", action="config")
    result.add_function_arguments(shards)
    return result


PARTS = {"": 20_000, "_test": 1_000, "_validation": 1_000, "_apart": 8_000, "_validation_reference": 1_000}


def source_of(name: str) -> tuple[Source, str]:
    """The source of a file of the quickstart, and the split that it says."""
    config = parser().parse_args([f"--config=lightning_configs/quickstart/shards{name}.yaml"])
    assert config.output == f"runs/quickstart/shards/{config.split}"
    return parser().instantiate(config).source, config.split


@pytest.mark.parametrize(("name", "count"), PARTS.items())
def test_yaml_names_the_embedded_set(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    monkeypatch.chdir(ROOT)
    source, split = source_of(name)
    assert split == (name.removeprefix("_") or "train")
    assert len(source) == count and set(Counter(entry.label for entry in source.entries).values()) == {count // 10}
    assert source.entries[0].key.startswith("train" if name in ("", "_validation_reference") else "test")


def test_no_image_of_the_table_is_seen_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parts of the test images are disjoint; the two references are; the table's images are the first of all."""
    monkeypatch.chdir(ROOT)
    keys = {name: [entry.key for entry in source_of(name)[0].entries] for name in PARTS}
    tested = [key for name in ("_test", "_validation", "_apart") for key in keys[name]]
    assert len(tested) == len(set(tested)) == 10_000

    whole = EmbeddedSet("data/fashion_mnist.npz", "test")
    first = Counter()
    table = set()
    for index in shuffled(whole, 0):
        label = whole.entries[index].label
        if first[label] < 100:
            table.add(whole.entries[index].key)
        first[label] += 1
    assert table == set(keys["_test"])

    training = EmbeddedSet("data/fashion_mnist.npz", "train")
    reference, seen = set(), Counter()
    for index in shuffled(training, 0):
        label = training.entries[index].label
        if seen[label] < 100:
            reference.add(training.entries[index].key)
        seen[label] += 1
    assert not reference & set(keys["_validation_reference"])


def test_the_command_writes_shards_and_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "1.png").write_bytes(b"content")
    arguments = [
        "--source=discrete_lit.data.sources.ClassFolders",
        f"--source.root={tmp_path / 'in'}",
        f"--output={tmp_path / 'out'}",
        "--split=train",
    ]
    config = parser().instantiate(parser().parse_args(arguments))
    shards(config.source, config.output, config.split, config.samples_per_shard, config.shuffle_seed)
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 1 images of 1 classes in 1 shards\n"
    assert (tmp_path / "out" / "train-000000.tar").exists()


def test_preparing_data_is_quick_to_start() -> None:
    modules = "'torch', 'lightning', 'webdataset', 'scipy'"
    script = f"import sys, discrete_lit.cli.shards; sys.exit(str([m for m in ({modules}) if m in sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == "[]"
