"""Many machines make one data set: each takes the shards of its number."""

import contextlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import contract
import pytest
from command import UPLOAD, Finished, run_command
from emulator import Emulator, Stall, Status
from processes import kinds, started, uploads, wait_for

import imagenet_to_gcs

TASKS = 3
SHARDS = 13  # 8 training and 5 validation shards


def flags(raw: Path, scratch: Path, *more: str) -> list[str]:
    return [
        f"--raw_data_dir={raw}",
        f"--local_scratch_dir={scratch}",
        *UPLOAD,
        "--training_shards=8",
        "--validation_shards=5",
        "--num_workers=1",
        *more,
    ]


def task(index: int, count: int = TASKS) -> list[str]:
    return [f"--task_index={index}", f"--task_count={count}"]


def run(raw: Path, scratch: Path, emulator: Emulator, *more: str) -> Finished:
    return run_command(*flags(raw, scratch, *more), env=emulator.environment)


@pytest.fixture(scope="module")
def whole(
    mixed_raw: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a single run puts into the bucket."""
    with Emulator() as emulator:
        finished = run(mixed_raw, tmp_path_factory.mktemp("whole"), emulator)
        assert finished.status == 0, finished.stderr
        return emulator.objects()


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("is_shared", [False, True], ids=["separate", "shared"])
def test_tasks_make_the_bytes_of_a_single_run(
    mixed_raw: Path,
    whole: dict[str, bytes],
    emulator: Emulator,
    tmp_path: Path,
    is_shared: bool,
) -> None:
    directories = [tmp_path / ("all" if is_shared else str(i)) for i in range(TASKS)]
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                started(
                    *flags(mixed_raw, directory, *task(i)), env=emulator.environment
                )
            )
            for i, directory in enumerate(directories)
        ]
        finished = [each.finish() for each in running]
    assert [each.status for each in finished] == [0] * TASKS, finished
    assert emulator.objects() == whole
    ends = sorted(line for each in finished for line in each.lines[-1:])
    complete = [line for line in ends if line.startswith("The data set is complete: ")]
    assert complete, ends
    for i, directory in enumerate(directories):
        shards = contract.local_shards(directory)
        assert all(whole[f"imagenet/{name}"] == data for name, data in shards.items())
        if not is_shared:
            numbers = {int(name.split("-")[1]) % TASKS for name in shards}
            assert numbers == {i}
    if is_shared:
        assert len(contract.local_shards(tmp_path / "all")) == SHARDS


def test_manifest_is_written_by_the_last_when_a_task_was_killed(
    mixed_raw: Path, whole: dict[str, bytes], emulator: Emulator, tmp_path: Path
) -> None:
    emulator.inject(Status(503), kind="chunk", times=None, name="train-00001-of-")
    lost = flags(mixed_raw, tmp_path, *task(1))
    with started(*lost, env=emulator.environment) as running:
        wait_for(lambda: any("-of-" in name for name in emulator.objects()), running)
        running.process.kill()
        running.wait_until_gone()
    emulator.heal()
    for i in (0, 2):
        finished = run(mixed_raw, tmp_path, emulator, *task(i))
        assert finished.status == 0
        assert re.search(r"\d+ shards .* still missing", finished.lines[-1])
    assert "imagenet/manifest.json" not in emulator.objects()
    assert not (tmp_path / "manifest.json").exists()

    missing = len(whole) - len(emulator.objects()) - 1
    asked = run(mixed_raw, tmp_path, emulator, *task(0), "--dry_run")
    assert asked.status == 0
    assert asked.says(rf"Task 0 of 3\..* {missing} of {SHARDS} shards")
    assert "imagenet/manifest.json" not in emulator.objects()

    finished = run(mixed_raw, tmp_path, emulator, *task(1))
    assert finished.status == 0
    assert finished.lines[-1].startswith(
        f"The data set is complete: {SHARDS} shards of 29 images "
    )
    assert emulator.objects() == whole
    manifest = (tmp_path / "manifest.json").read_bytes()
    assert manifest == whole["imagenet/manifest.json"]
    assert not list(tmp_path.glob("**/.*.tmp")), "half-written files are left"


def copied_without_times(raw: Path, target: Path) -> Path:
    shutil.copytree(raw, target, copy_function=shutil.copyfile)
    for path in target.rglob("*"):
        os.utime(path, (1, 1))
    return target


def test_tasks_agree_when_their_copies_have_other_times(
    mixed_raw: Path, whole: dict[str, bytes], emulator: Emulator, tmp_path: Path
) -> None:
    """And a third machine finds nothing to do."""
    copy = copied_without_times(mixed_raw, tmp_path / "raw")
    for i, raw in enumerate((mixed_raw, copy)):
        finished = run(raw, tmp_path / f"{i}", emulator, *task(i, 2))
        assert finished.status == 0, finished.stderr
    assert finished.says("The data set is complete: ")
    assert emulator.objects() == whole
    uploaded = uploads(emulator)
    finished = run(copy, tmp_path / "new", emulator)
    assert finished.status == 0, finished.stderr
    assert finished.says("The data set is complete: ")
    assert uploads(emulator) == uploaded
    assert (
        contract.local_shards(tmp_path / "0")
        .keys()
        .isdisjoint(contract.local_shards(tmp_path / "1"))
    )


def test_manifest_is_removed_when_a_task_sees_that_a_shard_is_missing(
    mixed_raw: Path, emulator: Emulator, tmp_path: Path
) -> None:
    """Its own shards are all there: it has nothing to do."""
    assert run(mixed_raw, tmp_path, emulator).status == 0
    emulator.delete("imagenet/train-00001-of-00008")
    (tmp_path / "train" / "train-00001-of-00008").unlink()
    finished = run(mixed_raw, tmp_path, emulator, *task(0))
    assert finished.status == 0
    assert re.search(r"1 shard .* still missing", finished.lines[-1])
    assert "imagenet/manifest.json" not in emulator.objects()
    assert not (tmp_path / "manifest.json").exists()


def test_work_is_the_rest_when_other_tasks_of_another_count_ran(
    mixed_raw: Path, whole: dict[str, bytes], emulator: Emulator, tmp_path: Path
) -> None:
    assert run(mixed_raw, tmp_path, emulator, *task(0, 2)).status == 0
    finished = run(mixed_raw, tmp_path, emulator)
    assert finished.status == 0
    assert finished.says(f"7 of {SHARDS} shards are up to date")
    assert emulator.objects() == whole


def test_task_is_told_when_it_is_fresh(
    mixed_raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    finished = run(mixed_raw, tmp_path, emulator, *task(2), "--dry_run")
    assert finished.status == 0
    assert not finished.says("Resuming|up to date")
    assert finished.says(rf"Task 2 of 3\..* {SHARDS} of {SHARDS} shards")
    assert finished.says("^Would write 3 shards of ")


def test_task_ends_well_when_it_has_no_shards(
    mixed_raw: Path, emulator: Emulator, tmp_path: Path
) -> None:
    finished = run(mixed_raw, tmp_path, emulator, *task(99, 100))
    assert finished.status == 0, finished.stderr
    assert re.search(rf"{SHARDS} shards .* still missing", finished.lines[-1])


def test_manifest_is_whole_when_tasks_write_it_at_once(tmp_path: Path) -> None:
    """Two tasks that end together both write manifest.json, the same bytes."""
    path = tmp_path / "manifest.json"
    text = "x" * 100_000

    def write(_: int) -> None:
        imagenet_to_gcs.write_text(str(path), text)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(200)))  # raises what a thread raised
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["manifest.json"]


# ---------------------------------------------------------------- locks


@pytest.mark.parametrize(
    ("first", "seconds"),
    [
        ([], [task(0, 2)]),
        (task(0, 2), [task(0, 2), task(1, 3), []]),
    ],
    ids=["single", "task"],
)
def test_second_run_is_refused_before_it_plans(
    mixed_raw: Path,
    emulator: Emulator,
    tmp_path: Path,
    first: list[str],
    seconds: list[list[str]],
) -> None:
    """Where it is of the same task, or of another number of tasks."""
    emulator.inject(Stall(600), kind="chunk", at=1, times=None)
    flags_of_first = flags(mixed_raw, tmp_path, *first)
    with started(*flags_of_first, env=emulator.environment) as running:
        wait_for(lambda: "chunk" in kinds(emulator), running)
        num_requests = len(kinds(emulator))
        for second in seconds:
            finished = run(mixed_raw, tmp_path, emulator, *second)
            assert finished.status == 1
            [line] = finished.lines
            assert line.startswith("ERROR: ")
            assert str(tmp_path) in line
        assert set(kinds(emulator)[num_requests:]) <= {"chunk", "session"}


def test_second_run_is_refused_while_the_fake_imagenet_is_drawn(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    command = [f"--raw_data_dir={raw}", "--nogcs_upload", "--fake_imagenet"]
    with started(*command) as running:
        wait_for((raw / ".fake_imagenet").exists, running)
        finished = run_command(*command, timeout=60)
        assert running.process.poll() is None
    assert finished.status == 1
    [line] = finished.lines
    assert line.startswith(f"ERROR: Another run is writing to {raw}")


def test_lock_is_refused_when_it_is_a_link(mixed_raw: Path, tmp_path: Path) -> None:
    """What it leads to is not emptied."""
    mine, scratch = tmp_path / "mine", tmp_path / "scratch"
    mine.write_text("precious")
    scratch.mkdir()
    (scratch / ".lock-0-of-1").symlink_to(mine)
    command = [f"--raw_data_dir={mixed_raw}", f"--local_scratch_dir={scratch}"]
    finished = run_command(*command, "--nogcs_upload")
    assert finished.status == 1
    [error] = finished.errors
    assert f"{scratch}/.lock-0-of-1" in error
    assert mine.read_text() == "precious"


def test_lock_is_not_waited_for_when_it_is_a_pipe(raw: Path, tmp_path: Path) -> None:
    """Refused or used, nothing hangs."""
    os.mkfifo(tmp_path / ".lock-0-of-1")
    command = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}"]
    finished = run_command(*command, "--nogcs_upload", timeout=30)
    assert finished.status == 0 or f"{tmp_path}/.lock-0-of-1" in finished.errors[0]
