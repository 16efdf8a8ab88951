"""Tests that the upload survives faults, and never calls done what is not."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import contract
import pytest
from command import UPLOAD, Finished, run_code, run_command
from emulator import (
    Emulator,
    Fault,
    Kind,
    LostResponse,
    Reset,
    ShortRange,
    Stall,
    Status,
    WrongContent,
)
from processes import contents, identities, pad, uploads

STOPPING = """
import fcntl
import pathlib
import sys
import threading
import time
import imagenet_to_gcs
scratch = pathlib.Path(sys.argv[2])
shards = {"training_shards": 20, "validation_shards": 2}
try:
    imagenet_to_gcs.run(
        *(sys.argv[1], True, "project", "gs://bucket/imagenet", sys.argv[2]), **shards
    )
except imagenet_to_gcs.RunError as error:
    print(error)
for thread in threading.enumerate()[1:]:
    thread.join(30 * thread.daemon)  # they only listen, and may take a moment to end
print([thread.name for thread in threading.enumerate()])
def stamps():
    return sorted(scratch.glob("*/.*.json")), sorted(scratch.glob("*/*-of-*"))
with (scratch / ".lock-0-of-1").open() as lock:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
before = stamps()
time.sleep(2)
print(stamps() == before, not list(scratch.rglob("*.tmp")))
"""

SHARDS = ("--training_shards=3", "--validation_shards=2")
SMALL = "train-00001-of-00003"
LARGE = "train-00000-of-00003"  # 21 MB: a session and some chunks


@dataclass(frozen=True)
class Data:
    raw: Path
    scratch: Path

    def flags(self, scratch: Path | None = None) -> list[str]:
        return [
            f"--raw_data_dir={self.raw}",
            f"--local_scratch_dir={scratch or self.scratch}",
            *UPLOAD,
            *SHARDS,
        ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Shards that only have to be uploaded, so that a run takes a second."""
    directory = tmp_path_factory.mktemp("upload")
    raw = contract.make_raw(directory / "raw")
    first = Path(contract.expected_shards(raw, 3, 2)[LARGE][0].path)
    pad(raw, 21_000_000, str(first.relative_to(raw)))
    data = Data(raw, directory / "scratch")
    done = run_command(*data.flags(), "--nogcs_upload")
    assert done.status == 0, done.stderr
    return data


def stored(emulator: Emulator) -> dict[str, bytes]:
    """The shards in the bucket, without the manifest."""
    objects = {name.partition("/")[2]: d for name, d in emulator.objects().items()}
    objects.pop("manifest.json", None)
    return objects


def finish(data: Data, emulator: Emulator, scratch: Path | None = None) -> Finished:
    """Runs the command, after which all shards are in the bucket as they are here."""
    done = run_command(*data.flags(scratch), env=emulator.environment)
    assert done.status == 0, done.stderr
    assert stored(emulator) == contents(data.scratch)
    return done


def assert_fails(done: Finished, error: str, status: int = 1) -> None:
    assert (done.status, done.errors) == (status, [error])
    assert done.lines[-1] == f"ERROR: {error}"
    assert not done.says("The data set is complete")


@pytest.mark.parametrize(
    ("fault", "kind", "name", "at", "times", "warning"),
    [
        (Status(503), "session", "", 2, 2, ""),
        (Status(503), "list", "", 1, 2, ""),
        (Status(503), "chunk", SMALL, 1, 3, ""),
        (Status(503), "chunk", LARGE, 2, 2, ""),
        (Status(429), "chunk", SMALL, 1, 2, ""),
        (Status(408), "chunk", LARGE, 2, 2, ""),
        (Reset(), "chunk", SMALL, 1, 2, ""),
        (Reset(), "chunk", LARGE, 2, 1, ""),
        (LostResponse(), "chunk", SMALL, 1, 2, ""),
        (LostResponse(), "chunk", LARGE, 1, 1, ""),
        (LostResponse(), "chunk", LARGE, 2, 1, ""),
        (Stall(2), "upload", "", 2, 3, ""),
        (Status(410), "chunk", LARGE, 2, 1, "again in 1 s: 410 Gone."),
        (Status(404), "chunk", LARGE, 2, 1, "again in 1 s: 404 Not Found."),
        (
            ShortRange(),
            "chunk",
            LARGE,
            1,
            1,
            "again in 1 s: what came back is not as it should be",
        ),
        (WrongContent(), "chunk", SMALL, 1, 1, "again in 1 s: what came back is not "),
        (WrongContent(), "chunk", LARGE, 2, 1, "again in 1 s: what came back is not "),
    ],
    ids=repr,
)
def test_upload_survives_fault(
    data: Data,
    emulator: Emulator,
    fault: Fault,
    kind: Kind | Literal["upload"],
    name: str,
    at: int,
    times: int,
    warning: str,
) -> None:
    emulator.inject(fault, kind=kind, at=at, times=times, name=name)
    before = identities(data.scratch)
    done = finish(data, emulator)
    assert emulator.has_struck()
    assert identities(data.scratch) == before
    assert uploads(emulator)[-1] == "manifest.json"
    warnings = [line for line in done.lines if line.startswith("WARNING: ")]
    assert len(warnings) == bool(warning)
    assert all(line.startswith("WARNING: Uploading ") for line in warnings), warnings
    assert all(f"{name} {warning}" in line for line in warnings), warnings
    assert "http:" not in done.stderr
    assert "5 of 5 shards written, 5 uploaded, " in done.stderr


