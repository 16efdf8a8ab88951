#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#   "absl-py>=2.1.0",
#   "google-cloud-storage>=3.4.1",
#   "tensorflow>=2.17.0",
# ]
# ///
# Copyright 2026 The imagenet_to_gcs authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes raw ImageNet as TFRecord shards and uploads them to Cloud Storage.

    python3 imagenet_to_gcs.py --project=$PROJECT --gcs_output_path=$DATA_DIR \\
      --raw_data_dir=$IMAGENET_HOME

What goes in, under --raw_data_dir, extracted or as ImageNet's own tars:
    train/n01440764/n01440764_18.JPEG        1,281,167 images, in 1,000 synsets
    validation/ILSVRC2012_val_00000001.JPEG  50,000 images
    synset_labels.txt            line i: the synset of the i-th validation image

What comes out, under --local_scratch_dir and, flat, under --gcs_output_path:
    train/train-00000-of-01024            1,024 shards
    validation/validation-00000-of-00128    128 shards
    manifest.json                         written last: the data set is complete

A shard is a TFRecord file; a record is a tf.train.Example of nine features:
    image/height, image/width       int64  pixels
    image/channels                  int64  3
    image/colorspace, image/format  bytes  RGB and JPEG
    image/class/label               int64  rank among sorted synsets, from 1
    image/class/synset              bytes  n01440764
    image/filename                  bytes  n01440764_18.JPEG
    image/encoded                   bytes  the file; a PNG or CMYK one as JPEG

To resume, rerun the command. The same images, TensorFlow and numbers of
shards give the same bytes, however often the run was interrupted.

Errors have a line per problem; finished shards are kept:
    InvalidInputError   what must be fixed before a shard can be written
    RunError            what else stopped the run, such as another run:
      BadImagesError      images to be replaced; all other shards are done
      MachineError        a disk, the memory, a limit, a process
      ServiceError        Cloud Storage, or the way to it, failed
Exit status: 0 if this task is done; 1 if something must be fixed; 75 if the
same command can succeed later; after Ctrl-C 130, SIGTERM 143, SIGHUP 129.

Who calls whom:
    main, run                flags, signals, exit status; the whole way
      plan_job               lists, plans and checks
        read_dataset         lists the images and finds their classes
        plan_shards          says which image goes where
        look                 compares this with the disk and the bucket
      carry_out
        write_and_upload     one shard in each thread: `_take_shard`
          write_shard        `write_records` fills it, in a worker process
          Destination.upload
        _write_manifest      writes the manifest, once `look` has found all
"""

from __future__ import annotations

import signal
import sys
import warnings

if sys.platform != "linux" or sys.version_info < (3, 10):
    sys.exit("This needs Python 3.10 or newer on Linux, which includes WSL on Windows.")
if __name__ == "__main__":
    # Until `main` handles it, Ctrl-C ends the process without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Libraries warn; with PYTHONWARNINGS=error, that would end the run.
    warnings.simplefilter("ignore")

import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import http.client
import io
import itertools
import json
import logging as python_logging
import math
import os
import pathlib
import pickle
import queue
import random
import re
import shlex
import shutil
import socket
import stat
import struct
import subprocess
import tarfile
import textwrap
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TypeAlias

INSTALL = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt (on Debian, "
    "first: sudo apt-get install --yes python3-venv), and use .venv/bin/python"
)
try:
    import google_crc32c
    from absl import app, flags, logging
    from absl.flags import FLAGS, DEFINE_bool, DEFINE_integer, DEFINE_string
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"{error}. Run: {INSTALL}")

if TYPE_CHECKING:
    from google.cloud import storage

    StrPath: TypeAlias = str | os.PathLike[str]

__version__ = "3.0.0"
LABELS_FILE, MANIFEST_FILE = "synset_labels.txt", "manifest.json"
TRAINING_SHARDS, VALIDATION_SHARDS = 1024, 128
SPLITS = TRAINING_DIRECTORY, VALIDATION_DIRECTORY = "train", "validation"

DEFINE_string("project", None, "Google Cloud project of the upload.")
DEFINE_string("gcs_output_path", None, "Where to upload: gs://bucket[/directory].")
DEFINE_string("local_scratch_dir", None, "Where to write; default: in raw_data_dir.")
DEFINE_string("raw_data_dir", None, "The raw ImageNet, laid out as above.")
DEFINE_bool("gcs_upload", True, "Upload the shards, or only write them.")
DEFINE_integer("num_workers", None, "Number of processes; default: one per processor.")
DEFINE_integer("training_shards", TRAINING_SHARDS, "Number of training shards.")
DEFINE_integer("validation_shards", VALIDATION_SHARDS, "Number of validation shards.")
DEFINE_bool("fake_imagenet", False, "Fill an empty --raw_data_dir with fake images.")
DEFINE_bool("keep_local_shards", True, "Keep local shards once uploaded.")
DEFINE_integer("task_index", None, "Index of this machine among --task_count, from 0.")
DEFINE_integer("task_count", 1, "Number of machines that share the work.")
DEFINE_bool("dry_run", False, "Check everything and say what would be done.")
DEFINE_bool("version", False, "Print the version and exit.")
INHERITED_FLAGS = """
  --flagfile: A file with flags, one a line.
  --verbosity: -1 logs only warnings and errors. (default: '0')
  --help: Print this manual and exit."""
RERUN = "Rerun the same command to resume."
FIX_AND_RERUN = "Fix this and rerun the same command."
TOO_MANY_THREADS = "Cannot start a thread or process. Raise the limit (ulimit -u)."
DISK_FAILS = "The disk fails or is gone"
DISK_ERRORS = {errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV}
DISK_ERRORS |= {errno.ETIMEDOUT, errno.ENOTCONN}  # these two: network disks
LIMITS = {  # of the machine; no file is to blame
    errno.EMFILE: "Raise the limit (ulimit -n) and rerun the same command.",
    errno.ENFILE: "Raise the limit (sysctl fs.file-max) and rerun the same command.",
    errno.ENOMEM: "Allow the run more memory, or rerun it with fewer --num_workers.",
}
MACHINE_ERRORS = LIMITS | dict.fromkeys(DISK_ERRORS, f"{DISK_FAILS}. {FIX_AND_RERUN}")


class InvalidInputError(ValueError):
    """What must be fixed before a shard can be written, one line an argument."""

    def __str__(self) -> str:
        return "\n".join(self.args)


class RunError(RuntimeError):
    """What stopped a run, one line an argument; finished shards are kept."""

    def __init__(self, *problems: str, may_pass: bool = False):
        super().__init__(*problems)
        self.may_pass = may_pass  # whether the same command may succeed later

    def __str__(self) -> str:
        return "\n".join(self.args)


class BadImagesError(RunError):
    """Images that cannot be used; this task's shards without them are done."""

    def __init__(self, *problems: str, unreadable: Sequence[str] = ()):
        super().__init__(*problems)
        self.unreadable = unreadable  # "path: why" of those that may be the disk's


class MachineError(RunError):
    """A disk or process failed, a limit was reached, or a file has changed."""


class ServiceError(RunError):
    """Cloud Storage, or what leads to it, failed or refused."""


@contextlib.contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Collects what is wrong with the input instead of raising it."""
    try:
        yield
    except InvalidInputError as error:
        problems.extend(error.args)


def refusal(
    verb: str, path: StrPath, error: OSError | MemoryError, is_input: bool = False
) -> InvalidInputError | MachineError:
    """Returns the error to raise, such as 'Cannot list /x: Permission denied.'"""
    if isinstance(error, MemoryError):
        error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(error, PermissionError):
        place = nearest_existing(path)
        if place != pathlib.Path(path) and not os.access(place, os.X_OK):
            verb, path = "enter", place
    problem = f"Cannot {verb} {path}: {error.strerror or error}."
    # Input must be mended, unless the machine is at fault.
    if is_input and error.errno not in MACHINE_ERRORS:
        return InvalidInputError(problem)
    remedy = MACHINE_ERRORS.get(error.errno or 0, FIX_AND_RERUN)
    return MachineError(f"{problem} {remedy}")


@contextlib.contextmanager
def trying_to(verb: str, path: StrPath, is_input: bool = False) -> Iterator[None]:
    """Raises a `refusal` for what the system refuses."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise refusal(verb, path, error, is_input) from error


def open_file(path: str) -> BinaryIO:
    """Opens a regular file for reading; refuses a pipe instead of waiting for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return open(descriptor, "rb")


def _count(number: int, noun: str) -> str:
    """Formats a number with its noun: '1 image', '1,024 images', '2 classes'."""
    plural = noun if number == 1 else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {plural}"


def _size(num_bytes: float) -> str:
    """Formats a number of bytes in decimal units: '110.0 KB', '146.9 GB'."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:,.{0 if unit == 'bytes' else 1}f} {unit}"


def _duration(seconds: float) -> str:
    """Formats a time: '45 s', '12 min', '3 h 5 min'."""
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def escaped(text: str) -> str:
    """Escapes line breaks and all else that a terminal does not print as it is."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _some(names: Sequence[str], most: int = 3) -> str:
    """Names the first few of many: 'a, b, c and 97 more'."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


# ---------------------------------------------------------------------------------
# 1. The run: plan, then do


WAITING_SHARDS = 16  # that may wait for the network before a worker has to wait
NAMED_IMAGES = 1000  # at most, of those that cannot be used


def run(
    raw_data_dir: StrPath | None,
    gcs_upload: bool = True,
    gcs_project: str | None = None,
    gcs_output_path: str | None = None,
    local_scratch_dir: StrPath | None = None,
    client: storage.Client | None = None,
    **more: Any,
) -> None:
    """Writes the shards that are missing and uploads those that the bucket lacks.

    Args:
      gcs_project: As --project; the others are as the flags of the same names.
      client: To use instead of a new one.
      **more: Other fields of `Options`.

    Raises:
      BadImagesError: A RunError; all but the shards of these images are done.
      InvalidInputError: A ValueError: what must be fixed before a shard is written.
      RunError: What stopped the run; finished shards are kept.
    """
    with contained():
        upload = gcs_upload, gcs_project, gcs_output_path
        options = Options(raw_data_dir, *upload, local_scratch_dir, client, **more)
        if options.dry_run:
            if options.fake_imagenet and not has_fake(options):
                logging.info(f"Would generate a fake ImageNet in {options.raw_dir}.")
            else:
                plan_job(options)
            return
        # The pool imports TensorFlow while images are listed.
        with locked(options), contextlib.closing(Pool(options.workers)) as pool:
            _remove_temporary_files(options)  # before free space is measured
            carry_out(plan_job(options, pool), pool)


def plan_job(options: Options, pool: Pool | None = None) -> Job:
    """Plans the run, checks all that can be before an image is read, and logs it."""
    problems: list[str] = []
    dataset, destination = Dataset(), None  # if listing fails, the rest is checked
    with _collecting(problems):
        dataset = _find_dataset(options, pool)
    shards = plan_shards(dataset, options.training_shards, options.validation_shards)
    try:
        if options.gcs_upload:
            path = GcsPath.parse(options.gcs_output_path or "")
            client, stopping = options.client, pool.stopping if pool else None
            destination = Destination(path, options.gcs_project, client, stopping)
        job = look(Job(options, dataset.labels, shards, destination))
        for check in _finished_problems, _room_problems, _bucket_problems:
            with _collecting(problems):
                problems += check(job)
        if destination and job.work.left:
            destination.check_access(job.work.left[0])
    except ServiceError as error:
        if not problems:
            raise
        raise InvalidInputError(*problems, *error.args) from error
    if problems:
        raise InvalidInputError(*problems)
    log_intent(job)
    return job


def _find_dataset(options: Options, pool: Pool | None) -> Dataset:
    """Lists the raw directory, after generating a fake if asked; logs the result."""
    if options.fake_imagenet and pool:
        make_fake_imagenet(options, pool)
    with reporting(lambda: f"Still listing {options.raw_dir}."):
        dataset = read_dataset(options.raw_dir)
    logging.info(
        f"Found {_count(len(dataset.training), 'training image')} in "
        f"{_count(len({i.synset for i in dataset.training}), 'synset')} and "
        f"{_count(len(dataset.validation), 'validation image')} "
        f"({_size(sum(i.num_bytes for i in dataset.images))}) in {options.raw_dir}."
    )
    if dataset.synsets != FAKE_SYNSETS:
        for line in warnings_about(dataset):
            logging.warning(line)
    return dataset


