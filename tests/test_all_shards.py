"""Section 6: all shards, written by any number of processes."""

import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import contract
import jpegs
import pytest
from command import IMPORTS, REPOSITORY, Finished, run_code, run_command
from processes import Run, finished_shards, wait_for

import imagenet_to_gcs as script

SHARDS = ("--training_shards=9", "--validation_shards=3")  # two of them are empty


def files_of(directory: Path) -> dict[str, bytes]:
    """Reads all files, the hidden ones too, by their path in the directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


Runs = Mapping[int, tuple[Finished, Path]]


@pytest.fixture(scope="module")
def runs(mixed_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What the command says and writes with 1, 2 and 3 workers."""
    scratch = tmp_path_factory.mktemp("runs")
    return {
        workers: (
            run_command(
                f"--raw_data_dir={mixed_raw}",
                f"--local_scratch_dir={scratch / str(workers)}",
                f"--num_workers={workers}",
                "--nogcs_upload",
                *SHARDS,
                env=IMPORTS if workers == 1 else {},
            ),
            scratch / str(workers),
        )
        for workers in (1, 2, 3)
    }


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_shards_are_the_contracts(runs: Runs, mixed_raw: Path, workers: int) -> None:
    finished, scratch = runs[workers]
    assert finished.status == 0, finished.stderr
    contract.assert_shards(contract.local_shards(scratch), mixed_raw, 9, 3)


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_are_equal_when_the_number_of_workers_is_not(
    runs: Runs, workers: int
) -> None:
    """Those of the stamps and of the manifest too."""
    assert files_of(runs[workers][1]) == files_of(runs[1][1])


def test_only_shards_are_visible_when_the_run_is_done(runs: Runs) -> None:
    names = {path for path in files_of(runs[2][1]) if "/." not in f"/{path}"}
    assert names == {
        "manifest.json",
        *(f"train/train-{i:05d}-of-00009" for i in range(9)),
        *(f"validation/validation-{i:05d}-of-00003" for i in range(3)),
    }
    assert not [name for name in files_of(runs[2][1]) if name.endswith(".tmp")]


def test_run_says_what_it_does(runs: Runs, mixed_raw: Path) -> None:
    finished, scratch = runs[2]
    sizes = {
        name: sum(path.stat().st_size for path in directory.glob(pattern)) / 1000
        for name, directory, pattern in (
            ("raw", mixed_raw, "**/*.JPEG"),
            ("shards", scratch, "*/[tv]*-of-*"),
        )
    }
    expected = [
        (
            rf"Found 21 training images in 7 synsets and 8 validation images "
            rf"\({sizes['raw']:.1f} KB\) in {mixed_raw}: training images in 7 "
            rf"directories, validation images in a directory\."
        ),
        rf"Writing 12 shards of 29 images \([\d.]+ KB\) to {scratch}\.",
        (
            rf"Wrote 12 shards \(29 images, {sizes['shards']:.1f} KB\) of 12 to "
            rf"{scratch} in \d+ s, \d+ images/s, [\d.]+ [KM]B/s; encoded 8 PNG or CMYK "
            rf"images again as RGB JPEG\."
        ),
        (
            rf"The data set is complete: 12 shards of 29 images "
            rf"\({sizes['shards']:.1f} KB\) in {scratch}\."
        ),
    ]
    for line, pattern in zip(finished.lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert finished.stdout == ""


def test_log_line_begins_with_its_time(runs: Runs) -> None:
    for line in runs[2][0].stderr.splitlines():
        assert re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]", line)
        assert line.isprintable()


def test_run_imports_neither_google_cloud_nor_tensorflow(runs: Runs) -> None:
    """Without an upload; and TensorFlow lives in the workers."""
    imported = runs[1][0].imported
    assert "absl.logging" in imported
    heavy = ("google.cloud", "google.auth", "google.api_core", "tensorflow", "numpy")
    assert [name for name in imported if name.startswith(heavy)] == []


