"""`discrete-lit watch`: its page in a real browser, what it says of a trace, and what it refuses."""

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.browser import chromium
from helpers.tiny_runs import generator_settings, refusal, run, untrained, untrained_fsq

from discrete_lit.checkpoints import load
from discrete_lit.core.random import CounterRandom
from discrete_lit.evaluation.watched_draws import Watched, draw_panel, write_page
from discrete_lit.samplers import AncestralSampler, MaskGITSampler


def on(tokenizer: Path, name: str, **settings):
    """Settings of a tiny generator of another class on the same tokenizer."""
    made = copy.deepcopy(generator_settings(tokenizer))
    made["model"]["class_path"] = f"discrete_lit.generators.{name}"
    made["model"]["init_args"] |= settings
    return made


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Untrained generators on one tokenizer: 8 x 8 images of 4 x 4 ids."""
    folder = tmp_path_factory.mktemp("watch")
    tokenizer = untrained_fsq(folder / "tokenizer.ckpt")
    uniform = on(
        tokenizer,
        "DiscreteDiffusion",
        process={"class_path": "discrete_lit.diffusion.UniformProcess"},
        loss={"class_path": "discrete_lit.diffusion.losses.ContinuousBound"},
    )
    uniform["model"]["init_args"]["backbone"]["init_args"] |= {"conditioning": "adaln"}
    bare = on(tokenizer, "TokenDiffusionDecoder")
    arguments = bare["model"]["init_args"]
    arguments["discrete"] = arguments.pop("tokenizer")
    arguments["tokenizer"] = {"class_path": "discrete_lit.tokenizers.RawPixels", "init_args": {"image_channels": 3}}
    arguments |= {
        "num_classes": 1,
        "backbone": {
            "class_path": "discrete_lit.backbones.DiT",
            "init_args": {"width": 8, "depth": 1, "heads": 2, "patch_size": 4},
        },
        "sampler": {
            "class_path": "discrete_lit.samplers.GuidedSolver",
            "init_args": {"solver": {"class_path": "discrete_lit.diffusion.solvers.DDIM", "init_args": {"steps": 3}}},
        },
    }
    return {
        "tokenizer": tokenizer,
        "masked": untrained(generator_settings(tokenizer), folder / "masked.ckpt"),
        "autoregressive": untrained(on(tokenizer, "Autoregressive"), folder / "autoregressive.ckpt"),
        "uniform": untrained(uniform, folder / "uniform.ckpt"),
        "larger": untrained(on(tokenizer, "Masked", image_size=16), folder / "larger.ckpt"),
        "decoder": untrained(bare, folder / "decoder.ckpt"),
    }


@pytest.fixture(scope="module")
def page(checkpoints, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "watch.html"
    shown = {
        "AR": str(checkpoints["autoregressive"]),
        "Uniform": str(checkpoints["uniform"]),
        "Hybrid": {"ckpt_path": str(checkpoints["masked"]), "decoder": str(checkpoints["decoder"])},
        "A <b> & 'name'": str(checkpoints["masked"]),
    }
    run("watch", "--output", file, "--checkpoints", json.dumps(shown))
    return file


def data_of(page: Path) -> dict:
    line = next(line for line in page.read_text().splitlines() if line.startswith("const DATA = "))
    return json.loads(line.removeprefix("const DATA = ").removesuffix(";"))


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert page.stat().st_size < 5_000_000
    assert "http://www.w3.org/2000/svg" in text  # a name, which nothing is loaded from
    assert text.count("http") == text.count("http://www.w3.org/2000/svg")
    still = text.partition("<noscript>")[2].partition("</noscript>")[0]
    assert still.count("data:image/png") == 4 and "A &lt;b&gt; &amp; " in still and "0.7963" not in still
    assert "Total variation" in text and "0.796" in still


def test_frames_are_the_trace(checkpoints) -> None:
    generator = load(checkpoints["masked"])
    sampler = MaskGITSampler(steps=4, guidance_scale=2.0, guidance_schedule="linear")
    panel = draw_panel(Watched(name="M", generator=generator, sampler=sampler), [1, 0], [3])
    output = generator.draw(torch.tensor([1, 0]), CounterRandom(3, torch.arange(2)), sampler, trace=True)
    frames = panel["draws"]["0/3"]["frames"]
    assert len(frames) == 5 and set(frames[0]["ids"]) == {-1} and frames[0]["calls"] == 0
    assert frames[-1]["ids"] == output.tokens[1].flatten().tolist()
    assert (frames[-1]["calls"], frames[-1]["passes"]) == (output.network_calls, output.sequential_passes) == (7, 4)
    for before, after in pairwise(frames):
        differs = [place for place in range(16) if before["ids"][place] != after["ids"][place]]
        assert after["d"] == differs
        assert all((after["c"][place] is None) == (after["ids"][place] < 0) for place in range(16))


def test_uniform_diffusion_starts_from_its_noise(checkpoints) -> None:
    generator = load(checkpoints["uniform"])
    panel = draw_panel(Watched(name="U", generator=generator, sampler=AncestralSampler(steps=3)), [0], [0])
    frames = panel["draws"]["0/0"]["frames"]
    assert min(frames[0]["ids"]) >= 0
    assert frames[1]["d"] == [place for place in range(16) if frames[0]["ids"][place] != frames[1]["ids"][place]]


def test_the_hybrid_goes_on_with_its_decoder(page: Path) -> None:
    hybrid = data_of(page)["models"]["panels"][2]["draws"]["0/0"]["frames"]
    plain = data_of(page)["models"]["panels"][3]["draws"]["0/0"]["frames"]
    assert len(hybrid) == len(plain) + 3 and hybrid[-1]["ids"] == plain[-1]["ids"]
    assert [frame["passes"] for frame in hybrid[-4:]] == [plain[-1]["passes"] + more for more in range(4)]


# What it refuses.


@pytest.mark.parametrize(
    ("shown", "more", "said"),
    [
        ({"a": "masked", "b": "larger"}, (), "must have one grid to be shown side by side: a has (4, 4), b has (8, 8)"),
        ({"a": "masked"}, ("--classes", "[0, 2]"), "classes holds 2, accepted by a: int in [0, 2)"),
        ({"a": "masked"}, ("--classes", "[1, 1]"), "classes=[1, 1], accepted: at least one, each once"),
        ({"a": "masked"}, ("--seeds", "[]"), "seeds=[], accepted: at least one, each once"),
        ({"a": "tokenizer"}, (), "holds a FSQ, not a Generator of ids"),
        ({"a": "decoder"}, (), "holds a TokenDiffusionDecoder, not a Generator of ids"),
        ({}, ("--classes", "[0]"), "classes and seeds are of checkpoints: give checkpoints too"),
    ],
)
def test_what_cannot_be_shown(checkpoints, tmp_path: Path, capfd, shown, more, said: str) -> None:
    given = json.dumps({name: str(checkpoints[file]) for name, file in shown.items()})
    assert said in refusal(capfd, "watch", "--output", tmp_path / "page.html", "--checkpoints", given, *more)
    assert not (tmp_path / "page.html").exists()


def test_a_path_that_is_no_checkpoint(tmp_path: Path, capfd) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    for path in (tmp_path / "notes.txt", tmp_path / "missing.ckpt"):
        said = refusal(capfd, "watch", "--output", tmp_path / "p.html", "--checkpoints", json.dumps({"a": str(path)}))
        assert str(path) in said


def test_a_trace_without_images(checkpoints, tmp_path: Path) -> None:
    generator = load(checkpoints["masked"])
    panel = draw_panel(Watched(name="M", generator=generator), [0], [0])
    del panel["draws"]["0/0"]["strip"]
    with pytest.raises(ValueError, match="M: the draw 0/0 has a trace without images"):
        write_page(tmp_path / "page.html", [panel], classes=[0])
    generator.tokenizer.makes_images = False
    with pytest.raises(ValueError, match="M: its tokenizer FSQ makes no images to show"):
        Watched(name="M", generator=generator)


# In a browser.


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser, page: Path):
    """`opened(**context)`: the page, which may log no error and ask for nothing on the network."""
    wrong: list[str] = []

    def make(file: Path = page, **context):
        tab = browser.new_context(**context).new_page()
        tab.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda asked: asked.url.startswith("http") and wrong.append(asked.url))
        tab.goto(file.as_uri())
        return tab

    yield make
    assert wrong == []


def pixels(tab, which: str) -> str:
    return tab.locator(which).first.evaluate("canvas => canvas.toDataURL()")


def test_every_control_does_what_it_says(opened) -> None:
    tab = opened()
    time, play = tab.locator("#time"), tab.locator("#play")
    assert tab.locator(".panel h2").all_inner_texts()[0] == "Autoregressive"
    assert time.inner_text() == "Pass 0 of 20"
    tab.click("#next")
    tab.click("#next")
    tab.click("#back")
    assert time.inner_text() == "Pass 1 of 20"
    assert tab.locator(".note").first.inner_text() == "1 changed, 1 of 16 drawn"
    tab.click("#last")
    assert time.inner_text() == "Pass 20 of 20" and "done" in tab.locator(".note").first.inner_text()
    tab.click("#first")
    tab.select_option("#speed", "40")
    play.click()
    assert play.inner_text() == "Pause"
    tab.wait_for_function("document.getElementById('time').textContent === 'Pass 20 of 20'")
    tab.wait_for_function("document.getElementById('play').textContent === 'Play'")
    assert "MaskGIT: 8 passes" in tab.locator("#status").inner_text()
    # What is painted depends on the confidence's mode, the seed, and the theme.
    seen = {pixels(tab, ".panel canvas")}
    for mode in ("none", "heat"):
        tab.select_option("#confidence", mode)
        seen.add(pixels(tab, ".panel canvas"))
    tab.select_option("#seed", "1")
    seen.add(pixels(tab, ".panel canvas"))
    assert len(seen) == 4
    tab.select_option("#clock", "share")
    assert time.inner_text() == "0% of each draw"
    tab.locator("#seek").fill("30")
    assert time.inner_text() == "50% of each draw"
    tab.click("summary")
    assert "0.7963" in tab.locator("#table").inner_text()
    background = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(background)
    tab.click("#theme")
    assert tab.evaluate(background) != light


def test_real_draws_by_class_and_seed(opened) -> None:
    tab = opened()
    tab.click("#tab-models")
    assert tab.locator(".panel h2").all_inner_texts() == ["AR", "Uniform", "Hybrid", "A <b> & 'name'"]
    tab.click("#last")
    tab.wait_for_function("document.querySelector('.picture').width === 8")
    assert tab.locator(".numbers").nth(2).locator("dd").nth(2).inner_text() == "11"  # 8 rounds and 3 steps
    seen = {pixels(tab, ".picture")}
    for select, value in (("#class", "1"), ("#seed", "1")):
        before = pixels(tab, ".picture")
        tab.select_option(select, value)
        tab.wait_for_function("before => document.querySelector('.picture').toDataURL() !== before", arg=before)
        seen.add(pixels(tab, ".picture"))
    assert len(seen) == 3


def test_the_keyboard_is_enough(opened) -> None:
    tab, time = opened(), "document.getElementById('time').textContent"
    for key, expected in (
        ("ArrowRight", "Pass 1 of 20"),
        ("End", "Pass 20 of 20"),
        ("ArrowLeft", "Pass 19 of 20"),
        ("Home", "Pass 0 of 20"),
    ):
        tab.keyboard.press(key)
        assert tab.evaluate(time) == expected
    tab.keyboard.press("Space")
    assert tab.locator("#play").inner_text() == "Pause"
    tab.keyboard.press("Space")
    assert tab.locator("#play").inner_text() == "Play"
    tab.keyboard.press("t")
    assert tab.locator("#tab-models").get_attribute("aria-selected") == "true"
    tab.locator("#tab-models").focus()
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#tab-toy").get_attribute("aria-selected") == "true"


def test_a_phone_scrolls_in_one_direction(opened) -> None:
    tab = opened(viewport={"width": 360, "height": 740}, color_scheme="dark")
    for name in ("#tab-toy", "#tab-models"):
        tab.click(name)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_javascript_there_are_a_picture_and_the_numbers(opened) -> None:
    tab = opened(java_script_enabled=False)
    assert tab.locator("noscript img").count() == 4 and tab.locator("noscript img").first.is_visible()
    assert not tab.locator("#app").is_visible()


def test_the_toy_needs_no_checkpoint(opened, tmp_path: Path) -> None:
    run("watch", "--output", tmp_path / "toy.html")
    tab = opened(tmp_path / "toy.html")
    assert not tab.locator("#tab-models").is_visible()
    tab.keyboard.press("t")
    assert tab.locator(".panel").count() == 5
