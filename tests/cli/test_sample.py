"""`discrete-lit sample`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FAMILIES = ("Masked", "Autoregressive")


def draw(checkpoint: Path, output: Path, *arguments: object) -> dict:
    """The command in this process; its npz, and its run.json under "run"."""
    from discrete_lit.cli.commands import main

    main(
        [
            "sample",
            "--ckpt_path",
            str(checkpoint),
            "--output",
            str(output),
            "--accelerator",
            "cpu",
            *map(str, arguments),
        ]
    )
    with np.load(output / "samples.npz") as file:
        return {**file, "run": json.loads((output / "run.json").read_text())}


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_images_labels_grid_and_settings(
    family: str, generator_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    import discrete_lit
    from discrete_lit.core.random import CounterRandom

    found = draw(generator_checkpoints[family], tmp_path, "--num_samples", 7, "--batch_size", 4, "--seed", 5)
    assert found["arr_0"].shape == (7, 8, 8, 3) and found["arr_0"].dtype == np.uint8
    assert found["labels"].dtype == np.int64 and found["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (7 * 8, 8)
        assert np.array_equal(np.asarray(grid)[:, 8:16], found["arr_0"][1])
    run = found["run"]
    assert run["generator"] == family and run["seed"] == 5 and run["num_samples"] == 7
    assert run["network_calls"] == run["sequential_passes"] == {"Masked": 8, "Autoregressive": 16}[family]
    expected = discrete_lit.load(generator_checkpoints[family]).draw(
        torch.tensor([0]), CounterRandom(0, torch.tensor([0]))
    )
    assert run["flops_per_image"] == expected.flops > 0
    assert run["images_per_second_without_decoding"] > run["images_per_second"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "run.json", "samples.npz"]


def test_a_full_disk_is_refused_before_and_named_after(
    generator_checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import resource
    import shutil
    from types import SimpleNamespace

    def failure(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            draw(generator_checkpoints["Masked"], tmp_path / "samples", "--num_samples", 100, *arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    # As long as nothing else fills it: 100 images of 8 x 8 x 3 bytes, twice.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=38_399))
    message = failure()
    assert str(tmp_path / "samples") in message and "38,399" in message and "38,400" in message
    # What is left is the plan that a command goes on from: no file for samples was made.
    assert [file.name for file in (tmp_path / "samples").rglob("*.np*")] == []
    monkeypatch.undo()
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, name in ((10_000, "rows.npy.partial"), (19_400, "samples.npz")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, largest[1]))
        try:
            assert failure() == f"error: {tmp_path / 'samples' / name}: File too large"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, largest)


def test_the_second_command_into_a_folder_is_refused(
    generator_checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from discrete_lit.core.locks import sole_writer

    with sole_writer(tmp_path, "sample"), pytest.raises(SystemExit):
        draw(generator_checkpoints["Masked"], tmp_path, "--num_samples", 1)
    assert f"{tmp_path} is being written by" in capsys.readouterr().err
    # A run that trains here does not keep anybody from sampling its checkpoints; its record of starts stays.
    (tmp_path / "run.json").write_text('{"starts": [1]}')
    with sole_writer(tmp_path, "fit"):
        draw(generator_checkpoints["Masked"], tmp_path, "--num_samples", 1)
    assert json.loads((tmp_path / "run.json").read_text())["starts"] == [1]


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_whatever_the_batch_size(
    family: str, generator_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = generator_checkpoints[family]
    images = [
        draw(checkpoint, tmp_path / str(size), "--num_samples", 7, "--batch_size", size)["arr_0"] for size in (1, 3, 7)
    ]
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])
    other = draw(checkpoint, tmp_path / "other", "--num_samples", 7, "--seed", 1)["arr_0"]
    assert not np.array_equal(images[0], other)


def test_equals_the_generators_own_sample(generator_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import torch

    import discrete_lit
    from discrete_lit.core.images import to_uint8

    generator = discrete_lit.load(generator_checkpoints["Masked"])
    tokens = generator.sample(torch.tensor([2, 2, 2]), seed=9)
    expected = to_uint8(generator.tokenizer.decode(tokens)).movedim(1, -1).numpy()
    drawn = draw(generator_checkpoints["Masked"], tmp_path, "--num_samples", 3, "--labels", "[2]", "--seed", 9)
    assert np.array_equal(drawn["arr_0"], expected) and drawn["labels"].tolist() == [2, 2, 2]


def test_images_are_resized_before_they_are_rounded(generator_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import torch

    import discrete_lit
    from discrete_lit.core.images import to_uint8

    generator = discrete_lit.load(generator_checkpoints["Masked"])
    decoded = generator.tokenizer.decode(generator.sample(torch.tensor([1, 1]), seed=4))
    # Halfway between pixels 2i and 2i + 1 a cubic with a = -0.75 weighs their neighbours by a (-1/8), them by 19/32.
    weights = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])
    for dim in (2, 3):
        ends = (decoded.narrow(dim, 0, 1), decoded.narrow(dim, 7, 1))
        padded = torch.cat((ends[0], decoded, ends[1]), dim=dim)
        decoded = padded.unfold(dim, 4, 2) @ weights
    expected = to_uint8(decoded).movedim(1, -1).numpy()
    arguments = ("--num_samples", 2, "--labels", "[1]", "--seed", 4, "--image_size", 4)
    drawn = draw(generator_checkpoints["Masked"], tmp_path, *arguments)
    assert drawn["arr_0"].shape == (2, 4, 4, 3) and drawn["run"]["image_size"] == 4
    assert np.abs(drawn["arr_0"].astype(int) - expected).max() <= 1  # summed in another order


def test_another_sampler_is_used_and_recorded(generator_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sampler = {
        "class_path": "discrete_lit.samplers.MaskGITSampler",
        "init_args": {"steps": 2, "guidance_scale": 3.0, "guidance_schedule": "linear"},
    }
    run = draw(generator_checkpoints["Masked"], tmp_path, "--num_samples", 2, "--sampler", json.dumps(sampler))["run"]
    assert run["sampler"]["steps"] == 2 and run["sampler"]["guidance_scale"] == 3.0
    # The first step of a linear schedule has scale 1 and needs no null pass.
    assert run["sequential_passes"] == 2 and run["network_calls"] == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_draw_the_same(generator_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import torch

    checkpoint = generator_checkpoints["Autoregressive"]
    plain = draw(checkpoint, tmp_path / "plain", "--num_samples", 3)
    try:
        compiled = draw(checkpoint, tmp_path / "compiled", "--num_samples", 3, "--compile", "true")
    finally:
        torch._dynamo.reset()
    assert np.array_equal(compiled["arr_0"], plain["arr_0"])
    assert compiled["run"]["compile"] and not plain["run"]["compile"]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_draws_are_the_same(
    family: str, generator_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded and replayed as CUDA graphs are, by a stand-in; the last batch is smaller."""
    from functools import partial

    from helpers.recorded_graph import RecordedGraphs

    from discrete_lit.backbones import cpu_kernels
    from discrete_lit.cli import sample as command

    monkeypatch.setattr(cpu_kernels, "_SWITCH", "0")  # packed weights are no tensors to write to
    settings = ("--num_samples", 7, "--batch_size", 2, "--seed", 3)
    plain = draw(generator_checkpoints[family], tmp_path / "plain", *settings)
    recorder = RecordedGraphs()
    monkeypatch.setattr(
        command, "_graph_pays", lambda graph, device, full_batches: (graph, full_batches) == ("auto", 3)
    )
    monkeypatch.setattr(command, "GraphedDraw", partial(command.GraphedDraw, recorder=recorder))
    found = draw(generator_checkpoints[family], tmp_path / "graph", *settings)
    assert np.array_equal(found["arr_0"], plain["arr_0"]) and len(recorder.graphs) == 1
    assert found["run"]["graph"] is True and plain["run"]["graph"] is False
    assert found["run"]["network_calls"] == plain["run"]["network_calls"]