@dataclasses.dataclass
class Work:
    """What is left to do, and what is done.

    Attributes:
      to_write: This task's shards that are not as planned, here or in the bucket, or
        whose images have been touched.
      to_upload: This task's shards that are written here but not in the bucket.
      done: Stamps of all tasks' shards that are where they belong, by name: of those
        that were found, then also of those that this run adds.
      spare: Paths of this task's shards that need not be kept: the bucket has them.
      differing: Names of other tasks' shards that are there, but of other images.
    """

    to_write: list[Shard] = dataclasses.field(default_factory=list)
    to_upload: list[tuple[Shard, Stamp]] = dataclasses.field(default_factory=list)
    done: dict[str, Stamp] = dataclasses.field(default_factory=dict)
    spare: list[str] = dataclasses.field(default_factory=list)
    differing: list[str] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """Names of this task's shards that were not done at the last look."""
        return [shard.name for shard, _ in self.in_turn()]

    def in_turn(self) -> list[tuple[Shard, Stamp | None]]:
        """Shards to upload and to write, alternating, so that neither waits."""
        to_write = ((shard, None) for shard in self.to_write)
        pairs = itertools.zip_longest(self.to_upload, to_write)
        return [each for pair in pairs for each in pair if each]


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, with all that is known before its first image.

    Attributes:
      shards: The whole plan, including the shards of other tasks.
      destination: None to write the shards only.
      objects: What is known to be in it, by base name.
    """

    options: Options
    labels: Mapping[str, int]  # of all synsets
    shards: list[Shard]
    destination: Destination | None
    work: Work = dataclasses.field(default_factory=Work)
    objects: Mapping[str, Stamp] = dataclasses.field(default_factory=dict)

    @property
    def num_missing(self) -> int:
        """How many shards are not done yet, over all tasks."""
        return len(self.shards) - len(self.work.done)

    @property
    def manifest_path(self) -> str:
        return os.path.join(self.options.scratch_dir, MANIFEST_FILE)

    @property
    def place(self) -> str:
        """Where the finished data set is."""
        destination = self.destination
        return str(destination.path) if destination else self.options.scratch_dir


def look(job: Job) -> Job:
    """Compares the plan with what is here, and in the bucket, now."""
    if job.destination:
        found = job.destination.list_objects()
        # Without a listing, what this run has uploaded is all that is known.
        objects = found if job.destination.is_listed else job.work.done
        job = dataclasses.replace(job, objects=objects)
    work = find_work(job)
    differing = work.differing
    # If no image could be listed, all would differ.
    if job.labels and differing and differing != job.work.differing:
        logging.warning(
            f"{job.place} has {_count(len(differing), 'shard')} of other tasks "
            f"({_some(differing)}) of other images than here: the machines' raw "
            "directories differ, unless a task is still replacing them."
        )
    return dataclasses.replace(job, work=work)


def log_intent(job: Job) -> None:
    """Says what is there and what will be done."""
    options, work, scratch_dir = job.options, job.work, job.options.scratch_dir
    if others := _strangers(local_shards(scratch_dir), job.shards):
        found = f"{_count(len(others), 'shard')} of another plan: {_some(others)}"
        logging.warning(f"{scratch_dir} also holds {found}. Remove what is not needed.")
    if options.task_count > 1:
        task = f"Task {options.task_index:,} of {options.task_count:,}"
        missing = f"{job.num_missing:,} of {_count(len(job.shards), 'shard')}"
        logging.info(f"{task}. Still to do over all tasks: {missing}.")
    num_own = sum(map(options.is_own, job.shards))
    if (num_done := num_own - len(work.left)) or not work.left:
        found = f"{num_done:,} of {_count(num_own, 'shard')} up to date in {job.place}"
        logging.info(f"{'Resuming' if work.left else 'Nothing to do'}: found {found}.")
    if work.to_upload:
        written = _count(len(work.to_upload), "shard")
        logging.info(f"Found {written} to upload in {scratch_dir}.")
    if shards := work.to_write:
        verb = "Would write" if options.dry_run else "Writing"
        images = _count(sum(len(shard.images) for shard in shards), "image")
        size = _size(sum(shard.estimated_bytes for shard in shards))
        num_old = sum(shard.name in job.objects for shard in shards)
        then = f", and from there to {job.place}" if job.destination else ""
        then += f", replacing {_count(num_old, 'object')}" if num_old else ""
        what = f"{_count(len(shards), 'shard')} of {images} ({size})"
        logging.info(f"{verb} {what} to {scratch_dir}{then}.")


def carry_out(job: Job, pool: Pool) -> None:
    """Does the work, looks again, and completes the data set if all of it is there."""
    if job.num_missing:
        _remove_manifest(job)
    for path in job.work.spare:
        remove(path)
    write_and_upload(job, pool)
    now = look(job)
    try:
        if now.destination and not now.destination.is_listed:
            now.destination.check_none_passed_over()
        num_own = sum(map(now.options.is_own, now.shards))
        check_none_wrong(now.work.left, num_own, now.place)
        if problems := list(_bucket_problems(now)):
            raise RunError(*problems)
    except RunError:
        _remove_manifest(now)
        raise
    missing = _count(now.num_missing, "shard")
    if not now.num_missing:
        _write_manifest(now, job.work.to_write)
    elif now.num_missing == len(now.work.differing):
        problem = f"Other tasks made {missing} in {now.place} of other images."
        remedy = "Wait for them, or give all tasks the same raw images, and rerun."
        raise RunError(f"{problem} {remedy}", may_pass=True)
    else:
        logging.info(f"This task is done; others have yet to finish {missing}.")


def write_and_upload(job: Job, pool: Pool) -> None:
    """Takes shards all the way, in `num_workers` + 16 threads; bad images stop none."""
    progress = Progress(job)
    take = functools.partial(_take_shard, job, pool, progress)
    bad_images, unreadable = list[str](), list[str]()
    size = job.options.workers + WAITING_SHARDS
    try:
        with reporting(progress.line), threads_of(size, pool.stopping) as threads:
            futures = [threads.submit(take, *each) for each in job.work.in_turn()]
            for future in concurrent.futures.as_completed(futures):
                try:
                    future.result()
                except BadImagesError as error:
                    bad_images += error.args
                    unreadable += error.unreadable
                    if len(unreadable) >= UNREADABLE_IMAGES:  # the disk is at fault
                        last = unreadable[UNREADABLE_IMAGES - 1]
                        where = f"below {job.options.raw_dir}, the last {last}"
                        problem = f"Cannot read {UNREADABLE_IMAGES} images {where}."
                        raise MachineError(f"{problem} {FIX_AND_RERUN}") from error
    except BaseException as error:
        for line in bad_images[:NAMED_IMAGES]:  # they are in no error that is raised
            logging.warning(line)
        if isinstance(error, RunError) and local_shards(job.options.scratch_dir):
            logging.info("Finished shards are kept.")
        raise
    progress.log_done()
    if bad_images:
        images = _count(len(bad_images), "unusable image")
        logging.info(f"Some shards were not written. Replace {images} and rerun.")
        raise BadImagesError(*sorted(bad_images)[:NAMED_IMAGES])


def _take_shard(
    job: Job, pool: Pool, progress: Progress, shard: Shard, stamp: Stamp | None
) -> None:
    """Writes a shard, unless its stamp says that it is there, and uploads it."""
    scratch_dir, is_kept = job.options.scratch_dir, job.options.keep_local_shards
    if not stamp:
        prefetch(shard.images[:FIRST_IMAGES])
        write = functools.partial(pool.call, write_records)
        stamp = write_shard(shard, scratch_dir, write, durable=is_kept)
        progress.written.append(stamp)
    if job.destination:
        path = shard_path(shard, scratch_dir)
        sent = lambda num_bytes: progress.sent.update({shard.name: num_bytes})
        if not job.destination.upload(path, stamp, sent):
            return
        progress.uploaded.append(stamp)
        if not is_kept:
            remove(path)
    job.work.done[shard.name] = stamp


@contextlib.contextmanager
def threads_of(
    number: int, stopping: threading.Event | None = None
) -> Iterator[concurrent.futures.Executor]:
    """Threads that are waited for; after an error, what has not begun is cancelled."""
    threads = concurrent.futures.ThreadPoolExecutor(number)
    try:
        yield threads
    except BaseException as error:
        if stopping:
            stopping.set()
        # After a signal, the command exits, and the threads with it.
        threads.shutdown(wait=not isinstance(error, Stopped), cancel_futures=True)
        raise
    threads.shutdown()


# ---------------------------------------------------------------------------------
# 2. Raw images: what is in --raw_data_dir
#
# A split is read from the first of these that is there:
#
#   validation/*.JPEG
#   <split>/<synset>/*.JPEG    <split> is train or validation
#   <split>/<synset>.tar
#   ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar    beside <split>/ or in it
#
# ImageNet's own training tar holds class tars, its validation tar holds images; either
# may also hold class directories. Of what else is there, a warning tells.


IMAGE_SUFFIX = ".JPEG"
TRAINING_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
TARS = dict(zip(SPLITS, (TRAINING_TAR, VALIDATION_TAR)))
# Names of directories in a tar that are not the class of what they hold
CLASSLESS = ("", *SPLITS, "val", "ILSVRC2012_img_train", "ILSVRC2012_img_val")
# Paths of what operating systems and network disks leave: passed over
HIDDEN = re.compile(r"(?s)(.*/)?(\.|(@eaDir|lost\+found|Thumbs\.db|__MACOSX)(/|$))")
LISTING_THREADS = 2  # helps with cold disks; 8 make a listing from memory 1.7 x slower

ImageSource: TypeAlias = "Directory | Tar"
TarFingerprint: TypeAlias = tuple[int, int, int]


class RawImage(NamedTuple):
    """One image, not yet read; a tuple, for 1.3 million are made and sent to workers.

    Attributes:
      source: The directory or tar that holds it.
      name: Its path below the source; in a tar there can be directories in it.
      fingerprint: `file_fingerprint`, or `tar_fingerprint` of the tar it is in.
      offset: Of its first byte in the tar; None for a file in a directory.
    """

    source: str
    name: str
    synset: str
    num_bytes: int
    fingerprint: int | TarFingerprint
    offset: int | None = None

    @property
    def path(self) -> str:
        return os.path.join(self.source, self.name)

    @property
    def filename(self) -> str:
        return self.name.rpartition("/")[2]


def file_fingerprint(status: os.stat_result) -> int:
    """When a file was modified, in microseconds: tells it from its replacement."""
    return status.st_mtime_ns // 1000  # nanoseconds would take 16 bytes more


def tar_fingerprint(status: os.stat_result) -> TarFingerprint:
    """Tells a tar from a later one of the same name: inode, bytes, nanoseconds."""
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The raw data set: training images sorted by path, validation images by name.

    Attributes:
      synsets: Sorted.
      skipped: Paths of what is not read; see `warnings_about`.
      warnings: Contradictions about validation images that seem to be meant.
    """

    synsets: tuple[str, ...] = ()
    training: Sequence[RawImage] = ()
    validation: Sequence[RawImage] = ()
    skipped: Sequence[str] = ()
    warnings: Sequence[str] = ()

    @functools.cached_property  # all shards share it
    def labels(self) -> dict[str, int]:
        """From 1 on, because models that read the shards keep 0 for "background"."""
        return {synset: label for label, synset in enumerate(self.synsets, start=1)}

    @property
    def images(self) -> Iterable[RawImage]:
        return itertools.chain(self.training, self.validation)


def read_dataset(raw_data_dir: str) -> Dataset:
    """Lists and labels all images of a raw directory without reading any.

    Raises:
      InvalidInputError: The directory does not hold a data set; lists all problems.
    """
    problems, skipped, warnings = (list[str]() for _ in range(3))
    training, validation = list[RawImage](), list[RawImage]()
    with _no_garbage_collection():
        with _collecting(problems):
            validation = list_split(raw_data_dir, VALIDATION_DIRECTORY, skipped)
            validation.sort(key=lambda i: (os.fsencode(i.filename), i.synset))
        with _collecting(problems):
            labels_path = os.path.join(raw_data_dir, LABELS_FILE)
            validation, warnings = assign_synsets(validation, labels_path, skipped)
        with _collecting(problems):
            training = list_split(raw_data_dir, TRAINING_DIRECTORY, skipped)
        trained = {image.synset for image in training}
        validated = {image.synset for image in validation} - {""}
        directory = os.path.join(raw_data_dir, TRAINING_DIRECTORY)
        problems += class_problems(trained, validated, directory)
        if problems:
            raise InvalidInputError(*problems)
        synsets = tuple(sorted(trained | validated, key=os.fsencode))
    return Dataset(synsets, training, validation, sorted(skipped), warnings)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pauses it: listing is 2.5 times as fast; then exempts what the command listed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if __name__ == "__main__":  # nobody else's code shares the process
            gc.freeze()
        if was_enabled:
            gc.enable()


def list_split(raw_data_dir: str, split: str, skipped: list[str]) -> list[RawImage]:
    """Lists images by path; adds the paths of what is not read to `skipped`."""
    is_training = split == TRAINING_DIRECTORY
    (used, *unused), others = _find_layouts(raw_data_dir, split)
    images = list_all(used, others)
    if len(images) != IMAGENET_SIZES[split]:  # else what is unused is there twice
        others += [source.path for layout in unused for source in layout]
    skipped += {*others}
    if is_training and not images[0].synset:
        raise InvalidInputError(f"{images[0].path} must be below its class directory.")
    classes = {image.synset for image in images}
    # A class that is not read would move the labels of those behind it.
    for path in sorted(others) if is_training else []:
        synsets = SYNSET.findall(os.path.relpath(path, raw_data_dir))
        if synsets and classes.isdisjoint(synsets):
            rule = f"Classes must all be directories of *{IMAGE_SUFFIX}, or all *.tar"
            raise InvalidInputError(f"{rule}; found {path}.")
    return images


def _find_layouts(
    raw_data_dir: str, split: str
) -> tuple[list[list[ImageSource]], list[str]]:
    """Finds the layouts in which a split is there, in their order, and other files."""
    directory = os.path.join(raw_data_dir, split)
    is_there = os.path.lexists(directory)
    paths = [os.path.join(place, TARS[split]) for place in (raw_data_dir, directory)]
    flat, directories, class_tars, whole_tar = (list[ImageSource]() for _ in range(4))
    whole_tar += [Tar(path) for path in paths if os.path.lexists(path)][:1]
    others = list[str]()
    for entry in _visible(directory) if is_there else []:
        name, path = entry.name, entry.path
        if name.endswith(IMAGE_SUFFIX) and split == VALIDATION_DIRECTORY:
            flat = [Directory(directory)]
        elif not os.path.isfile(path):  # listing a dangling link says why
            directories.append(Directory(path, name))
        elif name.endswith(".tar") and not name.startswith("ILSVRC"):
            class_tars.append(Tar(path, name[:-4]))
        elif name != TARS[split]:
            others.append(path)
    if layouts := [*filter(None, (flat, directories, class_tars, whole_tar))]:
        return layouts, others
    if is_there:
        is_training = split == TRAINING_DIRECTORY
        raise _no_images(f"{directory}/<synset>" if is_training else directory, others)
    found = _some(sorted(e.name for e in _scan(raw_data_dir)), 10) or "nothing"
    raise InvalidInputError(
        f"No directory {directory}, and no {TARS[split]} beside it. Found {found} "
        "there. Both splits are required; README, step 2, says in which layouts."
    )


def list_all(classes: Iterable[ImageSource], others: list[str]) -> list[RawImage]:
    """Lists the images of classes, sorted by path."""
    # As paths sort: `a-b/` comes before `a/`.
    in_order = sorted(classes, key=lambda class_: os.fsencode(class_.synset + "/"))
    with concurrent.futures.ThreadPoolExecutor(LISTING_THREADS) as threads:
        listings = [threads.submit(each.list_images, others) for each in in_order]
    return [image for listing in listings for image in listing.result()]


@dataclasses.dataclass(frozen=True)
class Directory:
    """A directory of images, of one class if it has a synset."""

    path: str
    synset: str = ""

    def list_images(self, others: list[str]) -> list[RawImage]:
        """Lists `*.JPEG` by name; adds the paths of all else to `others`."""
        images, beside = list[RawImage](), list[str]()
        for entry in _visible(self.path):
            if not entry.name.endswith(IMAGE_SUFFIX):
                beside.append(entry.path)
                continue
            try:
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise InvalidInputError(f"{entry.path} must be a regular file.")
                about = self.synset, status.st_size, file_fingerprint(status)
            except OSError as error:
                if not entry.is_symlink():
                    raise refusal("read", entry.path, error, is_input=True) from error
                about = self.synset, 0, 0  # no file; `warnings_about` counts it
            images.append(RawImage(self.path, entry.name, *about))
        if not images:
            raise _no_images(self.path, beside)
        others += beside
        return images


@dataclasses.dataclass(frozen=True)
class Tar:
    """A tar of images, of one class if it has a synset."""

    path: str
    synset: str = ""
    start: int = 0  # where it is in the file, if it is a class tar in another tar
    end: int | None = None

    @property
    def place(self) -> str:
        return f"{self.path}/{self.synset}.tar" if self.start else self.path

    def list_images(self, others: list[str]) -> list[RawImage]:
        """Lists `*.JPEG` by path, then those of class tars; else as `Directory`."""
        images, class_tars, beside = list[RawImage](), list[Tar](), list[str]()
        layouts = set[str]()
        fingerprint, files = list_tar(self)
        for path in sorted(itertools.filterfalse(HIDDEN.match, files), key=os.fsencode):
            offset, size = files[path]
            directory, _, name = path.rpartition("/")
            if name.endswith(IMAGE_SUFFIX):
                parent, _, synset = directory.rpartition("/")
                layout = f"{parent}/*/*{IMAGE_SUFFIX}"
                if self.synset not in ("", synset) and SYNSET.fullmatch(synset):
                    layouts.add(f"class {self.synset}")  # a contradiction
                if self.synset or synset in CLASSLESS:
                    synset, layout = self.synset, f"{directory}/*{IMAGE_SUFFIX}"
                images.append(
                    RawImage(self.path, path, synset, size, fingerprint, offset)
                )
            elif name.endswith(".tar"):
                layout = f"{directory}/*.tar"
                where = self.path, self.synset or name[:-4], offset, offset + size
                class_tars.append(Tar(*where))
            else:
                beside.append(f"{self.place}/{path}")
                continue
            layouts.add(layout)
        if not layouts:
            raise _no_images(self.place, beside)
        if len(layouts) > 1:
            rule = "A tar must hold images in one layout"
            found = f"{self.place} holds {_some(sorted(layouts))}"
            raise InvalidInputError(f"{rule}; {found}. Extract it.")
        others += beside
        return images + list_all(class_tars, others)


