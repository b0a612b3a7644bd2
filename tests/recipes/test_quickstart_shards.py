"""The quickstart's shards, from its YAML files."""

import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from discrete_lit.cli.shards import shards
from discrete_lit.data.sources import EmbeddedSet

ROOT = Path(__file__).parents[2]


def parser() -> ArgumentParser:
    result = ArgumentParser(exit_on_error=False)
    result.add_argument("--config", action="config")
    result.add_function_arguments(shards)
    return result


@pytest.mark.parametrize(("name", "split", "count"), [("shards", "train", 20_000), ("shards_test", "test", 10_000)])
def test_yaml_names_the_embedded_set(monkeypatch: pytest.MonkeyPatch, name: str, split: str, count: int) -> None:
    monkeypatch.chdir(ROOT)
    config = parser().parse_args([f"--config=lightning_configs/quickstart/{name}.yaml"])
    assert (config.split, config.output) == (split, f"runs/quickstart/shards/{split}")
    source = parser().instantiate(config).source
    assert isinstance(source, EmbeddedSet)
    assert len(source) == count
    assert source.entries[0].key.startswith(split)


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
