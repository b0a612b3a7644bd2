"""Models of text and image from folders as `transformers` writes them, at random weights: outputs, losses, one step.

Chameleon has what its 34B model has: norms of the branches' outputs, and heads that share keys and values.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_text_tokenizers import TOKENS, write_words
from helpers.golden_unified import in_text
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit import load
from discrete_lit.backbones.segment_sequence import SegmentSequence
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.core.random import CounterRandom
from discrete_lit.pretrained import load_pretrained
from discrete_lit.pretrained.meta_chameleon import chameleon_codes
from discrete_lit.samplers.draw_settings import DrawSettings
from discrete_lit.samplers.segment_by_segment import SegmentSampler
from discrete_lit.tokenizers import TextTokenizer

pytestmark = pytest.mark.parity

CODES = 12
VQ = {
    "embed_dim": 4,
    "num_embeddings": CODES,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}
LANGUAGE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
# Codes 0 to 11, at ids in an order of their own.
IMAGE_NAMES = {
    20 + 5 * code % CODES: f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(code))}Z" for code in range(CODES)
}
CHAMELEON = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<racm3:break>", 4: "<eoss>", 5: "<image>"} | IMAGE_NAMES
EMU3 = TOKENS["emu3"] | {5: "<image>", 6: "<|extra_200|>"}
EMU3 |= {20 + code: f"<|visual token {code:06d}|>" for code in range(CODES)}


@pytest.fixture(autouse=True)
def others_warnings() -> Iterator[None]:
    """Deprecations inside the other package are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def randomised(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.normal_(std=0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.weight.normal_(std=0.5)
        elif type(part).__name__.endswith("Norm") and getattr(part, "weight", None) is not None:
            part.weight.add_(1)
    return module.eval()


def chameleon() -> Any:
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    config = ChameleonConfig(
        vocab_size=48,
        num_key_value_heads=2,
        swin_norm=True,
        max_position_embeddings=64,
        vocabulary_map={name: number for number, name in CHAMELEON.items()},
        vq_config={**VQ, "resolution": 8},
        **LANGUAGE,
    )
    return randomised(ChameleonForConditionalGeneration(config))


def emu3() -> Any:
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    vq = {**VQ, "codebook_size": CODES, "hidden_size": 32, "attn_resolutions": [1]}
    config = Emu3Config(
        vocabulary_map={name: number for number, name in EMU3.items()},
        vq_config={name: value for name, value in vq.items() if name != "num_embeddings"},
        text_config={
            **LANGUAGE,
            "vocab_size": 48,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )
    return randomised(Emu3ForConditionalGeneration(config))


def janus() -> Any:
    from transformers import JanusConfig, JanusForConditionalGeneration

    text = {**LANGUAGE, "model_type": "llama", "vocab_size": 40, "max_position_embeddings": 64}
    config = JanusConfig(
        image_token_id=39,
        tie_word_embeddings=False,
        text_config=text | {"pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-6},
        vision_config={
            **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
            **{"mlp_ratio": 2.0, "projection_dim": 24, "num_image_tokens": 4, "hidden_dropout_rate": 0.0},
        },
        vq_config={**VQ, "num_patches": 4, "projection_dim": 24, "image_token_embed_dim": 24},
    )
    return randomised(JanusForConditionalGeneration(config))


MODELS = {"chameleon": (chameleon, CHAMELEON, 48), "emu3": (emu3, EMU3, 48), "janus": (janus, TOKENS["janus"], 40)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """`folders(family)`: a model of `transformers` and its folder: its weights in several files, and its settings."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(family: str) -> tuple[Any, Path]:
        if family not in made:
            with warnings.catch_warnings(), torch.random.fork_rng():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                build, names, size = MODELS[family]
                folder = tmp_path_factory.mktemp(family)
                theirs = build()
                theirs.save_pretrained(folder, max_shard_size="100KB")
                write_words(folder, names, size)
            assert (folder / "model.safetensors.index.json").is_file()
            made[family] = theirs, folder
        return made[family]

    return make


def loaded(family: str, folder: Path, **arguments: Any) -> Any:
    area = {"reference_config": json.loads((folder / "config.json").read_text()) | {"image_area": 64}}
    return load_pretrained(folder, family, **((area if family == "emu3" else {}) | arguments))


def words(count: int = 9) -> Tensor:
    """Ids that are words in every vocabulary here."""
    return torch.randint(33, 38, (2, count))


@torch.no_grad()
def test_chameleon_of_34b(folders: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    theirs, folder = folders("chameleon")
    ours = loaded("chameleon", folder)
    ids, images = words(), 2 * torch.rand(2, 3, 8, 8) - 1
    published = torch.tensor(chameleon_codes({name: number for number, name in CHAMELEON.items()}))
    place = torch.arange(48)
    place[published] = int(published.min()) + torch.arange(CODES)
    codes = ours.tokenizer.encode(images)
    assert torch.equal(published[codes.flatten(1)], theirs.model.get_image_tokens(images).view(2, -1).long())
    mixed = torch.cat((ids, published[codes.flatten(1)]), dim=1)
    made = theirs(input_ids=mixed, output_hidden_states=True, labels=torch.cat((ids, torch.full((2, 16), -100)), dim=1))
    hidden = ours.backbone(in_text(ours, place[mixed]))
    torch.testing.assert_close(hidden, made.hidden_states[-1], rtol=1e-4, atol=1e-4)
    # The published class lets no image be drawn; the head itself does.
    logits = ours.backbone.logits(hidden)[..., place]
    torch.testing.assert_close(logits, theirs.lm_head(made.hidden_states[-1]), rtol=1e-4, atol=1e-4)
    masked = logits.index_fill(2, published, torch.finfo(logits.dtype).min)
    torch.testing.assert_close(
        F.cross_entropy(masked[:, :8].flatten(0, 1), ids[:, 1:].flatten()), made.loss, rtol=1e-4, atol=1e-4
    )
    assert ours.backbone.key_value_heads == 2 and ours.backbone.blocks[0].norm_outputs
    with pytest.raises(ValueError, match="encoder alone"):
        ours.tokenizer.decode(codes)

    # One file holds all that is needed.
    save(ours, tmp_path / "ours.ckpt")
    again = load(tmp_path / "ours.ckpt")
    assert again.text.fingerprint() == ours.text.fingerprint()
    torch.testing.assert_close(again.backbone(in_text(again, place[mixed])), hidden)


@torch.no_grad()
def test_emu3(folders: Callable[[str], tuple[Any, Path]]) -> None:
    theirs, folder = folders("emu3")
    ours = loaded("emu3", folder)
    images, sizes = 2 * torch.rand(2, 3, 8, 8) - 1, torch.full((2, 2), 8)
    codes = ours.tokenizer.encode(images)
    assert torch.equal(codes, torch.stack(theirs.model.vqmodel.encode(images, image_sizes=sizes).image_tokens))
    pictures = ours.tokenizer.network.decode(ours.tokenizer.embed(codes))
    torch.testing.assert_close(pictures, theirs.model.vqmodel.decode(codes), rtol=1e-4, atol=1e-4)

    captions = ours.captions_of([chr(0x4E00 + 33) + chr(0x4E00 + 34), chr(0x4E00 + 36)])
    sequence = ours.sequences(codes, captions)
    length = int(sequence.lengths().min())
    made = theirs.model.text_model(input_ids=sequence.ids[:, :length]).last_hidden_state
    hidden = ours.backbone(sequence)[:, :length]
    torch.testing.assert_close(hidden, made, rtol=1e-4, atol=1e-4)
    # The least that a published image needs: begin, its size, rows with ends, and what ends it.
    names = [ours.text._tokenizer.id_to_token(number) for number in sequence.ids[0].tolist()]
    first = names.index("<|image start|>")
    assert names[first : first + 5] == ["<|image start|>", "4", "*", "4", "<|image token|>"]
    assert [names[first + 5 + 4 + row * 5] for row in range(4)] == ["<|extra_200|>"] * 4
    assert names[first + 25 : first + 27] == ["<|extra_201|>", "<|image end|>"]

    # One step, with guidance on log-probabilities as published.
    prompt = ours.sequences(None, captions, closed=False)
    null = ours.sequences(None, ours.null_captions(captions), closed=False)
    drawn = ours.sample(captions, SegmentSampler({"image": DrawSettings(top_k=1, guidance_scale=3.0)}))
    assert drawn.shape == (2, 4, 4)
    expected = []
    for row in range(2):
        rows = []
        for each in (prompt, null):
            ids = each.ids[row : row + 1, : int(each.lengths()[row])]
            text_end = torch.tensor([[40, 41, 40, 7]])  # behind the image's begin its size, and the begin of its rows
            rows.append(theirs(input_ids=torch.cat((ids, text_end), dim=1)).logits[0, -1].log_softmax(dim=-1))
        expected.append((rows[1] + 3.0 * (rows[0] - rows[1]))[20 : 20 + CODES].argmax())
    assert drawn[:, 0, 0].tolist() == torch.stack(expected).tolist()


@torch.no_grad()
def test_emu3_answers_a_question(folders: Callable[[str], tuple[Any, Path]]) -> None:
    """Emu3-Chat: the question stands behind the image, and what follows is the most probable id of a text."""
    theirs, folder = folders("emu3")
    with pytest.raises(ValueError, match="texts are drawn by generators of order"):
        loaded("emu3", folder).caption(torch.randint(CODES, (2, 4, 4)))
    config = json.loads((folder / "config.json").read_text()) | {"image_area": 64, "question": chr(0x4E00 + 33)}
    ours = loaded("emu3", folder, reference_config=config)
    prompt = ours.given_image(torch.randint(CODES, (2, 4, 4)))
    asked = ours.text.ids(f"{chr(0x4E00 + 33)} ASSISTANT:")
    assert prompt.ids[0, -len(asked) :].tolist() == asked and 33 in asked
    assert prompt.ids[0, : -len(asked)].tolist()[-2:] == [8, 9]  # the end of the frame, and of the image
    segment = ours.layout["caption"]
    may = torch.tensor(sorted((*segment.allowed_ids, segment.end_ids[0])))
    expected = may[theirs(input_ids=prompt.ids).logits[:, -1][:, may].argmax(dim=1)]
    sampler = SegmentSampler({"caption": DrawSettings(top_k=1)})
    random = CounterRandom(0, torch.arange(2))
    drawn = sampler(ours.backbone, [prompt], random, segments=("caption",)).sequence
    assert torch.equal(drawn.ids[:, 0], expected)


@torch.no_grad()
def test_janus(folders: Callable[[str], tuple[Any, Path]]) -> None:
    theirs, folder = folders("janus")
    ours = loaded("janus", folder)
    images = 2 * torch.rand(2, 3, 8, 8) - 1
    torch.testing.assert_close(
        ours.vision(images), theirs.model.vision_model(images).last_hidden_state, rtol=1e-4, atol=1e-4
    )
    # An image that is described stands in the text as its features, between the same two tokens.
    text = words(5)
    placeholders = torch.full((2, 4), 39)
    begin, end = torch.full((2, 1), 2), torch.full((2, 1), 4)
    ids = torch.cat((torch.zeros_like(begin), begin, placeholders, end, text), dim=1)
    made = theirs(input_ids=ids, pixel_values=images, output_hidden_states=True)
    prompt = ours.given_image(images)
    rest = in_text(ours, text)
    sequence = SegmentSequence(
        ids=torch.cat((prompt.ids, rest.ids), dim=1),
        states=torch.cat((prompt.states, rest.states), dim=1),
        sample=torch.zeros_like(ids),
        vectors={"features": F.pad(prompt.vectors["features"], (0, 0, 0, text.shape[1]))},
    )
    hidden = ours.backbone(sequence)
    torch.testing.assert_close(hidden, made.hidden_states[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.backbone.logits(hidden)[..., :40], made.logits, rtol=1e-4, atol=1e-4)
    greedy = SegmentSampler({"text": DrawSettings(top_k=1)})
    described = ours.caption(images, greedy)
    allowed = torch.tensor(ours.layout["text"].allowed_ids)
    first = made.logits[:, 6, allowed].argmax(dim=-1)
    assert [each[0] for each in described] == [chr(0x4E00 + int(allowed[number])) for number in first]
    with pytest.raises(ValueError, match="reads images"):
        ours.caption(ours.tokenizer.encode(images))


# What a user may give in the place of a folder.


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def without_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def another_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def another_text_tokenizer(folder: Path) -> None:
    write_words(folder, {}, 48)


def moved_tokens(folder: Path) -> None:
    moved = {number: name for number, name in CHAMELEON.items() if name != "<s>"} | {9: "<s>"}
    write_words(folder, moved, 48)


def no_codes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {name: number for name, number in config["vocabulary_map"].items() if number < 20}
    (folder / "config.json").write_text(json.dumps(config | {"vocabulary_map": kept}))
    write_words(folder, {number: name for name, number in kept.items()} | {20: "IMGIMGAZ", 22: "IMGIMGBZ"}, 48)


def larger_text_tokenizer(folder: Path) -> None:
    write_words(folder, CHAMELEON, 60)


def no_text_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))


def unknown_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 128}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_tokenizer, "no tokenizer.json beside"),
        (without_a_shard, "not beside it"),
        (without_weights, "has no weights: none of model.safetensors.index.json"),
        (another_index, "weight_map"),
        (another_text_tokenizer, "has no token '<pad>', which this family's has: it is another model's"),
        (moved_tokens, "has '<s>' at 9 and the vocabulary_map of reference_config at 0"),
        (no_codes, "names 2 codes of images"),
        (larger_text_tokenizer, "60 ids and the model 48"),
        (no_text_tokenizer, "is no tokenizer.json"),
        (other_sizes, "hidden_size=32, but the tensors have 24"),
        (unknown_key, "sliding_window=128, which is not read"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    folders: Callable[[str], tuple[Any, Path]], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = copied(folders("chameleon")[1], tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder, "chameleon")


@pytest.mark.parametrize(("family", "other"), [("chameleon", "emu3"), ("emu3", "janus"), ("janus", "chameleon")])
def test_the_folder_of_another_family_is_named(
    folders: Callable[[str], tuple[Any, Path]], family: str, other: str
) -> None:
    with pytest.raises(ValueError, match=rf"is no {family} checkpoint .*looks like {other}"):
        load_pretrained(folders(other)[1], family)


def test_tokenizers_that_do_not_belong_are_refused(folders: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    folder = folders("chameleon")[1]
    ours = load_pretrained(folder, "chameleon")
    described = ours.hparams["init_args"]["tokenizer"]
    # As Meta's file has it: the same encoder and codes, with a decoder.
    network = {**described["init_args"]["network"]["init_args"], "with_decoder": True}
    arguments = described["init_args"] | {"network": {**described["init_args"]["network"], "init_args": network}}
    whole = instantiate({**described, "init_args": arguments})
    with pytest.raises(ValueError, match="other codes"):
        load_pretrained(folder, "chameleon", tokenizer=whole)
    whole.load_state_dict(whole.state_dict() | ours.tokenizer.state_dict())
    drawn = load_pretrained(folder, "chameleon", tokenizer=whole)
    codes = torch.randint(CODES, (1, 4, 4))
    torch.testing.assert_close(drawn.tokenizer.decode(codes), whole.eval().decode(codes))
    with pytest.raises(ValueError, match="holds its own tokenizer"):
        loaded("janus", folders("janus")[1], tokenizer=whole)
    with pytest.raises(ValueError, match=r"file=.*no such file"):
        load_pretrained(folder, "chameleon", text_tokenizer=tmp_path / "none.json")
    text = load_pretrained(folder, "chameleon", text_tokenizer=ours.text).text
    assert isinstance(text, TextTokenizer) and text.fingerprint() == ours.text.fingerprint()
    with pytest.raises(ValueError, match="reads no texts"):
        load_pretrained(folder, "taming_vqgan", text_tokenizer=ours.text)
