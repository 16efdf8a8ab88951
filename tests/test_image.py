"""One image, read ahead, checked and repaired.

What the reference does is the measure: it decodes each image completely.
"""

import functools
import io
import os
import random
import struct
from pathlib import Path
from typing import Any

import contract
import jpegs
import pytest
import tars
from command import run_code

import imagenet_to_gcs as script

SEEDS = range(8)
DAMAGE_SEEDS = range(24)  # times 16 kinds of damage and 21 of images: 8,064 images
NUM_TAILS = 4_000
SIZE = (64, 48)
REPAIRED = {"png", "cmyk", "cmyk_progressive"}


@functools.cache
def make_image(kind: str, seed: int) -> bytes:
    return jpegs.jpeg(kind, seed, *SIZE)


def decode(data: bytes) -> Any:
    """Decodes as the reference does, whose pixels are the measure."""
    import tensorflow as tf

    is_png = data.startswith(b"\x89PNG\r\n\x1a\n")
    return (tf.io.decode_png if is_png else tf.io.decode_jpeg)(data, channels=3)


def encode_again(data: bytes) -> bytes:
    import tensorflow as tf

    jpeg: bytes = tf.io.encode_jpeg(decode(data), format="rgb", quality=100).numpy()
    return jpeg


def decoded_shape(data: bytes) -> tuple[int, ...] | None:
    """Returns height, width and channels, or None for a bad image."""
    import tensorflow as tf

    try:
        return tuple(decode(data).shape)
    except tf.errors.InvalidArgumentError:
        return None


# ------------------------------------------------------------------ undamaged images


@pytest.mark.parametrize("kind", jpegs.KINDS)
def test_image_is_untouched_unless_no_reader_takes_it(kind: str) -> None:
    width, height = jpegs.FIXED_SIZES.get(kind, SIZE)
    for seed in SEEDS:
        data = make_image(kind, seed)
        encoded = encode_again(data) if kind in REPAIRED else data
        expected = script.EncodedImage(encoded, height, width, kind in REPAIRED)
        assert script.check_and_repair(data) == expected


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_png_of_any_mode_is_encoded_again(mode: str) -> None:
    image = jpegs.photograph(1, *SIZE)
    if mode == "I;16":
        image = image.convert("L").convert("I")
    file = io.BytesIO()
    image.convert(mode).save(file, "PNG")
    data = file.getvalue()
    assert script.check_and_repair(data).jpeg == encode_again(data)


def test_skeleton_is_small_and_says_what_the_image_is() -> None:
    data = jpegs.jpeg("baseline", 1)
    skeleton, *shape = script.read_skeleton(data)
    assert shape == [375, 500, 3]
    segments = b"".join(jpegs.header_segments(data))
    small = segments.replace(struct.pack(">HH", 375, 500), struct.pack(">HH", 8, 8))
    rest = data[2 + len(segments) :][:1024]
    assert skeleton == b"\xff\xd8" + small + b"\xff\xd9" + rest


# -------------------------------------------------------------------- damaged images


def compare(data: bytes) -> str:
    """Says how the verdict on an image differs from that of a full decode, if so."""
    shape = decoded_shape(data)
    try:
        encoded = script.check_and_repair(data)
    except script._ImageError:
        return "" if shape is None else "refused"
    assert encoded.repaired or encoded.jpeg == data
    return "" if shape == (encoded.height, encoded.width, 3) else "accepted"


@pytest.mark.parametrize("damage", jpegs.DAMAGE)
def test_damaged_image_is_refused_when_a_full_decode_refuses_it(damage: str) -> None:
    """What is accepted is of the shape that a reader finds."""
    refused = []
    for kind in jpegs.KINDS:
        for seed in DAMAGE_SEEDS:
            data = jpegs.damage(damage, make_image(kind, seed % 8), seed)
            verdict = compare(data)
            assert verdict != "accepted", (kind, seed)
            refused += [kind] if verdict else []
    # Where restart markers are broken, libjpeg may skip the marker after them.
    assert {*refused} <= {"restart_markers", "restart_progressive"}
    assert len(refused) < 24


def test_segment_in_the_tail_is_refused_when_a_full_decode_refuses_it() -> None:
    """A table that is longer than it says reads on into the data that follow it."""
    kinds = ("baseline", "progressive", "grey", "restart_markers", "444", "cmyk")
    images = [jpegs.jpeg(kind, seed, 32, 24) for kind in kinds for seed in range(4)]
    for seed in range(NUM_TAILS):
        rng = random.Random(seed)
        data = rng.choice(images)
        end = len(data) - 2
        at = end - rng.choice([0, 1, 2, 10, 50, 129, rng.randrange(400)])
        marker = rng.choice([0xC0, 0xC2, 0xC4, 0xCC, 0xDA, 0xDB, 0xDD, 0xE0, 0xFE])
        length = rng.choice([0, 2, 3, 4, 8, 11, 19, 67, rng.randrange(300)])
        size = rng.choice([0, 1, 17, 64, 65, rng.randrange(300)])
        content = rng.choice([bytes(size), rng.randbytes(size), b"\x10" * size])
        segment = struct.pack(">BBH", 0xFF, marker, length) + content
        after = rng.choice([b"", bytes(200), rng.randbytes(200)])
        data = data[:at] + segment + rng.choice([data[at:end], b""]) + data[end:]
        assert compare(data + after) != "accepted", (seed, f"{marker:X}", length)