@pytest.mark.parametrize(
    ("fault", "kind", "name", "expected"),
    [
        (
            Status(401, "Invalid Credentials"),
            "chunk",
            SMALL,
            (
                "Cannot use {}: Anonymous credentials cannot be refreshed. Unset "
                "GOOGLE_APPLICATION_CREDENTIALS and, on your own machine, run `gcloud "
                "auth application-default login`."
            ),
        ),
        (
            Status(403, "No a.b.delete access."),
            "chunk",
            LARGE,
            "Cannot use {}: 403 No a.b.delete access.",
        ),
        (
            Status(404, "The specified bucket does not exist."),
            "session",
            SMALL,
            (
                "Cannot use {}: 404 The specified bucket does not exist. Create it: "
                "gcloud storage buckets create gs://bucket --project=project "
                "--location=LOCATION"
            ),
        ),
    ],
    ids=["401", "403", "404"],
)
def test_run_stops_when_upload_is_refused_in_the_middle(
    data: Data,
    emulator: Emulator,
    fault: Fault,
    kind: Kind,
    name: str,
    expected: str,
) -> None:
    emulator.inject(fault, kind=kind, at=1, times=None, name=name)
    done = run_command(*data.flags(), env=emulator.environment)
    error = expected.format(f"gs://bucket/imagenet/{name}")
    assert_fails(done, error)
    emulator.settle()
    assert done.lines[-2] == "Finished shards are kept."
    assert name not in stored(emulator)
    emulator.heal()
    num_before = len(uploads(emulator))
    before = stored(emulator).keys()
    finish(data, emulator)
    missing = contents(data.scratch).keys() - before
    assert set(uploads(emulator)[num_before:]) == {*missing, "manifest.json"}


@pytest.mark.parametrize("scratch_is_lost", [False, True], ids=["same", "fresh"])
@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_closing_check_finds_what_the_answer_hid(
    data: Data,
    tmp_path: Path,
    emulator: Emulator,
    name: str,
    scratch_is_lost: bool,
) -> None:
    """A wrong object is repaired by a second run, on another machine too."""
    fault = WrongContent(answer_looks_right=True)
    emulator.inject(fault, kind="chunk", at=1, name=name)
    done = run_command(*data.flags(), env=emulator.environment)
    assert_fails(
        done,
        "1 of 5 shards in gs://bucket/imagenet is missing or changed: "
        f"{name}. Rerun the same command to replace them.",
        status=75,
    )
    assert "imagenet/manifest.json" not in emulator.objects()
    num_before = len(uploads(emulator))
    finish(data, emulator, tmp_path / "scratch" if scratch_is_lost else None)
    assert set(uploads(emulator)[num_before:]) == {name, "manifest.json"}


IMPATIENT = """
import sys
import imagenet_to_gcs as script
script.RETRY_DELAYS = (0.1, 0.1)
sys.argv[0] = "imagenet_to_gcs"
script.app.run(script.main)
"""


def test_run_ends_when_each_upload_is_lost(data: Data, emulator: Emulator) -> None:
    """Then no bucket is missing; and its address, a secret, is not shown."""
    emulator.inject(Status(404), kind="chunk", at=1, times=None, name=LARGE)
    done = run_code(IMPATIENT, *data.flags(), env=emulator.environment)
    assert_fails(
        done,
        f"Cannot use gs://bucket/imagenet/{LARGE}: 404 Not Found. Rerun "
        "the same command to resume.",
        status=75,
    )
    assert "upload_id" not in done.stderr