def _scan(directory: str) -> list[os.DirEntry[str]]:
    with trying_to("list", directory, True), os.scandir(directory) as entries:
        return [*entries]


def _visible(directory: str) -> list[os.DirEntry[str]]:
    """Lists a directory by the bytes of names, so alike in all locales."""
    visible = [entry for entry in _scan(directory) if not HIDDEN.match(entry.name)]
    return sorted(visible, key=lambda entry: os.fsencode(entry.name))


def _no_images(place: str, others: Sequence[str]) -> InvalidInputError:
    found = _describe_skipped(others) if others else "Found nothing there."
    return InvalidInputError(f"No images match {place}/*{IMAGE_SUFFIX}. {found}")


def _describe_skipped(paths: Sequence[str]) -> str:
    """Describes what is not read, with what would make it be."""
    rule = f"not named *{IMAGE_SUFFIX}, or not where README, step 2, says"
    return f"Skipped {_some(sorted(paths), 1)}: {rule}."


# ---------------------------------------------------------------------------------
# 3. Labels: which class an image is of, and what contradicts it
#
# A training image is of the class of its directory or class tar; a validation image is
# of the class that the first of these says:
#
#   row        of a label file of two columns: the file's name, its synset
#   directory  validation/n01440764/, on disk or in a tar, or n01440764.tar
#   name       ILSVRC2012_val_00000293_n01440764.JPEG, n01440764_18.JPEG
#   line       i of a label file of one column, for the i-th name
#
# If a later one contradicts it for fewer than half of the images, that is refused as a
# slip, unless a row decides; else it is meant, and warned of. Lines for all of
# ImageNet's validation images must be its own labels. Rows say what is meant.


IMAGENET_CLASSES = 1000  # https://image-net.org/challenges/LSVRC/2012
IMAGENET_SIZES = {TRAINING_DIRECTORY: 1_281_167, VALIDATION_DIRECTORY: 50_000}
# SHA-256 of its sorted synsets, and of the synsets of its validation images in order
SYNSETS_DIGEST = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
VALIDATION_DIGEST = "2707a43f27dcd55fef87fbef0730966cb91c3aba99eb0c9e6f021217a553a3b1"
SYNSET = re.compile(r"(?<![0-9A-Za-z])n[0-9]{8}(?![0-9A-Za-z])")
TWO_COLUMNS = f"To have {LABELS_FILE} decide, give it two columns: file name, synset."


def assign_synsets(
    images: list[RawImage], labels_path: str, skipped: Sequence[str]
) -> tuple[list[RawImage], list[str]]:
    """Gives validation images, sorted by name, their synsets; returns warnings."""
    problems, warnings = list[str](), list[str]()
    with _collecting(problems):
        _check_names(images)
        said = _ask_all(images, labels_path, warnings)
        decided = _decide(images, said, warnings)
        _check_imagenets(decided, warnings)
        return [i._replace(synset=s) for i, (_, s) in zip(images, decided)], warnings
    beside = [_describe_skipped(skipped)] if images and skipped else []
    raise InvalidInputError(*problems, *beside)


def _check_names(images: Sequence[RawImage]) -> None:
    """Refuses images of the test set, and images that are there twice."""
    if tests := [i.path for i in images if "ILSVRC2012_test_" in i.filename]:
        raise InvalidInputError(f"Move images of the test set away: {_some(tests)}.")
    first_of = dict[int | None, RawImage]()
    for image in images:
        number = _imagenet_number(image)
        first = first_of.setdefault(number, image)
        if number is not None and first is not image:
            rule = "The same image is there twice; remove the wrong one"
            raise InvalidInputError(f"{rule}: {first.path} or {image.path}.")


def _imagenet_number(image: RawImage) -> int | None:
    """The number in a validation image's name, if it is ImageNet's, or `Copy of` it."""
    pattern = r"ILSVRC2012_val_([0-9]+)(?![0-9]|_(?!n[0-9]{8}))"  # not `..._crop.JPEG`
    match = re.search(pattern, image.filename)
    return int(match[1]) if match else None


def _ask_all(
    images: Sequence[RawImage], path: str, warnings: list[str]
) -> dict[str, list[str]]:
    """Returns what each source says of each image, "" if nothing; the first decides."""
    # Several synsets in a name are an error: joined, they equal no other source.
    names = [" and ".join(sorted({*SYNSET.findall(i.filename)})) for i in images]
    said = {"directory": [image.synset for image in images], "name": names}
    is_needed = not images or ("", "") in zip(said["directory"], names)
    if not is_needed and not os.path.lexists(path):
        return said
    labels = read_label_file(path)
    if isinstance(labels, list):
        if images and is_needed:
            _check_lines(labels, images, path, warnings)
        elif images and len(labels) != len(images):
            rule = f"a line for each of {_count(len(images), 'image')}, or be removed"
            raise InvalidInputError(f"{path} must have {rule}; found {len(labels):,}.")
        return said | {"line": labels}
    rows = [labels.get(i.filename.removesuffix(IMAGE_SUFFIX), "") for i in images]
    if missing := [i.filename for i, row in zip(images, rows) if not row]:
        found = f"{_some(missing)}; its last is for {[*labels][-1]!r}"
        raise InvalidInputError(f"{path} has no line for {found}.")
    return {"row": rows} | said


def _check_lines(
    lines: Sequence[str], images: Sequence[RawImage], path: str, warnings: list[str]
) -> None:
    """Refuses lines that do not fit the images; warns if names may sort wrongly."""
    numbers = [_imagenet_number(image) for image in images]
    known, expected = [n for n in numbers if n is not None], range(1, len(lines) + 1)
    num_lines, num_images = _count(len(lines), "line"), _count(len(images), "image")
    problem = f"{path} has {num_lines} for {num_images}. "
    if known and (lacking := sorted({*expected}.difference(known))):
        problem += f"There is no image {_some([f'{n:,}' for n in lacking])}. "
    if known != sorted(known):
        problem += "Without leading zeros, names sort wrongly: 1, 10, 2. "
    if len(lines) != len(images) or (known and numbers != [*expected]):
        raise InvalidInputError(problem + TWO_COLUMNS)
    ends = [int((re.findall("[0-9]+", i.filename) or [0])[-1]) for i in images]
    if not known and ends != [*range(ends[0], ends[0] + len(ends))]:
        warnings.append(f"Lines of {path} are for names sorted as text: 1, 10, 2.")


def read_label_file(path: str) -> list[str] | dict[str, str]:
    """Reads a list of synsets or, of two columns, synsets by name without .JPEG."""
    try:
        with trying_to("read", path, is_input=True), open_file(path) as file:
            data = file.read().removeprefix(b"\xef\xbb\xbf").rstrip()
    except InvalidInputError as error:
        root, name = os.path.split(path)
        beside = _some(sorted({*glob.glob("*label*", root_dir=root)} - {name}))
        rule = "Line i is for the i-th image (README, step 2). Beside it"
        raise InvalidInputError(f"{error} {rule}: {beside or 'no other'}.") from error
    if data.lstrip().startswith(b"<"):
        raise InvalidInputError(f"{path} is a web page; download the file itself.")
    if b"\0" in data:
        raise InvalidInputError(f"{path} is not text; save it as UTF-8.")
    lines = [os.fsdecode(line).replace('"', "").strip() for line in data.splitlines()]
    rows = [_name_and_synset(line) for line in lines]
    by_name = dict(rows)
    has_names = 2 * sum(name != "" for name, _ in rows) > len(rows)
    for i, (name, synset) in enumerate(rows):
        is_right = synset == by_name[name] if has_names else not name
        if not (is_right and synset and synset.isprintable()):
            rule = "a file name and its only" if has_names else "a single"
            found = f"synset such as n01440764; found {lines[i][:60]!r}"
            raise InvalidInputError(f"Line {i + 1:,} of {path} must be {rule} {found}.")
    return by_name if has_names else [synset for _, synset in rows]


def _name_and_synset(line: str) -> tuple[str, str]:
    """Splits a line at tabs, commas or blanks; the name in a single column is empty."""
    for pattern in (
        r"([^\t,]+?)(?: *[\t,] *| +)(n[0-9]{8})(?![^\s,])",  # words or boxes follow
        *(r"([^\t]*)\t+([^\t]*)", "([^,]*),([^,]*)", r"(\S+)\s+(\S+)"),
    ):
        if match := re.match(pattern, line):
            return match[1].strip().removesuffix(IMAGE_SUFFIX), match[2].strip()
    return "", line


def _decide(
    images: Sequence[RawImage], said: Mapping[str, Sequence[str]], warnings: list[str]
) -> list[tuple[str, str]]:
    """Finds what decides, and the synset; refuses slips, and warns of what is meant."""
    decided = list[tuple[str, str]]()
    wrong = collections.defaultdict(list)  # by what decides and what contradicts it
    for i, image in enumerate(images):
        (decisive, synset), *others = [(by, s[i]) for by, s in said.items() if s[i]]
        decided.append((decisive, synset))
        for by, other in others:
            if other != synset:
                found = f"{synset} by {decisive}, {other} by {by}"
                wrong[decisive, by].append(f"image {i + 1:,}, {image.path}, is {found}")
    for (decisive, by), those in wrong.items():
        among = f"{len(those):,} of {_count(len(images), 'validation image')}"
        problem = f"The {decisive} and the {by} of {among} disagree: {those[0]}."
        if decisive != "row" and 2 * len(those) < len(images):
            raise InvalidInputError(f"{problem} Correct it. {TWO_COLUMNS}")
        warnings.append(f"{problem} The {decisive} decides.")
    return decided


def _check_imagenets(decided: Sequence[tuple[str, str]], warnings: list[str]) -> None:
    """Compares the labels of all of ImageNet's validation images with its own."""
    synsets = [synset for _, synset in decided]
    is_whole = len(synsets) == IMAGENET_SIZES[VALIDATION_DIRECTORY]
    is_imagenet = is_whole and has_digest(sorted({*synsets}), SYNSETS_DIGEST)
    if is_imagenet and not has_digest(synsets, VALIDATION_DIGEST):
        problem = "Labels of validation images, in order of names, are not ImageNet's."
        if "line" in {by for by, _ in decided}:
            raise InvalidInputError(f"{problem} {TWO_COLUMNS}")
        warnings.append(problem)


def has_digest(synsets: Iterable[str], digest: str) -> bool:
    """Whether a list of synsets is the one that is known by its digest."""
    return _sha256(["\n".join(synsets)]) == digest


def class_problems(
    trained: AbstractSet[str], validated: AbstractSet[str], directory: str
) -> Iterator[str]:
    """Describes classes that must be wrong: each would move the labels behind it."""
    if not (trained and validated):
        return  # what could not be listed is refused already
    odd = {name for name in trained if not SYNSET.fullmatch(name)}
    if 2 * len(odd) < len(trained) and (stray := sorted(odd - validated)):
        rule = f"Most classes are named like {min(trained - odd)}"
        yield f"{rule}; move others out of {directory}: {_some(stray)}."
    unknown = sorted(validated - trained)
    if trained & validated and len(trained) != IMAGENET_CLASSES:
        # Of part of ImageNet, some classes may have no training images.
        unknown = [name for name in unknown if not SYNSET.fullmatch(name)]
    if unknown:
        rule = "Validation images must be of the classes of the training images"
        some, found = _some(sorted(trained)), _some([*map(ascii, unknown)])
        yield f"{rule}, such as {some}; found {found}. See README, step 2."


def warnings_about(dataset: Dataset) -> Iterator[str]:
    """Describes what is allowed, but differs from ImageNet, or from what is usual."""
    if dataset.skipped:
        yield _describe_skipped(dataset.skipped)
    if empty := [image.path for image in dataset.images if not image.num_bytes]:
        found = f"{_count(len(empty), 'image')} of zero bytes or without a file"
        yield f"{found}, such as {empty[0]}: no shard with one will be written."
    yield from dataset.warnings
    training = dataset.training
    # Nearly all begin with the synset and hold no other n: these are passed over fast.
    unusual = [i for i in training if i.name[:9] != i.synset or "n" in i.name[9:]]
    if wrong := [i for i in unusual if {*SYNSET.findall(i.filename)} - {i.synset}]:
        among = f"{len(wrong):,} of {_count(len(training), 'training image')}"
        yield f"Directories overrule the names of {among}, such as {wrong[0].path}."
    yield from _class_warnings(dataset)
    for split, images in zip(SPLITS, (training, dataset.validation)):
        expected = IMAGENET_SIZES[split]
        if len(dataset.synsets) == IMAGENET_CLASSES and len(images) != expected:
            found = f"{len(images):,} ({len(images) - expected:+,})"
            if len(images) < expected:
                sizes = collections.Counter(image.synset for image in images)
                *_, (synset, size) = sizes.most_common()
                found += f", of {synset} only {size:,}"
            yield f"ImageNet-1k has {expected:,} images in {split}/, found {found}."


def _class_warnings(dataset: Dataset) -> Iterator[str]:
    """Warns of labels that are not what they seem, and of classes of one split."""
    synsets, labels = dataset.synsets, dataset.labels
    trained = {image.synset for image in dataset.training}
    validated = {image.synset for image in dataset.validation}
    odd = [name for name in synsets if not SYNSET.fullmatch(name)]
    if 2 * len(odd) < len(synsets):
        if len(synsets) >= 900 and not has_digest(synsets, SYNSETS_DIGEST):
            rule = "labels differ from those of models trained on it"
            yield f"The {_count(len(synsets), 'class')} are not ImageNet-1k's: {rule}."
        if odd:
            yield f"Classes that are named unlike most are used, too: {_some(odd)}."
    if wrong := [s for s in synsets if s.isdecimal() and int(s) != labels[s]]:
        found = f"class {wrong[-1]} has label {labels[wrong[-1]]:,}"
        yield f"Labels are ranks of names as text: {found}."
    lone = dict.fromkeys(validated - trained, "validation")
    if 3 * len(validated) >= 2 * len(trained):  # else it is a trial
        lone |= dict.fromkeys(trained - validated, "training")
    if lone:
        found = _some([f"{s} ({lone[s]}, label {labels[s]})" for s in sorted(lone)])
        yield f"Only one split has images of {_count(len(lone), 'synset')}: {found}."


# ---------------------------------------------------------------------------------
# 4. The plan: which image goes into which shard


