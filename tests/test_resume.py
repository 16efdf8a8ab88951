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
from command import UPLOAD, run_code, run_command
from emulator import Emulator, Request, Stall
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
LOCAL = ("--nogcs_upload",)


@dataclass(frozen=True)
class Data:
    """A raw directory, and what an undisturbed run makes of it."""

    raw: Path
    scratch: Path
    shards: Sequence[str]

    def flags(self, scratch: Path, *more: str, raw: Path | None = None) -> list[str]:
        directories = [f"--raw_data_dir={raw or self.raw}"]
        directories += [f"--local_scratch_dir={scratch}"]
        return [*directories, "--num_workers=2", *self.shards, *more]

    def run(self) -> Data:
        done = run_command(*self.flags(self.scratch, *LOCAL))
        assert done.status == 0, done.stderr
        return self


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """1,500 CMYK images in 120 shards; to encode them again takes some seconds."""
    directory = tmp_path_factory.mktemp("large")
    raw = contract.make_raw(
        directory / "raw", 40, 30, 300, kinds=("cmyk",), width=320, height=240
    )
    return Data(raw, directory / "scratch", LARGE_SHARDS).run()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """40 images in 12 shards."""
    directory = tmp_path_factory.mktemp("small")
    raw = contract.make_raw(directory / "raw", 6, 5, 10)
    return Data(raw, directory / "scratch", SMALL_SHARDS).run()


def stored(emulator: Emulator) -> dict[str, bytes]:
    """What the bucket holds, by base name."""
    return {name.partition("/")[2]: d for name, d in emulator.objects().items()}


# ------------------------------------------------------------------ killed


def kill_parent(run: Run) -> None:
    os.kill(run.pid, signal.SIGKILL)


def kill_worker(run: Run) -> None:
    wait_for(run.workers, run)
    os.kill(run.workers()[0], signal.SIGKILL)


def kill_parent_and_workers(run: Run) -> None:
    for pid in [*run.workers(), run.pid]:
        with contextlib.suppress(ProcessLookupError):  # they end with each other
            os.kill(pid, signal.SIGKILL)


def kill_all(run: Run) -> None:
    os.killpg(run.pid, signal.SIGKILL)


KILLS = [kill_parent, kill_worker, kill_parent_and_workers, kill_all]


def assert_nothing_partial(scratch: Path, undisturbed: dict[str, bytes]) -> None:
    for name, data in contents(scratch).items():
        assert data == undisturbed[name], f"{name} is not complete"


def finished(scratch: Path) -> dict[str, tuple[int, int]]:
    """Identities of the shards that have a stamp."""
    found, names = identities(scratch), finished_shards(scratch)
    return {name: found[name] for name in names}


def test_run_finishes_when_killed_20_times(large: Data, tmp_path: Path) -> None:
    """Kills run after run at a random point, of whom the seed says, then lets one be.

    One in four is killed in its first two seconds, in which TensorFlow is imported, or
    once it has finished a shard in that time.
    """
    scratch = tmp_path / "scratch"
    undisturbed = contents(large.scratch)
    num_left = []
    for seed in range(20):
        rng = random.Random(seed)
        before = finished(scratch)
        with started(*large.flags(scratch, *LOCAL)) as run:
            if seed % 4 == 3:
                end = time.monotonic() + rng.uniform(0, 2)
                wait_for(
                    lambda: (
                        time.monotonic() > end  # noqa: B023
                        or len(finished_shards(scratch)) > len(before)  # noqa: B023
                    )
                )
            else:
                enough = len(before) + rng.randint(0, 2)
                wait_for(lambda: len(finished_shards(scratch)) > enough, run)  # noqa: B023
                time.sleep(rng.uniform(0, 0.05))
            kill = KILLS[rng.randrange(4)]
            if seed % 4 == 3 and kill is kill_worker:
                kill = kill_parent  # while TensorFlow is imported, there is no worker
            kill(run)
            run.wait_until_gone()
        assert_nothing_partial(scratch, undisturbed)
        assert not (scratch / "manifest.json").exists()
        assert finished(scratch).items() >= before.items()
        num_left.append(len(temporary_files(scratch)))
    assert any(num_left), "no run was killed in the middle of a shard"
    before = finished(scratch)
    assert len(before) < len(undisturbed), "nothing is left to do"
    done = run_command(*large.flags(scratch, *LOCAL))
    assert done.status == 0, done.stderr
    assert done.says(f"{len(before)} of 120 shards up to date")
    assert not done.says("upload"), "nothing is uploaded without a bucket"
    assert contents(scratch) == undisturbed
    assert finished(scratch).items() >= before.items()
    assert temporary_files(scratch) == []
    manifest = (scratch / "manifest.json").read_bytes()
    assert manifest == (large.scratch / "manifest.json").read_bytes()


