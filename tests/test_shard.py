"""One shard, complete or absent, and its stamp."""

import base64
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import contract
import google_crc32c
import pytest
from processes import copy_tree

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


def write_shard(shard: script.Shard, scratch: Path) -> script.Stamp:
    return script.write_shard(shard, str(scratch), script.write_records, durable=True)


def path_of(shard: script.Shard, scratch: Path) -> Path:
    return scratch / shard.split / shard.name


def find_finished(shard: script.Shard, scratch: Path) -> script.Stamp | None:
    options = script.Options(Path(__file__).parent, False, None, None, scratch)
    job = script.Job(options, {}, [shard], None)
    return script.find_work(job).done.get(shard.name)


def stamp_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


# ------------------------------------------------------------------- the file format


@pytest.mark.parametrize("records", [RECORDS, []], ids=["some", "none"])
def test_records_are_as_tensorflow_writes_them(
    tmp_path: Path, records: list[bytes]
) -> None:
    import tensorflow as tf

    path = tmp_path / "records"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    assert path.read_bytes() == b"".join(map(script.framed, records))


# ------------------------------------------------------------------------ one shard


def test_shard_is_the_contracts(mixed_raw: Path, tmp_path: Path) -> None:
    shards = plan(mixed_raw)
    for shard in shards:
        write_shard(shard, tmp_path)
    contract.assert_shards(contract.local_shards(tmp_path), mixed_raw, 2, 1)
    names = [shard.name for shard in shards]
    assert files_in(tmp_path) == sorted([*names, *(f".{name}.json" for name in names)])


def test_shard_is_empty_when_it_has_no_images(raw: Path, tmp_path: Path) -> None:
    shard = plan(raw, 20)[-2]
    stamp = write_shard(shard, tmp_path)
    assert path_of(shard, tmp_path).read_bytes() == b""
    assert (stamp.num_examples, stamp.num_bytes, stamp.crc32c) == (0, 0, "AAAAAA==")
    assert find_finished(shard, tmp_path) == stamp


def test_stamp_says_what_the_shard_is(mixed_raw: Path, tmp_path: Path) -> None:
    shard = plan(mixed_raw, 1)[0]
    stamp = write_shard(shard, tmp_path)
    path = path_of(shard, tmp_path)
    sources = [Path(image.path).read_bytes() for image in shard.images]
    records = contract.read_shard(path)
    changed = sum(r.encoded != s for r, s in zip(records, sources, strict=True))
    assert changed == 6
    assert stamp == script.Stamp(
        digest=shard.digest(),
        num_examples=21,
        num_bytes=path.stat().st_size,
        crc32c=crc32c_of(path),
        num_repaired=changed,
        fingerprint=shard.fingerprint(),
        mtime_ns=path.stat().st_mtime_ns,
    )
    assert json.loads(stamp_of(path).read_text()) == dataclasses.asdict(stamp)
    assert find_finished(shard, tmp_path) == script.read_stamp(str(path)) == stamp


def test_stamps_hold_the_same_bytes_whatever_they_were_written_for(
    mixed_raw: Path, tmp_path: Path
) -> None:
    raw = copy_tree(mixed_raw, tmp_path / "raw")
    first, second = plan(raw)[:2]
    written = write_shard(first, tmp_path / "a")
    again = write_shard(first, tmp_path / "b")
    os.utime(first.images[0].path)
    touched = write_shard(plan(raw)[0], tmp_path / "c")
    other = write_shard(second, tmp_path / "a")
    assert written.same_bytes(again)
    assert written.same_bytes(touched)
    assert written.fingerprint != touched.fingerprint
    assert not written.same_bytes(other)
    paths = [path_of(first, tmp_path / name) for name in "abc"]
    assert len({path.read_bytes() for path in paths}) == 1


def test_planned_size_is_about_that_of_the_shard(raw: Path, tmp_path: Path) -> None:
    """The check of the disk's room counts with it."""
    for shard in plan(raw):
        size = write_shard(shard, tmp_path).num_bytes
        assert size <= shard.estimated_bytes < size * 1.2