# Increase it when the same images would give different bytes. That costs each user a
# whole run: no shard counts as done any longer, all are written and uploaded anew.
RECORD_FORMAT = 1
SHARD_NAME = re.compile(f"({'|'.join(SPLITS)})-([0-9]{{5}})-of-([0-9]{{5}})")
RECORD_OVERHEAD = 350  # bytes of a record besides the JPEG, approximately


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One shard as planned, before a byte of it is written."""

    split: str  # `train` or `validation`
    index: int  # from 0
    num_shards: int
    images: tuple[RawImage, ...]  # in the order of their records; may be empty
    labels: Mapping[str, int]  # of all synsets, in all shards the same

    @property
    def name(self) -> str:
        """Base name of the file and the object: `train-00007-of-01024`."""
        return f"{self.split}-{self.index:05d}-of-{self.num_shards:05d}"

    @property
    def estimated_bytes(self) -> int:
        """Bytes of the images and, approximately, of the records around them."""
        return sum(image.num_bytes + RECORD_OVERHEAD for image in self.images)

    def digest(self) -> str:
        """Hashes names, synsets, labels and sizes: 64 hexadecimal digits of SHA-256.

        It leaves out times, so that machines with copies of the raw data agree.
        """
        lines = [f"{RECORD_FORMAT}\0{self.name}\n"]
        for i in self.images:
            label = self.labels[i.synset]
            lines.append(f"{i.filename}\0{i.synset}\0{label}\0{i.num_bytes}\n")
        return _sha256(lines)

    def fingerprint(self) -> str:
        """Hashes the images' fingerprints: changes here when an image is touched."""
        return _sha256(f"{i.fingerprint} {i.offset}\n" for i in self.images)


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def plan_shards(
    dataset: Dataset,
    training_shards: int = TRAINING_SHARDS,
    validation_shards: int = VALIDATION_SHARDS,
) -> list[Shard]:
    """Cuts both splits into shards, the training images shuffled with seed 0.

    The last shards of a split can be empty: 5 images in 4 shards are 2, 2, 1, 0.
    """
    training = list(dataset.training)
    random.Random(0).shuffle(training)
    shards, labels = list[Shard](), dataset.labels
    for split, images, num_shards in (
        (TRAINING_DIRECTORY, training, training_shards),
        (VALIDATION_DIRECTORY, dataset.validation, validation_shards),
    ):
        size = max(1, math.ceil(len(images) / num_shards))
        for i in range(num_shards):
            chunk = tuple(images[i * size : (i + 1) * size])
            shards.append(Shard(split, i, num_shards, chunk, labels))
    return shards


# ---------------------------------------------------------------------------------
# 5. One image: read ahead, checked, repaired if need be


READ_AHEAD = 32  # images that a worker opens ahead, so also its open files
FIRST_IMAGES = 8  # of a shard, prefetched while it waits for a worker
SLOW_OPEN_SECONDS = 0.0005  # a local disk takes up to 0.1 ms, a network disk 1 ms
UNREADABLE_IMAGES = 20  # stop the run; fewer are named at its end, with the bad images
CHANGED = "has changed since the run began"
GONE = "it no longer exists. It was moved or removed, or its disk is gone"


class _ChangedError(OSError):
    """A file is not the one that was listed."""


def open_image(image: RawImage) -> BinaryIO | OSError:
    """Opens an image, which the disk then fetches; returns what prevents it."""
    try:
        file = open_file(image.path if image.offset is None else image.source)
    except OSError as error:
        return error
    offset, num_bytes = image.offset or 0, image.num_bytes or 1  # 0 means "all"
    file.seek(offset)
    with contextlib.suppress(OSError):  # not everywhere possible
        os.posix_fadvise(file.fileno(), offset, num_bytes, os.POSIX_FADV_WILLNEED)
    return file


def read_image(image: RawImage, file: BinaryIO | OSError) -> bytes:
    """Reads an image, if it is the one that was listed, and closes its file."""
    if isinstance(file, OSError):
        raise file
    with file:
        data = file.read(image.num_bytes)
        status = os.fstat(file.fileno())
    fingerprint = file_fingerprint if image.offset is None else tar_fingerprint
    if len(data) < image.num_bytes or fingerprint(status) != image.fingerprint:
        raise _ChangedError(None, f"it {CHANGED}")
    return data


def prefetch(images: Iterable[RawImage]) -> None:
    """Makes the disk fetch images that will be opened again to be read."""
    for file in map(open_image, images):
        if not isinstance(file, OSError):
            file.close()


def open_ahead(images: Sequence[RawImage]) -> Iterator[BinaryIO | OSError]:
    """Opens 32 images before their turn: in threads where that is slow, as on NFS."""
    start = time.perf_counter()
    prefetch(images[:1])
    is_slow = time.perf_counter() - start >= SLOW_OPEN_SECONDS
    with concurrent.futures.ThreadPoolExecutor(READ_AHEAD) as threads:
        files: Iterator[Any] = map(open_image, images)
        if is_slow:  # else, passing the GIL around would slow the encoding by a fifth
            files = (threads.submit(open_image, image) for image in images)
        ahead = collections.deque(itertools.islice(files, READ_AHEAD))
        while ahead:
            first = ahead.popleft()
            yield first.result() if is_slow else first
            ahead.extend(itertools.islice(files, 1))


class _ImageError(ValueError):
    """Why an image cannot be decoded, in words."""


def bad_image(image: RawImage, error: Exception) -> BadImagesError:
    """Says why an image cannot be used; raises what is no fault of the image."""
    if isinstance(error, _ImageError):
        return BadImagesError(f"Cannot decode {image.path}: {error}.")
    if not isinstance(error, (OSError, MemoryError)):  # TensorFlow lacks memory, say
        raise MachineError(f"Cannot use {image.path}: {error!r}. {FIX_AND_RERUN}")
    if isinstance(error, MemoryError) or error.errno in LIMITS:
        raise refusal("read", image.path, error)
    if isinstance(error, _ChangedError) and image.offset is not None:
        raise MachineError(f"{image.source} {CHANGED}. {RERUN}", may_pass=True)
    was_there = image.fingerprint or image.num_bytes  # when it was listed
    reason = error.strerror
    if isinstance(error, FileNotFoundError):
        reason = GONE if was_there else "it is a dangling link"
    elif error.errno in DISK_ERRORS:
        reason = f"{reason}. {DISK_FAILS}"
    what = f"{image.path}: {reason}"
    # A dangling link or a file without permission says nothing about the disk.
    is_disk = was_there and not isinstance(error, PermissionError)
    return BadImagesError(f"Cannot read {what}.", unreadable=[what] if is_disk else [])


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as it goes into its record."""

    jpeg: bytes  # of 1 component, if it is gray, or 3: decode with channels=3
    height: int
    width: int
    repaired: bool = False  # it was a PNG or a CMYK JPEG, and was encoded again


# FF 00 is a data byte FF, FF FF is fill, FF 01 and FF D0 to FF D7 stand alone and
# change nothing, FF D9 ends; any other FF begins a segment (ITU-T T.81, B.1.1).
_WITHOUT_SEGMENT = frozenset({0x01, *range(0xD0, 0xD8), 0xFF})
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

_OVERRUN_BYTES = 1024  # libjpeg reads at most 129 bytes (a table) past a segment's end
_MAX_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_MAX_VALUES = 2**29  # height x width x components; TensorFlow's limit (jpeg_mem.cc)


def check_and_repair(data: bytes) -> EncodedImage:
    """Checks an image; encodes it again only if some readers could not decode it."""
    import tensorflow as tf

    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _encode_again(data, "PNG")
    if not data.startswith(b"\xff\xd8\xff"):
        found = f"not a JPEG (starts with {data[:4]!r})"
        raise _ImageError(found if data else "the file is empty")
    skeleton, height, width, num_components = read_skeleton(data)
    num_values = height * width * max(3, num_components)
    if max(height, width) > _MAX_SIDE or not 0 < num_values < _MAX_VALUES:
        found = f"{width:,} x {height:,} x {num_components} values"
        raise _ImageError(f"its header declares {found}, which are none or too many")
    # The call takes longer with bytes in place of a tensor, or 1 in place of 1.0.
    how = {"contents": tf.constant(skeleton), "ratio": 8, "acceptable_fraction": 1.0}
    decode = functools.partial(tf.raw_ops.DecodeJpeg, **how)
    try:
        decode()
    except tf.errors.InvalidArgumentError as error:
        raise _ImageError(_reason_of_libjpeg(decode)) from error
    if num_components == 4:
        return _encode_again(data, "CMYK JPEG")
    return EncodedImage(data, height, width)


def read_skeleton(data: bytes) -> tuple[bytes, int, int, int]:
    """Reads a JPEG's skeleton, about 2 KB, its height, width and number of components.

    The skeleton is its marker segments, which then declare 8 x 8 pixels. libjpeg fails
    on bad segments or a missing end, never on the data between them: it fills in what
    is broken. So the skeleton gives the image's verdict in an eighth of the time.
    """
    import numpy as np

    values = np.frombuffer(data, np.uint8)
    is_marker = ((values[:-1] == 0xFF) & (values[1:] != 0)).tobytes()
    segments, frame = bytearray(data[:2]), b""
    start = end = 2  # from where to look for a marker; where the last segment ends
    while True:
        start = is_marker.find(1, start)
        if start < 0:
            raise _ImageError("it is cut short: no end marker")
        marker = data[start + 1]
        if marker == 0xD9:
            break
        if marker in _WITHOUT_SEGMENT:
            start += 1
        else:
            # The length counts its own two bytes; one that says less is damaged, and
            # libjpeg must see it to say so.
            length = int.from_bytes(data[start + 2 : start + 4], "big")
            end = start + 2 + max(2, length)
            segment = data[start:end]
            if marker in _FRAME_MARKERS and not frame:
                frame = segment
                segment = frame[:5] + struct.pack(">HH", 8, 8) + frame[9:]
            segments += segment
            start = end
    if len(frame) < 10:
        raise _ImageError("it has no frame header")
    height, width, num_components = struct.unpack_from(">HHB", frame, 5)
    # A segment may need more bytes than its length says. libjpeg then reads past its
    # end, and rejects the image only if those bytes are there.
    segments += data[start : start + 2] + data[end : end + _OVERRUN_BYTES]
    return bytes(segments), height, width, num_components


def _reason_of_libjpeg(decode: Callable[[], object]) -> str:
    """Decodes again to catch libjpeg's reason, which it only writes to stderr."""
    stderr, (reader, writer) = os.dup(2), os.pipe()
    os.set_blocking(writer, False)  # what does not fit into its 64 KiB is dropped
    os.dup2(writer, 2)
    with contextlib.suppress(Exception):
        decode()
    os.dup2(stderr, 2)
    os.close(stderr)
    os.close(writer)
    with open(reader, errors="replace") as caught:
        reasons = caught.read().splitlines() or ["libjpeg cannot decode it"]
    return reasons[-1].rstrip(".")


def _encode_again(data: bytes, kind: str) -> EncodedImage:
    """Re-encodes a PNG or CMYK JPEG as an RGB JPEG, as tensorflow/tpu's script does."""
    import tensorflow as tf

    try:
        pixels = tf.io.decode_jpeg(data, channels=3)  # decodes PNGs, too
    except tf.errors.InvalidArgumentError as error:
        raise _ImageError(f"it is a damaged {kind}") from error
    jpeg = tf.io.encode_jpeg(pixels, format="rgb", quality=100).numpy()
    height, width, _ = pixels.shape
    return EncodedImage(jpeg, height, width, repaired=True)


# ---------------------------------------------------------------------------------
# 6. One record: nine features, and the frame around them


def make_example(image: RawImage, label: int, encoded: EncodedImage) -> bytes:
    """Serializes a `tf.train.Example`, the same bytes every time.

    A new feature needs a new `RECORD_FORMAT`, and what it takes from `image` must be in
    `Shard.digest`; else shards that were written before count as up to date. Filling a
    new one in place is three times as fast as composing it; reusing one would keep the
    memory of every JPEG.
    """
    import tensorflow as tf

    example = tf.train.Example()
    feature = example.features.feature
    feature["image/height"].int64_list.value.append(encoded.height)
    feature["image/width"].int64_list.value.append(encoded.width)
    feature["image/colorspace"].bytes_list.value.append(b"RGB")
    feature["image/channels"].int64_list.value.append(3)  # as decoded, gray ones too
    feature["image/class/label"].int64_list.value.append(label)
    feature["image/class/synset"].bytes_list.value.append(os.fsencode(image.synset))
    feature["image/format"].bytes_list.value.append(b"JPEG")
    feature["image/filename"].bytes_list.value.append(os.fsencode(image.filename))
    feature["image/encoded"].bytes_list.value.append(encoded.jpeg)
    return bytes(example.SerializeToString(deterministic=True))  # sorts the map


def framed(data: bytes) -> bytes:
    """Frames a TFRecord; TensorFlow's own writer does not report the checksum.

    A record is the length (8 bytes, little-endian), its masked crc32c, the data, and
    its masked crc32c: https://tensorflow.org/tutorials/load_data/tfrecord.
    """
    length = struct.pack("<Q", len(data))
    return b"".join((length, _masked_crc32c(length), data, _masked_crc32c(data)))


