"""Section 5: one shard, complete or absent, and its stamp."""

import base64
import dataclasses
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import contract
import google_crc32c
import pytest

import imagenet_to_gcs as script

RECORDS = [b"", b"a", b"abc" * 1_000, bytes(range(256)) * 5_000]


def crc32c_of(path: Path) -> str:
    value = google_crc32c.value(path.read_bytes())
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def files_in(directory: Path) -> list[str]:
    """Names all files, the hidden ones too."""
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def plan(raw: Path, training: int = 2, validation: int = 1) -> list[script.Shard]:
    return script.plan_shards(script.read_dataset(str(raw)), training, validation)


# ------------------------------------------------------------------- the file format


def write_records(path: Path) -> script.RecordWriter:
    with path.open("wb") as file:
        writer = script.RecordWriter(file)
        for record in RECORDS:
            writer.write(record)
    return writer


def test_records_are_read_by_tensorflow_and_the_contract(tmp_path: Path) -> None:
    import tensorflow as tf

    write_records(tmp_path / "records")
    found = tf.data.TFRecordDataset(str(tmp_path / "records")).as_numpy_iterator()
    assert list(found) == RECORDS
    assert list(contract._payloads((tmp_path / "records").read_bytes())) == RECORDS


def test_records_are_as_tensorflow_writes_them(tmp_path: Path) -> None:
    import tensorflow as tf

    write_records(tmp_path / "ours")
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for record in RECORDS:
            writer.write(record)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_writer_knows_the_size_and_checksum_of_its_file(tmp_path: Path) -> None:
    writer = write_records(tmp_path / "records")
    assert writer.num_bytes == (tmp_path / "records").stat().st_size
    assert script._crc32c_text(writer.crc32c) == crc32c_of(tmp_path / "records")


def test_writer_has_nothing_when_there_are_no_records(tmp_path: Path) -> None:
    with (tmp_path / "records").open("wb") as file:
        writer = script.RecordWriter(file)
    assert (writer.num_bytes, script._crc32c_text(writer.crc32c)) == (0, "AAAAAA==")


# ---------------------------------------------------------------- complete or absent


def test_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "train-00000-of-00001"
    with script._complete_or_absent(str(path)) as file:
        file.write(b"data")
        (hidden,) = files_in(tmp_path)
        assert re.fullmatch(r"\.train-00000-of-00001\..+\.tmp", hidden)
    assert files_in(tmp_path) == ["train-00000-of-00001"]
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize("before", [None, b"old"], ids=["absent", "there"])
@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(28, "No space left"), KeyboardInterrupt()]
)
def test_file_is_as_before_when_writing_fails(
    tmp_path: Path, error: BaseException, before: bytes | None
) -> None:
    path = tmp_path / "train-00000-of-00001"
    if before is not None:
        path.write_bytes(before)
    with (
        pytest.raises(type(error)) as caught,
        script._complete_or_absent(str(path)) as file,
    ):
        file.write(b"half")
        file.flush()
        raise error
    assert caught.value is error
    assert files_in(tmp_path) == ([path.name] if before else [])
    assert before is None or path.read_bytes() == before


def test_failed_write_names_its_file(tmp_path: Path) -> None:
    """A full disk is said by `write`, which does not know the name."""
    path = tmp_path / "train-00000-of-00001"
    with (
        pytest.raises(OSError) as caught,
        script._complete_or_absent(str(path)) as file,
        open("/dev/full", "wb", buffering=0) as full,
    ):
        os.dup2(full.fileno(), file.fileno())
        file.write(bytes(script.WRITE_BUFFER_BYTES + 1))
    assert caught.value.filename == str(path)
    assert caught.value.strerror == "No space left on device"
    assert files_in(tmp_path) == []


def test_failed_write_names_its_file_when_the_directory_is_a_file(
    tmp_path: Path,
) -> None:
    (tmp_path / "train").touch()
    with (
        pytest.raises(OSError) as caught,
        script._complete_or_absent(str(tmp_path / "train/train-00000-of-00001")),
    ):
        pass
    assert caught.value.filename == str(tmp_path / "train")


