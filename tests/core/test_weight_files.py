"""Weight files: looked for, recognised, and read without executing code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from discrete_lit.core.files import file_sha256
from discrete_lit.core.weight_files import PublishedFile, checked_sha256, read_weights

PUBLISHED = PublishedFile(url="https://example.org/v1/network.pth", sha256="a" * 64, variable="NETWORK_WEIGHTS")


def test_the_path_comes_before_the_variable_before_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("NETWORK_WEIGHTS", raising=False)
    files = [tmp_path / "given.pth", tmp_path / "named.pth", PUBLISHED.cached]
    assert files[2] == tmp_path / "hub" / "checkpoints" / "network.pth"
    files[2].parent.mkdir(parents=True)
    for file in files:
        file.touch()
    assert PUBLISHED.find(None, "weights") == str(files[2])
    monkeypatch.setenv("NETWORK_WEIGHTS", str(files[1]))
    assert PUBLISHED.find(None, "weights") == str(files[1])
    assert PUBLISHED.find(str(files[0]), "weights") == str(files[0])


@pytest.mark.parametrize(("path", "named"), [("lost.pth", None), (None, "lost.pth"), (None, None)])
def test_what_is_absent_is_said_in_one_message(path, named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("NETWORK_WEIGHTS", raising=False)
    if named:
        monkeypatch.setenv("NETWORK_WEIGHTS", named)
    where = "weights='lost.pth'" if path else "NETWORK_WEIGHTS='lost.pth'" if named else "network.pth"
    with pytest.raises(ValueError, match=where) as raised:
        PUBLISHED.find(path, "weights")
    for part in (PUBLISHED.url, PUBLISHED.sha256, "NETWORK_WEIGHTS", "does not exist"):
        assert part in str(raised.value)


def test_the_hash_decides(tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    with pytest.raises(ValueError, match="does not exist"):
        checked_sha256(str(path), None, "weights")
    path.write_bytes(b"weights")
    assert checked_sha256(str(path), None, "weights") == checked_sha256(str(path), file_sha256(path), "weights")
    with pytest.raises(ValueError, match=r"weights=.*has SHA-256 .*, expected a+: it was not loaded"):
        checked_sha256(str(path), "a" * 64, "weights")


def test_tensors_are_read_from_both_kinds_of_file(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3.0), "b": torch.zeros(2, 2)}
    torch.save(weights, tmp_path / "weights.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        found = read_weights(str(tmp_path / name), "weights")
        assert found.keys() == weights.keys() and torch.equal(found["a"], weights["a"])


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def test_what_is_no_state_dict_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        read_weights(str(tmp_path / "lost.pth"), "weights")
    torch.save({"a": Trap(tmp_path / "executed")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"trap\.pth.*not a readable file of weights"):
        read_weights(str(tmp_path / "trap.pth"), "weights")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="not a readable file of weights"):
        read_weights(str(tmp_path / "cut.safetensors"), "weights")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="does not hold a flat state dict of tensors"):
        read_weights(str(tmp_path / "list.pth"), "weights")