def _masked_crc32c(data: bytes) -> bytes:
    crc32c = google_crc32c.value(data)
    rotated = (crc32c >> 15 | crc32c << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def _crc32c_text(crc32c: int) -> str:
    return base64.b64encode(struct.pack(">I", crc32c)).decode()


# ---------------------------------------------------------------------------------
# 7. One shard: written completely or not at all, with a stamp that describes it


BLOCK_BYTES = 2**20  # read or written at once
TEMPORARY_SUFFIX = ".tmp"  # of hidden files, so that no reader's train-* matches
CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # some FUSE file systems


@dataclasses.dataclass(frozen=True, slots=True)
class Stamp:
    """What is known of a finished shard: a hidden file beside it, or its metadata."""

    digest: str  # `Shard.digest()` of what it was made of; empty if unknown
    num_examples: int
    num_bytes: int
    crc32c: str  # of the file: base64 of 4 big-endian bytes, as Cloud Storage has it
    num_repaired: int = 0  # examples whose image was encoded again
    fingerprint: str = ""  # `Shard.fingerprint()`; none for an object
    mtime_ns: int = 0  # when the file was last modified; 0 for an object

    def same_bytes(self, other: Stamp | None) -> bool:
        """Compares bytes by number and checksum."""
        own = self.num_bytes, self.crc32c
        return other is not None and own == (other.num_bytes, other.crc32c)


def shard_path(shard: Shard, scratch_dir: str) -> str:
    """Where a shard goes: `<scratch_dir>/train/train-00007-of-01024`."""
    return os.path.join(scratch_dir, shard.split, shard.name)


def local_shards(scratch_dir: str) -> list[str]:
    """Names shards, stamps and temporary files, of whatever plan."""
    return [path.name for path in pathlib.Path(scratch_dir).glob("*/*-of-*")]


def _stamp_path(path: str) -> str:
    """The stamp of `train/train-00007-of-01024`: `train/.train-00007-of-01024.json`."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.json")


def write_records(shard: Shard, temporary_path: str) -> Stamp:
    """Writes the records of a shard to a file; runs in a worker process."""
    problems, unreadable = list[str](), list[str]()
    num_repaired = crc32c = 0
    with open(temporary_path, "wb", buffering=BLOCK_BYTES) as file:
        for image, opened in zip(shard.images, open_ahead(shard.images)):
            try:
                encoded = check_and_repair(read_image(image, opened))
                label = shard.labels[image.synset]
                record = framed(make_example(image, label, encoded))
            except Exception as error:  # noqa: BLE001  # it concerns one image
                problem = bad_image(image, error)
                problems += problem.args
                unreadable += problem.unreadable
                if len(unreadable) == UNREADABLE_IMAGES:
                    break
            else:
                file.write(record)
                crc32c = google_crc32c.extend(crc32c, record)
                num_repaired += encoded.repaired
    if problems:
        raise BadImagesError(*problems, unreadable=unreadable)
    status = os.stat(temporary_path)
    contents = len(shard.images), status.st_size, _crc32c_text(crc32c), num_repaired
    return Stamp(shard.digest(), *contents, shard.fingerprint(), status.st_mtime_ns)


def write_shard(
    shard: Shard, scratch_dir: str, write: Callable[[Shard, str], Stamp], durable: bool
) -> Stamp:
    """Has `write` fill a shard, then writes its stamp, without which it is absent."""
    path = shard_path(shard, scratch_dir)
    with _complete_or_absent(path, durable) as temporary_path:
        stamp = write(shard, temporary_path)
    write_text(_stamp_path(path), json_text(dataclasses.asdict(stamp)))
    return stamp


@contextlib.contextmanager
def _complete_or_absent(path: str, durable: bool = False) -> Iterator[str]:
    """Yields a hidden path to write to, and then gives the file its name.

    If `durable`, it first waits until the disk has the file, so that it survives a loss
    of power. A stamp or manifest that does not is unreadable, and is written again.
    """
    directory, name = os.path.split(path)
    unique = f"{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}"
    temporary_path = os.path.join(directory, f".{name}.{unique}{TEMPORARY_SUFFIX}")
    with trying_to("write", path):
        os.makedirs(directory, exist_ok=True)
        try:
            yield temporary_path
            if durable:
                with open(temporary_path, "r+b") as file:  # on SMB, "rb" would not do
                    try:
                        os.fsync(file.fileno())
                    except OSError as error:
                        if error.errno not in CANNOT_FLUSH:
                            raise
            os.replace(temporary_path, path)
        finally:
            with contextlib.suppress(OSError):  # gone if it was given its name
                os.unlink(temporary_path)


def remove(path: StrPath) -> None:
    """Removes a file, if there is one."""
    with trying_to("remove", path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def json_text(value: Mapping[str, Any]) -> str:
    """Formats a stamp or a manifest, for people to read as well."""
    return json.dumps(value, indent=1) + "\n"


def write_text(path: str, text: str) -> None:
    """Writes a small text file in UTF-8, completely or not at all."""
    with _complete_or_absent(path) as temporary_path:
        pathlib.Path(temporary_path).write_text(text, encoding="utf-8")


def read_text(path: str) -> str:
    """Reads a small file that this script wrote; empty if it cannot be read."""
    with contextlib.suppress(OSError), open_file(path) as file:
        return file.read().decode("utf-8", errors="replace")
    return ""


def read_stamp(path: str) -> Stamp | None:
    """Reads a shard's stamp, even if the shard was removed; None if there is none.

    An unreadable one counts as that of a shard whose images were touched since.
    """
    try:
        fields = json.loads(read_text(_stamp_path(path)))
        if isinstance(fields, dict) and "versions" in fields:  # what 2.x called it
            fields["fingerprint"] = fields.pop("versions")
        return Stamp(**fields)
    except (ValueError, TypeError, RecursionError):
        return Stamp("", 0, 0, "") if os.path.lexists(_stamp_path(path)) else None


def is_as_stamped(path: str, stamp: Stamp) -> bool:
    """Whether a shard has the stamp's size and time; its bytes are not read."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return (status.st_size, status.st_mtime_ns) == (stamp.num_bytes, stamp.mtime_ns)
    return False


def measure(path: str) -> Stamp:
    """Reads a file to tell its size and checksum, or its stamp if that has the same."""
    num_bytes = crc32c = 0
    with trying_to("read", path), open_file(path) as file:
        while block := file.read(BLOCK_BYTES):
            num_bytes += len(block)
            crc32c = google_crc32c.extend(crc32c, block)
    found, stamp = Stamp("", 0, num_bytes, _crc32c_text(crc32c)), read_stamp(path)
    return stamp if stamp and stamp.same_bytes(found) else found


def invalidate_if_damaged(path: str, stamp: Stamp) -> None:
    """Stops the run if a file has other bytes; the next one rewrites a shard."""
    if not measure(path).same_bytes(stamp):
        if stamp.mtime_ns:  # else it has none: the manifest, or a caller's file
            with trying_to("write", path):
                os.utime(path)  # now it is not as stamped
        raise MachineError(f"{path} has changed. {RERUN}", may_pass=True)


# ---------------------------------------------------------------------------------
# 8. Processes that write shards, and the line that says how far they are


# The run starts this file again, as the helper, which imports TensorFlow, forks workers
# and waits. Calls and answers go over a socket for each worker. All exit when stdin
# ends, closed by the run or, if that is killed, by the system. If a worker dies, its
# socket closes, and the helper dies likewise, which tells the run the cause.

AS_HELPER = "--as-helper"  # starts this file as the helper; its sockets follow
CAUSE_OF_DEATH = re.compile(r"\n((?!WARNING)[\w.()]+: .*|terminate .*|F\d{4} .*)")


class Pool:
    """Processes that make calls for the threads of the run, one at a time each."""

    def __init__(self, num_workers: int):
        self.stopping = threading.Event()  # set when the run fails: no more calls
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()  # sockets, as files
        self._words = b"\n"  # the last that the processes wrote to stderr
        pairs = [socket.socketpair() for _ in range(num_workers)]
        sockets = [theirs.fileno() for _, theirs in pairs]
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        same_path = {"PYTHONPATH": ":".join(map(str, sys.path)), "PYTHONSAFEPATH": "1"}
        self._helper: Any = subprocess.Popen(
            [sys.executable, os.path.realpath(__file__), AS_HELPER, *map(str, sockets)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=sockets,
            env={**os.environ, **quiet, **same_path},
            cwd="/",  # the current directory may be gone, which TensorFlow minds
            start_new_session=True,  # which neither Ctrl-C nor hangups reach
        )
        for ours, theirs in pairs:
            self._idle.put(ours.makefile("rwb"))
            theirs.close()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Ends all processes; calls that are under way raise an error."""
        self._helper.stdin.close()
        self._helper.kill()
        self._listener.join(timeout=1)  # longer only if a disk holds a process

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function in the next worker that is idle."""
        connection = self._idle.get()
        try:
            if self.stopping.is_set():
                raise concurrent.futures.CancelledError
            pickle.dump((function, arguments), connection)
            connection.flush()
            answer = _Unpickler(connection).load()
        except (EOFError, ConnectionError, pickle.UnpicklingError):
            answer = MachineError(self._cause_of_death())
        finally:
            self._idle.put(connection)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _listen(self) -> None:
        """Keeps what the processes write to stderr, until all have ended."""
        with self._helper.stderr as stderr:
            while piece := os.read(stderr.fileno(), 2**16):
                self._words = (self._words + piece)[-(2**16) :]
                time.sleep(0.05)  # else each image would wake this thread
        self._helper.wait()

    def _cause_of_death(self) -> str:
        """Explains in a line why a worker died, once all processes have ended."""
        time.sleep(0.2)  # a signal to the whole run may still be on its way
        with contextlib.suppress(subprocess.TimeoutExpired):  # the helper is stopped
            self._helper.wait(timeout=5)
        self.close()
        text = self._words.decode(errors="replace")
        status = self._helper.returncode or 0
        if status == -signal.SIGKILL or "failed to map segment" in text:
            killed = "A worker process was killed, most likely because"
            return f"{killed} the machine ran out of memory. {LIMITS[errno.ENOMEM]}"
        if re.search(r"pthread_create|start new thread|BlockingIOError", text):
            return TOO_MANY_THREADS
        said = [line.rstrip(".") for line in CAUSE_OF_DEATH.findall(text)[-1:]]
        if status == 1:  # what a call raises is an answer; only the import gets here
            return f"TensorFlow cannot be imported: {': '.join(said)}. Run: {INSTALL}."
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        if name == "SIGILL":
            name += ", as if TensorFlow were built for another processor"
        return f"A worker process died: {': '.join([name, *said])}. {FIX_AND_RERUN}"


class _Unpickler(pickle.Unpickler):
    """Finds the names of this file, whichever module it is in the other process."""

    def find_class(self, module: str, name: str) -> Any:
        return globals().get(name) or super().find_class(module, name)


def _fork_workers(sockets: list[int]) -> NoReturn:
    """Imports TensorFlow, to use one processor, and forks a worker for each socket."""
    threading.Thread(target=_end_with_run, daemon=True).start()
    gc.disable()  # or the import would take 1.6 times as long
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    gc.freeze()
    gc.enable()
    connections = [socket.socket(fileno=number).makefile("rwb") for number in sockets]
    while connections:
        own = connections.pop()
        if not os.fork():  # after TensorFlow has run anything, that would hang
            connections.clear()  # and so closed in this process
            _make_calls(own)
        own.close()
    status = os.waitstatus_to_exitcode(os.wait()[1])  # 0 only at the run's end
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


def _make_calls(connection: Any) -> NoReturn:
    """Makes the calls that the run sends to this worker."""
    threading.Thread(target=_end_with_run, daemon=True).start()
    while connection.peek(1):  # nothing once the run has closed its end
        try:
            function, arguments = _Unpickler(connection).load()
            answer = function(*arguments)
        except (RunError, OSError, MemoryError) as error:
            answer = error
        except BaseException:  # noqa: BLE001  # not all can be sent; words can
            answer = RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
        pickle.dump(answer, connection)
        connection.flush()
    os._exit(0)


def _end_with_run() -> None:
    os.read(0, 1)  # waits until the run closes its end
    os._exit(0)


LOG_SECONDS = 10.0
has_live_line = False  # True only for the command, on a terminal


class Progress:
    """How far the writing and the upload are, and how fast they go."""

    def __init__(self, job: Job):
        self.written, self.uploaded = list[Stamp](), list[Stamp]()
        self.sent = dict.fromkeys(job.work.left, 0)  # bytes of each that are uploaded
        self._job, self._start = job, time.monotonic()
        # Once: it is a pass over 1.3 million images, half a second.
        self._all_bytes = sum(s.estimated_bytes for s, _ in job.work.in_turn()) or 1

    def line(self, is_done: bool = False) -> str:
        """Says how far the run is, in the order of interest: terminals are narrow."""
        job, seconds = self._job, time.monotonic() - self._start
        sizes = [stamp.num_bytes for stamp in self.written]
        done = sum(self.sent.values() if job.destination else sizes)
        if not (self.written or done):
            return f"Starting {_count(job.options.workers, 'worker')}."
        left = max(self._all_bytes - done, 0)
        head = f"{100 * (self._all_bytes - left) // self._all_bytes}%, "
        head += f"{_duration(left / done * seconds)} left, " if done else ""
        if is_done:
            head = f"Done in {_duration(seconds)}: "
        written = len(job.work.to_upload) + len(self.written)
        num_shards = _count(len(job.work.left), "shard")
        uploaded = f"{len(self.uploaded):,} uploaded, " if job.destination else ""
        images = sum(stamp.num_examples for stamp in self.written) / seconds
        speed = f"{images:,.0f} images/s, {_size(done / seconds)}/s."
        return f"{head}{written:,} of {num_shards} written, {uploaded}{speed}"

    def log_done(self) -> None:
        """Says what was done, and how fast."""
        if self.written or self.uploaded:
            logging.info(self.line(is_done=True))
        if number := sum(stamp.num_repaired for stamp in self.written):
            logging.info(f"Encoded {_count(number, 'PNG or CMYK image')} as RGB JPEG.")


@contextlib.contextmanager
def reporting(say: Callable[[], str]) -> Iterator[None]:
    """Shows progress: a live line on a terminal, else a log line every 10 seconds."""
    is_over = threading.Event()
    seconds, show = (0.5, draw_line) if has_live_line else (LOG_SECONDS, logging.info)

    def report() -> None:
        while not is_over.wait(seconds):
            show(say())

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=1)  # longer only if a disk holds it
        draw_line("")


def draw_line(text: str) -> None:
    """Redraws the last line of a terminal: the words that fit; clears it if empty."""
    if not has_live_line:
        return
    lock = logging.get_absl_handler().python_handler.lock or contextlib.nullcontext()
    # Not while another thread writes a log line, nor if the terminal is gone.
    with lock, contextlib.suppress(OSError):
        width = max(os.get_terminal_size(sys.stderr.fileno()).columns or 80, 2) - 1
        line = textwrap.shorten(text, width, placeholder="")
        line = re.sub(r",( [\d.]+)?$", "", line)  # no number without its unit
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------
# 9. Cloud Storage: what is in the bucket, uploading more, and what its answers mean


PARALLEL_UPLOADS = 8  # the client's connection pool holds 10
UPLOAD_CHUNK_BYTES = 5 * 2**20  # what is sent again after a fault
PIECE_BYTES = 64 * 2**10  # of a chunk; what a timeout counts for
# The first also bounds each piece, which waits until a third of the system's buffer (4
# MB) is free; the second includes emptying it. 20 KB/s suffice for both.
CHUNK_TIMEOUT = (120, 300)  # seconds to connect, and to get an answer
ONCE = {"timeout": (10, 60), "retry": None}  # of all other requests
# `_persist`, not the client, repeats a request whose fault `may_pass`; `upload` begins
# anew one whose fault `is_lost`. Other faults end the run, or are harmless.
RETRY_DELAYS = (1, 2, 4, 8, 10)  # seconds between tries; for a request, the last recurs
REQUEST_SECONDS, UPLOAD_SECONDS = 120, 600  # since a request first failed
WARNING_SECONDS = 10  # of failures, before they are told
# Unless this is set, the client asks for the bucket's metadata in a thread of its own.
NO_BUCKET_METADATA = "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"
QUIET_LOGGERS = ("google", "urllib3")  # they warn of each retry

# Called with the position before each piece; after a fault it is lower than before.
Sent: TypeAlias = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class GcsPath:
    """A place in Cloud Storage: `gs://bucket/directory`."""

    bucket: str
    directory: str  # without slashes at its ends; empty for the bucket itself

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.directory}".removesuffix("/")

    @classmethod
    def parse(cls, text: str) -> GcsPath:
        """Parses `gs://bucket` or `gs://bucket/directory`; a final `/` may follow."""
        bucket, _, path = text.removeprefix("gs://").partition("/")
        directory = path.removesuffix("/")
        # What is legal in Cloud Storage, or nearly so, but never meant.
        strange = [repr(c) for c in text if c in "*?#[]" or not c.isprintable()]
        parts = directory.split("/") if path else []
        strange += [repr(part or "//") for part in parts if part in ("", ".", "..")]
        strange += ["a final blank"] if text.endswith(" ") else []
        found = ", ".join(dict.fromkeys(strange))
        if not text.startswith("gs://"):
            problem = "must start with gs://, as in gs://bucket/directory."
        elif found:
            problem = f"must not contain {found}: readers would not find the data set."
        elif not re.fullmatch(r"[a-z0-9][a-z0-9._-]+[a-z0-9]", bucket):
            problem = f"must name a bucket after gs://; found {bucket!r}."
        else:
            return cls(bucket, directory)
        raise InvalidInputError(f"--gcs_output_path={escaped(text)} {problem}")

    def name_of(self, filename: str) -> str:
        """Names a file of the directory as the bucket does: `directory/filename`."""
        return f"{self.directory}/{filename}".lstrip("/")


