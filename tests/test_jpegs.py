"""The test images are what their names say."""

import io
import os

import jpegs
import numpy as np
import pytest
from PIL import ExifTags, Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

SIZE = (64, 48)
FIXED_SIZES = {"1x1": (1, 1), "3x17": (3, 17)}


def open_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def markers(data: bytes) -> list[int]:
    return [segment[1] for segment in jpegs.header_segments(data)]


def test_photograph_is_as_large_as_a_real_one_when_encoded() -> None:
    assert 50_000 < len(jpegs.jpeg("baseline", 0)) < 120_000


def test_jpeg_differs_when_the_seed_does() -> None:
    images = {jpegs.jpeg("baseline", seed, *SIZE) for seed in range(5)}
    assert len(images) == 5


@pytest.mark.parametrize("kind", jpegs.KINDS)
def test_jpeg_is_readable_and_the_same_each_time(kind: str) -> None:
    data = jpegs.jpeg(kind, 3, *SIZE)
    image = open_image(data)
    mode = {"cmyk": "CMYK", "grey": "L"}.get(kind.split("_")[0], "RGB")
    size = FIXED_SIZES.get(kind, SIZE)
    assert (image.format, image.mode, image.size) == ("JPEG", mode, size)
    assert data == jpegs.jpeg(kind, 3, *SIZE)


@pytest.mark.parametrize("kind", jpegs.KINDS)
def test_jpeg_is_decoded_by_tensorflow(kind: str) -> None:
    import tensorflow as tf

    width, height = FIXED_SIZES.get(kind, SIZE)
    pixels = tf.io.decode_jpeg(jpegs.jpeg(kind, 4, *SIZE), channels=3)
    assert pixels.shape == (height, width, 3)


@pytest.mark.parametrize(
    ("kind", "frame_marker"),
    [("baseline", 0xC0), ("progressive", 0xC2), ("grey_progressive", 0xC2)],
)
def test_jpeg_has_the_frame_of_its_kind(kind: str, frame_marker: int) -> None:
    assert frame_marker in markers(jpegs.jpeg(kind, 0, *SIZE))


@pytest.mark.parametrize("kind", ["restart_markers", "restart_progressive"])
def test_jpeg_has_restart_markers(kind: str) -> None:
    data = jpegs.jpeg(kind, 0, *SIZE)
    assert 0xDD in markers(data) and b"\xff\xd0" in data and b"\xff\xd1" in data


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        ("baseline", [0x22, 0x11, 0x11]),
        ("422", [0x21, 0x11, 0x11]),
        ("444", [0x11, 0x11, 0x11]),
        ("rgb_kept", [0x11, 0x11, 0x11]),
        ("cmyk", [0x11, 0x11, 0x11, 0x11]),
        ("grey", [0x11]),
    ],
)
def test_jpeg_has_the_sampling_of_its_kind(kind: str, sampling: list[int]) -> None:
    segments = jpegs.header_segments(jpegs.jpeg(kind, 0, *SIZE))
    frame = next(segment for segment in segments if segment[1] == 0xC0)
    assert list(frame[11::3]) == sampling


def test_rgb_kept_has_no_colour_transform() -> None:
    image = open_image(jpegs.jpeg("rgb_kept", 0, *SIZE))
    assert image.info["adobe_transform"] == 0


def test_exif_thumbnail_is_a_jpeg() -> None:
    exif = Image.open(io.BytesIO(jpegs.jpeg("exif_thumbnail", 0, 320, 240))).getexif()
    thumbnail = exif.get_ifd(ExifTags.IFD.IFD1)
    block = jpegs.jpeg("exif_thumbnail", 0, 320, 240)
    start = block.index(b"Exif\x00\x00") + 6 + thumbnail[513]
    image = open_image(block[start : start + thumbnail[514]])
    assert (image.format, image.size) == ("JPEG", (160, 120))


@pytest.mark.parametrize(
    ("kind", "within", "expected"),
    [
        ("icc_with_markers", "header", b"\xff\xd8\xff\xd9"),
        ("long_comments", "header", b"\xff\xfe\xff\xff"),
        ("fill_bytes", "image", b"\xff\xff\xff\xdb"),
        ("fill_bytes", "image", b"\xff\xff\xff\xd9"),
        ("trailing_image", "image", b"\xff\xd9\xff\xd8\xff"),
    ],
)
def test_jpeg_holds_the_bytes_of_its_kind(
    kind: str, within: str, expected: bytes
) -> None:
    data = jpegs.jpeg(kind, 0, *SIZE)
    header = b"" if within == "image" else b"".join(jpegs.header_segments(data))
    assert expected in (header or data)


def test_trailing_bytes_follow_the_image() -> None:
    data = jpegs.jpeg("trailing_bytes", 0, *SIZE)
    assert data.startswith(jpegs.jpeg("baseline", 0, *SIZE))
    assert len(data) == len(jpegs.jpeg("baseline", 0, *SIZE)) + 500


def test_png_holds_the_photograph() -> None:
    image = open_image(jpegs.png(0, *SIZE))
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(image), np.asarray(jpegs.photograph(0, *SIZE)))


def test_damage_has_sixteen_kinds() -> None:
    assert len(jpegs.DAMAGE) == 16


@pytest.mark.parametrize("kind", jpegs.DAMAGE)
def test_damage_changes_the_bytes_and_is_the_same_each_time(kind: str) -> None:
    for image_kind in ("baseline", "1x1"):
        data = jpegs.jpeg(image_kind, 5, *SIZE)
        for seed in range(20):
            damaged = jpegs.damage(kind, data, seed)
            assert damaged != data
            assert damaged == jpegs.damage(kind, data, seed)


def test_damage_refuses_when_there_is_nothing_to_damage() -> None:
    with pytest.raises(ValueError, match="3 bytes are too few to damage"):
        jpegs.damage("truncated", b"abc", 0)