@pytest.mark.parametrize("looks_right", [False, True])
def test_object_that_stays_wrong_is_never_called_done(
    data: Data, emulator: Emulator, looks_right: bool
) -> None:
    """The pauses between the attempts are shortened; no flag does."""
    fault = WrongContent(answer_looks_right=looks_right)
    emulator.inject(fault, kind="chunk", at=1, times=None, name=SMALL)
    for _ in range(2):
        done = run_code(IMPATIENT, *data.flags(), env=emulator.environment)
        [error] = done.errors
        assert SMALL in error
        assert_fails(done, error, status=75)
        assert "imagenet/manifest.json" not in emulator.objects()


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_damaged_shard_never_reaches_the_bucket_when_it_looks_as_it_was(
    data: Data, tmp_path: Path, emulator: Emulator, name: str
) -> None:
    """Of the same size and time; the next run writes it again."""
    scratch = tmp_path / "scratch"
    shutil.copytree(data.scratch, scratch)
    path = scratch / "train" / name
    status = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    done = run_code(IMPATIENT, *data.flags(scratch), env=emulator.environment)
    assert_fails(
        done,
        f"{path} has changed. Rerun the same command to resume.",
        status=75,
    )
    assert not {f"imagenet/{name}", "imagenet/manifest.json"} & set(emulator.objects())
    finish(data, emulator, scratch)
    assert contents(scratch) == contents(data.scratch)


def test_slow_line_finishes(emulator: Emulator, tmp_path: Path) -> None:
    """A chunk takes longer than a timeout, which counts for a piece of it.

    The buffers of the loopback hide that in a body of less than 8 MB: to send this one
    takes 6 s or more, a piece of it 0.2 s, or some times that on a busy machine.
    """
    path = tmp_path / "train-00000-of-00001"
    path.write_bytes(os.urandom(16_000_000))
    emulator.bytes_per_second = 1_250_000
    done = run_code(SLOW_LINE, str(path), env=emulator.environment)
    assert done.stdout.splitlines() == ["1 of 1", "16000000"], done.stderr
    assert "Waiting" not in done.stderr
    assert emulator.objects()[f"d/{path.name}"] == path.read_bytes()


SLOW_LINE = """
import sys
import imagenet_to_gcs as script
script.CHUNK_TIMEOUT = (5, 60)
script.UPLOAD_CHUNK_BYTES = 2**24
script.WARNING_SECONDS = 0
destination = script.Destination(script.GcsPath("bucket", "d"), "project")
destination.list_objects()
sent = []
destination.upload(sys.argv[1], script.measure(sys.argv[1]), sent.append)
print(len(destination.list_objects()), "of 1")
print(sent[-1])
assert sent == sorted(sent)
"""


def test_upload_stops_between_two_pieces(emulator: Emulator, tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001"
    path.write_bytes(bytes(3_000_000))
    done = run_code(STOPPED, str(path), env=emulator.environment)
    assert done.stdout == "CancelledError 1048576\n", done.stderr
    assert emulator.objects() == {}


STOPPED = """
import sys
import imagenet_to_gcs as script
destination = script.Destination(script.GcsPath("bucket", "d"), "project")
def sent(num_bytes):
    global last
    last = num_bytes
    if last == 2**20:
        destination.stopping.set()
try:
    destination.upload(sys.argv[1], script.measure(sys.argv[1]), sent)
except BaseException as error:
    print(type(error).__name__, last)
"""


def test_nothing_goes_on_when_run_has_raised(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    """One upload is refused; others are under way, repeated, or wait for a repeat."""
    emulator.latency = 0.1
    emulator.inject(Status(503), kind="chunk", at=1, name="train-00001-of-", times=None)
    wrong = WrongContent()
    emulator.inject(wrong, kind="chunk", at=1, name="train-00002-of-", times=None)
    emulator.inject(Status(403), kind="session", at=1, name="train-00003-of-")
    code = run_code(STOPPING, str(raw), str(tmp_path), env=emulator.environment)
    error, threads, *after = code.stdout.splitlines()
    assert "403" in error
    assert (threads, after) == ("['MainThread']", ["True True"])
