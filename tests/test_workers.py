"""Worker processes, wherever they run and however they die."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import contract
import pytest
from command import REPOSITORY, SCRIPT, Finished, run_code, run_command, run_python
from processes import Run, finished_shards, started, unprivileged, wait_for

from imagenet_to_gcs import INSTALL

FIX = "Fix this and rerun the same command."
OUT_OF_MEMORY = (
    "A worker process was killed, most likely because the machine ran out of memory. "
    "Allow the run more memory or, if it has several workers, rerun it with fewer "
    "--num_workers."
)
OUT_OF_TIME = (
    "A worker process was killed, most likely because it reached the limit of processor "
    "time (ulimit -t). Raise it and rerun the same command."
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 CMYK images: to encode them again takes seconds, in which it can be hit."""
    raw = tmp_path_factory.mktemp("large") / "raw"
    return contract.make_raw(raw, 10, 60, 4, ("cmyk",), 320, 240)


def flags(raw: Path, training_shards: int = 3) -> list[str]:
    directories = [f"--raw_data_dir={raw}", f"--local_scratch_dir={raw}/scratch"]
    shards = [f"--training_shards={training_shards}", "--validation_shards=2"]
    return [*directories, *shards, "--nogcs_upload"]


def command(raw: Path, training_shards: int = 3) -> list[str]:
    return [sys.executable, str(SCRIPT), *flags(raw, training_shards)]


@contextlib.contextmanager
def running(arguments: list[str], log: Path, **env: str) -> Iterator[Run]:
    run = Run(arguments, env, log)
    try:
        yield run
    finally:
        run.kill()


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
    arguments = [sys.executable, str(script), *flags(raw)]
    with running(arguments, tmp_path / "log") as run:
        assert_complete(run.finish(), raw)


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("$PYTHON -I $SCRIPT $FLAGS", id="isolated"),
        pytest.param("PYTHONSAFEPATH=1 $PYTHON $SCRIPT $FLAGS", id="safe path"),
        pytest.param(
            "ln -s $SCRIPT . && $PYTHON -m imagenet_to_gcs $FLAGS", id="module"
        ),
        pytest.param(
            "echo 1/0 | tee random.py > tensorflow.py && $PYTHON $SCRIPT $FLAGS",
            id="directory with names of modules",
        ),
        pytest.param(
            "chmod 0 . && $UNPRIVILEGED $PYTHON $SCRIPT $FLAGS",
            id="unreadable directory",
        ),
        pytest.param("rmdir $PWD && $PYTHON $SCRIPT $FLAGS", id="removed directory"),
        pytest.param(
            f"mkdir {'x' * 120} && TMPDIR=$PWD/{'x' * 120} $PYTHON $SCRIPT $FLAGS",
            id="long TMPDIR",
        ),
        pytest.param("PATH=/nowhere $PYTHON $SCRIPT $FLAGS", id="no programs"),
        pytest.param("$PYTHON $SCRIPT $FLAGS <&-", id="no stdin"),
        pytest.param("$PYTHON $SCRIPT $FLAGS >&-", id="no stdout"),
        pytest.param("$PYTHON $SCRIPT $FLAGS 2>&-", id="no stderr"),
        pytest.param("$PYTHON $SCRIPT $FLAGS <&- >&- 2>&-", id="no stream"),
    ],
)
def test_command_works_from(raw: Path, tmp_path: Path, shell: str) -> None:
    values = {
        "$PYTHON": sys.executable,
        "$SCRIPT": str(SCRIPT),
        "$FLAGS": shlex.join(flags(raw)),
        "$UNPRIVILEGED": shlex.join(unprivileged()) if "$UNPRIV" in shell else "",
    }
    for name, value in values.items():
        shell = shell.replace(name, value)
    directory = tmp_path / "here"
    directory.mkdir()
    with running(["sh", "-c", f"cd {directory} && {shell}"], tmp_path / "log") as run:
        done = run.finish()
    if directory.exists():
        directory.chmod(0o700)
    assert_complete(done, raw)