def test_sample_is_the_references(sample: Path, tmp_path: Path) -> None:
    """Compared, as by `check_records.py`, with the records that the reference makes."""
    finished = run_command(
        f"--raw_data_dir={sample}", f"--local_scratch_dir={tmp_path}", "--nogcs_upload"
    )
    assert finished.status == 0, finished.stderr
    assert any(
        line.endswith("; encoded 3 PNG or CMYK images again as RGB JPEG.")
        for line in finished.lines
    )
    shards = contract.local_shards(tmp_path)
    contract.assert_shards(shards, sample)
    lines = (sample.parent / "imagenet_sample_records.jsonl").read_text().splitlines()
    golden = dict(json.loads(line) for line in lines)
    assert len(golden) == 1_152
    found = {name: contract.read_shard(data) for name, data in shards.items()}
    assert golden == {
        name: [
            [
                record.filename,
                record.label,
                record.synset,
                record.height,
                record.width,
                record.colorspace,
                record.channels,
                record.format,
                hashlib.sha256(record.encoded).hexdigest(),
            ]
            for record in records
        ]
        for name, records in found.items()
    }


CONVERT = """if True:
    import sys
    from absl import logging
    import imagenet_to_gcs
    logging.set_verbosity(logging.INFO)
    imagenet_to_gcs.PROGRESS_SECONDS = 0.1
    if __name__ == "__main__":
        paths = imagenet_to_gcs.convert_to_tf_records(sys.argv[1], sys.argv[2])
        print(len(paths[0]), len(paths[1]), *paths[0], *paths[1], sep="\\n")
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path, Path]:
    """What a program that imports the script gets; the script's own shards."""
    raw = contract.make_raw(tmp_path_factory.mktemp("converted") / "raw")
    scratch = raw.parent / "new" / "scratch"
    return run_code(CONVERT, str(raw), str(scratch)), raw, scratch


def test_convert_to_tf_records_returns_the_paths(
    converted: tuple[Finished, Path, Path],
) -> None:
    finished, raw, scratch = converted
    assert finished.status == 0, finished.stderr
    names = contract.expected_shards(raw)
    paths = [str(scratch / name.partition("-")[0] / name) for name in names]
    assert finished.stdout.splitlines() == ["1024", "128", *paths]
    contract.assert_shards(contract.local_shards(scratch), raw)


THREADS = """if True:
    import sys, threading
    import imagenet_to_gcs
    if __name__ == "__main__":
        for scratch in sys.argv[2:]:
            arguments = sys.argv[1], scratch
            run = imagenet_to_gcs.convert_to_tf_records
            thread = threading.Thread(target=run, args=arguments)
            thread.start()
            thread.join()
"""


def test_convert_to_tf_records_runs_in_one_thread_after_another(
    raw: Path, tmp_path: Path
) -> None:
    scratches = [str(tmp_path / name) for name in ("one", "two", "three")]
    finished = run_code(THREADS, str(raw), *scratches)
    assert "Error" not in finished.stderr
    for scratch in scratches:
        contract.assert_shards(contract.local_shards(Path(scratch)), raw)