def test_when_a_draw_is_recorded() -> None:
    import torch

    from discrete_lit.cli.sample import _graph_pays

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for graph, device, batches, expected in (
        ("auto", gpu, 2, False),
        ("auto", gpu, 3, True),
        ("auto", cpu, 100, False),
        (True, gpu, 1, True),
        (False, gpu, 100, False),
        (False, cpu, 100, False),
    ):
        assert _graph_pays(graph, device, full_batches=batches) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples", 0], "num_samples and batch_size must be at least 1"),
        (["--num_samples", 2, "--labels", "[0, 4]"], r"labels holds 4, accepted: int in \[0, 3\]"),
        (["--num_samples", 2, "--image_size", 0], "image_size=0: it must be"),
        (["--num_samples", 2, "--graph", "true"], "graph=true replays CUDA graphs, which a cpu has not"),
        (["--num_samples", 2, "--graph", "sometimes"], "graph"),
        (["--num_samples", 2, "--labels", "[0, cat]"], r"labels holds 'cat', accepted: int in"),
        (["--num_samples", 2, "--labels", "[]"], r"labels holds nothing, accepted"),
        (["--num_samples", 2, "--sampler", "discrete_lit.samplers.RasterSampler"], "needs a backbone with causal"),
        (["--num_samples", 2, "--sampler", '{"class_path": "discrete_lit.samplers.MaskGITSampler", '
          '"init_args": {"steps": 17}}'], "steps=17"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(
    arguments: list, message: str, generator_checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        draw(generator_checkpoints["Masked"], tmp_path, *arguments)
    assert stopped.value.code == 2
    import re

    assert re.search(message, capfd.readouterr().err)


def test_a_tokenizers_checkpoint_is_refused(
    tokenizer_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        draw(tokenizer_checkpoint, tmp_path, "--num_samples", 1)
    assert "holds a FSQ, not a Generator" in capfd.readouterr().err


def test_text_is_written_as_text(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    import torch

    import discrete_lit
    from discrete_lit.checkpoints import instantiate, save

    backbone = {"class_path": "discrete_lit.backbones.Transformer", "init_args": {"width": 8, "depth": 1, "heads": 1}}
    config = {
        "class_path": "discrete_lit.generators.Masked",
        "init_args": {
            "tokenizer": {"class_path": "discrete_lit.tokenizers.Characters"},
            "image_size": 12,
            "num_classes": 1,
            "backbone": backbone,
        },
    }
    save(instantiate(config), tmp_path / "text.ckpt")
    drawn = draw(tmp_path / "text.ckpt", tmp_path / "samples", "--num_samples", 5, "--batch_size", 3)
    assert drawn["tokens"].shape == (5, 12) and "arr_0" not in drawn
    generator = discrete_lit.load(tmp_path / "text.ckpt")
    tokens = generator.sample(torch.zeros(5, dtype=torch.int64))
    assert torch.equal(torch.from_numpy(drawn["tokens"]), tokens)
    written = (tmp_path / "samples" / "samples.txt").read_text()
    assert written == "".join(f"{text}\n" for text in generator.tokenizer.texts(tokens))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["run.json", "samples.npz", "samples.txt"]
    with pytest.raises(SystemExit):
        draw(tmp_path / "text.ckpt", tmp_path / "samples", "--num_samples", 5, "--image_size", 8)
    assert "image_size=8 is given, but this generator's tokenizer makes no images" in capfd.readouterr().err


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA"), (5, "L")])
def test_a_grid_of_any_channels_and_shape(channels: int, mode: str, tmp_path: Path) -> None:
    from discrete_lit.cli.sample import _write_grid

    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, channels), dtype=np.uint8)
    _write_grid(tmp_path, images)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == mode and grid.size == (18, 4)
        shown = np.asarray(grid).reshape(4, 3, 6, -1)
    np.testing.assert_array_equal(shown, images[..., : shown.shape[-1]].swapaxes(0, 1))


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("precision", ["32-true", "16-true", "bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_run_json_says_what_ran(
    family: str, precision: str, generator_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    import discrete_lit
    from discrete_lit.backbones import Transformer

    seen, forward = set(), Transformer.forward

    def observed(self, *args, **kwargs):
        seen.add(str(next(self.parameters()).dtype).removeprefix("torch."))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", observed)
    run = draw(generator_checkpoints[family], tmp_path, "--num_samples", 2, "--precision", precision)["run"]
    names = {"16-true": "float16", "bf16-true": "bfloat16", "64-true": "float64"}
    assert run["precision"] == precision and seen == {run["weights_dtype"]} == {names.get(precision, "float32")}
    tokenizer = discrete_lit.load(generator_checkpoints[family]).tokenizer
    assert run["tokenizer_fingerprint"] == tokenizer.fingerprint()


def test_run_json_says_what_the_automatic_precision_became(
    generator_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from discrete_lit.core import auto_precision

    for flags, became in (("avx512_bf16", "bf16-mixed"), ("avx2", "32-true")):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        monkeypatch.setattr(auto_precision, "_CPU_FLAGS", tmp_path / "cpuinfo")
        settings = ("--num_samples", 2, "--precision", "auto", "--accelerator", "cpu")
        assert draw(generator_checkpoints[FAMILIES[0]], tmp_path / flags, *settings)["run"]["precision"] == became


@pytest.mark.parametrize(("cycle", "columns", "rows"), [(9, 9, 10), (12, 12, 10), (1, 10, 10), (1000, 10, 10)])
def test_a_column_of_the_grid_is_a_label(cycle: int, columns: int, rows: int, tmp_path: Path) -> None:
    from discrete_lit.cli.sample import _write_grid

    labels = np.arange(130) % cycle
    _write_grid(
        tmp_path, np.broadcast_to(labels[:, None, None, None] % 256, (130, 2, 2, 3)).astype(np.uint8), cycle=cycle
    )
    with Image.open(tmp_path / "grid.png") as grid:
        shown = np.asarray(grid)[::2, ::2, 0]
    assert shown.shape == (rows, columns)
    if cycle == columns:
        assert (shown == np.arange(columns)).all()
