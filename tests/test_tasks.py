"""Many machines make one data set: each takes the shards of its number."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import contract
import pytest
from command import UPLOAD, Finished, run_command
from emulator import Emulator, Status
from processes import Run, kinds, started, uploads, wait_for

import imagenet_to_gcs

TASKS = 3
SHARDS = 13  # 8 training and 5 validation shards
COMPLETE = f"The data set is complete: 29 images in {SHARDS} shards "


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
        running = []
        for i, directory in enumerate(directories):
            command = flags(mixed_raw, directory, *task(i))
            run = started(*command, env=emulator.environment)
            running.append(stack.enter_context(run))
        finished = [each.finish() for each in running]
    assert [each.status for each in finished] == [0] * TASKS, finished
    assert emulator.objects() == whole
    assert any(each.says(f"^{COMPLETE}") for each in finished), finished
    assert not any(each.says("Resuming|up to date") for each in finished)
    for i, directory in enumerate(directories):
        shards = contract.local_shards(directory)
        assert all(whole[f"imagenet/{name}"] == data for name, data in shards.items())
        numbers = {int(name.split("-")[1]) % TASKS for name in shards}
        assert numbers == (set(range(TASKS)) if is_shared else {i})


def test_manifest_is_written_by_the_last_when_a_task_was_killed(
    mixed_raw: Path, whole: dict[str, bytes], emulator: Emulator, tmp_path: Path
) -> None:
    """A shard that cannot be uploaded keeps it from coming to its end."""
    name = "train-00001-of-"
    emulator.inject(Status(503), kind="chunk", at=1, times=None, name=name)
    lost = flags(mixed_raw, tmp_path, *task(1))
    with started(*lost, env=emulator.environment) as running:
        wait_for(lambda: any("-of-" in name for name in emulator.objects()), running)
        running.process.kill()
        running.wait_until_gone()
    emulator.settle()
    emulator.heal()
    for i in (0, 2):
        finished = run(mixed_raw, tmp_path, emulator, *task(i))
        assert finished.status == 0
        assert re.search(r"others have yet to finish \d+ shards\.", finished.lines[-1])
    assert "imagenet/manifest.json" not in emulator.objects()
    assert not (tmp_path / "manifest.json").exists()

    missing = len(whole) - len(emulator.objects()) - 1
    asked = run(mixed_raw, tmp_path, emulator, *task(0), "--dry_run")
    assert asked.status == 0
    assert asked.says(rf"Task 0 of 3\..* {missing} of {SHARDS} shards")
    assert "imagenet/manifest.json" not in emulator.objects()

    finished = run(mixed_raw, tmp_path, emulator, *task(1))
    assert finished.status == 0
    assert finished.lines[-1].startswith(COMPLETE)
    assert emulator.objects() == whole
    manifest = (tmp_path / "manifest.json").read_bytes()
    assert manifest == whole["imagenet/manifest.json"]
    assert not list(tmp_path.glob("**/.*.tmp")), "half-written files are left"


def test_tasks_agree_when_their_copies_have_other_times(
    mixed_raw: Path, whole: dict[str, bytes], emulator: Emulator, tmp_path: Path
) -> None:
    """And a third machine finds nothing to do."""
    copy = shutil.copytree(mixed_raw, tmp_path / "raw")
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    for i, raw in enumerate((mixed_raw, copy)):
        finished = run(raw, tmp_path / f"{i}", emulator, *task(i, 2))
        assert finished.status == 0, finished.stderr
    assert finished.says(COMPLETE)
    assert emulator.objects() == whole
    uploaded = uploads(emulator)
    finished = run(copy, tmp_path / "new", emulator)
    assert finished.status == 0, finished.stderr
    assert finished.says(COMPLETE)
    assert uploads(emulator) == uploaded


def test_manifest_is_removed_when_a_task_sees_that_a_shard_is_missing(
    mixed_raw: Path, emulator: Emulator, tmp_path: Path
) -> None:
    """Its own shards are all there: it has nothing to do."""
    assert run(mixed_raw, tmp_path, emulator).status == 0
    emulator.delete("imagenet/train-00001-of-00008")
    (tmp_path / "train" / "train-00001-of-00008").unlink()
    finished = run(mixed_raw, tmp_path, emulator, *task(0))
    assert finished.status == 0
    assert finished.lines[-1].endswith("others have yet to finish 1 shard.")
    assert "imagenet/manifest.json" not in emulator.objects()
    assert not (tmp_path / "manifest.json").exists()


def test_work_is_the_rest_when_other_tasks_of_another_count_ran(
    mixed_raw: Path, whole: dict[str, bytes], emulator: Emulator, tmp_path: Path
) -> None:
    assert run(mixed_raw, tmp_path, emulator, *task(0, 2)).status == 0
    finished = run(mixed_raw, tmp_path, emulator)
    assert finished.status == 0
    assert finished.says(f"7 of {SHARDS} shards up to date")
    assert emulator.objects() == whole


@pytest.mark.parametrize("is_local", [False, True], ids=["bucket", "scratch"])
def test_tasks_are_told_when_their_images_differ(
    mixed_raw: Path, emulator: Emulator, tmp_path: Path, is_local: bool
) -> None:
    """A warning while a task has not come so far, an error once all have."""
    copy = shutil.copytree(mixed_raw, tmp_path / "raw")
    next(copy.glob("train/*/*.JPEG")).unlink()
    place = tmp_path / "shared" if is_local else "gs://bucket/imagenet"

    def run_task(raw: Path, index: int, *more: str) -> Finished:
        scratch = tmp_path / ("shared" if is_local else str(index))
        no_upload = ["--nogcs_upload"] if is_local else []
        return run(raw, scratch, emulator, *task(index), *no_upload, *more)

    def differ(number: int, first: str) -> str:
        return (
            rf"{place} has {number} shards of other tasks \({first}.*\) of other images "
            "than here: the machines' raw directories differ, unless a task is still "
            "replacing them"
        )

    assert run_task(mixed_raw, 0).status == 0
    for more in (["--dry_run"], []):
        done = run_task(copy, 1, *more)
        assert done.status == 0, done.stderr
        assert done.says(f"^WARNING: {differ(3, 'train-00000-of')}")
    for index in (2, 2, 0):
        done = run_task(mixed_raw, index)
        assert done.says(f"^WARNING: {differ(2, 'train-00001-of')}")
        assert done.status == 75  # a task may still be replacing them
        assert done.errors == [
            (
                f"Other tasks made 2 shards in {place} of other images. Wait for them, "
                "or give all tasks the same raw images, and rerun."
            )
        ]
    assert not (tmp_path / "shared" / "manifest.json").exists()
    assert "imagenet/manifest.json" not in emulator.objects()

    assert run_task(mixed_raw, 1).status == 0
    assert run_task(mixed_raw, 0).says(COMPLETE)


def test_task_ends_well_when_it_has_no_shards(
    mixed_raw: Path, emulator: Emulator, tmp_path: Path
) -> None:
    finished = run(mixed_raw, tmp_path, emulator, *task(99, 100))
    assert finished.status == 0, finished.stderr
    assert finished.lines[-1].endswith(f"others have yet to finish {SHARDS} shards.")


def test_manifest_is_whole_when_tasks_write_it_at_once(tmp_path: Path) -> None:
    """Two tasks that end together both write manifest.json, the same bytes.

    Whoever reads it meanwhile finds all of it.
    """
    path = tmp_path / "manifest.json"
    text = "x" * 100_000

    def write(_: int) -> None:
        imagenet_to_gcs.write_text(str(path), text)
        assert path.read_text() == text

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(200)))  # raises what a thread raised
    assert os.listdir(tmp_path) == ["manifest.json"]


# ---------------------------------------------------------------- locks


@contextlib.contextmanager
def halted(*command: str, env: dict[str, str] | None = None) -> Iterator[Run]:
    """Starts a run, and halts it once it has its lock, and says what it found."""
    with started(*command, env=env) as running:
        wait_for(running.output, running)
        os.killpg(running.pid, signal.SIGSTOP)
        yield running


@pytest.mark.parametrize(
    ("first", "seconds"),
    [([], [[], task(0, 2)]), (task(0, 2), [task(0, 2), task(1, 3), []])],
    ids=["single", "task"],
)
def test_second_run_is_refused_before_it_plans(
    mixed_raw: Path,
    emulator: Emulator,
    tmp_path: Path,
    first: list[str],
    seconds: list[list[str]],
) -> None:
    """If it is of the same task, or of another number of tasks; the first goes on."""
    command = flags(mixed_raw, tmp_path, *first)
    with halted(*command, env=emulator.environment) as running:
        for second in seconds:
            with Emulator() as other:
                finished = run(mixed_raw, tmp_path, other, *second)
            assert kinds(other) == []
            assert finished.status == 75
            assert finished.lines == [
                (
                    f"ERROR: Another run is writing to {tmp_path}: wait until it ends, "
                    "or choose another --local_scratch_dir."
                )
            ]
        os.killpg(running.pid, signal.SIGCONT)
        assert running.finish().status == 0


def test_second_run_is_refused_while_the_fake_imagenet_is_drawn(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    command = [f"--raw_data_dir={raw}", "--nogcs_upload", "--fake_imagenet"]
    with halted(*command):
        finished = run_command(*command)
    assert finished.status == 75
    [line] = finished.lines
    assert line.startswith(f"ERROR: Another run is writing to {raw}")


@pytest.mark.parametrize("make", ["ln -s mine", "mkdir", "mkfifo"])
def test_lock_is_harmless_whatever_it_is(raw: Path, tmp_path: Path, make: str) -> None:
    """What a link leads to is not emptied, and a pipe is not waited for."""
    mine, lock = tmp_path / "mine", tmp_path / ".lock-0-of-1"
    mine.write_text("precious")
    subprocess.run([*shlex.split(make), lock], cwd=tmp_path, check=True)
    command = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}"]
    finished = run_command(*command, "--nogcs_upload", "--training_shards=4")
    assert mine.read_text() == "precious"
    said = f"Cannot use {lock}: Is a directory. Fix this and rerun the same command."
    assert finished.errors == ([said] if make == "mkdir" else [])
