"""Golden cases: what the published repositories' own code computed from tiny random weights, and with which settings.

`DISCRETE_LIT_GOLDEN` names a folder with one folder a family. A case is `<family>/<name>.safetensors`, with
`state.<published key>`, `in.<name>` and `out.<name>`, and `<name>.json` beside it, which gives the arguments of the
reference's class (`constructor`) and says in a sentence what each tensor is, the arguments of its sampler included.
Every setting is read there or from the tensors' shapes; what neither says stands in `DEFAULTS`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from discrete_lit.pretrained import FAMILIES, load_pretrained
from helpers.flax_files import write_flax
from helpers.golden_text_tokenizers import write_text_tokenizer

Tensors = dict[str, Tensor]
# `load(**reference)`: the module of a case, with some of the reference's arguments in place of the case's own.
Load = Callable[..., Any]

_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"

DEFAULTS: dict[tuple[str, str], Any] = {
    # Arguments that the reference's code has as defaults or constants, where no case says them.
    ("halton_maskgit", "sched_mode"): "arccos",  # ConfidenceSampler(sched_mode="arccos")
    ("mdlm", "sampling_eps"): 1e-3,  # training.sampling_eps of configs/config.yaml
    ("mdlm", "last_time"): 1e-5,  # Diffusion._sample(num_steps=None, eps=1e-5)
    ("mdlm", "gumbel_offset"): 1e-10,  # _sample_categorical: 1e-10 - (rand + 1e-10).log()
    ("mar_kl_vae", "scale_factor"): 0.2325,  # mul_(0.2325) in MAR's training loop
    ("taming_vqgan", "beta"): 0.25,  # VQModel builds its quantizer with beta=0.25
    ("rar", "guidance_scale_pow"): 1.0,  # RAR.generate(guidance_scale_pow=1.0)
}


class Case:
    """One case: `state`, `inputs` and `expected` by the names of the reference, without their prefixes.

    Args:
        file: of the tensors; the one that says what they are lies beside it.
        device: of inputs, expected outputs, and the module that `published` loads.
    """

    def __init__(self, file: Path, device: torch.device | str = "cpu") -> None:
        self.file, self.family, self.device = file, file.parent.name, torch.device(device)

    def __str__(self) -> str:
        return f"{self.family}-{self.file.stem}"

    @cached_property
    def _tensors(self) -> Tensors:
        return load_file(self.file)

    @cached_property
    def _described(self) -> dict[str, Any]:
        return json.loads(self.file.with_suffix(".json").read_text())

    def _under(self, prefix: str) -> Tensors:
        return {name.removeprefix(prefix): value for name, value in self._tensors.items() if name.startswith(prefix)}

    @cached_property
    def state(self) -> Tensors:
        return self._under("state.")

    @cached_property
    def inputs(self) -> Tensors:
        return {name: value.to(self.device) for name, value in self._under("in.").items()}

    @cached_property
    def expected(self) -> Tensors:
        return {name: value.to(self.device) for name, value in self._under("out.").items()}

    @property
    def constructor(self) -> dict[str, Any]:
        return self._described["constructor"]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the reference's constructor, without the case's remarks on constants that it changed."""
        arguments = {name: value for name, value in self.constructor.items() if name.isidentifier() and name != "note"}
        if self.family == "mdlm":
            # Of the class, not of its configuration: the text tokenizer says them.
            arguments |= {"vocab_size": self.constructor["vocab_size (with mask)"]}
        if self.family == "emu3":
            # Of its image processor, not of the model.
            height, width = self.inputs["image_sizes"][0].tolist()
            arguments |= {"image_area": height * width}
        if self.family == "magvit2_video":
            # Of the layers that stand apart, and of the clips.
            arguments = {
                name: value for name, value in arguments.items() if name not in ("temporal_channels", "frames")
            }
        if self.family in ("titok", "titok_vae"):
            # The networks have another number of heads than the published sizes, of which the case says so.
            arguments = deepcopy(arguments)
            sizes = arguments["config"]["model"]["vq_model"]
            for half in ("enc", "dec"):
                said = self.constructor["changed constants"][sizes[f"vit_{half}_model_size"]]
                heads = re.search(r"(\d+) heads", said)
                assert heads, f"{self}: the constructor does not say how many heads there are: {said!r}"
                sizes[f"vit_{half}_num_heads"] = int(heads[1])
        return arguments

    def expects(self, name: str) -> bool:
        """Whether there is an output of this name, or of this name and `_` and what tells it from others."""
        return any(other == name or other.startswith(f"{name}_") for other in self.expected)

    def matching(self, pattern: str) -> dict[str, re.Match[str]]:
        """The outputs whose whole names match."""
        found = {name: re.fullmatch(pattern, name) for name in self.expected}
        return {name: match for name, match in found.items() if match}

    def says(self, output: str) -> str:
        """What the case says of an output."""
        return self._described["outputs"][f"out.{output}"]["what"]

    def read(self, output: str, pattern: str) -> re.Match[str]:
        """The place of an output's sentence that matches."""
        found = re.search(pattern, self.says(output))
        assert found, f"{self}: out.{output} does not say {pattern!r}: {self.says(output)!r}"
        return found

    def number(self, output: str, argument: str, default: float | None = None) -> float:
        """The number that an output's sentence gives as `argument=…` or `argument …`."""
        pattern = rf"\b{argument}(?:=| )({_NUMBER})"
        if default is not None and not re.search(pattern, self.says(output)):
            return default
        return float(self.read(output, pattern)[1])

    def default(self, argument: str) -> Any:
        """The constructor's argument, or the reference's own default."""
        return self.constructor.get(argument, DEFAULTS[self.family, argument])