@pytest.mark.parametrize("is_there", [False, True], ids=["absent", "there"])
def test_shard_is_as_before_when_images_turn_bad(
    raw: Path, tmp_path: Path, is_there: bool
) -> None:
    """All bad images are named, and what is there is not taken for the new shard."""
    scratch = tmp_path / "scratch"
    if is_there:
        write_shard(plan(raw)[-1], scratch)
    before = {path: path.read_bytes() for path in scratch.glob("*/validation-*")}
    bad = [raw / f"validation/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 3)]
    for path in bad:
        path.write_bytes(b"<html>")
    shard = plan(raw)[-1]
    with pytest.raises(script.BadImagesError) as caught:
        write_shard(shard, scratch)
    said = str(caught.value).splitlines()
    for line, path in zip(said, bad, strict=True):
        assert str(path) in line
        assert "<htm" in line
    assert find_finished(shard, scratch) is None
    left = [path for path in scratch.rglob("*") if path.suffix not in ("", ".json")]
    assert left == []
    after = {path: path.read_bytes() for path in scratch.glob("*/validation-*")}
    assert after == before


def test_failed_write_names_its_file(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "train").touch()
    with pytest.raises(script.MachineError) as caught:
        write_shard(plan(raw)[0], tmp_path)
    path = f"{tmp_path}/train/{plan(raw)[0].name}"
    assert str(caught.value) == (
        f"Cannot write {path}: File exists. Fix this and rerun the same command."
    )


# ------------------------------------------------------------------------ the stamp

Spoil = Callable[[Path], object]


def change_stamp(**changes: object) -> Spoil:
    """Returns what gives some values of a stamp others, or removes them (None)."""

    def change(shard: Path) -> None:
        stamp = {**json.loads(stamp_of(shard).read_text()), **changes}
        rest = {key: value for key, value in stamp.items() if value is not None}
        stamp_of(shard).write_text(json.dumps(rest))

    return change


def replace_stamp(content: bytes) -> Spoil:
    return lambda shard: stamp_of(shard).write_bytes(content)


def replace_by(make: Callable[[Path], object]) -> Spoil:
    def replace(shard: Path) -> None:
        stamp_of(shard).unlink()
        make(stamp_of(shard))

    return replace


def append(shard: Path) -> None:
    status = shard.stat()
    shard.write_bytes(shard.read_bytes() + b"x")
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(Path.unlink, id="no shard"),
        pytest.param(append, id="shard grown"),
        pytest.param(lambda shard: os.truncate(shard, 9), id="shard cut short"),
        pytest.param(
            lambda shard: os.utime(shard, ns=(5, 5)), id="shard of other time"
        ),
        pytest.param(replace_by(lambda stamp: None), id="no stamp"),
        pytest.param(replace_by(Path.mkdir), id="stamp is a directory"),
        pytest.param(replace_by(os.mkfifo), id="stamp is a pipe"),
        pytest.param(replace_stamp(b""), id="stamp is empty"),
        pytest.param(replace_stamp(b'{"digest": "'), id="stamp is cut short"),
        pytest.param(replace_stamp(bytes(200)), id="stamp is zeros"),
        pytest.param(replace_stamp(b"\xff\xfe\xfd"), id="stamp is not UTF-8"),
        pytest.param(replace_stamp(b"null"), id="stamp is null"),
        pytest.param(replace_stamp(b'"versions"'), id="stamp is a text"),
        pytest.param(replace_stamp(b"[1, 2]"), id="stamp is a list"),
        pytest.param(replace_stamp(b"[" * 100_000), id="stamp is nested"),
        pytest.param(replace_stamp(b"{}"), id="stamp says nothing"),
        pytest.param(change_stamp(digest=None), id="stamp says no digest"),
        pytest.param(change_stamp(digest="0" * 64), id="stamp of another plan"),
        pytest.param(change_stamp(num_bytes=1), id="stamp says another size"),
        pytest.param(change_stamp(num_bytes="1"), id="stamp says no number"),
        pytest.param(change_stamp(mtime_ns=1), id="stamp says another time"),
    ],
)
def test_shard_is_not_finished_when_it_is_not_as_stamped(
    raw: Path, tmp_path: Path, spoil: Spoil
) -> None:
    shard = plan(raw)[0]
    write_shard(shard, tmp_path)
    assert find_finished(shard, tmp_path)
    path = path_of(shard, tmp_path)
    spoil(path)
    assert find_finished(shard, tmp_path) is None


def test_stamp_of_2_0_is_understood(raw: Path, tmp_path: Path) -> None:
    """It called the fingerprint versions; its shards are not written again."""
    shard = plan(raw)[0]
    stamp = write_shard(shard, tmp_path)
    change = change_stamp(fingerprint=None, versions=stamp.fingerprint)
    change(path_of(shard, tmp_path))
    assert find_finished(shard, tmp_path) == stamp


def test_shard_is_written_again_when_its_stamp_is_of_1_0(
    raw: Path, tmp_path: Path
) -> None:
    """It had neither the times nor the fingerprint."""
    shard = plan(raw)[0]
    write_shard(shard, tmp_path)
    change_stamp(mtime_ns=None, fingerprint=None)(path_of(shard, tmp_path))
    assert find_finished(shard, tmp_path) is None
