"""The `discrete-lit` command: what it is asked to do, and who does it.

Only the asked command is imported, so that the list of commands, `--help` and `--version` answer at once.
"""

import gc
import importlib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import takewhile
from types import ModuleType

from discrete_lit import __version__

TRAINING_COMMANDS = {
    "fit": "train a tokenizer, a generator or a classifier",
    "validate": "compute the validation metrics of a model",
    "test": "compute the test metrics of a model",
    "predict": "run a model's predict step over a data set",
}
# Commands that are a function of this package each; those above are one `TrainingCLI`.
FUNCTION_COMMANDS = {
    "shards": "write a data set as webdataset shards",
    "tokenize": "encode the images of a data set as arrays of tokens or latents",
    "text_tokenizer": "learn the vocabulary of captions",
    "encode_captions": "encode the captions of arrays by a text encoder",
    "measure_latents": "find the scale that a KL-VAE's latents need",
    "models": "list the published models that have a name",
    "sample": "draw images from a generator's checkpoint, or from a published model",
    "caption": "write the captions of images by a generator of text and image",
    "evaluate": "compare samples with a reference set",
    "evaluate_audio": "compare audio clips with real ones: codecs, samples",
    "evaluate_video": "compare clips with real ones: reconstructions, continuations, samples",
    "retrieval": "measure how well samples show their prompts, by CLIP",
    "replay": "run the batch of an alarm again on the checkpoint before",
    "compare": "put the reports of evaluations into one table",
    "sweep": "find the best settings of a sampler",
    "watch": "show samplers at work, step by step, on one HTML page",
    "demo": "draw images in a web browser",
    "advise": "say which tokenizer, generator and sampler to take on this machine",
    "import": "read a published checkpoint",
    "export": "write a checkpoint in a published layout, as one file, or as a folder for the Hub",
    "recipes": "list the recipes that come with the package, or print one",
}
# Those that fill the folder `output`; `shards` holds its lock itself, since scripts write shards too.
_FILLING = ("tokenize", "sample", "evaluate", "evaluate_audio", "evaluate_video", "compare", "sweep")
# Options with a list that may be given several times, each with a value; and the one that words in front stand for.
_REPEATED = {"sample": ("--prompt", "--thought"), "sweep": ("--prompt",), "caption": ("--images",)}
_IN_FRONT = {"caption": "--images", "models": "--name", "recipes": "--name"}
_WITHOUT_CHECKPOINT = ("shards", "text_tokenizer", "encode_captions", "retrieval", "models", "advise", "recipes")
# Module and function, where the module does not have the command's name: it cannot be `import`, or another module's.
_FUNCTIONS = {
    "text_tokenizer": ("train_text_tokenizer", "text_tokenizer"),
    "import": ("weights", "import_weights"),
    "export": ("weights", "export_weights"),
}
COMMANDS = {**TRAINING_COMMANDS, **FUNCTION_COMMANDS}
TRACEBACK_VARIABLE = "DISCRETE_LIT_TRACEBACK"


def usage() -> str:
    """The text of `discrete-lit --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: discrete-lit COMMAND [--config FILE.yaml ...] [--key value ...]\n\n"
        "Discrete image generation in PyTorch Lightning.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n"
        "  -h, --help  this text; `discrete-lit COMMAND --help` lists the settings of a command\n"
        "  --version   the version\n\n"
        "Every command reads its settings from one or more --config files, later ones over earlier ones, and from the\n"
        "command line, which wins; --print_config prints the settings that result. A checkpoint builds classes of\n"
        "discrete_lit alone, and of modules of yours that --trust MODULE names.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run `discrete-lit` with the given arguments, those of the process by default.

    What `said_of` knows, a user's mistake, an error of the disk or too little memory, is printed as one message; the
    environment variable `DISCRETE_LIT_TRACEBACK=1` shows where it was raised.

    Raises:
        SystemExit: with code 2 after a user's mistake, with code 0 after `--help` and the like.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return
    if arguments[0] == "--version":
        print(f"discrete-lit {__version__}")
        return
    command = arguments[0]
    if command not in COMMANDS:
        from difflib import get_close_matches

        nearest = get_close_matches(command, COMMANDS, n=1)
        guess = f"; did you mean {nearest[0]!r}?" if nearest else ""
        fail(f"{command!r} is not a command{guess} The commands are {', '.join(COMMANDS)}")
    try:
        from discrete_lit.cli.config import files_first
        from discrete_lit.core.configuration import use_current_names

        named = name_words_in_front(arguments[1:], _IN_FRONT.get(command))
        _run(command, files_first(use_current_names(named)))
    except Exception as error:
        message = said_of(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            raise
        fail(message)


# How PyTorch's allocator on the CPU, and sizes that no allocator is asked for, begin to fail.
_NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "Storage size calculation overflowed")


def said_of(error: BaseException) -> str | None:
    """Say in a message what an error that input can cause is about; None for an error of the program."""
    if isinstance(error, ValueError) or type(error).__name__ == "MisconfigurationException":  # Lightning's ValueError
        return str(error)
    if isinstance(error, OSError):
        # A full disk, a folder that may not be written: nothing that a traceback explains, where the file is named.
        # Python names no file where it finds no folder for temporary ones, but all that it tried.
        named = error.filename is not None
        return (
            f"{error.filename}: {error.strerror}"
            if named
            else str(error)
            if "temporary directory" in str(error)
            else None
        )
    if isinstance(error, RecursionError):
        return "the settings, or a file that they name, are nested too deeply"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error) for t in _NO_MEMORY)):
        first = (str(error) or type(error).__name__).splitlines()[0]
        return f"there is not enough memory: {first}. Smaller sizes, such as batch_size or image_size, need less"
    return None


def fail(message: str) -> None:
    """Print a user's mistake and exit with code 2; what a message quotes cannot move the cursor or colour the text."""
    short = re.sub(r"\S{500,}", lambda word: f"{word[0][:200]}...", message)  # such as a name of thousands of letters
    safe = "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in short)
    sys.stderr.write(f"error: {safe}\n")
    raise SystemExit(2)