BASELINE = jpegs.jpeg("baseline", 0, *SIZE)
PNG = jpegs.jpeg("png", 0, *SIZE)
CMYK = jpegs.jpeg("cmyk", 0, *SIZE)
FRAME = b"\xff\xc0\x00\x11\x08"  # marker, length, 8 bits a value; the size follows
CMYK_FRAME = b"\xff\xc0\x00\x14\x08"
TABLE = BASELINE.index(b"\xff\xc4")  # marker, length, number, and 16 counts of codes
CUT_SHORT = "it is cut short: no end marker"


def with_size(data: bytes, frame: bytes, width: int, height: int) -> bytes:
    """Has the header of a JPEG declare another size."""
    start = data.index(frame) + len(frame)
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def with_png_size(width: int, height: int) -> bytes:
    return PNG[:16] + struct.pack(">II", width, height) + PNG[24:]


def too_large(width: int, height: int, num_components: int = 3) -> str:
    return (
        f"its header declares {width:,} x {height:,} x {num_components} values, which "
        "are none or too many"
    )


HUGE = (65_500, 65_500)
HUGE_JPEG = with_size(BASELINE, FRAME, *HUGE)
HUGE_CMYK = with_size(CMYK, CMYK_FRAME, *HUGE)

REFUSED = {
    "empty": (b"", "the file is empty"),
    "zeros": (bytes(5_000), r"not a JPEG (starts with b'\x00\x00\x00\x00')"),
    "third byte": (
        BASELINE[:2] + b"\x00" + BASELINE[3:],
        r"not a JPEG (starts with b'\xff\xd8\x00\xe0')",
    ),
    "2 bytes": (b"\xff\xd8", r"not a JPEG (starts with b'\xff\xd8')"),
    "cut": (BASELINE[:1_500], CUT_SHORT),
    "half an end": (BASELINE[:-1], CUT_SHORT),
    "only the ends": (BASELINE[:2] + BASELINE[-2:], "it has no frame header"),
    "no height": (with_size(BASELINE, FRAME, 64, 0), too_large(64, 0)),
    "huge": (HUGE_JPEG, too_large(*HUGE)),
    "just too large": (
        with_size(BASELINE, FRAME, 13_378, 13_378),
        too_large(13_378, 13_378),
    ),
    "huge CMYK": (HUGE_CMYK, too_large(*HUGE, 4)),
    "long side": (with_size(BASELINE, FRAME, 64, 65_501), too_large(64, 65_501)),
    "huge PNG": (with_png_size(50_000, 60_000), "it is a damaged PNG"),
    "PNG of 8 bytes": (PNG[:8], "it is a damaged PNG"),
    "PNG cut later": (PNG[:1_000], "it is a damaged PNG"),
    "12 bits": (
        BASELINE.replace(FRAME, b"\xff\xc0\x00\x11\x0c"),
        "Unsupported JPEG data precision 12",
    ),
    "marker length": (
        BASELINE.replace(b"\xff\xc0\x00\x11", b"\xff\xc0\x00\x12"),
        "Bogus marker length",
    ),
    "Huffman table": (
        BASELINE[: TABLE + 5] + b"\xff" * 16 + BASELINE[TABLE + 21 :],
        "Bogus Huffman table definition",
    ),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_image_is_refused_in_words(data: bytes, reason: str) -> None:
    with pytest.raises(script._ImageError) as caught:
        script.check_and_repair(data)
    assert str(caught.value) == reason
    assert decoded_shape(data) is None


def test_libjpeg_may_say_more_than_a_pipe_holds(
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = b"Invalid\n" * 100_000
    assert script._reason_of_libjpeg(lambda: os.write(2, said)) == "Invalid"
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


def test_memory_is_bounded_when_an_image_is_made_to_take_much(tmp_path: Path) -> None:
    """A few KB declare 65,500 x 65,500 pixels; 20 MB hold 10 million markers."""
    images = {
        "a": BASELINE,
        "b": CMYK,
        "c": PNG,
        "huge": HUGE_JPEG,
        "huge_cmyk": HUGE_CMYK,
        "huge_png": with_png_size(*HUGE),
        "markers": BASELINE[:-2] + b"\xff\x01" * 10_000_000 + BASELINE[-2:],
    }
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    code = """if True:
        import pathlib, resource, sys
        import imagenet_to_gcs as script

        def peak(name):
            data = pathlib.Path(sys.argv[1], name).read_bytes()
            try:
                encoded = script.check_and_repair(data)
                assert name in "abc" or encoded.jpeg == data
            except script._ImageError:
                assert name.startswith("huge")
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        before = [peak(name) for name in ("a", "b", "c")][-1]
        huge = max(peak(name) for name in ("huge", "huge_cmyk", "huge_png"))
        print(huge - before, peak("markers") - before)
    """
    finished = run_code(code, str(tmp_path))
    assert finished.status == 0, finished.stderr
    huge, markers = map(int, finished.stdout.split())  # KB
    assert huge < 20_000
    assert markers < 200_000


# --------------------------------------------------------------------------- reading


def listed(source: Path) -> list[script.RawImage]:
    """Lists the images of a directory or a tar."""
    kind = script.Directory if source.is_dir() else script.Tar
    return kind(str(source), "n1").list_images([])


def read(images: list[script.RawImage]) -> list[bytes]:
    files = script.open_ahead(images)
    return [script.read_image(*each) for each in zip(images, files, strict=True)]


def problem(image: script.RawImage) -> str:
    """Returns the line that says why an image is not in its shard; it must not be."""
    with pytest.raises(OSError) as caught:
        read([image])
    return str(script.bad_image(image, caught.value))


@pytest.mark.parametrize("slow", [False, True])
def test_images_are_read_in_order_when_opened_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """Few files are open at once, whether threads open them or not."""
    if slow:  # as if every disk were
        monkeypatch.setattr(script, "SLOW_OPEN_SECONDS", 0)
    expected = [random.Random(i).randbytes(5_000) for i in range(200)]
    for i, data in enumerate(expected):
        (tmp_path / f"{i:03d}.JPEG").write_bytes(data)
    images = listed(tmp_path)
    paths = {str(tmp_path / f"{i:03d}.JPEG") for i in range(200)}

    def count_open() -> int:
        links = Path("/proc/self/fd").iterdir()
        return sum(os.path.realpath(link) in paths for link in links)

    contents, num_open = [], []
    for image, file in zip(images, script.open_ahead(images), strict=True):
        num_open.append(count_open())
        contents.append(script.read_image(image, file))
    assert contents == expected
    assert 1 < max(num_open) <= 64
    assert count_open() == 0
    script.read_image(images[0], next(script.open_ahead(images)))
    assert count_open() == 0  # the others are closed, too
    assert read([]) == []


def test_image_in_a_tar_is_read_in_place(tmp_path: Path) -> None:
    files = {"a.JPEG": BASELINE, "b.JPEG": b"", "c.JPEG": CMYK}
    path = tars.write_tar(tmp_path / "x.tar", files)
    assert read(listed(path)) == list(files.values())


CHANGED = "it has changed since the run began"


@pytest.mark.parametrize(
    ("commands", "reason"),
    [
        ("rm x.JPEG", script.GONE),
        ("ln -sf nothing x.JPEG", script.GONE),
        ("rm x.JPEG; mkdir x.JPEG", "not a regular file"),
        ("rm x.JPEG; mkfifo x.JPEG", "not a regular file"),
        ("ln -sf /dev/zero x.JPEG", "not a regular file"),
        ("truncate -s 100 x.JPEG; touch -d @9 x.JPEG", CHANGED),
        ("touch x.JPEG", CHANGED),
    ],
)
def test_image_is_refused_when_it_is_not_the_one_listed(
    tmp_path: Path, commands: str, reason: str
) -> None:
    path = tmp_path / "x.JPEG"
    path.write_bytes(BASELINE)
    os.utime(path, (9, 9))
    [image] = listed(tmp_path)
    contract.change(tmp_path, commands)
    assert problem(image) == f"Cannot read {path}: {reason}."


def test_image_of_1970_is_gone_and_was_no_dangling_link(tmp_path: Path) -> None:
    path = tmp_path / "x.JPEG"
    path.write_bytes(BASELINE)
    os.utime(path, (0, 0))
    [image] = listed(tmp_path)
    path.unlink()
    assert problem(image) == f"Cannot read {path}: {script.GONE}."


@pytest.mark.parametrize(
    "commands",
    ["cp y.tar x.tar", "touch -d @9 y.tar; mv y.tar x.tar"],
    ids=["another time", "another inode"],
)
def test_image_in_a_tar_is_refused_when_the_tar_is_another(
    tmp_path: Path, commands: str
) -> None:
    """Rewritten in another order, it has another image at the same place."""
    files = {"a.JPEG": BASELINE, "b.JPEG": BASELINE[::-1]}
    path = tars.write_tar(tmp_path / "x.tar", files)
    os.utime(path, (9, 9))
    image = listed(path)[0]
    tars.write_tar(tmp_path / "y.tar", dict(reversed(files.items())))
    contract.change(tmp_path, commands)
    with pytest.raises(OSError) as caught:
        read([image])
    with pytest.raises(script.MachineError) as stops:
        script.bad_image(image, caught.value)
    assert str(stops.value) == f"{path} {CHANGED[3:]}. {script.RERUN}"
