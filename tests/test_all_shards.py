"""All shards, written by any number of processes."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from pathlib import Path

import contract
import pytest
from command import (
    IMPORTS,
    SCRIPT,
    UPLOAD,
    Finished,
    environment,
    run_code,
    run_command,
)
from emulator import Emulator, Status
from processes import held

import imagenet_to_gcs as script

SHARDS = ("--training_shards=9", "--validation_shards=3")  # two of them are empty


def visible(directory: Path) -> dict[str, bytes]:
    """Reads all files but the hidden ones, by their path in the directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("[!.]*"))
        if path.is_file()
    }


Runs = dict[int, tuple[Finished, Path]]


@pytest.fixture(scope="module")
def runs(mixed_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What the command says and writes with 1, 2 and 3 workers."""
    found = {}
    for workers in (1, 2, 3):
        scratch = tmp_path_factory.mktemp("scratch")
        flags = [f"--raw_data_dir={mixed_raw}", f"--local_scratch_dir={scratch}"]
        flags += ["--nogcs_upload", f"--num_workers={workers}", *SHARDS]
        env = IMPORTS if workers == 1 else {}
        found[workers] = (run_command(*flags, env=env), scratch)
    return found


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_shards_are_the_contracts_whatever_the_number_of_workers(
    runs: Runs, mixed_raw: Path, workers: int
) -> None:
    finished, scratch = runs[workers]
    assert finished.status == 0, finished.stderr
    contract.assert_shards(contract.local_shards(scratch), mixed_raw, 9, 3)
    files = visible(scratch)
    assert files == visible(runs[1][1])
    shards = contract.expected_shards(mixed_raw, 9, 3)
    paths = [f"{name.partition('-')[0]}/{name}" for name in shards]
    assert sorted(files) == ["manifest.json", *paths]
    assert not list(scratch.rglob(".*.tmp"))


def test_run_says_what_it_does(runs: Runs, mixed_raw: Path) -> None:
    finished, scratch = runs[2]

    def size(directory: Path, pattern: str) -> str:
        num_bytes = sum(path.stat().st_size for path in directory.glob(pattern))
        return rf"{num_bytes / 1000:.1f} KB"

    written = size(scratch, "*/[tv]*-of-*")
    expected = [
        (
            rf"Found 21 training images in 7 synsets and 8 validation images "
            rf"\({size(mixed_raw, '**/*.JPEG')}\) in {mixed_raw}\."
        ),
        rf"Writing 12 shards of 29 images \([\d.]+ KB\) to {scratch}\.",
        (
            r"Done in \d+ \w+: 12 of 12 shards written, \d+ images/s, "
            r"[\d.]+ ([KM]B|bytes)/s\."
        ),
        r"Encoded 8 PNG or CMYK images as RGB JPEG\.",
        rf"The data set is complete: 29 images in 12 shards \({written}\) in {scratch}\.",
    ]
    # On a slow machine also a line of progress, every 10 seconds.
    progress = re.compile(r"Still listing|Starting|\d+%")
    lines = [line for line in finished.lines if not progress.match(line)]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert finished.stdout == ""
    for line in finished.stderr.splitlines():
        assert re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d [A-Z\d]", line)
        assert line.isprintable()


def test_run_imports_neither_google_cloud_nor_tensorflow(runs: Runs) -> None:
    """Without an upload; and TensorFlow lives in the workers."""
    imported = runs[1][0].imported
    assert "absl.logging" in imported
    heavy = ("google.cloud", "google.auth", "google.api_core", "tensorflow", "numpy")
    assert [name for name in imported if name.startswith(heavy)] == []


CONVERT = """
import sys
import imagenet_to_gcs
paths = imagenet_to_gcs.convert_to_tf_records(sys.argv[1], sys.argv[2])
print(len(paths[0]), len(paths[1]), *paths[0], *paths[1], sep="\\n")
"""


def test_convert_to_tf_records_returns_the_paths(raw: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "new" / "scratch"
    finished = run_code(CONVERT, str(raw), str(scratch))
    assert finished.status == 0, finished.stderr
    names = contract.expected_shards(raw)
    paths = [str(scratch / name.partition("-")[0] / name) for name in names]
    assert finished.stdout.splitlines() == ["1024", "128", *paths]
    contract.assert_shards(contract.local_shards(scratch), raw)


# ------------------------------------------------------------------- what is said

UPLOADING = """
import sys
from absl import logging
import imagenet_to_gcs
logging.set_verbosity(logging.INFO)
imagenet_to_gcs.LOG_SECONDS = 0.01
for upload, training_shards in ((False, 400), (True, 40)):
    imagenet_to_gcs.run(
        sys.argv[1],
        gcs_upload=upload,
        gcs_project="project",
        gcs_output_path="gs://bucket/imagenet",
        local_scratch_dir=sys.argv[2],
        training_shards=training_shards,
        validation_shards=4,
        num_workers=1,
    )
"""


def test_progress_is_logged_while_it_runs(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    """First without an upload, then with one."""
    emulator.latency = 0.1
    arguments = [UPLOADING, str(raw), str(tmp_path / "scratch")]
    finished = run_code(*arguments, env=emulator.environment)
    assert finished.status == 0, finished.stderr
    done = r"\d+%(, \d+ (s|min) left)?, \d+ of {} shards written"
    speed = r"\d+ images/s, [\d.]+ (bytes|KB|MB)/s\.\n"
    assert re.search(f"{done.format(404)}, {speed}", finished.stderr)
    uploaded = r"\d+ uploaded"
    assert re.search(f"{done.format(44)}, {uploaded}, {speed}", finished.stderr)


STAMP = script.Stamp("", 1000, 10**8, "")


def progress_of(
    raw: Path, to_write: int, to_upload: int, has_upload: bool = False
) -> script.Progress:
    """Makes the progress of a run of so many shards of 1,000 images."""
    scratch_dir = str(raw / "scratch")
    options = script.Options(str(raw), False, None, None, scratch_dir, num_workers=1)
    num_bytes = 10**5 - script.RECORD_OVERHEAD
    images = (script.RawImage("/raw", "a.JPEG", "n1", num_bytes, 1),) * 1000
    num_shards = to_write + to_upload
    shards = [
        script.Shard("train", i, num_shards, images, {}) for i in range(num_shards)
    ]
    work = script.Work(shards[:to_write], [(s, STAMP) for s in shards[to_write:]])
    destination = object.__new__(script.Destination) if has_upload else None
    return script.Progress(script.Job(options, {"n1": 1}, shards, destination, work))


@pytest.mark.parametrize(
    ("to_write", "to_upload", "written", "uploaded", "expected"),
    [
        pytest.param(
            *(1200, 0, 423, 400),
            "33%, 33 min left, 423 of 1,200 shards written, 400 uploaded, 423 images/s, "
            "40.0 MB/s.",
            id="all are uploaded, too",
        ),
        pytest.param(
            *(10, 20, 5, 12),
            "40%, 25 min left, 25 of 30 shards written, 12 uploaded, 5 images/s, "
            "1.2 MB/s.",
            id="some need only be uploaded",
        ),
        pytest.param(
            *(0, 3, 0, 2),
            "66%, 8 min left, 3 of 3 shards written, 2 uploaded, 0 images/s, "
            "200.0 KB/s.",
            id="all need only be uploaded",
        ),
        pytest.param(
            *(2, 0, 1, None),
            "50%, 17 min left, 1 of 2 shards written, 1 images/s, 100.0 KB/s.",
            id="without an upload",
        ),
        pytest.param(
            *(2, 0, 1, 0),
            "0%, 1 of 2 shards written, 0 uploaded, 1 images/s, 0 bytes/s.",
            id="nothing is uploaded yet",
        ),
        pytest.param(*(2, 0, 0, None), "Starting 1 worker.", id="nothing has begun"),
    ],
)
def test_line_says_what_is_left_before_how_fast_it_is(
    raw: Path,
    to_write: int,
    to_upload: int,
    written: int,
    uploaded: int | None,
    expected: str,
) -> None:
    """After 1,000 s; the time left, and the percent, are of the last thing to do."""
    progress = progress_of(raw, to_write, to_upload, uploaded is not None)
    progress.written += [STAMP] * written
    progress.uploaded += [STAMP] * (uploaded or 0)
    progress.sent["train"] = (uploaded or 0) * STAMP.num_bytes
    progress._start -= 1000
    assert progress.line() == expected


@pytest.mark.parametrize("columns", [80, 40])
def test_line_is_redrawn_in_place_on_a_terminal(
    raw: Path, tmp_path: Path, emulator: Emulator, columns: int
) -> None:
    """Whole words that fit into its width; gone before the next line of the log."""
    go, env = held(tmp_path)
    emulator.inject(Status(503), kind="chunk", at=1, times=None)
    seen = {b"Starting": go.touch, b"%": emulator.heal}
    printed = on_terminal(raw, tmp_path, {**emulator.environment, **env}, columns, seen)
    drawn = re.findall(r"\r([^\r\n]+)\x1b\[K", printed)
    done = r"\d+%(, \d+ (s|min) left)?, \d+ of 12 shards"
    more = r" written, \d+ uploaded, [\d.,]+ images/s(, [\d.]+ (bytes|KB|MB)/s\.)?"
    lines = [line for line in drawn if "%" in line]
    pattern = done + (more if columns == 80 else r"( written(, \d+ uploaded)?)?")
    assert [line for line in lines if not re.fullmatch(pattern, line)] == []
    assert lines
    assert any(re.fullmatch(r"Starting \d workers?\.", line) for line in drawn)
    assert [line for line in drawn if len(line) >= columns] == []
    rest = re.sub(r"\r[^\r\n]*\x1b\[K", "", printed)
    assert "images/s, " in rest  # of all, at the end
    for line in rest.splitlines():
        assert re.match(r"20\d\d-\d\d-\d\d ", line), line


def test_lines_are_plain_on_a_terminal_that_is_dumb(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    env = {**emulator.environment, "TERM": "dumb"}
    printed = on_terminal(raw, tmp_path, env, 80, {})
    assert "The data set is complete" in printed
    for line in printed.splitlines():
        assert re.match(r"20\d\d-\d\d-\d\d ", line), line
        assert line.isprintable()


def on_terminal(
    raw: Path,
    tmp_path: Path,
    env: Mapping[str, str],
    columns: int,
    seen: Mapping[bytes, Callable[[], None]],
) -> str:
    """Runs the command on a terminal of so many columns; returns what it printed.

    What is to be `seen` comes before the command can go on: each has its function called.
    """
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}/scratch"]
    command = ["timeout", "--foreground", "300"]  # if something is never seen
    command += [sys.executable, str(SCRIPT), *flags, *UPLOAD, *SHARDS]
    variables = environment({"TERM": "xterm", **env})
    process = subprocess.Popen(command, env=variables, stdout=end, stderr=end)
    os.close(end)
    printed = b""
    with contextlib.suppress(OSError):  # the command has ended
        while data := os.read(terminal, 10_000):
            printed += data
            for text in seen:
                if text in printed:
                    seen[text]()
    os.close(terminal)
    assert process.wait() == 0, printed
    return printed.decode()
