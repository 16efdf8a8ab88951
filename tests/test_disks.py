"""Disks that are small, full or far, and what a run asks of them."""

import contextlib
import errno
import os
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import contract
import pytest
from command import UPLOAD, Finished, run_command
from emulator import Emulator, Stall
from processes import (
    contents,
    finished_shards,
    held,
    identities,
    kinds,
    pad,
    small_disk,
    started,
    uploads,
    wait_for,
)

import imagenet_to_gcs as script

FEW = ("--training_shards=4", "--validation_shards=2", "--num_workers=1")


def flags(raw: Path, scratch: Path, *more: str) -> list[str]:
    return [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}", *more]


# ------------------------------------------------------------------ a full disk


def local(raw: Path, scratch: Path) -> list[str]:
    return flags(raw, scratch, "--nogcs_upload", *FEW)


def assert_cannot_write(done: Finished, path: str | Path, reason: str) -> None:
    assert done.status == 1
    [error] = done.errors
    assert re.match(f"Cannot write {path}: {reason}", error)
    assert done.lines[-1] == f"ERROR: {error}"


def assert_finishes(raw: Path, scratch: Path) -> None:
    """Runs the same command again, with room now."""
    finished, before = finished_shards(scratch), identities(scratch)
    done = run_command(*local(raw, scratch))
    assert done.status == 0, done.stderr
    after = identities(scratch)
    assert [name for name in finished if after[name] != before[name]] == []
    contract.assert_shards(contents(scratch), raw, 4, 2)
    assert not list(scratch.rglob(".*.tmp"))


def test_run_ends_in_one_line_when_disk_fills_up(raw: Path, tmp_path: Path) -> None:
    """Somebody else fills it once the run has begun; 2 MB are left."""
    pad(raw, 1_000_000, "train/*/*.JPEG")  # 3 MB in each training shard
    with small_disk(tmp_path / "disk", 20_480_000) as disk:
        scratch, other = disk / "scratch", disk / "other"
        go, env = held(tmp_path)
        with started(*local(raw, scratch), env=env) as run:
            wait_for(lambda: "Writing 6 shards" in run.output(), run)
            with other.open("wb") as file:
                free = shutil.disk_usage(disk).free
                os.posix_fallocate(file.fileno(), 0, free - 2_000_000)
            go.touch()
            done = run.finish()
        path = r".*/train-0000\d-of-00004"
        assert_cannot_write(done, path, "No space left on device")
        assert contents(scratch).keys() == finished_shards(scratch)
        other.unlink()
        assert_finishes(raw, scratch)


def test_run_ends_in_one_line_when_there_is_no_room_for_the_manifest(
    raw: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 20_480_000) as disk:
        scratch = disk / "scratch"
        assert run_command(*local(raw, scratch)).status == 0
        (scratch / "manifest.json").unlink()
        before = identities(scratch)
        other = (disk / "other").open("ab", buffering=0)
        with other, contextlib.suppress(OSError):
            while True:
                other.write(bytes(4096))
        done = run_command(*local(raw, scratch))
        assert_cannot_write(done, scratch / "manifest.json", "No space left on device")
        (disk / "other").unlink()
        assert_finishes(raw, scratch)
        assert identities(scratch) == before
        assert (scratch / "manifest.json").exists()


def test_finished_shards_are_kept_when_a_file_may_not_be_so_large(
    raw: Path, tmp_path: Path
) -> None:
    """A limit of file sizes (`ulimit -f`), which only the third shard exceeds."""
    scratch = tmp_path / "scratch"
    assert run_command(*local(raw, scratch)).status == 0
    plan = list(contract.expected_shards(raw, 4, 2).values())
    pad(raw, 1_000_000, str(Path(plan[2][0].path).relative_to(raw)))
    path = scratch / "train" / "train-00002-of-00004"
    path.unlink()
    path.with_name(f".{path.name}.json").unlink()
    before = identities(scratch)
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, "
    limit += "(500_000,) * 2); os.execv(sys.argv[1], sys.argv[1:])"
    with started(*local(raw, scratch), under=[sys.executable, "-c", limit]) as run:
        done = run.finish()
    assert_cannot_write(done, path, "File too large")
    assert finished_shards(scratch) == before.keys()
    assert identities(scratch) == before
    assert_finishes(raw, scratch)


