"""The contract of the shards, stated a second time and independently of the script.

Nothing here imports the script or TensorFlow: TFRecord framing and `tf.train.Example`
are parsed by the few lines they need, and images are read by Pillow.

    make_raw(tmp_path / "raw")                       # a small raw ImageNet
    ...                                              # run the script
    assert_shards(local_shards(scratch), tmp_path / "raw")

What does not hold raises `AssertionError` that says which shard and record.
"""

import glob
import io
import math
import os
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import jpegs
import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

TRAINING_SHARDS = 1024
VALIDATION_SHARDS = 128

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
    """Parses a TFRecord file, and verifies its checksums and features."""
    data = shard if isinstance(shard, bytes) else Path(shard).read_bytes()
    return [_parse_example(payload) for payload in _payloads(data)]


def local_shards(scratch_dir: str | os.PathLike[str]) -> dict[str, bytes]:
    """Reads `train/*` and `validation/*`, hidden files excepted, by base name."""
    return {
        path.name: path.read_bytes()
        for split in ("train", "validation")
        for path in sorted((Path(scratch_dir) / split).iterdir())
        if not path.name.startswith(".")
    }


def _payloads(data: bytes) -> Iterator[bytes]:
    """Yields the payloads of a TFRecord file.

    A record: length (uint64), its masked crc32c (uint32), payload, its masked crc32c;
    all little-endian.
    """
    position = 0
    while position < len(data):
        assert len(data) - position >= 16, f"cut off at byte {position:,}"
        length, length_crc = struct.unpack_from("<QI", data, position)
        assert length_crc == _masked_crc32c(data[position : position + 8]), (
            f"wrong checksum of the length at byte {position:,}"
        )
        end = position + 12 + length
        assert end + 4 <= len(data), f"cut off in the record at byte {position:,}"
        payload = data[position + 12 : end]
        (payload_crc,) = struct.unpack_from("<I", data, end)
        assert payload_crc == _masked_crc32c(payload), (
            f"wrong checksum of the record at byte {position:,}"
        )
        yield payload
        position = end + 4


def _masked_crc32c(data: bytes) -> int:
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# Wire types and field numbers of protocol buffers: tf.train.Example and its parts.
_VARINT, _DELIMITED = 0, 2
_FEATURES = 1
_MAP_ENTRY = 1
_KEY, _VALUE = 1, 2
_BYTES_LIST, _INT64_LIST = 1, 3


def _parse_example(payload: bytes) -> Record:
    features: dict[str, bytes | int] = {}
    for entry in _children(_only(payload, _FEATURES), _MAP_ENTRY):
        name = _only(entry, _KEY).decode()
        assert name not in features, f"{name} stands twice in an example"
        features[name] = _single_value(name, _only(entry, _VALUE))

    def number(name: str) -> int:
        value = features.pop(name, None)
        assert isinstance(value, int), f"{name} is no int64"
        return value

    def raw(name: str) -> bytes:
        value = features.pop(name, None)
        assert isinstance(value, bytes), f"{name} is no bytes"
        return value

    record = Record(
        filename=raw("image/filename").decode(),
        label=number("image/class/label"),
        synset=raw("image/class/synset").decode(),
        height=number("image/height"),
        width=number("image/width"),
        colorspace=raw("image/colorspace").decode(),
        channels=number("image/channels"),
        format=raw("image/format").decode(),
        encoded=raw("image/encoded"),
    )
    assert not features, f"features beyond the nine: {sorted(features)}"
    return record


def _single_value(name: str, feature: bytes) -> bytes | int:
    fields = list(_fields(feature))
    assert len(fields) == 1, f"{name} has {len(fields)} lists of values"
    number, content = fields[0]
    assert number in (_BYTES_LIST, _INT64_LIST), f"{name} is of another type"
    assert isinstance(content, bytes)
    values: list[bytes | int] = []
    for field, value in _fields(content):
        assert field == 1, f"{name} has an unknown field"
        if number == _INT64_LIST and isinstance(value, bytes):
            values.extend(_packed(value))
        else:
            assert isinstance(value, bytes if number == _BYTES_LIST else int), name
            values.append(value)
    assert len(values) == 1, f"{name} has {len(values)} values"
    return values[0]


def _only(message: bytes, field: int) -> bytes:
    found = _children(message, field)
    assert len(found) == 1, f"{len(found)} fields of number {field}, not 1"
    return found[0]


