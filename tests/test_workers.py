"""Worker processes, wherever they run and however they die."""

import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import contract
import pytest
from command import REPOSITORY, SCRIPT, Finished, run_code, run_command, run_python
from emulator import Emulator
from processes import (
    finished_shards,
    run_shell,
    running,
    started,
    unprivileged,
    wait_for,
)

from imagenet_to_gcs import INSTALL

FIX = "Fix this and rerun the same command."
OUT_OF_MEMORY = (
    "A worker process was killed, most likely because the machine ran out of memory. "
    "Allow the run more memory, or rerun it with fewer --num_workers."
)


@pytest.fixture(scope="module")
def cmyk_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("cmyk") / "raw"
    return contract.make_raw(raw, 10, 60, 4, ("cmyk",), 320, 240)


@pytest.fixture
def large(cmyk_raw: Path, tmp_path: Path) -> Path:
    """600 CMYK images: to encode them again takes seconds, in which it can be hit."""
    return shutil.copytree(cmyk_raw, tmp_path / "large")


def flags(raw: Path, training_shards: int = 3) -> list[str]:
    directories = [f"--raw_data_dir={raw}", f"--local_scratch_dir={raw}/scratch"]
    shards = [f"--training_shards={training_shards}", "--validation_shards=2"]
    return [*directories, *shards, "--nogcs_upload"]


def command(raw: Path, training_shards: int = 3) -> list[str]:
    return [sys.executable, str(SCRIPT), *flags(raw, training_shards)]


def assert_complete(done: Finished, raw: Path) -> None:
    assert done.status == 0, done.stderr
    contract.assert_shards(contract.local_shards(raw / "scratch"), raw, 3, 2)


# ----------------------------------------------------------------- wherever it runs


@pytest.mark.parametrize("name", ["no_suffix", "with.dots.v2", "a-b.py", "link"])
def test_command_works_under_any_name(raw: Path, tmp_path: Path, name: str) -> None:
    script = tmp_path / name
    if name == "link":
        script.symlink_to(SCRIPT)
    else:
        shutil.copy(SCRIPT, script)
    assert_complete(run_python(str(script), *flags(raw)), raw)


@pytest.mark.parametrize(
    "shell",
    [
        "$PYTHON -I $SCRIPT $FLAGS",
        "PYTHONSAFEPATH=1 $PYTHON $SCRIPT $FLAGS",
        "ln -s $SCRIPT . && $PYTHON -m imagenet_to_gcs $FLAGS",
        "echo 1/0 | tee random.py > tensorflow.py && $PYTHON $SCRIPT $FLAGS",
        "chmod 0 . && $UNPRIVILEGED $PYTHON $SCRIPT $FLAGS",
        "rmdir $PWD && $PYTHON $SCRIPT $FLAGS",
        f"mkdir {'x' * 120} && TMPDIR=$PWD/{'x' * 120} $PYTHON $SCRIPT $FLAGS",
        "PATH=/nowhere $PYTHON $SCRIPT $FLAGS",
        "$PYTHON $SCRIPT $FLAGS <&-",
        "$PYTHON $SCRIPT $FLAGS >&-",
        "$PYTHON $SCRIPT $FLAGS 2>&-",
        "$PYTHON $SCRIPT $FLAGS <&- >&- 2>&-",
    ],
)
def test_command_works_from(raw: Path, tmp_path: Path, shell: str) -> None:
    variables = {
        "PYTHON": sys.executable,
        "SCRIPT": str(SCRIPT),
        "FLAGS": shlex.join(flags(raw)),
        "UNPRIVILEGED": shlex.join(unprivileged()) if "$UNPRIV" in shell else "",
    }
    directory = tmp_path / "here"
    directory.mkdir()
    done = run_shell(f"cd {directory} && {shell}", variables)
    if directory.exists():
        directory.chmod(0o700)
    assert_complete(done, raw)


def test_status_is_right_when_stderr_is_closed(large: Path) -> None:
    for number, status in ((None, 1), (signal.SIGTERM, 143)):
        place = large if number else large / "missing"
        shell = f"exec {shlex.join(command(place, 9))} 2>&-"
        with running("sh", "-c", shell) as run:
            if number:
                wait_for(run.workers, run)
                os.kill(run.pid, number)
            assert run.finish().status == status


