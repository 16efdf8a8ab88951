"""Section 10: the command line, and what it refuses before any work."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import pytest
from command import IMPORTS, SCRIPT, UPLOAD, Finished, run_command

import imagenet_to_gcs as script

HEAVY = ("tensorflow", "google.cloud", "google.auth", "numpy")

DEFAULTS = {
    "project": None,
    "gcs_output_path": None,
    "local_scratch_dir": None,
    "raw_data_dir": None,
    "gcs_upload": True,
    "num_workers": None,
    "training_shards": 1024,
    "validation_shards": 128,
    "fake_imagenet": False,
}


def run_light(*flags: str, cwd: Path) -> Finished:
    """Runs the command, which must end without the imports that take seconds."""
    finished = run_command(*flags, env=IMPORTS, cwd=cwd)
    assert "absl.flags" in finished.imported
    assert [name for name in finished.imported if name.startswith(HEAVY)] == []
    lines = [line for line in finished.lines if not line.startswith("import time:")]
    return Finished(finished.status, lines, finished.stdout, finished.stderr)


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# --------------------------------------------------------------------------- flags


def test_help_shows_the_manual_and_all_flags(tmp_path: Path) -> None:
    finished = run_light("--help", cwd=tmp_path)
    assert finished.lines == []
    assert finished.stdout.startswith(script.__doc__.splitlines()[0])
    for name, default in DEFAULTS.items():
        assert re.search(rf"^  --(\[no\])?{name}: ", finished.stdout, re.MULTILINE), (
            name
        )
        assert script.FLAGS[name].default == default
    assert files_in(tmp_path) == []


def test_constants_are_the_references() -> None:
    assert script.LABELS_FILE == "synset_labels.txt"
    assert (script.TRAINING_SHARDS, script.VALIDATION_SHARDS) == (1024, 128)
    assert script.TRAINING_DIRECTORY == "train"
    assert script.VALIDATION_DIRECTORY == "validation"


@pytest.mark.parametrize(
    ("flag", "error"),
    [
        ("--no_such_flag=1", "Unknown command line flag 'no_such_flag'"),
        (
            "--num_workers=many",
            ("flag --num_workers=many: invalid literal for int() with base 10: 'many'"),
        ),
        (
            "--training_shards=",
            "flag --training_shards=: invalid literal for int() with base 10: ''",
        ),
        ("--raw_data_dir", "Missing value for flag --raw_data_dir"),
        (
            "--gcs_upload=perhaps",
            "flag --gcs_upload=perhaps: ",
        ),
    ],
)
def test_flag_is_refused(tmp_path: Path, flag: str, error: str) -> None:
    finished = run_light(flag, cwd=tmp_path)
    assert finished.status == 1
    assert finished.lines[0].startswith(f"FATAL Flags parsing error: {error}")
    assert files_in(tmp_path) == []


def test_argument_is_refused_when_it_is_no_flag(tmp_path: Path) -> None:
    """As after `--raw_data_dir $HOME/my data` without quotes."""
    flags = ["--nogcs_upload", "--raw_data_dir=/my", "data"]
    finished = run_light(*flags, cwd=tmp_path)
    assert finished.status == 1
    assert finished.lines[-1] == "All arguments must be flags; found 'data'."
    assert files_in(tmp_path) == []


# ------------------------------------------------------------------ what cannot work

NO_DIRECTORY = (
    "must be a directory with train/, validation/ and synset_labels.txt; there is none "
    "of that name."
)
NO_PROJECT = "--project must be given for the upload (or pass --nogcs_upload)."
NO_PATH = (
    "--gcs_output_path=gs://bucket/directory must be given for the upload (or pass "
    "--nogcs_upload)."
)
RAW = "--raw_data_dir=RAW"


@pytest.mark.parametrize(
    ("flags", "errors"),
    [
        pytest.param(
            ["--nogcs_upload"],
            ["--raw_data_dir must name the directory of the raw ImageNet."],
            id="no raw directory named",
        ),
        pytest.param(
            ["--nogcs_upload", "--raw_data_dir=/no/such"],
            [f"--raw_data_dir=/no/such {NO_DIRECTORY}"],
            id="no such raw directory",
        ),
        pytest.param(
            ["--nogcs_upload", "--raw_data_dir=RAW/synset_labels.txt"],
            [f"--raw_data_dir=RAW/synset_labels.txt {NO_DIRECTORY}"],
            id="raw directory is a file",
        ),
        pytest.param(
            ["--nogcs_upload", RAW, "--local_scratch_dir=RAW/validation/.."],
            ["--local_scratch_dir must be another directory than --raw_data_dir."],
            id="scratch directory is the raw one",
        ),
        pytest.param([RAW, UPLOAD[1]], [NO_PROJECT], id="no project"),
        pytest.param([RAW, "--project=", UPLOAD[1]], [NO_PROJECT], id="empty project"),
        pytest.param([RAW, UPLOAD[0]], [NO_PATH], id="no output path"),
        pytest.param(
            [RAW, UPLOAD[0], "--gcs_output_path="], [NO_PATH], id="empty output path"
        ),
        pytest.param(
            [RAW, UPLOAD[0], "--gcs_output_path=bucket/imagenet"],
            [
                (
                    "--gcs_output_path=bucket/imagenet must start with gs://, as in "
                    "gs://bucket/directory."
                )
            ],
            id="no gs://",
        ),
        pytest.param(
            [RAW, UPLOAD[0], "--gcs_output_path=gs:///imagenet"],
            [
                (
                    "--gcs_output_path=gs:///imagenet must name a bucket after gs://: 3 to "
                    "222 characters of a-z, 0-9, '-', '_' and '.'; found ''."
                )
            ],
            id="no bucket",
        ),
        pytest.param(
            [RAW, "--nogcs_upload", "--num_workers=0"],
            ["--num_workers must be from 1 to 99,999; found 0."],
            id="no workers",
        ),
        pytest.param(
            [RAW, "--nogcs_upload", "--training_shards=-3"],
            ["--training_shards must be from 1 to 99,999; found -3."],
            id="negative shards",
        ),
        pytest.param(
            [RAW, "--nogcs_upload", "--validation_shards=100000"],
            ["--validation_shards must be from 1 to 99,999; found 100,000."],
            id="too many shards",
        ),
        pytest.param(
            [],
            [
                "--raw_data_dir must name the directory of the raw ImageNet.",
                NO_PROJECT,
                NO_PATH,
            ],
            id="no flags",
        ),
    ],
)
def test_command_is_refused(
    raw: Path, tmp_path: Path, flags: list[str], errors: list[str]
) -> None:
    before = files_in(tmp_path)
    given = [flag.replace("RAW", str(raw)) for flag in flags]
    finished = run_light(*given, cwd=tmp_path)
    expected = [f"ERROR: {error}".replace("RAW", str(raw)) for error in errors]
    assert (finished.status, finished.lines) == (1, expected)
    assert files_in(tmp_path) == before


def empty_train(raw: Path) -> None:
    remove_train(raw)
    (raw / "train").mkdir()


def remove_train(raw: Path) -> None:
    shutil.rmtree(raw / "train")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        pytest.param(
            lambda raw: (raw / "synset_labels.txt").unlink(),
            (
                "Cannot read RAW/synset_labels.txt: No such file or directory. It must "
                "hold the synset of each validation image, a line each, in the order "
                "of their names."
            ),
            id="no label file",
        ),
        pytest.param(
            empty_train,
            "No images match RAW/train/*/*.JPEG. Found nothing there.",
            id="empty train",
        ),
        pytest.param(
            remove_train,
            (
                "No directory RAW/train, and no ILSVRC2012_img_train.tar beside it. "
                "Found synset_labels.txt, validation."
            ),
            id="no train",
        ),
        pytest.param(
            contract.label_file("n01440764\nn01440764\nn01440764\n"),
            (
                "RAW/synset_labels.txt has 3 labels and RAW/validation 4 images; they "
                "must be equal in number."
            ),
            id="fewer labels than images",
        ),
        pytest.param(
            contract.label_file(""),
            (
                "RAW/synset_labels.txt has 0 labels and RAW/validation 4 images; they "
                "must be equal in number."
            ),
            id="no labels",
        ),
        pytest.param(
            contract.label_file("n01440764\n\nn01440764\nn01440764\n"),
            (
                "Line 2 of RAW/synset_labels.txt must be a single synset such as "
                "n01440764; found ''."
            ),
            id="empty label",
        ),
        pytest.param(
            lambda raw: (raw / "tf_records").touch(),
            ("--local_scratch_dir=RAW/tf_records: RAW/tf_records must be a directory."),
            id="scratch directory is a file",
        ),
    ],
)
def test_command_is_refused_when_the_raw_directory_is_wrong(
    raw: Path, tmp_path: Path, spoil: Callable[[Path], None], error: str
) -> None:
    spoil(raw)
    before = files_in(tmp_path)
    finished = run_light(f"--raw_data_dir={raw}", "--nogcs_upload", cwd=tmp_path)
    assert finished.status == 1
    assert finished.errors == [error.replace("RAW", str(raw))]
    assert finished.lines[-1] == f"ERROR: {finished.errors[0]}"
    assert files_in(tmp_path) == before


def test_command_is_refused_when_the_disk_is_too_small(raw: Path) -> None:
    """The images are made large without taking any room."""
    if shutil.disk_usage(raw).free > 9 * 10**12:
        pytest.skip("needs a disk with less than 9 TB free")
    with (raw / "train/n01440764/n01440764_1.JPEG").open("r+b") as file:
        try:
            file.truncate(10**13)
        except OSError:
            pytest.skip("needs a file system with sparse files of 10 TB")
    finished = run_command(f"--raw_data_dir={raw}", "--nogcs_upload")
    assert finished.status == 1
    [error] = finished.errors
    assert re.fullmatch(
        rf"--local_scratch_dir={raw}/tf_records must have room for 10\.0 TB of "
        r"shards; its disk has [\d.,]+ [KMGT]B free\. Make room, or choose another "
        r"disk\.",
        error,
    )
    assert not (raw / "tf_records").exists()


def test_dry_run_writes_nothing(raw: Path, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    flags = [f"--raw_data_dir={raw}", "--nogcs_upload", "--dry_run"]
    finished = run_light(*flags, cwd=tmp_path)
    assert finished.status == 0
    assert re.fullmatch(
        rf"Would write 1,152 shards of 16 images \([\d.]+ KB\) to {raw}/tf_records\.",
        finished.lines[-1],
    )
    assert files_in(tmp_path) == before


# ------------------------------------------------------------- imported by a program


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"gcs_project": None}, NO_PROJECT, id="no project"),
        pytest.param({"gcs_output_path": None}, NO_PATH, id="no output path"),
        pytest.param(
            {"gcs_output_path": "bucket"},
            (
                "--gcs_output_path=bucket must start with gs://, as in "
                "gs://bucket/directory."
            ),
            id="no gs://",
        ),
        pytest.param(
            {"raw_data_dir": None},
            "--raw_data_dir must name the directory of the raw ImageNet.",
            id="no raw directory named",
        ),
        pytest.param(
            {"raw_data_dir": "/no/such"},
            f"--raw_data_dir=/no/such {NO_DIRECTORY}",
            id="no such raw directory",
        ),
        pytest.param(
            {"num_workers": 0},
            "--num_workers must be from 1 to 99,999; found 0.",
            id="no workers",
        ),
    ],
)
def test_run_raises_when_it_cannot_work(
    raw: Path, arguments: dict[str, Any], error: str
) -> None:
    before = files_in(raw)
    good = {
        "raw_data_dir": str(raw),
        "gcs_upload": True,
        "gcs_project": "p",
        "gcs_output_path": "gs://bucket/imagenet",
        "local_scratch_dir": str(raw / "tf_records"),
    }
    with pytest.raises(ValueError) as caught:
        script.run(**{**good, **arguments})
    assert str(caught.value) == error
    assert files_in(raw) == before


@pytest.mark.parametrize(
    ("limit", "number"),
    [
        ("max 100000\n", len(os.sched_getaffinity(0))),
        ("50000 100000\n", 1),  # half a processor
        ("6400000 100000\n", min(64, len(os.sched_getaffinity(0)))),
        (None, len(os.sched_getaffinity(0))),  # no cgroup v2
        ("0 100000\n", 1),
        ("100000 0\n", len(os.sched_getaffinity(0))),
    ],
)
def test_workers_are_as_many_as_the_container_has_processors(
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str | None,
    number: int,
) -> None:
    if limit:
        (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(script, "PROCESSOR_LIMIT", str(tmp_path / "cpu.max"))
    options = script.Options(
        raw_data_dir=str(raw),
        gcs_upload=False,
        gcs_project=None,
        gcs_output_path=None,
        local_scratch_dir=None,
    )
    assert options.workers == number


# ------------------------------------------------------------------------ packaging


def test_script_can_be_run_by_its_name() -> None:
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")
    assert SCRIPT.stat().st_mode & 0o111
