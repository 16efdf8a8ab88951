"""The contract that the tests hold the script against is itself right."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import jpegs
import pytest
from PIL import Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

SHARED = Path(__file__).resolve().parents[2] / "shared"
SAMPLE = SHARED / "imagenet_sample"
GOLDEN = SHARED / "imagenet_sample_records.jsonl"
NEEDS_SAMPLE = pytest.mark.skipif(
    not (SAMPLE.is_dir() and GOLDEN.is_file()), reason="needs the ImageNet sample"
)

Features = dict[str, list[Any]]
Shards = dict[str, list[Features]]

NUM_SHARDS = (3, 2)


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
    """Serializes an example by TensorFlow, not by this project's code."""
    import tensorflow as tf

    example = tf.train.Example()
    for name, values in features.items():
        feature = example.features.feature[name]
        if isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    serialized: bytes = example.SerializeToString()
    return serialized


def write_shard(path: Path, examples: list[bytes]) -> bytes:
    """Writes a shard by TensorFlow, and returns its bytes."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            writer.write(example)
    return path.read_bytes()


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


def written(shards: Shards, directory: Path) -> dict[str, bytes]:
    return {
        name: write_shard(directory / name, [serialize(f) for f in records])
        for name, records in shards.items()
    }


@pytest.fixture
def shard(shards: Shards, tmp_path: Path) -> bytes:
    name = "train-00000-of-00003"
    return write_shard(tmp_path / name, [serialize(f) for f in shards[name]])


# ---------------------------------------------------------------- reading shards


def test_read_shard_returns_what_tensorflow_wrote(tmp_path: Path) -> None:
    record = contract.Record(
        "n1_ä.JPEG", -5, "n1", 1, 2**40, "RGB", 3, "JPEG", bytes(300)
    )
    features: Features = {
        "image/height": [1],
        "image/width": [2**40],
        "image/colorspace": [b"RGB"],
        "image/channels": [3],
        "image/class/label": [-5],
        "image/class/synset": [b"n1"],
        "image/format": [b"JPEG"],
        "image/filename": ["n1_ä.JPEG".encode()],
        "image/encoded": [bytes(300)],
    }
    data = write_shard(tmp_path / "shard", [serialize(features)] * 2)
    assert contract.read_shard(data) == [record, record]
    assert contract.read_shard(tmp_path / "shard") == [record, record]


def test_read_shard_returns_nothing_when_the_shard_is_empty() -> None:
    assert contract.read_shard(b"") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image/height": None}, "image/height is no int64"),
        ({"image/format": None}, "image/format is no bytes"),
        ({"image/width": [b"500"]}, "image/width is no int64"),
        ({"image/width": [500.0]}, "image/width is of another type"),
        ({"image/filename": [7]}, "image/filename is no bytes"),
        ({"image/channels": [3, 3]}, "image/channels has 2 values"),
        ({"image/format": [b"JPEG", b""]}, "image/format has 2 values"),
        ({"image/extra": [1]}, "features beyond the nine: ['image/extra']"),
    ],
)
def test_read_shard_refuses_when_a_feature_is_wrong(
    change: dict[str, list[Any] | None], message: str, shards: Shards, tmp_path: Path
) -> None:
    changed = shards["train-00000-of-00003"][0] | change
    features = {name: values for name, values in changed.items() if values is not None}
    data = write_shard(tmp_path / "shard", [serialize(features)])
    with pytest.raises(AssertionError) as error:
        contract.read_shard(data)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (0, "wrong checksum of the length at byte 0"),
        (8, "wrong checksum of the length at byte 0"),
        (20, "wrong checksum of the record at byte 0"),
        (-1, "wrong checksum of the record at byte"),
    ],
)
def test_read_shard_refuses_when_a_byte_is_changed(
    position: int, message: str, shard: bytes
) -> None:
    damaged = bytearray(shard)
    damaged[position] ^= 1
    with pytest.raises(AssertionError, match=message):
        contract.read_shard(bytes(damaged))


@pytest.mark.parametrize("size", [1, 15, 16, 500, -1])
def test_read_shard_refuses_when_cut_off(size: int, shard: bytes) -> None:
    with pytest.raises(AssertionError, match="cut off"):
        contract.read_shard(shard[:size])


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


@NEEDS_SAMPLE
def test_expected_shards_equals_the_reference_on_the_sample() -> None:
    golden = dict(json.loads(line) for line in GOLDEN.read_text().splitlines())
    expected = contract.expected_shards(SAMPLE)
    assert sorted(expected) == sorted(golden)
    found = {
        name: [[r.filename, r.label, r.synset] for r in records]
        for name, records in expected.items()
    }
    assert found == {name: [row[:3] for row in rows] for name, rows in golden.items()}


@NEEDS_SAMPLE
def test_images_of_the_sample_are_stored_untouched_but_for_png_and_cmyk() -> None:
    golden = dict(json.loads(line) for line in GOLDEN.read_text().splitlines())
    for name, records in contract.expected_shards(SAMPLE).items():
        for record, row in zip(records, golden[name], strict=True):
            image = Image.open(record.path)
            assert [image.height, image.width] == row[3:5]
            digest = hashlib.sha256(Path(record.path).read_bytes()).hexdigest()
            dirty = image.format == "PNG" or image.mode == "CMYK"
            assert (digest != row[8]) == dirty


# ---------------------------------------------------------------- asserting it


def test_assert_shards_accepts_when_all_is_right(
    shards: Shards, raw_dir: Path, tmp_path: Path
) -> None:
    contract.assert_shards(written(shards, tmp_path), raw_dir, *NUM_SHARDS)


def test_assert_shards_accepts_when_tensorflow_repaired_cmyk_and_png(
    shards: Shards, raw_dir: Path, tmp_path: Path
) -> None:
    import tensorflow as tf

    expected = contract.expected_shards(raw_dir, *NUM_SHARDS)
    for name, records in expected.items():
        for record, features in zip(records, shards[name], strict=True):
            source = Path(record.path).read_bytes()
            if features["image/encoded"] != [source]:
                decode = tf.io.decode_image(source, channels=3)
                encode = tf.io.encode_jpeg(decode, format="rgb", quality=100)
                features["image/encoded"] = [encode.numpy()]
    contract.assert_shards(written(shards, tmp_path), raw_dir, *NUM_SHARDS)


def _missing(shards: Shards) -> None:
    del shards["train-00002-of-00003"]


def _extra(shards: Shards) -> None:
    shards["train-manifest"] = []


def _swapped(shards: Shards) -> None:
    shards["train-00000-of-00003"][:2] = shards["train-00000-of-00003"][1::-1]


def _lost(shards: Shards) -> None:
    shards["train-00001-of-00003"].pop()


def _setter(name: str, value: bytes | int) -> Callable[[Shards], None]:
    def change(shards: Shards) -> None:
        shards["validation-00000-of-00002"][0][name] = [value]

    return change


def _changed_image(shards: Shards) -> None:
    for features in shards["validation-00000-of-00002"]:
        features["image/encoded"][0] += b"\x00"


def _other_picture(shards: Shards) -> None:
    for records in shards.values():
        for features in records:
            size = (features["image/width"][0], features["image/height"][0])
            features["image/encoded"] = [jpegs.jpeg("444", 999, *map(int, size))]


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
        (_other_picture, "train-00000-of-00003: "),
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


# ---------------------------------------------------------------- a raw directory


def test_make_raw_writes_the_same_tree_each_time(tmp_path: Path) -> None:
    trees = [contract.make_raw(tmp_path / name, 2, 2, 3) for name in ("a", "b")]
    contents = [
        {str(p.relative_to(t)): p.read_bytes() for p in t.rglob("*") if p.is_file()}
        for t in trees
    ]
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [
        "synset_labels.txt",
        "train/n01440764/n01440764_1.JPEG",
        "train/n01440764/n01440764_2.JPEG",
        "train/n01440801/n01440801_1.JPEG",
        "train/n01440801/n01440801_2.JPEG",
        "validation/ILSVRC2012_val_00000001.JPEG",
        "validation/ILSVRC2012_val_00000002.JPEG",
        "validation/ILSVRC2012_val_00000003.JPEG",
    ]


def test_local_shards_reads_both_splits_without_hidden_files(tmp_path: Path) -> None:
    for name in ("train/train-0", "train/.train-0.json", "validation/validation-0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert contract.local_shards(tmp_path) == {
        "train-0": b"train/train-0",
        "validation-0": b"validation/validation-0",
    }