@pytest.mark.parametrize("level", ["0", "3"])
def test_tensorflow_is_quiet(raw: Path, level: str) -> None:
    done = run_command(*flags(raw), env={"TF_CPP_MIN_LOG_LEVEL": level})
    assert_complete(done, raw)
    assert not any("oneDNN" in line for line in done.lines)
    of_tensorflow = re.compile(
        r"[IWEF]\d{4} |.*tensorflow/|WARNING: All log |To enable "
    )
    assert not any(map(of_tensorflow.match, done.lines))


# ----------------------------------------------------------------- from a program

IMPORTABLE = {"PYTHONPATH": str(REPOSITORY)}
PROGRAM = """
import sys, threading, time
import imagenet_to_gcs

def convert(scratch):
    imagenet_to_gcs.run(sys.argv[1], False, local_scratch_dir=scratch,
                        training_shards=3, validation_shards=2)
"""
POOL = """
import os
import imagenet_to_gcs
import contextlib
with contextlib.closing(imagenet_to_gcs.Pool(1)) as pool:
"""


def test_run_works_in_one_thread_after_another(raw: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM + "if __name__ == '__main__':\n"
        "    for scratch in sys.argv[2:]:\n"
        "        thread = threading.Thread(target=convert, args=[scratch])\n"
        "        thread.start()\n"
        "        thread.join()\n"
    )
    scratches = [tmp_path / name for name in ("one", "two", "three")]
    done = run_python(str(program), str(raw), *map(str, scratches), env=IMPORTABLE)
    assert done.status == 0, done.stderr
    for scratch in scratches:
        contract.assert_shards(contract.local_shards(scratch), raw, 3, 2)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("convert(sys.argv[2])", id="without a guard"),
        pytest.param(
            "import multiprocessing\n"
            "multiprocessing.current_process().daemon = True\n"
            "convert(sys.argv[2])",
            id="daemonic",
        ),
    ],
)
def test_run_works_in_any_program(raw: Path, tmp_path: Path, program: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM + program)
    scratch = str(tmp_path / "scratch")
    done = run_python(str(tmp_path / "program.py"), str(raw), scratch, env=IMPORTABLE)
    assert done.status == 0, done.stderr
    contract.assert_shards(contract.local_shards(scratch), raw, 3, 2)


def test_run_works_in_an_interactive_session(raw: Path, tmp_path: Path) -> None:
    scratch = str(tmp_path / "scratch")
    code = f"{PROGRAM}\nconvert({scratch!r})\n"
    shell = f"{sys.executable} -i - {raw} <<'END'\n{code}END"
    assert run_shell(shell, IMPORTABLE).status == 0
    contract.assert_shards(contract.local_shards(scratch), raw, 3, 2)


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("{python} - {flags} < {script}", "<stdin>"),
        ("cat {script} | {python} /dev/stdin {flags}", "/dev/stdin"),
    ],
)
def test_line_is_clear_when_the_command_comes_from_stdin(
    raw: Path, command: str, found: str
) -> None:
    words = {"python": sys.executable, "flags": shlex.join(flags(raw))}
    done = run_shell(command.format(**words, script=SCRIPT))
    error = f"The script must be a file; found {found}."
    assert (done.status, done.errors) == (1, [error])


def test_helper_finds_the_modules_that_the_run_finds(raw: Path, tmp_path: Path) -> None:
    """Not those of its own directory, which `python -I` does not look into, either."""
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "random.py").write_text("raise SystemExit('Not this one.')")
    words = [sys.executable, "-I", str(tmp_path / SCRIPT.name), *flags(raw)]
    done = run_shell(shlex.join(words))
    if sys.version_info >= (3, 11):  # before, there is no PYTHONSAFEPATH
        assert done.status == 0, done.stderr