def test_room_is_needed_only_for_what_is_left(raw: Path, tmp_path: Path) -> None:
    """A disk of 4 MB: shards of 3 MB have room, but not twice."""
    pad(raw, 750_000, "train/*/*_1.JPEG")
    with small_disk(tmp_path / "disk", 4_096_000) as disk:
        for _ in range(2):
            done = run_command(*local(raw, disk))
            assert done.status == 0, done.stderr


def test_what_a_stopped_run_left_half_written_makes_room(
    raw: Path, tmp_path: Path
) -> None:
    pad(raw, 750_000, "train/*/*_1.JPEG")
    with small_disk(tmp_path / "disk", 4_096_000) as disk:
        (disk / "train").mkdir()
        (disk / "train/.train-00000-of-00004.x-1-2.tmp").write_bytes(bytes(2_000_000))
        done = run_command(*local(raw, disk))
        assert done.status == 0, done.stderr


def test_old_shards_make_room_for_the_new_ones(raw: Path, tmp_path: Path) -> None:
    """But for one: it goes only when the new one is whole."""
    pad(raw, 250_000, "train/*/*.JPEG")
    with small_disk(tmp_path / "disk", 8_192_000) as disk:
        assert run_command(*local(raw, disk)).status == 0
        before = identities(disk)
        for status, free in ((0, 2_500_000), (1, 500_000)):
            with (disk / "other").open("ab") as file:
                file.write(bytes(shutil.disk_usage(disk).free - free))
            for path in raw.glob("train/*/*.JPEG"):
                os.utime(path)
            done = run_command(*local(raw, disk))
            assert done.status == status, done.stderr
        changed = [n for n, file in identities(disk).items() if file != before[n]]
        assert len([name for name in changed if "train-0" in name]) == 4
    [error] = done.errors
    assert re.fullmatch(
        rf"[\d.]+ KB are needed in {disk}; [\d.]+ KB are free\. Make room for the "
        r"shards, or choose another --local_scratch_dir\.",
        error,
    )


@pytest.mark.parametrize(
    ("old", "is_kept", "needed"),
    [
        pytest.param(0, True, 40, id="all new"),
        pytest.param(1, True, 2, id="all replaced"),
        pytest.param(5, True, 2, id="all replaced, which were larger"),
        pytest.param(1, False, 2, id="replaced, not kept"),
        pytest.param(0, False, 18, id="not kept"),
    ],
)
def test_room_is_that_of_new_shards_less_the_old(
    tmp_path: Path, old: int, is_kept: bool, needed: int
) -> None:
    """Of 40 shards of 10,000 bytes, in multiples of one; two workers."""
    options = script.Options(
        *(str(tmp_path), True, "project", "gs://bucket", None),
        num_workers=2,
        keep_local_shards=is_kept,
    )
    new, replaced = [10_000] * 40, [10_000 * old] * 40
    assert script._needed_room(options, new, replaced) == needed * 10_000


# --------------------------------------------------------------- waiting for a disk

# Python imports it at its start, in every process of a run. Its fsync fails with
# $FSYNC_ERROR (EACCES only where the file is not open for writing, as on SMB), and logs
# the file's name in $FSYNC_LOG.
SITECUSTOMIZE = """
import errno, fcntl, os

def fsync(file):
    file = file if isinstance(file, int) else file.fileno()
    with open(os.environ["FSYNC_LOG"], "a") as log:
        log.write(os.readlink(f"/proc/self/fd/{file}") + "\\n")
    error = int(os.environ["FSYNC_ERROR"])
    is_writable = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    if error and not (error == errno.EACCES and is_writable):
        raise OSError(error, os.strerror(error))

os.fsync = os.fdatasync = fsync
"""


