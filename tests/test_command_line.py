"""The command line, and what it refuses before any work."""

import os
import re
from pathlib import Path

import contract
import pytest
from absl.flags import FLAGS
from command import IMPORTS, SCRIPT, UPLOAD, Finished, run_command

import imagenet_to_gcs as script

HEAVY = ("tensorflow", "google.cloud.", "google.auth", "numpy")

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


@pytest.mark.parametrize("flag", ["--help", "-h", "-?", "--helpfull"])
def test_help_begins_with_how_to_use_it(tmp_path: Path, flag: str) -> None:
    """And lists the flags, without those of libraries that no user needs."""
    finished = run_light(flag, cwd=tmp_path)
    assert (finished.status, finished.lines) == (0, [])
    assert re.match(r"(?i)usage", finished.stdout)
    start = finished.stdout.partition("\n  --")[0]
    assert len(re.findall(r"imagenet_to_gcs(?:\.py)? .*--", start)) >= 2
    assert max(map(len, finished.stdout.splitlines())) <= 80
    for name in ("flagfile", "verbosity", "help", "version"):
        assert re.search(rf"^  --(\[no\])?{name}: ", finished.stdout, re.MULTILINE)
    for name, default in DEFAULTS.items():
        pattern = rf"^ *--(\[no\])?{name}\b"
        assert re.search(pattern, finished.stdout, re.MULTILINE), name
        assert FLAGS[name].default == default
    for name in ("pdb", "only_check_args", "xml_output_file", "logger_levels"):
        assert f"--{name}" not in finished.stdout
        assert f"--[no]{name}" not in finished.stdout
    assert files_in(tmp_path) == []


def test_version_is_printed(tmp_path: Path) -> None:
    finished = run_light("--version", cwd=tmp_path)
    assert (finished.status, finished.lines) == (0, [])
    assert finished.stdout == f"imagenet_to_gcs.py {script.__version__}\n"


def test_constants_are_the_references() -> None:
    assert script.LABELS_FILE == "synset_labels.txt"
    assert (script.TRAINING_SHARDS, script.VALIDATION_SHARDS) == (1024, 128)
    assert script.TRAINING_DIRECTORY == "train"
    assert script.VALIDATION_DIRECTORY == "validation"


