"""Measures how fast and light the script is, against its targets; prints Markdown.

    python3 tests/benchmark.py                       # 36,000 images, about 8 minutes
    python3 tests/benchmark.py --quick               # 2,000 images, one run
    python3 tests/benchmark.py --plan --grow         # also with 1,331,167 files
    python3 tests/benchmark.py --raw_data_dir=DIR    # real images instead of drawn ones

It needs Linux, and in the temporary directory room for the images twice and a half:
10 GB for 36,000 of 110 KB, which should fit in memory as well, for the page cache is
warmed first, and so is the memory that their output will take. A temporary directory in
memory leaves the speed of the disk out; `mount -t tmpfs -o huge=within_size none DIR`
makes one with large pages, which leaves out most of the kernel's work for each. What is
compared runs in turns, so that a machine that grows slower or faster meanwhile does so
for all; every number is the median of several runs. All are whole processes; the time
to the first finished shard is said apart, as start-up.

The yardsticks:

- The sequential loop does what the reference does with an image: one process reads it,
  decodes it in full, and writes an Example of nine features by TensorFlow's own
  writer. It is slow: a part of the images is measured and scaled up.
- `cat` of the files into 1,000 others, by two processes: nothing but bytes moved.

Nothing here is run by pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jpegs

SCRIPT = Path(__file__).resolve().parent.parent / "imagenet_to_gcs.py"
TRAINING_SHARDS = 1024
VALIDATION_SHARDS = 128
FIRST_SHARD = "train/train-00000-of-01024"

NUM_IMAGES = 36_000
NUM_DISTINCT = 300  # drawn; the others are copies
QUALITY = 96  # gives JPEGs of 110 KB
NUM_SYNSETS = 1000
IMAGENET_TRAINING = 1_281_167
IMAGENET_VALIDATION = 50_000
IMAGENET_IMAGES = IMAGENET_TRAINING + IMAGENET_VALIDATION

NUM_SEQUENTIAL = 4_000  # images that the sequential loop is measured on
NUM_STAGES = 3_000  # images whose stages are timed
NUM_OUTPUTS = 1_000  # of `cat`
BIG_SHARD_BYTES = 130_000_000
NUM_BIG_SHARDS = 16

POLL_SECONDS = 0.005
SAMPLE_SECONDS = 0.2

STAGES = {
    "read": "_read_image",
    "skeleton": "read_skeleton",
    "decode": "_check_decodes",
    "example": "make_example",
    "write": "RecordWriter.write",
    "fsync": "os.fsync",
}
"""Functions of the script by the stage of one image that they are."""

MISTAKES = {
    "--help": ["--help"],
    "unknown flag": ["--no_such_flag"],
    "no flags": [],
    "no raw directory": ["--nogcs_upload", "--raw_data_dir=/nowhere"],
    "bad output path": ["--raw_data_dir=/", "--project=p", "--gcs_output_path=x"],
    "bad number": ["--raw_data_dir=/", "--nogcs_upload", "--num_workers=0"],
    "wrong layout": ["--nogcs_upload", "--raw_data_dir={empty}"],
}
"""Flags by what is asked of the script that needs no image."""


# ---------------------------------------------------------------- raw data


@dataclass(frozen=True)
class Data:
    """A raw directory and what it holds."""

    raw_dir: Path
    paths: Sequence[str]
    num_bytes: int

    @property
    def num_images(self) -> int:
        return len(self.paths)


def list_data(raw_dir: Path) -> Data:
    """Lists a raw directory, which also warms the cache of its entries."""
    training = sorted(map(str, raw_dir.glob("train/*/*.JPEG")))
    validation = sorted(map(str, raw_dir.glob("validation/*.JPEG")))
    paths = training + validation
    return Data(raw_dir, paths, sum(os.path.getsize(path) for path in paths))


def draw(quality: int, width: int, height: int, seed: int) -> bytes:
    return jpegs.jpeg("baseline", seed, width, height, quality)


def draw_images(number: int, quality: int, width: int, height: int) -> list[bytes]:
    with ProcessPoolExecutor() as workers:
        seeds = range(number)
        return list(workers.map(partial(draw, quality, width, height), seeds))


def raw_names(num_images: int) -> tuple[list[str], list[str]]:
    """Names the files of a raw directory with ImageNet's share of validation images.

    Returns:
      The paths below it, directory by directory, and the synset of each validation
      image.
    """
    num_validation = max(1, round(num_images * IMAGENET_VALIDATION / IMAGENET_IMAGES))
    num_training = num_images - num_validation
    synsets = [f"n{1_000_000 + i:08d}" for i in range(min(NUM_SYNSETS, num_training))]
    training = [
        f"train/{synset}/{synset}_{j}.JPEG"
        for i, synset in enumerate(synsets)
        for j in range(len(range(i, num_training, len(synsets))))
    ]
    validation = [
        f"validation/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(num_validation)
    ]
    return training + validation, [
        synsets[i % len(synsets)] for i in range(num_validation)
    ]


def make_raw(raw_dir: Path, num_images: int, make: Callable[[int, str], None]) -> Path:
    """Makes a raw directory; `make` writes the i-th image at a path."""
    names, labels = raw_names(num_images)
    for directory in sorted({os.path.dirname(name) for name in names}):
        (raw_dir / directory).mkdir(parents=True)
    (raw_dir / "synset_labels.txt").write_text("\n".join(labels) + "\n")
    for i, name in enumerate(names):
        make(i, f"{raw_dir}/{name}")
    return raw_dir


def make_photographs(raw_dir: Path, num_images: int, num_distinct: int) -> Path:
    """Makes a raw directory of files of 110 KB: copies of a few hundred photographs."""
    photographs = draw_images(num_distinct, QUALITY, jpegs.WIDTH, jpegs.HEIGHT)

    def write(i: int, path: str) -> None:
        Path(path).write_bytes(photographs[i % num_distinct])

    return make_raw(raw_dir, num_images, write)


def make_small(raw_dir: Path, num_images: int, originals: Path) -> Path:
    """Makes a raw directory of images of 2 KB: links to a few hundred originals."""
    if not originals.exists():
        originals.mkdir()
        for i, data in enumerate(draw_images(NUM_DISTINCT, jpegs.QUALITY, 64, 48)):
            (originals / str(i)).write_bytes(data)

    def link(i: int, path: str) -> None:
        os.link(originals / str(i % NUM_DISTINCT), path)

    return make_raw(raw_dir, num_images, link)


def make_empty(raw_dir: Path, num_images: int) -> Path:
    """Makes a raw directory of empty files, each with an inode of its own."""
    return make_raw(raw_dir, num_images, lambda _, path: os.mknod(path))


# ---------------------------------------------------------------- one measured process


@dataclass(frozen=True)
class Run:
    """One process, from its start to its end.

    Attributes:
      start_up: Seconds to the first finished shard.
      peak: Largest resident memory, bytes; of the process itself, not its workers.
      worker_peak: Largest memory of a worker that it shares with no other, bytes.
    """

    seconds: float
    start_up: float = 0.0
    peak: int = 0
    worker_peak: int = 0


@dataclass
class Memory:
    """Samples the unshared memory of the workers, grandchildren of a process."""

    pid: int
    worker_peak: int = 0
    next_sample: float = field(default_factory=time.monotonic)

    def sample_when_due(self) -> None:
        if time.monotonic() < self.next_sample:
            return
        for child in _children(self.pid):
            for worker in _children(child):
                self.worker_peak = max(self.worker_peak, _unshared(worker))
        self.next_sample = time.monotonic() + SAMPLE_SECONDS


def _children(pid: int) -> list[int]:
    """Lists the processes that the main thread or another of a process has started."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children


