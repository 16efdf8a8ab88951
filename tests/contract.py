"""The contract of the shards, stated a second time and independently of the script.

TensorFlow reads the records, Pillow the images; labels, order and cut are worked out
here from the raw directory. Nothing imports the script.

    make_raw(tmp_path / "raw")                       # a small raw ImageNet
    ...                                              # run the script
    assert_shards(local_shards(scratch), tmp_path / "raw")

What does not hold raises an `AssertionError` that names the shard and the record.
"""

import glob
import io
import math
import os
import random
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jpegs
import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

TRAINING_SHARDS = 1024
VALIDATION_SHARDS = 128

FEATURES = {
    "image/channels": "int64_list",
    "image/class/label": "int64_list",
    "image/class/synset": "bytes_list",
    "image/colorspace": "bytes_list",
    "image/encoded": "bytes_list",
    "image/filename": "bytes_list",
    "image/format": "bytes_list",
    "image/height": "int64_list",
    "image/width": "int64_list",
}

# Mean difference a channel, of 255, of an image encoded again at quality 100 and then
# halved in size. Measured: up to 4 at 64 x 48, 1.6 at 500 x 375; 65 when inverted.
TOLERANCE = 8.0


@dataclass(frozen=True)
class Record:
    """The nine features of one example of a shard."""

    filename: str
    label: int
    synset: str
    height: int
    width: int
    colorspace: str
    channels: int
    format: str
    encoded: bytes


@dataclass(frozen=True)
class ExpectedRecord:
    """What the raw directory says of one example; `path` is that of its image."""

    filename: str
    label: int
    synset: str
    path: str


# ---------------------------------------------------------------- reading shards


def read_shard(shard: bytes | str | os.PathLike[str]) -> list[Record]:
    """Reads a TFRecord file, and verifies its checksums and features."""
    data = shard if isinstance(shard, bytes) else Path(shard).read_bytes()
    if not data:
        return []  # TensorFlow takes 10 ms for each file, and most are empty
    import tensorflow as tf

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        records = tf.data.TFRecordDataset(file.name).as_numpy_iterator()
        try:
            payloads = list(records)
        except tf.errors.DataLossError as error:
            raise AssertionError(f"damaged: {error.message}") from error
    # TensorFlow takes a header that is cut off for the end of the file.
    num_bytes = sum(len(payload) + 16 for payload in payloads)
    assert num_bytes == len(data), f"damaged: cut off after byte {num_bytes:,}"
    return [_parse_example(payload) for payload in payloads]


def _parse_example(payload: bytes) -> Record:
    import tensorflow as tf

    features = tf.train.Example.FromString(payload).features.feature
    kinds = {name: features[name].WhichOneof("kind") for name in sorted(features)}
    assert kinds == FEATURES, f"the features are {kinds}"
    fields: dict[str, Any] = {}
    for name, kind in kinds.items():
        values = getattr(features[name], kind).value
        assert len(values) == 1, f"{name} has {len(values)} values"
        field = name.rpartition("/")[2]
        is_text = kind == "bytes_list" and field != "encoded"
        fields[field] = os.fsdecode(values[0]) if is_text else values[0]
    return Record(**fields)


def local_shards(scratch_dir: str | os.PathLike[str]) -> dict[str, bytes]:
    """Reads `train/*` and `validation/*`, hidden files excepted, by base name."""
    return {
        path.name: path.read_bytes()
        for split in ("train", "validation")
        for path in sorted((Path(scratch_dir) / split).iterdir())
        if not path.name.startswith(".")
    }


# ---------------------------------------------------------------- what is expected


def expected_shards(
    raw_dir: str | os.PathLike[str],
    training_shards: int = TRAINING_SHARDS,
    validation_shards: int = VALIDATION_SHARDS,
) -> dict[str, list[ExpectedRecord]]:
    """Tells what each shard holds, by base name: its records in their order."""
    root = glob.escape(os.fspath(raw_dir))
    training = sorted(glob.glob(f"{root}/train/*/*.JPEG"))
    validation = sorted(glob.glob(f"{root}/validation/*.JPEG"))
    labels = (Path(raw_dir) / "synset_labels.txt").read_text().split()
    synset_of = {path: os.path.basename(os.path.dirname(path)) for path in training}
    synset_of |= dict(zip(validation, labels, strict=True))
    synsets = sorted(set(synset_of.values()))
    records = {
        path: ExpectedRecord(
            os.path.basename(path), synsets.index(synset) + 1, synset, path
        )
        for path, synset in synset_of.items()
    }
    random.Random(0).shuffle(training)
    shards = {}
    for split, paths, num_shards in (
        ("train", training, training_shards),
        ("validation", validation, validation_shards),
    ):
        size = math.ceil(len(paths) / num_shards)
        for index in range(num_shards):
            chunk = paths[index * size : (index + 1) * size]
            name = f"{split}-{index:05d}-of-{num_shards:05d}"
            shards[name] = [records[path] for path in chunk]
    return shards


