"""The nine features of a record."""

import os

import jpegs
import pytest
from command import run_code

import imagenet_to_gcs as script

JPEG = jpegs.jpeg("baseline", 0, 64, 48)
ENCODED = script.EncodedImage(JPEG, 48, 64)


def make_image(filename: str) -> script.RawImage:
    return script.RawImage("/raw", filename, "n02091831", 1, 1)


@pytest.mark.parametrize("filename", [b"n02091831_7.JPEG", "é".encode(), b"\xff.JPEG"])
def test_example_has_the_nine_features_for_tensorflow(filename: bytes) -> None:
    import tensorflow as tf

    expected = {
        "image/height": 48,
        "image/width": 64,
        "image/colorspace": b"RGB",
        "image/channels": 3,
        "image/class/label": 9,
        "image/class/synset": b"n02091831",
        "image/format": b"JPEG",
        "image/filename": filename,
        "image/encoded": JPEG,
    }
    serialized = script.make_example(make_image(os.fsdecode(filename)), 9, ENCODED)
    features: dict[str, object] = {
        name: tf.io.FixedLenFeature([], tf.int64 if isinstance(v, int) else tf.string)
        for name, v in expected.items()
    }
    parsed = tf.io.parse_single_example(serialized, features)
    assert {name: value.numpy() for name, value in parsed.items()} == expected
    example = tf.train.Example.FromString(serialized)
    assert set(example.features.feature) == set(expected)


def test_example_has_the_same_bytes_each_time() -> None:
    """Also in another process, where protobuf's map has another order."""
    code = """if True:
        import sys
        import imagenet_to_gcs as script
        image = script.RawImage("/elsewhere", "x.JPEG", "n02091831", 22, 33)
        encoded = script.EncodedImage(bytes.fromhex(sys.argv[1]), 48, 64)
        print(script.make_example(image, 9, encoded).hex())
    """
    image = make_image("x.JPEG")
    expected = script.make_example(image, 9, ENCODED)
    assert {script.make_example(image, 9, ENCODED) for _ in range(50)} == {expected}
    finished = run_code(code, JPEG.hex())
    assert bytes.fromhex(finished.stdout) == expected