def _run(command: str, arguments: list[str]) -> None:
    from discrete_lit.cli.config import read_given
    from discrete_lit.core.trust import importable_from_here, modules_of, named_by_user, trusting

    arguments, trusted = take_trust(arguments)
    given = read_given(arguments).values
    if trusted and command in _WITHOUT_CHECKPOINT:
        raise ValueError(f"--trust is of no use to `{command}`, which reads no checkpoint")
    # What a checkpoint is resumed with is named under `model`; other settings are no part of it.
    own = modules_of(named_by_user(given.get("model")))
    with importable_from_here([*trusted, *named_by_user(given)]), trusting(*trusted, *own):
        if command in TRAINING_COMMANDS:
            _module("train").run_training(command, arguments)
        else:
            run_function(command, arguments)


def _module(name: str) -> ModuleType:
    """Import a module of this package, without looking for garbage meanwhile.

    PyTorch, Lightning and torchmetrics make half a million objects that stay. To look through them again and again is a
    third of a command's start: `discrete-lit fit --config lightning_configs/quickstart/masked.yaml --print_config` took
    6.7 core-seconds and takes 4.5 (AMD EPYC, 29 November 2026).
    """
    name = f"discrete_lit.cli.{name}"
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def take_trust(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take every `--trust MODULE` out of a command line: the rest of it, and the modules.

    Raises:
        ValueError: the last one names no module.
    """
    rest: list[str] = []
    trusted: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, value = argument.partition("=")
        if option != "--trust":
            rest.append(argument)
            continue
        trusted.append(value if equals else next(waiting, ""))
        if not trusted[-1]:
            raise ValueError("--trust needs the name of a module, such as my_package.models")
    return rest, trusted


def name_words_in_front(arguments: Sequence[str], option: str | None) -> list[str]:
    """Give the words in front of the first option their name, each as a value of one option; where there is one."""
    words = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    if option is None or not words:
        return list(arguments)
    return [*(f"{option}={word}" for word in words), *arguments[len(words) :]]


def gathered(arguments: Sequence[str], option: str) -> list[str]:
    """Make one option with a list of an option that is given several times, each with a value."""
    import json

    rest: list[str] = []
    values: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name != option:
            rest.append(argument)
        elif (value := value if equals else next(waiting, "")).startswith("["):
            return list(arguments)  # a list already
        else:
            values.append(value)
    return [*rest, f"{option}={json.dumps(values)}"] if values else rest


def run_function(name: str, arguments: list[str]) -> None:
    """Call a command's function in `discrete_lit.cli` with the settings of the command line."""
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    from discrete_lit.cli.config import TRUST_HELP, explain
    from discrete_lit.core.array_parts import find_part
    from discrete_lit.core.configuration import build
    from discrete_lit.core.locks import sole_writer

    for option in _REPEATED.get(name, ()):
        arguments = gathered(arguments, option)
    module, function_name = _FUNCTIONS.get(name, (name, name))
    function = getattr(_module(module), function_name)
    description = (function.__doc__ or "").partition("\n\n")[0]
    parser = ArgumentParser(
        prog=f"discrete-lit {name}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        epilog=None if name in _WITHOUT_CHECKPOINT else TRUST_HELP,
    )
    parser.add_argument("-c", "--config", action="config", help="A YAML file of settings; may be repeated.")
    parser.add_function_arguments(function, sub_configs=True)
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(explain(parser, arguments, error)) from error
    settings = build(parser, parsed)
    settings.pop("config")
    if settings.get("output") == "":  # of a shell variable that is not set: the current folder was not meant
        raise ValueError("output is '', accepted: a path")
    if settings.get("missing"):
        raise SystemExit(1 if function(**settings)["missing"] else 0)
    # The jobs of an array fill one folder at a time, each its own part.
    purpose, part = name, find_part(settings.get("part"), settings.get("output", ""), name)
    if part is not None:
        settings["part"] = str(part)
        purpose = f"{name}.part-{part.number}-of-{part.parts}"
    with sole_writer(settings["output"], purpose) if name in _FILLING else nullcontext():
        function(**settings)
