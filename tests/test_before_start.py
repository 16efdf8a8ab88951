"""What can be known before the first image is known then, all at once.

What is wrong with the raw directory alone is in test_raw_images.py, with the bucket in
test_gcs.py, with the flags in test_command_line.py.
"""

import os
import re
import subprocess
from pathlib import Path

import contract
import pytest
from command import UPLOAD, run_command
from emulator import Emulator, Status
from processes import kinds, small_disk, started, unprivileged, uploads

SHARDS = ("--training_shards=4", "--validation_shards=2")


def test_all_problems_are_listed_when_there_are_several(
    raw: Path, emulator: Emulator
) -> None:
    emulator.inject(Status(403, "No access."), kind="session", at=1, times=None)
    (raw / "synset_labels.txt").unlink()
    (raw / "validation").rename(raw / "val")
    (raw / "train" / "n09999999").mkdir()
    flags = [f"--raw_data_dir={raw}", *UPLOAD, *SHARDS]
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 1
    for start in (
        f"Cannot read {raw}/synset_labels.txt",
        f"No images match {raw}/train/n09999999/*.JPEG.",
        f"No directory {raw}/validation, ",
        "Cannot use gs://bucket/imagenet/train-00000-of-00004",
    ):
        assert sum(error.startswith(start) for error in done.errors) == 1, done.errors
    assert len(done.errors) == 4
    assert done.lines == [f"ERROR: {error}" for error in done.errors]
    assert not list(raw.rglob("*-of-*"))


def test_what_cannot_be_read_is_named(raw: Path, tmp_path: Path) -> None:
    """A directory of a class, and the list of labels."""
    folder = min((raw / "train").iterdir())
    for path in (folder, raw / "synset_labels.txt"):
        path.chmod(0)
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}/scratch"]
    with started(*flags, "--nogcs_upload", under=unprivileged()) as run:
        done = run.finish()
    assert done.status == 1
    first, second = done.errors
    assert first.startswith(f"Cannot read {raw}/synset_labels.txt: Permission denied.")
    assert second == f"Cannot list {folder}: Permission denied."


# ------------------------------------------------------------- the scratch directory


def test_scratch_is_refused_when_it_has_no_room(raw: Path) -> None:
    """The image is made large without taking any room."""
    os.truncate(next(raw.glob("train/*/*.JPEG")), 2 * 10**9)
    with small_disk(raw / "tf_records", 4_096_000):
        done = run_command(f"--raw_data_dir={raw}", "--nogcs_upload", *SHARDS)
    assert done.status == 1
    assert done.errors == [
        (
            f"2.0 GB are needed in {raw}/tf_records; 4.1 MB are free. Make room for "
            "the shards, or choose another --local_scratch_dir."
        )
    ]


OBSTACLES = {
    "touch parent": "but TMP/parent is no writable directory",
    "ln -s nothing parent": "but TMP/parent is no writable directory",
    "mkdir -m 555 parent": "but TMP/parent is no writable directory",
    "mkdir parent; touch parent/scratch": (
        "but TMP/parent/scratch is no writable directory"
    ),
    "mkdir -p parent/scratch; cd $_; install -m 444 /dev/null .lock-0-of-1": (
        "Cannot use TMP/parent/scratch/.lock-0-of-1: Permission denied"
    ),
}


@pytest.mark.parametrize(
    ("commands", "said", "more"),
    [
        *((*obstacle, ()) for obstacle in OBSTACLES.items()),
        *((*obstacle, ("--dry_run",)) for obstacle in list(OBSTACLES.items())[:4]),
    ],
)
def test_scratch_is_refused_in_one_line_when_it_cannot_be_written(
    raw: Path, tmp_path: Path, commands: str, said: str, more: tuple[str, ...]
) -> None:
    """And no process is left, for TensorFlow's import has hardly begun."""
    contract.change(tmp_path, commands)
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}/parent/scratch"]
    flags += ["--nogcs_upload", *SHARDS, *more]
    with started(*flags, under=unprivileged()) as run:
        done = run.finish()
    [error] = done.errors
    assert re.search(said.replace("TMP", str(tmp_path)), error)
    assert (done.status, done.lines[-1]) == (1, f"ERROR: {error}")
    assert not done.says("Writing ")


@pytest.mark.parametrize("more", [(), ("--dry_run",)], ids=["run", "dry_run"])
def test_scratch_is_refused_when_its_disk_is_read_only(
    raw: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    with small_disk(tmp_path / "disk", 4_096_000) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={disk}/scratch"]
        done = run_command(*flags, "--nogcs_upload", *SHARDS, *more)
    assert done.status == 1
    [error] = done.errors
    scratch = f"--local_scratch_dir={disk}/scratch"
    must = "must be a local directory to write to"
    assert error == f"{scratch} {must}, but {disk} is no writable directory."


# ------------------------------------------------------------------ the bucket


def test_all_is_uploaded_when_listing_is_denied(raw: Path, emulator: Emulator) -> None:
    emulator.inject(Status(403), kind="list", at=1, times=None)
    for _ in range(2):
        num_before = len(uploads(emulator))
        flags = [f"--raw_data_dir={raw}", *UPLOAD, *SHARDS]
        done = run_command(*flags, env=emulator.environment)
        assert (done.status, done.errors) == (0, [])
        [warning] = [line for line in done.lines if line.startswith("WARNING: C")]
        assert "Cannot list gs://bucket/imagenet (storage.objects.list" in warning
        uploaded = uploads(emulator)[num_before:]
        assert len(uploaded) == 7
        assert uploaded[-1] == "manifest.json"


# ------------------------------------------------------------------ --dry_run


def test_dry_run_prints_the_plan_and_writes_nothing(
    raw: Path, emulator: Emulator
) -> None:
    before = sorted(raw.parent.rglob("*"))
    done = run_command(
        f"--raw_data_dir={raw}", *UPLOAD, "--dry_run", env=emulator.environment
    )
    assert done.status == 0
    num_bytes = sum(path.stat().st_size for path in raw.rglob("*.JPEG"))
    found, *warnings, would_write = done.lines
    assert all(line.startswith("WARNING: ") for line in warnings)
    assert found == (
        "Found 12 training images in 4 synsets and 4 validation images "
        f"({num_bytes / 1000:.1f} KB) in {raw}."
    )
    assert would_write == (
        f"Would write 1,152 shards of 16 images ({(num_bytes + 5600) / 1000:.1f} "
        f"KB) to {raw}/tf_records, and from there to gs://bucket/imagenet."
    )
    assert sorted(raw.parent.rglob("*")) == before
    assert kinds(emulator) == ["list", "session"]
    assert emulator.objects() == {}