# ---------------------------------------------------------------- asserting it


def assert_shards(
    shards: Mapping[str, bytes],
    raw_dir: str | os.PathLike[str],
    training_shards: int = TRAINING_SHARDS,
    validation_shards: int = VALIDATION_SHARDS,
) -> None:
    """Asserts that shards, by base name, are what the contract makes of `raw_dir`."""
    expected = expected_shards(raw_dir, training_shards, validation_shards)
    missing, extra = sorted(expected.keys() - shards), sorted(shards.keys() - expected)
    assert not missing, f"{len(missing)} shards are missing: {missing[:3]}"
    assert not extra, f"{len(extra)} files too many: {extra[:3]}"
    for name, expected_records in expected.items():
        try:
            _assert_records(read_shard(shards[name]), expected_records)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def _assert_records(
    records: Sequence[Record], expected: Sequence[ExpectedRecord]
) -> None:
    found_names = [record.filename for record in records]
    expected_names = [record.filename for record in expected]
    assert found_names == expected_names, (
        f"holds {len(records)} records {found_names[:5]}, "
        f"must hold {len(expected)} {expected_names[:5]}"
    )
    for record, wanted in zip(records, expected, strict=True):
        _assert_record(record, wanted)


def _assert_record(record: Record, expected: ExpectedRecord) -> None:
    name = expected.filename
    found = (record.label, record.synset)
    wanted = (expected.label, expected.synset)
    assert found == wanted, f"{name} is labelled {found}, must be {wanted}"
    constants = (record.colorspace, record.channels, record.format)
    assert constants == ("RGB", 3, "JPEG"), f"{name} is called {constants}"
    source = Path(expected.path).read_bytes()
    image = Image.open(io.BytesIO(source))
    size = (record.width, record.height)
    assert size == image.size, f"{name} is called {size}, its image is {image.size}"
    if image.format == "PNG" or image.mode == "CMYK":
        _assert_repaired(name, record.encoded, image)
    else:
        assert record.encoded == source, f"{name} does not hold the file's own bytes"


def _assert_repaired(name: str, encoded: bytes, original: Image.Image) -> None:
    image = Image.open(io.BytesIO(encoded))
    found = (image.format, image.mode, image.size)
    assert found == ("JPEG", "RGB", original.size), f"{name} is stored as {found}"
    assert isinstance(image, JpegImageFile)
    # Halved in size, because an encoder may store the colour of four pixels as one.
    pixels = np.asarray(image.reduce(2), np.float64)
    wanted = np.asarray(original.convert("RGB").reduce(2), np.float64)
    difference = float(np.abs(pixels - wanted).mean())
    assert difference <= TOLERANCE, (
        f"{name} differs from the original by {difference:.1f} of 255 a channel"
    )
    # Quality 100 divides by nothing: all steps are 1.
    steps = {step for table in image.quantization.values() for step in table}
    assert steps == {1}, f"{name} is not encoded at quality 100"


# ---------------------------------------------------------------- a raw directory


def make_raw(
    directory: str | os.PathLike[str],
    synsets: int = 4,
    training: int = 3,
    validation: int = 4,
    kinds: Sequence[str] = ("baseline",),
    width: int = 64,
    height: int = 48,
) -> Path:
    """Writes a small raw ImageNet, the same one at each call.

    Args:
      training: number of training images of each synset: n01440764, n01440801, ...
      validation: number of validation images of all synsets together.
      kinds: of `jpegs.KINDS`, given to the images in turn.
    """
    raw = Path(directory)
    names = [f"n{1440764 + 37 * index:08d}" for index in range(synsets)]
    labels = [names[i % synsets] for i in range(validation)]
    paths = [f"train/{s}/{s}_{i}.JPEG" for s in names for i in range(1, training + 1)]
    paths += [
        f"validation/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, validation + 1)
    ]
    for split in ("train", "validation"):
        (raw / split).mkdir(parents=True, exist_ok=True)
    for seed, path in enumerate(paths):
        (raw / path).parent.mkdir(exist_ok=True)
        image = jpegs.jpeg(kinds[seed % len(kinds)], seed, width, height)
        (raw / path).write_bytes(image)
    (raw / "synset_labels.txt").write_text("".join(f"{label}\n" for label in labels))
    return raw


def change(directory: Path, commands: str) -> None:
    """Runs shell commands in a raw directory."""
    subprocess.run(["bash", "-ec", commands], cwd=directory, check=True)
