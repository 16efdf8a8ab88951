"""The headline: the records equal the reference's, in any clone.

All nine features of all 1,152 shards are compared. An image that is encoded again has
the reference's bytes with the TensorFlow that made its records, its pixels with any.
"""

import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import contract
import numpy as np
import pytest
from command import REPOSITORY, run_command
from PIL import Image

GOLDEN = REPOSITORY / "tests" / "golden"

# Photographs, which nobody may publish: a second, larger set where they are.
SAMPLE = REPOSITORY.parent / "shared" / "imagenet_sample"

ENCODER = "2.21."
"""The TensorFlow that made the records; 2.17 encodes alike."""

TOLERANCE = 1.5
"""Mean difference a channel, of 255, that another encoder may make.

Measured: 0 to 1.0 by Pillow, 2.6 and more at quality 95.
"""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A raw ImageNet, and what the reference made of it."""

    raw: Path
    records: Path
    num_images: int
    num_repaired: int


DATA_SETS = [DataSet(GOLDEN / "raw", GOLDEN / "records.jsonl", 90, 6)]
if SAMPLE.is_dir():
    records_path = SAMPLE.with_name("imagenet_sample_records.jsonl")
    DATA_SETS.append(DataSet(SAMPLE, records_path, 225, 3))

# A record as `records.jsonl` has it: its features, of the image the sha256.
Line = list[Any]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def reference_records(data_set: DataSet) -> dict[str, list[Line]]:
    """The records of each of the 1,152 shards; those without a line are empty."""
    names = [f"train-{i:05d}-of-01024" for i in range(1024)]
    names += [f"validation-{i:05d}-of-00128" for i in range(128)]
    lines = data_set.records.read_text().splitlines()
    records: dict[str, list[Line]] = {name: [] for name in names}
    records |= dict(json.loads(line) for line in lines)
    assert len(records) == 1_152
    return records


def written_records(
    raw: Path, scratch: Path, *more: str
) -> dict[str, list[contract.Record]]:
    """Runs the command, and reads all that it wrote."""
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}", *more]
    finished = run_command(*flags, "--nogcs_upload")
    assert finished.status == 0, finished.stderr
    shards = contract.local_shards(scratch)
    return {name: contract.read_shard(shards[name]) for name in shards}


@pytest.mark.parametrize("data_set", DATA_SETS, ids=lambda data_set: data_set.raw.name)
def test_records_equal_the_references(data_set: DataSet, tmp_path: Path) -> None:
    import tensorflow as tf

    expected = reference_records(data_set)
    own = {sha256(path.read_bytes()) for path in data_set.raw.rglob("*.JPEG")}
    lines = [line for shard in expected.values() for line in shard]
    repaired = {line[0] for line in lines if line[-1] not in own}
    assert (len(lines), len(repaired)) == (data_set.num_images, data_set.num_repaired)
    is_any_encoder = not tf.__version__.startswith(ENCODER)

    def comparable(line: Line) -> Line:
        return line[:-1] if is_any_encoder and line[0] in repaired else line

    def line_of(record: contract.Record) -> Line:
        *features, encoded = dataclasses.astuple(record)
        return comparable([*features, sha256(encoded)])

    found = {
        name: [line_of(record) for record in records]
        for name, records in written_records(data_set.raw, tmp_path).items()
    }
    assert found == {k: [comparable(line) for line in expected[k]] for k in expected}


def test_repaired_images_look_like_the_references(tmp_path: Path) -> None:
    """With any TensorFlow: compared as pixels, within `TOLERANCE`."""
    one_each = ("--training_shards=1", "--validation_shards=1")
    shards = written_records(GOLDEN / "raw", tmp_path, *one_each)
    encoded = {r.filename: r.encoded for records in shards.values() for r in records}
    expected = sorted((GOLDEN / "repaired").iterdir())
    assert len(expected) == 6
    for path in expected:
        image, wanted = Image.open(io.BytesIO(encoded[path.name])), Image.open(path)
        assert (image.format, image.mode) == ("JPEG", "RGB")
        pixels = np.asarray(image, np.float64) - np.asarray(wanted, np.float64)
        assert np.abs(pixels).mean() <= TOLERANCE, path.name
