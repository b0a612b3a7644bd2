"""The two ways in which a command is given a generator: a checkpoint, or the name of a published model."""

from discrete_lit.checkpoints import local
from discrete_lit.pretrained.obtaining import MODEL, obtain


def chosen_checkpoint(ckpt_path: str | None, model: str | None, *, accept_licence: bool) -> str:
    """Return the path of the checkpoint to draw from: the one that is given, or that of a published model.

    Raises:
        ValueError: neither is given or both are, a licence is accepted of no model, or the model cannot be had.
    """
    if (ckpt_path is None) == (model is None):
        which = "neither is" if model is None else "both are"
        raise ValueError(f"give ckpt_path, a checkpoint, or model, a published one by its name: {which} given")
    if model is not None:
        return str(obtain(f"{MODEL}{model.removeprefix(MODEL)}", accept_licence=accept_licence))
    if accept_licence and not str(ckpt_path).startswith(MODEL):
        raise ValueError("accept_licence is for a published model: give model too")
    assert ckpt_path is not None
    return str(local(ckpt_path, accept_licence=accept_licence))
