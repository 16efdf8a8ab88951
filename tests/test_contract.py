"""The contract that the tests hold the script against is itself right."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import jpegs
import pytest
from conftest import golden_records
from PIL import Image

Features = dict[str, list[Any]]
Shards = dict[str, list[Features]]

NUM_SHARDS = (3, 2)
FIRST = "train-00000-of-00003"


def features_of(expected: contract.ExpectedRecord) -> Features:
    """Makes the features of a record as a correct script would."""
    encoded = Path(expected.path).read_bytes()
    image = Image.open(io.BytesIO(encoded))
    if image.format == "PNG" or image.mode == "CMYK":
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=100)
        encoded = file.getvalue()
    return {
        "image/height": [image.height],
        "image/width": [image.width],
        "image/colorspace": [b"RGB"],
        "image/channels": [3],
        "image/class/label": [expected.label],
        "image/class/synset": [expected.synset.encode()],
        "image/format": [b"JPEG"],
        "image/filename": [expected.filename.encode()],
        "image/encoded": [encoded],
    }


def serialize(features: Features) -> bytes:
    import tensorflow as tf

    example = tf.train.Example()
    lists = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
    for name, values in features.items():
        feature = example.features.feature[name]
        getattr(feature, lists[type(values[0])]).value.extend(values)
    serialized: bytes = example.SerializeToString()
    return serialized


def write_shard(path: Path, records: list[Features]) -> bytes:
    """Writes a shard by TensorFlow, and returns its bytes."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for features in records:
            writer.write(serialize(features))
    return path.read_bytes()


def written(shards: Shards, directory: Path) -> dict[str, bytes]:
    return {
        name: write_shard(directory / name, records) for name, records in shards.items()
    }


@pytest.fixture(scope="module")
def raw_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = ("baseline", "progressive", "grey", "cmyk", "png", "rgb_kept", "1x1")
    directory = tmp_path_factory.mktemp("raw")
    return contract.make_raw(directory, 4, 4, 7, kinds=kinds)


@pytest.fixture
def shards(raw_dir: Path) -> Shards:
    """The features of every record of every shard, ready to be made wrong."""
    expected = contract.expected_shards(raw_dir, *NUM_SHARDS)
    return {name: [features_of(r) for r in expected[name]] for name in expected}


# ---------------------------------------------------------------- reading shards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image/height": None}, "the features are {'image/channels': 'int64_list', "),
        ({"image/extra": [1]}, "'image/extra': 'int64_list'"),
        ({"image/width": [b"500"]}, "'image/width': 'bytes_list'"),
        ({"image/width": [500.0]}, "'image/width': 'float_list'"),
        ({"image/filename": [7]}, "'image/filename': 'int64_list'"),
        ({"image/channels": [3, 3]}, "image/channels has 2 values"),
        ({"image/format": [b"JPEG", b""]}, "image/format has 2 values"),
    ],
)
def test_read_shard_refuses_when_a_feature_is_wrong(
    change: dict[str, list[Any] | None], message: str, shards: Shards, tmp_path: Path
) -> None:
    changed = shards[FIRST][0] | change
    features = {name: values for name, values in changed.items() if values is not None}
    data = write_shard(tmp_path / "shard", [features])
    with pytest.raises(AssertionError) as error:
        contract.read_shard(data)
    assert message in str(error.value)


def _flip(position: int) -> Callable[[bytearray], None]:
    def damage(shard: bytearray) -> None:
        shard[position] ^= 1

    return damage


def _cut(size: int) -> Callable[[bytearray], None]:
    def damage(shard: bytearray) -> None:
        del shard[size:]

    return damage


@pytest.mark.parametrize(
    "damage",
    [_flip(0), _flip(8), _flip(20), _flip(-1), _cut(1), _cut(16), _cut(500), _cut(-1)],
)
def test_read_shard_refuses_when_damaged(
    damage: Callable[[bytearray], None], shards: Shards, tmp_path: Path
) -> None:
    shard = bytearray(write_shard(tmp_path / "shard", shards[FIRST]))
    assert len(contract.read_shard(bytes(shard))) == 6
    damage(shard)
    with pytest.raises(AssertionError, match="damaged: "):
        contract.read_shard(bytes(shard))


# ---------------------------------------------------------------- what is expected


def test_expected_shards_cuts_chunks_when_images_do_not_divide(raw_dir: Path) -> None:
    expected = contract.expected_shards(raw_dir, 3, 5)
    assert {name: len(records) for name, records in expected.items()} == {
        "train-00000-of-00003": 6,
        "train-00001-of-00003": 6,
        "train-00002-of-00003": 4,
        "validation-00000-of-00005": 2,
        "validation-00001-of-00005": 2,
        "validation-00002-of-00005": 2,
        "validation-00003-of-00005": 1,
        "validation-00004-of-00005": 0,
    }


def test_expected_shards_counts_labels_from_one_over_both_splits(
    tmp_path: Path,
) -> None:
    raw = contract.make_raw(tmp_path, 2, 1, 2)
    (raw / "synset_labels.txt").write_text("n00000001\nn99999999\n")
    expected = contract.expected_shards(raw, 1, 1)
    labels = {r.synset: r.label for records in expected.values() for r in records}
    assert labels == {"n00000001": 1, "n01440764": 2, "n01440801": 3, "n99999999": 4}


