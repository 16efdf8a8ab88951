"""With --nokeep_local_shards a small disk is enough, however slow the upload is."""

import os
import time
from pathlib import Path

import contract
import pytest
from command import UPLOAD, Finished, run_command
from emulator import Emulator, WrongContent
from processes import started, wait_for

UPLOAD_THREADS = 8
SHARDS = 64  # 60 training and 4 validation shards, of one image each
COMPLETE = f"The data set is complete: {SHARDS} shards of {SHARDS} images"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw ImageNet that no test changes: 60 + 4 images."""
    return contract.make_raw(tmp_path_factory.mktemp("small") / "raw", 4, 15, 4)


def flags(raw: Path, scratch: Path, *more: str) -> list[str]:
    """Flags of a run with --nokeep_local_shards, unless `more` says otherwise."""
    return [
        f"--raw_data_dir={raw}",
        f"--local_scratch_dir={scratch}",
        *UPLOAD,
        "--training_shards=60",
        "--validation_shards=4",
        "--num_workers=1",
        "--nokeep_local_shards",
        *more,
    ]


def run(raw: Path, scratch: Path, emulator: Emulator, *more: str) -> Finished:
    return run_command(*flags(raw, scratch, *more), env=emulator.environment)


def on_disk(scratch: Path) -> list[str]:
    """Lists the shards in a scratch directory, half-written ones too."""
    names: list[str] = []
    for split in ("train", "validation"):
        if (scratch / split).is_dir():
            names += os.listdir(scratch / split)
    return [n for n in names if not (n.startswith(".") and ".json" in n)]


def stamps(scratch: Path) -> int:
    return len(list(scratch.glob("*/.*-of-*.json")))


def uploaded(emulator: Emulator) -> dict[str, bytes]:
    """Returns the shards in the bucket by base name."""
    return {
        name.removeprefix("imagenet/"): data
        for name, data in emulator.objects().items()
        if "-of-" in name
    }


@pytest.fixture
def watched(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> tuple[list[int], Finished]:
    """A run with a slow upload, and how many shards lay on the disk at each look."""
    emulator.latency = 0.25
    scratch = tmp_path / "scratch"
    counts = []
    with started(*flags(raw, scratch), env=emulator.environment) as running:
        while running.process.poll() is None:
            counts.append(len(on_disk(scratch)))
            time.sleep(0.005)
        return counts, running.finish()


def test_disk_holds_few_shards_when_the_upload_is_slow(
    raw: Path,
    tmp_path: Path,
    emulator: Emulator,
    watched: tuple[list[int], Finished],
) -> None:
    counts, finished = watched
    assert finished.status == 0, finished.stderr
    assert COMPLETE in finished.stderr
    # Encoding is much faster than such an upload: it reaches the bound, and waits.
    assert max(counts) == 1 + 2 * UPLOAD_THREADS
    assert on_disk(tmp_path / "scratch") == []
    assert stamps(tmp_path / "scratch") == SHARDS
    contract.assert_shards(uploaded(emulator), raw, 60, 4)
    assert (tmp_path / "scratch/manifest.json").read_bytes() == (
        emulator.objects()["imagenet/manifest.json"]
    )

    num_requests = len(emulator.requests)
    again = run(raw, tmp_path / "scratch", emulator)
    kinds = {request.kind for request in emulator.requests[num_requests + 2 :]}
    assert again.status == 0
    line = f"Resuming: {SHARDS} of {SHARDS} shards are up to date, 0 only to be"
    assert any(each.startswith(line) for each in again.lines)
    assert kinds == {"list"}, "something was uploaded again"


def test_shards_are_made_again_when_the_bucket_lost_them(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    assert run(raw, tmp_path, emulator).status == 0
    before = emulator.objects()
    emulator.delete("imagenet/train-00007-of-00060")
    emulator.corrupt("imagenet/train-00008-of-00060")
    emulator.corrupt("imagenet/validation-00002-of-00004", truncate=True)
    again = run(raw, tmp_path, emulator)
    assert again.status == 0
    assert any(line.startswith("Writing 3 shards of 3 images ") for line in again.lines)
    assert emulator.objects() == before
    assert on_disk(tmp_path) == []


def test_shard_is_made_again_when_the_bucket_took_it_wrongly(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    """The answer to the upload looks right: only the closing check sees it."""
    fault = WrongContent(answer_looks_right=True)
    emulator.inject(fault, at=1, name="train-00007-of-00060")
    finished = run(raw, tmp_path, emulator)
    assert finished.errors == [
        (
            f"All {SHARDS} objects in gs://bucket/imagenet must be as written; found 1 "
            "missing or different: train-00007-of-00060. Run the same command again: "
            "it uploads them again."
        )
    ]
    assert finished.status == 1
    assert run(raw, tmp_path, emulator).status == 0
    contract.assert_shards(uploaded(emulator), raw, 60, 4)
    assert on_disk(tmp_path) == []


def test_shards_leave_when_an_earlier_run_kept_them(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    assert run(raw, tmp_path, emulator, "--keep_local_shards").status == 0
    assert len(on_disk(tmp_path)) == SHARDS
    assert run(raw, tmp_path, emulator).status == 0
    assert on_disk(tmp_path) == []


def test_run_goes_on_when_it_was_killed(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    emulator.latency = 0.2
    with started(*flags(raw, tmp_path), env=emulator.environment) as running:
        wait_for(lambda: len(uploaded(emulator)) >= 12, running)
        running.process.kill()
        running.wait_until_gone()
    there = uploaded(emulator)
    assert 0 < len(there) < SHARDS
    emulator.latency = 0
    finished = run(raw, tmp_path, emulator)
    assert finished.status == 0, finished.stderr
    assert on_disk(tmp_path) == []
    contract.assert_shards(uploaded(emulator), raw, 60, 4)
    assert "imagenet/manifest.json" in emulator.objects()


def test_error_names_the_flag_when_there_is_no_upload(
    raw: Path, tmp_path: Path
) -> None:
    finished = run_command(
        f"--raw_data_dir={raw}",
        f"--local_scratch_dir={tmp_path / 'scratch'}",
        "--nogcs_upload",
        "--nokeep_local_shards",
    )
    assert finished.lines == ["ERROR: --nokeep_local_shards must go with an upload."]
    assert finished.status == 1
    assert not (tmp_path / "scratch").exists()
