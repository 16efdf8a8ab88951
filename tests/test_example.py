"""Section 4: the nine features of a record."""

import os
import struct
from pathlib import Path

import contract
import google_crc32c
import jpegs
import pytest
from command import run_code

import imagenet_to_gcs as script

JPEG = jpegs.jpeg("baseline", 0, 64, 48)
IMAGE = script.RawImage(
    "/raw/train/n02091831", "n02091831_7.JPEG", "n02091831", 9, 1, 1
)
ENCODED = script.EncodedImage(JPEG, 48, 64)


def framed(example: bytes) -> bytes:
    """Makes a TFRecord file of one example, for the contract's parser."""

    def masked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(example))
    return length + masked(length) + example + masked(example)


def test_example_has_the_nine_features() -> None:
    [record] = contract.read_shard(framed(script.make_example(IMAGE, ENCODED)))
    assert record == contract.Record(
        filename="n02091831_7.JPEG",
        label=9,
        synset="n02091831",
        height=48,
        width=64,
        colorspace="RGB",
        channels=3,
        format="JPEG",
        encoded=JPEG,
    )


def test_example_is_read_by_tensorflow() -> None:
    import tensorflow as tf

    features: dict[str, object] = {
        "image/height": tf.io.FixedLenFeature([], tf.int64),
        "image/width": tf.io.FixedLenFeature([], tf.int64),
        "image/colorspace": tf.io.FixedLenFeature([], tf.string),
        "image/channels": tf.io.FixedLenFeature([], tf.int64),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
        "image/class/synset": tf.io.FixedLenFeature([], tf.string),
        "image/format": tf.io.FixedLenFeature([], tf.string),
        "image/filename": tf.io.FixedLenFeature([], tf.string),
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
    }
    serialized = script.make_example(IMAGE, ENCODED)
    parsed = tf.io.parse_single_example(serialized, features)
    assert {name: value.numpy() for name, value in parsed.items()} == {
        "image/height": 48,
        "image/width": 64,
        "image/colorspace": b"RGB",
        "image/channels": 3,
        "image/class/label": 9,
        "image/class/synset": b"n02091831",
        "image/format": b"JPEG",
        "image/filename": b"n02091831_7.JPEG",
        "image/encoded": JPEG,
    }
    example = tf.train.Example.FromString(serialized)
    assert set(example.features.feature) == set(features)


def test_repaired_image_is_described_as_any_other() -> None:
    repaired = script.EncodedImage(JPEG, 48, 64, repaired=True)
    assert script.make_example(IMAGE, repaired) == script.make_example(IMAGE, ENCODED)


def test_example_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    """Also in another process, where protobuf's map has another order."""
    (tmp_path / "image.JPEG").write_bytes(JPEG)
    code = """if True:
        import sys
        import imagenet_to_gcs as script
        image = script.RawImage(
            "/elsewhere", "n02091831_7.JPEG", "n02091831", 9, 22, 33
        )
        with open(sys.argv[1], "rb") as file:
            encoded = script.EncodedImage(file.read(), 48, 64)
        sys.stdout.buffer.write(script.make_example(image, encoded).hex().encode())
    """
    expected = script.make_example(IMAGE, ENCODED)
    assert {script.make_example(IMAGE, ENCODED) for _ in range(50)} == {expected}
    finished = run_code(code, str(tmp_path / "image.JPEG"))
    assert bytes.fromhex(finished.stdout) == expected


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        pytest.param("é.JPEG", "é.JPEG".encode(), id="UTF-8"),
        pytest.param(os.fsdecode(b"\xff.JPEG"), b"\xff.JPEG", id="not UTF-8"),
    ],
)
def test_filename_is_that_of_the_file(filename: str, expected: bytes) -> None:
    import tensorflow as tf

    image = script.RawImage("/raw", filename, "n02091831", 9, 1, 1)
    example = tf.train.Example.FromString(script.make_example(image, ENCODED))
    feature = example.features.feature["image/filename"]
    assert list(feature.bytes_list.value) == [expected]
