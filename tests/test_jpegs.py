"""The test images are what their names say."""

import io

import jpegs
import pytest
from PIL import Image

SIZE = (64, 48)


def test_photograph_is_as_large_as_a_real_one_when_encoded() -> None:
    assert 50_000 < len(jpegs.jpeg("baseline", 0)) < 120_000
    assert len({jpegs.jpeg("baseline", seed, *SIZE) for seed in range(5)}) == 5


@pytest.mark.parametrize("kind", jpegs.KINDS)
def test_image_is_decoded_and_the_same_each_time(kind: str) -> None:
    data = jpegs.jpeg(kind, 3, *SIZE)
    mode = {"cmyk": "CMYK", "grey": "L"}.get(kind.split("_")[0], "RGB")
    image = Image.open(io.BytesIO(data))
    image.load()
    assert (image.format, image.mode) == ("PNG" if kind == "png" else "JPEG", mode)
    assert image.size == jpegs.FIXED_SIZES.get(kind, SIZE)
    assert data == jpegs.jpeg(kind, 3, *SIZE)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("baseline", b"\xff\xc0\x00\x11"),
        ("progressive", b"\xff\xc2\x00\x11"),
        ("grey_progressive", b"\xff\xc2\x00\x0b"),
        ("restart_markers", b"\xff\xdd\x00\x04"),
        ("restart_markers", b"\xff\xd1"),
        ("restart_progressive", b"\xff\xdd\x00\x04"),
        ("exif_thumbnail", b"\xff\xd8\xff\xe0"),
        ("icc_with_markers", b"\xff\xd8\xff\xd9"),
        ("long_comments", b"\xff\xfe\xff\xff"),
        ("fill_bytes", b"\xff\xff\xff\xdb"),
        ("fill_bytes", b"\xff\xff\xff\xd9"),
        ("trailing_image", b"\xff\xd9\xff\xd8\xff"),
    ],
)
def test_jpeg_holds_the_bytes_of_its_kind(kind: str, expected: bytes) -> None:
    assert expected in jpegs.jpeg(kind, 0, *SIZE)[2:]