def test_status_is_right_when_stderr_is_closed(large: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(large, tmp_path / "raw")
    for number, status in ((None, 1), (signal.SIGTERM, 143)):
        place = raw if number else raw / "missing"
        shell = f"exec {shlex.join(command(place, 9))} 2>&-"
        with running(["sh", "-c", shell], tmp_path / "log") as run:
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
    arguments = [sys.executable, str(program), str(raw), *map(str, scratches)]
    env = {"PYTHONPATH": str(REPOSITORY)}
    with running(arguments, tmp_path / "log", **env) as run:
        done = run.finish()
    assert done.status == 0
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
    env = {"PYTHONPATH": str(REPOSITORY)}
    scratch = str(tmp_path / "scratch")
    done = run_python(str(tmp_path / "program.py"), str(raw), scratch, env=env)
    assert done.status == 0, done.stderr
    contract.assert_shards(contract.local_shards(scratch), raw, 3, 2)


def test_run_works_in_an_interactive_session(raw: Path, tmp_path: Path) -> None:
    scratch = str(tmp_path / "scratch")
    code = f"{PROGRAM}\nconvert({scratch!r})\n"
    shell = f"{sys.executable} -i - {raw} <<'END'\n{code}END"
    with running(
        ["sh", "-c", shell], tmp_path / "log", PYTHONPATH=str(REPOSITORY)
    ) as run:
        assert run.finish().status == 0
    contract.assert_shards(contract.local_shards(scratch), raw, 3, 2)


def test_line_is_clear_when_the_command_comes_from_stdin(
    raw: Path, tmp_path: Path
) -> None:
    shell = f"{sys.executable} - {shlex.join(flags(raw))} < {SCRIPT}"
    with running(["sh", "-c", shell], tmp_path / "log") as run:
        done = run.finish()
    error = "The script must be a file; found <stdin>."
    assert (done.status, done.errors) == (1, [error])


def test_caller_is_as_before_and_may_have_used_the_forkserver(
    raw: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM + "import gc, logging, multiprocessing, os, signal, tempfile\n"
        "def state():\n"
        "    for thread in threading.enumerate()[1:]:\n"
        "        thread.join(30 * thread.daemon)  # may take a moment to end\n"
        "    return (dict(os.environ), os.getcwd(), tempfile.tempdir, gc.isenabled(),\n"
        "            gc.get_freeze_count(), threading.enumerate(),\n"
        "            [signal.getsignal(n) for n in (1, 2, 15)],\n"
        "            signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
        "def use_forkserver():\n"
        "    process = multiprocessing.get_context('forkserver').Process(target=int)\n"
        "    process.start()\n"
        "    process.join()\n"
        "    assert process.exitcode == 0\n"
        "if __name__ == '__main__':\n"
        "    if sys.argv[3] == 'before':\n"
        "        use_forkserver()\n"
        "    before = state()\n"
        "    convert(sys.argv[2])\n"
        "    assert state() == before, (before, state())\n"
        "    use_forkserver()\n"
    )
    env = {"PYTHONPATH": str(REPOSITORY)}
    for order in ("before", "after"):
        scratch = str(tmp_path / order)
        done = run_python(str(program), str(raw), scratch, order, env=env)
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
    arguments = [sys.executable, str(program), str(large), str(scratch)]
    env = {"PYTHONPATH": str(REPOSITORY)}
    with running(arguments, tmp_path / "log", **env) as run:
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


@pytest.mark.parametrize(
    ("code", "error"),
    [
        pytest.param(
            "raise ImportError('libcudart.so: cannot open')",
            f"TensorFlow cannot be imported: ImportError: libcudart.so: cannot open. {PIP}",
            id="ImportError",
        ),
        pytest.param(
            f"raise TypeError({PROTOBUF})",
            "TensorFlow cannot be imported: TypeError: Descriptors cannot be created "
            f"directly. {PIP}",
            id="TypeError",
        ),
        pytest.param(
            "class VersionError(Exception): pass\nraise VersionError('gencode 6.31.1.')",
            "TensorFlow cannot be imported: tensorflow.VersionError: gencode 6.31.1. "
            f"{PIP}",
            id="VersionError",
        ),
        pytest.param(
            f"import sys; print({LOG!r}, file=sys.stderr); {KILL}ILL)",
            "A worker process died: SIGILL, as if TensorFlow were built for another "
            f"processor. {FIX}",
            id="SIGILL",
        ),
        pytest.param(
            "import os; os.write(2, b'F0000 00:00:1.2 3 x.cc:38] built for AVX.\\n*** "
            "Check failure stack trace: ***\\n    @  0x7 main\\n'); os.abort()",
            f"A worker process died: SIGABRT: F0000 00:00:1.2 3 x.cc:38] built for AVX. {FIX}",
            id="SIGABRT",
        ),
        pytest.param(f"{KILL}KILL)", OUT_OF_MEMORY, id="SIGKILL"),
    ],
)
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
        (signal.SIGSEGV, f"A worker process died: SIGSEGV. {FIX}"),
        (signal.SIGTERM, f"A worker process died: SIGTERM. {FIX}"),
    ],
)
def test_signal_is_named_when_a_worker_dies(
    large: Path, tmp_path: Path, number: signal.Signals, error: str
) -> None:
    raw = shutil.copytree(large, tmp_path / "raw")
    with started(*flags(raw, 100), "--num_workers=2") as run:
        wait_for(lambda: len(run.workers()) == 2, run)
        worker = run.workers()[-1]
        wait_for(lambda: finished_shards(raw / "scratch"), run)
        os.kill(worker, number)
        done = run.finish()
    assert (done.status, done.errors) == (1, [error])