class Destination:
    """A directory in a bucket, and the client that reaches it.

    Attributes:
      objects: Stamps of what the last listing found, by base name.
      is_listed: Whether that listing was permitted.
      passed_over: Base names of what is there and may be neither seen nor replaced.
      stopping: Ends uploads and pauses, with a CancelledError, once it is set.
    """

    def __init__(
        self,
        path: GcsPath,
        project: str | None,
        client: Any = None,
        stopping: threading.Event | None = None,
    ):
        self.path = path
        self.objects: dict[str, Stamp] = {}
        self.is_listed = True
        self.passed_over: list[str] = []
        self.stopping = stopping or threading.Event()
        self._slots = threading.Semaphore(PARALLEL_UPLOADS)
        self._project = project
        self._next_warning = 0.0
        self.client = client or self._ask("", lambda: _new_client(project))
        self._bucket = self.client.bucket(path.bucket)  # `get_bucket` may be denied

    def list_objects(self) -> dict[str, Stamp]:
        """Lists the destination by base name; nothing if that is not permitted."""
        try:
            self.is_listed, self.objects = True, self._ask("", self._list)
        except ServiceError as error:
            fault = Fault(error)
            if fault.status == 400 and not self._bucket.user_project:
                # The requester may have to pay; to name one needs a permission.
                payer = self._project or self.client.project
                self._bucket = self.client.bucket(self.path.bucket, payer)
                return self.list_objects()
            if not fault.is_denied:
                raise
            if self.is_listed:  # or it has been said
                what = f"Cannot list {self.path} (storage.objects.list: {fault.words})"
                logging.warning(f"{what}: all shards will be uploaded, unchecked.")
            self.is_listed, self.objects = False, {}
        return self.objects

    def _list(self) -> dict[str, Stamp]:
        where = {"prefix": self.path.name_of(""), "delimiter": "/"}
        blobs = self.client.list_blobs(self._bucket, **where, **ONCE)
        return {os.path.basename(blob.name): _stamp_of(blob) for blob in blobs}

    def check_access(self, filename: str) -> None:
        """Starts an upload, to prove the permission; abandoned, it expires."""
        start = self._blob(filename).create_resumable_upload_session
        try:
            self._ask(filename, lambda: start(**ONCE))
        except ServiceError as error:
            if self.is_listed or not Fault(error).is_taken:
                raise

    def read(self, filename: str) -> str:
        """Reads a small object; empty if there is none, or reading is not permitted."""
        if self.is_listed and filename not in self.objects:
            return ""
        download = self._blob(filename).download_as_bytes
        data = self._ask(filename, lambda: download(**ONCE), 403, 404)
        return str(data or b"", "utf-8", "replace")

    def delete(self, filename: str) -> None:
        """Deletes an object; without a listing, that may be refused."""
        if not self.is_listed or filename in self.objects:
            delete = self._blob(filename).delete
            harmless = (404,) if self.is_listed else (403, 404)
            self._ask(filename, lambda: delete(**ONCE), *harmless)

    def upload(self, path: str, stamp: Stamp, sent: Sent = lambda _: None) -> bool:
        """Uploads a file; False if one is there, which may not be seen or replaced."""
        name = os.path.basename(path)
        with self._slots, self._explained(name):
            for delay in (*RETRY_DELAYS, None):
                try:
                    self._send(path, stamp, sent)
                    return True
                except Exception as error:
                    fault = Fault(error)
                    if fault.is_taken and not self.is_listed:
                        break
                    if delay is None or not fault.is_lost:
                        raise
                invalidate_if_damaged(path, stamp)
                logging.warning(f"Uploading {name} again in {delay} s: {fault.words}.")
                self._pause(delay)
        if not self.passed_over:
            logging.warning(f"Leaving what is in {self.path}: it may not be replaced.")
        self.passed_over.append(name)
        return False

    def check_none_passed_over(self) -> None:
        """Stops the run if objects could be neither seen nor replaced."""
        if self.passed_over:
            found = f"{_some(self.passed_over)} in {self.path}"
            role = f"roles/storage.objectUser on gs://{self.path.bucket}"
            problem = f"{found} may be neither seen nor replaced"
            raise ServiceError(f"{problem}. Grant {role} and rerun.")

    def _send(self, path: str, stamp: Stamp, sent: Sent) -> None:
        def before_piece(position: int) -> None:
            self._pause(0)
            sent(position)

        blob = self._blob(os.path.basename(path), chunk_size=UPLOAD_CHUNK_BYTES)
        blob.metadata = {"digest": stamp.digest, "crc32c": stamp.crc32c}
        with trying_to("read", path):
            file = _ChunkedFile(path, before_piece)
        with file:
            # If told the size, the client sends a small file in one request, without
            # the checksum by which the service rejects damaged bytes. It decorates
            # each request with `retry`.
            blob.upload_from_file(
                file,
                content_type="application/octet-stream",
                timeout=CHUNK_TIMEOUT,
                checksum=None,
                crc32c_checksum_value=stamp.crc32c,
                retry=lambda each: lambda: self._persist(UPLOAD_SECONDS, each),
            )
        if not _stamp_of(blob).same_bytes(stamp):
            raise ValueError("the bucket holds other bytes than were sent")

    def _blob(self, filename: str, **options: Any) -> Any:
        return self._bucket.blob(self.path.name_of(filename), **options)

    def _pause(self, seconds: float) -> None:
        """Waits, or raises if the run is stopping."""
        if self.stopping.wait(seconds):
            raise concurrent.futures.CancelledError

    def _ask(self, filename: str, request: Callable[[], Any], *harmless: int) -> Any:
        """Returns the result of a request; None if it failed with a harmless status."""
        with self._explained(filename, *harmless):
            return self._persist(REQUEST_SECONDS, request)

    def _persist(self, seconds: float, request: Callable[[], Any]) -> Any:
        """Repeats a request that may pass, for some seconds since it first failed."""
        start, end = time.monotonic(), math.inf
        for delay in itertools.chain(RETRY_DELAYS, itertools.repeat(RETRY_DELAYS[-1])):
            self._pause(0)
            try:
                return request()
            except Exception as error:
                fault, now = Fault(error), time.monotonic()
                end = min(end, now + seconds)
                if not fault.may_pass or now + delay > end:
                    raise
            if now >= max(start + WARNING_SECONDS, self._next_warning):
                self._next_warning = now + 60  # of all requests, once a minute
                what = f"Waiting up to {_duration(seconds)} for {self.path}"
                logging.warning(f"{what}: {fault.words}.")
            self._pause(delay * random.uniform(0.5, 1))

    @contextlib.contextmanager
    def _explained(self, filename: str, *harmless: int) -> Iterator[None]:
        """Turns all but harmless errors into a line: place, words, remedy."""
        try:
            yield
        except (RunError, ImportError, concurrent.futures.CancelledError):
            raise
        except Exception as error:
            fault = Fault(error)
            if fault.status not in harmless:
                place, bucket = f"{self.path}/{filename}", f"gs://{self.path.bucket}"
                remedy = fault.remedy.format(bucket=bucket, project=self._project)
                line = f"Cannot use {place.removesuffix('/')}: {fault.words}. {remedy}"
                may_pass = fault.may_pass or fault.is_lost
                raise ServiceError(line.rstrip(), may_pass=may_pass) from error


class _ChunkedFile(io.BufferedReader):
    """A file that the client reads in chunks and sends in pieces."""

    def __init__(self, path: str, before_piece: Sent):
        super().__init__(io.FileIO(path))
        self.path, self.before_piece = path, before_piece

    def read(self, size: int | None = -1) -> Any:
        start = self.tell()
        with trying_to("read", self.path):  # not the network's fault
            data = super().read(size)
        # Of an empty body that can be iterated, the client does not say the length.
        return _Chunk(data, start, self.before_piece) if data else data


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A part of a file.

    What has a length and can be iterated, the client sends piece by piece. So a timeout
    counts for a piece, not for a chunk, which takes a slow line minutes.
    """

    data: bytes
    start: int  # its position in the file
    before_piece: Sent

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[bytes]:
        for offset in range(0, len(self.data), PIECE_BYTES):
            self.before_piece(self.start + offset)
            yield self.data[offset : offset + PIECE_BYTES]
        self.before_piece(self.start + len(self.data))


def _stamp_of(blob: storage.Blob) -> Stamp:
    """What the bucket says of an object; its digest if the bytes are as written."""
    crc32c, metadata = blob.crc32c or "", blob.metadata or {}
    is_as_written = crc32c and metadata.get("crc32c") == crc32c
    digest = metadata.get("digest", "") if is_as_written else ""
    return Stamp(digest, 0, blob.size or 0, crc32c)  # some servers omit a size of 0


def _new_client(project: str | None) -> storage.Client:
    """Logs in with whatever `google.auth` finds."""
    from google.auth import exceptions
    from google.cloud import storage

    try:
        client = storage.Client(project=project)
    except Exception as error:  # of any kind, if the file of credentials is odd
        kind: Any = exceptions.DefaultCredentialsError
        raise kind("the file of credentials is not understood") from error
    # The session has no public name; its hooks are documented by requests.
    client._http.hooks["response"].append(_refuse)
    return client


def _refuse(response: Any, **_: Any) -> None:
    """Raises before the client reads an error or a web page, which may break it."""
    import requests

    is_html = "text/html" in response.headers.get("Content-Type", "")
    is_page = is_html and response.content.strip()  # an empty answer is none
    if (is_page or response.status_code >= 400) and response.status_code != 401:
        raise requests.HTTPError(response=response)  # at 401, the client logs in again


def _is_googles_machine() -> bool:
    """Whether this may be Google's machine or a pod, whose identity can come late."""
    names = "GCE_METADATA_HOST", "K_SERVICE", "CLOUD_RUN_JOB", "KUBERNETES_SERVICE_HOST"
    product = read_text("/sys/class/dmi/id/product_name")
    says_so = product.startswith("Google") or any(map(os.environ.get, names))
    return says_so and os.environ.get("NO_GCE_CHECK") != "true"


# What an error means: statuses and types decide, and what machines write, such as
# reasons and permissions; all other words are for people.

KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
LOG_IN = "run `gcloud auth application-default login`"
STATUS = re.compile(r'(?:Tunnel connection failed: |"code": ?"?)(\d{3})\b')
MESSAGE = re.compile(r'"message": ?("(?:[^"\\]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})+")')
SPOKEN = {"OSError", "GoogleAuthError", "HTTPError"}  # whose texts people can read
NETWORK = {"ConnectionError", "ChunkedEncodingError", "Timeout", "TransportError"}
SETTINGS = ("InvalidSchema", "X509", "CERTIFICATE_VERIFY_FAILED")  # of the network
REMEDIES = {  # by class, reason or permission: the first that is in `told` helps
    "InvalidSchema": "Run: python3 -m pip install 'requests[socks]'",
    "X509": "REQUESTS_CA_BUNDLE must name a file (PEM) of certificates.",
    "CERTIFICATE_VERIFY_FAILED": "Check this machine's clock. If your network has its "
    "own certificate authority, name its certificate (PEM) in REQUESTS_CA_BUNDLE.",
    "ProxyError": "Check the proxy: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT.",
    "invalid_grant": f"As a person, {LOG_IN} again; with a key, check the clock.",
    "iam.serviceAccounts.": "Grant roles/iam.serviceAccountTokenCreator (to a pod, "
    "roles/iam.workloadIdentityUser) on that service account to this run's account.",
    "DefaultCredentialsError": f"Unset {KEY_FILE} and, on your own machine, {LOG_IN}.",
    "service-accounts/": "Attach a service account to this machine.",
    "RefreshError": f"Check {KEY_FILE} or, as a person, {LOG_IN}.",
    '"insufficientPermissions"': "Stop the VM and run: gcloud compute instances "
    "set-service-account NAME --scopes=cloud-platform",
    "serviceusage.services.": "Grant roles/serviceusage.serviceUsageConsumer on the "
    "project to this run's account.",
    "storage.objects.": "Grant roles/storage.objectUser on {bucket} to this account.",
    '"notFound"': "Create it: gcloud storage buckets create {bucket} "
    "--project={project} --location=LOCATION",
}