CALLER = """if __name__ == "__main__":
    import gc, logging, multiprocessing, os, pathlib, signal, sys, tempfile, threading
    import warnings
    from google.cloud import storage
    import imagenet_to_gcs as script

    def state():
        for thread in threading.enumerate()[1:]:
            thread.join(30 * thread.daemon)  # may take a moment to end
        loggers = [logging.getLogger(name) for name in ("", "google", "urllib3")]
        yield from ((logger.level, logger.handlers[:]) for logger in loggers)
        yield dict(os.environ), os.getcwd(), tempfile.tempdir, warnings.filters[:]
        yield gc.isenabled(), gc.get_freeze_count(), threading.enumerate()
        yield [signal.getsignal(number) for number in script.STOP_SIGNALS]
        yield signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def use_forkserver():
        process = multiprocessing.get_context("forkserver").Process(target=int)
        process.start()
        process.join()
        assert process.exitcode == 0

    raw, scratch = map(pathlib.Path, sys.argv[1:])
    if scratch.name == "before":
        use_forkserver()
    before = list(state())
    few = {"training_shards": 3, "validation_shards": 2}
    script.run(raw, True, "project", "gs://bucket/x", scratch, **few)
    records = sorted(scratch.glob("*/*-of-*"))  # and the stamps
    script.upload_to_gcs(records, [], "gs://bucket/y", "project")
    after = list(state())
    assert before == after, [pair for pair in zip(before, after) if pair[0] != pair[1]]
    use_forkserver()
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_caller_is_as_before_and_may_use_the_forkserver(
    raw: Path, tmp_path: Path, emulator: Emulator, order: str
) -> None:
    program, scratch = tmp_path / "program.py", tmp_path / order
    program.write_text(CALLER)
    env = {**IMPORTABLE, **emulator.environment}
    done = run_python(str(program), str(raw), str(scratch), env=env)
    assert done.status == 0, done.stderr
    contract.assert_shards(contract.local_shards(scratch), raw, 3, 2)


def test_workers_end_with_run_and_all_ends_with_the_program(
    large: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM + "if __name__ == '__main__':\n"
        "    convert(sys.argv[2])\n    time.sleep(600)\n"
    )
    scratch = tmp_path / "scratch"
    arguments = sys.executable, str(program), str(large), str(scratch)
    with running(*arguments, env=IMPORTABLE) as run:
        wait_for(run.workers, run)
        wait_for((scratch / "manifest.json").exists, run)
        wait_for(lambda: run.pids() == [run.pid], run)
        os.kill(run.pid, signal.SIGKILL)
        run.wait_until_gone()


def test_error_of_a_worker_shows_its_traceback() -> None:
    done = run_code(POOL + "    pool.call(int, 'x')")
    assert "in a worker process:\nTraceback" in done.stderr
    assert done.lines[-2:] == [
        "ValueError: invalid literal for int() with base 10: 'x'",
        "",
    ]


def test_what_libjpeg_says_of_good_images_is_no_last_word() -> None:
    code = (
        "    pool.call(os.write, 2, b'Corrupt JPEG data: bad\\n' * 10_000)\n"
        "    pool.call(exec, 'import os; os.abort()')"
    )
    done = run_code(POOL + code)
    assert done.lines[-1].endswith(
        f"MachineError: A worker process died: SIGABRT. {FIX}"
    )


# ----------------------------------------------------------------- TensorFlow fails

PIP = f"Run: {INSTALL}."
PROTOBUF = '''"""Descriptors cannot be created directly.
If this call came from a _pb2.py file, your generated code is out of date.
 1. Downgrade the protobuf package.

More information: https://developers.google.com/protocol-buffers"""'''
KILL = "import os, signal; os.kill(os.getpid(), signal.SIG"
LOG = "I0000 00:00:1795577199.226574    3453 port.cc:153] oneDNN operations are on."


NOT_IMPORTED, DIED = "TensorFlow cannot be imported:", "A worker process died:"
LAST_WORDS = {
    "raise ImportError('libcudart.so: cannot open')": (
        f"{NOT_IMPORTED} ImportError: libcudart.so: cannot open. {PIP}"
    ),
    f"raise TypeError({PROTOBUF})": (
        f"{NOT_IMPORTED} TypeError: Descriptors cannot be created directly. {PIP}"
    ),
    "class VersionError(Exception): pass\nraise VersionError('gencode 6.31.1.')": (
        f"{NOT_IMPORTED} tensorflow.VersionError: gencode 6.31.1. {PIP}"
    ),
    f"import sys; print({LOG!r}, file=sys.stderr); {KILL}ILL)": (
        f"{DIED} SIGILL, as if TensorFlow were built for another processor. {FIX}"
    ),
    "import os; os.write(2, b'F0000 00:00:1.2 3 x.cc:38] built for AVX.\\n*** Check "
    "failure stack trace: ***\\n    @  0x7 main\\n'); os.abort()": (
        f"{DIED} SIGABRT: F0000 00:00:1.2 3 x.cc:38] built for AVX. {FIX}"
    ),
    f"{KILL}KILL)": OUT_OF_MEMORY,
}


