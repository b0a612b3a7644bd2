"""From a published checkpoint to one of our modules."""

from pathlib import Path

from discrete_lit.checkpoints import instantiate
from discrete_lit.pretrained.accounting import convert
from discrete_lit.pretrained.reading import read_state
from discrete_lit.pretrained.reference import Reference, read_reference
from discrete_lit.pretrained.registry import check_family, find_family
from discrete_lit.tokenizers.image_autoencoder import ImageAutoencoder


def load_pretrained(
    weights: str | Path, family: str, reference_config: Reference | str | Path | None = None
) -> ImageAutoencoder:
    """The model of a published checkpoint, in eval mode, with the outputs of the code that published it.

    It carries its configuration, so a checkpoint of it is read by `discrete_lit.load`.

    Args:
        weights: the published file, `torch.save`'s or safetensors. No code in it is executed.
        family: a name in `discrete_lit.pretrained.FAMILIES`.
        reference_config: what shapes cannot tell, in the reference's own argument names: the arguments, or the path of
            the published YAML or JSON. Without it the published models' values are taken.

    Raises:
        ValueError: an unknown family; no such file, a truncated one, one with pickled code; a checkpoint of another
            family; a missing, unexpected or misshapen tensor; a configuration that contradicts the tensors.
    """
    known = find_family(family)
    state = read_state(weights, known.wrappers)
    check_family(known, state)
    conversion = known.convert(state, read_reference(reference_config))
    module = instantiate(conversion.config, ImageAutoencoder)
    module.load_state_dict(convert(module.state_dict(), conversion, state.source))
    assert isinstance(module, ImageAutoencoder)
    return module.eval()
