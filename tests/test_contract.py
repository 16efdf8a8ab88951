"""The contract that the tests hold the script against is itself right.

What it expects is compared with what the script plans in test_plan.py.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import jpegs
import pytest
from PIL import Image

Features = dict[str, list[Any]]
Shards = dict[str, list[Features]]

NUM_SHARDS = (3, 2)
FIRST = "train-00000-of-00003"


def features_of(expected: contract.ExpectedRecord) -> Features:
    """Makes the features of a record as a correct script would, but by Pillow."""
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


def assert_shards(shards: Shards, raw: Path, directory: Path, *numbers: int) -> None:
    written = {name: write_shard(directory / name, shards[name]) for name in shards}
    contract.assert_shards(written, raw, *numbers)


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


def test_read_shard_refuses_when_damaged(shards: Shards, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "shard", shards[FIRST])
    assert len(contract.read_shard(shard)) == 6
    damaged = [shard[:size] for size in (1, 16, 500, -1)]
    for position in (0, 8, 20, len(shard) - 1):
        flipped = bytes([shard[position] ^ 1])
        damaged.append(shard[:position] + flipped + shard[position + 1 :])
    for data in damaged:
        with pytest.raises(AssertionError, match="damaged: "):
            contract.read_shard(data)


def test_assert_shards_accepts_when_all_is_right(
    shards: Shards, raw_dir: Path, tmp_path: Path
) -> None:
    assert_shards(shards, raw_dir, tmp_path, *NUM_SHARDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards: shards.pop(FIRST), f"1 shards are missing: ['{FIRST}']"),
        (lambda shards: shards.update(x=[]), "1 files too many: ['x']"),
        (lambda shards: shards[FIRST].reverse(), f"{FIRST}: holds 6 records"),
        (lambda shards: shards[FIRST].pop(), f"{FIRST}: holds 5 records"),
    ],
)
def test_assert_shards_refuses_when_shards_are_wrong(
    change: Callable[[Shards], object],
    message: str,
    shards: Shards,
    raw_dir: Path,
    tmp_path: Path,
) -> None:
    change(shards)
    with pytest.raises(AssertionError) as error:
        assert_shards(shards, raw_dir, tmp_path, *NUM_SHARDS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "feature", "value", "message"),
    [
        ("grey", "class/label", 0, "is labelled (0, "),
        ("grey", "class/synset", b"n0", "is labelled"),
        ("grey", "height", 47, "is called (64, 47), its image is (64, 48)"),
        ("grey", "colorspace", b"grey", "is called ('grey', 3, 'JPEG')"),
        ("grey", "channels", 1, "is called ('RGB', 1, 'JPEG')"),
        ("grey", "format", b"PNG", "is called ('RGB', 3, 'PNG')"),
        ("grey", "filename", b"a.JPEG", "holds 1 records ['a.JPEG'], must hold 1 "),
        ("grey", "encoded", jpegs.jpeg("444", 0), "does not hold the file's own bytes"),
        ("png", "encoded", jpegs.jpeg("png", 0, 64, 48), "is stored as ('PNG', 'RGB'"),
        ("cmyk", "encoded", jpegs.jpeg("cmyk", 0, 64, 48), "as ('JPEG', 'CMYK'"),
        ("png", "encoded", jpegs.jpeg("grey", 0, 64, 48), "as ('JPEG', 'L'"),
        ("png", "encoded", jpegs.jpeg("444", 0, 64, 47), "'RGB', (64, 47))"),
        ("png", "encoded", jpegs.jpeg("444", 1, 64, 48), "differs from the original"),
        ("png", "encoded", jpegs.jpeg("444", 0, 64, 48), "not encoded at quality 100"),
    ],
)
def test_assert_shards_refuses_when_a_record_is_wrong(
    kind: str, feature: str, value: bytes | int, message: str, tmp_path: Path
) -> None:
    raw = contract.make_raw(tmp_path / "raw", 1, 1, 0, kinds=(kind,))
    (expected,) = contract.expected_shards(raw, 1, 1)["train-00000-of-00001"]
    features = features_of(expected) | {f"image/{feature}": [value]}
    shards = {"train-00000-of-00001": [features], "validation-00000-of-00001": []}
    with pytest.raises(AssertionError) as error:
        assert_shards(shards, raw, tmp_path, 1, 1)
    assert message in str(error.value)
