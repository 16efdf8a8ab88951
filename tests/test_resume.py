"""Tests that a run goes on after anything, with the bytes of one never disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contract
import pytest
from command import UPLOAD, Finished, run_code, run_command
from emulator import Emulator, Stall
from processes import (
    GONE_SECONDS,
    Run,
    contents,
    copy_tree,
    fill,
    finished_shards,
    identities,
    kinds,
    shard_paths,
    started,
    temporary_files,
    uploads,
    wait_for,
)

LARGE_SHARDS = ("--training_shards=100", "--validation_shards=20")
SMALL_SHARDS = ("--training_shards=8", "--validation_shards=4")
WORKERS = "--num_workers=2"


@dataclass(frozen=True)
class Data:
    """A raw directory, and what an undisturbed run makes of it."""

    raw: Path
    scratch: Path

    def flags(self, scratch: Path) -> list[str]:
        return [f"--raw_data_dir={self.raw}", f"--local_scratch_dir={scratch}", WORKERS]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """1,500 CMYK images in 120 shards; to encode them again takes some seconds."""
    directory = tmp_path_factory.mktemp("large")
    raw = contract.make_raw(
        directory / "raw", 40, 30, 300, kinds=("cmyk",), width=320, height=240
    )
    data = Data(raw, directory / "scratch")
    done = run_command(*data.flags(data.scratch), "--nogcs_upload", *LARGE_SHARDS)
    assert done.status == 0, done.stderr
    return data


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """40 images in 12 shards."""
    directory = tmp_path_factory.mktemp("small")
    raw = contract.make_raw(directory / "raw", 6, 5, 10)
    data = Data(raw, directory / "scratch")
    done = run_command(*data.flags(data.scratch), "--nogcs_upload", *SMALL_SHARDS)
    assert done.status == 0, done.stderr
    return data


# ------------------------------------------------------------------ killed


def kill_parent(run: Run) -> None:
    os.kill(run.pid, signal.SIGKILL)


def kill_worker(run: Run) -> None:
    """Kills the worker that started first, or the forkserver if there is none yet."""
    wait_for(lambda: run.workers() or run.forkserver(), run)
    victims = run.workers() or [run.forkserver() or run.pid]
    os.kill(victims[0], signal.SIGKILL)


def kill_parent_and_workers(run: Run) -> None:
    for pid in [run.pid, *run.workers()]:
        os.kill(pid, signal.SIGKILL)


def kill_all(run: Run) -> None:
    os.killpg(run.pid, signal.SIGKILL)


KILLS: list[Callable[[Run], None]] = [
    kill_parent,
    kill_worker,
    kill_parent_and_workers,
    kill_all,
]


def assert_nothing_partial(scratch: Path, undisturbed: dict[str, bytes]) -> None:
    for name, data in contents(scratch).items():
        assert data == undisturbed[name], f"{name} is not complete"


def test_run_finishes_when_killed_20_times(large: Data, tmp_path: Path) -> None:
    """Kills run after run at a random point, of whom the seed says, then lets one be.

    One in four is killed in its first two seconds, in which TensorFlow is imported.
    """
    scratch = tmp_path / "scratch"
    undisturbed = contents(large.scratch)
    num_left = []
    for seed in range(20):
        rng = random.Random(seed)
        before = identities(scratch)
        finished_before = finished_shards(scratch)
        flags = [*large.flags(scratch), "--nogcs_upload", *LARGE_SHARDS]
        with started(*flags) as run:
            if seed % 4 == 3:
                time.sleep(rng.uniform(0, 2))
            else:
                enough = len(finished_before) + rng.randint(0, 4)
                wait_for(lambda: len(finished_shards(scratch)) > enough, run)  # noqa: B023
                time.sleep(rng.uniform(0, 0.05))
            KILLS[rng.randrange(4)](run)
            run.wait_until_gone()
        assert_nothing_partial(scratch, undisturbed)
        assert not (scratch / "manifest.json").exists()
        after = identities(scratch)
        assert {name: after[name] for name in finished_before} == {
            name: before[name] for name in finished_before
        }
        num_left.append(len(temporary_files(scratch)))
    assert any(num_left), "no run was killed in the middle of a shard"
    assert len(finished_shards(scratch)) < len(undisturbed), "nothing is left to do"
    before, finished = identities(scratch), finished_shards(scratch)
    done = run_command(*large.flags(scratch), "--nogcs_upload", *LARGE_SHARDS)
    assert done.status == 0, done.stderr
    assert done.says(f"{len(finished)} of 120 shards are up to date")
    assert not done.says("upload"), "nothing is uploaded without a bucket"
    assert contents(scratch) == undisturbed
    after = identities(scratch)
    assert [name for name in finished if after[name] != before[name]] == []
    assert temporary_files(scratch) == []
    assert (scratch / "manifest.json").read_bytes() == (
        large.scratch / "manifest.json"
    ).read_bytes()


# ------------------------------------------------------------------ signals

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def assert_stopped(done: Finished, number: signal.Signals) -> None:
    assert done.status == STATUS[number]
    [error] = done.errors
    assert re.match(rf"Stopped by {number.name}\b", error)
    assert done.lines[-1] == f"ERROR: {error}"


def signal_parent(run: Run, number: signal.Signals) -> None:
    os.kill(run.pid, number)


def signal_group(run: Run, number: signal.Signals) -> None:
    os.killpg(run.pid, number)


def signal_often(run: Run, number: signal.Signals) -> None:
    """As an impatient user, or `timeout`, that signals its child and then its group."""
    for _ in range(40):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, number)
        time.sleep(0.0005)


@pytest.mark.parametrize("state", ["importing", "encoding"])
@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGTERM, signal_parent),
        (signal.SIGTERM, signal_group),
        (signal.SIGTERM, signal_often),
        (signal.SIGINT, signal_parent),
        (signal.SIGINT, signal_group),
        (signal.SIGINT, signal_often),
        (signal.SIGHUP, signal_group),
        (signal.SIGKILL, signal_group),
    ],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
def test_run_leaves_nothing_behind_when_it_is_stopped(
    large: Data,
    tmp_path: Path,
    number: signal.Signals,
    send: Callable[[Run, signal.Signals], None],
    state: str,
) -> None:
    """No process, no temporary directory, no semaphore, no half of a shard."""
    scratch, temporary = tmp_path / "scratch", tmp_path / "temporary"
    temporary.mkdir()
    flags = [*large.flags(scratch), "--nogcs_upload", *LARGE_SHARDS]
    with started(*flags, env={"TMPDIR": str(temporary)}) as run:
        if state == "importing":
            wait_for(run.forkserver, run)
        else:
            wait_for(lambda: len(finished_shards(scratch)) >= 3, run)
        maps = Path(f"/proc/{run.pid}/maps").read_text()
        send(run, number)
        run.process.wait(GONE_SECONDS)
        done = run.finish()
    if number == signal.SIGKILL:
        assert done.status == -number
    else:
        assert_stopped(done, number)
    assert_nothing_partial(scratch, contents(large.scratch))
    assert list(temporary.iterdir()) == []
    assert "/dev/shm" not in maps


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_run_stops_at_signal_when_uploads_stall(
    large: Data, tmp_path: Path, emulator: Emulator, number: signal.Signals
) -> None:
    emulator.inject(Stall(600), kind="chunk", at=1, times=None)
    flags = [*large.flags(tmp_path / "scratch"), *UPLOAD, *LARGE_SHARDS]
    with started(*flags, env=emulator.environment) as run:
        wait_for(lambda: "chunk" in kinds(emulator), run)
        signal_group(run, number)
        run.process.wait(GONE_SECONDS)
        done = run.finish()
    assert_stopped(done, number)


def test_run_goes_on_when_nohup_keeps_the_hangup_off(
    large: Data, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    flags = [*large.flags(scratch), "--nogcs_upload", *LARGE_SHARDS]
    with started(*flags, under=["nohup"]) as run:
        for enough in (1, 3, 5):
            wait_for(lambda: len(finished_shards(scratch)) >= enough, run)  # noqa: B023
            signal_group(run, signal.SIGHUP)
        done = run.finish()
    assert done.status == 0, done.stderr
    assert done.errors == []
    assert contents(scratch) == contents(large.scratch)


def test_run_says_so_when_forkserver_is_killed_at_its_start(
    large: Data, tmp_path: Path
) -> None:
    """Or it has started another one, and ends well."""
    scratch = tmp_path / "scratch"
    with started(*large.flags(scratch), "--nogcs_upload", *LARGE_SHARDS) as run:
        wait_for(run.forkserver, run)
        os.kill(run.forkserver() or run.pid, signal.SIGKILL)
        done = run.finish()
    if done.status:
        assert done.status == 1
        [error] = done.errors
        assert re.match("A worker process was killed, .* memory", error)
        assert done.lines[-1] == f"ERROR: {error}"


# ------------------------------------------------------------------ two runs


def test_second_run_ends_when_another_is_writing(large: Data, tmp_path: Path) -> None:
    """The first is halted meanwhile, as is a worker of it: that does no harm either."""
    scratch = tmp_path / "scratch"
    flags = [*large.flags(scratch), "--nogcs_upload", *LARGE_SHARDS]
    with started(*flags) as run:
        wait_for(lambda: len(finished_shards(scratch)) >= 3, run)
        halted = run.pids()
        for pid in halted:
            os.kill(pid, signal.SIGSTOP)
        before, temporaries = identities(scratch), temporary_files(scratch)
        second = run_command(*flags)
        assert (identities(scratch), temporary_files(scratch)) == (before, temporaries)
        for pid in halted:
            os.kill(pid, signal.SIGCONT)
        first = run.finish()
    assert second.status == 1
    [line] = second.lines
    assert line.startswith(f"ERROR: Another run is writing to {scratch}: ")
    assert first.status == 0, first.stderr
    assert contents(scratch) == contents(large.scratch)


# ------------------------------------------------------------------ changed raw images


def add_class(raw: Path) -> None:
    """Adds one in the middle, so that the labels behind it change."""
    source = sorted((raw / "train").iterdir())[2]
    shutil.copytree(source, source.with_name(f"{source.name}5"))


def remove_class(raw: Path) -> None:
    shutil.rmtree(sorted((raw / "train").iterdir())[2])


def replace_file(raw: Path) -> None:
    """Replaces one by another of the same name."""
    path = sorted(raw.glob("train/*/*.JPEG"))[7]
    os.replace(shutil.copy(sorted(raw.glob("validation/*"))[3], f"{path}.new"), path)


def touch_file(raw: Path) -> None:
    sorted(raw.glob("validation/*.JPEG"))[4].touch()


def edit_file(raw: Path) -> None:
    """Changes an image, but not its size."""
    path = sorted(raw.glob("train/*/*.JPEG"))[7]
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def change_label(raw: Path) -> None:
    path = raw / "synset_labels.txt"
    labels = path.read_text().split()
    other = next(label for label in labels if label != labels[0])
    path.write_text("\n".join([other, *labels[1:]]))


def change_nothing(_raw: Path) -> None:
    pass


def made_of(raw: Path, shards: tuple[int, int]) -> dict[str, list[Any]]:
    """What each shard is made of, and of which time."""
    return {
        name: [(r, os.stat(r.path).st_size, os.stat(r.path).st_mtime_ns) for r in plan]
        for name, plan in contract.expected_shards(raw, *shards).items()
    }


def test_changed_image_is_not_forgotten_when_the_run_fails(
    small: Data, tmp_path: Path, emulator: Emulator
) -> None:
    """Its size is the same, so only the local stamp tells it from what is uploaded."""
    raw = copy_tree(small.raw, tmp_path / "raw")
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    fill(emulator, scratch)
    path = next(raw.glob("train/*/*.JPEG"))
    data = path.read_bytes()
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}", *UPLOAD]
    flags += ["--training_shards=8", "--validation_shards=4"]
    path.write_bytes(bytes(len(data)))
    for _ in range(2):
        done = run_command(*flags, env=emulator.environment)
        assert done.status == 1
        assert str(path) in done.errors[0]
        assert "imagenet/manifest.json" not in emulator.objects()
    path.write_bytes(data)
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    assert contents(scratch) == contents(small.scratch)


@pytest.mark.parametrize(
    ("change", "shards", "num_changed"),
    [
        (add_class, (8, 4), range(9, 13)),
        (remove_class, (8, 4), range(8, 13)),
        (replace_file, (8, 4), [1]),
        (edit_file, (8, 4), [1]),
        (touch_file, (8, 4), [1]),
        (change_label, (8, 4), [1]),
        (change_nothing, (6, 4), [6]),
    ],
    ids=["added", "removed", "replaced", "edited", "touched", "label", "shard_counts"],
)
def test_only_changed_shards_are_rewritten_when_raw_changes(
    small: Data,
    tmp_path: Path,
    emulator: Emulator,
    change: Callable[[Path], None],
    shards: tuple[int, int],
    num_changed: Sequence[int],
) -> None:
    raw = copy_tree(small.raw, tmp_path / "raw")
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    directory = "imagenet" if shards == (8, 4) else "elsewhere"
    if directory == "imagenet":
        fill(emulator, scratch)
    made_before, before = made_of(raw, (8, 4)), identities(scratch)
    change(raw)
    made = made_of(raw, shards)
    changed = {name for name in made if made[name] != made_before.get(name)}
    assert len(changed) in num_changed
    done = run_command(
        f"--raw_data_dir={raw}",
        f"--local_scratch_dir={scratch}",
        "--project=project",
        f"--gcs_output_path=gs://bucket/{directory}",
        f"--training_shards={shards[0]}",
        f"--validation_shards={shards[1]}",
        env=emulator.environment,
    )
    assert done.status == 0, done.stderr
    after = identities(scratch)
    assert {name for name in made if after[name] != before.get(name)} == changed
    uploaded = set(uploads(emulator)) - {"manifest.json"}
    if change is touch_file:  # it has the same bytes as before
        assert uploaded <= changed
    else:
        assert uploads(emulator)[-1] == "manifest.json"
        assert uploaded == (changed if directory == "imagenet" else set(made))
    written = {name: data for name, data in contents(scratch).items() if name in made}
    contract.assert_shards(written, raw, *shards)
    stored = {name.partition("/")[2]: d for name, d in emulator.objects().items()}
    manifest = stored.pop("manifest.json")
    assert stored == written
    assert manifest == (scratch / "manifest.json").read_bytes()


def test_raw_changing_back_is_not_mixed_when_killed_before_the_stamp(
    small: Data, tmp_path: Path
) -> None:
    """A class is added, a run killed between a shard and its stamp, the class removed.

    The labels of the shards written meanwhile are others, their sizes the same.
    """
    raw = copy_tree(small.raw, tmp_path / "raw")
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    first = raw / "train" / "n00000001"
    shutil.copytree(min((raw / "train").iterdir()), first)
    code = """