@pytest.mark.parametrize(
    ("limit", "code", "error"),
    [
        ("-t 2", "while True: pass", OUT_OF_TIME),  # SIGKILL
        ("-S -t 2", "while True: pass", OUT_OF_TIME),  # SIGXCPU
        ("-t 600", "import os; os.kill(os.getpid(), 9)", OUT_OF_MEMORY),
    ],
)
def test_limit_of_processor_time_is_named_when_it_is_reached(
    raw: Path, tmp_path: Path, limit: str, code: str, error: str
) -> None:
    (tmp_path / "tensorflow.py").write_text(code)
    shell = f"ulimit {limit}; exec {shlex.join(command(raw))}"
    env = {"PYTHONPATH": str(tmp_path)}
    with running(["bash", "-c", shell], tmp_path / "log", **env) as run:
        done = run.finish()
    assert (done.status, done.errors) == (1, [error])


def test_workers_are_as_many_as_asked_for(large: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(large, tmp_path / "raw")
    with started(*flags(raw, 100), "--num_workers=3") as run:
        wait_for(lambda: len(run.workers()) >= 3, run)
        wait_for(lambda: finished_shards(raw / "scratch"), run)
        assert len(run.workers()) == 3


def test_run_goes_on_when_only_the_helper_dies(large: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(large, tmp_path / "raw")
    with started(*flags(raw, 100), "--num_workers=2") as run:
        wait_for(lambda: len(run.workers()) == 2, run)
        os.kill(run.helper() or run.pid, signal.SIGKILL)
        done = run.finish()
    assert (done.status, done.errors) == (0, [])
    assert len(finished_shards(raw / "scratch")) == 102


# ----------------------------------------------------------------- what is left


@pytest.mark.parametrize("phase", ["importing", "writing"])
@pytest.mark.parametrize("number", ["INT", "TERM", "HUP", "KILL"])
@pytest.mark.parametrize("to_all", [False, True], ids=["to the run", "to its group"])
def test_nothing_is_left_after_a_signal(
    large: Path, tmp_path: Path, phase: str, number: str, to_all: bool
) -> None:
    raw = shutil.copytree(large, tmp_path / "raw")
    signal_number = signal.Signals[f"SIG{number}"]
    is_killed = number == "KILL"
    shared = set(Path("/dev/shm").iterdir())
    with started(*flags(raw, 100)) as run:
        if phase == "importing":
            wait_for(run.helper, run)
        else:
            wait_for(lambda: finished_shards(raw / "scratch"), run)
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
    with running([*user, "bash", "-c", shell], tmp_path / "log") as run:
        done = run.finish()
    error = (
        "Cannot start a thread: the limit of processes (ulimit -u) is reached. "
        "Raise it, or rerun the same command with fewer --num_workers."
    )
    assert (done.status, done.errors) == (1, [error])