# ------------------------------------------------------------------------ one shard


def test_shard_is_the_contracts(mixed_raw: Path, tmp_path: Path) -> None:
    for shard in plan(mixed_raw):
        script.write_shard(shard, str(tmp_path))
    contract.assert_shards(contract.local_shards(tmp_path), mixed_raw, 2, 1)
    assert files_in(tmp_path) == [
        ".train-00000-of-00002.json",
        ".train-00001-of-00002.json",
        ".validation-00000-of-00001.json",
        "train-00000-of-00002",
        "train-00001-of-00002",
        "validation-00000-of-00001",
    ]


def test_shard_is_empty_when_it_has_no_images(raw: Path, tmp_path: Path) -> None:
    shard = plan(raw, 20)[-2]
    finished = script.write_shard(shard, str(tmp_path))
    assert os.path.getsize(finished.path) == 0
    assert finished.stamp == script.Stamp(shard.digest(), 0, 0, "AAAAAA==", 0)
    assert script.is_complete(shard, str(tmp_path))


def test_stamp_says_what_the_shard_is(mixed_raw: Path, tmp_path: Path) -> None:
    shard = plan(mixed_raw, 1)[0]
    finished = script.write_shard(shard, str(tmp_path))
    path = tmp_path / "train" / "train-00000-of-00001"
    assert finished.path == str(path)
    assert finished.name == "train-00000-of-00001"
    sources = [Path(image.path).read_bytes() for image in shard.images]
    records = contract.read_shard(path)
    changed = sum(r.encoded != s for r, s in zip(records, sources, strict=True))
    assert changed == 6
    assert finished.stamp == script.Stamp(
        digest=shard.digest(),
        num_examples=21,
        num_bytes=path.stat().st_size,
        crc32c=crc32c_of(path),
        num_repaired=changed,
    )
    stamp = json.loads((tmp_path / "train/.train-00000-of-00001.json").read_text())
    assert stamp == dataclasses.asdict(finished.stamp)
    assert script.read_stamp(str(path)) == finished.stamp
    assert script.find_finished(shard, str(tmp_path)) == finished
    assert script.measure(str(path)) == finished


def test_shard_has_the_same_bytes_each_time(mixed_raw: Path, tmp_path: Path) -> None:
    shard = plan(mixed_raw)[0]
    for directory in ("a", "b"):
        script.write_shard(shard, str(tmp_path / directory))
    for name in (f"train/{shard.name}", f"train/.{shard.name}.json"):
        first, second = tmp_path / "a" / name, tmp_path / "b" / name
        assert first.read_bytes() == second.read_bytes()


def test_planned_size_is_about_that_of_the_shard(raw: Path, tmp_path: Path) -> None:
    """The check of the disk's room counts with it."""
    for shard in plan(raw):
        size = script.write_shard(shard, str(tmp_path)).stamp.num_bytes
        assert size <= shard.num_bytes < size * 1.2


def test_shard_is_absent_when_an_image_is_bad(raw: Path, tmp_path: Path) -> None:
    """And all its bad images are named."""
    bad = [raw / f"validation/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 3)]
    for path in bad:
        path.write_bytes(b"<html>")
    shard = plan(raw)[-1]
    with pytest.raises(script.BadImagesError) as caught:
        script.write_shard(shard, str(tmp_path))
    lines = [f"Cannot decode {path}: not a JPEG (starts with b'<htm')." for path in bad]
    assert str(caught.value).splitlines() == lines
    assert files_in(tmp_path / "validation") == []
    assert not script.is_complete(shard, str(tmp_path))


def test_shard_is_incomplete_when_an_image_turns_bad(raw: Path, tmp_path: Path) -> None:
    """What was written of the good image is not taken for the new shard."""
    path = Path(script.write_shard(plan(raw)[-1], str(tmp_path)).path)
    before = path.read_bytes()
    (raw / "validation/ILSVRC2012_val_00000002.JPEG").write_bytes(b"")
    shard = plan(raw)[-1]
    with pytest.raises(script.BadImagesError):
        script.write_shard(shard, str(tmp_path))
    assert path.read_bytes() == before
    assert not script.is_complete(shard, str(tmp_path))


@pytest.mark.parametrize(
    "error",
    [
        script.BadImagesError("Cannot decode /a.JPEG: the file is empty."),
        script.InvalidInputError("one", "two"),
        script.RunError("Another run is writing."),
    ],
)
def test_error_leaves_a_worker_as_it_is(error: Exception) -> None:
    received = pickle.loads(pickle.dumps(error))
    assert (type(received), str(received)) == (type(error), str(error))


# ------------------------------------------------------------------------ the stamp


def change_stamp(shard: Path, **changes: object) -> None:
    stamp = shard.with_name(f".{shard.name}.json")
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), **changes}))


