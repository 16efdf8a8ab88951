"""Section 3: one image, read, checked, repaired and measured.

What the reference does is the measure: it decodes each image completely.
"""

import functools
import struct
from pathlib import Path

import jpegs
import pytest
from command import run_code

import imagenet_to_gcs as script

SEEDS = range(8)
DAMAGE_SEEDS = range(24)  # times 16 kinds of damage and 21 of images: 8,064 images
SIZE = (64, 48)
FIXED_SIZES = {"1x1": (1, 1), "3x17": (3, 17)}
KINDS = [*jpegs.KINDS, "png"]


@functools.cache
def make_image(kind: str, seed: int) -> bytes:
    if kind == "png":
        return jpegs.png(seed, *SIZE)
    return jpegs.jpeg(kind, seed, *SIZE)


def raw_image(path: Path, num_bytes: int | None = None) -> script.RawImage:
    """Makes what the listing makes of a file, of any size if given one."""
    if num_bytes is None:
        num_bytes = path.stat().st_size if path.exists() else 0
    return script.RawImage(str(path.parent), path.name, "n01440764", 1, num_bytes, 0)


def encode(directory: Path, data: bytes) -> script.EncodedImage:
    path = directory / "image.JPEG"
    path.write_bytes(data)
    return script.encode_image(raw_image(path))


def reason_of(directory: Path, data: bytes) -> str:
    """Returns why an image is refused; it must be."""
    with pytest.raises(script._ImageError) as caught:
        encode(directory, data)
    return str(caught.value)


def decode_completely(data: bytes) -> tuple[int, ...] | None:
    """Decodes as the reference does; returns the shape, or None for a bad image."""
    import tensorflow as tf

    is_png = data.startswith(b"\x89PNG\r\n\x1a\n")
    try:
        pixels = (tf.io.decode_png if is_png else tf.io.decode_jpeg)(data, channels=3)
    except tf.errors.InvalidArgumentError:
        return None
    return tuple(pixels.shape)


def encode_again(data: bytes) -> bytes:
    """Encodes a PNG or CMYK JPEG as RGB, as the reference does."""
    import tensorflow as tf

    is_png = data.startswith(b"\x89PNG\r\n\x1a\n")
    pixels = (tf.io.decode_png if is_png else tf.io.decode_jpeg)(data, channels=3)
    jpeg: bytes = tf.io.encode_jpeg(pixels, format="rgb", quality=100).numpy()
    return jpeg


# ------------------------------------------------------------------ undamaged images


@pytest.mark.parametrize("kind", sorted({*jpegs.KINDS} - {"cmyk", "cmyk_progressive"}))
def test_image_is_untouched(tmp_path: Path, kind: str) -> None:
    width, height = FIXED_SIZES.get(kind, SIZE)
    for seed in SEEDS:
        data = make_image(kind, seed)
        assert encode(tmp_path, data) == script.EncodedImage(data, height, width, False)


@pytest.mark.parametrize("kind", ["png", "cmyk", "cmyk_progressive"])
def test_image_is_encoded_again(tmp_path: Path, kind: str) -> None:
    width, height = SIZE
    for seed in SEEDS:
        data = make_image(kind, seed)
        assert encode(tmp_path, data) == script.EncodedImage(
            encode_again(data), height, width, True
        )


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_png_of_any_mode_is_encoded_again(tmp_path: Path, mode: str) -> None:
    image = jpegs.photograph(1, *SIZE)
    if mode == "I;16":
        image = image.convert("L").convert("I").convert("I;16")
    else:
        image = image.convert(mode)
    image.save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    assert encode(tmp_path, data).jpeg == encode_again(data)


def test_photograph_is_untouched_when_of_usual_size(tmp_path: Path) -> None:
    data = jpegs.jpeg("baseline", 1)
    assert encode(tmp_path, data) == script.EncodedImage(data, 375, 500)


def test_skeleton_is_small_and_says_what_the_image_is() -> None:
    data = jpegs.jpeg("baseline", 1)
    skeleton = script.read_skeleton(data)
    assert len(skeleton.jpeg) < 1_000 < len(data) / 50
    assert (skeleton.height, skeleton.width, skeleton.num_components) == (375, 500, 3)
    segments = b"".join(jpegs.header_segments(data))
    assert segments.count(struct.pack(">HH", 375, 500)) == 1
    shrunk = segments.replace(struct.pack(">HH", 375, 500), struct.pack(">HH", 8, 8))
    assert skeleton.jpeg == b"\xff\xd8" + shrunk + b"\xff\xd9"


