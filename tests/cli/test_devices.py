"""The devices of a command: what there is not is one message that names the settings."""

from typing import Any

import pytest

from discrete_lit.cli.devices import check_devices, make_fabric


def test_what_there_is() -> None:
    assert make_fabric("cpu").world_size == 1
    assert make_fabric("cpu", devices="2", precision="bf16-mixed").world_size == 2
    check_devices("auto", "devices")
    check_devices([0, 1], "devices")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devices": "x"}, "accelerator='cpu', devices='x' cannot be had"),
        ({"devices": 0}, "devices=0"),
        ({"devices": -3}, "devices=-3"),
        ({"devices": 100_000}, "devices is 100000, accepted: at most 256 on one machine"),
        ({"devices": "100000"}, "devices is 100000"),
        ({"num_nodes": 0}, "num_nodes is 0"),
        ({"precision": "7"}, "precision='7' cannot be had"),
    ],
)
def test_what_there_is_not(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_fabric("cpu", **settings)
    with pytest.raises(ValueError, match="accelerator='quantum'"):
        make_fabric("quantum")
