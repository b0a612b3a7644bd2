"""Settings: YAML files, command lines, records and prompts that commands read."""

import copy
import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from helpers.tiny_runs import TOKENIZER
from PIL import Image

from bad_input.case import Case, written
from bad_input.weights import checkpoints
from discrete_lit.cli.commands import main
from discrete_lit.core.configuration import read_settings


def read_yaml(folder: Path) -> Any:
    return read_settings((folder / "x.yaml").read_text())


def document(name: str, text: str, refused: str | None = "x.yaml", **more: Any) -> Case:
    """A file of settings, read by a command as `--config`."""

    def read(folder: Path) -> Any:
        return read_yaml(folder) if refused is None else command("fit", "--config", "x.yaml")(folder)

    return Case(name=f"yaml: {name}", craft=written("x.yaml", text), read=read, refused=refused, **more)


def command(*arguments: str) -> Callable[[Path], str]:
    """Run `discrete-lit`: what it printed. A refusal, status 2 and a line that begins `error:`, is a ValueError."""

    def read(folder: Path) -> str:
        errors, output = io.StringIO(), io.StringIO()
        try:
            with redirect_stderr(errors), redirect_stdout(output):
                main(list(arguments))
        except SystemExit as end:
            said = errors.getvalue()
            printable = all(letter.isprintable() or letter in "\n\r" for letter in said)
            if end.code == 2 and "error: " in said and "Traceback" not in said and printable:
                raise ValueError(said.partition("error: ")[2].rstrip("\n")) from end
            raise RuntimeError(f"status {end.code}: {said[-500:]}") from end
        return output.getvalue() + errors.getvalue()

    return read


def prepare(folder: Path, **changes: Any) -> None:
    """Two checkpoints, two pictures, samples, and the settings of a run of one step."""
    for name, content in checkpoints().items():
        (folder / name).write_bytes(content)
    (folder / "images" / "class").mkdir(parents=True)
    for number in range(4):
        pixels = np.random.RandomState(number).randint(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "class" / f"{number}.png")
    np.savez(folder / "set.npz", arr_0=np.zeros((8, 8, 8, 3), np.uint8), labels=np.zeros(8, np.int64))
    images = {"train": "images", "image_size": 8, "batch_size": 2, "num_workers": 0}
    data = {"data": {"class_path": "discrete_lit.data.ImageFolder", "init_args": images}}
    (folder / "images.yaml").write_text(yaml.safe_dump(data))
    run = copy.deepcopy(TOKENIZER) | copy.deepcopy(data)
    run["trainer"] |= {"max_steps": 1, "logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    (folder / "run.yaml").write_text(yaml.safe_dump(run | changes))


def line(name: str, *arguments: str, refused: Any = ..., craft: Any = prepare, **more: Any) -> Case:
    """A command line; by default its last option is refused, by its name or its value."""
    if refused is ...:
        option = next(word for word in reversed(arguments) if word.startswith("--"))
        setting, _, value = option.lstrip("-").partition("=")
        refused = (setting.rpartition(".")[2], *([value] if len(value) > 3 else []))
    quick = more.pop("quick", False)
    return Case(name=f"command: {name}", craft=craft, read=command(*arguments), refused=refused, quick=quick, **more)


def aliases(levels: int, mapping: bool) -> str:
    if mapping:
        lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}}}" for n in range(1, levels))]
    else:
        lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels))]
    return "\n".join(lines)


def equals(expected: Any) -> Callable[[Any], bool]:
    return lambda found: found == expected and type(found) is type(expected)