# -------------------------------------------------------------------- damaged images


@pytest.mark.parametrize("damage", jpegs.DAMAGE)
def test_damaged_image_is_refused_when_a_full_decode_refuses_it(
    tmp_path: Path, damage: str
) -> None:
    """Nothing is missed; what is accepted is of the shape that a reader finds."""
    missed, beyond = [], []
    for kind in KINDS:
        for seed in DAMAGE_SEEDS:
            data = jpegs.damage(damage, make_image(kind, seed % 8), seed)
            shape = decode_completely(data)
            try:
                encoded = encode(tmp_path, data)
            except script._ImageError:
                if shape is not None:
                    beyond.append(kind)
                continue
            if shape != (encoded.height, encoded.width, 3):
                missed.append((kind, seed, shape))
            assert encoded.repaired or encoded.jpeg == data
    assert missed == []
    # Where restart markers are broken, libjpeg may skip the marker after them.
    assert {*beyond} <= {"restart_markers", "restart_progressive"}
    assert len(beyond) < 24


HTML = b"<html><body>404 Not Found</body></html>"
BASELINE = jpegs.jpeg("baseline", 0, *SIZE)
PNG = jpegs.png(0, *SIZE)
CMYK = jpegs.jpeg("cmyk", 0, *SIZE)
FRAME = b"\xff\xc0\x00\x11\x08"  # marker, length, 8 bits a value; the size follows
TABLE = BASELINE.index(b"\xff\xc4")  # marker, length, number, and 16 counts of codes
CMYK_FRAME = b"\xff\xc0\x00\x14\x08"
NO_LIMIT = "components; the product must be from 1 to 536,870,911"