def _unshared(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    return sum(int(line.split()[1]) for line in lines if "Private_" in line) * 1024


def measure(
    command: Sequence[str],
    first_result: Path | None = None,
    *,
    environment: dict[str, str] | None = None,
    statuses: Sequence[int] = (0,),
    sample_memory: bool = False,
) -> Run:
    """Runs a command to its end.

    Args:
      first_result: A file whose appearance ends the start-up.
      statuses: The exit statuses it may have.
      sample_memory: Whether to look into the workers, which slows them a little.
    """
    env = {**os.environ, **(environment or {})}
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            run = _watch(process, start, first_result, sample_memory)
        except BaseException:
            process.kill()
            raise
        if process.returncode not in statuses:
            log.seek(0)
            raise RuntimeError(f"{command} failed:\n{log.read().decode()[-2000:]}")
    return run


def _watch(
    process: subprocess.Popen[bytes],
    start: float,
    first_result: Path | None,
    sample_memory: bool,
) -> Run:
    """Waits for the end of a process, and sets its exit status."""
    memory = Memory(process.pid)
    start_up = 0.0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        if not start_up and first_result and first_result.exists():
            start_up = seconds
        if pid:
            break
        if sample_memory:
            memory.sample_when_due()
        time.sleep(POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Run(seconds, start_up, usage.ru_maxrss * 1024, memory.worker_peak)


def run_script(
    raw_dir: Path,
    scratch_dir: Path,
    *flags: str,
    num_bytes: int = 0,
    first_shard: str = FIRST_SHARD,
    environment: dict[str, str] | None = None,
    sample_memory: bool = False,
) -> Run:
    """Writes the shards of a raw directory, with nothing of an earlier run there.

    Args:
      num_bytes: Of the output, about; the memory for it is warmed first.
    """
    make_way(scratch_dir, num_bytes)
    return measure(
        script_command(raw_dir, scratch_dir, *flags),
        scratch_dir / first_shard,
        environment=environment,
        sample_memory=sample_memory,
    )


def script_command(raw_dir: Path, scratch_dir: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        str(SCRIPT),
        f"--raw_data_dir={raw_dir}",
        f"--local_scratch_dir={scratch_dir}",
        *(
            flags
            if any("gcs" in flag for flag in flags)
            else [*flags, "--nogcs_upload"]
        ),
    ]


def remove(directory: Path) -> None:
    """Removes a directory and lets the disk come to rest."""
    shutil.rmtree(directory, ignore_errors=True)
    os.sync()


def make_way(directory: Path, num_bytes: int) -> None:
    """Removes a directory, and warms the memory that so many bytes there will take.

    A host that takes back what a virtual machine frees gives it again a page at a
    time, up to ten times slower than a page is written.
    """
    remove(directory)
    warm = directory.with_name("warm")
    block = bytes(2**20)
    with warm.open("wb", buffering=0) as file:
        for _ in range(math.ceil(1.1 * num_bytes / len(block))):
            file.write(block)
    warm.unlink()
    os.sync()


def call(
    function: str, *arguments: object, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Calls a function of this file in a process of its own; returns its result."""
    env = {**os.environ, **(environment or {})}
    command = call_command(function, *arguments)
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{function} failed:\n{result.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def call_command(function: str, *arguments: object) -> list[str]:
    path = [str(Path(__file__).parent), str(SCRIPT.parent)]
    code = (
        f"import sys; sys.path[:0] = {path}; import json, benchmark; "
        f"print(json.dumps(benchmark.{function}(*json.loads(sys.argv[1]))), flush=True)"
    )
    return [sys.executable, "-c", code, json.dumps(arguments, default=str)]


def median(runs: Sequence[Run]) -> Run:
    """Takes the median of each number."""
    return Run(
        statistics.median(run.seconds for run in runs),
        statistics.median(run.start_up for run in runs),
        max(run.peak for run in runs),
        max(run.worker_peak for run in runs),
    )


# ---------------------------------------------------------------- the yardsticks


def sequential_loop(raw_dir: str, output_dir: str, limit: int) -> dict[str, float]:
    """Does the reference's work, image by image, on about so many images.

    Each shard written has as many images as it would have of the whole. What is read
    and written, decoded and said of an image is the reference's; a CMYK JPEG is kept.

    Returns:
      The seconds of the loop, without the import and the listing, and the number of
      images in it.
    """
    import tensorflow as tf

    data = list_data(Path(raw_dir))
    training = [path for path in data.paths if "/train/" in path]
    validation = [path for path in data.paths if "/train/" not in path]
    label_of = {synset: i for i, synset in enumerate(sorted({*map(_synset, training)}))}
    random.Random(0).shuffle(training)
    share = min(1.0, limit / data.num_images)
    start = time.perf_counter()
    num_images = 0
    for split, paths, num_shards in (
        ("train", training, TRAINING_SHARDS),
        ("validation", validation, VALIDATION_SHARDS),
    ):
        size = math.ceil(len(paths) / num_shards)
        for i in range(math.ceil(share * len(paths) / size)):
            chunk = paths[i * size : (i + 1) * size]
            with tf.io.TFRecordWriter(f"{output_dir}/{split}-{i:05d}") as writer:
                for path in chunk:
                    label = label_of.get(_synset(path), 0) + 1
                    writer.write(_reference_example(tf, path, label))
            num_images += len(chunk)
    return {"seconds": time.perf_counter() - start, "images": num_images}


def _synset(path: str) -> str:
    return path.split("/")[-2]


def _reference_example(tf: Any, path: str, label: int) -> bytes:
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith(b"\x89PNG"):
        data = tf.io.encode_jpeg(tf.io.decode_png(data, 3), quality=100).numpy()
    height, width, channels = tf.io.decode_jpeg(data, channels=3).shape

    def number(value: int) -> Any:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    def text(value: bytes) -> Any:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    features = {
        "image/height": number(height),
        "image/width": number(width),
        "image/colorspace": text(b"RGB"),
        "image/channels": number(channels),
        "image/class/label": number(label),
        "image/class/synset": text(_synset(path).encode()),
        "image/format": text(b"JPEG"),
        "image/filename": text(os.path.basename(path).encode()),
        "image/encoded": text(data),
    }
    example = tf.train.Example(features=tf.train.Features(feature=features))
    serialized: bytes = example.SerializeToString()
    return serialized


def run_sequential(data: Data, output_dir: Path) -> Run:
    """Runs the sequential loop on a part, and scales its loop up to all images."""
    make_way(output_dir, data.num_bytes)
    output_dir.mkdir()
    start = time.perf_counter()
    loop = call("sequential_loop", data.raw_dir, output_dir, NUM_SEQUENTIAL)
    start_up = time.perf_counter() - start - loop["seconds"]
    scaled = loop["seconds"] * data.num_images / loop["images"]
    return Run(start_up + scaled, start_up)


def run_cat(data: Data, output_dir: Path) -> Run:
    make_way(output_dir, data.num_bytes)
    output_dir.mkdir()
    files_each = math.ceil(data.num_images / NUM_OUTPUTS)
    shell = ["sh", "-c", 'cat -- "$@" > "$0/$$"', str(output_dir)]
    command = ["xargs", "-0", "-P", "2", "-n", str(files_each), *shell]
    start = time.perf_counter()
    subprocess.run(command, input="\0".join(data.paths).encode(), check=True)
    return Run(time.perf_counter() - start)


# ---------------------------------------------------------------- stages of one image


def time_stages(raw_dir: str, scratch_dir: str, limit: int) -> dict[str, float]:
    """Writes some shards in this process, with each stage's function on the clock.

    Returns:
      Seconds an image by stage, and those of all else.
    """
    import imagenet_to_gcs

    imagenet_to_gcs._start_worker()
    dataset = imagenet_to_gcs.read_dataset(raw_dir)
    shards = imagenet_to_gcs.plan_shards(dataset)
    imagenet_to_gcs.write_shard(shards[-1], scratch_dir)  # TensorFlow's first steps
    seconds = {
        stage: _put_on_the_clock(imagenet_to_gcs, name)
        for stage, name in STAGES.items()
    }
    num_images = 0
    start = time.perf_counter()
    for shard in shards:
        if num_images >= limit:
            break
        imagenet_to_gcs.write_shard(shard, scratch_dir)
        num_images += len(shard.images)
    whole = time.perf_counter() - start
    stages = {stage: clock[0] / num_images for stage, clock in seconds.items()}
    return {**stages, "the rest": whole / num_images - sum(stages.values())}


def _put_on_the_clock(module: Any, name: str) -> list[float]:
    """Wraps a function of a module; returns the list whose item grows by its time."""
    *owners, attribute = name.split(".")
    owner = module
    for each in owners:
        owner = getattr(owner, each)
    function = getattr(owner, attribute)
    clock = [0.0]

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            clock[0] += time.perf_counter() - start

    setattr(owner, attribute, timed)
    return clock


# ---------------------------------------------------------------- a cheap Cloud Storage


class Sink(ThreadingHTTPServer):
    """Takes uploads as Cloud Storage does, but looks at no byte of them.

    On a machine of two processors, what the server takes the script lacks; the real one
    takes nothing. So the checksum that the script says of its file is believed.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, bytes_per_second: float) -> None:
        super().__init__(("127.0.0.1", 0), SinkHandler)
        self.bytes_per_second = bytes_per_second
        self.lock = threading.Lock()
        self.objects: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.next_piece = 0.0

    def throttle(self, num_bytes: int) -> None:
        """Waits until the bytes may pass, in turn with the other connections."""
        if not self.bytes_per_second:
            return
        with self.lock:
            now = time.monotonic()
            seconds = num_bytes / self.bytes_per_second
            self.next_piece = max(self.next_piece, now) + seconds
            pause = self.next_piece - now
        time.sleep(pause)


class SinkHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Sink

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def do_GET(self) -> None:
        with self.server.lock:
            self._answer(200, {"items": list(self.server.objects.values())})

    def do_DELETE(self) -> None:
        self._answer(499 if "upload_id" in self.query else 404, {})

    def do_POST(self) -> None:
        """Takes a small object in one request, or begins an upload in chunks."""
        left = int(self.headers["Content-Length"])
        if self.query["uploadType"] == ["multipart"]:
            head = b""
            while head.count(b"\r\n\r\n") < 2:  # of the description, of the object
                if not (line := self.rfile.readline()):
                    raise ConnectionError("the client has died")
                head += line
            _, description, _ = head.split(b"\r\n\r\n")
            resource = json.loads(description.partition(b"\r\n--")[0])
            boundary = head.partition(b"\r\n")[0] + b"--"
            self._discard(left - len(head))
            self._store(resource, left - len(head) - len(b"\r\n" + boundary))
            return
        resource = {**json.loads(self.rfile.read(left) or b"{}"), "received": 0}
        resource.setdefault("name", self.query.get("name", [""])[0])
        with self.server.lock:
            upload_id = str(len(self.server.uploads))
            self.server.uploads[upload_id] = resource
        url = f"http://{self.headers['Host']}/upload?upload_id={upload_id}"
        self._answer(200, {}, Location=url)

    def do_PUT(self) -> None:
        """Takes a chunk: `Content-Range: bytes FIRST-LAST/TOTAL`."""
        resource = self.server.uploads[self.query["upload_id"][0]]
        size = int(self.headers["Content-Length"])
        self._discard(size)
        resource["received"] += size
        if self.headers["Content-Range"].endswith(f"/{resource['received']}"):
            self._store(resource, resource.pop("received"))
        else:
            self._answer(308, {}, Range=f"bytes=0-{resource['received'] - 1}")

    def _discard(self, left: int) -> None:
        """Has the kernel throw bytes away uncopied, but for the first few KB."""
        if not left:
            return
        here = self.rfile.read(min(left, len(self.rfile.peek())))  # type: ignore[attr-defined]
        left -= len(here)
        self.server.throttle(len(here))
        nowhere = bytearray(2**20)
        while left:
            size = self.connection.recv_into(
                nowhere, min(left, len(nowhere)), socket.MSG_TRUNC
            )
            if not size:
                raise ConnectionError("the client has died")
            left -= size
            self.server.throttle(size)

    def _store(self, resource: dict[str, Any], num_bytes: int) -> None:
        resource["size"] = str(num_bytes)
        resource["crc32c"] = resource["metadata"]["crc32c"]
        with self.server.lock:
            self.server.objects[resource["name"]] = resource
        self._answer(200, resource)

    def _answer(self, status: int, value: dict[str, Any], **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(bytes_per_second: float) -> None:
    """Says the port on the first line of stdout, and serves until it is killed."""
    sink = Sink(bytes_per_second)
    print(sink.server_port, flush=True)
    sink.serve_forever()


@contextlib.contextmanager
def sink_process(bytes_per_second: float = 0) -> Iterator[dict[str, str]]:
    """Runs a Sink in a process of its own; yields the environment to reach it."""
    command = call_command("serve", bytes_per_second)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        try:
            yield {"STORAGE_EMULATOR_HOST": url, "NO_GCE_CHECK": "true"}
        finally:
            server.kill()


def upload(paths: list[str]) -> dict[str, float]:
    """Uploads files by the script's own function.

    Returns:
      The largest resident memory of this process, bytes, and the seconds it took.
    """
    import imagenet_to_gcs

    start = time.perf_counter()
    imagenet_to_gcs.upload_to_gcs(paths, [], "gs://bucket/imagenet", "project")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "seconds": time.perf_counter() - start}


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Speed:
    """How fast one tool is, for the table of speeds."""

    tool: str
    run: Run
    data: Data

    @property
    def steady(self) -> float:
        """Images a second without start-up."""
        return self.data.num_images / (self.run.seconds - self.run.start_up)

    def cells(self, sequential: Run, cat: Run) -> list[str]:
        run, data = self.run, self.data
        return [
            self.tool,
            f"{run.seconds:.1f}",
            f"{run.start_up:.1f}" if run.start_up else "",
            f"{data.num_images / run.seconds:,.0f}",
            f"{data.num_bytes / run.seconds / 1e6:,.0f}",
            f"{self.steady:,.0f}",
            f"{sequential.seconds / run.seconds:.1f}",
            f"{run.seconds / cat.seconds:.1f}",
            f"{run.peak / 1e6:,.0f}" if run.worker_peak else "",
            f"{run.worker_peak / 1e6:,.0f}" if run.worker_peak else "",
        ]


@dataclass(frozen=True)
class Target:
    """One row of the table of targets."""

    what: str
    target: str
    measured: str

    def cells(self) -> list[str]:
        return [self.what, self.target, self.measured]


class Benchmark:
    """Owns the temporary directory, and measures what the arguments ask for."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments = arguments
        self.directory = directory
        self.scratch_dir = directory / "scratch"
        self.num_runs: int = 1 if arguments.quick else arguments.runs
        self.num_images: int = 2_000 if arguments.quick else arguments.images

    def raw_data(self) -> Data:
        given = self.arguments.raw_data_dir
        if given:
            return list_data(Path(given).resolve())
        say(f"Making {self.num_images:,} images.")
        num_distinct = min(NUM_DISTINCT, self.num_images)
        raw_dir = self.directory / "raw"
        return list_data(make_photographs(raw_dir, self.num_images, num_distinct))

    def alternate(self, measurements: dict[str, Callable[[], Run]]) -> dict[str, Run]:
        """Takes measurements in turns; returns the median of each."""
        runs: dict[str, list[Run]] = {name: [] for name in measurements}
        for i in range(self.num_runs):
            for name, take in measurements.items():
                run = take()
                runs[name].append(run)
                say(
                    f"Run {i + 1} of {self.num_runs}: {name}, {run.seconds:.2f} s, "
                    f"{run.start_up:.2f} s of them start-up."
                )
        return {name: median(runs[name]) for name in measurements}

    def speeds(self, data: Data) -> dict[str, Speed]:
        """Measures the tools; a run before them warms the page cache."""

        def encode(workers: int, sample_memory: bool = False) -> Run:
            return run_script(
                data.raw_dir,
                self.scratch_dir,
                f"--num_workers={workers}",
                num_bytes=data.num_bytes,
                sample_memory=sample_memory,
            )

        say("Warming the page cache.")
        warm_up = encode(2, sample_memory=True)
        runs = self.alternate(
            {
                "sequential loop": lambda: run_sequential(data, self.scratch_dir),
                "`cat`, 2 processes": lambda: run_cat(data, self.scratch_dir),
                "1 worker": lambda: encode(1),
                "2 workers": lambda: encode(2),
            }
        )
        both = runs["2 workers"]
        runs["2 workers"] = Run(
            both.seconds, both.start_up, warm_up.peak, warm_up.worker_peak
        )
        remove(self.scratch_dir)
        return {tool: Speed(tool, run, data) for tool, run in runs.items()}

    def stages(self, data: Data) -> dict[str, float]:
        say("Timing the stages of one image.")
        timings = [
            call("time_stages", data.raw_dir, self.scratch_dir, NUM_STAGES)
            for _ in range(self.num_runs)
        ]
        remove(self.scratch_dir)
        return {
            stage: statistics.median(timing[stage] for timing in timings)
            for stage in timings[0]
        }

    def start_up(self) -> Target:
        raw_dir = self.directory / "raw_of_start_up"
        make_photographs(raw_dir, 100, 10)
        command = [sys.executable, "-c", "import tensorflow"]
        runs = self.alternate(
            {
                "import tensorflow": lambda: measure(command),
                "small raw directory": lambda: run_script(raw_dir, self.scratch_dir),
            }
        )
        remove(self.scratch_dir)
        imported = runs["import tensorflow"].seconds
        first = runs["small raw directory"].start_up
        return Target(
            "start-up to the first shard of a small raw directory",
            f"at most 1 s more than TensorFlow's import, {imported:.2f} s",
            f"{first:.2f} s, {first - imported:+.2f} s",
        )

    def mistakes(self) -> Target:
        """Measures the help and the errors that need no image."""
        (self.directory / "empty").mkdir()
        seconds = {}
        for name, flags in MISTAKES.items():
            given = [flag.format(empty=self.directory / "empty") for flag in flags]
            command = [sys.executable, str(SCRIPT), *given]
            runs = [measure(command, statuses=(0, 1)) for _ in range(5)]
            seconds[name] = median(runs).seconds
        slowest = max(seconds, key=lambda name: seconds[name])
        return Target(
            "`--help`, and errors that need no image",
            "under 0.5 s",
            f"{seconds['--help']:.2f} s; slowest: {slowest}, {seconds[slowest]:.2f} s",
        )

    def encode_and_upload(self, data: Data) -> Target:
        """Measures both together and each alone, the link as fast as the encoding.

        One worker encodes: of two processors the other is left to the upload and to
        the server, which a real Cloud Storage would not need. The shards are as large
        as those of ImageNet.
        """
        share = data.num_images / IMAGENET_IMAGES
        training_shards = math.ceil(TRAINING_SHARDS * share)
        validation_shards = math.ceil(VALIDATION_SHARDS * share)
        num_shards = training_shards + validation_shards
        local = [
            "--num_workers=1",
            f"--training_shards={training_shards}",
            f"--validation_shards={validation_shards}",
        ]
        cloud = [*local, "--project=p", "--gcs_output_path=gs://bucket/imagenet"]
        scratch_dir = self.scratch_dir

        def encode(*flags: str, environment: dict[str, str] | None = None) -> Run:
            return run_script(
                data.raw_dir,
                scratch_dir,
                *flags,
                num_bytes=data.num_bytes,
                first_shard=f"train/train-00000-of-{training_shards:05d}",
                environment=environment,
            )

        encoded = self.alternate({"encode": lambda: encode(*local)})["encode"]
        # The first shard ends the start-up: it is not in the seconds that are left.
        num_bytes = data.num_bytes * (1 - 1 / num_shards)
        link = num_bytes / (encoded.seconds - encoded.start_up)

        def upload_only() -> Run:
            with sink_process(link) as environment:
                command = script_command(data.raw_dir, scratch_dir, *cloud)
                return measure(command, environment=environment)

        def both() -> Run:
            with sink_process(link) as environment:
                return encode(*cloud, environment=environment)

        runs = self.alternate(
            {
                "encode": lambda: encode(*local),
                "upload": upload_only,
                "encode and upload": both,
            }
        )
        remove(scratch_dir)
        alone = {name: runs[name].seconds for name in ("encode", "upload")}
        together = runs["encode and upload"]
        return Target(
            f"encode and upload {num_shards} shards together, 1 worker, link of "
            f"{link / 1e6:,.0f} MB/s",
            f"at most 1.15 x the longer of {alone['encode']:.1f} s and "
            f"{alone['upload']:.1f} s alone",
            f"{together.seconds:.1f} s, {together.start_up:.1f} s of them to the first "
            f"shard: {together.seconds / max(alone.values()):.2f} x; parent "
            f"{together.peak / 1e6:,.0f} MB",
        )

    def upload_memory(self) -> Target:
        directory = self.directory / "shards"
        directory.mkdir()
        paths = [directory / f"train-{i:05d}-of-01024" for i in range(NUM_BIG_SHARDS)]
        for path in paths:
            path.touch()
            os.truncate(path, BIG_SHARD_BYTES)
        with sink_process() as environment:
            answer = call("upload", list(map(str, paths)), environment=environment)
        remove(directory)
        speed = NUM_BIG_SHARDS * BIG_SHARD_BYTES / answer["seconds"] / 1e6
        return Target(
            f"memory of uploading {NUM_BIG_SHARDS} shards of 130 MB, 8 threads",
            "at most 200 MB",
            f"{answer['peak'] / 1e6:,.0f} MB ({speed:,.0f} MB/s)",
        )

    def plan(self) -> Target:
        say(f"Making {IMAGENET_IMAGES:,} empty files.")
        raw_dir = make_empty(self.directory / "raw_of_plan", IMAGENET_IMAGES)
        command = script_command(raw_dir, self.scratch_dir, "--dry_run")
        measure(command)  # warms the cache of the directories
        run = self.alternate({"plan": lambda: measure(command)})["plan"]
        remove(raw_dir)
        return Target(
            f"planning {IMAGENET_TRAINING:,} + {IMAGENET_VALIDATION:,} files, whole "
            "process",
            "at most 10 s and 500 MB",
            f"{run.seconds:.1f} s, {run.peak / 1e6:,.0f} MB",
        )

    def grow(self) -> Target:
        """Compares many small images with few, start-up left out."""
        say(f"Making {IMAGENET_IMAGES:,} small images.")
        originals = self.directory / "small"
        few = make_small(self.directory / "few", NUM_IMAGES, originals)
        many = make_small(self.directory / "many", IMAGENET_IMAGES, originals)
        run_script(few, self.scratch_dir)
        one = {"few": lambda: run_script(few, self.scratch_dir)}
        before = self.alternate(one)["few"]
        grown = run_script(many, self.scratch_dir)
        after = self.alternate(one)["few"]
        for directory in (few, many, self.scratch_dir):
            remove(directory)
        seconds = statistics.mean(run.seconds - run.start_up for run in (before, after))
        few_rate = NUM_IMAGES / seconds
        many_rate = IMAGENET_IMAGES / (grown.seconds - grown.start_up)
        return Target(
            f"{IMAGENET_IMAGES:,} images of 2 KB",
            f"at least 0.9 of the images/s of {NUM_IMAGES:,}",
            f"{many_rate:,.0f} images/s where they do {few_rate:,.0f}, "
            f"{many_rate / few_rate:.2f} of it; parent {grown.peak / 1e6:,.0f} MB",
        )


def speed_targets(speeds: dict[str, Speed]) -> list[Target]:
    """Derives the targets of encoding from the table of speeds."""
    loop, cat, one, two = speeds.values()
    images = f"{two.data.num_images:,} images, 2 workers"
    faster = loop.run.seconds / two.run.seconds
    parent, worker = two.run.peak / 1e6, two.run.worker_peak / 1e6
    return [
        Target(
            f"{images}, whole process",
            "at least 7 x the sequential loop's speed; at most 5 x the time of `cat`",
            f"{faster:.1f} x; {two.run.seconds / cat.run.seconds:.1f} x",
        ),
        Target(
            "the same without start-up",
            "at least 6,000 images/s where the sequential loop does 470: 12.8 x",
            f"{two.steady:,.0f} where it does {loop.steady:,.0f}: "
            f"{two.steady / loop.steady:.1f} x",
        ),
        Target(
            "2 workers over 1, without start-up",
            "at least 1.8 x",
            f"{two.steady / one.steady:.2f} x",
        ),
        Target(
            "memory, parent and a worker's own",
            "at most 500 MB and 60 MB",
            f"{parent:,.0f} MB and {worker:,.0f} MB",
        ),
    ]


# ---------------------------------------------------------------- the tables


def machine() -> str:
    """Names what was measured on, in one line."""
    model = _proc_value("/proc/cpuinfo", "model name")
    memory = int(_proc_value("/proc/meminfo", "MemTotal").split()[0]) * 1024
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("tensorflow", "protobuf", "google-cloud-storage")
    )
    return (
        f"{os.cpu_count()} processors ({model}), {memory / 1e9:.0f} GB of memory, "
        f"Linux {platform.release()}, Python {platform.python_version()}, {versions}"
    )


def _proc_value(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "0 unknown"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def say(line: str) -> None:
    load = os.getloadavg()[0]
    print(f"{time.strftime('%H:%M:%S')} [load {load:.1f}] {line}", file=sys.stderr)


def print_speeds(speeds: dict[str, Speed]) -> None:
    loop, cat, *_ = speeds.values()
    heads = [
        "",
        "seconds",
        "start-up",
        "images/s",
        "MB/s",
        "images/s without start-up",
        "speed of the loop x",
        "time of `cat` x",
        "parent MB",
        "worker's own MB",
    ]
    rows = [speed.cells(loop.run, cat.run) for speed in speeds.values()]
    print(table(heads, rows), flush=True)


def print_stages(stages: dict[str, float]) -> None:
    microseconds = [f"{1e6 * seconds:.0f}" for seconds in stages.values()]
    total = f"{1e6 * sum(stages.values()):.0f}"
    rows = [["us", *microseconds, total]]
    print(table(["one image", *stages, "all"], rows), flush=True)


def run_benchmark(benchmark: Benchmark) -> None:
    """Measures everything asked for and prints the tables."""
    arguments = benchmark.arguments
    data = benchmark.raw_data()
    size = data.num_bytes / max(data.num_images, 1) / 1e3
    print(
        f"{machine()}; {data.num_images:,} images of {size:.0f} KB, medians of "
        f"{benchmark.num_runs}, load {os.getloadavg()[0]:.1f} before.\n"
    )
    speeds = benchmark.speeds(data)
    print_speeds(speeds)
    print_stages(benchmark.stages(data))
    targets = speed_targets(speeds)
    targets.append(benchmark.start_up())
    targets.append(benchmark.encode_and_upload(data))
    targets.append(benchmark.upload_memory())
    targets.append(benchmark.mistakes())
    if not arguments.raw_data_dir:
        remove(data.raw_dir)
    if arguments.plan:
        targets.append(benchmark.plan())
    if arguments.grow:
        targets.append(benchmark.grow())
    heads = ["what", "target", "measured"]
    print(table(heads, [target.cells() for target in targets]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--raw_data_dir", help="images to use instead of drawn ones")
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2,000 images, one run")
    parser.add_argument("--plan", action="store_true", help="plan 1,331,167 files")
    parser.add_argument("--grow", action="store_true", help="encode 1,331,167 images")
    parser.add_argument("--temp_dir", help="where 10 GB can be written")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up first
    with tempfile.TemporaryDirectory(
        prefix="benchmark_", dir=arguments.temp_dir
    ) as directory:
        run_benchmark(Benchmark(arguments, Path(directory)))


if __name__ == "__main__":
    main()
