"""Measures how fast and light the script is, against its targets; prints Markdown.

    python3 tests/benchmark.py                       # 36,000 images, about 8 minutes
    python3 tests/benchmark.py --quick               # 2,000 images, one run
    python3 tests/benchmark.py --cold                # page cache dropped; needs root
    python3 tests/benchmark.py --late_disk=LIBRARY   # a network disk, simulated
    python3 tests/benchmark.py --before=SCRIPT       # against another version, warm
    python3 tests/benchmark.py --plan --grow         # also with 1,331,167 files
    python3 tests/benchmark.py --listing             # only the listing of as many
    python3 tests/benchmark.py --raw_data_dir=DIR    # real images instead of drawn ones

It needs Linux, and room for the images in the temporary directory, on a disk, and once
more in the directory of the shards, by default in memory, so that writing them is left
out: 4 GB each for 36,000 images of 110 KB, 8 GB on the disk with --cold. They should
fit in memory as well, for the warm runs. What is compared runs in turns, so that a
machine that grows slower or faster meanwhile does so for all; every number is the
median of several runs. All are whole processes; the time to the first finished shard is
reported separately, as start-up.

The yardsticks:

- The sequential loop does what the reference does with an image: one process reads it,
  decodes it in full, and writes an Example with TensorFlow's own writer. A part of the
  images is measured and scaled up.
- `cat` of the files into 1,000 others, by two processes: nothing but bytes moved.

LIBRARY, preloaded, delays each open and read of files under SLOW_PREFIX by SLOW_OPEN_US
and SLOW_READ_US microseconds, but not a read announced that long ago.

pytest runs none of this.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jpegs

SCRIPT = Path(__file__).resolve().parent.parent / "imagenet_to_gcs.py"
EMULATOR = Path(__file__).resolve().with_name("emulator.py")
UPLOAD = ("--project=p", "--gcs_output_path=gs://bucket/imagenet")
TRAINING_SHARDS = 1024
VALIDATION_SHARDS = 128
FIRST_SHARD = "train/train-00000-of-*"

NUM_IMAGES = 36_000
NUM_DRAWN = 300  # the others differ from them in some bytes after the end
QUALITY = 96  # gives JPEGs of 110 KB
IMAGENET_TRAINING = 1_281_167
IMAGENET_VALIDATION = 50_000
IMAGENET_IMAGES = IMAGENET_TRAINING + IMAGENET_VALIDATION

NUM_SEQUENTIAL = 4_000  # images that the sequential loop is measured on
NUM_OUTPUTS = 1_000  # of `cat`

POLL_SECONDS = 0.005
SAMPLE_SECONDS = 2  # each sample walks the page tables of all workers

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


def draw_images(**options: int) -> list[bytes]:
    draw = functools.partial(jpegs.jpeg, "baseline", **options)
    with ProcessPoolExecutor() as workers:
        return list(workers.map(draw, range(NUM_DRAWN)))


def make_raw(raw_dir: Path, num_images: int, make: Callable[[int, str], None]) -> Path:
    """Makes a raw directory; `make` writes the i-th image at a path."""
    num_validation = max(1, round(num_images * IMAGENET_VALIDATION / IMAGENET_IMAGES))
    num_training = num_images - num_validation
    synsets = [f"n{1_000_000 + i:08d}" for i in range(min(1000, num_training))]
    for directory in ("validation", *(f"train/{synset}" for synset in synsets)):
        (raw_dir / directory).mkdir(parents=True)
    labels = [synsets[i % len(synsets)] for i in range(num_validation)]
    (raw_dir / "synset_labels.txt").write_text("\n".join(labels) + "\n")
    for i in range(num_training):
        synset = synsets[i * len(synsets) // num_training]
        make(i, f"{raw_dir}/train/{synset}/{synset}_{i}.JPEG")
    for i in range(num_validation):
        name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
        make(num_training + i, f"{raw_dir}/validation/{name}")
    return raw_dir


def make_photographs(raw_dir: Path, num_images: int) -> Path:
    """Makes a raw directory of different files of 110 KB."""
    photographs = draw_images(quality=QUALITY)

    def write(i: int, path: str) -> None:
        Path(path).write_bytes(photographs[i % NUM_DRAWN] + i.to_bytes(8, "big"))

    return make_raw(raw_dir, num_images, write)


def make_small(raw_dir: Path, num_images: int) -> Path:
    """Makes a raw directory of images of 2 KB."""
    return make_links(raw_dir, num_images, draw_images(width=64, height=48))


def make_links(raw_dir: Path, num_images: int, files: Sequence[bytes]) -> Path:
    """Makes a raw directory of links to a few hundred originals."""
    originals = raw_dir.with_name("originals")
    if not originals.exists():
        originals.mkdir()
        for i, data in enumerate(files):
            (originals / str(i)).write_bytes(data)

    def link(i: int, path: str) -> None:
        os.link(originals / str(i % NUM_DRAWN), path)

    return make_raw(raw_dir, num_images, link)


def pack(data: Data, raw_dir: Path) -> Path:
    """Packs the images of a raw directory as ImageNet comes: a tar of tars, a tar."""
    raw_dir.mkdir()
    create = functools.partial(tarfile.open, mode="w", format=tarfile.GNU_FORMAT)
    shutil.copy(data.raw_dir / "synset_labels.txt", raw_dir)
    with create(raw_dir / "ILSVRC2012_img_train.tar") as whole:
        for directory in sorted((data.raw_dir / "train").iterdir()):
            class_tar = raw_dir / f"{directory.name}.tar"
            with create(class_tar) as tar:
                tar.add(directory, "")
            whole.add(class_tar, class_tar.name)
            class_tar.unlink()
    with create(raw_dir / "ILSVRC2012_img_val.tar") as tar:
        tar.add(data.raw_dir / "validation", "")
    return raw_dir


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


# ---------------------------------------------------------------- one measured process


@dataclass(frozen=True)
class Run:
    """One process, from its start to its end.

    Attributes:
      start_up: Seconds to the first finished shard.
      peak: Largest resident memory, bytes; of the process itself, not its workers.
      worker_peak: Largest memory of a worker that it shares with no other, bytes.
      processor: Seconds that it was computing, with its children.
    """

    seconds: float
    start_up: float = 0.0
    peak: int = 0
    worker_peak: int = 0
    processor: float = 0.0

    @property
    def steady(self) -> float:
        """Seconds without start-up."""
        return self.seconds - self.start_up


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
    first_shard_in: Path | None = None,
    environment: Mapping[str, str] | None = None,
    sample_memory: bool = False,
) -> Run:
    """Runs a command to its end; a shard in `first_shard_in` ends its start-up."""
    env = {**os.environ, **(environment or {})}
    start_up, worker_peak = 0.0, 0
    with tempfile.TemporaryFile() as log:
        start = next_sample = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.perf_counter()
            if first_shard_in and any(first_shard_in.glob(FIRST_SHARD)):
                start_up, first_shard_in = now - start, None
            if pid:
                break
            if sample_memory and now > next_sample:
                next_sample = now + SAMPLE_SECONDS
                for child in _children(process.pid):
                    worker_peak = max([worker_peak, *map(_unshared, _children(child))])
            time.sleep(POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{command} failed:\n{log.read().decode()[-2000:]}")
    processor = usage.ru_utime + usage.ru_stime
    return Run(now - start, start_up, usage.ru_maxrss * 1024, worker_peak, processor)


def run_script(
    scratch_dir: Path,
    *flags: str,
    raw_dir: Path,
    num_bytes: int = 0,
    cold: bool = False,
    again: bool = False,
    link: float | None = None,
    script: Path = SCRIPT,
    environment: Mapping[str, str] | None = None,
    sample_memory: bool = False,
) -> Run:
    """Writes the shards of a raw directory.

    Args:
      num_bytes: Of the output, about; the memory for it is warmed first.
      cold: Whether to drop the page cache first.
      again: Whether to go on with what an earlier run has left.
      link: Bytes per second of the upload, 0 for no limit; without it there is none.
    """
    if not again:
        make_way(scratch_dir, num_bytes)
    if cold:
        drop_page_cache()
    flags += ("--nogcs_upload",) if link is None else UPLOAD
    where = [f"--raw_data_dir={raw_dir}", f"--local_scratch_dir={scratch_dir}"]
    command = [sys.executable, str(script), *where, *flags]
    with contextlib.ExitStack() as stack:
        env = dict(environment or {})
        if link is not None:
            env |= stack.enter_context(cloud_storage(link))
        return measure(command, scratch_dir, env, sample_memory)


def run_listing(raw_dir: Path, script: Path = SCRIPT) -> Run:
    """Lists and labels the images of a raw directory, and does no more."""
    name = script.stem
    command = f"{name}.__name__ = '__main__'; {name}.read_dataset(sys.argv[1])"
    code = f"import sys, {name}; {command}"  # as the command does
    environment = {"PYTHONPATH": str(script.resolve().parent)}
    return measure([sys.executable, "-c", code, str(raw_dir)], environment=environment)


def remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    os.sync()  # the disk comes to rest


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


def written_to_disk(directory: Path) -> int:
    """Bytes written so far to the disk of a directory, by whatever process."""
    os.sync()
    device = os.stat(directory).st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return int(path.read_text().split()[6]) * 512


def median(runs: Sequence[Run]) -> Run:
    """Takes the median of the times, and the largest memory."""
    return Run(
        statistics.median(run.seconds for run in runs),
        statistics.median(run.start_up for run in runs),
        max(run.peak for run in runs),
        processor=statistics.median(run.processor for run in runs),
    )


# ---------------------------------------------------------------- the yardsticks


def sequential_loop(raw_dir: str, output_dir: str) -> None:
    """Does the reference's work, image by image, on a part; prints how fast.

    Each shard written has as many images as it would have of the whole.
    """
    import tensorflow as tf

    paths = sorted(map(str, Path(raw_dir).glob("train/*/*.JPEG")))
    synsets = sorted({path.split("/")[-2] for path in paths})
    label_of = {synset: label for label, synset in enumerate(synsets, start=1)}
    random.Random(0).shuffle(paths)
    size = math.ceil(len(paths) / TRAINING_SHARDS)
    part = paths[:NUM_SEQUENTIAL]
    start = time.perf_counter()
    for i in range(0, len(part), size):
        with tf.io.TFRecordWriter(f"{output_dir}/train-{i:05d}") as writer:
            for path in part[i : i + size]:
                label = label_of[path.split("/")[-2]]
                writer.write(_reference_example(tf, path, label))
    print((time.perf_counter() - start) / len(part))


def _reference_example(tf: Any, path: str, label: int) -> bytes:
    def feature(value: int | bytes) -> Any:
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    data = Path(path).read_bytes()
    height, width, channels = tf.io.decode_jpeg(data, channels=3).shape
    synset, filename = os.fsencode(path).split(b"/")[-2:]
    values = {"height": height, "width": width, "channels": channels}
    values |= {"colorspace": b"RGB", "format": b"JPEG", "encoded": data}
    values |= {"class/label": label, "class/synset": synset, "filename": filename}
    features = {f"image/{name}": feature(value) for name, value in values.items()}
    example = tf.train.Example(features=tf.train.Features(feature=features))
    serialized: bytes = example.SerializeToString()
    return serialized


def run_sequential(data: Data, output_dir: Path) -> Run:
    """Runs the sequential loop on a part, and scales its loop up to all images."""
    make_way(output_dir, data.num_bytes)
    output_dir.mkdir()
    directories = [str(data.raw_dir), str(output_dir)]
    command = [sys.executable, __file__, "--sequential", *directories]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, check=True)
    seconds = time.perf_counter() - start
    an_image = float(result.stdout.split()[-1])
    start_up = seconds - an_image * min(NUM_SEQUENTIAL, data.num_images)
    return Run(start_up + an_image * data.num_images, start_up)


def run_cat(data: Data, output_dir: Path, cold: bool = False) -> Run:
    make_way(output_dir, data.num_bytes)
    output_dir.mkdir()
    files_each = math.ceil(data.num_images / NUM_OUTPUTS)
    shell = ["sh", "-c", 'cat -- "$@" > "$0/$$"', str(output_dir)]
    command = ["xargs", "-0", "-P", "2", "-n", str(files_each), *shell]
    if cold:
        drop_page_cache()
    start = time.perf_counter()
    subprocess.run(command, input="\0".join(data.paths).encode(), check=True)
    return Run(time.perf_counter() - start)


# ---------------------------------------------------------------- Cloud Storage


@contextlib.contextmanager
def cloud_storage(bytes_per_second: float = 0) -> Iterator[dict[str, str]]:
    """Runs the tests' emulator, which throws bytes away; yields how to reach it."""
    command = [sys.executable, str(EMULATOR), f"--bytes_per_second={bytes_per_second}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        url = server.stdout.readline().strip()
        try:
            yield {"STORAGE_EMULATOR_HOST": url, "NO_GCE_CHECK": "true"}
        finally:
            server.kill()


# ---------------------------------------------------------------- what is measured


class Target(NamedTuple):
    """A row of the table."""

    what: str
    wanted: str
    measured: str


class Benchmark:
    """Owns the temporary directories, and measures what the arguments ask for."""

    def __init__(
        self, arguments: argparse.Namespace, directory: Path, scratch_dir: Path
    ) -> None:
        self.arguments = arguments
        self.directory = directory
        self.scratch_dir = scratch_dir / "scratch"
        self.num_runs: int = 1 if arguments.quick else arguments.runs

    def raw_data(self) -> Data:
        if self.arguments.raw_data_dir:
            return list_data(Path(self.arguments.raw_data_dir).resolve())
        num_images = 2_000 if self.arguments.quick else self.arguments.images
        say(f"Making {num_images:,} images.")
        return list_data(make_photographs(self.directory / "raw", num_images))

    def encode(self, data: Data, *flags: str, **options: Any) -> Run:
        """Runs the script with two workers, unless the flags say otherwise."""
        flags = ("--num_workers=2", *flags)
        options = {"raw_dir": data.raw_dir, "num_bytes": data.num_bytes, **options}
        return run_script(self.scratch_dir, *flags, **options)

    def alternate(self, measurements: dict[str, Callable[[], Run]]) -> dict[str, Run]:
        """Takes measurements in turns; returns the median of each."""
        runs: dict[str, list[Run]] = {name: [] for name in measurements}
        for i in range(self.num_runs):
            for name, take in measurements.items():
                runs[name].append(take())
                seconds = runs[name][-1].seconds
                say(f"Run {i + 1} of {self.num_runs}: {name}, {seconds:.2f} s.")
        remove(self.scratch_dir)
        return {name: median(runs[name]) for name in measurements}

    def cold(self, data: Data) -> Iterator[Target]:
        """Compares runs from the disk with runs from memory, directories and tars."""
        tars = pack(data, self.directory / "tars")
        runs = self.alternate(
            {
                "warm": lambda: self.encode(data),
                "cold": lambda: self.encode(data, cold=True),
                "`cat`, cold": lambda: run_cat(data, self.scratch_dir, cold=True),
                "tars, warm": lambda: self.encode(data, raw_dir=tars),
                "tars, cold": lambda: self.encode(data, raw_dir=tars, cold=True),
            }
        )
        remove(tars)
        cat = runs["`cat`, cold"].seconds
        yield Target(
            f"page cache dropped, {data.num_images:,} files, 2 workers",
            f"at most 1.3 x the warm run; ahead of `cat` by two processes, {cat:.1f} s",
            _ratio(runs["cold"], runs["warm"]),
        )
        yield Target(
            "the same from tars",
            "at most 1.3 x the warm run from tars",
            _ratio(runs["tars, cold"], runs["tars, warm"]),
        )

    def late_disk(self, data: Data) -> Iterator[Target]:
        """Compares runs from a disk of some latency with runs from memory."""

        def late(microseconds: int) -> Run:
            environment = {
                "LD_PRELOAD": os.path.abspath(self.arguments.late_disk),
                "SLOW_PREFIX": str(data.raw_dir),
                "SLOW_OPEN_US": str(microseconds),
                "SLOW_READ_US": str(microseconds),
            }
            return self.encode(data, environment=environment)

        runs = self.alternate(
            {
                "warm": lambda: self.encode(data),
                "1 ms late": lambda: late(1_000),
                "5 ms late": lambda: late(5_000),
            }
        )
        for what, most in (("1 ms late", 1.7), ("5 ms late", 4)):
            yield Target(
                f"each open and read {what}, 2 workers",
                f"at most {most} x the warm run",
                _ratio(runs[what], runs["warm"]),
            )

    def before(self, data: Data) -> Target:
        """Compares the script with another version of it, warm."""
        other = Path(self.arguments.before)
        runs = self.alternate(
            {
                "this": lambda: self.encode(data),
                "other": lambda: self.encode(data, script=other),
            }
        )
        ratio = _ratio(runs["this"], runs["other"])
        return Target(f"warm run, against {other}", "at most 1.03 x", ratio)

    def unkept(self, data: Data) -> Target:
        """Counts what is written to the disk of shards that do not stay on it."""
        scratch_dir = self.directory / "scratch_on_disk"
        flags = ["--num_workers=2", "--nokeep_local_shards"]
        before = written_to_disk(self.directory)
        run_script(scratch_dir, *flags, raw_dir=data.raw_dir, link=0)
        written = written_to_disk(self.directory) - before
        remove(scratch_dir)
        return Target(
            "`--nokeep_local_shards`: written to the disk, by all processes",
            f"less than a tenth of the shards' {data.num_bytes / 1e9:.1f} GB",
            f"{written / 1e9:.2f} GB, {written / data.num_bytes:.3f} of it",
        )

    def speeds(self, data: Data) -> Iterator[Target]:
        """Measures the tools, warm; prints their table and gives what follows of it."""
        say("Warming the page cache.")
        memory = self.encode(data, sample_memory=True)
        runs = self.alternate(
            {
                "sequential loop": lambda: run_sequential(data, self.scratch_dir),
                "`cat`, 2 processes": lambda: run_cat(data, self.scratch_dir),
                "1 worker": lambda: self.encode(data, "--num_workers=1"),
                "2 workers": lambda: self.encode(data),
            }
        )
        loop, cat, one, two = runs.values()
        print_speeds(runs, data)
        yield Target(
            f"{data.num_images:,} images, 2 workers, warm, whole process",
            "at least 7 x the sequential loop's speed; at most 5 x the time of `cat`",
            f"{loop.seconds / two.seconds:.1f} x; {two.seconds / cat.seconds:.1f} x",
        )
        yield Target(
            "the same without start-up",
            "at least 6,000 images/s where the sequential loop does 470: 12.8 x",
            f"{data.num_images / two.steady:,.0f} where it does "
            f"{data.num_images / loop.steady:,.0f}: {loop.steady / two.steady:.1f} x",
        )
        yield Target(
            "2 workers over 1, without start-up",
            "at least 1.8 x",
            f"{one.steady / two.steady:.2f} x",
        )
        yield Target(
            "memory, parent and a worker's own",
            "at most 500 MB and 60 MB",
            f"{memory.peak / 1e6:,.0f} MB and {memory.worker_peak / 1e6:,.0f} MB",
        )

    def start_up(self) -> Target:
        raw_dir = make_photographs(self.directory / "raw_of_start_up", 100)
        command = [sys.executable, "-c", "import tensorflow"]
        runs = self.alternate(
            {
                "import tensorflow": lambda: measure(command),
                "small raw directory": lambda: run_script(
                    self.scratch_dir, raw_dir=raw_dir
                ),
            }
        )
        imported = runs["import tensorflow"].seconds
        first = runs["small raw directory"].start_up
        return Target(
            "start-up to the first shard of a small raw directory",
            f"at most 1 s more than TensorFlow's import, {imported:.2f} s",
            f"{first:.2f} s, {first - imported:+.2f} s",
        )

    def encode_and_upload(self, data: Data) -> Target:
        """Measures both together and each alone, the link as fast as the encoding.

        One worker encodes: the other processor is left to the upload and the server.
        The shards are as large as those of ImageNet.
        """
        share = data.num_images / IMAGENET_IMAGES
        num_training = math.ceil(TRAINING_SHARDS * share)
        num_validation = math.ceil(VALIDATION_SHARDS * share)
        local = ["--num_workers=1", f"--training_shards={num_training}"]
        local += [f"--validation_shards={num_validation}"]
        encode = self.alternate({"encode": lambda: self.encode(data, *local)})["encode"]
        # The first shard ends the start-up: it is not in the seconds that are left.
        link = (
            data.num_bytes * (1 - 1 / (num_training + num_validation)) / encode.steady
        )

        both = functools.partial(self.encode, data, *local, link=link)
        upload = functools.partial(both, again=True)  # what `both` has left
        runs = self.alternate({"both": both, "upload": upload})
        longer = max(encode.seconds, runs["upload"].seconds)
        return Target(
            f"encode and upload together, 1 worker, link of {link / 1e6:,.0f} MB/s",
            f"at most 1.15 x the longer of {encode.seconds:.1f} s and "
            f"{runs['upload'].seconds:.1f} s alone",
            f"{runs['both'].seconds:.1f} s: {runs['both'].seconds / longer:.2f} x; "
            f"parent {runs['both'].peak / 1e6:,.0f} MB",
        )

    def plan(self) -> Target:
        say(f"Making {IMAGENET_IMAGES:,} empty files.")
        raw_dir = self.directory / "raw_of_plan"
        make_raw(raw_dir, IMAGENET_IMAGES, lambda _, path: os.mknod(path))

        def plan() -> Run:
            return run_script(self.scratch_dir, "--dry_run", raw_dir=raw_dir)

        plan()  # warms the cache of the directories
        run = self.alternate({"plan": plan})["plan"]
        remove(raw_dir)
        return Target(
            f"planning {IMAGENET_TRAINING:,} + {IMAGENET_VALIDATION:,} files, whole "
            "process",
            "at most 10 s and 500 MB",
            f"{run.seconds:.1f} s, {run.peak / 1e6:,.0f} MB",
        )

    def listing(self) -> Iterator[Target]:
        """Lists ImageNet's number of tiny files, in directories and in tars."""
        say(f"Making {IMAGENET_IMAGES:,} links, and tars of them.")
        files = make_links(self.directory / "files", IMAGENET_IMAGES, [b"x"] * 300)
        tars = pack(Data(files, (), 0), self.directory / "tars")
        other = Path(self.arguments.before or SCRIPT)
        for what, raw_dir in (("directories", files), ("tars", tars)):
            run_listing(raw_dir)  # warms the page cache
            runs = self.alternate(
                {
                    f"{what}, this": functools.partial(run_listing, raw_dir),
                    f"{what}, other": functools.partial(run_listing, raw_dir, other),
                }
            )
            this, before = runs.values()
            yield Target(
                f"listing {IMAGENET_IMAGES:,} images in {what}, against {other}",
                "at most 1.05 x the processor time, and no more memory",
                f"{this.seconds:.1f} s, processor {this.processor:.1f} s where that "
                f"takes {before.processor:.1f} s: "
                f"{this.processor / before.processor:.2f} x; {this.peak / 1e6:,.0f} MB "
                f"where that takes {before.peak / 1e6:,.0f} MB",
            )
            remove(raw_dir)

    def grow(self) -> Target:
        """Compares many small images with few, start-up left out."""
        say(f"Making {IMAGENET_IMAGES:,} small images.")
        few = make_small(self.directory / "few", NUM_IMAGES)
        many = make_small(self.directory / "many", IMAGENET_IMAGES)

        def run(raw_dir: Path) -> Run:
            return run_script(self.scratch_dir, raw_dir=raw_dir, link=0)

        run(few)  # warms the page cache
        before, grown, after = run(few), run(many), run(few)
        for directory in (few, many, self.scratch_dir):
            remove(directory)
        few_rate = NUM_IMAGES / statistics.mean((before.steady, after.steady))
        many_rate = IMAGENET_IMAGES / grown.steady
        return Target(
            f"{IMAGENET_IMAGES:,} images of 2 KB, with upload",
            f"at least 0.9 of the images/s of {NUM_IMAGES:,}; parent at most 500 MB",
            f"{many_rate:,.0f} images/s where they do {few_rate:,.0f}, "
            f"{many_rate / few_rate:.2f} of it; parent {grown.peak / 1e6:,.0f} MB",
        )


def _ratio(run: Run, yardstick: Run) -> str:
    return (
        f"{run.seconds:.1f} s where that takes {yardstick.seconds:.1f} s: "
        f"{run.seconds / yardstick.seconds:.2f} x"
    )


# ---------------------------------------------------------------- the tables


def machine() -> str:
    """Names what was measured on, in one line."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{os.cpu_count()} processors ({found[1] if found else 'unknown'}), "
        f"{memory / 1e9:.0f} GB of memory, Linux {platform.release()}, Python "
        f"{platform.python_version()}, TensorFlow "
        f"{importlib.metadata.version('tensorflow')}"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def say(line: str) -> None:
    load = os.getloadavg()[0]
    print(f"{time.strftime('%H:%M:%S')} [load {load:.1f}] {line}", file=sys.stderr)


def print_speeds(runs: dict[str, Run], data: Data) -> None:
    loop, cat, *_ = runs.values()
    rows = [
        (
            tool,
            f"{run.seconds:.1f}",
            f"{run.start_up:.1f}",
            f"{data.num_images / run.seconds:,.0f}",
            f"{data.num_bytes / run.seconds / 1e6:,.0f}",
            f"{data.num_images / run.steady:,.0f}",
            f"{loop.seconds / run.seconds:.1f}",
            f"{run.seconds / cat.seconds:.1f}",
        )
        for tool, run in runs.items()
    ]
    heads = ["warm", "seconds", "start-up", "images/s", "MB/s"]
    heads += ["images/s without start-up", "speed of the loop x", "time of `cat` x"]
    print(table(heads, rows), flush=True)


def run_benchmark(benchmark: Benchmark) -> None:
    """Measures everything asked for and prints the tables, cold figures first."""
    arguments = benchmark.arguments
    if arguments.listing:
        print(table(["what", "wanted", "measured"], benchmark.listing()))
        return
    data = benchmark.raw_data()
    size = data.num_bytes / max(data.num_images, 1) / 1e3
    print(
        f"{machine()}; {data.num_images:,} images of {size:.0f} KB, medians of "
        f"{benchmark.num_runs}, load {os.getloadavg()[0]:.1f} before.\n"
    )
    targets: list[Target] = []
    if arguments.cold:
        targets += benchmark.cold(data)
    if arguments.late_disk:
        targets += benchmark.late_disk(data)
    if arguments.before:
        targets.append(benchmark.before(data))
    if not arguments.only_disk:
        targets += benchmark.speeds(data)
        targets += [benchmark.unkept(data), benchmark.encode_and_upload(data)]
        targets.append(benchmark.start_up())
    if not arguments.raw_data_dir:
        remove(data.raw_dir)
    if arguments.plan:
        targets.append(benchmark.plan())
    if arguments.grow:
        targets.append(benchmark.grow())
    print(table(["what", "wanted", "measured"], targets))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--raw_data_dir", help="images to use instead of drawn ones")
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2,000 images, one run")
    parser.add_argument("--cold", action="store_true", help="needs root")
    parser.add_argument("--late_disk", help="a library that makes each file late")
    parser.add_argument("--before", help="another version of the script to compare")
    parser.add_argument("--only_disk", action="store_true", help="no other rows")
    parser.add_argument("--plan", action="store_true", help="plan 1,331,167 files")
    parser.add_argument("--grow", action="store_true", help="encode 1,331,167 images")
    parser.add_argument("--listing", action="store_true", help="no other rows")
    parser.add_argument("--temp_dir", help="on a disk, for the images")
    parser.add_argument("--scratch_dir", default="/dev/shm", help="for the shards")
    parser.add_argument("--sequential", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sequential:
        return sequential_loop(*arguments.sequential)
    if arguments.cold and os.geteuid():
        parser.error("--cold drops the page cache, which only root may do")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up first
    temporary = functools.partial(tempfile.TemporaryDirectory, prefix="benchmark_")
    with (
        temporary(dir=arguments.temp_dir) as directory,
        temporary(dir=arguments.scratch_dir) as scratch_dir,
    ):
        run_benchmark(Benchmark(arguments, Path(directory), Path(scratch_dir)))


if __name__ == "__main__":
    main()
