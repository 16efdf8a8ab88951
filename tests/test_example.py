"""Section 4: the nine features of a record."""

import os
from pathlib import Path

import jpegs
import pytest
from command import run_code

import imagenet_to_gcs as script

JPEG = jpegs.jpeg("baseline", 0, 64, 48)
IMAGE = script.RawImage(
    "/raw/train/n02091831", "n02091831_7.JPEG", "n02091831", 9, 1, 1
)
ENCODED = script.EncodedImage(JPEG, 48, 64)


def test_example_has_the_nine_features_for_tensorflow() -> None:
    import tensorflow as tf

    expected = {
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
    serialized = script.make_example(IMAGE, ENCODED)
    features: dict[str, object] = {
        name: tf.io.FixedLenFeature([], tf.int64 if isinstance(v, int) else tf.string)
        for name, v in expected.items()
    }
    parsed = tf.io.parse_single_example(serialized, features)
    assert {name: value.numpy() for name, value in parsed.items()} == expected
    example = tf.train.Example.FromString(serialized)
    assert set(example.features.feature) == set(expected)


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