def write_stamp(content: bytes) -> Callable[[Path], None]:
    def write(shard: Path) -> None:
        shard.with_name(f".{shard.name}.json").write_bytes(content)

    return write


def remove_digest(shard: Path) -> None:
    stamp = shard.with_name(f".{shard.name}.json")
    rest = json.loads(stamp.read_text())
    del rest["digest"]
    stamp.write_text(json.dumps(rest))


def grow(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"x")


def shrink(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def remove_stamp(shard: Path) -> None:
    shard.with_name(f".{shard.name}.json").unlink()


def make_stamp_a_directory(shard: Path) -> None:
    remove_stamp(shard)
    shard.with_name(f".{shard.name}.json").mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(Path.unlink, id="no shard"),
        pytest.param(grow, id="shard grown"),
        pytest.param(shrink, id="shard cut short"),
        pytest.param(remove_stamp, id="no stamp"),
        pytest.param(make_stamp_a_directory, id="stamp is a directory"),
        pytest.param(write_stamp(b""), id="stamp is empty"),
        pytest.param(write_stamp(b'{"digest": "'), id="stamp is cut short"),
        pytest.param(write_stamp(bytes(200)), id="stamp is zeros"),
        pytest.param(write_stamp(b"\xff\xfe\xfd"), id="stamp is not UTF-8"),
        pytest.param(write_stamp(b"null"), id="stamp is null"),
        pytest.param(write_stamp(b"[1, 2]"), id="stamp is a list"),
        pytest.param(write_stamp(b"{}"), id="stamp says nothing"),
        pytest.param(remove_digest, id="stamp says no digest"),
        pytest.param(lambda shard: change_stamp(shard, more=1), id="stamp says more"),
        pytest.param(lambda shard: change_stamp(shard, num_bytes=1), id="other size"),
        pytest.param(lambda shard: change_stamp(shard, num_bytes="1"), id="no number"),
    ],
)
def test_stamp_is_none_when_wrong(
    raw: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    shard = plan(raw)[0]
    path = Path(script.write_shard(shard, str(tmp_path)).path)
    assert script.is_complete(shard, str(tmp_path))
    spoil(path)
    assert script.read_stamp(str(path)) is None
    assert script.find_finished(shard, str(tmp_path)) is None
    assert not script.is_complete(shard, str(tmp_path))


def test_only_the_shard_of_a_changed_image_is_incomplete(
    raw: Path, tmp_path: Path
) -> None:
    shards = plan(raw, 4, 2)
    for shard in shards:
        script.write_shard(shard, str(tmp_path))
    os.utime(shards[2].images[1].path, ns=(1, 1))
    complete = [script.is_complete(s, str(tmp_path)) for s in plan(raw, 4, 2)]
    assert complete == [True, True, False, True, True, True]


def test_shard_is_complete_when_the_raw_directory_has_moved(
    raw: Path, tmp_path: Path
) -> None:
    for shard in plan(raw):
        script.write_shard(shard, str(tmp_path))
    raw.rename(tmp_path / "moved")
    for shard in plan(tmp_path / "moved"):
        assert script.is_complete(shard, str(tmp_path))


def test_measure_reads_a_file_without_a_stamp(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001"
    path.write_bytes(bytes(range(256)) * 10_000)
    stamp = script.measure(str(path)).stamp
    assert (stamp.num_bytes, stamp.crc32c) == (2_560_000, crc32c_of(path))
    assert stamp.digest == ""
