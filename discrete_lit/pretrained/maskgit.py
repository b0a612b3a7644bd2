"""bytedance/1d-tokenizer: the PyTorch port of MaskGIT's VQGAN (google-research/maskgit)."""

from discrete_lit.pretrained.convolutional import ConvLayout
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, register
from discrete_lit.pretrained.taming import CODES, vector_quantizer, vqgan

LAYOUT = ConvLayout(middle="mid.{place}", upsample="upsample_conv")


@register(
    "maskgit_vqgan",
    marks=("encoder.down.0.block.0.conv1.weight", "encoder.mid.0.conv1.weight", "quantize.embedding.weight"),
)
def maskgit_vqgan(state: State, reference: Reference) -> Conversion:
    """`maskgit-vqgan-imagenet-f16-256.bin`."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    agree(reference, {"num_embeddings": codebook_size, "embedding_dim": code_dim})
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=reference.get("commitment_cost", 0.25),
        weighted_term="codebook",
    )
    network = LAYOUT.network(state, downsampling="average", shortcut="output", pixels="unit")
    return Conversion(vqgan(network, quantizer), state, LAYOUT.renaming(LAYOUT.levels(state), [CODES]))