# ------------------------------------------------------------------ signals

STATUS = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGHUP: 129,
    signal.SIGKILL: -signal.SIGKILL,
}
NAMES = {signal.SIGINT: "Ctrl-C"}


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


@pytest.mark.parametrize("state", ["importing", "encoding", "uploading"])
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
    emulator: Emulator,
    number: signal.Signals,
    send: Callable[[Run, signal.Signals], None],
    state: str,
) -> None:
    """No process, no temporary directory, no semaphore, no half of a shard."""
    emulator.inject(Stall(600), kind="chunk", at=1, times=None)
    scratch, temporary = tmp_path / "scratch", tmp_path / "temporary"
    temporary.mkdir()
    flags = large.flags(scratch, *(UPLOAD if state == "uploading" else LOCAL))
    env = {"TMPDIR": str(temporary), **emulator.environment}
    with started(*flags, env=env) as run:
        is_reached: dict[str, Callable[[], object]] = {
            "importing": run.helper,
            "encoding": lambda: len(finished_shards(scratch)) >= 3,
            "uploading": lambda: "chunk" in kinds(emulator),
        }
        wait_for(is_reached[state], run)
        if state == "importing":  # of TensorFlow takes a second or two
            time.sleep(random.Random(number).uniform(0, 1))
        maps = Path(f"/proc/{run.pid}/maps").read_text()
        send(run, number)
        run.process.wait(GONE_SECONDS)
        done = run.finish()
    assert done.status == STATUS[number]
    if number != signal.SIGKILL:
        [error] = done.errors
        assert re.match(rf"Stopped by {NAMES.get(number, number.name)}\b", error)
        assert done.lines[-1] == f"ERROR: {error}"
    assert_nothing_partial(scratch, contents(large.scratch))
    assert list(temporary.iterdir()) == []
    assert "/dev/shm" not in maps


