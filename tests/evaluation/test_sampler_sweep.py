"""A sweep: equal random numbers for every setting, golden section on a parabola, a best setting that can be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.means_extractor import ColourMeans
from helpers.stored_images import pixels, save_folder
from torch import Tensor

from discrete_lit.cli import sweep as command
from discrete_lit.cli.sweep import sweep
from discrete_lit.core.images import to_uint8
from discrete_lit.evaluation.feature_statistics import FeatureMeter
from discrete_lit.evaluation.sampler_sweep import (
    SweepPoint,
    best_point,
    golden_section,
    pareto_front,
    takes_whole_numbers,
    with_settings,
)
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.samplers import MaskBitSampler, MaskGITSampler, RasterSampler


def test_golden_section_finds_the_minimum_of_a_parabola() -> None:
    tried = golden_section(lambda x: (x - 1.3) ** 2, 0.0, 4.0, 20)
    assert len(tried) == 20 and tried[-1][0] == pytest.approx(1.3, abs=4 * 0.618**18)
    assert len({round(x, 12) for x, _ in tried}) == 20  # no point twice
    assert [x for x, _ in golden_section(lambda x: x, 0.0, 1.0, 3)][-1] < 0.25


@pytest.mark.parametrize("sampler", [MaskGITSampler(12, temperature=0.7), MaskBitSampler(), RasterSampler(top_k=3)])
def test_a_sampler_but_for_some_settings(sampler: Any) -> None:
    changed = with_settings(sampler, {"guidance_scale": 3.5})
    assert type(changed) is type(sampler) and changed.guidance_scale == 3.5
    assert {**vars(changed), "guidance_scale": 0} == {**vars(sampler), "guidance_scale": 0}
    with pytest.raises(ValueError, match=r"settings\.colour: a \w+ has no colour; it has .*guidance_scale"):
        with_settings(sampler, {"colour": 1})
    with pytest.raises(ValueError, match=r"settings\.temperature\.inner: a \w+ has no temperature\.inner"):
        with_settings(sampler, {"temperature.inner": 1})
    with pytest.raises(ValueError, match="temperature must be > 0"):
        with_settings(sampler, {"temperature": 0.0})
    assert not takes_whole_numbers(sampler, "temperature")


def test_a_sampler_that_cannot_be_built_anew() -> None:
    from discrete_lit.samplers import OpenMAGVIT2Sampler, SubTokenSettings

    with pytest.raises(ValueError, match="a OpenMAGVIT2Sampler does not keep its parts: it cannot be swept"):
        with_settings(OpenMAGVIT2Sampler([SubTokenSettings(), SubTokenSettings()]), {"guidance_power": 2.0})


def test_settings_of_an_object_inside() -> None:
    from discrete_lit.diffusion.solvers import Euler
    from discrete_lit.samplers import GuidedSolver

    base = GuidedSolver(Euler(steps=5))
    changed: Any = with_settings(base, {"solver.steps": 9, "guidance_scale": 2.0})
    assert (changed.solver.steps, changed.guidance_scale, base.solver.steps) == (9, 2.0, 5)
    assert takes_whole_numbers(base, "solver.steps")


def point(distance: float, calls: int) -> SweepPoint:
    return SweepPoint(
        settings={"steps": calls},
        distance=distance,
        precision=None,
        recall=None,
        network_calls=calls,
        flops_per_image=1.0,
    )


def test_the_front_is_what_nothing_beats() -> None:
    points = [point(5, 8), point(4, 16), point(4, 32), point(6, 16), point(3, 64)]
    assert pareto_front(points) == [points[0], points[1], points[4]]
    assert best_point(points) is points[4] and best_point(points[:4]) is points[1]


@pytest.fixture
def given(tmp_path: Path, make_generator, make_grid_tokenizer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    tokenizer = make_grid_tokenizer(4, (8, 8))

    def decode(tokens: Tensor) -> Tensor:
        return (tokens.float() / 1.5 - 1).reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)

    monkeypatch.setattr(tokenizer, "decode", decode)
    generator = make_generator("masked", 4, (8, 8), 3, spread=0.5, tokenizer=tokenizer, image_size=8)
    monkeypatch.setattr(command, "load", lambda path: generator)
    (tmp_path / "g.ckpt").write_bytes(b"weights")
    save_folder(tmp_path / "reference", pixels(24, 0), np.arange(24) % 3)
    return {
        "ckpt_path": str(tmp_path / "g.ckpt"),
        "reference": str(tmp_path / "reference"),
        "output": str(tmp_path / "out"),
        "settings": {"temperature": [0.5, 1.0], "steps": [2, 4]},
        "num_samples": 10,
        "batch_size": 4,
        "extractor": ColourMeans(),
        "accelerator": "cpu",
    }


def test_a_grid_is_measured_once_and_its_best_can_be_sampled(given: dict[str, Any], monkeypatch, capsys) -> None:
    drawn: list[Any] = []
    draw = command.draw_images

    def watched(generator: Any, numbers: Tensor, **settings: Any) -> Any:
        drawn.append((settings["sampler"].temperature, settings["sampler"].steps, numbers.tolist()))
        return draw(generator, numbers, **settings)

    monkeypatch.setattr(command, "draw_images", watched)
    found = sweep(**given)
    assert len(drawn) == 4 * 3 and [point["settings"] for point in found["points"]] == [
        {"temperature": temperature, "steps": steps} for temperature in (0.5, 1.0) for steps in (2, 4)
    ]
    # One of them by hand.
    generator: Any = command.load("g.ckpt")
    tokens = generator.sample(torch.arange(10) % 3, with_settings(generator.sampler, {"temperature": 0.5, "steps": 4}))
    made, real = FeatureMeter(ColourMeans(), 10), FeatureMeter(ColourMeans(), 24)
    made.update(to_uint8(generator.tokenizer.decode(tokens)), None, torch.arange(10))
    real.update(torch.from_numpy(pixels(24, 0)).movedim(-1, 1), None, torch.arange(24))
    expected = frechet_distance(made.measurement().moments, real.measurement().moments)
    assert found["points"][1]["distance"] == pytest.approx(expected, rel=1e-6)
    assert found["points"][1]["network_calls"] == 4 and 0 <= found["points"][1]["precision"] <= 1

    folder = Path(given["output"])
    best = found["best"]
    assert best["distance"] == min(point["distance"] for point in found["points"])
    assert "best" in (folder / "sweep.md").read_text() and "<svg" in (folder / "sweep.html").read_text()
    assert json.loads((folder / "sweep.json").read_text()) == found and "Best: temperature" in capsys.readouterr().out

    # Again, and finer: only what is new is drawn.
    drawn.clear()
    assert sweep(**given)["points"] == found["points"] and drawn == []
    finer = sweep(**{**given, "settings": {"temperature": [0.5, 0.75, 1.0], "steps": [2, 4]}})
    assert {temperature for temperature, _, _ in drawn} == {0.75} and len(finer["points"]) == 6
    # Of other weights nothing is taken.
    Path(given["ckpt_path"]).write_bytes(b"others")
    drawn.clear()
    sweep(**given)
    assert len(drawn) == 12

    from jsonargparse import ArgumentParser

    from discrete_lit.cli.sample import sample
    from discrete_lit.core.configuration import build

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(sample)
    required = ["--ckpt_path=g.ckpt", "--output=o", "--num_samples=2"]
    sampler = build(parser, parser.parse_args([f"--config={folder / 'best.yaml'}", *required]))["sampler"]
    assert isinstance(sampler, MaskGITSampler) and sampler.steps == best["settings"]["steps"]
    assert sampler.temperature == best["settings"]["temperature"]


def test_golden_section_of_a_sampler(given: dict[str, Any]) -> None:
    settings = {"temperature": [0.5, 1.5], "steps": [2, 3]}
    found = sweep(**{**given, "settings": settings, "search": "golden", "evaluations": 3})
    assert len(found["points"]) == 6 and {point["settings"]["steps"] for point in found["points"]} == {2, 3}
    assert all(0.5 < point["settings"]["temperature"] < 1.5 for point in found["points"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {}}, "give each setting a list of values"),
        ({"settings": {"temperature": []}}, "give each setting a list of values"),
        ({"settings": {"colour": [1]}}, r"settings\.colour: a MaskGITSampler has no colour"),
        ({"settings": {"temperature": [-1.0]}}, "temperature must be > 0"),
        ({"search": "golden", "settings": {"temperature": [1.0]}}, "takes the two ends of its interval"),
        ({"search": "golden", "settings": {"steps": [2, 9]}}, r"settings\.steps takes whole numbers"),
        ({"search": "golden", "evaluations": 1}, "needs at least 2"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"sampler": RasterSampler()}, None),
        ({"reference": "missing"}, "'missing' is no image set"),
    ],
)
def test_what_cannot_be_swept(given: dict[str, Any], change: dict[str, Any], message: str | None) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(**{**given, **change})