def test_expected_shards_equals_the_reference_on_the_sample(sample: Path) -> None:
    """Only PNG and CMYK images are stored with other bytes than the file's."""
    golden = golden_records(sample)
    expected = contract.expected_shards(sample)
    assert sorted(expected) == sorted(golden)
    for name, records in expected.items():
        for record, row in zip(records, golden[name], strict=True):
            assert [record.filename, record.label, record.synset] == row[:3]
            image = Image.open(record.path)
            assert [image.height, image.width] == row[3:5]
            digest = hashlib.sha256(Path(record.path).read_bytes()).hexdigest()
            dirty = image.format == "PNG" or image.mode == "CMYK"
            assert (digest != row[8]) == dirty


# ---------------------------------------------------------------- asserting it


@pytest.mark.parametrize("by", ["Pillow", "TensorFlow"])
def test_assert_shards_accepts_when_all_is_right(
    by: str, shards: Shards, raw_dir: Path, tmp_path: Path
) -> None:
    """Whoever has repaired the CMYK and PNG images."""
    import tensorflow as tf

    expected = contract.expected_shards(raw_dir, *NUM_SHARDS)
    for name, records in expected.items():
        for record, features in zip(records, shards[name], strict=True):
            source = Path(record.path).read_bytes()
            if by == "TensorFlow" and features["image/encoded"] != [source]:
                pixels = tf.io.decode_image(source, channels=3)
                encoded = tf.io.encode_jpeg(pixels, format="rgb", quality=100)
                features["image/encoded"] = [encoded.numpy()]
    contract.assert_shards(written(shards, tmp_path), raw_dir, *NUM_SHARDS)


def _missing(shards: Shards) -> None:
    del shards["train-00002-of-00003"]


def _extra(shards: Shards) -> None:
    shards["train-manifest"] = []


def _swapped(shards: Shards) -> None:
    shards[FIRST][:2] = shards[FIRST][1::-1]


def _lost(shards: Shards) -> None:
    shards["train-00001-of-00003"].pop()


def _setter(name: str, value: bytes | int) -> Callable[[Shards], None]:
    def change(shards: Shards) -> None:
        shards["validation-00000-of-00002"][0][name] = [value]

    return change


def _changed_image(shards: Shards) -> None:
    for features in shards["validation-00000-of-00002"]:
        features["image/encoded"][0] += b"\x00"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_missing, "1 shards are missing: ['train-00002-of-00003']"),
        (_extra, "1 files too many: ['train-manifest']"),
        (_swapped, "train-00000-of-00003: holds 6 records"),
        (_lost, "train-00001-of-00003: holds 5 records"),
        (_setter("image/class/label", 0), "is labelled (0, "),
        (_setter("image/class/synset", b"n0"), "is labelled"),
        (_setter("image/height", 47), "is called (64, 47), its image is (64, 48)"),
        (_setter("image/colorspace", b"grey"), "is called ('grey', 3, 'JPEG')"),
        (_setter("image/channels", 1), "is called ('RGB', 1, 'JPEG')"),
        (_setter("image/format", b"PNG"), "is called ('RGB', 3, 'PNG')"),
        (_setter("image/filename", b"a.JPEG"), "holds 4 records ['a.JPEG', "),
        (_changed_image, "does not hold the file's own bytes"),
    ],
)
def test_assert_shards_refuses_when_something_is_wrong(
    change: Callable[[Shards], None],
    message: str,
    shards: Shards,
    raw_dir: Path,
    tmp_path: Path,
) -> None:
    change(shards)
    with pytest.raises(AssertionError) as error:
        contract.assert_shards(written(shards, tmp_path), raw_dir, *NUM_SHARDS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "encoded", "message"),
    [
        ("png", jpegs.png(0, 64, 48), "is not stored as a JPEG"),
        ("cmyk", jpegs.jpeg("cmyk", 0, 64, 48), "is stored as ('JPEG', 'CMYK'"),
        ("png", jpegs.jpeg("grey", 0, 64, 48), "is stored as ('JPEG', 'L'"),
        ("png", jpegs.jpeg("444", 0, 64, 47), "is stored as ('JPEG', 'RGB', (64, 47))"),
        ("png", jpegs.jpeg("444", 1, 64, 48), "differs from the original by"),
        ("png", jpegs.jpeg("444", 0, 64, 48), "is not encoded at quality 100"),
    ],
)
def test_assert_shards_refuses_when_a_repair_is_wrong(
    kind: str, encoded: bytes, message: str, tmp_path: Path
) -> None:
    raw = contract.make_raw(tmp_path / "raw", 1, 1, 0, kinds=(kind,))
    (expected,) = contract.expected_shards(raw, 1, 1)["train-00000-of-00001"]
    features = features_of(expected) | {"image/encoded": [encoded]}
    shards: Shards = {
        "train-00000-of-00001": [features],
        "validation-00000-of-00001": [],
    }
    with pytest.raises(AssertionError) as error:
        contract.assert_shards(written(shards, tmp_path), raw, 1, 1)
    assert message in str(error.value)