YAML = [
    document("lists doubled by aliases", aliases(12, mapping=False)),
    document("mappings doubled by aliases", aliases(30, mapping=True)),
    document("an alias of itself", "a: &a [*a]"),
    document("a mapping that holds itself", "a: &a {b: *a}"),
    document("an alias of nothing", "a: *b"),
    document("5000 lists deep", "a: " + "[" * 5000 + "]" * 5000),
    document("5000 mappings deep", "\n".join(" " * n + f"a{n}:" for n in range(5000)), quick=False),
    document("200,000 unknown keys", "\n".join(f"key{n}: 1" for n in range(200_000)), quick=False),
    document("10 MB", "a: " + "x" * 10**7),
    document("a million numbers", "a: [" + "1," * 10**6 + "]"),
    document("a key twice", "trainer: {max_steps: 1}\ntrainer: {max_epochs: 2}"),
    document("a key twice, inside", "trainer: {max_steps: 1, max_steps: 2}"),
    document("a key twice, once dotted", "trainer.max_steps: 1\ntrainer: {max_steps: 2}"),
    document("a list for a key", "? [a, b]\n: 1"),
    document("a tag of Python", "a: !!python/object/apply:os.system ['touch canary']"),
    document("a tag of one's own", "a: !mine 1"),
    document("a list", "- a\n- b"),
    document("a text", "just words"),
    document("empty", ""),
    document("a tab", "a:\n\tb: 1"),
    document("an open bracket", "a: [1, 2"),
    document("two documents", "a: 1\n---\nb: 2"),
    document("a null in it", "a: b\0c"),
    document("an escape sequence", 'a: "\\e[2J"\nb: 1'),
    document("not a number", "model: {init_args: {lr: .nan}}"),
    document("no UTF-8", "a: \udcff"),
    document("JSON cut off", '{"a": [1, '),
    document("a merge that is no mapping", "a: {<<: 3}"),
    *(
        document(f"{text} is {expected!r}", f"a: {text}", None, right=equals({"a": expected}))
        for text, expected in (
            ("1:30", "1:30"),
            ("010", "010"),
            ("1e-4", 1e-4),
            ("1_000", 1000),
            ("0x10", 16),
            ("2026-11-28", "2026-11-28"),
            ("12:30:45", "12:30:45"),
            ("0o17", "0o17"),
            ("1.", 1.0),
            ("1e3", 1000.0),
            ("+3", 3),
            ("0b11", 3),
        )
    ),
]

FIT = ("fit", "--config", "run.yaml")
SAMPLE = ("sample", "--ckpt_path", "generator.ckpt", "--output", "out")
TOKENIZE = ("tokenize", "--config", "images.yaml", "--ckpt_path", "tokenizer.ckpt", "--output", "out")
FEW = ("--num_samples=4",)


def drew(count: int) -> Callable[[Any], bool]:
    def check(said: Any) -> bool:
        with np.load("out/samples.npz") as file:
            return file["arr_0"].shape == (count, 8, 8, 3)

    return check


