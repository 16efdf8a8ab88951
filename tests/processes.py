"""Runs of the command that are watched, disturbed and killed while they go on.

    with started(*flags) as run:
        wait_for(lambda: len(finished_shards(scratch)) >= 3, run)
        os.kill(run.pid, signal.SIGKILL)
        run.wait_until_gone()

Each run carries a mark in its environment, which all its processes inherit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from command import SCRIPT, Finished, environment
from emulator import Emulator

MARK = "RUN_OF_A_TEST"
# A second is the promise for whatever is left of a run that ended. On a machine that
# does much else it may take some; what waits for an upload, or hangs, takes minutes.
GONE_SECONDS = 30.0


class Run:
    """A run of the command that goes on; `pid` is that of its parent process."""

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str] | None,
        log: Path,
    ) -> None:
        self._mark = f"{MARK}={uuid.uuid4()}"
        self._log = log
        name, _, value = self._mark.partition("=")
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                arguments,
                env=environment({**(env or {}), name: value}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_heed_signals,  # noqa: PLW1509
            )
        self.pid = self.process.pid

    def pids(self) -> list[int]:
        """All processes of the run that live; zombies have no environment."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (directory / "environ").read_bytes():
                    found.append(int(directory.name))
        return found

    def helper(self) -> int | None:
        """The helper process that imports TensorFlow and forks the workers."""
        return next(iter(self._children(self.pid)), None)

    def workers(self) -> list[int]:
        """The workers, oldest first; not what TensorFlow starts while imported."""
        return self._children(self.helper() or 0)

    def _children(self, parent: int) -> list[int]:
        pids = [pid for pid in sorted(self.pids()) if _parent_of(pid) == parent]
        return [pid for pid in pids if "--as-helper" in _command_line(pid)]

    def finish(self, timeout: float = 600) -> Finished:
        """Waits for its end, and for that of all its processes."""
        status = self.process.wait(timeout)
        self.wait_until_gone()
        return Finished.of(status, "", self.output())

    def output(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text(encoding="utf-8")

    def wait_until_gone(self, timeout: float = GONE_SECONDS) -> None:
        """Fails if any of its processes lives longer than this."""
        self.process.wait(timeout)
        deadline = time.monotonic() + timeout
        while left := self.pids():
            if time.monotonic() > deadline:
                lines = [f"{pid}: {_command_line(pid)}" for pid in left]
                raise AssertionError(f"still there after {timeout} s: {lines}")
            time.sleep(0.02)

    def kill(self) -> None:
        for pid in {self.pid, *self.pids()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _heed_signals() -> None:
    """Takes back what a parent in the background or under `nohup` has switched off."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _command_line(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace")


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


@contextlib.contextmanager
def running(*arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Run]:
    """Starts a program in a session of its own, and kills what is left of it."""
    with tempfile.TemporaryDirectory() as directory:
        run = Run(arguments, env, Path(directory, "log"))
        try:
            yield run
        finally:
            run.kill()


def started(
    *flags: str, env: Mapping[str, str] | None = None, under: Sequence[str] = ()
) -> contextlib.AbstractContextManager[Run]:
    """Starts the command, with another in front of it, such as `nohup`."""
    return running(*under, sys.executable, str(SCRIPT), *flags, env=env)


def run_shell(shell: str, env: Mapping[str, str] | None = None) -> Finished:
    """Runs what is written for bash, and waits for the end of all its processes."""
    with running("bash", "-c", shell, env=env) as run:
        return run.finish()


def wait_for(
    condition: Callable[[], object], run: Run | None = None, timeout: float = 300
) -> None:
    """Waits until something is so; fails if the run ends before, or nothing happens."""
    deadline = time.monotonic() + timeout
    while not condition():
        if run and run.process.poll() is not None and not condition():
            raise AssertionError(f"ended before: {run.output()}")
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


# Python imports it at its start, in every process of a run.
HOLDING = """
import os, sys, time
while "--as-helper" in sys.orig_argv and not os.path.exists(os.environ["GO"]):
    time.sleep(0.01)
"""


def held(directory: Path) -> tuple[Path, dict[str, str]]:
    """Keeps a run from reading images, so that they can be changed once it has begun.

    Returns:
      The file for which the helper waits, and what the run's environment needs.
    """
    (directory / "sitecustomize.py").write_text(HOLDING)
    go = directory / "go"
    return go, {"PYTHONPATH": str(directory), "GO": str(go)}


# ------------------------------------------------------------------------- shards


def shard_paths(scratch: Path) -> dict[str, Path]:
    """All files under a shard's final name, by base name."""
    return {
        path.name: path
        for split in ("train", "validation")
        for path in sorted((scratch / split).glob(f"{split}-*"))
    }


def identities(scratch: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of modification of each shard: the same if it is untouched."""
    paths = shard_paths(scratch)
    stats = {name: path.stat() for name, path in paths.items()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def contents(scratch: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in shard_paths(scratch).items()}


def finished_shards(scratch: Path) -> set[str]:
    """Names of the shards that have a stamp."""
    stamps = scratch.glob("*/.*-of-*.json")
    return {path.name.removeprefix(".").removesuffix(".json") for path in stamps}


def temporary_files(scratch: Path) -> list[Path]:
    return sorted(scratch.rglob(".*.tmp"))


def copy_tree(source: Path, target: Path) -> Path:
    """Copies a directory; times of modification stay as they are."""
    shutil.copytree(source, target, symlinks=True)
    return target


def pad(raw: Path, num_bytes: int, pattern: str = "**/*.JPEG") -> None:
    """Appends bytes to images, which stay valid: nobody reads beyond their end."""
    for seed, path in enumerate(sorted(raw.glob(pattern))):
        with path.open("ab") as file:
            file.write(random.Random(seed).randbytes(num_bytes))


def fill(emulator: Emulator, scratch: Path, directory: str = "imagenet") -> None:
    """Places in the bucket what a run would have uploaded from a finished scratch."""
    for name, path in shard_paths(scratch).items():
        stamp = json.loads((path.parent / f".{name}.json").read_text())
        data = path.read_bytes()
        metadata = {key: stamp[key] for key in ("digest", "crc32c")}
        emulator.put(f"{directory}/{name}", data, metadata)
    emulator.put(f"{directory}/manifest.json", (scratch / "manifest.json").read_bytes())


def uploads(emulator: Emulator) -> list[str]:
    """Base names of what was uploaded, in order; a check of access is no upload."""
    return [
        each.name.rpartition("/")[2]
        for each in emulator.requests
        if each.kind == "chunk" and each.status == 200
    ]


def kinds(emulator: Emulator) -> list[str]:
    """What was asked of the bucket, in order."""
    return [each.kind for each in emulator.requests]


# ------------------------------------------------------------------------- the system


@contextlib.contextmanager
def small_disk(directory: Path, num_bytes: int) -> Iterator[Path]:
    """Mounts a file system of a few bytes; skips the test where that is not allowed."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def unprivileged() -> list[str]:
    """The command in front that takes root's right to read and write everything."""
    if os.geteuid():
        return []
    setpriv = shutil.which("setpriv")
    if not setpriv:
        pytest.skip("runs as root, and cannot give that up")
    return [setpriv, "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