def cases_in(folder: Path, device: torch.device | str = "cpu") -> list[Case]:
    """Every case of a folder; an AssertionError if there is none."""
    found = [Case(file, device) for file in sorted(folder.glob("*/*.safetensors"))]
    assert found, f"{folder} has no case <family>/<name>.safetensors"
    return found


def published_state(case: Case, part: str = "var.") -> Tensors:
    """The tensors of a published file: the case's, or those of a part, where there are two files."""
    if case.family == "hart" and part == "var.":
        return {name: value for name, value in case.state.items() if not name.startswith("vae.")}
    if case.family == "magvit2_video":
        # Layers at which time is halved and doubled stand apart: the case's network has none.
        return {name: value for name, value in case.state.items() if not name.startswith("temporal.")}
    if case.family not in ("hart", "var_transformer"):
        return case.state
    return {name.removeprefix(part): value for name, value in case.state.items() if name.startswith(part)}


def published(case: Case, folder: Path) -> Load:
    """Write a case's weights into `folder` as they are published; how they are loaded."""
    tokenizer: Any = None
    if case.family == "hart":
        save_file(published_state(case, "vae."), folder / "tokenizer.safetensors")
        tokenizer = load_pretrained(folder / "tokenizer.safetensors", "hart_tokenizer", case.constructor["tokenizer"])
    if case.family == "var_transformer":
        save_file(published_state(case, "vae."), folder / "tokenizer.safetensors")
        tokenizer = load_pretrained(folder / "tokenizer.safetensors", "var_vqvae", case.constructor["vae"])
    file = folder / "published.safetensors"
    if case.family == "maskgit_flax":
        # Two files, as Flax writes them.
        file = folder / "maskgit_checkpoint"
        for part, path in (("tokenizer.", folder / "tokenizer_checkpoint"), ("transformer.", file)):
            tensors = {name.removeprefix(part): value for name, value in case.state.items() if name.startswith(part)}
            write_flax(path, tensors)
        settings = case.constructor["vqvae"]
        tokenizer = load_pretrained(folder / "tokenizer_checkpoint", "maskgit_flax_tokenizer", settings)
    else:
        save_file(published_state(case), file)
        if FAMILIES[case.family].reads_text:
            write_text_tokenizer(case, folder)

    def load(**reference: Any) -> Any:
        arguments = {**case.arguments, **reference}
        with torch.device("cpu"):
            module = load_pretrained(file, case.family, arguments, tokenizer)
        return module.to(case.device)

    return load


# What of the reference's output is compared, by family and output.
Compared = Mapping[str, Mapping[str, Callable[[Case, Tensor], Tensor]]]


class Difference(NamedTuple):
    """How far one output is from the reference's."""

    name: str
    error: float
    """Of numbers the largest difference as a share of the largest value; of integers how many differ."""
    whole: bool
    """Whether these are integers, which must be equal."""

    def within(self, tolerance: float) -> bool:
        """Whether integers are equal and numbers within a share of the largest; NaN never is."""
        return self.error == 0 if self.whole else self.error <= tolerance


def differences(
    case: Case, found: Mapping[str, Tensor], without_place: Mapping[str, str], compared: Compared
) -> Iterator[Difference]:
    """Compare every output of a case.

    Args:
        case: the case.
        found: our outputs; those that the case does not have are left aside.
        without_place: patterns of outputs that ours cannot have, with the reasons.
        compared: what is made of an output before it is compared; both sides where `found` has its shape too.
    """
    assert case.expected, f"{case} has no outputs"
    excused = {name for name in case.expected for pattern in without_place if re.fullmatch(pattern, name)}
    assert not excused & found.keys(), f"{case}: compared, though said to have no place: {excused & found.keys()}"
    missing = sorted(case.expected.keys() - found.keys() - excused)
    assert not missing, f"{case}: outputs that are not compared: {', '.join(f'out.{name}' for name in missing)}"
    for name in sorted(case.expected.keys() - excused):
        part = compared.get(case.family, {}).get(name)
        expected = case.expected[name]
        yield difference(f"{case}: out.{name}", found[name].detach(), part(case, expected) if part else expected)


def difference(name: str, found: Tensor, expected: Tensor) -> Difference:
    """Compare one output; fails, with its name, where the shapes or the kinds of numbers differ."""
    found = found.reshape(expected.shape) if found.dim() == 0 else found
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)} is not {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert not found.is_floating_point(), name
        return Difference(name, float((found.long() != expected.long()).sum()), True)
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    share = error / largest if largest else error and float("inf")
    return Difference(name, float("inf") if isnan(share) else share, False)