def test_no_process_is_left_when_a_program_is_killed(raw: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    command = [sys.executable, "-c", CONVERT, str(raw), str(scratch)]
    run = Run(command, {"PYTHONPATH": str(REPOSITORY)}, tmp_path / "log")
    try:
        wait_for(lambda: finished_shards(scratch), run)
        assert run.workers()
        os.kill(run.pid, signal.SIGKILL)
        run.wait_until_gone()
    finally:
        run.kill()
    assert len(finished_shards(scratch)) < 1_152


def test_progress_is_logged_while_it_runs(
    converted: tuple[Finished, Path, Path],
) -> None:
    line = re.compile(
        r"[\d,]+ of 1,152 shards, \d+ of 16 images \(\d+%\), \d+ images/s, "
        r"[\d.]+ (bytes|KB)/s(, \d+ s left)?\."
    )
    assert line.search(converted[0].stderr)


def test_convert_to_tf_records_raises_when_the_directory_is_missing(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError) as caught:
        script.convert_to_tf_records(str(tmp_path / "raw"), str(tmp_path / "scratch"))
    assert str(caught.value) == (
        f"--raw_data_dir={tmp_path}/raw must be a directory with train/, validation/ "
        "and synset_labels.txt; there is none of that name."
    )
    assert list(tmp_path.iterdir()) == []


def test_bad_images_are_all_named_and_the_other_shards_written(
    tmp_path: Path,
) -> None:
    raw = contract.make_raw(tmp_path / "raw", synsets=4, training=4, validation=4)
    huge = jpegs.jpeg("baseline", 0, 64, 48)
    frame = huge.index(b"\xff\xc0\x00\x11\x08") + 5
    bad = {
        "train/n01440764/n01440764_1.JPEG": (b"", "the file is empty"),
        "train/n01440764/n01440764_2.JPEG": (
            b"<html>",
            "not a JPEG (starts with b'<htm')",
        ),
        "train/n01440801/n01440801_3.JPEG": (
            huge[:frame] + b"\xff\xdc" * 2 + huge[frame + 4 :],
            (
                "its header declares 65,500 x 65,500 pixels of 3 components; the "
                "product must be from 1 to 536,870,911"
            ),
        ),
        "train/n01440838/n01440838_1.JPEG": (
            huge[: frame - 1] + b"\x0c" + huge[frame:],
            "Unsupported JPEG data precision 12",
        ),
        "validation/ILSVRC2012_val_00000003.JPEG": (
            huge[:1_500],
            "it is cut short: no end marker",
        ),
    }
    for name, (data, _) in bad.items():
        (raw / name).write_bytes(data)
    (raw / "train/n01440838/n01440838_4.JPEG").unlink()
    (raw / "train/n01440838/n01440838_4.JPEG").symlink_to("nothing")
    reasons = {name: reason for name, (_, reason) in bad.items()}
    reasons["train/n01440838/n01440838_4.JPEG"] = "a link to nothing"
    scratch = tmp_path / "scratch"
    finished = run_command(
        f"--raw_data_dir={raw}",
        f"--local_scratch_dir={scratch}",
        "--nogcs_upload",
        "--training_shards=16",
        "--validation_shards=4",
    )
    assert finished.status == 1
    assert sorted(finished.errors) == sorted(
        f"Cannot decode {raw / name}: {reason}." for name, reason in reasons.items()
    )
    assert finished.lines[-len(reasons) :] == [f"ERROR: {e}" for e in finished.errors]
    expected = contract.expected_shards(raw, 16, 4)
    good = {
        name
        for name, [record] in expected.items()
        if str(Path(record.path).relative_to(raw)) not in reasons
    }
    assert set(contract.local_shards(scratch)) == good
    assert len(good) == 14
    assert not (scratch / "manifest.json").exists()


# ------------------------------------------------------------------- what is said

FINISHED = script.FinishedShard("train-00000-of-01024", script.Stamp("", 0, 0, "", 0))


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        pytest.param(
            {
                "shards_to_write": 1_152,
                "images_to_write": 1_331_167,
                "shards_to_upload": 1_152,
                "shards_written": 518,
                "images_written": 640_120,
                "bytes_written": 73_200_000_000,
                "finished": [FINISHED] * 501,
            },
            (
                "518 of 1,152 shards, 640,120 of 1,331,167 images (48%), 2,134 "
                "images/s, 244.0 MB/s, uploaded 501 of 1,152, 6 min left."
            ),
            id="both",
        ),
        pytest.param(
            {
                "shards_to_write": 4,
                "images_to_write": 16,
                "shards_written": 3,
                "images_written": 12,
                "bytes_written": 30_000,
            },
            "3 of 4 shards, 12 of 16 images (75%), 0 images/s, 100 bytes/s, 2 min left.",
            id="only writing",
        ),
        pytest.param(
            {"shards_to_upload": 1_152, "finished": [FINISHED] * 576},
            "uploaded 576 of 1,152, 5 min left.",
            id="only uploading",
        ),
        pytest.param(
            {"shards_to_write": 9, "images_to_write": 1},
            "0 of 9 shards, 0 of 1 image (0%), 0 images/s, 0 bytes/s.",
            id="nothing yet",
        ),
    ],
)
def test_progress_line(counts: dict[str, Any], line: str) -> None:
    progress = script.Progress(**counts, start=time.monotonic() - 300)
    assert progress.line() == line


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.0 KB"),
        (110_049, "110.0 KB"),
        (146_900_000_000, "146.9 GB"),
        (1_500_000_000_000, "1.5 TB"),
        (2_500_000_000_000_000, "2,500.0 TB"),
    ],
)
def test_size_in_words(num_bytes: int, text: str) -> None:
    assert script._size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3_600, "60 min"),
        (11_100, "3 h 5 min"),
    ],
)
def test_duration_in_words(seconds: float, text: str) -> None:
    assert script._duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (1_024, "shard", "1,024 shards"),
        (2, "class", "2 classes"),
        (1, "class", "1 class"),
    ],
)
def test_count_in_words(number: int, noun: str, text: str) -> None:
    assert script._count(number, noun) == text
