"""`discrete-lit models`, and the commands that take a published model."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_runs import run

from discrete_lit.pretrained.catalogue import published_models


def test_the_list_a_word_and_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    run("models")
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line} >= set(published_models())
    run("models", "--word", "halton")
    shown = capsys.readouterr().out
    assert "halton_l_384  halton_maskgit  384" in shown and "rar_b" not in shown
    run("models", "dit_xl2_256")
    shown = capsys.readouterr().out
    assert "CC-BY-NC-4.0, which must be accepted" in shown and "tokenizer         sd_vae_ft_ema" in shown
    assert "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt" in shown


@pytest.mark.parametrize("name", ["rar_b", "llamagen_l_384", "var_d36", "maskgit_vqgan", "titok_l32", "maskbit_14bit"])
def test_the_commands_that_measure_a_published_number_can_be_given(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("models", name)
    shown = capsys.readouterr().out
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  discrete-lit ")]
    published = published_models()[name].published
    assert [shlex.split(command)[1] for command in commands] == {
        "F": ["sample", "evaluate"],
        "r": ["evaluate"],
        "": [],
    }[published[:1]]
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            run(*shlex.split(command)[1:], "--print_config")
        assert not stopped.value.code, command
    if name == "llamagen_l_384":
        assert "--image_size 256 --output" in commands[0] and "--image_size 256 --samples" in commands[1]


def test_json_is_for_other_programs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISCRETE_LIT_CACHE", str(tmp_path))
    run("models", "--json", "true")
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == list(published_models())
    run("models", "rar_b", "--json", "true")
    shown = json.loads(capsys.readouterr().out)
    assert shown["family"] == "rar" and shown["downloads"] == [
        {
            "address": "https://huggingface.co/yucornetto/RAR/resolve/main/rar_b.bin",
            "place": str(tmp_path / "hub/yucornetto/RAR/rar_b.bin"),
            "there": False,
        }
    ]
    assert shown["files"][0]["sha256"].startswith("cbbf4b27")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("models", "rarb"), "did you mean 'rar_b'"),
        (("models", "--word", "qqq"), "no published model has the word 'qqq'"),
        (("sample", "--num_samples", 1, "--output", "out"), "give ckpt_path, a checkpoint, or model"),
        (("sample", "--num_samples", 1, "--output", "o", "--model", "rar_b", "--ckpt_path", "x"), "both are given"),
        (("sample", "--num_samples", 1, "--output", "out", "--model", "rar-b"), "did you mean 'rar_b'"),
        (("sample", "--num_samples", 1, "--model", "rar_b"), "output is '', accepted: a path"),
        (
            ("sample", "--num_samples", 1, "--output", "o", "--model", "dit_xl2_256"),
            "published under a licence that you must accept, CC-BY-NC-4.0",
        ),
        (
            ("sample", "--num_samples", 1, "--output", "o", "--ckpt_path", "x", "--accept_licence", "true"),
            "accept_licence is for a published model",
        ),
        (("sample", "--num_samples", 1, "--output", "o", "--model", "rar_b"), "HF_HUB_OFFLINE is set"),
        (("demo", "--port", 0, "--ckpt_path", "x"), "port=0, accepted: 1 to 65535"),
    ],
)
def test_mistakes(
    arguments: tuple[Any, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DISCRETE_LIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_a_demo_without_gradio_says_what_to_install(
    generator_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        run("demo", "--ckpt_path", generator_checkpoints["Masked"])
    assert "`demo` needs Gradio: pip install 'discrete-lit[demo]'" in capsys.readouterr().err


def test_export_as_folders_and_back(
    generator_checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    import discrete_lit

    first = discrete_lit.load(generator_checkpoints["Masked"])
    labels = torch.tensor([0, 2])
    for layout in ("hub", "diffusers"):
        folder = tmp_path / layout
        run("export", "--ckpt_path", generator_checkpoints["Masked"], "--family", layout, "--output", folder)
        assert "a Masked; `hf upload OWNER/NAME" in capsys.readouterr().out
        assert torch.equal(discrete_lit.load(folder).sample(labels), first.sample(labels))
    run("sample", "--ckpt_path", tmp_path / "hub", "--num_samples", 2, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "grid.png").is_file()
    assert len(json.loads((tmp_path / "out" / "run.json").read_text())["checkpoint_sha256"]) == 64
