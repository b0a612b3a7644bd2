"""The devices that a command runs on: Lightning's Fabric, with one message for what it does not accept."""

from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from discrete_lit.core.allocator import keep_freed_memory

MOST_DEVICES = 256
"""Devices of one machine; on CPUs each is a process, and anything is accepted for a number of them."""


def make_fabric(
    accelerator: str, *, devices: int | str = 1, num_nodes: int = 1, precision: str | None = None
) -> Fabric:
    """Make the Fabric of a command from its settings.

    Args:
        accelerator: Lightning's name of it, or `auto`.
        devices: on each node; a number, `auto`, or a list of their numbers as a text.
        num_nodes: nodes that run the command.
        precision: Lightning's; `32-true` by default.

    Raises:
        ValueError: there is no such accelerator, device or precision here.
    """
    check_devices(devices, "devices")
    if num_nodes < 1:
        raise ValueError(f"num_nodes is {num_nodes}, accepted: 1 or more")
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision)  # type: ignore[arg-type]
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        with_precision = f", precision={precision!r}" if precision else ""
        reason = " ".join(str(error).split())
        raise ValueError(
            f"accelerator={accelerator!r}, devices={devices!r}{with_precision} cannot be had: {reason}"
        ) from error
    keep_freed_memory(fabric.device)
    return fabric


def check_devices(devices: object, setting: str) -> None:
    """Refuse more devices than any machine has, which on CPUs would be as many processes.

    Raises:
        ValueError: it says the setting.
    """
    count = int(devices) if isinstance(devices, str) and devices.isdecimal() and len(devices) < 19 else devices
    if isinstance(count, int) and not isinstance(count, bool) and count > MOST_DEVICES:
        raise ValueError(f"{setting} is {devices}, accepted: at most {MOST_DEVICES} on one machine")