class Fault:
    """What an error of the client, of `google.auth` or of the network means.

    Attributes:
      told: All that is known: names of classes, texts, the answer's URL and body.
      status: Of HTTP; 0 if no answer came.
      words: For people: one line, without a final period.
      may_pass: Whether the same request may succeed later.
      is_lost: Whether an upload is lost, but may succeed from its beginning.
      is_denied, is_taken: Whether this account may not do it, or not replace objects.
    """

    def __init__(self, error: BaseException):
        chain = list(_chain(error))
        kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
        parts = [p for e in chain for p in (getattr(e, "response", None), *e.args)]
        answer: Any = next((p for p in parts if hasattr(p, "headers")), None)
        body, url = "", getattr(answer, "url", "")
        with contextlib.suppress(Exception):  # there may be none, or a corrupt gzip
            data = answer.data if hasattr(answer, "data") else answer.content
            body = bytes(data).decode(errors="replace")
        self.told = told = " ".join(map(str, [*kinds, url, *parts, body]))
        # Of a proxy, and of what google.auth has read, only a text says the status.
        code = STATUS.search(told)
        status = getattr(answer, "status_code", 0) or getattr(answer, "status", 0)
        self.status = status = status or int(code[1] if code else 0)
        self._quote(body, _last_words(chain))
        is_login = status == 401 or "GoogleAuthError" in kinds
        is_nobody = "DefaultCredentialsError" in kinds or (is_login and status == 404)
        is_setting = any(name in told for name in SETTINGS)
        self.may_pass = (
            status in (408, 429, 500, 502, 503, 504)
            or (status == 403 and bool(re.search("(?i)rate_?limit_?exceeded", told)))
            or any(getattr(each, "retryable", False) for each in chain)
            or (is_nobody and _is_googles_machine())  # on a new one, not yet
            or not (status or is_setting or kinds.isdisjoint(NETWORK))
        )
        is_session = "upload_id=" in told and status in (200, 308, 400, 404, 410)
        self.is_lost = is_session or type(error) is ValueError  # it holds other bytes
        is_elsewhere = is_login or "ProxyError" in kinds or self.is_page
        self.is_denied = status == 403 and not (is_elsewhere or self.may_pass)
        self.is_taken = self.is_denied and "storage.objects.delete" in told

    def _quote(self, body: str, text: str) -> None:
        """Finds the words: the service's, or else HTTP's, or those of the error."""
        self.is_page = any(t.lstrip().startswith("<") for t in (body, text))
        message = MESSAGE.search(self.told)
        plain = body[:300] if re.match(r"[^\W\d]", body) else ""
        words = json.loads(message[1], strict=False) if message else plain
        if self.status >= 300:
            phrase = http.client.responses.get(self.status, "")
            words = f"{self.status} {words or phrase}"
        words = words or ("a web page came back" if self.is_page else text)
        self.words = " ".join(words.split()).rstrip(".")

    @property
    def remedy(self) -> str:
        """What helps, with {bucket} and {project}; empty if nobody knows."""
        known = (text for name, text in REMEDIES.items() if name in self.told)
        page = "A sign-in page or a proxy may be in the way." if self.is_page else ""
        again = RERUN if self.may_pass or self.is_lost else ""
        is_theirs = self.status >= 500 and "ProxyError" not in self.told
        if self.is_lost or is_theirs:
            return again
        return f"{next(known, '') or page} {again}".strip()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those within it, outermost first; libraries nest them variously."""
    while error is not None:
        yield error
        # As urllib3, requests and google.auth, and `raise from` do.
        within = [getattr(error, "reason", None), *error.args, error.__cause__]
        error = next((e for e in within if isinstance(e, BaseException)), None)


def _last_words(chain: Sequence[BaseException]) -> str:
    """What the innermost error of the network or the login says."""
    text = "what came back is not as it should be"
    for error in chain:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & SPOKEN and "JSONDecodeError" not in kinds:
            words = str(getattr(error, "strerror", None) or next(iter(error.args), ""))
            text = words if re.search(r"\w", words) else text
    return text


# ---------------------------------------------------------------------------------
# 10. What is left to do, whether it can be done, and whether all is done


def find_work(job: Job) -> Work:
    """Compares a plan with what the scratch directory and the bucket hold."""
    work, options, objects = Work(), job.options, job.objects
    for shard in job.shards:
        path, is_ours = shard_path(shard, options.scratch_dir), options.is_own(shard)
        # A stamp counts even if its shard is gone (--nokeep_local_shards). Other tasks'
        # shards are judged by the bucket alone, if there is one, and never by times.
        is_judged_here = is_ours or (not job.destination and os.path.exists(path))
        here = read_stamp(path) if is_judged_here else None
        there = objects.get(shard.name)
        digest = shard.digest() if here or there else ""
        stamp = here if here and here.digest in (digest, "") else None  # "": unreadable
        is_touched = is_ours and stamp and stamp.fingerprint != shard.fingerprint()
        # By bytes if a stamp tells them: another TensorFlow encodes some otherwise.
        same = there and (there.same_bytes(stamp) if stamp else there.digest == digest)
        if is_touched:  # first: the bucket's copy can be older
            work.to_write.append(shard)
        elif there and same:
            work.done[shard.name] = there
            if stamp and not options.keep_local_shards and os.path.exists(path):
                work.spare.append(path)
        elif stamp and is_as_stamped(path, stamp):  # its bytes are not read again
            if job.destination:
                work.to_upload.append((shard, stamp))
            else:
                work.done[shard.name] = stamp
        elif is_ours:
            work.to_write.append(shard)  # absent, or of other images, or changed
        elif (found := there or here) and found.digest not in (digest, ""):
            work.differing.append(shard.name)
    return work


def _strangers(filenames: Iterable[str], shards: Iterable[Shard]) -> list[str]:
    """Picks the names that models would read besides the shards of this plan."""
    planned = {shard.name for shard in shards}
    read = tuple(f"{split}-" for split in SPLITS)
    return sorted(n for n in filenames if n.startswith(read) and n not in planned)


def _bucket_problems(job: Job) -> Iterator[str]:
    """Says what in the bucket should not be there, or cannot be seen."""
    if not job.destination:
        return
    place = job.destination.path
    if job.options.task_count > 1 and not job.destination.is_listed:
        yield f"--task_count needs the permission to list {place}."
    if strangers := _strangers(job.objects, job.shards):
        yield (
            f"{place} contains train-* or validation-* objects from elsewhere, which "
            f"models would also read: {_some(strangers)}. Delete them, or choose "
            "another directory."
        )


def _finished_problems(job: Job) -> Iterator[str]:
    """Says which finished data sets, of other raw data, this run would replace."""
    scratch_dir, destination = job.options.scratch_dir, job.destination
    if not job.labels:
        return  # the raw data could not be listed
    here = read_text(job.manifest_path) if local_shards(scratch_dir) else ""
    there = destination.read(MANIFEST_FILE) if destination and job.num_missing else ""
    places = (scratch_dir, here, "rm"), (job.place, there, "gcloud storage rm")
    for place, text, rm in places:
        if differences := "; ".join(_differences(text, _manifest(job))):
            found = f"holds a finished data set of other raw data ({MANIFEST_FILE} says"
            rm += f" {shlex.quote(f'{place}/{MANIFEST_FILE}')}"
            remedy = f"Choose another directory or, to replace it, run: {rm}"
            yield f"{place} {found} {differences}). {remedy}"


def _differences(text: str, planned: Mapping[str, Any]) -> Iterator[str]:
    """Compares a manifest with ours; one that cannot be read vouches for nothing."""
    for key in "examples", "labels":
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            old, new = json.loads(text)[key], planned[key]
            unequal = [k for k in sorted({**old, **new}) if old.get(k) != new.get(k)]
            for name in unequal[:1]:
                yield f"{key} {name}: {old.get(name)}, not {new.get(name)}"


def _room_problems(job: Job) -> Iterator[str]:
    """Says if the disk has no room for the shards that are to be written."""
    options, shards = job.options, job.work.to_write
    paths = [shard_path(shard, options.scratch_dir) for shard in shards]
    old = [os.path.getsize(path) for path in filter(os.path.isfile, paths)]
    needed = _needed_room(options, [shard.estimated_bytes for shard in shards], old)
    needed -= sum(map(os.path.getsize, job.work.spare))
    free = shutil.disk_usage(nearest_existing(options.scratch_dir)).free
    if needed > free:
        can_go = options.gcs_upload and options.keep_local_shards
        yield (
            f"{_size(needed)} are needed in {options.scratch_dir}; {_size(free)} are "
            "free. Make room for the shards, or choose another --local_scratch_dir"
            f"{', or pass --nokeep_local_shards' if can_go else ''}."
        )


def _needed_room(options: Options, new: Iterable[int], old: Iterable[int]) -> int:
    """Bytes that new shards need, less those of the old ones that they replace.

    An old shard goes only when the new one is whole; `workers` are written at a time.
    """
    new, old, workers = sorted(new), sorted(old), options.workers
    # at the end, before the last old ones are replaced; or at the start
    needed = max(sum(new) - sum(old[:-workers]), sum(new[-workers:]))
    if options.keep_local_shards:
        return needed
    return min(needed, sum(new[-workers - WAITING_SHARDS :]))  # that exist at once


def nearest_existing(path: StrPath) -> pathlib.Path:
    """The path itself, or the nearest thing above it, even a dangling link."""
    place = pathlib.Path(path)
    return next(p for p in (place, *place.parents) if os.path.lexists(p))


def _remove_temporary_files(options: Options) -> None:
    """Removes what a killed run of this task left half-written."""
    scratch_dir, count = pathlib.Path(options.scratch_dir), options.task_count
    task = options.task_index or 0
    for pattern in f".{MANIFEST_FILE}.*", "*/.*-of-*":
        for path in scratch_dir.glob(pattern + TEMPORARY_SUFFIX):
            shard = SHARD_NAME.match(path.name.lstrip("."))
            if int(shard[2]) % count == task if shard else count == 1:
                remove(path)


def _remove_manifest(job: Job) -> None:
    """Removes the mark of a complete data set, because it no longer is."""
    remove(job.manifest_path)
    if job.destination:
        job.destination.delete(MANIFEST_FILE)


def check_none_wrong(wrong: Sequence[str], num_shards: int, place: object) -> None:
    """Stops the run if some shards are missing or have changed."""
    if wrong:
        raise RunError(
            f"{len(wrong):,} of {_count(num_shards, 'shard')} in {place} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or changed: "
            f"{_some(wrong)}. Rerun the same command to replace them.",
            may_pass=True,
        )


def _manifest(job: Job) -> dict[str, Any]:
    """What marks a data set as complete, once all of its shards are done.

    It lists the examples, bytes and crc32c of each shard, the totals of examples and
    bytes, and the synset of each label, which the records have only one by one; since
    version 3.0 also whether classes and validation labels are ImageNet-1k's.
    """
    done, examples, validation = job.work.done, collections.Counter[str](), list[str]()
    for shard in job.shards:
        examples[shard.split] += len(shard.images)
        if shard.split == VALIDATION_DIRECTORY:
            validation += [image.synset for image in shard.images]
    return {
        "examples": examples,
        "bytes": sum(stamp.num_bytes for stamp in done.values()),
        "labels": {str(label): synset for synset, label in job.labels.items()},
        "shards": [
            {
                "name": shard.name,
                "examples": len(shard.images),
                "bytes": done[shard.name].num_bytes,
                "crc32c": done[shard.name].crc32c,
            }
            for shard in job.shards
            if shard.name in done
        ],
        "imagenet_1k": {
            "classes": has_digest(job.labels, SYNSETS_DIGEST),
            "validation_labels": has_digest(validation, VALIDATION_DIGEST),
        },
    }


def _read_earlier(job: Job, written: Sequence[Shard]) -> None:
    """Reads the shards of earlier runs again, before a manifest vouches for them."""
    remove(job.manifest_path)  # it is of another data set
    new, number = {shard.name for shard in written}, 0
    earlier = [shard for shard in job.shards if shard.name not in new]
    say = lambda: f"Checked {number:,} of {_count(len(earlier), 'earlier shard')}."
    with reporting(say):
        for number, shard in enumerate(earlier):
            path = shard_path(shard, job.options.scratch_dir)
            invalidate_if_damaged(path, job.work.done[shard.name])


def _write_manifest(job: Job, written: Sequence[Shard]) -> None:
    """Writes and uploads the manifest, last of all, if it is not there already."""
    path, destination, facts = job.manifest_path, job.destination, _manifest(job)
    of_version_2 = {key: facts[key] for key in facts if key != "imagenet_1k"}
    texts = json_text(facts), json_text(of_version_2)
    there = job.objects.get(MANIFEST_FILE)
    by_crc32c = {_crc32c_text(google_crc32c.value(t.encode())): t for t in texts}
    in_bucket = by_crc32c.get(there.crc32c) if there else None
    if read_text(path) not in texts:
        if not destination:
            _read_earlier(job, written)
        write_text(path, in_bucket or texts[0])
    if destination:
        if not in_bucket:
            destination.upload(path, measure(path))
        destination.check_none_passed_over()
    images = _count(sum(facts["examples"].values()), "image")
    shards = f"{_count(len(job.shards), 'shard')} ({_size(facts['bytes'])})"
    what = f"{images} in {shards} in {job.place}"
    advice = f": give the model --data_dir={job.place}" if destination else ""
    logging.info(f"The data set is complete: {what}{advice}.")


# ---------------------------------------------------------------------------------
# 11. The command line, the functions of the script of 2017, locks, signals


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROCESSOR_LIMIT = "/sys/fs/cgroup/cpu.max"  # as a container sees it; cgroup v2


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for: the flags, checked, and the client."""

    raw_data_dir: str | os.PathLike[str] | None
    gcs_upload: bool
    gcs_project: str | None
    gcs_output_path: str | None
    local_scratch_dir: str | os.PathLike[str] | None
    client: storage.Client | None = None
    num_workers: int | None = None
    training_shards: int = TRAINING_SHARDS
    validation_shards: int = VALIDATION_SHARDS
    keep_local_shards: bool = True
    task_index: int | None = None
    task_count: int = 1
    fake_imagenet: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_types(**{n: v for n, v in vars(self).items() if n != "client"})
        with trying_to("find", "the working directory", is_input=True):
            problems = [problem for holds, problem in self._checks() if not holds]
        with _collecting(problems):
            if self.gcs_upload:
                GcsPath.parse(self.gcs_output_path or "")
        if problems:
            raise InvalidInputError(*problems)

    @functools.cached_property  # not affected by a later change of directory
    def raw_dir(self) -> str:
        return os.path.abspath(os.path.expanduser(self.raw_data_dir or ""))

    @functools.cached_property
    def scratch_dir(self) -> str:
        given = self.local_scratch_dir or os.path.join(self.raw_dir, "tf_records")
        return os.path.abspath(os.path.expanduser(given))

    @property
    def workers(self) -> int:
        """As given, or the processors that this process, or its container, may use."""
        number = len(os.sched_getaffinity(0))
        with contextlib.suppress(OSError, ValueError):  # no limit: no file, or 'max'
            quota, period = map(int, pathlib.Path(PROCESSOR_LIMIT).read_text().split())
            number = min(number, math.ceil(quota / period))
        return self.num_workers or max(1, number)

    def is_own(self, shard: Shard) -> bool:
        """Whether a shard, of either split, is for this task."""
        return shard.index % self.task_count == (self.task_index or 0)

    def _checks(self) -> Iterator[tuple[object, str]]:
        """Pairs what must hold with what to say if it does not."""
        raw = self.raw_data_dir or ""
        scratch = self.local_scratch_dir or self.scratch_dir
        fault = _directory_fault(raw, self.raw_dir, is_output=self.fake_imagenet)
        must = "must be the directory of the raw ImageNet"
        yield not fault, f"--raw_data_dir={raw} {must}, but {fault}."
        if self.local_scratch_dir or not fault:
            fault = _directory_fault(scratch, self.scratch_dir, is_output=True)
            must = "must be a local directory to write to"
            yield not fault, f"--local_scratch_dir={scratch} {must}, but {fault}."
        taken = [os.path.realpath(f"{self.raw_dir}/{split}") for split in SPLITS]
        own = [os.path.realpath(f"{self.scratch_dir}/{split}") for split in SPLITS]
        is_apart = all(os.path.commonpath(p) not in taken for p in zip(taken, own))
        must = f"must not be --raw_data_dir, or in its {' or '.join(SPLITS)}"
        yield is_apart, f"--local_scratch_dir={scratch} {must}."
        needed = "must be given for the upload (or pass --nogcs_upload)"
        yield self.gcs_project or not self.gcs_upload, f"--project {needed}."
        stays = self.keep_local_shards or self.gcs_upload
        yield stays, "--nokeep_local_shards needs an upload: drop --nogcs_upload."
        for flag in "num_workers", "training_shards", "validation_shards", "task_count":
            value = getattr(self, flag)
            is_valid = value == getattr(Options, flag) or 0 < (value or 0) < 100_000
            yield is_valid, f"--{flag} must be from 1 to 99,999; found {value}."
        tasks = range(self.task_count) if self.task_count > 1 else (None, 0)
        must = "must be from 0 to --task_count - 1"
        yield self.task_index in tasks, f"--task_index {must}; found {self.task_index}."
        yield os.path.isfile(__file__), f"The script must be a file; found {__file__}."


def _directory_fault(given: StrPath, path: str, is_output: bool) -> str:
    """Says why a directory cannot be used; one for output may still be missing."""
    if not given or "://" in str(given):
        return "it is a URL" if given else "none is given"
    place = str(nearest_existing(path))
    mode = os.W_OK | os.X_OK if is_output else os.X_OK
    if not os.path.isdir(place) or not os.access(place, mode, effective_ids=True):
        return f"{place} is no {'writable' if is_output else 'accessible'} directory"
    return "" if is_output or place == path else f"{path} does not exist"


def check_types(**values: object) -> None:
    """Refuses arguments of other types than the flags they stand for."""
    types = {"string": str, "int": int, "bool": bool}
    for name, value in values.items():
        kind = FLAGS["project" if name == "gcs_project" else name].flag_type()
        is_path = name.endswith("_dir") and isinstance(value, os.PathLike)
        if not (value is None or is_path or isinstance(value, types[kind])):
            raise InvalidInputError(f"{name} must be of type {kind}; found {value!r}.")


def convert_to_tf_records(
    raw_data_dir: StrPath, local_scratch_dir: StrPath
) -> tuple[list[str], list[str]]:
    """Writes all shards, as `run` does; returns the paths, in order, of both splits."""
    directory = Options(raw_data_dir, False, None, None, local_scratch_dir).scratch_dir
    run(raw_data_dir, gcs_upload=False, local_scratch_dir=local_scratch_dir)
    paths = [shard_path(shard, directory) for shard in plan_shards(Dataset())]
    return paths[:TRAINING_SHARDS], paths[TRAINING_SHARDS:]