@pytest.mark.parametrize(("code", "error"), LAST_WORDS.items())
def test_last_words_are_reported_when_tensorflow_fails(
    raw: Path, tmp_path: Path, code: str, error: str
) -> None:
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text(code)
    done = run_command(*flags(raw), env={"PYTHONPATH": str(tmp_path)})
    assert (done.status, done.errors) == (1, [error])
    assert done.lines[-1] == f"ERROR: {error}"
    assert "Finished shards are kept." not in done.lines  # there are none


# ----------------------------------------------------------------- killed


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGKILL, OUT_OF_MEMORY),
        (signal.SIGSEGV, f"{DIED} SIGSEGV. {FIX}"),
        (signal.SIGTERM, f"{DIED} SIGTERM. {FIX}"),
    ],
)
def test_signal_is_named_when_a_worker_dies(
    large: Path, number: signal.Signals, error: str
) -> None:
    with started(*flags(large, 100), "--num_workers=2") as run:
        wait_for(lambda: len(run.workers()) == 2, run)
        worker = run.workers()[-1]
        wait_for(lambda: finished_shards(large / "scratch"), run)
        os.kill(worker, number)
        done = run.finish()
    assert (done.status, done.errors) == (1, [error])


def test_workers_are_as_many_as_asked_for(large: Path) -> None:
    with started(*flags(large, 100), "--num_workers=3") as run:
        wait_for(lambda: len(run.workers()) >= 3, run)
        wait_for(lambda: finished_shards(large / "scratch"), run)
        assert len(run.workers()) == 3


def test_death_is_seen_even_when_the_helper_is_stopped(large: Path) -> None:
    with started(*flags(large, 100), "--num_workers=2") as run:
        wait_for(lambda: len(run.workers()) == 2, run)
        helper, worker = run.helper() or run.pid, run.workers()[-1]
        wait_for(lambda: finished_shards(large / "scratch"), run)
        os.kill(helper, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        done = run.finish()
    assert (done.status, len(done.errors)) == (1, 1)


def test_run_goes_on_when_only_the_helper_dies(large: Path) -> None:
    with started(*flags(large, 100), "--num_workers=2") as run:
        wait_for(lambda: len(run.workers()) == 2, run)
        os.kill(run.helper() or run.pid, signal.SIGKILL)
        done = run.finish()
    assert (done.status, done.errors) == (0, [])
    assert len(finished_shards(large / "scratch")) == 102


# ----------------------------------------------------------------- what is left


@pytest.mark.parametrize("phase", ["importing", "writing"])
@pytest.mark.parametrize("number", ["INT", "TERM", "HUP", "KILL"])
@pytest.mark.parametrize("to_all", [False, True], ids=["to the run", "to its group"])
def test_nothing_is_left_after_a_signal(
    large: Path, phase: str, number: str, to_all: bool
) -> None:
    signal_number = signal.Signals[f"SIG{number}"]
    is_killed = number == "KILL"
    shared = set(Path("/dev/shm").iterdir())
    with started(*flags(large, 100)) as run:
        if phase == "importing":
            wait_for(run.helper, run)
        else:
            wait_for(lambda: finished_shards(large / "scratch"), run)
        (os.killpg if to_all else os.kill)(run.pid, signal_number)
        done = run.finish()
    assert done.status == (-signal_number if is_killed else 128 + signal_number)
    name = "Ctrl-C" if number == "INT" else f"SIG{number}"
    text = f"Stopped by {name}. Rerun the same command to resume."
    assert done.errors == ([] if is_killed else [text])
    assert "Traceback" not in done.stderr
    left = [p for p in set(Path("/dev/shm").iterdir()) - shared if "sem." in p.name]
    wait_for(lambda: not any(path.exists() for path in left))  # others' come and go


def test_nothing_is_left_after_a_normal_end(raw: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for _ in range(2):  # the second has nothing to do
        with started(*flags(raw), env={"TMPDIR": str(temporary)}) as run:
            assert_complete(run.finish(), raw)
        assert not list(temporary.iterdir())


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 6])
def test_limit_of_processes_is_named(raw: Path, tmp_path: Path, limit: int) -> None:
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("needs to become a user without processes")
    user = ["setpriv", f"--reuid={os.getpid() + 100_000 + limit}", "--clear-groups"]
    user += [
        f"--{kind}-caps=+dac_override,+dac_read_search" for kind in ("inh", "ambient")
    ]
    shell = f"ulimit -u {limit}; exec {shlex.join(command(raw))}"
    with running(*user, "bash", "-c", shell) as run:
        done = run.finish()
    error = "Cannot start a thread or process. Raise the limit (ulimit -u)."
    assert (done.status, done.errors) == (1, [error])
