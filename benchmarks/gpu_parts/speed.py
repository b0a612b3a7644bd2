"""What the `fast_*` parts share: rows made of seconds, and blocks compiled for a part."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from side_by_side.peers import installed
from side_by_side.timing import Repeated

from discrete_lit.backbones import Backbone
from discrete_lit.backbones.execution import compile_blocks
from gpu_parts.part import Floor, Measurement, Peer, Setting

_Result = TypeVar("_Result")


def measurement(
    setting: Setting,
    name: str,
    case: str,
    taken: Repeated,
    *,
    amount: float | None = None,
    unit: str = "ms",
    least: float | None = None,
    least_of: str = "",
    peer: tuple[str, float] | None = None,
    share: float | None = None,
    times: float | None = None,
    note: str = "",
) -> Measurement:
    """Make a row of what a call takes: milliseconds, or an amount a second.

    Args:
        setting: decides whether the targets are judged.
        name, case: of the row.
        taken: the seconds of the call.
        amount: what the call makes, such as images; without it the row is of milliseconds.
        unit: such as `images/s`.
        least: the least seconds that the call could take.
        least_of: what these are counted of.
        peer: a name, and its seconds for the same.
        share: the target as a share of the floor, in (0, 1].
        times: the target as a ratio to the peer.
        note: more of the row.
    """

    def figure(seconds: float) -> float:
        return 1e3 * seconds if amount is None else amount / seconds

    targets, met = [], []
    if share is not None and least is not None:
        targets.append(f"at least {share:.0%} of the floor")
        met.append(least / taken.median >= share)
    if times is not None and peer is not None:
        targets.append(f"at least {times:g} times {peer[0]}")
        met.append(peer[1] / taken.median >= times)
    return Measurement(
        name=name,
        case=case,
        value=figure(taken.median),
        unit=unit,
        better="lower" if amount is None else "higher",
        floor=None if least is None else Floor(value=figure(least), what=least_of),
        peer=None if peer is None else Peer(name=peer[0], value=figure(peer[1])),
        target=", ".join(targets),
        met=setting.met(all(met)) if met else None,
        note="; ".join(part for part in (note, taken.spread()) if part),
    )


def against(package: str, name: str, measure: Callable[[], _Result]) -> tuple[_Result | None, str]:
    """Measure a peer; where that cannot be done, give a note that says why: ours is measured all the same.

    Args:
        package: by the name that it is imported by.
        name: by which a reader knows it.
        measure: what needs it.
    """
    if not installed(package):
        return None, f"peer {name} not installed"
    try:
        return measure(), ""
    except Exception as error:
        return None, f"peer {name} failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def compiler_options(setting: Setting) -> dict[str, Any]:
    """Options of `torch.compile`: in tiny runs nothing is generated, which takes a minute on a CPU."""
    return {"backend": "eager"} if setting.tiny else {}


def compile_backbone(backbone: Backbone, setting: Setting) -> None:
    """Compile the blocks of a backbone, anew if they were."""
    torch.compiler.reset()
    compile_blocks(backbone, **compiler_options(setting))


def uncompile(backbone: Backbone) -> None:
    """Let the blocks of a backbone run as they are written again."""
    for block in backbone.fsdp_units():
        block._compiled_call_impl = None