def upload_to_gcs(
    training_records: Sequence[StrPath],
    validation_records: Sequence[StrPath],
    gcs_output_path: str,
    gcs_project: str | None,
    client: storage.Client | None = None,
) -> None:
    """Uploads the shards that are not there, under their base names.

    Raises:
      InvalidInputError: A ValueError: a path that is not a file, or not gs://....
      RunError: What stopped the upload; what has arrived stays.
    """
    check_types(gcs_output_path=gcs_output_path, gcs_project=gcs_project)
    path_of: dict[str, str] = {}
    for path in map(os.fsdecode, (*training_records, *validation_records)):
        name = os.path.basename(path)
        if name in path_of or name == MANIFEST_FILE or not os.path.isfile(path):
            must = f"be files of different names, none of them {MANIFEST_FILE}"
            raise InvalidInputError(f"Shards must {must}; found {path}.")
        path_of[name] = path
    with contained():
        place = GcsPath.parse(gcs_output_path or "")
        destination = Destination(place, gcs_project, client)
        there = destination.list_objects()
        stamps = {name: measure(path) for name, path in path_of.items()}
        left = [n for n, s in stamps.items() if not s.same_bytes(there.get(n))]
        with threads_of(PARALLEL_UPLOADS, destination.stopping) as threads:
            list(threads.map(lambda n: destination.upload(path_of[n], stamps[n]), left))
        destination.check_none_passed_over()


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Leaves the caller's process as it was, and says in one line what fails."""
    with contextlib.ExitStack() as stack:
        for logger in map(python_logging.getLogger, QUIET_LOGGERS):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(python_logging.ERROR)
        root = python_logging.root  # absl adds a handler if there is none
        stack.callback(setattr, root, "handlers", root.handlers[:])
        if NO_BUCKET_METADATA not in os.environ:
            os.environ[NO_BUCKET_METADATA] = "1"
            stack.callback(os.environ.pop, NO_BUCKET_METADATA)
        try:
            yield
        except (OSError, MemoryError, RuntimeError) as error:
            # No process can be started, or no thread.
            is_thread = str(error) == "can't start new thread"
            if is_thread or isinstance(error, BlockingIOError):
                raise MachineError(TOO_MANY_THREADS) from error
            if isinstance(error, RuntimeError):
                raise
            path = getattr(error, "filename", None) or "what is needed"
            raise refusal("use", path, error) from error


@contextlib.contextmanager
def locked(options: Options) -> Iterator[None]:
    """Keeps a second run out of the scratch directory, but not the other tasks."""
    scratch_dir, tasks = pathlib.Path(options.scratch_dir), f"-of-{options.task_count}"
    is_new = not scratch_dir.exists()
    own = scratch_dir / f".lock-{options.task_index or 0}{tasks}"
    with trying_to("write", own, is_input=True):
        scratch_dir.mkdir(parents=True, exist_ok=True)
        own.touch()  # before others are looked for
    others = [p for p in scratch_dir.glob(".lock-*") if not p.name.endswith(tasks)]
    with contextlib.ExitStack() as stack:
        for path in (own, *others):
            file = stack.enter_context(path.open("ab+", 0))
            kind = fcntl.LOCK_EX if path == own else fcntl.LOCK_SH
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                what = f"Another run is writing to {scratch_dir}: wait until it ends,"
                remedy = "or choose another --local_scratch_dir."
                raise RunError(f"{what} {remedy}", may_pass=True) from None
            except OSError as error:  # some network file systems cannot
                what = f"Cannot lock {path} ({error.strerror})"
                logging.warning(f"{what}: do not run two at once.")
        try:
            yield
        except InvalidInputError:
            if is_new:  # leave nothing where nothing was done
                own.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # there is something else
                    scratch_dir.rmdir()
            raise


def main(_: Sequence[str]) -> None:
    """Runs the command; ends the process with the exit status of the manual."""
    logging.get_absl_handler().setFormatter(_LogFormatter())
    global has_live_line
    has_live_line = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    try:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup SIGHUP
                signal.signal(number, _raise_stopped)
        if FLAGS.help or FLAGS.version:
            _answer()
        names = [field.name for field in dataclasses.fields(Options)]
        options: dict[str, Any] = {n: FLAGS[n].value for n in names if n in FLAGS}
        run(gcs_project=FLAGS.project, **options)
        _exit(0)
    except (InvalidInputError, RunError) as error:
        _exit(os.EX_TEMPFAIL if getattr(error, "may_pass", False) else 1, *error.args)
    except ImportError as error:
        _exit(1, f"{error}. Run: {INSTALL}")
    except Stopped as stopped:
        number = stopped.args[0]
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        _exit(128 + number, f"Stopped by {name}. {RERUN}")


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the flags, unless one asks for help: absl's own would exit with 1."""
    asks_help = not {"-h", "-?", "--help", "--helpfull"}.isdisjoint(arguments)
    try:
        rest = FLAGS(arguments[:1] if asks_help else arguments)
        if rest[1:]:
            raise ValueError(f"All arguments must be flags; found {rest[1]!r}.")
    except (flags.Error, ValueError, OSError) as error:
        problem = str(error).removeprefix("ERROR:: ")
        sys.exit(f"FATAL Flags parsing error: {problem}\nSee --help.")
    FLAGS["help"].value = asks_help
    return rest


def _answer() -> NoReturn:
    """Prints the manual or the version, and ends."""
    usage = "Usage: python3 imagenet_to_gcs.py --raw_data_dir=DIRECTORY [flags]\n"
    own_flags = FLAGS.module_help(sys.modules[__name__]).partition(":\n")[2]
    manual = f"{usage}\n{__doc__}\nFlags:\n{own_flags}{INHERITED_FLAGS}"
    with trying_to("write", "to stdout"), contextlib.suppress(BrokenPipeError):
        print(manual if FLAGS.help else f"imagenet_to_gcs.py {__version__}", flush=True)
    _exit(0)


class Stopped(BaseException):
    """A signal that ends the run: Ctrl-C, SIGHUP, or SIGTERM, such as preemption."""


def _ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)  # SIG_IGN can print a race of two


def _raise_stopped(number: int, _: object) -> NoReturn:
    _ignore_signals()  # further ones change nothing
    raise Stopped(signal.Signals(number))


def _exit(status: int, *errors: str) -> NoReturn:
    """Ends the process at once, whatever hangs; the workers see it, and end, too."""
    _ignore_signals()
    for line in errors:
        logging.error(line)
    logging.flush()
    os._exit(status)


class _LogFormatter(python_logging.Formatter):
    """Formats '2026-11-22 07:10:33 WARNING: ...', one line whatever a file's name."""

    def format(self, record: python_logging.LogRecord) -> str:
        draw_line("")
        level = f"{record.levelname}: " if record.levelno > python_logging.INFO else ""
        time_of_day = self.formatTime(record, "%Y-%m-%d %H:%M:%S")
        return f"{time_of_day} {level}{escaped(record.getMessage())}"


def _open_closed_streams() -> None:
    """Restarts the command with /dev/null in place of each standard stream it lacks."""
    # Otherwise, the next file to be opened would become stderr and receive the log.
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    if None in (sys.stdin, sys.stdout, sys.stderr):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# ---------------------------------------------------------------------------------
# A. Tars: the images of archives that were never extracted


MAX_TAR_FILLING = 2**20  # empty bytes after the last file; tar writes up to 10 KiB
# The header of a plain file after its name (100 bytes): the numbers must be octal, for
# tarfile stops at others, and the name has no prefix.
# https://www.gnu.org/software/tar/manual/html_node/Standard.html
PLAIN_HEADER = re.compile(
    rb"(?:[0-7]{6}[0-7 ][ \0]){3}"  # mode and owner
    rb"([0-7]{11})[ \0][0-7]{11}[ \0]([0-7]{6})\0 "  # size, time, checksum
    rb"[0\0].{172}(?:[0-7]{7}[ \0]|\0{8}){2}\0.{166}",  # type, device
    re.DOTALL,
)
Places: TypeAlias = dict[str, tuple[int, int]]  # offset and size of files by path


def list_tar(tar: Tar) -> tuple[TarFingerprint, Places]:
    """Tells a tar's fingerprint, and where its files are: the last of each name."""
    found: Places = {}
    with trying_to("list the tar", tar.place, True), open_file(tar.path) as file:
        descriptor = file.fileno()
        # Reading ahead between distant headers makes a listing 1.2 times slower.
        with contextlib.suppress(OSError):  # not everywhere possible
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        fingerprint = tar_fingerprint(os.fstat(descriptor))
        position, end = tar.start, tar.end or fingerprint[1]
        while position + tarfile.BLOCKSIZE <= end:
            header = os.pread(descriptor, tarfile.BLOCKSIZE, position)
            if plain := _plain_file(header):
                name, size = plain
                offset = position + tarfile.BLOCKSIZE
                found[_normalized(name)] = offset, size
            elif any(header) and (member := _read_member(descriptor, position, end)):
                name, target = map(_normalized, (member.name, member.linkname))
                offset = position + member.offset_data
                size = 0 if member.type in b"123456" else member.size  # no files
                if member.isreg():
                    found[name] = offset, size
                elif member.islnk() and target in found:
                    found[name] = found[target]
                elif not (member.isdir() or HIDDEN.match(name)):
                    problem = f"{name} in it is no plain file; extract the tar instead"
                    raise OSError(errno.EINVAL, problem)
            else:
                break
            position = offset + size + -size % tarfile.BLOCKSIZE
        _check_end(descriptor, position, end, is_start=not found)
    return fingerprint, found


def _plain_file(header: bytes) -> tuple[str, int] | None:
    """Reads name and size of a plain file, as nearly all are; faster than tarfile."""
    plain = PLAIN_HEADER.fullmatch(header, 100)
    name = header[:100].partition(b"\0")[0]
    if not plain or name.endswith(b"/"):  # a directory, in old tars
        return None
    # The low half of Adler-32 is 1 plus the sum of the bytes, modulo 65,521.
    total = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
    if total != (int(plain[2], 8) - 8 * ord(" ") + 1) % 65521:
        return None
    return os.fsdecode(name), int(plain[1], 8)


def _read_member(descriptor: int, position: int, end: int) -> tarfile.TarInfo | None:
    """Reads a member with tarfile, from a copy of its headers and metadata.

    Its offsets are from `position`; None if it is damaged, or they take over 1 MiB.
    """
    errors = tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError
    for num_bytes in (2**11, 2**20):  # the first is enough for most
        piece = os.pread(descriptor, min(num_bytes, end - position), position)
        with contextlib.suppress(*errors):
            tar = tarfile.TarFile(fileobj=io.BytesIO(piece))
            member = tar.next()
            # Some versions go on after what they refuse, such as a negative size.
            if member and member.size >= 0 and (not member.offset or tar.pax_headers):
                break
    else:
        return None
    headers = piece[: member.offset_data]
    if tar.pax_headers or member.sparse is not None or b"GNU.sparse." in headers:
        problem = "is sparse, or follows a global header; extract the tar instead"
        raise OSError(errno.EINVAL, f"{member.name} in it {problem}")
    return member


def _normalized(name: str) -> str:
    """The path to which a member is extracted."""
    return os.path.normpath(f"/{name}").lstrip("/") if "/" in name else name


def _check_end(descriptor: int, position: int, end: int, is_start: bool) -> None:
    """Checks that a tar ends in empty blocks, and the file soon after it.

    A damaged header ends the list of members, too, and so does a hole in a download.
    """
    num_bytes = max(0, min(end - position, MAX_TAR_FILLING + 1))
    rest = os.pread(descriptor, num_bytes, min(position, end))
    if is_start and rest.lstrip().startswith(b"<"):
        problem = "it is not a tar but a web page; log in first"
    elif len(rest) < tarfile.BLOCKSIZE:
        problem = "it is cut short"
    elif any(rest) or len(rest) > MAX_TAR_FILLING:
        problem = f"it is damaged, compressed, or not one tar, at byte {position:,}"
    else:
        return
    raise OSError(errno.EINVAL, f"{problem}. Download it again; compare its checksum")


# ---------------------------------------------------------------------------------
# B. A fake ImageNet: a demonstration if you have no ImageNet yet


FAKE_TRAINING_IMAGES = 2048
FAKE_VALIDATION_IMAGES = 256
FAKE_SYNSETS = tuple(f"n{90_000_000 + i}" for i in range(IMAGENET_CLASSES))
FAKE_MARK = ".fake_imagenet"  # a file that marks the directory as a fake


def make_fake_imagenet(options: Options, pool: Pool) -> None:
    """Generates images for 1,024 and 128 shards, of 1,000 synsets not in WordNet."""
    if has_fake(options):
        return
    root = pathlib.Path(options.raw_dir)
    paths = [*_fake_paths(root)]
    logging.info(f"Generating {_count(len(paths), 'fake image')} in {root}.")
    with trying_to("write", root, is_input=True):
        root.mkdir(parents=True, exist_ok=True)
        (root / FAKE_MARK).touch()
    draw = functools.partial(pool.call, draw_fake_image)
    say = lambda: f"Still generating fake images in {root}."
    with reporting(say), threads_of(2 * options.workers) as threads:
        list(threads.map(draw, paths, itertools.count()))
    labels = "".join(f"{synset}\n" for synset in FAKE_SYNSETS[:FAKE_VALIDATION_IMAGES])
    write_text(str(root / LABELS_FILE), labels)  # last: all is there


def has_fake(options: Options) -> bool:
    """Whether the raw directory is a whole fake; refuses one with anything else."""
    root = options.raw_dir
    found = {entry.name for entry in _scan(root)} if os.path.isdir(root) else set()
    found.discard(os.path.relpath(options.scratch_dir, root).split(os.sep)[0])
    ours = {path.name for path in _fake_paths(pathlib.Path(root))}
    images = pathlib.Path(root).glob("[tv]*/**/[!.]*.JPEG")
    # The mark may be left from an earlier fake, and all else be of another data set.
    if found and not (FAKE_MARK in found and all(path.name in ours for path in images)):
        must = "must be empty or missing for --fake_imagenet; it contains"
        problem = f"--raw_data_dir={root} {must} {_some(sorted(found))}."
        raise InvalidInputError(f"{problem} Choose another directory.")
    return LABELS_FILE in found


def _fake_paths(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for i in range(FAKE_TRAINING_IMAGES):
        number, synset = i // IMAGENET_CLASSES, FAKE_SYNSETS[i % IMAGENET_CLASSES]
        yield root / TRAINING_DIRECTORY / synset / f"{synset}_{number}.JPEG"
    for i in range(1, FAKE_VALIDATION_IMAGES + 1):
        yield root / VALIDATION_DIRECTORY / f"ILSVRC2012_val_{i:08d}.JPEG"


def draw_fake_image(path: pathlib.Path, seed: int) -> None:
    """Draws grainy clouds of color, 500 x 375: a JPEG of 30 to 100 KB."""
    import numpy as np
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    clouds = tf.image.resize(rng.integers(0, 256, (6, 8, 3)), (375, 500), "bicubic")
    grain = rng.integers(-8, 9, (375, 500, 1), np.int8)
    jpeg = tf.io.encode_jpeg(tf.saturate_cast(clouds + grain, tf.uint8))
    with _complete_or_absent(str(path)) as temporary_path:  # a full disk is named
        pathlib.Path(temporary_path).write_bytes(jpeg.numpy())


if __name__ == "__main__":
    if sys.argv[1:2] == [AS_HELPER]:
        _fork_workers([int(number) for number in sys.argv[2:]])
    _open_closed_streams()
    app.run(main, flags_parser=parse_flags)
