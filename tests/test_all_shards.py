"""Section 6: all shards, written by any number of processes."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
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
from emulator import Emulator

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
            rf"\({size(mixed_raw, '**/*.JPEG')}\) in {mixed_raw}: training images in 7 "
            r"directories, validation images in a directory\."
        ),
        (
            r"WARNING: 2 of 9 training shards will be empty, given 21 training images; "
            r"a smaller --training_shards avoids that\."
        ),
        rf"Writing 12 shards of 29 images \([\d.]+ KB\) to {scratch}\.",
        (
            rf"Wrote 12 of 12 shards \(29 images, {written}\) to {scratch} in \d+ s, "
            r"\d+ images/s, [\d.]+ ([KM]B|bytes)/s; encoded 8 PNG or CMYK images again "
            r"as RGB JPEG\."
        ),
        rf"The data set is complete: 12 shards of 29 images \({written}\) in {scratch}\.",
    ]
    # On a slow machine also a line of progress, every 10 seconds.
    lines = [line for line in finished.lines if not re.match(r"\d+ of 12", line)]
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
imagenet_to_gcs.LOG_SECONDS = 0.1
for upload, training_shards in ((False, 20), (True, 40)):
    imagenet_to_gcs.run(
        sys.argv[1],
        gcs_upload=upload,
        gcs_project="project",
        gcs_output_path="gs://bucket/imagenet",
        local_scratch_dir=sys.argv[2],
        training_shards=training_shards,
        validation_shards=4,
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
    done = r"\d+ of {} shards, \d+ of \d+ images? \(\d+%\), \d+ images/s, "
    speed = r"[\d.]+ (bytes|KB|MB)/s"
    left = r"(, \d+ (s|min) left)?\."
    written, uploaded = done.format(24) + speed, done.format(40) + speed
    assert re.search(written + left, finished.stderr)
    assert re.search(rf"{uploaded}, uploaded \d+ of 44{left}", finished.stderr)


def test_speed_is_that_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last half minute, so that a link that stalls is seen."""
    shard = script.Shard("train", 0, 1, ())
    progress = script.Progress(script.Work(to_write=[shard]), is_uploading=False)
    progress.wrote(shard.name, script.Stamp("", 10**9, 10**15, ""))
    assert ", 0 images/s" not in progress.line()
    monkeypatch.setattr(script, "SPEED_SECONDS", 0.1)
    for _ in range(3):
        time.sleep(0.15)
        line = progress.line()
    assert ", 0 images/s, 0 bytes/s" in line


def test_line_is_redrawn_in_place_on_a_terminal(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    """Cut to its width, and gone before the next line of the log."""
    emulator.latency = 0.3
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}/scratch"]
    command = [sys.executable, str(SCRIPT), *flags, *UPLOAD, *SHARDS]
    process = subprocess.Popen(
        command, env=environment(emulator.environment), stdout=end, stderr=end
    )
    os.close(end)
    printed = b""
    with contextlib.suppress(OSError):  # the command has ended
        while data := os.read(terminal, 10_000):
            printed += data
    os.close(terminal)
    assert process.wait() == 0, printed
    drawn = re.findall(r"\r([^\r\n]+)\x1b\[K", printed.decode())
    assert [line for line in drawn if re.search(r"\d+ of 12 shards, ", line)]
    assert [line for line in drawn if len(line) >= 60] == []
    rest = re.sub(r"\r[^\r\n]*\x1b\[K", "", printed.decode())
    assert "images/s, uploaded" not in rest
    for line in rest.splitlines():
        assert re.match(r"20\d\d-\d\d-\d\d ", line), line


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (script._size(0), "0 bytes"),
        (script._size(999), "999 bytes"),
        (script._size(1_000), "1.0 KB"),
        (script._size(146_900_000_000), "146.9 GB"),
        (script._size(2_500_000_000_000_000), "2,500.0 TB"),
        (script._duration(0.2), "0 s"),
        (script._duration(99), "99 s"),
        (script._duration(100), "2 min"),
        (script._duration(3_600), "60 min"),
        (script._duration(11_100), "3 h 5 min"),
        (script._count(1, "image"), "1 image"),
        (script._count(0, "image"), "0 images"),
        (script._count(1_024, "shard"), "1,024 shards"),
        (script._count(2, "class"), "2 classes"),
    ],
)
def test_numbers_in_words(said: str, text: str) -> None:
    assert said == text
