"""The recipes of discrete diffusion build the networks that their headers name."""

import pytest
from helpers.recipe_files import ROOT, layered

# The paper's shape has 186,216,577 parameters with a mask id in and out; without it there are 769 + 768 fewer.
COUNTS = {
    "generators/sedd_absorb": (186_216_577, "186,216,577"),
    "generators/sedd_absorb_2d": (186_216_577, "Everything but the positions is as in sedd_absorb.yaml"),
    "generators/sedd_uniform": (186_215_040, "Everything but the process is as in sedd_absorb.yaml"),
    "generators/md4_imagenet256_tokens": (186_202_496, "186M"),
    "generators/d3pm_absorbing": (37_483_776, "a transformer of 37M"),
    "generators/d3pm_uniform": (37_483_264, "d3pm_absorbing.yaml"),
    "generators/d3pm_gaussian": (37_483_264, "d3pm_absorbing.yaml"),
    "generators/md4_cifar10": (37_483_776, "a transformer of 37M"),
    "generators/char_text": (84_997_632, "85M"),
    "generators/gidd_text8": (92_423_195, "92M"),
    "experiments/sedd_absorb": (1_089_713, "1.1M"),
    "experiments/d3pm_grey": (330_448, "0.33M"),
    "experiments/char_prose": (794_880, "0.8M"),
}
# K and the grid of the tokenizers.
TOKENS = {
    "maskgit_vqgan": (1024, (16, 16)),
    "quickstart": (240, (8, 8)),
    "PixelLevels": (256, (32, 32, 3)),
    "grey": (16, (32, 32)),
    "Characters": (27, (256,)),
}


@pytest.mark.parametrize("recipe", COUNTS)
def test_parameters(recipe: str) -> None:
    import torch

    from discrete_lit.backbones import SequenceLayout, Transformer

    file = f"lightning_configs/{recipe}.yaml"
    count, said = COUNTS[recipe]
    assert said in " ".join((ROOT / file).read_text().replace("#", " ").split())
    arguments = layered(file)["model"]["init_args"]
    tokenizer = next(size for name, size in reversed(TOKENS.items()) if name in str(arguments["tokenizer"]))
    masks = any(name in arguments["process"]["class_path"] for name in ("Absorbing", "GIDD"))
    scores = arguments["head"]["class_path"].endswith("ScoreHead")
    layout = SequenceLayout(
        *tokenizer,
        num_classes=arguments["num_classes"],
        attention="bidirectional",
        mask_token=masks,
        timed=arguments.get("time_input", "none") != "none",
        mask_output=scores and masks,
    )
    with torch.device("meta"):
        backbone = Transformer(layout, **arguments["backbone"]["init_args"])
    assert sum(parameter.numel() for parameter in backbone.parameters()) == count