def test_run_goes_on_when_nohup_keeps_the_hangup_off(
    large: Data, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    with started(*large.flags(scratch, *LOCAL), under=["nohup"]) as run:
        wait_for(lambda: finished_shards(scratch), run)
        signal_group(run, signal.SIGHUP)
        done = run.finish()
    assert (done.status, done.errors) == (0, [])
    assert contents(scratch) == contents(large.scratch)


# ------------------------------------------------------------------ changed raw images


# The classes are n01440764, n01440801, n01440838 and so on, of five images each.
IMAGE = "train/n01440801/n01440801_3.JPEG"
TOUCH = "touch validation/ILSVRC2012_val_00000005.JPEG"


def made_of(raw: Path, training_shards: int) -> dict[str, list[Any]]:
    """What each shard is made of, and of which time."""
    return {
        name: [(r, os.stat(r.path).st_size, os.stat(r.path).st_mtime_ns) for r in plan]
        for name, plan in contract.expected_shards(raw, training_shards, 4).items()
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
    flags = small.flags(scratch, *UPLOAD, raw=raw)
    path.write_bytes(bytes(len(data)))
    for _ in range(2):
        done = run_command(*flags, env=emulator.environment)
        assert done.status == 1
        assert str(path) in done.errors[0]
        assert "manifest.json" not in stored(emulator)
    path.write_bytes(data)
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    assert contents(scratch) == contents(small.scratch)


@pytest.mark.parametrize(
    ("change", "training_shards", "num_changed"),
    [
        pytest.param(
            "cp -r train/n01440838 train/n01440839", 8, range(9, 13), id="class added"
        ),
        pytest.param("rm -r train/n01440838", 8, range(8, 13), id="class removed"),
        pytest.param(
            f"cp validation/*_00000004.JPEG new; mv new {IMAGE}", 8, [1], id="replaced"
        ),
        pytest.param(
            f"printf x | dd of={IMAGE} bs=1 seek=1000 conv=notrunc", 8, [1], id="edited"
        ),
        pytest.param(TOUCH, 8, [1], id="touched"),
        pytest.param("sed -i 1s/.*/n01440801/ synset_labels.txt", 8, [1], id="label"),
        pytest.param("", 6, [6], id="number of shards"),
    ],
)
def test_only_changed_shards_are_rewritten_when_raw_changes(
    small: Data,
    tmp_path: Path,
    emulator: Emulator,
    change: str,
    training_shards: int,
    num_changed: Sequence[int],
) -> None:
    raw = copy_tree(small.raw, tmp_path / "raw")
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    if training_shards == 8:  # else the bucket's would be strangers
        fill(emulator, scratch)
    made_before, before = made_of(raw, 8), identities(scratch)
    contract.change(raw, change)
    made = made_of(raw, training_shards)
    changed = {name for name in made if made[name] != made_before.get(name)}
    assert len(changed) in num_changed
    if "train/n01440838" in change:  # its manifest protects a set of other classes
        (scratch / "manifest.json").unlink()
        emulator.delete("imagenet/manifest.json")
    more = [*UPLOAD, f"--training_shards={training_shards}"]
    flags = small.flags(scratch, *more, raw=raw)
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    after = identities(scratch)
    assert {name for name in made if after[name] != before.get(name)} == changed
    uploaded = uploads(emulator)
    if change != TOUCH:  # else it has the same bytes as before
        to_upload = changed if training_shards == 8 else made
        assert sorted(uploaded[:-1]) == sorted(to_upload)
        assert uploaded[-1] == "manifest.json"
    assert set(uploaded) <= {*made, "manifest.json"}
    written = {name: data for name, data in contents(scratch).items() if name in made}
    contract.assert_shards(written, raw, training_shards, 4)
    manifest = (scratch / "manifest.json").read_bytes()
    assert stored(emulator) == {**written, "manifest.json": manifest}


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
script.write_shard(shards[8], scratch, script.write_records, durable=True)
"""
    killed = run_code(code, str(raw), str(scratch))
    assert killed.status == -signal.SIGKILL, killed.stderr
    assert contents(scratch) != contents(small.scratch)
    shutil.rmtree(first)
    done = run_command(*small.flags(scratch, *LOCAL, raw=raw))
    assert done.status == 0, done.stderr
    assert contents(scratch) == contents(small.scratch)


# ------------------------------------------------------------------ a fresh machine


def test_nothing_is_encoded_nor_uploaded_when_scratch_is_gone(
    small: Data, tmp_path: Path, emulator: Emulator
) -> None:
    fill(emulator, small.scratch)
    scratch = tmp_path / "scratch"
    done = run_command(*small.flags(scratch, *UPLOAD), env=emulator.environment)
    assert done.status == 0, done.stderr
    assert shard_paths(scratch) == {}
    assert kinds(emulator) == ["list", "list"]
    manifest = (small.scratch / "manifest.json").read_bytes()
    assert (scratch / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("scratch_is", ["kept", "not kept", "new"])
def test_only_what_differs_is_written_when_somebody_changed_the_bucket(
    small: Data, tmp_path: Path, emulator: Emulator, scratch_is: str
) -> None:
    scratch = tmp_path / "scratch"
    more = []
    if scratch_is != "new":
        copy_tree(small.scratch, scratch)
    if scratch_is == "not kept":
        more = ["--nokeep_local_shards"]
        for path in shard_paths(scratch).values():
            path.unlink()  # the stamps stay
    fill(emulator, small.scratch)
    deleted, corrupted, truncated = sorted(contents(small.scratch))[2:5]
    emulator.delete(f"imagenet/{deleted}")
    emulator.corrupt(f"imagenet/{corrupted}")
    emulator.corrupt(f"imagenet/{truncated}", truncate=True)
    before = identities(scratch)
    flags = small.flags(scratch, *UPLOAD, *more)
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    assert identities(scratch).items() >= before.items()
    assert bool(shard_paths(scratch)) == (scratch_is != "not kept")
    *uploaded, last = uploads(emulator)
    assert sorted(uploaded) == [deleted, corrupted, truncated]
    assert last == "manifest.json"
    assert stored(emulator).items() >= contents(small.scratch).items()


# ------------------------------------------------------------------ the manifest


def test_manifest_is_absent_when_run_is_killed_in_the_middle(
    small: Data, tmp_path: Path, emulator: Emulator
) -> None:
    raw = copy_tree(small.raw, tmp_path / "raw")
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    fill(emulator, scratch)
    contract.change(raw, TOUCH)
    emulator.inject(Stall(600), kind="chunk", at=1)
    flags = small.flags(scratch, *UPLOAD, raw=raw)
    with started(*flags, env=emulator.environment) as run:
        wait_for(lambda: "chunk" in kinds(emulator), run)
        kill_parent(run)
        run.wait_until_gone()
    access, changes = ["list", "other", "session"], ["delete", "session", "chunk"]
    assert kinds(emulator) == [*access, *changes]
    assert "manifest.json" not in stored(emulator)
    assert not (scratch / "manifest.json").exists()
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    assert uploads(emulator)[-1] == "manifest.json"
    manifest = json.loads(stored(emulator)["manifest.json"])
    assert manifest["examples"] == {"train": 30, "validation": 10}


@pytest.mark.parametrize(
    ("disturb", "said", "status"),
    [
        (
            lambda emulator: emulator.delete("imagenet/train-00003-of-00008"),
            "is missing or changed: train-00003-of-00008. ",
            75,
        ),
        (
            lambda emulator: emulator.put("imagenet/train-00003-of-00016", b"x"),
            "objects from elsewhere, .*: train-00003-of-00016. ",
            1,
        ),
    ],
    ids=["deleted", "strangers"],
)
def test_manifest_is_removed_when_the_closing_listing_finds_something_wrong(
    small: Data,
    tmp_path: Path,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    disturb: Callable[[Emulator], None],
    said: str,
    status: int,
) -> None:
    """Somebody writes to the bucket once this run, with nothing to do, has listed it.

    Such as a run of another number of shards, that began at the same time.
    """
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    fill(emulator, scratch)
    answer = emulator._answer

    def answer_and_disturb(handler: Any, request: Request, fault: Any) -> Any:
        given = answer(handler, request, fault)
        if request.kind == "list":
            monkeypatch.undo()  # the first time only
            disturb(emulator)
        return given

    monkeypatch.setattr(emulator, "_answer", answer_and_disturb)
    done = run_command(*small.flags(scratch, *UPLOAD), env=emulator.environment)
    [error] = done.errors
    assert re.search(said, error)
    assert done.status == status
    assert not done.says("The data set is complete")
    assert "manifest.json" not in stored(emulator)
    assert not (scratch / "manifest.json").exists()


# ------------------------------------------------------------------ what else can be


def test_shard_is_found_when_only_its_bytes_were_changed(
    small: Data, tmp_path: Path
) -> None:
    """Its size and time are the same. The next run writes it again."""
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    path = scratch / "train" / "train-00003-of-00008"
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    (scratch / "manifest.json").unlink()
    flags = small.flags(scratch, *LOCAL)
    done = run_command(*flags)
    assert done.status == 75
    [error] = done.errors
    assert str(path) in error
    assert not done.says("The data set is complete")
    assert not (scratch / "manifest.json").exists()
    done = run_command(*flags)
    assert done.status == 0, done.stderr
    assert contents(scratch) == contents(small.scratch)


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry_run"])
def test_run_says_in_a_line_that_nothing_is_left_to_do(
    small: Data, more: list[str]
) -> None:
    done = run_command(*small.flags(small.scratch, *LOCAL, *more))
    assert done.status == 0, done.stderr
    _found, line, *complete = done.lines
    assert (
        line == f"Nothing to do: found 12 of 12 shards up to date in {small.scratch}."
    )
    assert [text.partition(":")[0] for text in complete] == (
        [] if more else ["The data set is complete"]
    )


def test_other_hidden_files_are_kept_when_temporaries_are_removed(
    small: Data, tmp_path: Path
) -> None:
    scratch = copy_tree(small.scratch, tmp_path / "scratch")
    others = [scratch / "mine" / ".x.tmp", scratch / ".mine.tmp"]
    (scratch / "mine").mkdir()
    left = scratch / "train" / ".train-00003-of-00008.vm-1-2.tmp"
    for path in [*others, left]:
        path.write_bytes(b"x")
    done = run_command(*small.flags(scratch, *LOCAL))
    assert done.status == 0, done.stderr
    assert temporary_files(scratch) == sorted(others)


def test_local_data_set_is_kept_when_the_bucket_holds_another(
    small: Data, tmp_path: Path, emulator: Emulator
) -> None:
    """The bucket's is complete, so no shard is to be made, and none is removed."""
    raw = copy_tree(small.raw, tmp_path / "raw")
    contract.change(
        raw, "mv train/n01440838 train/n01440839; sed -i s/0838$/0839/ *.txt"
    )
    made, scratch = tmp_path / "made", copy_tree(small.scratch, tmp_path / "scratch")
    done = run_command(*small.flags(made, *UPLOAD, raw=raw), env=emulator.environment)
    assert done.status == 0, done.stderr
    before = contents(scratch)
    flags = small.flags(scratch, *UPLOAD, "--nokeep_local_shards", raw=raw)
    done = run_command(*flags, env=emulator.environment)
    [error] = done.errors
    assert error.startswith(f"{scratch} holds a finished data set of other raw data")
    assert contents(scratch) == before
    (scratch / "manifest.json").unlink()  # even if nothing says that it is finished
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    others = contents(made)
    differing = {name: data for name, data in before.items() if others[name] != data}
    assert differing and contents(scratch) == differing
