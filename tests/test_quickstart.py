"""The `make` targets of the quickstart make every file that their tables are of, and choose nothing on these."""

import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.recipe_files import ROOT, configs_of, header_command, read

from discrete_lit.data.sources.digit_compositions import WORDS, held_out

GREY, COLOUR = "lightning_configs/quickstart", "lightning_configs/quickstart_colour"
RUNS = {"RUNS": "", "COLOUR": "_colour", "DIGITS": "_digits", "NAMED": "_emoji"}
TABLES = {
    f"{GREY}/evaluate.yaml": "runs/quickstart/evaluation/report.md",
    f"{GREY}/evaluate_seeds.yaml": "runs/quickstart/evaluation_seeds/report.md",
    f"{COLOUR}/evaluate.yaml": "runs/quickstart_colour/evaluation/report.md",
    f"{COLOUR}/evaluate_further.yaml": "runs/quickstart_colour/evaluation_further/report.md",
    f"{COLOUR}/evaluate_hybrids.yaml": "runs/quickstart_colour/evaluation_hybrids/report.md",
}


def steps(target: str, folder: Path) -> list[list[str]]:
    """The commands of the project that make a file where nothing is there yet, each as its arguments."""
    variables = [f"{name}={folder}/quickstart{part}" for name, part in RUNS.items()]
    command = ["make", "--dry-run", *variables, target.replace("runs/", f"{folder}/", 1)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.replace("\\\n", " ").replace(str(folder), "runs").splitlines()
    return [line.split("bin/discrete-lit ")[1].split() for line in lines if "bin/discrete-lit " in line]


def option(step: list[str], name: str) -> str | None:
    return step[step.index(name) + 1] if name in step else None


def made_by(step: list[str]) -> str:
    """The folder that a command writes."""
    settings = read(configs_of(step)[0])
    folder = option(step, "--run_dir") or option(step, "--output") or settings.get("run_dir") or settings["output"]
    return str(folder)


def runs_in(settings: Any) -> Iterator[str]:
    """Every path of a run that nested settings name."""
    for value in settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ():
        if isinstance(value, str) and value.startswith("runs/"):
            yield value
        yield from runs_in(value)


def folder_of(path: str) -> str:
    return path.removesuffix("/samples.npz").removesuffix("/checkpoints/last.ckpt")


@pytest.mark.parametrize(("table", "report"), TABLES.items())
def test_make_makes_every_file_of_a_table(table: str, report: str, tmp_path: Path) -> None:
    commands = steps(report, tmp_path)
    assert commands[-1] == ["evaluate", "--config", table]
    assert read(table)["output"] == str(Path(report).parent)
    made = [made_by(step) for step in commands]
    assert len({(step[0], folder) for step, folder in zip(commands, made, strict=True)}) == len(commands)
    for path in runs_in({key: value for key, value in read(table).items() if key != "output"}):
        assert folder_of(path) in made[:-1], path


@pytest.mark.parametrize(("table", "report"), TABLES.items())
def test_every_step_reads_what_is_made_before_it(table: str, report: str, tmp_path: Path) -> None:
    made: list[str] = ["runs/quickstart_colour/package"]
    for step in steps(report, tmp_path):
        settings = {key: value for key, value in read(configs_of(step)[0]).items() if key not in ("run_dir", "output")}
        said = [argument for argument in step if argument.startswith("runs/") and argument != made_by(step)]
        overridden = any(argument.startswith("--data") or argument == "--ckpt_path" for argument in step)
        for path in said + ([] if overridden and len(said) else list(runs_in(settings))):
            assert folder_of(path) in made, (step, path)
        made.append(made_by(step))


def test_seeds_differ_in_the_seed_alone_and_read_their_own_tokens(tmp_path: Path) -> None:
    commands = steps(TABLES[f"{GREY}/evaluate_seeds.yaml"], tmp_path)
    for seed in ("1", "2"):
        own = [step for step in commands if f"seed_{seed}/" in made_by(step)]
        assert sorted(step[0] for step in own) == ["fit"] * 3 + ["sample"] * 2 + ["tokenize"] * 2
        for step in own:
            used = [argument for argument in step if argument.startswith("runs/quickstart/")]
            assert used and all(argument.startswith(f"runs/quickstart/seed_{seed}/") for argument in used)
            seeds = {
                name: value
                for name, value in pairwise(step)
                if name.rpartition(".")[2] in ("--seed_everything", "seed")
            }
            if step[0] == "fit":
                of_model = [] if "tokenizer" in made_by(step) else ["--model.init_args.seed"]
                assert seeds == dict.fromkeys(["--seed_everything", "--data.init_args.seed", *of_model], seed)
            elif step[0] == "sample":
                assert option(step, "--seed") == seed
    first = [step for step in commands if "seed_" not in " ".join(step) and step[0] in ("fit", "sample")]
    assert not any("--seed" in argument for step in first for argument in step)


def test_a_row_of_seeds_is_the_row_of_one() -> None:
    one, three = read(f"{GREY}/evaluate.yaml"), read(f"{GREY}/evaluate_seeds.yaml")
    for key in ("reconstructions", "samples"):
        assert {name: paths[0] for name, paths in three[key].items()} == one[key]
        for paths in three[key].values():
            assert paths[1:] == [paths[0].replace("quickstart/", f"quickstart/seed_{seed}/") for seed in (1, 2)]
    for settings in (one, three):
        for key in ("reconstructions", "samples", "output"):
            del settings[key]
    assert one == three


def test_the_images_of_a_table_are_seen_by_it_alone() -> None:
    """No training validates on the held-out images of a table, and settings are chosen on others of both sets."""
    for folder in (GREY, COLOUR):
        held_out = read(f"{folder}/evaluate.yaml")["held_out"]
        for path in sorted((ROOT / folder).glob("*.yaml")):
            recipe = path.relative_to(ROOT).as_posix()
            command = header_command(recipe)[0]
            if command not in ("evaluate", "shards"):
                assert held_out not in set(runs_in(read(recipe))), recipe
    table, choice = read(f"{GREY}/evaluate.yaml"), read(f"{GREY}/select.yaml")
    assert choice["held_out"] != table["held_out"] and choice["reference"] != table["reference"]
    for key in ("num_images", "image_size", "image_channels", "extractor", "classifier"):
        assert choice[key] == table[key]


def test_the_emoji_come_from_the_registry_that_npm_is_told(tmp_path: Path) -> None:
    command = ["make", "--dry-run", f"COLOUR={tmp_path}/c", f"{tmp_path}/c/shards/train/manifest.json"]
    environment = {"PATH": "/usr/bin:/bin", "npm_config_registry": "https://mirror.example/npm/"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert re.search(r"curl .* https://mirror\.example/npm/emoji-datasource-google/-/emoji-\S+\.tgz", done.stdout)


def test_the_quickstart_writes_the_page_of_its_generators_and_says_where(tmp_path: Path) -> None:
    commands = steps("runs/quickstart/watch.html", tmp_path)
    assert commands[-1][:3] == ["watch", "--config", "lightning_configs/quickstart/watch.yaml"]
    recipe = yaml.safe_load((ROOT / commands[-1][2]).read_text())
    assert recipe["output"] == "runs/quickstart/watch.html"
    made = [made_by(step) for step in commands[:-1]]
    shown = [panel if isinstance(panel, str) else panel["ckpt_path"] for panel in recipe["checkpoints"].values()]
    assert shown and all(folder_of(path) in made for path in shown)
    asked = subprocess.run(["make", "--dry-run", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r'echo "step by step: +runs/quickstart/watch.html', asked.stdout)
    assert re.search(r"make(\[\d\])? .*runs/quickstart/watch.html", asked.stdout)


DIGITS = "runs/quickstart_digits"


EMOJI = "runs/quickstart_emoji"


@pytest.mark.parametrize(
    "model",
    [*(f"{DIGITS}/{name}" for name in ("chameleon", "transfusion", "sums", "sums_thought")), f"{EMOJI}/transfusion"],
)
def test_what_the_models_of_text_and_image_read_is_made_before(model: str, tmp_path: Path) -> None:
    made = {f"{DIGITS}/sklearn/datasets/data/digits.csv.gz", "runs/quickstart_colour/package"}
    commands = steps(f"{model}/samples.npz", tmp_path)
    for step in commands:
        settings = read(configs_of(step)[0]) if configs_of(step) else {}
        output = option(step, "--output") or settings.get("run_dir") or settings["output"]
        said = [argument for argument in step if argument.startswith("runs/") and argument != output]
        for path in {folder_of(path) for path in [*said, *runs_in(settings)]} - {output}:
            assert path in made, (step, path)
        made.add(str(output))
    assert [step[0] for step in commands[-2:]] == ["fit", "sample"]
    folder, name = model.rsplit("/", 1)
    assert f"{folder}/shards/{name if 'sums' in name else 'train'}" in made
    assert f"{folder}/shards/test" not in made


def test_no_model_of_digits_sees_a_pair_that_is_held_out() -> None:
    """They read the splits train and validation, whose pairs are others than those of test."""
    folder = "lightning_configs/quickstart_digits"
    for path in sorted((ROOT / folder).glob("*.yaml")):
        recipe = path.relative_to(ROOT).as_posix()
        settings = read(recipe)
        if header_command(recipe)[0] == "fit":
            assert f"{DIGITS}/shards/test" not in set(runs_in(settings))
        elif header_command(recipe)[0] == "shards":
            assert settings["split"] == settings["source"]["init_args"]["split"]
            assert (settings["split"] == "test") == settings["output"].endswith("/test")
    for prompts, sums in (
        (read(f"{folder}/sample.yaml")["prompt"], False),
        (read(f"{folder}/sample_sums.yaml")["prompt"], True),
    ):
        for prompt in prompts:
            words = prompt.split("+") if sums else [prompt.split()[0], prompt.split()[-1]]
            a, b = (int(word) if sums else WORDS.index(word) for word in words)
            assert held_out(a, b), prompt
