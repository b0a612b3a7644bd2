"""Names of weights in a published layout, and ours."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Renaming:
    """From our names to published ones, by pairs of templates of which the first that fits holds.

    `{rest}` stands for any text, other names for a number. On the published side `{mirror}` is `levels - 1 - level`,
    for layouts that count a decoder's levels from the other end, and `{q|k|v}` are three tensors that ours joins along
    the first axis.
    """

    rules: Sequence[tuple[str, str]]
    levels: int = 0

    def published(self, own: str) -> tuple[str, ...]:
        """The published names of one of our weights; none without a rule."""
        for ours, theirs in self.rules:
            fields = match(ours, own)
            if fields is not None:
                values = {name: int(text) if name != "rest" else text for name, text in fields.items()}
                if "level" in fields:
                    values["mirror"] = self.levels - 1 - int(fields["level"])
                joined = re.search(r"\{(\w+(?:\|\w+)+)\}", theirs)
                variants = joined[1].split("|") if joined else [""]
                names = [theirs.replace(joined[0], variant) if joined else theirs for variant in variants]
                return tuple(name.format(**values) for name in names)
        return ()


def match(template: str, name: str) -> dict[str, str] | None:
    """What a name has in the places of a template's fields; None where it does not fit."""
    pattern = re.escape(template).replace(r"\{rest\}", r"(?P<rest>.+)")
    found = re.fullmatch(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", pattern), name)
    return None if found is None else found.groupdict()