@pytest.mark.parametrize(
    ("flag", "error"),
    [
        ("--no_such_flag=1", "Unknown command line flag 'no_such_flag'"),
        ("--num_workers=many", "flag --num_workers=many: invalid literal for int()"),
        ("--training_shards=", "flag --training_shards=: invalid literal for int()"),
        ("--task_index=", "flag --task_index=: invalid literal for int()"),
        ("--raw_data_dir", "Missing value for flag --raw_data_dir"),
        ("--gcs_upload=perhaps", "flag --gcs_upload=perhaps: "),
        ("--nodry_run=true", "--nodry_run=true does not take an argument"),
        ("--verbosity=junk", "flag --verbosity=junk: invalid literal for int()"),
        ("--stderrthreshold=zzz", "--stderrthreshold must be one of"),
        ("--logger_levels=a:b", "Unknown level: 'b'"),
        ("--flagfile", "--flagfile with no argument"),
        (
            "--flagfile=no",
            "Unable to open flagfile: [Errno 2] No such file or directory",
        ),
        ("--flagfile=.", "Unable to open flagfile: [Errno 21] Is a directory: '.'"),
        (f"--flagfile={300 * 'x'}", "Unable to open flagfile: [Errno 36] File name"),
        ("--flagfile=binary", "'utf-8' codec can't decode"),
        ("--flagfile=nested", "Unable to open flagfile: [Errno 2] No such file or dir"),
        ("--flagfile=wrong", "flag --num_workers=x: invalid literal for int()"),
    ],
)
def test_flag_is_refused(tmp_path: Path, flag: str, error: str) -> None:
    """`--task_index=` is what an engine's variable gives outside of the engine."""
    files = {
        "binary": b"\xff\n",
        "nested": b"--flagfile=no\n",
        "wrong": b"--num_workers=x",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    finished = run_light(flag, cwd=tmp_path)
    assert finished.status == 1
    first, *others = finished.lines
    assert first.startswith(f"FATAL Flags parsing error: {error}")
    assert others == ["See --help."]
    assert files_in(tmp_path) == sorted(files)


def test_argument_is_refused_when_it_is_no_flag(tmp_path: Path) -> None:
    """As after `--raw_data_dir $HOME/my data` without quotes."""
    flags = ["--nogcs_upload", "--raw_data_dir=/my", "data"]
    finished = run_light(*flags, cwd=tmp_path)
    assert finished.status == 1
    said = "FATAL Flags parsing error: All arguments must be flags; found 'data'."
    assert finished.lines == [said, "See --help."]
    assert files_in(tmp_path) == []


# ------------------------------------------------------------------ what cannot work

NO_RAW = "--raw_data_dir= must be the directory of the raw ImageNet, but none is given."
NO_PROJECT = "--project must be given for the upload (or pass --nogcs_upload)."
NO_PATH = "--gcs_output_path= must start with gs://, as in gs://bucket/directory."
NO_GS = "--gcs_output_path=bucket/x must start with gs://, as in gs://bucket/directory."
RANGE = "must be from 1 to 99,999; found"
IN_RAW = "--local_scratch_dir=RAW/.* must not be --raw_data_dir, or in its train or "
LOCAL = "--nogcs_upload --raw_data_dir=RAW"
PROJECT, PATH = UPLOAD
REFUSED = {
    "": [NO_RAW, NO_PROJECT, NO_PATH],
    "--nogcs_upload": [NO_RAW],
    "--nogcs_upload --fake_imagenet": [NO_RAW],
    "--nogcs_upload --raw_data_dir=/no/such": [
        "--raw_data_dir=/no/such must be .*, but /no/such does not exist."
    ],
    "--nogcs_upload --raw_data_dir=RAW/synset_labels.txt --local_scratch_dir=RAW/new": [
        r"--raw_data_dir=RAW/.*, but RAW/synset_labels\.txt is no accessible directory"
    ],
    f"{LOCAL} --local_scratch_dir=RAW/validation/..": [IN_RAW],
    f"{LOCAL} --local_scratch_dir=RAW/train": [IN_RAW],
    f"{LOCAL} --local_scratch_dir=RAW/validation/new/scratch": [IN_RAW],
    f"--raw_data_dir=RAW {PATH}": [NO_PROJECT],
    f"--raw_data_dir=RAW {PATH} --project=": [NO_PROJECT],
    f"--raw_data_dir=RAW {PROJECT}": [NO_PATH],
    f"--raw_data_dir=RAW {PROJECT} --gcs_output_path=": [NO_PATH],
    f"--raw_data_dir=RAW {PROJECT} --gcs_output_path=bucket/x": [NO_GS],
    f"{LOCAL} --nokeep_local_shards": [
        "--nokeep_local_shards needs an upload: drop --nogcs_upload."
    ],
    f"{LOCAL} --num_workers=0 --training_shards=-3 --validation_shards=100000": [
        f"--num_workers {RANGE} 0.",
        f"--training_shards {RANGE} -3.",
        f"--validation_shards {RANGE} 100",
    ],
    f"{LOCAL} --task_count=0": [f"--task_count {RANGE} 0."],
    "--raw_data_dir=RAW/new --fake_imagenet --num_workers=-1": [
        f"--num_workers {RANGE} -1.",
        NO_PROJECT,
        NO_PATH,
    ],
}
REFUSED |= {
    f"{LOCAL} --task_count={count} {index and f'--task_index={index}'}": [
        f"--task_index must be from 0 to .*; found {index or None}."
    ]
    for index, count in (("", 3), ("3", 3), ("-1", 3), ("1", 1))
}
REFUSED |= {
    f"{LOCAL} --local_scratch_dir=RAW/new {flag}={url}x": [
        rf"{flag}={url}x must be .* directory.*, but it is a URL\."
    ]
    for flag in ("--raw_data_dir", "--local_scratch_dir")
    for url in ("gs://", "s3://", "file://", "https://", "wasb-s.x://")
}


@pytest.mark.parametrize(("flags", "errors"), REFUSED.items(), ids=range(len(REFUSED)))
def test_command_is_refused(
    raw: Path, tmp_path: Path, flags: str, errors: list[str]
) -> None:
    """Each error begins as expected, or matches an expression that has a `.*`."""
    before = files_in(tmp_path)
    finished = run_light(*flags.replace("RAW", str(raw)).split(), cwd=tmp_path)
    assert finished.status == 1
    assert finished.lines == [f"ERROR: {error}" for error in finished.errors]
    assert len(finished.errors) == len(errors), finished.errors
    for expected in errors:
        pattern = expected if ".*" in expected else re.escape(expected)
        pattern = pattern.replace("RAW", str(raw))
        assert any(re.match(pattern, error) for error in finished.errors), pattern
    assert files_in(tmp_path) == before


def test_home_is_meant_by_a_tilde(raw: Path, tmp_path: Path) -> None:
    """bash leaves `--raw_data_dir=~/raw` as it is."""
    flags = ["--raw_data_dir=~/raw", "--local_scratch_dir=~/new/scratch"]
    small = ["--nogcs_upload", "--training_shards=3", "--validation_shards=2"]
    home = {"HOME": str(raw.parent)}
    finished = run_command(*flags, *small, env=home, cwd=tmp_path / "raw")
    assert finished.status == 0, finished.stderr
    scratch = raw.parent / "new" / "scratch"
    contract.assert_shards(contract.local_shards(scratch), raw, 3, 2)
    assert not list(raw.glob("~*"))


def test_scratch_is_refused_when_its_train_is_the_raw_one_by_a_link(raw: Path) -> None:
    """As README lays out a copy from Kaggle."""
    contract.change(raw, "mkdir linked; ln -s $PWD/train $PWD/validation *.txt linked")
    flags = f"--raw_data_dir={raw}/linked", f"--local_scratch_dir={raw}"
    finished = run_light(*flags, "--nogcs_upload", cwd=raw)
    assert finished.status == 1
    assert "must not be --raw_data_dir, or in its train or " in finished.errors[0]
    assert not [*raw.glob("train/*-of-*")]


DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_log_shows_no_character_that_turns_the_direction(tmp_path: Path) -> None:
    directory = f"{tmp_path}/{DIRECTIONS}GEPJ.exe"
    finished = run_command(f"--raw_data_dir={directory}", "--nogcs_upload")
    assert finished.status == 1
    assert not set(DIRECTIONS) & set(finished.stderr)
    for character in DIRECTIONS:
        assert f"\\u{ord(character):04x}" in finished.stderr


# ------------------------------------------------------------- imported by a program


def test_run_raises_when_it_cannot_work(raw: Path) -> None:
    """What the command says, as the lines of one error."""
    before = files_in(raw)
    with pytest.raises(ValueError) as caught:
        script.run(str(raw), gcs_output_path="bucket/x", num_workers=0)
    lines = str(caught.value).splitlines()
    assert sorted(lines) == sorted([f"--num_workers {RANGE} 0.", NO_PROJECT, NO_GS])
    assert files_in(raw) == before


def test_path_may_be_of_any_bytes(raw: Path) -> None:
    """They arrive as surrogates; so they do from `os.listdir`."""
    path = raw.rename(raw.parent / os.fsdecode(b"raw\xff"))
    scratch = raw.parent / os.fsdecode(b"\xfe")
    flags = [f"--raw_data_dir={path}", f"--local_scratch_dir={scratch}"]
    small = ["--nogcs_upload", "--training_shards=3", "--validation_shards=2"]
    finished = run_command(*flags, *small)
    assert finished.status == 0, finished.stderr
    contract.assert_shards(contract.local_shards(scratch), path, 3, 2)
    assert script.Options(path, False, None, None, scratch).raw_dir == str(path)


@pytest.mark.parametrize(
    ("limit", "number"),
    [
        ("max 100000\n", len(os.sched_getaffinity(0))),
        ("50000 100000\n", 1),  # half a processor
        ("6400000 100000\n", min(64, len(os.sched_getaffinity(0)))),
        (None, len(os.sched_getaffinity(0))),  # no cgroup v2
        ("0 100000\n", 1),
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
    options = script.Options(str(raw), False, None, None, None)
    assert options.workers == number


def test_script_can_be_run_by_its_name() -> None:
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")
    assert SCRIPT.stat().st_mode & 0o111
