"""The test images are what their names say."""

import io

import jpegs
import pytest
from PIL import Image

SIZE = (64, 48)


def markers(data: bytes) -> list[int]:
    return [segment[1] for segment in jpegs.header_segments(data)]


def test_photograph_is_as_large_as_a_real_one_when_encoded() -> None:
    assert 50_000 < len(jpegs.jpeg("baseline", 0)) < 120_000
    assert len({jpegs.jpeg("baseline", seed, *SIZE) for seed in range(5)}) == 5


@pytest.mark.parametrize("kind", jpegs.KINDS)
def test_jpeg_is_decoded_and_the_same_each_time(kind: str) -> None:
    import tensorflow as tf

    width, height = jpegs.FIXED_SIZES.get(kind, SIZE)
    data = jpegs.jpeg(kind, 3, *SIZE)
    mode = {"cmyk": "CMYK", "grey": "L"}.get(kind.split("_")[0], "RGB")
    image = Image.open(io.BytesIO(data))
    image.load()
    assert (image.format, image.mode, image.size) == ("JPEG", mode, (width, height))
    assert tf.io.decode_jpeg(data, channels=3).shape == (height, width, 3)
    assert data == jpegs.jpeg(kind, 3, *SIZE)


@pytest.mark.parametrize(
    ("kind", "marker"),
    [
        ("baseline", 0xC0),
        ("progressive", 0xC2),
        ("grey_progressive", 0xC2),
        ("restart_markers", 0xDD),
        ("restart_progressive", 0xDD),
    ],
)
def test_jpeg_has_the_segment_of_its_kind(kind: str, marker: int) -> None:
    assert marker in markers(jpegs.jpeg(kind, 0, *SIZE))


@pytest.mark.parametrize(
    ("kind", "within", "expected"),
    [
        ("restart_markers", "image", b"\xff\xd1"),
        ("exif_thumbnail", "header", b"\xff\xd8\xff\xe0"),
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