def with_size(data: bytes, frame: bytes, height: int, width: int) -> bytes:
    """Has the header of a JPEG declare another size."""
    start = data.index(frame) + len(frame)
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def with_png_size(height: int, width: int) -> bytes:
    return PNG[:16] + struct.pack(">II", width, height) + PNG[24:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(HTML, "not a JPEG (starts with b'<htm')", id="HTML"),
        pytest.param(b"GIF89a", "not a JPEG (starts with b'GIF8')", id="GIF"),
        pytest.param(
            bytes(5_000), r"not a JPEG (starts with b'\x00\x00\x00\x00')", id="zeros"
        ),
        pytest.param(
            BASELINE[:2] + b"\x00" + BASELINE[3:],
            r"not a JPEG (starts with b'\xff\xd8\x00\xe0')",
            id="third byte",
        ),
        pytest.param(
            b"\xff\xd8", r"not a JPEG (starts with b'\xff\xd8')", id="2 bytes"
        ),
        pytest.param(BASELINE[:3], "it is cut short: no end marker", id="3 bytes"),
        pytest.param(BASELINE[:100], "it is cut short: no end marker", id="cut early"),
        pytest.param(BASELINE[:1_500], "it is cut short: no end marker", id="cut"),
        pytest.param(BASELINE[:-2], "it is cut short: no end marker", id="no end"),
        pytest.param(BASELINE[:-1], "it is cut short: no end marker", id="half an end"),
        pytest.param(b"\xff\xd8\xff\xd9", "it has no frame header", id="no frame"),
        pytest.param(
            BASELINE[:2] + BASELINE[-2:], "it has no frame header", id="only the ends"
        ),
        pytest.param(
            with_size(BASELINE, FRAME, 0, 64),
            f"its header declares 64 x 0 pixels of 3 {NO_LIMIT}",
            id="no height",
        ),
        pytest.param(
            with_size(BASELINE, FRAME, 65_500, 65_500),
            f"its header declares 65,500 x 65,500 pixels of 3 {NO_LIMIT}",
            id="huge",
        ),
        pytest.param(
            with_size(BASELINE, FRAME, 13_378, 13_378),
            f"its header declares 13,378 x 13,378 pixels of 3 {NO_LIMIT}",
            id="just too large",
        ),
        pytest.param(
            with_size(CMYK, CMYK_FRAME, 65_500, 65_500),
            f"its header declares 65,500 x 65,500 pixels of 4 {NO_LIMIT}",
            id="huge CMYK",
        ),
        pytest.param(
            with_size(BASELINE, FRAME, 65_501, 64),
            "its header declares 64 x 65,501 pixels; no side may have more than 65,500",
            id="long side",
        ),
        pytest.param(
            with_png_size(60_000, 50_000),
            f"its header declares 50,000 x 60,000 pixels of 3 {NO_LIMIT}",
            id="huge PNG",
        ),
        pytest.param(PNG[:8], "it is a PNG cut short", id="PNG of 8 bytes"),
        pytest.param(PNG[:23], "it is a PNG cut short", id="PNG cut in its header"),
        pytest.param(
            PNG[:1_000], "it is a PNG that cannot be decoded", id="PNG cut later"
        ),
        pytest.param(
            PNG[:200] + bytes(100) + PNG[300:],
            "it is a PNG that cannot be decoded",
            id="PNG with zeros",
        ),
        pytest.param(
            BASELINE.replace(FRAME, b"\xff\xc0\x00\x11\x0c"),
            "Unsupported JPEG data precision 12",
            id="12 bits",
        ),
        pytest.param(
            BASELINE.replace(b"\xff\xc0\x00\x11", b"\xff\xc0\x00\x12"),
            "Bogus marker length",
            id="marker length",
        ),
        pytest.param(
            BASELINE[: TABLE + 5] + b"\xff" * 16 + BASELINE[TABLE + 21 :],
            "Bogus Huffman table definition",
            id="Huffman table",
        ),
    ],
)
def test_image_is_refused_in_words(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reason_of(tmp_path, data) == reason
    assert decode_completely(data) is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param("missing", "it is gone", id="missing"),
        pytest.param("link", "a link to nothing", id="dangling link"),
        pytest.param("directory", "Is a directory", id="directory"),
    ],
)
def test_image_is_refused_when_it_is_no_file(
    tmp_path: Path, make: str, reason: str
) -> None:
    path = tmp_path / "image.JPEG"
    if make == "link":
        path.symlink_to("nothing")
    elif make == "directory":
        path.mkdir()
    with pytest.raises(script._ImageError) as caught:
        script.encode_image(raw_image(path))
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        pytest.param(BASELINE, BASELINE + b"more", id="grown"),
        pytest.param(BASELINE + b"more", BASELINE, id="shrunk"),
        pytest.param(BASELINE, b"", id="emptied"),
    ],
)
def test_image_is_refused_when_it_changes_during_the_run(
    tmp_path: Path, listed: bytes, found: bytes
) -> None:
    path = tmp_path / "image.JPEG"
    path.write_bytes(found)
    with pytest.raises(script._ImageError) as caught:
        script.encode_image(raw_image(path, len(listed)))
    assert str(caught.value) == (
        f"it had {len(listed):,} bytes when the run began and now has {len(found):,}"
    )


def test_huge_image_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    """A few KB that declare 65,500 x 65,500 pixels would otherwise take gigabytes."""
    (tmp_path / "small.JPEG").write_bytes(BASELINE)
    (tmp_path / "small_cmyk.JPEG").write_bytes(CMYK)
    (tmp_path / "small_png.JPEG").write_bytes(PNG)
    for name, data in (
        ("huge", with_size(BASELINE, FRAME, 65_500, 65_500)),
        ("huge_cmyk", with_size(CMYK, CMYK_FRAME, 65_500, 65_500)),
        ("huge_png", with_png_size(65_500, 65_500)),
    ):
        (tmp_path / f"{name}.JPEG").write_bytes(data)
    code = """if True:
        import os, resource, sys
        import imagenet_to_gcs as script

        def encode(name):
            path = os.path.join(sys.argv[1], name)
            size = os.path.getsize(path)
            image = script.RawImage(sys.argv[1], name, "n1", 1, size, 0)
            try:
                return script.encode_image(image)
            except script._ImageError:
                return None

        assert all(encode(f"small{kind}.JPEG") for kind in ("", "_cmyk", "_png"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert not any(encode(f"huge{kind}.JPEG") for kind in ("", "_cmyk", "_png"))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    finished = run_code(code, str(tmp_path), timeout=120)
    assert finished.status == 0, finished.stderr
    assert int(finished.stdout) < 20_000  # KB
