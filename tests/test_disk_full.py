"""Tests that a full disk costs no more than the shards that did not fit."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import contract
import pytest
from command import run_command
from processes import (
    contents,
    finished_shards,
    identities,
    pad,
    small_disk,
    started,
)

SHARDS = ("--training_shards=4", "--validation_shards=2")


def flags_of(raw: Path, scratch: Path) -> list[str]:
    return [
        f"--raw_data_dir={raw}",
        f"--local_scratch_dir={scratch}",
        "--nogcs_upload",
        "--num_workers=1",
        *SHARDS,
    ]


def assert_finishes(raw: Path, scratch: Path) -> None:
    """Runs the same command again, with room now."""
    finished, before = finished_shards(scratch), identities(scratch)
    done = run_command(*flags_of(raw, scratch))
    assert done.status == 0, done.stderr
    after = identities(scratch)
    assert [name for name in finished if after[name] != before[name]] == []
    contract.assert_shards(contents(scratch), raw, 4, 2)
    assert not list(scratch.rglob(".*.tmp"))


@pytest.mark.parametrize("free", [2_000_000, 5_000_000, 8_000_000])
def test_finished_shards_are_kept_when_disk_fills_up(
    raw: Path, tmp_path: Path, free: int
) -> None:
    """Somebody else fills the disk of 20 MB once the run has begun.

    Each shard takes 3 MB of it.
    """
    pad(raw, 1_000_000, "train/*/*.JPEG")
    with small_disk(tmp_path / "disk", 20_480_000) as disk:
        scratch = disk / "scratch"
        other = disk / "other"
        with started(*flags_of(raw, scratch)) as run:
            while not (scratch / ".lock").exists():
                assert run.process.poll() is None, run.output()
            with other.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 20_480_000 - free)
            done = run.finish()
        assert done.status == 1
        [error] = done.errors
        assert done.lines[-1] == f"ERROR: {error}"
        index = free // 3_000_000
        assert error == (
            f"Cannot write {scratch}/train/train-{index:05}-of-00004: No space left on "
            "device. Finished shards are kept: mend that and run the same command "
            "again."
        )
        training = {n for n in finished_shards(scratch) if n.startswith("train-")}
        assert training == {f"train-{i:05}-of-00004" for i in range(index)}
        assert contents(scratch).keys() == finished_shards(scratch)
        other.unlink()
        assert_finishes(raw, scratch)


def test_run_ends_in_one_line_when_there_is_no_room_for_the_manifest(
    raw: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 20_480_000) as disk:
        scratch = disk / "scratch"
        done = run_command(*flags_of(raw, scratch))
        assert done.status == 0
        (scratch / "manifest.json").unlink()
        before = identities(scratch)
        (disk / "other").write_bytes(b"")
        with (disk / "other").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        done = run_command(*flags_of(raw, scratch))
        assert done.status == 1
        [error] = done.errors
        assert error.startswith(f"Cannot write {scratch}/manifest.json: No space left")
        assert done.lines[-1] == f"ERROR: {error}"
        (disk / "other").unlink()
        assert_finishes(raw, scratch)
        assert identities(scratch) == before
        assert (scratch / "manifest.json").exists()


def test_finished_shards_are_kept_when_a_file_may_not_be_so_large(
    raw: Path, tmp_path: Path
) -> None:
    """A limit of file sizes (`ulimit -f`), which only the third shard exceeds."""
    plan = list(contract.expected_shards(raw, 4, 2).values())
    pad(raw, 1_000_000, str(Path(plan[2][0].path).relative_to(raw)))
    scratch = tmp_path / "scratch"
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, "
    limit += "(500_000,) * 2); os.execv(sys.argv[1], sys.argv[1:])"
    under = [sys.executable, "-c", limit]
    with started(*flags_of(raw, scratch), under=under) as run:
        done = run.finish()
    assert done.status == 1
    assert done.errors == [
        (
            f"Cannot write {scratch}/train/train-00002-of-00004: File too large. "
            "Finished shards are kept: mend that and run the same command again."
        )
    ]
    assert {"train-00000-of-00004", "train-00001-of-00004"} <= finished_shards(scratch)
    assert "train-00002-of-00004" not in contents(scratch)
    assert_finishes(raw, scratch)