def fsync_environment(directory: Path, log: Path, error: int) -> dict[str, str]:
    """Has the command's fsync fail on demand."""
    (directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
    fsync = {"FSYNC_LOG": str(log), "FSYNC_ERROR": str(error)}
    return {"PYTHONPATH": str(directory), **fsync}


def flushed(log: Path) -> int:
    """How many shards were waited for."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sum("/train/" in line or "/validation/" in line for line in lines)


@pytest.mark.parametrize(
    "error",
    [errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EIO],
    ids=errno.errorcode.get,
)
def test_run_works_when_the_file_system_cannot_flush(
    raw: Path, tmp_path: Path, error: int
) -> None:
    """Unless the disk is broken."""
    scratch, log = tmp_path / "scratch", tmp_path / "log"
    env = fsync_environment(tmp_path, log, error)
    done = run_command(*local(raw, scratch), env=env)
    assert flushed(log)
    if error == errno.EIO:
        assert_cannot_write(done, f"{scratch}/.*", "Input/output error")
        assert contents(scratch) == {}
    else:
        assert done.status == 0, done.stderr
        contract.assert_shards(contents(scratch), raw, 4, 2)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "removed"])
def test_disk_is_waited_for_only_where_the_shard_stays_there(
    raw: Path, tmp_path: Path, emulator: Emulator, keep: bool
) -> None:
    log = tmp_path / "log"
    arguments = flags(raw, tmp_path / "scratch", *UPLOAD, *FEW)
    arguments += [] if keep else ["--nokeep_local_shards"]
    env = fsync_environment(tmp_path, log, 0)
    done = run_command(*arguments, env={**env, **emulator.environment})
    assert done.status == 0, done.stderr
    assert len(uploads(emulator)) == 7
    assert flushed(log) == (6 if keep else 0)


# ---------------------------------------------------- a small disk, a slow upload

BOUND = 1 + 16  # shards on the disk, with one worker
SHARDS = 64  # 60 training and 4 validation shards, of one image each
MANY = ("--training_shards=60", "--validation_shards=4", "--num_workers=1")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A raw ImageNet of 60 + 4 images."""
    return contract.make_raw(tmp_path / "many", 4, 15, 4)


def not_kept(raw: Path, scratch: Path) -> list[str]:
    return flags(raw, scratch, *UPLOAD, *MANY, "--nokeep_local_shards")


def on_disk(scratch: Path) -> list[str]:
    """Lists the shards in a scratch directory, half-written ones too."""
    paths = [*scratch.glob("train/*"), *scratch.glob("validation/*")]
    names = [path.name for path in paths]
    return [n for n in names if not (n.startswith(".") and ".json" in n)]


def test_disk_holds_few_shards_when_the_upload_is_slow(
    many: Path, tmp_path: Path, emulator: Emulator
) -> None:
    """And none when it is over, even if the run was killed in between."""
    emulator.inject(Stall(600), kind="chunk", at=13, times=None)
    command = not_kept(many, tmp_path)
    with started(*command, env=emulator.environment) as run:
        # All are uploaded that can be, and as many as can be wait for an answer.
        wait_for(lambda: kinds(emulator).count("chunk") == 12 + 8, run)
        wait_for(lambda: len(on_disk(tmp_path)) >= BOUND, run)
        time.sleep(1)  # for more, if there were no bound
        assert len(on_disk(tmp_path)) == BOUND
        run.process.kill()
        run.wait_until_gone()
    emulator.heal()
    for _ in range(2):
        done = run_command(*command, env=emulator.environment)
        assert done.status == 0, done.stderr
        assert done.says(
            f"The data set is complete: {SHARDS} images in {SHARDS} shards"
        )
        assert on_disk(tmp_path) == []
        assert len(finished_shards(tmp_path)) == SHARDS
    objects = {n.partition("/")[2]: data for n, data in emulator.objects().items()}
    assert (tmp_path / "manifest.json").read_bytes() == objects.pop("manifest.json")
    contract.assert_shards(objects, many, 60, 4)
    times = Counter(uploads(emulator))
    assert [name for name in objects if times[name] > 1] == []


def test_shards_leave_when_an_earlier_run_kept_them(
    many: Path, tmp_path: Path, emulator: Emulator
) -> None:
    for more, num_left in (("--keep_local_shards", SHARDS), ("--num_workers=2", 0)):
        command = [*not_kept(many, tmp_path), more]
        assert run_command(*command, env=emulator.environment).status == 0
        assert len(on_disk(tmp_path)) == num_left