LABELS = "[" + ",".join(["0", "1"] * 25_000) + "]"
LINES = [
    line("no command", "fitt", refused="fitt"),
    line("a command of escape sequences", "\x1b[2J", refused="is not a command"),
    line("an unknown option", *FIT, "--nothing=1", refused="nothing"),
    line("10,000 dots", *FIT, "--" + "a." * 10_000 + "b=1", refused="nested too deeply"),
    line(
        "a file for settings that is a pipe",
        "fit",
        "--config",
        "p",
        refused="--config p",
        craft=lambda folder: os.mkfifo(folder / "p"),
    ),
    line("/dev/zero for settings", "fit", "--config", "/dev/zero", refused="/dev/zero"),
    line("a folder for settings", "fit", "--config", ".", refused="--config ."),
    line("no file for settings", "fit", "--config", "none.yaml", refused="none.yaml"),
    line("a null in a name", "fit", "--config", "a\0b", refused="--config"),
    line("broken callbacks", *FIT, "--run_dir=run", "--trainer.callbacks=[{", refused="callbacks"),
    line("a broken model", *FIT, "--model={class_path: [", refused="model"),
    *(
        line(f"fit {option} {value}"[:90], *FIT, f"--{option}={value}")
        for option, value in (
            ("trainer.devices", "x"),
            ("trainer.devices", "0"),
            ("trainer.devices", "-5"),
            ("trainer.devices", "100000"),
            ("trainer.devices", "1.5"),
            ("trainer.max_steps", "abc"),
            ("trainer.max_steps", "1.5"),
            ("trainer.max_steps", "-5"),
            ("trainer.max_epochs", "-7"),
            ("trainer.accumulate_grad_batches", "0"),
            ("trainer.accumulate_grad_batches", "-1"),
            ("trainer.precision", "7"),
            ("trainer.accelerator", "quantum"),
            ("trainer.strategy", "magic"),
            ("trainer.limit_train_batches", "-1"),
            ("trainer.limit_train_batches", "1.5"),
            ("trainer.limit_train_batches", ".nan"),
            ("trainer.gradient_clip_val", "abc"),
            ("trainer.num_nodes", "0"),
            ("trainer.log_every_n_steps", "x"),
            ("data.init_args.batch_size", "0"),
            ("data.init_args.batch_size", "1000000000000"),
            ("data.init_args.batch_size", "1e3"),
            ("data.init_args.num_workers", "100000"),
            ("data.init_args.num_workers", "-1"),
            ("data.init_args.image_size", "0"),
            ("data.init_args.image_size", "1000000000"),
            ("data.init_args.image_size", "[8]"),
            ("data.init_args.seed", "-1"),
            ("data.init_args.seed", "1" + "0" * 30),
            ("data.init_args.max_bad_fraction", ".nan"),
            ("data.init_args.max_bad_fraction", "2"),
            ("data.init_args.minimum_crop", ".nan"),
            ("data.init_args.minimum_crop", "-1"),
            ("data.init_args.train", "nowhere"),
            ("seed_everything", "1" + "0" * 30),
            ("seed_everything", "x"),
            ("ckpt_path", ""),
            ("ckpt_path", "none.ckpt"),
            ("init_from", "none.ckpt"),
            ("init_anew", "[network]"),
            ("run_dir", ""),
            ("run_dir", "/proc/run"),
        )
    ),
    line("fit --run_dir of 5000 letters", *FIT, "--run_dir=" + "a" * 5000, refused="aaaa"),
    line("fit --run_dir that is a file", *FIT, "--run_dir=set.npz", refused="set.npz"),
    line("fit --run_dir below a file", *FIT, "--run_dir=set.npz/run", refused="set.npz"),
    line("fit lr .nan", *FIT, "--model.init_args.optimizer.init_args.lr=.nan", refused="lr"),
    line("fit lr -1", *FIT, "--model.init_args.optimizer.init_args.lr=-1", refused="learning rate"),
    line("fit 2^40 channels", *FIT, "--model.init_args.network.init_args.channels=1099511627776", refused="too large"),
    line("fit", *FIT, refused=None, right=lambda said: True),
    *(
        line(f"sample {' '.join(options)}"[:90], *SAMPLE, *FEW, *options)
        for options in (
            ("--batch_size=0",),
            ("--batch_size=x",),
            ("--devices=x",),
            ("--devices=100000",),
            ("--devices=0",),
            ("--devices=-3",),
            ("--accelerator=quantum",),
            ("--precision=7",),
            ("--seed=x",),
            ("--image_size=0",),
            ("--image_size=1000000000",),
            ("--labels=[5]",),
            ("--labels=[]",),
            ("--labels=[-1]",),
            ("--labels=[0.5]",),
            ("--labels=[a]",),
            ("--labels=[[0]]",),
            ("--labels=0",),
            ("--prompt=a",),
            ("--prompt_file=none.txt",),
            ("--sampler=Nothing",),
            ("--ckpt_path=none.ckpt",),
            ("--num_nodes=0",),
            ("--graph=true",),
            ("--decoder=none.ckpt",),
            ("--decoder_steps=3",),
            ("--nothing=1",),
        )
    ),
    *(
        line(f"sample --num_samples={value}", *SAMPLE, f"--num_samples={value}")
        for value in ("0", "-1", "1.5", "x", ".nan", "1000000000000", "1" + "0" * 30, "null")
    ),
    line("sample --batch_size=10^12", *SAMPLE, *FEW, "--batch_size=1000000000000", refused=None, right=drew(4)),
    line("sample --seed=-1", *SAMPLE, *FEW, "--seed=-1", refused="seed", right=drew(4)),
    line("sample --seed=10^30", *SAMPLE, *FEW, "--seed=1" + "0" * 30, refused="seed", right=drew(4)),
    line("sample 50,000 labels", *SAMPLE, *FEW, f"--labels={LABELS}", refused=None, right=drew(4)),
    line(
        "sample 50,000 labels from a file",
        *SAMPLE,
        *FEW,
        "--config=l.yaml",
        refused=None,
        right=drew(4),
        craft=lambda folder: (prepare(folder), written("l.yaml", f"labels: {LABELS}")(folder)),
    ),
    line("sample into nothing", "sample", "--ckpt_path", "generator.ckpt", *FEW, "--output="),
    line("sample into a file", "sample", "--ckpt_path", "generator.ckpt", *FEW, "--output=set.npz", refused="set.npz"),
    line(
        "sample into /proc", "sample", "--ckpt_path", "generator.ckpt", *FEW, "--output=/proc/out", refused="/proc/out"
    ),
    line(
        "sample into 5000 letters",
        "sample",
        "--ckpt_path",
        "generator.ckpt",
        *FEW,
        "--output=" + "a" * 5000,
        refused="aaaa",
    ),
    line(
        "sample from a tokenizer",
        "sample",
        "--ckpt_path",
        "tokenizer.ckpt",
        *FEW,
        "--output=out",
        refused="tokenizer.ckpt",
    ),
    line(
        "sample beside a broken record",
        *SAMPLE,
        *FEW,
        refused="run.json",
        craft=lambda folder: (prepare(folder), written("out/run.json", "[" * 10**5)(folder)),
    ),
    line(
        "sample beside a record that is a list",
        *SAMPLE,
        *FEW,
        refused="run.json",
        craft=lambda folder: (prepare(folder), written("out/run.json", "[1]")(folder)),
    ),
    *(
        line(f"tokenize {' '.join(options)}", *TOKENIZE, *options)
        for options in (
            ("--data.init_args.num_workers=100000",),
            ("--data.init_args.batch_size=0",),
            ("--devices=x",),
            ("--split=test",),
            ("--crops=five",),
            ("--data.init_args.image_size=9",),
            ("--data.init_args.image_channels=4",),
            ("--precision=7",),
        )
    ),
    line("tokenize ten crops at nan", *TOKENIZE, "--crops=ten", "--ten_crop_scales=[.nan]"),
    line("tokenize ten crops at 1e9", *TOKENIZE, "--crops=ten", "--ten_crop_scales=[1000000000.0]"),
    line("trust in nothing", *SAMPLE, *FEW, "--trust"),
    line("trust in Python", *SAMPLE, *FEW, "--trust=os", refused="trust"),
]


def report(name: str, content: str | bytes) -> Case:
    """A report of another's, which `compare` puts into a table."""
    return Case(
        name=f"report: {name}",
        craft=written("report.json", content),
        read=command("compare", "--reports", "[report.json]", "--output", "out"),
        refused="report.json",
    )


ROW = {"name": "a", "records": [{"metric": "fid", "value": 1.0}]}
REPORTS = [
    *(
        report(name, content)
        for name, content in {
            "empty": "",
            "null": "null",
            "a list": "[]",
            "rows that are none": '{"rows": 5}',
            "no rows": '{"rows": []}',
            "rows of numbers": '{"rows": [1]}',
            "a record without its origin": json.dumps({"rows": [ROW]}),
            "no UTF-8": b"\xff",
            "100,000 lists deep": "[" * 100_000,
            "a key twice": '{"rows": [], "rows": [1]}',
        }.items()
    )
]


CASES = [*YAML, *LINES, *REPORTS]
