"""Disk, machine and caller fail, and each is called by its name.

Each test ends in the exact words, and in no traceback.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import contract
import pytest
from command import SCRIPT, UPLOAD, Finished, run_code, run_command
from emulator import Emulator, Status
from processes import (
    held,
    run_shell,
    running,
    small_disk,
    started,
    unprivileged,
    wait_for,
)

import imagenet_to_gcs as script

SHARDS = ("--training_shards=8", "--validation_shards=3", "--num_workers=2")
FIX = "Fix this and rerun the same command."
FAILS = "The disk fails or is gone"
FULL = f"Cannot write to stdout: No space left on device. {FIX}"

FAILING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* After five calls in a process for images, $FAILING (open or read) fails: $ERROR. */
static int failing(const char *call, const char *path) {
  static int calls;
  const char *end = strrchr(path, '.');
  if (strcmp(getenv("FAILING"), call) || !end || strcmp(end, ".JPEG")) return 0;
  if (++calls <= 5) return 0;
  errno = atoi(getenv("ERROR"));
  return 1;
}
static int (*next_open)(const char *, int, ...);
int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  if (!next_open) next_open = dlsym(RTLD_NEXT, "open64");
  return failing("open", path) ? -1 : next_open(path, flags, mode);
}
ssize_t read(int fd, void *data, size_t size) {
  static ssize_t (*next)(int, void *, size_t);
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  if (!next) next = dlsym(RTLD_NEXT, "read");
  return failing("read", path) ? -1 : next(fd, data, size);
}
"""


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload, which has images fail to be opened or read."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    library = tmp_path_factory.mktemp("failing") / "failing.so"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-o", str(library), "-", "-ldl"]
    subprocess.run(command, input=FAILING, text=True, check=True)
    return library


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A raw ImageNet of 150 + 33 images."""
    return contract.make_raw(tmp_path / "raw", 10, 15, 33)


def flags(raw: Path, *more: str) -> list[str]:
    scratch = f"--local_scratch_dir={raw.parent}/scratch"
    return [f"--raw_data_dir={raw}", scratch, "--nogcs_upload", *SHARDS, *more]


def command(*given: str) -> str:
    return shlex.join([sys.executable, str(SCRIPT), *given])


def only_error(done: Finished, status: int = 1) -> str:
    """What the one line says that ends the run."""
    assert "Traceback" not in done.stderr
    assert done.status == status
    [error] = done.errors
    assert done.lines[-1] == f"ERROR: {error}"
    return error


# ------------------------------------------------------------------ a disk that fails


@pytest.mark.parametrize("call", ["read", "open"])
@pytest.mark.parametrize("number", [5, 116], ids=["EIO", "ESTALE"])
def test_failing_disk_stops_the_run_in_one_line(
    many: Path, failing_disk: Path, call: str, number: int
) -> None:
    env = {"LD_PRELOAD": str(failing_disk), "FAILING": call, "ERROR": str(number)}
    error = only_error(run_command(*flags(many), env=env))
    assert error.startswith(f"Cannot read 20 images below {many}, the last {many}/")
    assert error.endswith(f".JPEG: {os.strerror(number)}. {FAILS}. {FIX}")


def test_raw_directory_that_moves_stops_the_run_in_one_line(many: Path) -> None:
    go, env = held(many.parent)
    with started(*flags(many), env=env) as run:
        wait_for(lambda: "Writing " in run.output(), run)
        many.rename(many.with_name("moved"))
        go.touch()
        error = only_error(run.finish())
    assert error.startswith(f"Cannot read 20 images below {many}, the last {many}/")
    assert error.endswith(f".JPEG: {script.GONE}. {FIX}")


def test_disk_that_is_unmounted_stops_the_run_in_one_line(
    many: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 2**26) as disk:
        raw = shutil.copytree(many, disk / "raw")
        scratch = f"--local_scratch_dir={tmp_path / 'elsewhere'}"
        go, env = held(tmp_path)
        with started(*flags(raw), scratch, env=env) as run:
            wait_for(lambda: "Writing " in run.output(), run)
            subprocess.run(["umount", "-l", str(disk)], check=True)
            go.touch()
            error = only_error(run.finish())
        mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk)]
        subprocess.run(mount, check=True)  # to be unmounted once more
    assert error.startswith(f"Cannot read 20 images below {raw}, the last {raw}/")
    assert error.endswith(f".JPEG: {script.GONE}. {FIX}")


def test_few_unreadable_images_are_named_as_bad_images_are(many: Path) -> None:
    """As many as stop no run: 19 that are gone, over all shards."""
    gone = sorted(many.glob("train/*/*_1.JPEG")) + sorted(many.glob("train/*/*_2.JPEG"))
    go, env = held(many.parent)
    with started(*flags(many), env=env) as run:
        wait_for(lambda: "Writing " in run.output(), run)
        for path in gone[:19]:
            path.unlink()
        go.touch()
        done = run.finish()
    assert done.status == 1
    said = sorted(f"Cannot read {path}: {script.GONE}." for path in gone[:19])
    assert done.errors == said


def test_many_bad_images_are_counted(many: Path) -> None:
    code = f"""if True:
        import sys
        import imagenet_to_gcs
        imagenet_to_gcs.NAMED_IMAGES = 3
        sys.argv[1:] = {flags(many)}
        imagenet_to_gcs.app.run(
            imagenet_to_gcs.main, flags_parser=imagenet_to_gcs.parse_flags
        )
    """
    paths = sorted(many.glob("train/*/*.JPEG"))[:10]
    for path in paths:
        path.write_bytes(b"bad")
    done = run_code(code)
    assert done.status == 1
    said = "Some shards were not written. Replace 10 unusable images and rerun."
    assert said in done.lines, done.stderr
    assert [str(path) in error for path, error in zip(paths, done.errors)] == [True] * 3


# ------------------------------------------------------------------------ limits


@pytest.mark.parametrize("limit", [16, 24])
def test_limit_of_open_files_is_named(many: Path, limit: int) -> None:
    """24 are enough for the run, but not for 32 images ahead."""
    few = command(*flags(many), "--training_shards=2")
    error = only_error(run_shell(f"ulimit -n {limit}; exec {few}"))
    assert "Too many open files" in error
    assert error.endswith("Raise the limit (ulimit -n) and rerun the same command.")


def test_lack_of_memory_is_named(raw: Path) -> None:
    """Most of the image of 700 MB is a hole."""
    path = min(raw.glob("train/*/*.JPEG"))
    os.truncate(path, 700_000_000)
    few = command(*flags(raw), "--num_workers=1")
    done = run_shell(f"ulimit -v 2000000; exec {few}")
    assert only_error(done) == (
        f"Cannot read {path}: Cannot allocate memory. Allow the run more memory, "
        "or rerun it with fewer --num_workers."
    )


# -------------------------------------------------------------------- before a run

CLOSED = {
    ("mkdir closed; mv raw closed; chmod 666 closed", "closed/raw"): (
        "--raw_data_dir=TMP/closed/raw must be the directory of the raw ImageNet, but "
        "TMP/closed is no accessible directory."
    ),
    ("chmod 666 raw/train", "raw"): "Cannot enter TMP/raw/train: Permission denied.",
    ("chmod 666 raw/train/n01440764", "raw"): (
        "Cannot enter TMP/raw/train/n01440764: Permission denied."
    ),
    ("chmod 333 raw/train", "raw"): "Cannot list TMP/raw/train: Permission denied.",
    ("mkdir -m 333 new", "new"): "Cannot list TMP/new: Permission denied.",
    ("touch scratch", "raw"): (
        "--local_scratch_dir=TMP/scratch must be a local directory to write to, but "
        "TMP/scratch is no writable directory."
    ),
}


@pytest.mark.parametrize(("closing", "error"), CLOSED.items())
def test_verb_is_that_of_what_failed(
    raw: Path, closing: tuple[str, str], error: str
) -> None:
    commands, place = closing
    contract.change(raw.parent, commands)
    more = ["--fake_imagenet"] if place == "new" else []
    scratch = f"--local_scratch_dir={raw.parent}/scratch"
    given = [f"--raw_data_dir={raw.parent / place}", scratch, "--nogcs_upload", *more]
    done = run_shell(f"exec {shlex.join(unprivileged())} {command(*given)}")
    contract.change(raw.parent, "chmod -R u+rwX .")
    assert only_error(done) == error.replace("TMP", str(raw.parent))


def test_lost_working_directory_is_named(tmp_path: Path) -> None:
    relative = command("--raw_data_dir=raw", "--nogcs_upload")
    done = run_shell(f"cd {tmp_path}; mkdir x; cd x; rmdir ../x; exec {relative}")
    said = "Cannot find the working directory: No such file or directory."
    assert only_error(done) == said


@pytest.mark.parametrize("make", ["true", "mkdir fake"], ids=["new", "empty"])
def test_dry_run_of_a_fake_says_what_it_would_do(tmp_path: Path, make: str) -> None:
    contract.change(tmp_path, make)
    before = list(tmp_path.rglob("*"))
    fake = tmp_path / "fake"
    given = [f"--raw_data_dir={fake}", "--nogcs_upload", "--fake_imagenet"]
    done = run_command(*given, "--dry_run")
    assert (done.status, done.lines) == (
        0,
        [f"Would generate a fake ImageNet in {fake}."],
    )
    assert list(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------ the command itself


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_only_linux_is_worked_on(platform: str) -> None:
    code = f"import runpy, sys; sys.platform = {platform!r}; "
    code += "sys.modules['fcntl'] = sys.modules['absl'] = None; "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = run_code(code)
    said = "This needs Python 3.10 or newer on Linux, which includes WSL on Windows."
    assert (done.status, done.lines) == (1, [said])


def test_missing_packages_are_answered_with_readme_s_environment() -> None:
    code = "import runpy, sys; sys.modules['absl'] = None; "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = run_code(code)
    [line] = done.lines
    assert line == (
        "import of absl halted; None in sys.modules. Run: python3 -m venv .venv && "
        ".venv/bin/pip install -r requirements.txt (on Debian, first: sudo apt-get "
        "install --yes python3-venv), and use .venv/bin/python"
    )


def test_missing_client_is_answered_with_readme_s_environment(raw: Path) -> None:
    given = [f"--raw_data_dir={raw}", *UPLOAD, *SHARDS]
    code = f"import runpy, sys; sys.argv[1:] = {given}; "
    code += "sys.modules['google.cloud.storage'] = None; "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    error = only_error(run_code(code))
    assert "google.cloud" in error
    assert error.endswith(f". Run: {script.INSTALL}")


@pytest.mark.parametrize(
    ("flag", "end", "status", "error"),
    [
        ("--help", "| head -1 > /dev/null", 0, ""),
        ("--help", "| true", 0, ""),
        ("--help", "> /dev/full", 1, FULL),
        ("--version", "> /dev/full", 1, FULL),
    ],
)
def test_answer_that_nobody_reads_is_no_traceback(
    flag: str, end: str, status: int, error: str
) -> None:
    done = run_shell(f"set -o pipefail; {command(flag)} {end}")
    assert (done.status, done.lines) == (status, [f"ERROR: {error}"] * bool(error))


def test_interrupt_during_the_imports_is_no_traceback(
    raw: Path, tmp_path: Path
) -> None:
    """From the first line of the script on; Python itself answers earlier ones."""
    (tmp_path / "absl").mkdir()
    (tmp_path / "absl" / "__init__.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    arguments = [sys.executable, str(SCRIPT), *flags(raw)]
    with running(*arguments, env={"PYTHONPATH": str(tmp_path)}) as run:
        wait_for(lambda: "importing" in run.output(), run)
        os.kill(run.pid, signal.SIGINT)
        done = run.finish()
    assert (done.status, done.lines) == (-signal.SIGINT, ["importing"])


@pytest.mark.parametrize("env", [{"PYTHONWARNINGS": "error"}, {"PYTHONDEVMODE": "1"}])
def test_warnings_neither_stop_an_upload_nor_show(
    raw: Path, emulator: Emulator, env: dict[str, str]
) -> None:
    given = [f"--raw_data_dir={raw}", *UPLOAD, *SHARDS]
    done = run_command(*given, env={**env, **emulator.environment})
    assert (done.status, done.errors) == (0, [])
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------- as a library


def test_refusal_while_planning_is_the_service_s(raw: Path, emulator: Emulator) -> None:
    emulator.inject(Status(403, "No access."), kind="session", at=1, times=None)
    code = """if True:
        import sys
        import imagenet_to_gcs as script
        try:
            script.run(sys.argv[1], True, "project", "gs://bucket/x", sys.argv[2])
        except script.ServiceError as error:
            print(error)
    """
    scratch = str(raw.parent / "scratch")
    done = run_code(code, str(raw), scratch, env=emulator.environment)
    assert done.stdout.startswith("Cannot use gs://bucket/x"), done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("training_shards", "8", "int"),
        ("num_workers", 2.0, "int"),
        ("gcs_project", 7, "string"),
        ("gcs_output_path", Path("bucket"), "string"),
        ("local_scratch_dir", 7, "string"),
        ("dry_run", "no", "bool"),
        ("raw_data_dir", b"raw", "string"),
    ],
)
def test_argument_of_another_type_is_named(
    raw: Path, field: str, value: object, wanted: str
) -> None:
    with pytest.raises(script.InvalidInputError) as caught:
        arguments = {"raw_data_dir": raw, "gcs_upload": False, field: value}
        script.run(**arguments)  # type: ignore[arg-type]
    assert str(caught.value) == f"{field} must be of type {wanted}; found {value!r}."


@pytest.mark.parametrize("name", ["missing", "a/x", "manifest.json"])
def test_records_must_be_files_of_different_names(tmp_path: Path, name: str) -> None:
    """An uploaded manifest would say that the data set is complete."""
    for path in tmp_path / "x", tmp_path / "a" / "x", tmp_path / "manifest.json":
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(script.InvalidInputError) as caught:
        records = [tmp_path / "x"], [tmp_path / name]
        script.upload_to_gcs(*records, "gs://bucket/x", "project")
    said = "Shards must be files of different names, none of them manifest.json; found"
    assert str(caught.value) == f"{said} {tmp_path / name}."


@pytest.mark.parametrize("records", [b"x", Path("x"), None, 7])
def test_records_must_be_a_list(records: Any) -> None:
    with pytest.raises(TypeError):
        script.upload_to_gcs(records, [], "gs://bucket/x", "project")


def test_records_are_no_single_path() -> None:
    with pytest.raises(script.InvalidInputError, match="different names, .* found /."):
        script.upload_to_gcs("/x", [], "gs://bucket/x", "project")