import os, signal, sys
import imagenet_to_gcs as script
raw, scratch = sys.argv[1:]
replace = os.replace
def replace_and_be_killed(source, target):
    if os.fspath(target).endswith(".json"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_and_be_killed
shards = script.plan_shards(script.read_dataset(raw), 8, 4)
script.write_shard(shards[8], scratch)
"""
    killed = run_code(code, str(raw), str(scratch))
    assert killed.status == -signal.SIGKILL, killed.stderr
    assert contents(scratch) != contents(small.scratch)
    shutil.rmtree(first)
    flags = ["--nogcs_upload", f"--raw_data_dir={raw}", *SMALL_SHARDS]
    done = run_command(*flags, f"--local_scratch_dir={scratch}")
    assert done.status == 0, done.stderr
    assert contents(scratch) == contents(small.scratch)


# ------------------------------------------------------------------ a fresh machine


def test_nothing_is_encoded_nor_uploaded_when_scratch_is_gone(
    small: Data, tmp_path: Path, emulator: Emulator
) -> None:
    fill(emulator, small.scratch)
    scratch = tmp_path / "scratch"
    flags = [*small.flags(scratch), *UPLOAD, *SMALL_SHARDS]
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    assert uploads(emulator) == []
    assert shard_paths(scratch) == {}
    assert kinds(emulator) == ["session", "other", "list", "list"]
    manifest = (small.scratch / "manifest.json").read_bytes()
    assert (scratch / "manifest.json").read_bytes() == manifest


def test_only_what_differs_is_written_when_somebody_changed_the_bucket(
    small: Data, tmp_path: Path, emulator: Emulator
) -> None:
    """With a scratch directory, with one whose shards have left it, and without."""
    objects = contents(small.scratch)
    deleted, corrupted, truncated = sorted(objects)[2:5]
    old, emptied = (copy_tree(small.scratch, tmp_path / name) for name in "ab")
    for path in shard_paths(emptied).values():
        path.unlink()
    for scratch in (old, emptied, tmp_path / "new"):
        fill(emulator, small.scratch)
        emulator.delete(f"imagenet/{deleted}")
        emulator.corrupt(f"imagenet/{corrupted}")
        emulator.corrupt(f"imagenet/{truncated}", truncate=True)
        num_before = len(uploads(emulator))
        before = identities(scratch)
        flags = [*small.flags(scratch), *UPLOAD, *SMALL_SHARDS]
        done = run_command(*flags, env=emulator.environment)
        assert done.status == 0, done.stderr
        assert identities(scratch).items() >= before.items()
        uploaded = uploads(emulator)[num_before:]
        assert sorted(uploaded[:-1]) == [deleted, corrupted, truncated]
        assert uploaded[-1] == "manifest.json"
        stored = {n.partition("/")[2]: d for n, d in emulator.objects().items()}
        assert stored.pop("manifest.json")
        assert stored == objects


# ------------------------------------------------------------------ the manifest


def test_manifest_is_absent_when_run_is_killed_in_the_middle(
    small: Data, tmp_path: Path, emulator: Emulator
) -> None:
    raw = copy_tree(small.raw, tmp_path / "raw")
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    fill(emulator, scratch)
    touch_file(raw)
    emulator.inject(Stall(600), kind="chunk", at=1)
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}"]
    flags += [*UPLOAD, *SMALL_SHARDS]
    with started(*flags, env=emulator.environment) as run:
        wait_for(lambda: "chunk" in kinds(emulator), run)
        kill_parent(run)
        run.wait_until_gone()
    assert kinds(emulator) == ["session", "other", "list", "delete", "chunk"]
    assert "imagenet/manifest.json" not in emulator.objects()
    assert not (scratch / "manifest.json").exists()
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    assert uploads(emulator)[-1] == "manifest.json"
    manifest = json.loads(emulator.objects()["imagenet/manifest.json"])
    assert manifest["examples"] == {"train": 30, "validation": 10}


# ------------------------------------------------------------------ what else can be


def flip_byte(scratch: Path, keep_time: bool) -> Path:
    """Changes a shard on the disk, but not its size."""
    path = scratch / "train" / "train-00003-of-00008"
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return path


@pytest.mark.parametrize("keep_time", [False, True], ids=["newer", "same_time"])
@pytest.mark.parametrize("gcs_upload", [False, True], ids=["local", "upload"])
def test_shard_is_found_when_its_bytes_were_changed(
    small: Data, tmp_path: Path, emulator: Emulator, gcs_upload: bool, keep_time: bool
) -> None:
    """It is written again by this run, or named and written again by the next."""
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    path = flip_byte(scratch, keep_time)
    (scratch / "manifest.json").unlink()
    flags = [*small.flags(scratch), *SMALL_SHARDS]
    flags += UPLOAD if gcs_upload else ["--nogcs_upload"]
    done = run_command(*flags, env=emulator.environment)
    objects = contents(small.scratch)
    stored = emulator.objects().get(f"imagenet/{path.name}")
    assert stored in (None, objects[path.name])
    if done.status:
        [error] = done.errors
        assert str(path) in error
        assert not done.says("The data set is complete")
        assert not (scratch / "manifest.json").exists()
        assert "imagenet/manifest.json" not in emulator.objects()
        done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    assert contents(scratch) == objects


@pytest.mark.parametrize("disturbance", ["deleted", "foreign"])
def test_manifest_is_removed_when_the_closing_listing_finds_something_wrong(
    small: Data, tmp_path: Path, emulator: Emulator, disturbance: str
) -> None:
    """Somebody writes to the bucket once this run, with nothing to do, has listed it.

    Such as a run of another number of shards, that began at the same time.
    """
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    fill(emulator, scratch)
    emulator.inject(Stall(3), kind="list", at=1)
    flags = [*small.flags(scratch), *UPLOAD, *SMALL_SHARDS]
    with started(*flags, env=emulator.environment) as run:
        wait_for(lambda: "list" in kinds(emulator), run)
        time.sleep(1)  # the answer is ready, but not yet sent
        if disturbance == "deleted":
            emulator.delete("imagenet/train-00003-of-00008")
        else:
            emulator.put("imagenet/train-00003-of-00016", b"x")
        done = run.finish()
    assert done.status == 1
    [error] = done.errors
    assert "train-00003-of-000" in error
    assert not done.says("The data set is complete")
    assert "imagenet/manifest.json" not in emulator.objects()
    assert not (scratch / "manifest.json").exists()


def test_runs_of_other_numbers_of_shards_do_not_both_complete(
    small: Data, tmp_path: Path, emulator: Emulator
) -> None:
    """Both list the bucket while it is empty."""
    emulator.inject(Stall(3), kind="list", at=1, times=2)
    emulator.latency = 0.05
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(
                started(
                    *small.flags(tmp_path / number),
                    *UPLOAD,
                    f"--training_shards={number}",
                    "--validation_shards=4",
                    env=emulator.environment,
                )
            )
            for number in ("8", "16")
        ]
        ends = [run.finish() for run in runs]
    failed = [done for done in ends if done.status]
    assert failed
    for done in failed:
        assert re.search("train-0.*-of-000(08|16)", done.errors[0])
        assert not done.says("The data set is complete")
    assert "imagenet/manifest.json" not in emulator.objects()


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry_run"])
def test_run_says_in_a_line_that_nothing_is_left_to_do(
    small: Data, more: list[str]
) -> None:
    done = run_command(
        *small.flags(small.scratch), "--nogcs_upload", *SMALL_SHARDS, *more
    )
    assert done.status == 0, done.stderr
    said = [line for line in done.lines if not line.startswith("Found ")]
    if not more:
        assert said.pop().startswith("The data set is complete: ")
    [line] = said
    assert re.search(r"(?i)\b(nothing|all)\b", line)
    assert "upload" not in line


def test_other_hidden_files_are_kept_when_temporaries_are_removed(
    small: Data, tmp_path: Path
) -> None:
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    foreign = [scratch / "mine" / ".x.tmp", scratch / ".mine.tmp"]
    (scratch / "mine").mkdir()
    left = scratch / "train" / ".train-00003-of-00008.vm-1-2.tmp"
    for path in [*foreign, left]:
        path.write_bytes(b"x")
    done = run_command(*small.flags(scratch), "--nogcs_upload", *SMALL_SHARDS)
    assert done.status == 0, done.stderr
    assert not left.exists()
    assert [path for path in foreign if not path.exists()] == []
