import io
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from discrete_lit.core.random import augmentation_uniforms, sample_order
from discrete_lit.data.image_batches import EvaluationCrops, ImagePipeline
from discrete_lit.data.torch_image import TorchImage, plain_jpeg_size
from discrete_lit.data.transforms import (
    UndecodableImage,
    center_crop,
    decode_image,
    decode_image_fast,
    random_crop,
    random_part,
    random_resized_crop,
    ten_crops,
)

UNIFORMS = (0.6748005871, 0.3730969408, 0.2938008257, 0.1761927519)
PERMUTATION = [4, 6, 7, 3, 5, 0, 2, 1]


def noise(width: int, height: int, number: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(number).randint(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def draws(count: int) -> list[tuple[float, float, float, float]]:
    return [augmentation_uniforms(0, 0, f"sample-{number}") for number in range(count)]


def test_the_centre_crop_of_an_image_of_the_right_size_is_the_image() -> None:
    image = noise(32, 32)
    np.testing.assert_array_equal(center_crop(image, 32), np.asarray(image))


def rows_first(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize as Pillow did up to 12; from 13.0 on it begins with the columns where that is cheaper."""
    if image.mode != "RGBA":
        image = image.resize((size[0], image.height), resample)
    return image.resize(size, resample)


def test_the_centre_crop_cuts_the_middle_of_the_longer_side() -> None:
    np.testing.assert_array_equal(center_crop(ramp(41, 32), 32), np.asarray(ramp(41, 32))[:, 4:36])
    np.testing.assert_array_equal(center_crop(ramp(32, 50), 32), np.asarray(ramp(32, 50))[9:41])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize(("width", "height", "halvings"), [(70, 50, 0), (64, 90, 1), (130, 127, 1), (300, 261, 3)])
def test_the_centre_crop_follows_adm(width: int, height: int, halvings: int, mode: str) -> None:
    # Written out from the paper's protocol, one step after the other.
    image = noise(width, height).convert(mode)
    if mode == "RGBA":
        image.putalpha(noise(width, height, 1).convert("L"))
    expected = image
    for _ in range(halvings):
        expected = rows_first(expected, (expected.width // 2, expected.height // 2), Image.Resampling.BOX)
    scale = 32 / min(expected.size)
    size = round(expected.width * scale), round(expected.height * scale)
    pixels = np.asarray(rows_first(expected, size))
    top, left = (pixels.shape[0] - 32) // 2, (pixels.shape[1] - 32) // 2
    np.testing.assert_array_equal(center_crop(image, 32).squeeze(), pixels[top : top + 32, left : left + 32])


def test_a_small_image_is_enlarged() -> None:
    assert center_crop(noise(5, 9), 32).shape == (32, 32, 3)
    assert random_crop(noise(5, 9), 32, (0.5, 0.5, 0.5, 0.5)).shape == (32, 32, 3)


def test_the_random_crop_of_an_image_of_the_right_size_is_the_image_or_its_mirror_image() -> None:
    image = noise(32, 32)
    pixels = np.asarray(image)
    mirrored = 0
    for randomness in draws(200):
        np.testing.assert_array_equal(random_crop(image, 32, randomness, flip=False), pixels)
        crop = random_crop(image, 32, randomness)
        mirrored += int(not np.array_equal(crop, pixels))
        assert np.array_equal(crop, pixels) or np.array_equal(crop, pixels[:, ::-1])
    assert 70 < mirrored < 130


def test_random_crops_reach_every_place_and_no_other() -> None:
    image = ramp(24, 20)
    places = set()
    for randomness in draws(400):
        crop = random_crop(image, 20, randomness, flip=False)
        places.add((int(crop[0, 0, 0]), int(crop[0, 0, 1])))
        np.testing.assert_array_equal(crop[..., 0] - crop[0, 0, 0], np.asarray(image)[:20, :20, 0])
    assert places == {(column, 0) for column in range(5)}


def test_the_smallest_crop_decides_the_scale() -> None:
    image = ramp(200, 200)
    sides = []
    for randomness in draws(300):
        crop = random_crop(image, 50, randomness, minimum_crop=0.5, flip=False).astype(int)
        # A ramp of 200 columns: the range of the crop's columns is the part of the side that it covers.
        sides.append((crop[0, -1, 0] - crop[0, 0, 0]) / 200)
    assert 0.47 < min(sides) < 0.53
    assert 0.95 < max(sides) <= 1.0
    whole = random_crop(image, 50, (0.99, 0.99, 0.99, 0.9))
    np.testing.assert_array_equal(whole, center_crop(image, 50))


def test_the_largest_crop_decides_the_scale_too() -> None:
    """VAR resizes 256 to 288 before its crop, always: 0.889 of the side."""
    image = ramp(250, 250)
    for randomness in draws(50):
        crop = random_crop(image, 64, randomness, minimum_crop=0.889, maximum_crop=0.889, flip=False).astype(int)
        assert abs((crop[0, -1, 0] - crop[0, 0, 0]) - 250 * 63 / 72) <= 2


MASKBIT = {"area": (0.8, 1.0), "aspect": (1.0, 1.0)}
TORCHVISION = {"area": (0.08, 1.0), "aspect": (3 / 4, 4 / 3)}


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("law", [MASKBIT, TORCHVISION], ids=["MaskBit", "torchvision"])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (500, 460), (300, 500), (400, 400)])
def test_the_law_of_random_parts_is_torchvisions(width: int, height: int, law: dict) -> None:
    """Chi-square of 4,000 parts of each: side, row and column in bins whose ends are quantiles of both together."""
    from torchvision.transforms import RandomResizedCrop

    count = 4000
    theirs = RandomResizedCrop(32, scale=law["area"], ratio=law["aspect"])
    torch.manual_seed(0)
    expected = np.array(
        [theirs.get_params(torch.zeros(3, height, width), theirs.scale, theirs.ratio) for _ in range(count)]
    )
    found = np.array(
        [
            random_part(width, height, lambda number, key=key: augmentation_uniforms(0, number, str(key)), **law)
            for key in range(count)
        ]
    )[:, [1, 0, 3, 2]]  # top, left, height, width
    fixed = 0
    for mine, other in zip(found.T, expected.T, strict=True):
        ends = np.unique(np.quantile(np.concatenate((mine, other)), np.linspace(0, 1, 21))[1:-1])
        counts = np.stack([np.bincount(np.searchsorted(ends, each), minlength=len(ends) + 1) for each in (mine, other)])
        counts = counts[:, counts.sum(axis=0) > 0]
        mean = counts.mean(axis=0)
        statistic, freedom = ((counts - mean) ** 2 / mean).sum(), counts.shape[1] - 1
        assert statistic < freedom + 4.5 * max(2 * freedom, 1) ** 0.5
        fixed += int(freedom == 0)
    # Of these images MaskBit takes the whole centre square, always.
    assert fixed == (4 if law is MASKBIT and (width, height) in ((500, 375), (300, 500)) else 0)


def test_a_random_part_becomes_torchvisions_pixels() -> None:
    from torchvision.transforms.functional import InterpolationMode, resized_crop

    image = noise(200, 150)
    for number in range(4):
        draw = partial(augmentation_uniforms, 1, key=f"{number}")
        left, top, width, height = random_part(200, 150, draw, **TORCHVISION)
        expected = resized_crop(image, top, left, height, width, [24, 40], InterpolationMode.BICUBIC)
        np.testing.assert_array_equal(random_resized_crop(image, (24, 40), draw), np.asarray(expected))


def test_training_cuts_a_random_part(image_bytes) -> None:
    data = image_bytes(0, (30, 20))
    settings = {"crop": "random_resized", "crop_area": (0.3, 0.6), "crop_aspect": (1.0, 1.0)}
    cut = [pipeline(flip=False, **settings).training(data, epoch, "a") for epoch in (0, 0, 1)]
    assert cut[0].shape == (8, 8, 3)
    np.testing.assert_array_equal(cut[0], cut[1])
    assert not np.array_equal(cut[0], cut[2])
    mirrored = [pipeline(**settings).training(data, 0, str(key)) for key in range(20)]
    plain = [pipeline(flip=False, **settings).training(data, 0, str(key)) for key in range(20)]
    flips = [not np.array_equal(one, other) for one, other in zip(mirrored, plain, strict=True)]
    assert 0 < sum(flips) < 20
    assert all(
        np.array_equal(one[:, ::-1] if flip else one, other)
        for one, other, flip in zip(mirrored, plain, flips, strict=True)
    )


@pytest.mark.parametrize(("width", "height"), [(50, 37), (500, 375), (33, 90)])
def test_the_random_crop_is_a_part_of_the_resized_image(width: int, height: int) -> None:
    # Far from 0 and 255, where the order of Pillow's two passes decides what is clipped.
    image = noise(width, height).point(lambda value: 96 + value // 4)
    for randomness in ((0.0, 0.0, 0.0, 0.9), (0.0, 0.99, 0.99, 0.9), (0.6, 0.3, 0.7, 0.9)):
        halved = image
        shorter_side = 32 + int(randomness[0] * 9)
        while min(halved.size) >= 2 * shorter_side:
            halved = halved.resize((halved.width // 2, halved.height // 2), Image.Resampling.BOX)
        scale = shorter_side / min(halved.size)
        size = round(halved.width * scale), round(halved.height * scale)
        pixels = np.asarray(halved.resize(size, Image.Resampling.BICUBIC)).astype(int)
        top, left = int(randomness[1] * (size[1] - 31)), int(randomness[2] * (size[0] - 31))
        crop = random_crop(image, 32, randomness, minimum_crop=0.8)
        assert np.abs(crop - pixels[top : top + 32, left : left + 32]).max() <= 1


@pytest.mark.parametrize(("width", "height", "scale"), [(70, 50, 1.1), (40, 45, 1.05), (200, 130, 1.3)])
def test_ten_crops_are_torchvisions_of_adms_square(width: int, height: int, scale: float) -> None:
    from torchvision.transforms.functional import ten_crop

    image = noise(width, height)
    crops = ten_crops(image, 32, scale)
    square = Image.fromarray(center_crop(image, int(32 * scale)))
    expected = [np.asarray(crop) for crop in ten_crop(square, 32)]  # the corners, then the centre
    for first in (0, 5):
        corners, centre = expected[first : first + 4], expected[first + 4]
        np.testing.assert_array_equal(crops[first : first + 5], np.stack([centre, *corners]))


def test_ten_crops_of_scale_one_are_the_centre_and_its_mirror_image() -> None:
    image = noise(50, 40)
    crops, centre = ten_crops(image, 32, 1.0), center_crop(image, 32)
    assert all(np.array_equal(crop, centre) for crop in crops[:5])
    assert all(np.array_equal(crop, centre[:, ::-1]) for crop in crops[5:])


@pytest.mark.parametrize(("width", "height"), [(70, 50), (50, 70), (130, 300), (24, 16), (9, 5), (400, 17)])
@pytest.mark.parametrize("size", [(16, 24), (24, 16), (16, 16)])
def test_a_crop_of_a_height_and_a_width_covers_them(width: int, height: int, size: tuple[int, int]) -> None:
    # Written out: halve while both sides are at least twice as long, scale to cover the box, cut out its centre.
    image = noise(width, height)
    expected = image
    while expected.height >= 2 * size[0] and expected.width >= 2 * size[1]:
        expected = rows_first(expected, (expected.width // 2, expected.height // 2), Image.Resampling.BOX)
    scale = max(size[0] / expected.height, size[1] / expected.width)
    pixels = np.asarray(rows_first(expected, (round(expected.width * scale), round(expected.height * scale))))
    top, left = (pixels.shape[0] - size[0]) // 2, (pixels.shape[1] - size[1]) // 2
    crop = center_crop(image, size)
    assert crop.shape == (*size, 3)
    difference = np.abs(crop.astype(int) - pixels[top : top + size[0], left : left + size[1]])
    # What is enlarged to many times the box is not made as a whole, and Pillow rounds its parts elsewhere.
    assert difference.max() <= (1 if height == 17 else 0)
    for randomness in draws(5):
        assert random_crop(image, size, randomness, minimum_crop=0.8).shape == (*size, 3)
    assert ten_crops(image, size, 1.3).shape == (10, *size, 3)


def test_random_rectangles_reach_every_place_and_no_other() -> None:
    image, places = ramp(40, 20), set()
    for randomness in draws(400):
        crop = random_crop(image, (20, 36), randomness, flip=False)
        places.add((int(crop[0, 0, 0]), int(crop[0, 0, 1])))
    assert places == {(column, 0) for column in range(5)}


@pytest.mark.parametrize(("width", "height"), [(3000, 1), (1, 3000)])
def test_of_a_long_thin_picture_only_the_centre_is_computed(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 3000 pixels enlarged to a side of 64 would be 12 million, and of 10,000 to a side of 256 two gigabytes."""
    image = noise(width, height)
    centre = image.crop((1490, 0, 1510, 1) if height == 1 else (0, 1490, 1, 1510))
    expected = center_crop(centre, 64)
    resize, made = Image.Image.resize, []

    def counted(self, size, *arguments, **settings):
        made.append(size[0] * size[1])
        return resize(self, size, *arguments, **settings)

    monkeypatch.setattr(Image.Image, "resize", counted)
    for size in (64, (64, 48) if height == 1 else (48, 64)):
        crop = center_crop(image, size)
        assert max(made) <= 16 * 64 * 64
        top, left = (64 - crop.shape[0]) // 2, (64 - crop.shape[1]) // 2
        part = expected[top : top + crop.shape[0], left : left + crop.shape[1]]
        assert np.abs(crop.astype(int) - part).max() <= 1


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGBA", 4)])
def test_crops_of_other_modes_keep_their_channels(mode: str, channels: int) -> None:
    image = noise(40, 30).convert(mode)
    assert center_crop(image, (16, 24)).shape == (16, 24, channels)
    assert random_crop(image, 16, (0.5, 0.5, 0.5, 0.1)).shape == (16, 16, channels)
    assert ten_crops(image, (8, 9), 1.1).shape == (10, 8, 9, channels)
    if mode == "L":
        np.testing.assert_array_equal(center_crop(image, 16)[..., 0], center_crop(image.convert("RGB"), 16)[..., 1])


def test_the_crops_of_evaluation(image_bytes) -> None:
    data = image_bytes(0, (30, 20))
    center, flips, tens = EvaluationCrops(), EvaluationCrops("flip"), EvaluationCrops("ten", (1.5, 1.0))
    pixels = pipeline().evaluation(data, center)
    np.testing.assert_array_equal(pipeline().evaluation(data, flips), np.stack([pixels, pixels[:, ::-1]]))
    cut = pipeline().evaluation(data, tens)
    assert cut.shape == (20, 8, 8, 3)
    np.testing.assert_array_equal(cut[10], pixels)
    assert (center.count, flips.count, tens.count) == (None, 2, 20)


def pipeline(**changes: object) -> ImagePipeline:
    settings = {"image_size": 8, "seed": 3, "crop": "random", "minimum_crop": 0.8, "flip": True, "apply_exif": False}
    return ImagePipeline(**(settings | changes))  # type: ignore[arg-type]


def test_augmentation_is_decided_by_seed_epoch_and_key(image_bytes) -> None:
    data = image_bytes(0, (30, 20))
    one = pipeline().training(data, 1, "a")
    np.testing.assert_array_equal(one, pipeline().training(data, 1, "a"))
    for other in (
        pipeline().training(data, 2, "a"),
        pipeline().training(data, 1, "b"),
        pipeline(seed=4).training(data, 1, "a"),
    ):
        assert not np.array_equal(one, other)


def test_the_numbers_for_a_key_never_change() -> None:
    # A changed number would change the data of a run that is resumed after an update.
    assert augmentation_uniforms(1, 2, "n01440764_10026") == pytest.approx(UNIFORMS, abs=1e-9)
    assert sample_order(1, 2, 8).tolist() == PERMUTATION


def test_the_numbers_for_keys_are_uniform_and_independent() -> None:
    numbers = np.array(draws(4000))
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.08
    assert numbers.min() >= 0 and numbers.max() < 1


def test_the_crop_of_evaluation_in_training_can_be_mirrored(image_bytes) -> None:
    data = image_bytes(0, (30, 20))
    plain = pipeline(crop="center", flip=False).training(data, 0, "a")
    np.testing.assert_array_equal(plain, pipeline().evaluation(data, EvaluationCrops()))
    crops = [pipeline(crop="center").training(data, 0, str(key)) for key in range(20)]
    mirrored = [np.array_equal(crop, plain[:, ::-1]) for crop in crops]
    assert 0 < sum(mirrored) < 20
    assert all(flag or np.array_equal(crop, plain) for flag, crop in zip(mirrored, crops, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minimum_crop": 0.0}, "minimum_crop"),
        ({"minimum_crop": 0.9, "maximum_crop": 0.8}, r"maximum_crop is 0.8; it must be in \[minimum_crop, 1\]"),
        ({"maximum_crop": 1.1}, "maximum_crop is 1.1"),
        ({"crop": "dall_e", "image_size": (8, 16)}, r"crop 'dall_e' cuts squares, and image_size is \[8, 16\]"),
        ({"crop": "middle"}, "crop 'middle' is not known; it is 'random', 'center', 'random_resized' or 'dall_e'"),
        ({"crop_area": (0.0, 1.0)}, r"crop_area is \[0.0, 1.0\]; it must be two rising fractions"),
        ({"crop_area": (0.9, 0.8)}, "crop_area"),
        ({"crop_aspect": (1.5, 1.0)}, r"crop_aspect is \[1.5, 1.0\]; it must be two rising ratios"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**changes)


@pytest.mark.parametrize(
    ("kind", "scales", "message"),
    [
        ("five", (1.1,), "crops is 'five'; it must be 'center', 'flip' or 'ten'"),
        ("ten", (1.1, 0.9), r"ten_crop_scales is \[1.1, 0.9\]; each must be in \[1, 8\]"),
        ("ten", (), "ten_crop_scales is"),
    ],
)
def test_crops_that_are_none_are_refused(kind: str, scales: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationCrops(kind, scales)


def photograph(width: int, height: int, mode: str = "RGB", **saving: Any) -> bytes:
    """A smooth picture with fine noise, as a JPEG file unless another format is named."""
    coarse = noise(width // 8 + 1, height // 8 + 1).resize((width, height), Image.Resampling.BICUBIC)
    image = Image.blend(coarse, noise(width, height, 1), 0.1).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "JPEG", "quality": 90} | saving))
    return buffer.getvalue()


@pytest.mark.parametrize("saving", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 40}])
@pytest.mark.parametrize(("width", "height"), [(100, 75), (33, 57)])
def test_fast_decoding_gives_the_pixels_of_pillow(width: int, height: int, saving: dict[str, Any]) -> None:
    data = photograph(width, height, **saving)
    decoded = decode_image_fast(data)
    assert isinstance(decoded, TorchImage) and decoded.size == (width, height)
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(decode_image(data)))


CROPS = {
    "random": {},
    "smaller": {"minimum_crop": 0.7},
    "enlarged": {"image_size": (120, 90)},
    "center": {"crop": "center"},
    "random_resized": {"crop": "random_resized"},
    "dall_e": {"crop": "dall_e"},
}


@pytest.mark.parametrize("changes", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_fast_crops_are_the_exact_ones_but_for_a_level_or_two(changes: dict[str, Any], channels: int) -> None:
    settings = {"image_size": 64, "seed": 0, "crop": "random", "flip": True, "apply_exif": False} | changes
    exact = ImagePipeline(**settings, image_channels=channels)
    fast = replace(exact, decoding="fast")
    differing = []
    for number, size in enumerate([(100, 75), (75, 110), (64, 64), (90, 20)]):
        for data in (photograph(*size), photograph(*size, format="PNG")):
            ours, theirs = (each.training(data, 0, str(number)).astype(int) for each in (fast, exact))
            assert ours.shape == theirs.shape == exact.shape
            differing.append(np.abs(ours - theirs))
    assert max(map(np.max, differing)) <= 2
    assert np.mean([np.mean(each > 0) for each in differing]) < 0.02
    assert np.mean([np.mean(each > 1) for each in differing]) < 1e-3


def test_a_large_picture_is_decoded_at_half_of_its_size() -> None:
    data = photograph(420, 300)
    assert decode_image_fast(data, covered=(100, 100)).size == (210, 150)
    assert decode_image_fast(data, covered=(151, 100)).size == (420, 300)
    assert decode_image_fast(data).size == (420, 300)
    exact = ImagePipeline(100, 0, crop="center", flip=False, apply_exif=False)
    ours, theirs = (each.training(data, 0, "").astype(int) for each in (replace(exact, decoding="fast"), exact))
    off = np.abs(ours - theirs).mean()
    assert 0 < off < 2.5 and 5 * off < np.abs(theirs[:, 1:] - theirs[:, :-1]).mean()
    # What is cut out before it is resized may be small.
    part = replace(exact, crop="random_resized", decoding="fast")
    whole = replace(part, decoding="exact")
    assert np.abs(part.training(data, 0, "").astype(int) - whole.training(data, 0, "")).max() <= 2


def test_fast_decoding_reads_what_exact_decoding_reads() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for data, channels in (
        (photograph(100, 75, exif=turned), 3),
        (photograph(100, 75, "L"), 3),
        (photograph(100, 75, "CMYK"), 3),
        (photograph(100, 75, "RGBA", format="PNG"), 4),
    ):
        ours, theirs = (decode(data, True, image_channels=channels) for decode in (decode_image_fast, decode_image))
        np.testing.assert_array_equal(np.asarray(ours).squeeze(), np.asarray(theirs))
    data = photograph(100, 75)
    for broken in (data[: len(data) // 2], data[:200], b"no picture"):
        with pytest.raises(UndecodableImage) as exact:
            decode_image(broken)
        with pytest.raises(UndecodableImage) as fast:
            decode_image_fast(broken)
        assert str(fast.value) == str(exact.value)


def test_the_size_of_a_plain_jpeg_file_is_read_without_pillow() -> None:
    thumbnail = b"Exif\0\0" + photograph(16, 8)  # in front of the picture's own header
    for saving in (
        {},
        {"subsampling": 0},
        {"exif": thumbnail},
        {"comment": b"\xff\xc0 no header"},
        {"qtables": "web_high"},
    ):
        assert plain_jpeg_size(photograph(100, 75, **saving)) == (75, 100)
    for mode, saving in (("RGB", {"progressive": True}), ("L", {}), ("CMYK", {}), ("RGB", {"format": "PNG"})):
        assert plain_jpeg_size(photograph(100, 75, mode, **saving)) is None
    data = photograph(100, 75)
    header = data.index(b"\xff\xc0")
    assert all(plain_jpeg_size(data[:end]) is None for end in range(header + 10))
    # A header that claims more than its bytes can code is Pillow's to refuse, as is a picture that fills the memory.
    lying = data[: header + 5] + b"\x20\x00\x20\x00" + data[header + 9 :]
    assert plain_jpeg_size(lying) is plain_jpeg_size(lying + bytes(2**21)) is None
    with pytest.raises(UndecodableImage, match="its header claims 8192x8192 pixels, for which"):
        decode_image_fast(lying)


def test_a_decoding_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="decoding 'quick' is not known; it is 'exact' or 'fast'"):
        ImagePipeline(8, 0, crop="center", flip=False, apply_exif=False, decoding="quick")  # type: ignore[arg-type]
