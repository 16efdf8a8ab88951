"""Runs the command as a user does: a process of its own, judged by what it says.

finished = run_command(f"--raw_data_dir={raw}", "--nogcs_upload")
assert (finished.status, finished.lines[-1]) == (1, "ERROR: No images match ...")
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "imagenet_to_gcs.py"

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
IMPORT_TIME = "import time:"

UPLOAD = ("--project=project", "--gcs_output_path=gs://bucket/imagenet")
"""Flags that have the command upload to the emulator's bucket."""

# What a user's environment may hold that changes what the command does.
FOREIGN = re.compile(r"GOOGLE_|CLOUDSDK_|STORAGE_|TF_|CUDA_|PYTHON|IMAGENET_")


@dataclass(frozen=True)
class Finished:
    """A command that has ended.

    Attributes:
      status: Exit status; negative where a signal ended it.
      lines: All lines of the log and of stderr, without their timestamps.
      stdout: As printed.
      stderr: As printed.
    """

    status: int
    lines: list[str]
    stdout: str
    stderr: str

    @classmethod
    def of(cls, status: int, stdout: str, stderr: str) -> "Finished":
        lines = [TIMESTAMP.sub("", line, count=1) for line in stderr.splitlines()]
        return cls(status, lines, stdout, stderr)

    @property
    def errors(self) -> list[str]:
        """What the lines that begin with `ERROR: ` say."""
        prefix = "ERROR: "
        return [e.removeprefix(prefix) for e in self.lines if e.startswith(prefix)]

    def says(self, text: str) -> bool:
        """Whether a line of the log, with its level, matches a regular expression."""
        return any(re.search(text, line) for line in self.lines)

    @property
    def imported(self) -> set[str]:
        """Modules that were imported, where `IMPORTS` was in the environment."""
        lines = self.stderr.splitlines()
        return {e.split("|")[2].strip() for e in lines if e.startswith(IMPORT_TIME)}


IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}
"""Has Python say on stderr what it imports."""


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns a clean environment for the command, with some variables added."""
    clean = {k: v for k, v in os.environ.items() if not FOREIGN.match(k)}
    return {**clean, **(more or {})}


def run_command(
    *flags: str,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float = 600,
) -> Finished:
    """Runs the script with flags, and `env` added to a clean environment."""
    return run_python(str(SCRIPT), *flags, env=env, cwd=cwd, timeout=timeout)


def run_code(
    code: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> Finished:
    """Runs Python code that can import the script, with arguments in `sys.argv`."""
    path = {"PYTHONPATH": str(REPOSITORY)}
    return run_python(
        "-c", code, *arguments, env={**path, **(env or {})}, timeout=timeout
    )


def run_python(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float = 600,
) -> Finished:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(env),
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
    return Finished.of(done.returncode, done.stdout, done.stderr)