def _children(message: bytes, field: int) -> list[bytes]:
    children: list[bytes] = []
    for number, value in _fields(message):
        assert number == field or (field in (_KEY, _VALUE) and number <= 2), number
        if number == field:
            assert isinstance(value, bytes)
            children.append(value)
    return children


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yields number and value of each field of a serialized message."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        value, position = _varint(message, position)
        if tag & 7 == _DELIMITED:
            assert position + value <= len(message), "a field is cut off"
            yield tag >> 3, message[position : position + value]
            position += value
        else:
            assert tag & 7 == _VARINT, f"wire type {tag & 7} in an example"
            yield tag >> 3, _signed(value)


def _packed(values: bytes) -> Iterator[int]:
    position = 0
    while position < len(values):
        value, position = _varint(values, position)
        yield _signed(value)


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Returns the number at a position, 7 bits a byte, and the position after it."""
    value = shift = 0
    while True:
        assert position < len(message), "a number is cut off"
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# ---------------------------------------------------------------- what is expected


def expected_shards(
    raw_dir: str | os.PathLike[str],
    training_shards: int = TRAINING_SHARDS,
    validation_shards: int = VALIDATION_SHARDS,
) -> dict[str, list[ExpectedRecord]]:
    """Tells what each shard holds, by base name: its records in their order."""
    raw = os.fspath(raw_dir)
    training = sorted(glob.glob(os.path.join(glob.escape(raw), "train", "*", "*.JPEG")))
    validation = sorted(glob.glob(os.path.join(glob.escape(raw), "validation/*.JPEG")))
    training_synsets = [os.path.basename(os.path.dirname(path)) for path in training]
    validation_synsets = (Path(raw) / "synset_labels.txt").read_text().split()
    assert len(validation_synsets) == len(validation), "labels and images differ"
    synsets = sorted(set(training_synsets) | set(validation_synsets))
    labels = {synset: rank for rank, synset in enumerate(synsets, 1)}

    def records(paths: list[str], of_synset: list[str]) -> list[ExpectedRecord]:
        return [
            ExpectedRecord(os.path.basename(path), labels[synset], synset, path)
            for path, synset in zip(paths, of_synset, strict=True)
        ]

    shuffled = records(training, training_synsets)
    random.Random(0).shuffle(shuffled)
    return _cut("train", shuffled, training_shards) | _cut(
        "validation", records(validation, validation_synsets), validation_shards
    )


def _cut(
    split: str, records: list[ExpectedRecord], num_shards: int
) -> dict[str, list[ExpectedRecord]]:
    size = math.ceil(len(records) / num_shards)
    return {
        f"{split}-{index:05d}-of-{num_shards:05d}": records[
            index * size : (index + 1) * size
        ]
        for index in range(num_shards)
    }


# ---------------------------------------------------------------- asserting it


def assert_shards(
    shards: Mapping[str, bytes],
    raw_dir: str | os.PathLike[str],
    training_shards: int = TRAINING_SHARDS,
    validation_shards: int = VALIDATION_SHARDS,
) -> None:
    """Asserts that shards are what the contract makes of a raw directory.

    Args:
      shards: the contents of each shard by its base name, and nothing else.
      raw_dir: the raw ImageNet that they were made of.
      training_shards: how many there must be.
      validation_shards: how many there must be.
    """
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
    assert encoded[:3] == b"\xff\xd8\xff", f"{name} is not stored as a JPEG"
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
      directory: made if it is missing.
      synsets: number of synsets: n01440764, n01440801, ...
      training: number of training images of each synset.
      validation: number of validation images of all synsets together.
      kinds: of `jpegs.KINDS`, or "png"; given to the images in turn.
      width: pixels of each image, but for the kinds that are named after their size.
      height: likewise.

    Returns:
      `directory`.
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
        image = _image(kinds[seed % len(kinds)], seed, width, height)
        (raw / path).write_bytes(image)
    (raw / "synset_labels.txt").write_text("".join(f"{label}\n" for label in labels))
    return raw


def label_file(text: str) -> Callable[[Path], None]:
    """Returns what gives a raw directory another label file."""

    def write(raw: Path) -> None:
        (raw / "synset_labels.txt").write_text(text)

    return write


def _image(kind: str, seed: int, width: int, height: int) -> bytes:
    if kind == "png":
        return jpegs.png(seed, width, height)
    return jpegs.jpeg(kind, seed, width, height)
