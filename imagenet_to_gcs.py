#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
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
      --raw_data_dir=$IMAGENET_HOME --local_scratch_dir=$IMAGENET_HOME/tf_records

What goes in, under --raw_data_dir:

    train/n01440764/n01440764_18.JPEG       1,281,167 images, one directory per synset
    validation/ILSVRC2012_val_00000001.JPEG    50,000 images
    synset_labels.txt              line i is the synset of the i-th validation image

The tars of ImageNet are read in place, too, without extracting them: appendix A.

What comes out, under --local_scratch_dir and, flat, under --gcs_output_path:

    train/train-00000-of-01024                 1,024 shards
    validation/validation-00000-of-00128         128 shards
    manifest.json                              written last: the data set is complete

A shard is a TFRecord file; a record is a tf.train.Example of nine features:

    image/height, image/width   int64   pixels
    image/colorspace            bytes   RGB
    image/channels              int64   3
    image/class/label           int64   1 to 1000, the rank among the sorted synsets
    image/class/synset          bytes   n01440764
    image/format                bytes   JPEG
    image/filename              bytes   n01440764_18.JPEG
    image/encoded               bytes   the file as it is; a PNG or a CMYK JPEG is
                                        encoded again, as an RGB JPEG

The same raw directory gives the same bytes on every machine, with any number of
workers, however often the run was interrupted: rerun the same command to resume.

There are two kinds of error. InvalidInputError lists what must be fixed before the
first image; nothing was done. RunError is what stopped a run; finished shards are kept.

Exit status: 0 if all is done; 1 if something is wrong, with a line for each problem;
130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import gc
import hashlib
import importlib.util
import itertools
import json
import logging as python_logging
import math
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import random
import re
import shutil
import signal
import stat
import struct
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("imagenet_to_gcs.py needs Python 3.10 or newer.")
try:
    import google_crc32c
    from absl import app, flags, logging
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"{error}. Run: python3 -m pip install -r requirements.txt")

if TYPE_CHECKING:
    import numpy
    from google.api_core import retry
    from google.cloud import storage

__version__ = "2.0.0"

LABELS_FILE = "synset_labels.txt"
MANIFEST_FILE = "manifest.json"

TRAINING_SHARDS = 1024
VALIDATION_SHARDS = 128

TRAINING_DIRECTORY = "train"
VALIDATION_DIRECTORY = "validation"


FLAGS = flags.FLAGS

flags.DEFINE_string("project", None, "Google Cloud project of the upload.")
flags.DEFINE_string(
    "gcs_output_path", None, "Where to upload to: gs://bucket or gs://bucket/directory."
)
flags.DEFINE_string(
    "local_scratch_dir",
    None,
    "Directory to write the shards to. Default: tf_records under --raw_data_dir.",
)
flags.DEFINE_string(
    "raw_data_dir",
    None,
    "The raw ImageNet: a directory with train/, validation/ and synset_labels.txt.",
)
flags.DEFINE_bool("gcs_upload", True, "Upload the shards, or only write them.")
flags.DEFINE_integer(
    "num_workers",
    None,
    "Number of encoding processes. Default: the processors this process may use.",
)
flags.DEFINE_integer("training_shards", TRAINING_SHARDS, "Number of training shards.")
flags.DEFINE_integer(
    "validation_shards", VALIDATION_SHARDS, "Number of validation shards."
)
flags.DEFINE_bool(
    "fake_imagenet",
    False,
    "If --raw_data_dir is empty or missing, generate a small fake ImageNet there first.",
)
flags.DEFINE_bool(
    "keep_local_shards", True, "Keep shards on the local disk once they are uploaded."
)
flags.DEFINE_integer(
    "task_index", None, "Which of --task_count machines this is, counted from 0."
)
flags.DEFINE_integer(
    "task_count", 1, "Number of machines that share the work, each with its own index."
)
flags.DEFINE_bool(
    "dry_run", False, "Check everything, say what would be done, and exit."
)
flags.DEFINE_bool("version", False, "Print the version and exit.")


class InvalidInputError(ValueError):
    """Something in the input that must be fixed; nothing was done.

    Attributes:
      problems: One line each: what must hold, where, what was found, what to do.
    """

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class RunError(RuntimeError):
    """A run that had to stop; the message is one line with the cause and a remedy."""


def open_regular(path: str) -> BinaryIO:
    """Opens a file for unbuffered reading; never waits for the writer of a pipe.

    Raises:
      OSError: It cannot be opened, or is a directory, a pipe or a device.
    """
    file_descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file_descriptor).st_mode):
        os.close(file_descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return open(file_descriptor, "rb", buffering=0)


@contextlib.contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Adds what keeps the run from beginning to a list, instead of raising it."""
    try:
        yield
    except InvalidInputError as error:
        problems.extend(error.problems)
    except RunError as error:
        problems.append(str(error))


# ---------------------------------------------------------------------------------
# 1. Raw images: what is in --raw_data_dir


IMAGE_SUFFIX = ".JPEG"
TRAINING_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
LISTING_THREADS = 2  # for cold disks; with 8, a listing from memory is 1.7 x as slow

# The size of ImageNet-1k (ILSVRC 2012), https://image-net.org/challenges/LSVRC/2012
IMAGENET_SYNSETS = 1000
IMAGENET_TRAINING_IMAGES = 1_281_167
IMAGENET_VALIDATION_IMAGES = 50_000
IMAGENET_SMALLEST_CLASS = 732  # training images; the largest has 1,300


class RawImage(NamedTuple):
    """One image of the raw data set, not yet read.

    There are 1.3 million, and each goes to a worker: a tuple takes a third of a
    dataclass's time to make, and half of it to pickle.

    Attributes:
      source: The directory or the tar that holds it.
      filename: Base name, `n01440764_18.JPEG`.
      synset: WordNet id of its class, `n01440764`.
      label: 1-based rank of the synset among all synsets; 0 until it is known.
      num_bytes: Size of the image.
      version: Of its file, or of the tar that holds it; see `file_version`.
      offset: Of its first byte in the tar; None for a file in a directory.
    """

    source: str
    filename: str
    synset: str
    label: int
    num_bytes: int
    version: int | tuple[int, int, int]
    offset: int | None = None

    @property
    def path(self) -> str:
        return os.path.join(self.source, self.filename)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageSource:
    """A directory or a tar of images of one class, or of the validation split.

    Attributes:
      path: Of the directory, of the tar, or of the tar that holds the tar.
      synset: Of all its images; empty where they are of many classes.
      start: Where the tar begins in the file, bytes; None for a directory.
      end: Where it ends; None for the end of the file.
    """

    path: str
    synset: str = ""
    start: int | None = None
    end: int | None = None

    def list(self, label: int = 0) -> list[RawImage]:
        """Lists `*.JPEG` by name, without hidden files (`._x.JPEG`, left by a Mac).

        Raises:
          InvalidInputError: It cannot be listed, or it is a damaged tar.
        """
        is_tar = self.start is not None
        images = self._list_tar(label) if is_tar else self._list_directory(label)
        return sorted(images, key=lambda image: image.filename)

    def _list_directory(self, label: int) -> Iterable[RawImage]:
        for entry in _scan(self.path):
            if _is_image_name(entry.name):
                try:
                    status = entry.stat()
                    size, version = status.st_size, file_version(status)
                except OSError:  # a dangling link: read, it says so
                    size = version = 0
                yield RawImage(self.path, entry.name, self.synset, label, size, version)

    def _list_tar(self, label: int) -> Iterable[RawImage]:
        images = {}  # a name that comes again replaces the first, as in extracting
        version = tar_version(os.stat(self.path))
        member_of: dict[str, str] = {}
        name = f"{self.synset}.tar" if self.start else ""
        for member in list_tar(self.path, self.start or 0, self.end, name):
            filename = os.path.basename(member.name)
            if _is_image_name(filename):
                first = member_of.setdefault(filename, member.name)
                if os.path.normpath(first) != os.path.normpath(member.name):
                    raise InvalidInputError(
                        f"Images of a class must have different names; found {first} "
                        f"and {member.name} in {self.path}."
                    )
                images[filename] = RawImage(
                    self.path,
                    filename,
                    self.synset,
                    label,
                    member.num_bytes,
                    version,
                    member.offset,
                )
        return images.values()


def file_version(status: os.stat_result) -> int:
    """What tells an image from a later one of its name and size: microseconds.

    An int of nanoseconds would take 16 bytes more, 1.3 million times.
    """
    return status.st_mtime_ns // 1000


def tar_version(status: os.stat_result) -> tuple[int, int, int]:
    """What tells a tar from a later one of its name: inode, bytes, nanoseconds."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_image_name(filename: str) -> bool:
    return filename.endswith(IMAGE_SUFFIX) and not filename.startswith(".")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The raw data set: its images by split, each split sorted by path.

    Attributes:
      synsets: Sorted; the label of `synsets[i]` is i + 1, and 0 is left to the
        "background" class of the models that read the shards.
      layout: Where the images of each split are, in words.
    """

    synsets: tuple[str, ...]
    training: list[RawImage]
    validation: list[RawImage]
    layout: str

    @property
    def images(self) -> Iterable[RawImage]:
        return itertools.chain(self.training, self.validation)

    @property
    def num_bytes(self) -> int:
        return sum(image.num_bytes for image in self.images)


EMPTY_DATASET = Dataset((), [], [], "")


def read_dataset(raw_data_dir: str) -> Dataset:
    """Lists and labels all images of a raw directory, reading none.

    Raises:
      InvalidInputError: The directory cannot give a data set; all problems at once.
    """
    problems: list[str] = []
    classes: list[ImageSource] = []
    training: list[RawImage] = []
    validation: list[RawImage] = []
    with _no_garbage_collection():
        with _collecting(problems):
            classes = find_classes(raw_data_dir)
        with _collecting(problems):
            validation = list_validation(raw_data_dir)
        trained = {class_.synset for class_ in classes}
        synsets = tuple(sorted(trained.union(image.synset for image in validation)))
        label_of = {synset: label for label, synset in enumerate(synsets, start=1)}
        with _collecting(problems):
            training = _list_training(classes, label_of)
    if problems:
        raise InvalidInputError(*problems)
    validation = [image._replace(label=label_of[image.synset]) for image in validation]
    layout = (
        f"training images in {_layout(training)}, "
        f"validation images in {_layout(validation)}"
    )
    return Dataset(synsets, training, validation, layout)


def _layout(images: Sequence[RawImage]) -> str:
    """Says in what images lie: 'a directory', '60 directories', 'a tar'."""
    num_sources = len({image.source for image in images})
    if images[0].offset is None:
        return "a directory" if num_sources == 1 else f"{num_sources:,} directories"
    return "a tar" if num_sources == 1 else f"{num_sources:,} tars"


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Holds the collector while millions of objects are made, then lets them be.

    Without it, listing 1.3 million images takes 2.5 times as long, and importing
    TensorFlow 1.2 times.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def find_classes(raw_data_dir: str) -> list[ImageSource]:
    """Finds the source of each class, in the order of their paths.

    The first of these that is there: the directories `train/<synset>`, the tars
    `train/<synset>.tar`, the tar of such tars `ILSVRC2012_img_train.tar`.

    Raises:
      InvalidInputError: None is there, or an extraction stopped half way.
    """
    training_dir = os.path.join(raw_data_dir, TRAINING_DIRECTORY)
    whole_tar = os.path.join(raw_data_dir, TRAINING_TAR)
    directories: dict[str, ImageSource] = {}
    tars: dict[str, ImageSource] = {}
    if os.path.isdir(training_dir) or not os.path.isfile(whole_tar):
        for entry in _scan(training_dir):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                directories[entry.name] = ImageSource(entry.path, entry.name)
            elif entry.name.endswith(".tar"):
                synset = entry.name.removesuffix(".tar")
                tars[synset] = ImageSource(entry.path, synset, start=0)
    classes = directories or tars
    if directories:
        _check_extracted(training_dir, directories, tars)
    if os.path.isfile(whole_tar):
        in_whole_tar = _classes_in_tar(whole_tar)
        if classes:  # by name only: its images are 1.3 million
            left = {s: c for s, c in in_whole_tar.items() if s not in classes}
            _check_extracted(whole_tar, classes, left)
        classes = classes or in_whole_tar
    if not classes:
        raise InvalidInputError(_no_images(training_dir, f"*/*{IMAGE_SUFFIX}"))
    return sorted(classes.values(), key=lambda class_: class_.synset + os.sep)


def _classes_in_tar(tar_path: str) -> dict[str, ImageSource]:
    classes = {}
    for member in list_tar(tar_path):
        filename = os.path.basename(member.name)
        if filename.endswith(".tar") and not filename.startswith("."):
            synset = filename.removesuffix(".tar")
            end = member.offset + member.num_bytes
            classes[synset] = ImageSource(tar_path, synset, member.offset, end)
    if not classes:
        raise InvalidInputError(f"No tars match *.tar in {tar_path}.")
    return classes


def _check_extracted(
    place: str,
    classes: Mapping[str, ImageSource],
    packed: Mapping[str, ImageSource],
) -> None:
    """Checks that tars were extracted all and wholly, where others were.

    Raises:
      InvalidInputError: An extraction stopped half way.
    """
    left = [synset for synset in sorted(packed) if synset not in classes]
    for synset in sorted(packed.keys() & classes.keys()):
        images = {image.filename for image in packed[synset].list()}
        if images - {image.filename for image in classes[synset].list()}:
            left.append(synset)
    if left:
        raise InvalidInputError(
            f"All classes in {place} must be extracted, or none; found "
            f"{_count(len(left), 'class')} whose images are not all in directories: "
            f"{_some(left)}. Extract these too, or remove the directories, and the "
            "tars are read as they are."
        )


def _list_training(
    classes: Sequence[ImageSource], label_of: Mapping[str, int]
) -> list[RawImage]:
    """Lists the images of all classes, sorted by path.

    Raises:
      InvalidInputError: A class without images, or one that cannot be listed.
    """
    images: list[RawImage] = []
    empty: list[ImageSource] = []
    problems: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(LISTING_THREADS) as threads:
        listings = [threads.submit(c.list, label_of[c.synset]) for c in classes]
    for class_, listing in zip(classes, listings, strict=True):
        with _collecting(problems):
            if not listing.result():
                empty.append(class_)
            images += listing.result()
    if len(problems) > 3:
        problems[3:] = [f"{len(problems) - 3:,} more classes cannot be listed."]
    if empty:
        names = _some([class_.synset for class_ in empty])
        problems.append(
            f"Each class must have images, but {len(empty):,} of "
            f"{_count(len(classes), 'class')} have none: {names}. "
            + _no_images(empty[0].path, f"*{IMAGE_SUFFIX}")
        )
    if problems:
        raise InvalidInputError(*problems)
    return images


def list_validation(raw_data_dir: str) -> list[RawImage]:
    """Lists the validation images by name, with their synsets but without labels.

    From the first of these that is there: `validation/*.JPEG`,
    `validation/<synset>/*.JPEG`, `ILSVRC2012_img_val.tar`. The i-th is of the i-th
    synset in `synset_labels.txt`, which only the second can do without.

    Raises:
      InvalidInputError: None is there, or the label file does not fit.
    """
    validation_dir = os.path.join(raw_data_dir, VALIDATION_DIRECTORY)
    tar_path = os.path.join(raw_data_dir, VALIDATION_TAR)
    labels_path = os.path.join(raw_data_dir, LABELS_FILE)
    place = validation_dir
    problems: list[str] = []
    images: list[RawImage] = []
    with _collecting(problems):
        if os.path.isdir(validation_dir) or not os.path.isfile(tar_path):
            images = ImageSource(validation_dir).list() or _list_folders(validation_dir)
        if not images and os.path.isfile(tar_path):
            place = tar_path
            images = ImageSource(tar_path, start=0).list()
        if not images:
            problems.append(_no_images(place, f"*{IMAGE_SUFFIX}"))
    labels: list[str] = []
    if not (images and images[0].synset) or os.path.exists(labels_path):
        with _collecting(problems):
            labels = read_labels(labels_path)
            if images and len(labels) != len(images):
                problems.append(
                    f"{labels_path} has {_count(len(labels), 'label')} and {place} "
                    f"{_count(len(images), 'image')}; they must be equal in number."
                )
    if problems:
        raise InvalidInputError(*problems)
    return _with_synsets(images, labels, labels_path) if labels else images


def _list_folders(validation_dir: str) -> list[RawImage]:
    """Lists `validation/<synset>/*.JPEG` in the order of the flat layout."""
    images = [
        image
        for entry in _scan(validation_dir)
        if entry.is_dir() and not entry.name.startswith(".")
        for image in ImageSource(entry.path, entry.name).list()
    ]
    return sorted(images, key=lambda image: (image.filename, image.synset))


def _with_synsets(
    images: Sequence[RawImage], labels: Sequence[str], labels_path: str
) -> list[RawImage]:
    for line, (image, label) in enumerate(zip(images, labels, strict=True), start=1):
        if image.synset not in ("", label):
            raise InvalidInputError(
                f"{labels_path} and the folders of {VALIDATION_DIRECTORY}/ must agree; "
                f"line {line:,} says {label}, {image.path} is in {image.synset}."
            )
    return [
        image._replace(synset=label)
        for image, label in zip(images, labels, strict=True)
    ]


def read_labels(labels_path: str) -> list[str]:
    """Reads the synset of each validation image, a line each.

    Windows line ends, a byte order mark and a missing last newline are accepted.

    Raises:
      InvalidInputError: No such file, or a line that is not a single word.
    """
    try:
        text = pathlib.Path(labels_path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{labels_path} must be text in UTF-8; found {error.object[:4]!r} at its "
            "start. Save it as UTF-8."
        ) from error
    except OSError as error:
        raise InvalidInputError(
            f"Cannot read {labels_path}: {error.strerror}. It must hold the synset "
            "of each validation image, a line each, in the order of their names."
        ) from error
    lines = text.removesuffix("\n").split("\n") if text else []
    labels = [line.strip() for line in lines]
    bad = [i for i, label in enumerate(labels) if len(label.split()) != 1]
    if bad:
        raise InvalidInputError(
            f"Line {bad[0] + 1:,} of {labels_path} must be a single synset such as "
            f"n01440764; found {labels[bad[0]][:60]!r}"
            + (f" ({len(bad):,} such lines)." if len(bad) > 1 else ".")
        )
    return labels


# ---------------------------------------------------------------------------------
# 2. Plan: which image goes into which shard

RECORD_FORMAT = 1  # raise it when the same images would give other bytes
RECORD_OVERHEAD = 350  # bytes of a record besides the JPEG, approximately


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One shard as planned, before a byte of it is written.

    Attributes:
      split: `train` or `validation`.
      index: 0-based, below `num_shards`.
      images: In the order of their records; empty if the split is small.
    """

    split: str
    index: int
    num_shards: int
    images: tuple[RawImage, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.num_shards:
            raise ValueError(f"No shard {self.index:,} of {self.num_shards:,}.")

    @property
    def name(self) -> str:
        """Base name of the file and the object: `train-00007-of-01024`."""
        return f"{self.split}-{self.index:05d}-of-{self.num_shards:05d}"

    @property
    def num_bytes(self) -> int:
        """Bytes of the images and, approximately, of the records around them."""
        return sum(image.num_bytes + RECORD_OVERHEAD for image in self.images)

    def digest(self) -> str:
        """Hashes what the records are made of: 64 hexadecimal digits of SHA-256.

        It changes with any image's name, class or size, with their order, and with
        the shard's number. Times are left out, so machines with copies of the raw
        data agree on it.
        """
        return _sha256(
            f"{RECORD_FORMAT}\0{self.name}\n",
            *(
                f"{i.filename}\0{i.synset}\0{i.label}\0{i.num_bytes}\n"
                for i in self.images
            ),
        )

    def versions(self) -> str:
        """Hashes when, and where in their tars, the images were last changed here."""
        return _sha256(*(f"{i.version} {i.offset}\n" for i in self.images))


def _sha256(*lines: str) -> str:
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def plan_shards(
    dataset: Dataset,
    training_shards: int = TRAINING_SHARDS,
    validation_shards: int = VALIDATION_SHARDS,
) -> list[Shard]:
    """Cuts both splits into shards, the training images shuffled with seed 0."""
    training = list(dataset.training)
    random.Random(0).shuffle(training)
    return [
        *_cut(TRAINING_DIRECTORY, training, training_shards),
        *_cut(VALIDATION_DIRECTORY, dataset.validation, validation_shards),
    ]


def _cut(split: str, images: Sequence[RawImage], num_shards: int) -> list[Shard]:
    """Cuts n images into chunks of ceil(n / num_shards); the last ones can be empty.

    5 images in 4 shards: 2, 2, 1, 0.
    """
    size = math.ceil(len(images) / num_shards)
    return [
        Shard(split, i, num_shards, tuple(images[i * size : (i + 1) * size]))
        for i in range(num_shards)
    ]


# ---------------------------------------------------------------------------------
# 3. One image: read ahead, checked, repaired if need be


READ_AHEAD = 32  # images opened before their turn, so also open files, a worker
SLOW_OPEN_SECONDS = 0.0005  # a local disk takes up to 0.1 ms, a network disk 1 ms


@dataclasses.dataclass(frozen=True, slots=True)
class OpenImage:
    """An image that the disk is already fetching, or the error that prevents it."""

    image: RawImage
    file: BinaryIO | OSError

    @classmethod
    def of(cls, image: RawImage) -> OpenImage:
        offset, num_bytes = image.offset or 0, image.num_bytes
        try:
            file = open_regular(_file_of(image))
            file.seek(offset)
        except OSError as error:
            return cls(image, error)
        with contextlib.suppress(OSError):  # not every file system can; 0 means all
            descriptor, advice = file.fileno(), os.POSIX_FADV_WILLNEED
            os.posix_fadvise(descriptor, offset, num_bytes or 1, advice)
        return cls(image, file)

    def read(self) -> bytes:
        """Reads the image, no more than was listed, and closes its file.

        Raises:
          OSError: It cannot be read, or is not the image that was listed.
        """
        if isinstance(self.file, OSError):
            raise self.file
        in_tar = self.image.offset is not None
        left = self.image.num_bytes + (not in_tar)  # one more shows a file that grew
        parts = []
        with self.file as file:
            while left and (part := file.read(left)):  # it may return less than asked
                parts.append(part)
                left -= len(part)
            status = os.fstat(file.fileno())
        data = b"".join(parts)
        version = tar_version(status) if in_tar else file_version(status)
        if (len(data), version) != (self.image.num_bytes, self.image.version):
            raise OSError(errno.ESTALE, "it has changed since the run began")
        return data


def _file_of(image: RawImage) -> str:
    return image.path if image.offset is None else image.source


# They start when the first image is submitted, and serve all shards of a worker.
_openers = concurrent.futures.ThreadPoolExecutor(READ_AHEAD)


def open_ahead(images: Sequence[RawImage]) -> Iterator[OpenImage]:
    """Opens images before their turn, so that the encoding does not wait for the disk.

    Threads open them only where that is slow, as on a network disk: elsewhere, passing
    the GIL around would slow the encoding by a fifth.
    """
    start = time.perf_counter()
    for image in images[:1]:
        with contextlib.suppress(OSError):
            open_regular(_file_of(image)).close()
    if time.perf_counter() - start < SLOW_OPEN_SECONDS:
        yield from _ahead(map(OpenImage.of, images))
    else:
        opening = (_openers.submit(OpenImage.of, image) for image in images)
        yield from (future.result() for future in _ahead(opening))


def _ahead(items: Iterable[Any]) -> Iterator[Any]:
    """Yields items, each of which is drawn `READ_AHEAD` items before its turn."""
    items = iter(items)
    drawn = collections.deque(itertools.islice(items, READ_AHEAD))
    while drawn:
        yield drawn.popleft()
        drawn.extend(itertools.islice(items, 1))


class _ImageError(ValueError):
    """Why an image cannot be decoded, in words."""


def problem_of(image: RawImage, error: Exception) -> str:
    """Words whatever kept an image from its record, in a line that names its file."""
    reason = str(error) if isinstance(error, _ImageError) else repr(error)
    if isinstance(error, FileNotFoundError):
        reason = "a link to nothing" if os.path.islink(image.path) else "it is gone"
    elif isinstance(error, OSError):
        reason = f"{error.strerror}"
    verb = "read" if isinstance(error, OSError) else "decode"
    return f"Cannot {verb} {image.path}: {reason}."


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as it goes into its record.

    Attributes:
      jpeg: A JPEG of 1 or 3 components.
      height, width: Pixels.
      repaired: Whether it was a PNG or a CMYK JPEG and had to be encoded again.
    """

    jpeg: bytes
    height: int
    width: int
    repaired: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Skeleton:
    """The marker segments of a JPEG, without the entropy-coded data between them.

    Attributes:
      jpeg: About 2 KB that declare 8 x 8 pixels: quick to decode, and of little memory.
      height, width, num_components: What the image's frame header declares.
    """

    jpeg: bytes
    height: int
    width: int
    num_components: int


JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"

# FF 00 is a data byte FF, FF FF is filling, FF 01 and FF D0 to FF D7 stand alone and
# change nothing: every other FF begins a segment (ITU-T T.81, B.1.1).
_FILLING = 0xFF
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
_END_MARKER = 0xD9
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

_OVERRUN_BYTES = 1024  # libjpeg reads at most 129 bytes (a table) past a segment's end
_MAX_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_MAX_VALUES = 2**29  # height x width x components; TensorFlow's limit (jpeg_mem.cc)


def encode_image(data: bytes) -> EncodedImage:
    """Checks an image, and makes it a JPEG that every reader can decode.

    Raises:
      _ImageError: A full decode would reject it.
    """
    if data.startswith(PNG_START):
        width, height = struct.unpack(">II", data[16:24].ljust(8, b"\0"))
        _check_values(height, width)
        return _encode_again(data, "PNG")
    skeleton = read_skeleton(data)
    _check_values(skeleton.height, skeleton.width, max(3, skeleton.num_components))
    _check_decodes(skeleton)
    if skeleton.num_components == 4:
        return _encode_again(data, "CMYK JPEG")
    return EncodedImage(data, skeleton.height, skeleton.width)


def read_skeleton(data: bytes) -> Skeleton:
    """Reads the marker segments of a JPEG.

    libjpeg fails on bad segments and on a missing end, never on the data between them:
    it fills in what is broken. So decoding the skeleton gives the verdict on the whole
    image in an eighth of the time.

    Raises:
      _ImageError: It is not a JPEG, or has no frame header or no end.
    """
    if not data.startswith(JPEG_START):
        found = f"not a JPEG (starts with {data[:4]!r})"
        raise _ImageError(found if data else "the file is empty")
    import numpy as np

    values = np.frombuffer(data, np.uint8)
    is_marker = ((values[:-1] == 0xFF) & (values[1:] != 0)).tobytes()
    segments = bytearray(data[:2])
    frame = b""
    last = position = 2  # where the last segment and the last marker end
    while (start := is_marker.find(1, position)) >= 0:
        position = start + 2
        marker = data[start + 1]
        if marker == _FILLING:
            position = start + 1
        elif marker == _END_MARKER:
            break
        elif marker not in _BARE_MARKERS:
            # The length counts its own two bytes; one that says less is damaged, and
            # libjpeg must see it to say so.
            length = int.from_bytes(data[position : position + 2], "big")
            last = position = position + max(2, length)
            segment = data[start:position]
            if marker in _FRAME_MARKERS and not frame:
                frame = segment
                segment = frame[:5] + struct.pack(">HH", 8, 8) + frame[9:]
            segments += segment
    else:
        raise _ImageError("it is cut short: no end marker")
    if len(frame) < 10:
        raise _ImageError("it has no frame header")
    height, width, num_components = struct.unpack_from(">HHB", frame, 5)
    # A segment may hold more than its length says: libjpeg then reads on, and rejects
    # the image only if that many bytes are there.
    segments += data[start : start + 2] + data[last : last + _OVERRUN_BYTES]
    return Skeleton(bytes(segments), height, width, num_components)


def _check_values(height: int, width: int, num_components: int = 3) -> None:
    """Refuses sizes for which a small file would take gigabytes, as a full decode does."""
    declared = f"its header declares {width:,} x {height:,} pixels"
    if max(height, width) > _MAX_SIDE:
        raise _ImageError(f"{declared}; no side may have more than {_MAX_SIDE:,}")
    if not 0 < height * width * num_components < _MAX_VALUES:
        raise _ImageError(
            f"{declared} of {num_components} components; the product must be from 1 "
            f"to {_MAX_VALUES - 1:,}"
        )


def _check_decodes(skeleton: Skeleton) -> None:
    import tensorflow as tf

    def decode() -> None:
        contents = tf.constant(skeleton.jpeg)  # bytes, or 1 for 1.0, would take longer
        tf.raw_ops.DecodeJpeg(contents=contents, ratio=8, acceptable_fraction=1.0)

    try:
        decode()
    except tf.errors.InvalidArgumentError as error:
        raise _ImageError(_reason_of_libjpeg(decode)) from error


def _reason_of_libjpeg(decode: Callable[[], object]) -> str:
    """Decodes again to catch libjpeg's reason, which it only writes to stderr."""
    with tempfile.TemporaryFile() as caught, _stderr_to(caught.fileno()):
        with contextlib.suppress(Exception):
            decode()
        caught.seek(0)
        lines = caught.read().decode(errors="replace").splitlines()
    reasons = [line for line in lines if not re.match(r"[IWEF]\d{4} ", line)]
    return reasons[-1].rstrip(".") if reasons else "libjpeg cannot decode it"


@contextlib.contextmanager
def _stderr_to(file_descriptor: int) -> Iterator[None]:
    """Redirects what C code writes to stderr, which `sys.stderr` does not see."""
    kept = os.dup(2)
    os.dup2(file_descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _encode_again(data: bytes, kind: str) -> EncodedImage:
    """Makes a PNG or CMYK JPEG an RGB JPEG with the pixels of the reference's shards."""
    import tensorflow as tf

    try:
        pixels = tf.io.decode_jpeg(data, channels=3)  # it decodes a PNG as well
    except tf.errors.InvalidArgumentError as error:
        raise _ImageError(f"it is a {kind} that cannot be decoded") from error
    jpeg = tf.io.encode_jpeg(pixels, format="rgb", quality=100).numpy()
    height, width, _ = pixels.shape
    return EncodedImage(jpeg, height, width, repaired=True)


# ---------------------------------------------------------------------------------
# 4. One example: the nine features of a record


def make_example(image: RawImage, encoded: EncodedImage) -> bytes:
    """Serializes a `tf.train.Example`, the same bytes every time.

    Protobuf's map would otherwise be written in an order that changes from run to run.
    A new `Example` filled in place is three times as fast as one made of parts; one
    that is filled again keeps every JPEG in its memory.
    """
    import tensorflow as tf

    example = tf.train.Example()
    feature = example.features.feature
    feature["image/height"].int64_list.value.append(encoded.height)
    feature["image/width"].int64_list.value.append(encoded.width)
    feature["image/colorspace"].bytes_list.value.append(b"RGB")
    feature["image/channels"].int64_list.value.append(3)
    feature["image/class/label"].int64_list.value.append(image.label)
    feature["image/class/synset"].bytes_list.value.append(os.fsencode(image.synset))
    feature["image/format"].bytes_list.value.append(b"JPEG")
    feature["image/filename"].bytes_list.value.append(os.fsencode(image.filename))
    feature["image/encoded"].bytes_list.value.append(encoded.jpeg)
    serialized: bytes = example.SerializeToString(deterministic=True)
    return serialized


# ---------------------------------------------------------------------------------
# 5. One shard: written complete or not at all, with a stamp that says of what

WRITE_BUFFER_BYTES = 2**20
READ_BLOCK_BYTES = 2**20
TEMPORARY_SUFFIX = ".tmp"  # of hidden files, so that no reader's train-* matches
CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # some FUSE file systems


@dataclasses.dataclass(frozen=True, slots=True)
class Stamp:
    """What is known of a finished shard, in the scratch directory or in the bucket.

    A hidden JSON file beside the shard holds it; an object's metadata holds `digest`.

    Attributes:
      digest: `Shard.digest()` of what it was made of; empty if unknown.
      num_examples: How many images it holds.
      num_bytes: Size of the TFRecord file.
      crc32c: Of the file: base64 of 4 big-endian bytes, as Cloud Storage has it.
      num_repaired: How many of its images were encoded again.
      versions: `Shard.versions()` of what it was made of; empty for an object.
      mtime_ns: When the file was last modified; 0 for an object.
    """

    digest: str
    num_examples: int
    num_bytes: int
    crc32c: str
    num_repaired: int = 0
    versions: str = ""
    mtime_ns: int = 0

    def same_bytes(self, other: Stamp) -> bool:
        return (self.num_bytes, self.crc32c) == (other.num_bytes, other.crc32c)


class BadImagesError(InvalidInputError):
    """Images that cannot be used; everything but the shards that hold them is done."""


def shard_path(shard: Shard, scratch_dir: str) -> str:
    """Where a shard goes: `<scratch_dir>/train/train-00007-of-01024`."""
    return os.path.join(scratch_dir, shard.split, shard.name)


def _stamp_path(path: str) -> str:
    """The stamp of `train/train-00007-of-01024`: `train/.train-00007-of-01024.json`."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.json")


def write_records(shard: Shard, temporary_path: str) -> Stamp:
    """Writes the records of a shard to a file; runs in a worker process.

    Raises:
      BadImagesError: All bad images of the shard.
      OSError: The disk cannot hold it.
    """
    import tensorflow  # noqa: F401  # if that fails, no image is to blame

    problems: list[str] = []
    num_repaired = 0
    with open(temporary_path, "wb", buffering=WRITE_BUFFER_BYTES) as file:
        records = RecordWriter(file)
        for opened in open_ahead(shard.images):
            try:
                encoded = encode_image(opened.read())
                example = make_example(opened.image, encoded)
            except Exception as error:  # noqa: BLE001  # of whatever kind, of one image
                problems.append(problem_of(opened.image, error))
                continue
            if not problems:
                records.write(example)
                num_repaired += encoded.repaired
    if problems:
        raise BadImagesError(*problems)
    return Stamp(
        shard.digest(),
        len(shard.images),
        records.num_bytes,
        _crc32c_text(records.crc32c),
        num_repaired,
        shard.versions(),
    )


def write_shard(
    shard: Shard,
    scratch_dir: str,
    write: Callable[[Shard, str], Stamp] = write_records,
    durable: bool = True,
) -> Stamp:
    """Writes a shard and its stamp, or neither.

    Args:
      write: `write_records`, here or in a worker process.
      durable: Whether the shard must survive a loss of power.

    Raises:
      BadImagesError: All bad images of the shard; nothing was written.
      OSError: The scratch directory cannot hold it; nothing was written.
    """
    path = shard_path(shard, scratch_dir)
    forget_stamp(path)  # of another plan
    with _complete_or_absent(path, durable) as temporary_path:
        stamp = write(shard, temporary_path)
        mtime_ns = os.stat(temporary_path).st_mtime_ns
    stamp = dataclasses.replace(stamp, mtime_ns=mtime_ns)
    write_text(_stamp_path(path), json_text(dataclasses.asdict(stamp)))
    return stamp


def read_stamp(path: str) -> Stamp | None:
    """Reads the stamp of a shard, even of one that was removed; None if unreadable."""
    try:
        return Stamp(**json.loads(read_text(_stamp_path(path))))
    except (ValueError, TypeError):
        return None


def forget_stamp(path: str) -> None:
    """Has the next run write a shard again."""
    pathlib.Path(_stamp_path(path)).unlink(missing_ok=True)


def is_as_stamped(path: str, stamp: Stamp) -> bool:
    """Whether a shard has the stamp's size and time; its bytes are not read."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (stamp.num_bytes, stamp.mtime_ns)


def read_crc32c(path: str) -> str:
    """Reads a file for its crc32c, as in `Stamp`."""
    crc32c = 0
    with open_regular(path) as file:
        while block := file.read(READ_BLOCK_BYTES):
            crc32c = google_crc32c.extend(crc32c, block)
    return _crc32c_text(crc32c)


def measure(path: str) -> Stamp:
    """Reads a file for the stamp that it should have; digest and times may be unknown."""
    stamp, crc32c = read_stamp(path), read_crc32c(path)
    if stamp and is_as_stamped(path, stamp) and stamp.crc32c == crc32c:
        return stamp
    return Stamp("", 0, os.path.getsize(path), crc32c)


class RecordWriter:
    """Frames TFRecords and keeps the checksum of the whole file as it grows.

    A record is its length (8 bytes, little-endian), the masked crc32c of these 8
    bytes, the data, and the masked crc32c of the data
    (https://www.tensorflow.org/tutorials/load_data/tfrecord). TensorFlow's own writer
    does not tell the file's checksum, so all 147 GB would have to be read again.

    Attributes:
      num_bytes: Written so far.
      crc32c: Of all of these, unmasked.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.num_bytes = 0
        self.crc32c = 0

    def write(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        for part in (length, _masked_crc32c(length), data, _masked_crc32c(data)):
            self._file.write(part)
            self.num_bytes += len(part)
            self.crc32c = google_crc32c.extend(self.crc32c, part)


def _masked_crc32c(data: bytes) -> bytes:
    crc32c = google_crc32c.value(data)
    rotated = (crc32c >> 15 | crc32c << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def _crc32c_text(crc32c: int) -> str:
    return base64.b64encode(struct.pack(">I", crc32c)).decode()


@contextlib.contextmanager
def _complete_or_absent(path: str, durable: bool = False) -> Iterator[str]:
    """Yields a hidden path to write to, and then gives the file its name.

    Args:
      durable: Whether to wait until the disk has the file. A stamp or a manifest need
        not be: torn by a loss of power it cannot be read, which is as good as absent.
    """
    directory, name = os.path.split(path)
    unique = f"{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}"
    temporary_path = os.path.join(directory, f".{name}.{unique}{TEMPORARY_SUFFIX}")
    os.makedirs(directory, exist_ok=True)
    try:
        yield temporary_path
        if durable:
            _flush(temporary_path)
        os.replace(temporary_path, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary_path)
        if isinstance(error, OSError) and error.filename in (None, temporary_path):
            error.filename = path  # a write does not say to which file
        raise


def _flush(path: str) -> None:
    """Waits until the disk has a file, if the file system can tell."""
    file_descriptor = os.open(path, os.O_WRONLY)  # SMB does not flush for readers
    try:
        os.fsync(file_descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
    finally:
        os.close(file_descriptor)


def json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_text(path: str, text: str) -> None:
    with _complete_or_absent(path) as temporary_path:
        pathlib.Path(temporary_path).write_text(text, encoding="utf-8")


def read_text(path: str) -> str:
    """Reads a small file that this script wrote; empty if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


# ---------------------------------------------------------------------------------
# 6. All shards: the processes that write and the threads that upload

PARALLEL_UPLOADS = 8  # the client's connection pool holds 10
WAITING_SHARDS = 16  # written, but not yet uploaded, before the workers wait
LOG_SECONDS = 10.0
REDRAW_SECONDS = 0.5
SPEED_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What is left to do of a plan, or of a task's share of it.

    Attributes:
      to_write: Shards that are finished neither here nor in the bucket.
      to_upload: Shards that are finished here but are not in the bucket.
      done: Stamps of the others, by name.
    """

    to_write: list[Shard] = dataclasses.field(default_factory=list)
    to_upload: list[tuple[Shard, Stamp]] = dataclasses.field(default_factory=list)
    done: dict[str, Stamp] = dataclasses.field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return not (self.to_write or self.to_upload)

    @property
    def images_to_write(self) -> int:
        return sum(len(shard.images) for shard in self.to_write)


class Progress:
    """Counts what several threads have done, and says how fast they are.

    Attributes:
      images: Written in this run.
      num_bytes: Of the shards written in this run.
      repaired: Images that were encoded again.
      stamps: Of the shards that were written in this run, by name.
      uploaded: Stamps of the shards that were uploaded in this run, by name.
      bad_images: A line for each image whose shard is left out.
    """

    def __init__(self, work: Work, is_uploading: bool):
        self.shards_to_write = len(work.to_write)
        self.images_to_write = work.images_to_write
        num_uploads = len(work.to_write) + len(work.to_upload)
        self.shards_to_upload = num_uploads if is_uploading else 0
        self.images = self.num_bytes = self.repaired = 0
        self.stamps: dict[str, Stamp] = {}
        self.uploaded: dict[str, Stamp] = {}
        self.bad_images: list[str] = []
        self._start = time.monotonic()
        self._history = collections.deque([(self._start, 0, 0, 0)])
        self._lock = threading.Lock()

    def wrote(self, name: str, stamp: Stamp) -> None:
        with self._lock:
            self.stamps[name] = stamp
            self.images += stamp.num_examples
            self.num_bytes += stamp.num_bytes
            self.repaired += stamp.num_repaired

    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-3)

    def line(self) -> str:
        """Says how far the run is, its speed in the last half minute, and the rest."""
        seconds, images, num_bytes, uploads = self._lately()
        parts = []
        if self.shards_to_write:
            percent = math.floor(100 * self.images / max(self.images_to_write, 1))
            parts += [
                f"{len(self.stamps):,} of {_count(self.shards_to_write, 'shard')}",
                f"{self.images:,} of {_count(self.images_to_write, 'image')} ({percent}%)",
                f"{images / seconds:,.0f} images/s, {_size(num_bytes / seconds)}/s",
            ]
        if self.shards_to_upload:
            parts.append(
                f"uploaded {len(self.uploaded):,} of {self.shards_to_upload:,}"
            )
        to_do = [
            (self.images_to_write - self.images, images),
            (self.shards_to_upload - len(self.uploaded), uploads),
        ]
        if all(lately for left, lately in to_do if left):
            left = max(left * seconds / max(lately, 1) for left, lately in to_do)
            parts.append(f"{_duration(left)} left")
        return ", ".join(parts) + "."

    def _lately(self) -> tuple[float, int, int, int]:
        """Seconds, images, bytes and uploads since about half a minute ago."""
        now = (time.monotonic(), self.images, self.num_bytes, len(self.uploaded))
        while len(self._history) > 1 and now[0] - self._history[1][0] >= SPEED_SECONDS:
            self._history.popleft()
        then = self._history[0]
        self._history.append(now)
        seconds, images, num_bytes, uploads = (n - t for n, t in zip(now, then))
        return max(seconds, 1e-3), int(images), int(num_bytes), int(uploads)


def write_and_upload(
    work: Work,
    scratch_dir: str,
    num_workers: int,
    destination: Destination | None,
    keep_local_shards: bool,
    progress: Progress,
) -> None:
    """Takes each shard its whole way, each in a thread of its own.

    There are `num_workers` + 16 threads, so no more shards than that are begun and not
    yet uploaded, however slow the network is.

    Args:
      destination: Where to upload to; None to write the shards only.
      progress: Counts, and keeps what was done.

    Raises:
      RunError, OSError, BrokenProcessPool: The first failure but for bad images;
        whatever has not begun is cancelled.
    """
    uploads = threading.Semaphore(PARALLEL_UPLOADS)
    stopping = threading.Event()

    def take(shard: Shard, stamp: Stamp | None) -> None:
        path = shard_path(shard, scratch_dir)
        if stamp:
            check_undamaged(path, stamp)
        else:
            stamp = write_shard(shard, scratch_dir, in_worker, keep_local_shards)
            progress.wrote(shard.name, stamp)
        if destination:
            with uploads:
                if stopping.is_set():
                    return
                destination.upload(path, stamp)
            progress.uploaded[shard.name] = stamp
            if not keep_local_shards:
                os.unlink(path)

    def in_worker(shard: Shard, temporary_path: str) -> Stamp:
        return workers.submit(write_records, shard, temporary_path).result()

    tasks = _in_turns([(shard, None) for shard in work.to_write], work.to_upload)
    threads = concurrent.futures.ThreadPoolExecutor(num_workers + WAITING_SHARDS)
    workers = worker_pool(num_workers)
    with _closing(threads, stopping), _closing(workers, stopping):
        futures = [threads.submit(take, *task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            try:
                future.result()
            except BadImagesError as error:
                progress.bad_images.extend(error.problems)


def _in_turns(*lists: Iterable[Any]) -> list[Any]:
    """Merges lists so that each begins at once: [1, 2, 3], [4] gives [1, 4, 2, 3]."""
    turns = itertools.zip_longest(*lists)
    return [item for turn in turns for item in turn if item is not None]


@contextlib.contextmanager
def _closing(
    pool: concurrent.futures.Executor, stopping: threading.Event | None = None
) -> Iterator[None]:
    """Waits for what a pool does; if something failed, drops what has not begun."""
    try:
        yield
    except BaseException:
        if stopping:
            stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def check_undamaged(path: str, stamp: Stamp) -> None:
    """Checks that a shard that another run wrote still has the bytes of its stamp.

    Raises:
      RunError: It has not; its stamp is removed, so the next run writes it again.
    """
    if read_crc32c(path) != stamp.crc32c:
        forget_stamp(path)
        raise RunError(
            f"{path} must be as it was written, but its bytes have changed. Rerun the "
            "same command: it writes this shard again."
        )


@contextlib.contextmanager
def reporting(say: Callable[[], str]) -> Iterator[None]:
    """Shows that something goes on: on a terminal a live line, else one in 10 seconds."""
    is_over = threading.Event()

    def report() -> None:
        while not is_over.wait(REDRAW_SECONDS if live_line.is_on else LOG_SECONDS):
            live_line.draw(say()) if live_line.is_on else logging.info(say())

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        live_line.clear()


# ---------------------------------------------------------------------------------
# 7. Cloud Storage: what is in the bucket, and getting more there


UPLOAD_THREADS = 8  # the client's connection pool holds 10
UPLOAD_CHUNK_BYTES = 5 * 2**20  # twice in memory for each thread
LARGEST_KEPT_BUFFER = 2**25  # bytes; glibc allows no more
MOST_KEPT_MEMORY = 2**26  # bytes at the end of each of malloc's arenas
RETRY_SECONDS = (1, 4, 16, 60)  # before a file is uploaded again from its start
M_TRIM_THRESHOLD = -1  # malloc.h
M_MMAP_THRESHOLD = -3


@dataclasses.dataclass(frozen=True)
class GcsPath:
    """A place in Cloud Storage: `gs://bucket/directory`.

    Attributes:
      directory: Without slashes at its ends; empty for the bucket itself.
    """

    bucket: str
    directory: str

    def __str__(self) -> str:
        return "gs://" + "/".join(filter(None, [self.bucket, self.directory]))

    @classmethod
    def parse(cls, text: str) -> GcsPath:
        """Reads `gs://bucket` or `gs://bucket/directory`, with or without a last `/`.

        Raises:
          InvalidInputError: Anything else.
        """
        match = re.fullmatch(r"gs://([^/]*)(?:/(.*))?", text)
        if not match:
            problem = "must start with gs://, as in gs://bucket/directory"
        elif not _BUCKET_NAME.fullmatch(match[1]):
            problem = (
                "must name a bucket after gs://: 3 to 222 characters of a-z, 0-9, '-', "
                f"'_' and '.'; found {match[1]!r}"
            )
        else:
            directory = (match[2] or "").strip("/")
            return cls(match[1], directory)
        raise InvalidInputError(f"--gcs_output_path={text} {problem}.")

    def name_of(self, filename: str) -> str:
        """The name within the bucket of a file in the directory."""
        return "/".join(filter(None, [self.directory, filename]))


# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def _listed(blob: storage.Blob) -> Stamp:
    """What the bucket knows of an object; its digest holds if its bytes are as written."""
    metadata = blob.metadata or {}
    is_as_written = metadata.get("crc32c") == blob.crc32c
    digest = metadata.get("digest", "") if is_as_written else ""
    return Stamp(digest, 0, blob.size or 0, blob.crc32c)


class Destination:
    """The directory of a bucket, and the client that reaches it.

    Attributes:
      is_listed: Whether the last listing was granted.

    The client's `get_bucket` is never called: it needs `storage.buckets.get`, which
    the roles for objects do not have.
    """

    def __init__(
        self,
        path: GcsPath,
        project: str | None,
        client: storage.Client | None = None,
    ):
        _keep_freed_memory()
        # Else the client asks for the bucket's metadata too, in a thread of its own.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "1")
        from google.cloud import storage

        self.path = path
        self.is_listed = True
        with self._explained(""):
            self._client = client or storage.Client(project=project)
            self._bucket = self._client.bucket(path.bucket)
            _ = self._client._http  # is made without a lock: now, before the threads

    def check_access(self) -> None:
        """Begins an upload and drops it: that needs what an upload needs.

        Raises:
          RunError: It was refused; with what to grant.
        """
        blob = self._bucket.blob(self.path.name_of(MANIFEST_FILE))
        with self._explained(MANIFEST_FILE):
            url = blob.create_resumable_upload_session(timeout=60, retry=_retry(60))
            self._client._http.delete(url, timeout=60)

    def list_objects(self) -> dict[str, Stamp] | None:
        """Lists the destination by base name; None where listing is not granted.

        Raises:
          RunError: It failed for another reason.
        """
        from google.api_core import exceptions

        prefix = self.path.directory + "/" if self.path.directory else ""
        with self._explained(""):
            blobs = self._client.list_blobs(
                self._bucket,
                prefix=prefix,
                delimiter="/",
                fields="items(name,size,crc32c,metadata),nextPageToken",
                timeout=60,
                retry=_retry(60),
            )
            try:
                return {blob.name.removeprefix(prefix): _listed(blob) for blob in blobs}
            except exceptions.Forbidden:
                self.is_listed = False
                return None

    def upload(self, path: str, stamp: Stamp) -> None:
        """Uploads a shard, and from its start again where the client has given up.

        The client's own retries cover 408, 429, 5xx and lost connections within one
        request; not a lost session (410) or an answer that does not fit.

        Raises:
          RunError: It is not there, or not as it should be.
        """
        from google.api_core import exceptions
        from google.auth.exceptions import DefaultCredentialsError, RefreshError

        refused = (
            DefaultCredentialsError,
            exceptions.Forbidden,
            exceptions.NotFound,
            exceptions.Unauthorized,
            RefreshError,
            TypeError,  # a client that does not know an argument
        )
        name = os.path.basename(path)
        with self._explained(name):
            for seconds in RETRY_SECONDS:
                try:
                    return self._upload_once(path, stamp)
                except refused:
                    raise
                except Exception as error:  # noqa: BLE001
                    check_undamaged(path, stamp)
                    logging.warning(
                        f"Uploading {name} again in {_duration(seconds)}: "
                        f"{_said(error)}."
                    )
                    time.sleep(seconds)
            self._upload_once(path, stamp)

    def _upload_once(self, path: str, stamp: Stamp) -> None:
        blob = self._bucket.blob(
            self.path.name_of(os.path.basename(path)), chunk_size=UPLOAD_CHUNK_BYTES
        )
        blob.metadata = {"digest": stamp.digest, "crc32c": stamp.crc32c}
        blob.upload_from_filename(
            path,
            content_type="application/octet-stream",
            timeout=300,  # for each chunk: 0.02 MB/s at least
            checksum="crc32c",
            crc32c_checksum_value=stamp.crc32c,
            retry=_retry(600),
        )
        # The client passes the checksum on for files above 8 MiB only.
        if not _listed(blob).same_bytes(stamp):
            raise ValueError(
                f"the bucket holds {blob.size:,} bytes of crc32c {blob.crc32c}, not "
                f"{stamp.num_bytes:,} of {stamp.crc32c}"
            )

    def foreign_problem(self, foreign: Sequence[str]) -> str:
        return (
            f"{self.path} contains train-* or validation-* objects from elsewhere, which "
            f"models would also read: {_some(foreign)}. Delete them, or choose another "
            "directory."
        )

    def held_problems(self, names: Iterable[str]) -> Iterator[str]:
        yield from ()

    def delete(self, filename: str, must: bool) -> None:
        """Deletes a file of the directory, if it is there.

        Args:
          must: Whether it is known to be there. Else, not to be allowed to is no error.

        Raises:
          RunError: It could not be deleted.
        """
        from google.api_core import exceptions

        no_error: list[type[Exception]] = [exceptions.NotFound]
        if not must:
            no_error.append(exceptions.Forbidden)
        with self._explained(filename), contextlib.suppress(*no_error):
            self._bucket.blob(self.path.name_of(filename)).delete(
                timeout=60, retry=_retry(60)
            )

    @contextlib.contextmanager
    def _explained(self, filename: str) -> Iterator[None]:
        """Puts the client's errors in one line, with what to do.

        Raises:
          RunError: In place of any error of the client.
        """
        from google.api_core import exceptions
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError

        place = f"{self.path}/{filename}".removesuffix("/")
        login = "Run `gcloud auth application-default login`"
        role = "Grant roles/storage.objectUser on the bucket to the account of this run"
        bucket = f"gs://{self.path.bucket}"
        causes: list[tuple[Any, str, str]] = [
            (
                DefaultCredentialsError,
                f"No credentials for {place}",
                f"{login}, or attach a service account to the VM.",
            ),
            (
                (GoogleAuthError, exceptions.Unauthorized),
                f"The login for {place} is not valid",
                f"{login} again.",
            ),
            (
                exceptions.Forbidden,
                f"Access to {place} is denied",
                f"{role}; a VM also needs the access scope cloud-platform.",
            ),
            (
                exceptions.NotFound,
                f"No bucket for {place}",
                f"Create it: gcloud storage buckets create {bucket}",
            ),
            (
                Exception,
                f"Cloud Storage failed at {place}",
                "Run the same command again: it goes on from here.",
            ),
        ]
        try:
            yield
        except RunError:
            raise
        except Exception as error:
            what, remedy = next(c[1:] for c in causes if isinstance(error, c[0]))
            raise RunError(f"{what}: {_said(error)}. {remedy}") from error


def _keep_freed_memory() -> None:
    """Has malloc keep the buffers of an upload for the next one (mallopt(3)).

    It does so in the whole process. Given back to the kernel, which clears them each
    time, they would take half of the processor time of an upload.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BUFFER)
    libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT_MEMORY)


def _retry(seconds: float) -> retry.Retry:
    """Retries one request on 408, 429, 5xx and lost connections for so long."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    patient: retry.Retry = DEFAULT_RETRY.with_timeout(seconds)
    return patient


def _said(error: BaseException) -> str:
    """What an error of the client says, in one line without the URL and the JSON."""
    cause = getattr(error, "cause", None) or error  # of a RetryError: the last error
    response = getattr(cause, "response", None)
    try:
        text = response.json()["error"]["message"]  # type: ignore[union-attr]
    except Exception:  # no response, or none of that shape  # noqa: BLE001
        text = str(cause)
    code = getattr(cause, "code", "")
    text = f"{code:d} {text}" if isinstance(code, int) else text or repr(cause)
    words = " ".join(text.split())
    return words[:300].rstrip(".")


# ---------------------------------------------------------------------------------
# 8. One run: what is left to do, whether it can be done, doing it


def find_work(
    shards: Iterable[Shard],
    scratch_dir: str,
    objects: Mapping[str, Stamp] | None,
    compare_versions: bool = True,
) -> Work:
    """Compares a plan with what the scratch directory and the bucket hold.

    Args:
      objects: Of the bucket, by base name; None if nothing is to be uploaded.
      compare_versions: Whether a shard is not done if an image was touched since.
    """
    work = Work()
    for shard in shards:
        path = shard_path(shard, scratch_dir)
        here, there = read_stamp(path), (objects or {}).get(shard.name)
        digest = shard.digest() if here or there else ""
        is_ours = bool(here and here.digest == digest)
        if here and is_ours and compare_versions and here.versions != shard.versions():
            work.to_write.append(shard)
        elif here and is_ours and is_as_stamped(path, here):
            if objects is None or (there and there.same_bytes(here)):
                work.done[shard.name] = here
            else:
                work.to_upload.append((shard, here))
        elif there and there.digest == digest:
            work.done[shard.name] = there
        else:
            work.to_write.append(shard)
    return work


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, with everything that is known before its first image.

    Attributes:
      synsets: As in `Dataset`.
      shards: The whole plan, including the shards of other tasks.
      destination: Where to upload to; None to write the shards only.
      objects: Stamps of what the bucket holds there, by base name; None without an
        upload.
      work: What is left to do of this task's share.
      num_missing: How many shards are not done yet, over all tasks.
    """

    options: Options
    synsets: tuple[str, ...]
    shards: list[Shard]
    destination: Destination | None
    objects: Mapping[str, Stamp] | None
    work: Work
    num_missing: int

    @property
    def manifest_path(self) -> str:
        return os.path.join(self.options.scratch_dir, MANIFEST_FILE)

    @property
    def place(self) -> str:
        """Where the finished data set stands."""
        return str(
            self.destination.path if self.destination else self.options.scratch_dir
        )


def plan_job(options: Options) -> Job:
    """Reads, plans and checks everything that can be before the first image.

    Raises:
      InvalidInputError: All that keeps the run from beginning.
    """
    problems: list[str] = []
    dataset = EMPTY_DATASET
    destination, objects = None, None
    background = concurrent.futures.ThreadPoolExecutor(1)
    with _closing(background):
        opened = background.submit(_open_destination, options)
        with _collecting(problems):
            with reporting(lambda: f"Still listing {options.raw_dir}."):
                dataset = read_dataset(options.raw_dir)
            _log_dataset(dataset, options)
        with _collecting(problems):
            destination, objects = opened.result()
    shards = plan_shards(dataset, options.training_shards, options.validation_shards)
    work = find_work(options.share(shards), options.scratch_dir, objects)
    num_missing = len(shards) - len(_find_done(options, shards, objects, work.done))
    job = Job(options, dataset.synsets, shards, destination, objects, work, num_missing)
    problems += [*_room_problems(job), *_bucket_problems(job)]
    if problems:
        raise InvalidInputError(*problems)
    return job


def _log_dataset(dataset: Dataset, options: Options) -> None:
    num_classes = len({image.synset for image in dataset.training})
    logging.info(
        f"Found {_count(len(dataset.training), 'training image')} in "
        f"{_count(num_classes, 'synset')} and "
        f"{_count(len(dataset.validation), 'validation image')} "
        f"({_size(dataset.num_bytes)}) in {options.raw_dir}: {dataset.layout}."
    )
    if not os.path.exists(os.path.join(options.raw_dir, FAKE_MARK)):
        for line in shortfalls(dataset):
            logging.warning(line)


def _open_destination(
    options: Options,
) -> tuple[Destination | None, Mapping[str, Stamp] | None]:
    """Reaches the bucket and lists it; neither if nothing is to be uploaded.

    Raises:
      RunError: An upload would not succeed.
    """
    if not options.gcs_upload:
        return None, None
    path = GcsPath.parse(options.gcs_output_path or "")
    destination = Destination(path, options.gcs_project, options.client)
    destination.check_access()
    objects = destination.list_objects()
    if objects is None:
        logging.warning(
            f"Cannot list {path} (storage.objects.list is not granted): all shards will "
            "be uploaded, whatever is there."
        )
    return destination, objects or {}


def _foreign(filenames: Iterable[str], shards: Iterable[Shard]) -> list[str]:
    """Picks what models would read besides the shards of this plan."""
    planned = {shard.name for shard in shards}
    pattern = re.compile(f"({TRAINING_DIRECTORY}|{VALIDATION_DIRECTORY})-")
    return sorted(n for n in filenames if pattern.match(n) and n not in planned)


def _bucket_problems(job: Job) -> Iterator[str]:
    """Words what is in the bucket that should not be, or could not be replaced."""
    if not job.destination:
        return
    if foreign := _foreign(job.objects or (), job.shards):
        yield job.destination.foreign_problem(foreign)
    to_replace = [shard.name for shard in job.work.to_write]
    to_replace += [shard.name for shard, _ in job.work.to_upload]
    yield from job.destination.held_problems([*to_replace, MANIFEST_FILE])


def _shard_files(scratch_dir: str) -> Iterable[pathlib.Path]:
    """Finds everything that is named like a finished shard, of whatever plan."""
    return pathlib.Path(scratch_dir).glob("*/*-of-*")


def _room_problems(job: Job) -> Iterator[str]:
    """Words why the disk cannot take the shards that are still to be written."""
    options, work = job.options, job.work
    sizes = sorted((shard.num_bytes for shard in work.to_write), reverse=True)
    needed = sum(sizes[: options.max_local_shards])
    free = shutil.disk_usage(options.existing_scratch_dir).free
    remedy = "Make room, or choose another disk."
    if options.gcs_upload and options.keep_local_shards:
        remedy = "Make room, choose another disk, or pass --nokeep_local_shards."
    elif options.gcs_upload:  # those that the bucket has will be removed first
        shards = _shard_files(options.scratch_dir)
        free += sum(path.stat().st_size for path in shards if path.name in work.done)
    if needed > free:
        yield (
            f"--local_scratch_dir={options.scratch_dir} must have room for "
            f"{_size(needed)} of shards; its disk has {_size(free)} free. {remedy}"
        )


def log_intent(job: Job) -> None:
    """Says what is there and what will be done."""
    options, work = job.options, job.work
    num_shards = len(options.share(job.shards))
    _warn_of_foreign_files(job)
    if options.task_count > 1:
        logging.info(
            f"Task {options.task:,} of {options.task_count:,}. Over all tasks, "
            f"{job.num_missing:,} of {_count(len(job.shards), 'shard')} are still missing."
        )
    if work.is_done:
        logging.info(
            f"Nothing to do: {_count(num_shards, 'shard')} are up to date in {job.place}."
        )
    elif work.done or work.to_upload:
        pending = f"; {len(work.to_upload):,} need only be uploaded"
        logging.info(
            f"Resuming: {len(work.done):,} of {_count(num_shards, 'shard')} are up to "
            f"date{pending if work.to_upload else ''}."
        )
    if work.to_write:
        num_bytes = sum(shard.num_bytes for shard in work.to_write)
        then = f", and from there to {job.place}" if job.destination else ""
        logging.info(
            f"{'Would write' if options.dry_run else 'Writing'} "
            f"{_shards_of_images(work.to_write)} ({_size(num_bytes)}) to "
            f"{options.scratch_dir}{then}."
        )


def _shards_of_images(shards: Sequence[Shard]) -> str:
    num_images = sum(len(shard.images) for shard in shards)
    return f"{_count(len(shards), 'shard')} of {_count(num_images, 'image')}"


def _warn_of_foreign_files(job: Job) -> None:
    scratch_dir = job.options.scratch_dir
    found = [path.name for path in _shard_files(scratch_dir)]
    if foreign := _foreign(found, job.shards):
        logging.warning(
            f"{scratch_dir} also holds {_count(len(foreign), 'shard')} of another plan: "
            f"{_some(foreign)}. Remove what you do not need."
        )


def _find_done(
    options: Options,
    shards: Sequence[Shard],
    objects: Mapping[str, Stamp] | None,
    stamps: Mapping[str, Stamp],
) -> Mapping[str, Stamp]:
    """Adds the stamps of what other tasks have done to those of this one.

    Their copies of the raw data may have other times than this one's.
    """
    if options.task_count == 1:
        return stamps
    own = {shard.name for shard in options.share(shards)}
    others = [shard for shard in shards if shard.name not in own]
    work = find_work(others, options.scratch_dir, objects, compare_versions=False)
    return {**work.done, **stamps}


def carry_out(job: Job) -> None:
    """Does the work, checks that everything is where it should be, and says so.

    Raises:
      BadImagesError: All was done but the shards of these images.
      RunError: What stopped it.
    """
    _remove_temporary_files(job.options)
    if job.num_missing:
        _remove_manifest(job, MANIFEST_FILE in (job.objects or ()))
    if not job.options.keep_local_shards:
        _remove_uploaded(job)
    progress = _write_and_upload(job)
    if progress.bad_images:
        logging.info(
            f"{_count(len(progress.bad_images), 'image')} cannot be used, and their "
            "shards are left out. Replace them and rerun the same command."
        )
        raise BadImagesError(*sorted(progress.bad_images))
    stamps = {**job.work.done, **progress.stamps, **progress.uploaded}
    try:
        stamps |= _check_finished(job, stamps, written=progress.stamps)
    except RunError:
        _remove_manifest(job, is_there=None)
        raise
    if missing := len(job.shards) - len(stamps):
        logging.info(
            f"This task is done; {_count(missing, 'shard')} of other tasks are still "
            "missing."
        )
    else:
        _write_manifest(job, stamps)
        _log_complete(job, stamps)


def _write_and_upload(job: Job) -> Progress:
    options, work = job.options, job.work
    progress = Progress(work, is_uploading=bool(job.destination))
    if not work.is_done:
        with reporting(progress.line):
            write_and_upload(
                work,
                options.scratch_dir,
                options.workers,
                job.destination,
                options.keep_local_shards,
                progress,
            )
    _log_done(job, progress)
    return progress


def _log_done(job: Job, progress: Progress) -> None:
    seconds = progress.seconds()
    if progress.shards_to_write:
        logging.info(
            f"Wrote {_count(len(progress.stamps), 'shard')} "
            f"({_count(progress.images, 'image')}, {_size(progress.num_bytes)}) of "
            f"{progress.shards_to_write:,} to {job.options.scratch_dir} in "
            f"{_duration(seconds)}, {progress.images / seconds:,.0f} images/s, "
            f"{_size(progress.num_bytes / seconds)}/s; encoded "
            f"{_count(progress.repaired, 'PNG or CMYK image')} again as RGB JPEG."
        )
    if job.destination and progress.shards_to_upload:
        num_bytes = sum(stamp.num_bytes for stamp in progress.uploaded.values())
        logging.info(
            f"Uploaded {_count(len(progress.uploaded), 'shard')} ({_size(num_bytes)}) of "
            f"{progress.shards_to_upload:,} to {job.destination.path} in "
            f"{_duration(seconds)}."
        )


def _log_complete(job: Job, stamps: Mapping[str, Stamp]) -> None:
    num_bytes = sum(stamp.num_bytes for stamp in stamps.values())
    advice = f": give the model --data_dir={job.place}" if job.destination else ""
    logging.info(
        f"The data set is complete: {_shards_of_images(job.shards)} "
        f"({_size(num_bytes)}) in {job.place}{advice}."
    )


def _check_finished(
    job: Job, stamps: Mapping[str, Stamp], written: Container[str]
) -> Mapping[str, Stamp]:
    """Checks what this task and the others have finished; adds the others' stamps.

    Args:
      written: Names of the shards that this run wrote, and so need not be read.

    Raises:
      RunError: Something is missing, damaged or not of this plan.
    """
    objects = None
    if job.destination:
        objects = check_uploaded(job.destination, stamps)
        if foreign := _foreign(objects, job.shards):
            raise RunError(job.destination.foreign_problem(foreign))
    stamps = _find_done(job.options, job.shards, objects, stamps)
    if len(stamps) == len(job.shards) and not job.destination:
        _check_local(job, stamps, written)
    return stamps


def _check_local(
    job: Job, stamps: Mapping[str, Stamp], written: Container[str]
) -> None:
    """Reads the shards that other runs wrote, before a manifest vouches for them."""
    if read_text(job.manifest_path) == _manifest(job, stamps):
        return
    others = [shard for shard in job.shards if shard.name not in written]
    paths = [shard_path(shard, job.options.scratch_dir) for shard in others]
    num_checked = 0
    with reporting(
        lambda: f"Checked {num_checked:,} of {_count(len(others), 'earlier shard')}."
    ):
        for shard, path in zip(others, paths, strict=True):
            check_undamaged(path, stamps[shard.name])
            num_checked += 1


def check_uploaded(
    destination: Destination, expected: Mapping[str, Stamp]
) -> Mapping[str, Stamp]:
    """Lists the destination once and compares it with what should be there.

    Returns:
      What was listed, by base name; nothing if listing is not granted.

    Raises:
      RunError: An object is missing or is not of the right size and crc32c.
    """
    objects = destination.list_objects()
    if objects is None:
        logging.warning(
            f"Cannot list {destination.path}: only the answer to each upload says that "
            "it is right."
        )
        return {}
    if wrong := _differing(objects, expected):
        raise RunError(
            f"All {_count(len(expected), 'object')} in {destination.path} must be as "
            f"written; found {len(wrong):,} missing or different: {_some(wrong)}. Rerun "
            "the same command to upload them again."
        )
    return objects


def _differing(
    objects: Mapping[str, Stamp], expected: Mapping[str, Stamp]
) -> list[str]:
    """Names what is not in the bucket, or is there with other bytes."""
    return [
        name
        for name, stamp in expected.items()
        if name not in objects or not objects[name].same_bytes(stamp)
    ]


def _remove_temporary_files(options: Options) -> None:
    """Removes what a killed run of this task left half written."""
    scratch_dir = pathlib.Path(options.scratch_dir)
    splits = f"{TRAINING_DIRECTORY}|{VALIDATION_DIRECTORY}"
    pattern = rf"\.+({splits})-(\d+)-of-\d+(\.json)?\..*{re.escape(TEMPORARY_SUFFIX)}"
    for path in scratch_dir.glob(f"*/.*{TEMPORARY_SUFFIX}"):
        match = re.fullmatch(pattern, path.name)
        if match and int(match[2]) % options.task_count == options.task:
            path.unlink(missing_ok=True)
    if options.task_count == 1:
        for path in scratch_dir.glob(f".{MANIFEST_FILE}.*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)


def _remove_uploaded(job: Job) -> None:
    """Removes shards that the bucket held before this run, but not their stamps."""
    for shard in job.options.share(job.shards):
        if shard.name in job.work.done:
            path = pathlib.Path(shard_path(shard, job.options.scratch_dir))
            path.unlink(missing_ok=True)


def _remove_manifest(job: Job, is_there: bool | None) -> None:
    """Removes the mark of a complete data set while it is not one.

    Args:
      is_there: Whether the bucket has one; None if that is not known.
    """
    pathlib.Path(job.manifest_path).unlink(missing_ok=True)
    if job.destination and not job.destination.is_listed:
        is_there = None
    if job.destination and is_there is not False:
        job.destination.delete(MANIFEST_FILE, must=bool(is_there))


def _manifest(job: Job, stamps: Mapping[str, Stamp]) -> str:
    """The JSON text that marks a data set as complete.

    It lists the examples, bytes and crc32c of each shard, their totals, and the synset
    of each label, which is written nowhere else.
    """
    examples = collections.Counter[str]()
    for shard in job.shards:
        examples[shard.split] += len(shard.images)
    return json_text(
        {
            "examples": examples,
            "bytes": sum(stamp.num_bytes for stamp in stamps.values()),
            "labels": dict(enumerate(job.synsets, start=1)),
            "shards": [
                {
                    "name": shard.name,
                    "examples": len(shard.images),
                    "bytes": stamps[shard.name].num_bytes,
                    "crc32c": stamps[shard.name].crc32c,
                }
                for shard in job.shards
            ],
        }
    )


def _write_manifest(job: Job, stamps: Mapping[str, Stamp]) -> None:
    """Writes and uploads the manifest, last of all, if it is not there already."""
    text = _manifest(job, stamps)
    path = job.manifest_path
    if read_text(path) != text:
        write_text(path, text)
    stamp = measure(path)
    there = (job.objects or {}).get(MANIFEST_FILE) if job.work.is_done else None
    if job.destination and not (there and there.same_bytes(stamp)):
        job.destination.upload(path, stamp)


# ---------------------------------------------------------------------------------
# 9. Command line

USAGE = """\
Usage: python3 imagenet_to_gcs.py --raw_data_dir=DIRECTORY [flags]

Write ImageNet as TFRecord shards and upload them to Cloud Storage:
  python3 imagenet_to_gcs.py --project=my-project --gcs_output_path=gs://bucket/imagenet \\
    --raw_data_dir=$HOME/imagenet --local_scratch_dir=$HOME/imagenet/tf_records

Try it without ImageNet and without a bucket:
  python3 imagenet_to_gcs.py --fake_imagenet --raw_data_dir=$HOME/fake --nogcs_upload
"""

# Line breaks, and what would reorder the text on a terminal.
CONTROL_CHARACTERS = r"[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROCESSOR_LIMIT = "/sys/fs/cgroup/cpu.max"  # as a container sees it; cgroup v2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks for: the flags of the same names, and the client to use.

    Raises:
      InvalidInputError: All that is wrong with them.
    """

    raw_data_dir: str | None
    gcs_upload: bool
    gcs_project: str | None
    gcs_output_path: str | None
    local_scratch_dir: str | None
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
        problems = [problem for holds, problem in self._checks() if not holds]
        if self.gcs_upload and self.gcs_output_path:
            with _collecting(problems):
                GcsPath.parse(self.gcs_output_path)
        if problems:
            raise InvalidInputError(*problems)

    @property
    def raw_dir(self) -> str:
        return os.path.abspath(os.path.expanduser(self.raw_data_dir or ""))

    @property
    def scratch_dir(self) -> str:
        scratch_dir = os.path.expanduser(self.local_scratch_dir or "")
        return os.path.abspath(scratch_dir or os.path.join(self.raw_dir, "tf_records"))

    @property
    def existing_scratch_dir(self) -> pathlib.Path:
        """The scratch directory, or the nearest one above it that is there."""
        place = pathlib.Path(self.scratch_dir)
        while not place.exists() and place != place.parent:
            place = place.parent
        return place

    @property
    def makes_fake(self) -> bool:
        """Whether to generate the fake ImageNet first, if it is not there."""
        return self.fake_imagenet and not self.dry_run

    @property
    def workers(self) -> int:
        return self.num_workers or _num_processors()

    @property
    def max_local_shards(self) -> int:
        """How many shards may be in the scratch directory at the same time."""
        if self.keep_local_shards:
            return self.training_shards + self.validation_shards
        return self.workers + WAITING_SHARDS

    @property
    def task(self) -> int:
        return self.task_index or 0

    def share(self, shards: Iterable[Shard]) -> list[Shard]:
        """This task's part of a plan, of both splits."""
        return [s for s in shards if s.index % self.task_count == self.task]

    def _checks(self) -> Iterator[tuple[object, str]]:
        """Pairs what must hold with what to say if it does not."""
        yield from self._directory_checks()
        yield from self._upload_checks()
        yield from self._number_checks()
        packages = ["tensorflow"] + ["google.cloud.storage"] * self.gcs_upload
        for name in packages:
            advice = "run python3 -m pip install -r requirements.txt"
            yield _is_installed(name), f"The package {name} is missing: {advice}."

    def _directory_checks(self) -> Iterator[tuple[object, str]]:
        raw, scratch = f"--raw_data_dir={self.raw_data_dir}", self.scratch_dir
        fault = _directory_fault(self.raw_data_dir or "", self.raw_dir)
        if not self.raw_data_dir:
            yield False, "--raw_data_dir must name the directory of the raw ImageNet."
        elif not self.makes_fake or os.path.lexists(self.raw_dir):
            yield (
                not fault,
                (
                    f"{raw} must be a directory with {TRAINING_DIRECTORY}/, "
                    f"{VALIDATION_DIRECTORY}/ and {LABELS_FILE}, but {fault}."
                ),
            )
        flag = f"--local_scratch_dir={self.local_scratch_dir or scratch}"
        place = self.existing_scratch_dir
        fault = _directory_fault(self.local_scratch_dir or "", str(place))
        writable = os.access(place, os.W_OK | os.X_OK)
        own = [
            os.path.join(self.raw_dir, TRAINING_DIRECTORY, ""),
            os.path.join(self.raw_dir, VALIDATION_DIRECTORY, ""),
        ]
        within = os.path.join(os.path.realpath(scratch), "")
        yield not fault, f"{flag} must be a local directory, but {fault}."
        yield fault or writable, f"{flag} must be writable, but {place} is not."
        yield (
            os.path.realpath(scratch) != os.path.realpath(self.raw_dir)
            and not any(within.startswith(os.path.realpath(d) + os.sep) for d in own),
            (
                f"{flag} must be another directory than --raw_data_dir and its "
                f"{TRAINING_DIRECTORY}/ and {VALIDATION_DIRECTORY}/."
            ),
        )

    def _upload_checks(self) -> Iterator[tuple[object, str]]:
        local, instead = not self.gcs_upload, "for the upload (or pass --nogcs_upload)"
        yield self.gcs_project or local, f"--project must be given {instead}."
        yield (
            self.gcs_output_path or local,
            f"--gcs_output_path=gs://bucket/directory must be given {instead}.",
        )
        yield (
            self.keep_local_shards or not local,
            "--nokeep_local_shards needs an upload: drop --nogcs_upload.",
        )

    def _number_checks(self) -> Iterator[tuple[object, str]]:
        for flag in (
            "num_workers",
            "training_shards",
            "validation_shards",
            "task_count",
        ):
            value = getattr(self, flag)
            problem = f"--{flag} must be from 1 to 99,999; found {value}."
            yield value is None or 0 < value < 100_000, problem
        yield (
            self.task_index is not None or self.task_count <= 1,
            "--task_index must be given with --task_count.",
        )
        yield (
            0 <= self.task < max(self.task_count, 1),
            (
                f"--task_index must be from 0 to --task_count - 1; found {self.task:,} of "
                f"{self.task_count:,}."
            ),
        )


def _directory_fault(given: str, path: str) -> str:
    """Says why a flag's value is not a local directory; empty if it is one."""
    if given.startswith("gs://"):
        return "it is in Cloud Storage"
    if os.path.isdir(path):
        return ""
    return f"{path} is a file" if os.path.exists(path) else f"{path} does not exist"


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package above it
        return False


def _num_processors() -> int:
    """Counts the processors that this process, or its container, may use."""
    number = len(os.sched_getaffinity(0))
    # No such file, 'max' for no limit, or nonsense.
    with contextlib.suppress(OSError, ValueError, ArithmeticError):
        quota, period = map(int, pathlib.Path(PROCESSOR_LIMIT).read_text().split())
        number = min(number, math.ceil(quota / period))
    return max(1, number)


def run(
    raw_data_dir: str | None,
    gcs_upload: bool = True,
    gcs_project: str | None = None,
    gcs_output_path: str | None = None,
    local_scratch_dir: str | None = None,
    client: storage.Client | None = None,
    **options: Any,
) -> None:
    """Writes the shards that are missing, and uploads those that the bucket lacks.

    Call it under `if __name__ == "__main__":`, like everything that starts processes.

    Args:
      raw_data_dir: Holds `train/`, `validation/` and `synset_labels.txt`.
      gcs_upload: Whether to upload, which takes a project and an output path.
      gcs_project: Google Cloud project of the upload.
      gcs_output_path: `gs://bucket` or `gs://bucket/directory`.
      local_scratch_dir: `tf_records` under the raw directory by default.
      client: To use for the upload instead of a new one.
      **options: Other fields of `Options`.

    Raises:
      BadImagesError: An InvalidInputError; all but the shards of these images are done.
      InvalidInputError: A ValueError: what must be fixed; nothing was done.
      RunError: What stopped the run; finished shards are kept.
    """
    with failures_in_words():
        checked = Options(
            raw_data_dir=raw_data_dir,
            gcs_upload=gcs_upload,
            gcs_project=gcs_project,
            gcs_output_path=gcs_output_path,
            local_scratch_dir=local_scratch_dir,
            client=client,
            **options,
        )
        with _locked(checked):
            _run(checked)


def _run(options: Options) -> None:
    if not options.dry_run:
        start_forkserver()  # imports TensorFlow while the raw directory is listed
    if options.makes_fake:
        make_fake_imagenet(options.raw_dir, options.workers, options.scratch_dir)
    job = plan_job(options)
    log_intent(job)
    if not options.dry_run:
        carry_out(job)


@contextlib.contextmanager
def _locked(options: Options) -> Iterator[None]:
    """Keeps a second run out of the scratch directory; the lock dies with the process.

    Tasks of the same count may share the directory.

    Raises:
      RunError: Another run is there.
    """
    if options.dry_run:
        yield
        return
    name = ".lock"
    if options.task_count > 1:
        name += f"-{options.task}-of-{options.task_count}"
    scratch_dir = options.scratch_dir
    os.makedirs(scratch_dir, exist_ok=True)
    with _lock_file(os.path.join(scratch_dir, name)) as file:
        others = [n for n in os.listdir(scratch_dir) if _excludes(name, n)]
        for path in (os.path.join(scratch_dir, other) for other in others):
            with _lock_file(path):
                pass
        try:
            yield
        except InvalidInputError:  # leave nothing where nothing was done
            os.unlink(file.name)
            with contextlib.suppress(OSError):  # there are shards
                os.rmdir(scratch_dir)
            raise


def _excludes(name: str, other: str) -> bool:
    """Whether two locks are of task counts that may not share a directory."""
    counts = [re.fullmatch(r"\.lock(?:-\d+-of-(\d+))?", n) for n in (name, other)]
    return all(counts) and len({match[1] for match in counts if match}) > 1


@contextlib.contextmanager
def _lock_file(path: str) -> Iterator[BinaryIO]:
    flags_of_open = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    file_descriptor = os.open(path, flags_of_open, 0o666)
    with open(file_descriptor, "rb+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"Another run is writing to {os.path.dirname(path)}: wait until it ends, "
                "or choose another --local_scratch_dir."
            ) from None
        except OSError as error:  # some network file systems cannot
            logging.warning(
                f"Cannot lock {path} ({error.strerror}): do not run two at once."
            )
        yield file


def convert_to_tf_records(
    raw_data_dir: str, local_scratch_dir: str
) -> tuple[list[str], list[str]]:
    """Writes 1,024 training and 128 validation shards, as `run` without an upload.

    Returns:
      The paths of the training shards and of the validation shards, in order.

    Raises:
      InvalidInputError, BadImagesError, RunError: As `run`.
    """
    run(raw_data_dir, gcs_upload=False, local_scratch_dir=local_scratch_dir)
    paths = [shard_path(s, local_scratch_dir) for s in plan_shards(EMPTY_DATASET)]
    return paths[:TRAINING_SHARDS], paths[TRAINING_SHARDS:]


def upload_to_gcs(
    training_records: Sequence[str],
    validation_records: Sequence[str],
    gcs_output_path: str,
    gcs_project: str | None,
    client: storage.Client | None = None,
) -> None:
    """Uploads shards under their base names, but for those that are there already.

    Raises:
      InvalidInputError: The output path is not one of Cloud Storage.
      RunError: The upload failed; what is there will not be uploaded again.
    """
    with failures_in_words():
        destination = Destination(GcsPath.parse(gcs_output_path), gcs_project, client)
        paths = {
            os.path.basename(p): p for p in [*training_records, *validation_records]
        }
        stamps = {name: measure(path) for name, path in paths.items()}
        missing = _differing(destination.list_objects() or {}, stamps)
        with concurrent.futures.ThreadPoolExecutor(PARALLEL_UPLOADS) as threads:
            uploads = [
                threads.submit(destination.upload, paths[name], stamps[name])
                for name in missing
            ]
        for upload in uploads:
            upload.result()
        check_uploaded(destination, stamps)


@contextlib.contextmanager
def failures_in_words() -> Iterator[None]:
    """Says in one line why this process or a worker could not write.

    Raises:
      RunError: In place of that error.
    """
    try:
        yield
    except (concurrent.futures.process.BrokenProcessPool, EOFError) as error:
        time.sleep(0.2)  # a signal to all processes of the run may still be on its way
        raise RunError(
            "A worker process was killed, most likely by the kernel for want of "
            "memory. Finished shards are kept: run the same command again with fewer "
            "--num_workers."
        ) from error
    except ImportError as error:
        raise RunError(
            f"TensorFlow cannot be imported: {error}. Run pip install -r "
            "requirements.txt in a new virtual environment."
        ) from error
    except OSError as error:
        what = f"Cannot write {error.filename}: " if error.filename else ""
        raise RunError(
            f"{what}{error.strerror or error}. Finished shards are kept: mend that and "
            "run the same command again."
        ) from error


class Stopped(BaseException):
    """A signal that ends the run: Ctrl-C, or the preemption of the machine."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal = signal.Signals(signal_number)


def _raise_stopped(signal_number: int, _: object) -> NoReturn:
    for other in STOP_SIGNALS:  # one is enough
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signal_number)


def _stop_at_signals() -> None:
    """Stops the run at a signal, but for those that `nohup` and the like ignore."""
    for signal_number in STOP_SIGNALS:
        if signal.getsignal(signal_number) != signal.SIG_IGN:
            signal.signal(signal_number, _raise_stopped)


class LiveLine:
    """A line at the bottom of a terminal that is redrawn in place.

    Attributes:
      is_on: Whether stderr is a terminal, and this the command.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._is_drawn = False

    def draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r{text[:width]}\x1b[K")
        self._is_drawn = True

    def clear(self) -> None:
        if self._is_drawn:
            self._write("\r\x1b[K")
            self._is_drawn = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            sys.stderr.write(text)
            sys.stderr.flush()


live_line = LiveLine()


class _LogFormatter(python_logging.Formatter):
    """Formats a log line as '2026-11-22 07:10:33 WARNING: ...', INFO without its name.

    It stays one line, shown as it is, whatever a file's name contains.
    """

    def format(self, record: python_logging.LogRecord) -> str:
        live_line.clear()
        level = f"{record.levelname}: " if record.levelno > python_logging.INFO else ""
        return f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} {level}" + re.sub(
            CONTROL_CHARACTERS, lambda c: repr(c[0])[1:-1], record.getMessage()
        )


def main(arguments: Sequence[str]) -> None:
    """Runs the command; ends the process with the exit status of the manual."""
    logging.get_absl_handler().setFormatter(_LogFormatter())
    if FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.INFO)
    if len(arguments) > 1:
        raise app.UsageError(f"All arguments must be flags; found {arguments[1]!r}.")
    warnings.filterwarnings("ignore", module="google", category=FutureWarning)
    live_line.is_on = bool(sys.stderr and sys.stderr.isatty())
    _stop_at_signals()
    try:
        names = [field.name for field in dataclasses.fields(Options)]
        options: dict[str, Any] = {n: FLAGS[n].value for n in names if n in FLAGS}
        run(gcs_project=FLAGS.project, **options)
    except InvalidInputError as error:
        _exit(1, *error.problems)
    except RunError as error:
        _exit(1, str(error))
    except Stopped as error:
        _exit(
            128 + error.signal,
            f"Stopped by {error.signal.name}. Rerun the same command to resume.",
        )


def _exit(status: int, *errors: str) -> NoReturn:
    """Ends the process at once, without waiting for uploads that hang in a request.

    The kernel ends the forkserver with it, and the workers with that.
    """
    for line in errors:
        logging.error(line)
    logging.flush()
    os._exit(status)


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Answers --help and --version in a few lines, or parses the flags."""
    if {"-h", "-help", "--help"} & set(arguments[1:]):
        print(f"{USAGE}\n{FLAGS.module_help(sys.modules[__name__])}")
        sys.exit(0)
    if "--version" in arguments[1:]:
        print(f"imagenet_to_gcs.py {__version__}")
        sys.exit(0)
    return list(app.parse_flags_with_usage(list(arguments)))


# ---------------------------------------------------------------------------------
# A. Tars: the images of archives that were never extracted


TAR_BLOCK_BYTES = 512
MOST_TAR_FILLING = 2**20  # empty bytes after the last file; tar makes it 10 KiB
COMPRESSED_STARTS = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ"}


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar.

    Attributes:
      offset: Of its first byte, from the start of the file that holds the tar.
      mtime: Seconds since 1970.
    """

    name: str
    offset: int
    num_bytes: int
    mtime: int


def list_tar(
    path: str, start: int = 0, end: int | None = None, name: str = ""
) -> list[TarMember]:
    """Lists the files in a tar, or in a tar within a file, by their headers.

    Links, and names that would lead out of a directory, are left out. Plain headers
    (https://www.gnu.org/software/tar/manual/html_node/Standard.html) are read here,
    six times as fast as by `tarfile`; a tar with any others is left to that.

    Args:
      start, end: Where the tar begins and ends in the file, bytes.
      name: Of a tar within the file.

    Raises:
      InvalidInputError: Not a tar, a compressed one, or one that is cut short.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size if end is None else end
            members = _read_headers(file, start, end)
            if members is None:
                members = _read_headers_with_tarfile(file, start, end)
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        is_damaged = not isinstance(error, OSError) and "decompress" not in reason
        raise InvalidInputError(
            f"Cannot list the tar {path}"
            + (f" ({name} within it)" if name else "")
            + f": {reason}."
            + (" Download it again, and compare its checksum." if is_damaged else "")
        ) from error
    return [
        member
        for member in members
        if not member.name.startswith("/") and ".." not in member.name.split("/")
    ]


def _read_headers(file: BinaryIO, start: int, end: int) -> list[TarMember] | None:
    """Reads the headers of a tar of plain files; None where it has others."""
    members: list[TarMember] = []
    position = start
    while True:
        header = os.pread(file.fileno(), TAR_BLOCK_BYTES, position)
        if position + TAR_BLOCK_BYTES > end or len(header) < TAR_BLOCK_BYTES:
            raise ValueError("it is cut short")
        if header == bytes(TAR_BLOCK_BYTES):
            _check_end(file, position, end)
            return members
        checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if _octal(header[148:156]) != checksum:
            raise ValueError(_not_a_tar(header, position))
        is_plain = header[156] in b"0\0" and header[345] == 0
        if not is_plain or header[124] >= 0x80 or header[136] >= 0x80:
            return None
        num_bytes, mtime = _octal(header[124:136]), _octal(header[136:148])
        if num_bytes is None or mtime is None:
            raise ValueError(_not_a_tar(header, position))
        name = os.fsdecode(header[:100].split(b"\0")[0])
        position += TAR_BLOCK_BYTES
        if not name.endswith("/"):  # a directory of Unix V7's tar
            members.append(TarMember(name, position, num_bytes, mtime))
        position += math.ceil(num_bytes / TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _not_a_tar(header: bytes, position: int) -> str:
    for name, magic in COMPRESSED_STARTS.items():
        if header.startswith(magic):
            return f"it is compressed; decompress it with {name} -d first"
    return f"it is damaged, or not a tar, at byte {position:,}"


def _read_headers_with_tarfile(file: BinaryIO, start: int, end: int) -> list[TarMember]:
    file.seek(start)
    members = []
    with tarfile.TarFile(fileobj=file) as tar:
        for member in tar:
            if member.isreg() and not member.issparse():
                members.append(
                    TarMember(
                        member.name, member.offset_data, member.size, int(member.mtime)
                    )
                )
        _check_end(file, tar.offset, end)
    return members


def _check_end(file: BinaryIO, position: int, end: int) -> None:
    """Checks that a tar ends in empty blocks, and the file soon after it.

    tarfile takes a damaged or missing header for the end; a piece missing from a
    download is a hole of zeros, which looks like an end.

    Raises:
      ValueError: It does not.
    """
    rest = os.pread(
        file.fileno(), max(0, min(end - position, MOST_TAR_FILLING + 1)), position
    )
    if len(rest) < TAR_BLOCK_BYTES:
        raise ValueError("it is cut short")
    if any(rest[:TAR_BLOCK_BYTES]):
        raise ValueError(_not_a_tar(rest, position))
    if any(rest) or len(rest) > MOST_TAR_FILLING:
        raise ValueError(f"it is damaged: empty at byte {position:,}, before its end")


# ---------------------------------------------------------------------------------
# B. Wrong raw directories, in words


def _scan(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except FileNotFoundError:
        raise InvalidInputError(_no_directory(directory)) from None
    except OSError as error:
        problem = f"Cannot list {directory}: {error.strerror}."
        raise InvalidInputError(problem) from error


def _no_directory(directory: str) -> str:
    """Words the absence of `train/` or `validation/` with what is there instead."""
    raw_data_dir, split = os.path.split(directory)
    kaggle_dirs = [
        os.path.join(raw_data_dir, path)
        for path in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
    ]
    kaggle_dir = next(filter(os.path.isdir, kaggle_dirs), None)
    if kaggle_dir:
        found = f"{kaggle_dir} (Kaggle's layout): README says which links it takes"
    elif split == VALIDATION_DIRECTORY and os.path.isdir(f"{raw_data_dir}/val"):
        found = f"{raw_data_dir}/val: rename it to {VALIDATION_DIRECTORY}"
    else:
        found = _some(sorted(os.listdir(raw_data_dir))) or "nothing"
    tar = TRAINING_TAR if split == TRAINING_DIRECTORY else VALIDATION_TAR
    return f"No directory {directory}, and no {tar} beside it. Found {found}."


def _no_images(place: str, pattern: str) -> str:
    """Words a directory or tar without images with what is in it instead."""
    if os.path.isfile(place):
        return f"No images match {pattern} in {place}."
    names = [entry.name for entry in _scan(place)]
    suffixes = collections.Counter(
        os.path.splitext(name)[1] for name in names if not name.startswith(".")
    )
    advice = {
        ".tar": f"move what is not extracted up beside {TRAINING_DIRECTORY}/",
        ".jpg": f"rename them to *{IMAGE_SUFFIX}",
        ".jpeg": f"rename them to *{IMAGE_SUFFIX}",
        ".JPG": f"rename them to *{IMAGE_SUFFIX}",
        IMAGE_SUFFIX: "move each into a directory named after its synset",
    }
    for suffix, remedy in advice.items():
        if suffixes[suffix]:
            files = _count(suffixes[suffix], f"{suffix} file")
            return f"No images match {place}/{pattern}. Found {files} there: {remedy}."
    found = _some(sorted(names)) or "nothing"
    return f"No images match {place}/{pattern}. Found {found} there."


def shortfalls(dataset: Dataset) -> list[str]:
    """Words what need not keep a run from beginning, but is not so in ImageNet."""
    lines = []
    empty = [image for image in dataset.images if not image.num_bytes]
    if empty:
        lines.append(
            f"{_count(len(empty), 'image')} of no bytes (empty files, links to nothing), "
            f"the first {empty[0].path}: no shard that would hold one is written."
        )
    trained = {image.synset for image in dataset.training}
    untrained = [synset for synset in dataset.synsets if synset not in trained]
    if untrained:
        lines.append(
            f"{len(untrained):,} of {_count(len(dataset.synsets), 'synset')} have "
            f"validation images but no training images: {_some(untrained)}."
        )
    if len(dataset.synsets) == IMAGENET_SYNSETS:
        lines += _short_split(
            dataset.training,
            "training",
            IMAGENET_TRAINING_IMAGES,
            IMAGENET_SMALLEST_CLASS,
        )
        lines += _short_split(
            dataset.validation, "validation", IMAGENET_VALIDATION_IMAGES, 50
        )
    return lines


def _short_split(
    images: Sequence[RawImage], split: str, num_expected: int, smallest_class: int
) -> list[str]:
    if len(images) == num_expected:
        return []
    sizes = collections.Counter(image.synset for image in images)
    short = [
        f"{name} ({n:,})" for name, n in sorted(sizes.items()) if n < smallest_class
    ]
    named = (
        f" Classes of fewer than {smallest_class}: {_some(short, 10)}." if short else ""
    )
    return [
        (
            f"ImageNet-1k has {num_expected:,} {split} images, found {len(images):,} "
            f"({len(images) - num_expected:+,}).{named}"
        )
    ]


def _count(number: int, noun: str) -> str:
    """Says a number with its noun: '1 image', '1,024 images', '2 classes'."""
    plural = noun if number == 1 else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {plural}"


def _size(num_bytes: float) -> str:
    """Says a number of bytes in decimal units: '110.0 KB', '146.9 GB'."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            break
        num_bytes /= 1000
    else:
        unit = "TB"
    return f"{num_bytes:,.{0 if unit == 'bytes' else 1}f} {unit}"


def _duration(seconds: float) -> str:
    """Says a time: '45 s', '12 min', '3 h 5 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _some(names: Sequence[str], most: int = 3) -> str:
    """Names the first few of many: 'a, b, c and 97 more'."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


# ---------------------------------------------------------------------------------
# C. Worker processes


PRELOAD = "IMAGENET_TO_GCS_PRELOAD"  # in the environment of the forkserver only
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def worker_pool(num_workers: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("forkserver"),
        initializer=_start_worker,
    )


# Its one thread lives as long as the process, whatever thread `run` is called in: the
# forkserver dies with the thread that started it.
_forkserver_thread = concurrent.futures.ThreadPoolExecutor(1)


def start_forkserver() -> None:
    """Starts the process that imports TensorFlow once and forks the workers.

    It returns at once: the import, some seconds of it, goes on while the raw
    directory is listed. The server imports this file by its name, for `_preload`, and
    so must start where this file is. What TensorFlow and CUDA print on their import
    goes to /dev/null unless the user's TF_CPP_MIN_LOG_LEVEL asks for it.
    """
    directory, filename = os.path.split(os.path.abspath(__file__))
    module = os.path.splitext(filename)[0] if __name__ == "__main__" else __name__
    sys.modules[module] = sys.modules[__name__]  # what a worker sends back is of it
    multiprocessing.set_forkserver_preload([module])
    working_dir = os.open(".", os.O_RDONLY)
    with contextlib.ExitStack() as stack:
        # Inherited by Python's resource tracker, which a terminal's hangup would end;
        # the semaphores would then outlive the run.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        stack.callback(os.close, working_dir)
        if "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
            null = stack.enter_context(open(os.devnull, "wb"))
            stack.enter_context(_stderr_to(null.fileno()))
        stack.callback(os.environ.pop, PRELOAD)
        os.environ[PRELOAD] = f"{os.getpid()} {__name__}"
        stack.callback(os.fchdir, working_dir)
        os.chdir(directory)
        _forkserver_thread.submit(multiprocessing.forkserver.ensure_running).result()


def _preload() -> None:
    """Readies the forkserver: TensorFlow imported, but nothing of it run yet.

    A fork after TensorFlow has run anything would hang.
    """
    _die_with_parent()
    run_pid, module = os.environ[PRELOAD].split()
    if os.getppid() != int(run_pid):  # it died before we asked to die with it
        os._exit(1)
    if module == "__main__":  # else each worker would load this file once more
        sys.modules["__main__"] = sys.modules["__mp_main__"] = sys.modules[__name__]
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # A worker will say what is wrong with the import.
    with _no_garbage_collection(), contextlib.suppress(ImportError):
        import tensorflow  # noqa: F401


def _start_worker() -> None:
    """Readies a worker: it works on one processor, quietly, while the run lives."""
    _die_with_parent()
    run_process = multiprocessing.parent_process()
    if run_process and not run_process.is_alive():
        os._exit(1)
    # Ctrl-C goes to all processes; SIGHUP does too, and is blocked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # libjpeg's warnings, one for each skeleton
    with contextlib.suppress(ImportError):  # the first image will raise it again
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def _die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends.

    The workers are children of the forkserver, which is a child of the run.
    NOTE: Linux only, as are the locks and the count of processors.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ---------------------------------------------------------------------------------
# D. A fake ImageNet: a demonstration for those who have no ImageNet yet


FAKE_TRAINING_IMAGES = 2048
FAKE_VALIDATION_IMAGES = 256
FAKE_MARK = ".fake_imagenet"  # in the directory of a fake one


def make_fake_imagenet(
    raw_data_dir: str, num_workers: int, scratch_dir: str = ""
) -> None:
    """Draws 2,048 training and 256 validation images of 1,000 synsets.

    They have ImageNet's layout, and its usual size of 500 x 375; no shard of the 1,024
    and 128 stays empty. The synsets, from n90000000 on, are not of WordNet. One that
    stands complete is left as it is; one cut off is drawn again.

    Raises:
      InvalidInputError: The directory holds something else.
    """
    root = pathlib.Path(raw_data_dir)
    mark = root / FAKE_MARK
    others = [path for path in root.glob("*") if str(path) != scratch_dir]
    if others and not mark.exists():
        raise InvalidInputError(
            f"--fake_imagenet must find --raw_data_dir={raw_data_dir} empty or "
            f"absent; it holds {_some(sorted(os.listdir(root)))}."
        )
    if (root / LABELS_FILE).exists():
        return
    logging.info(
        "Drawing %s into %s.",
        _count(FAKE_TRAINING_IMAGES + FAKE_VALIDATION_IMAGES, "fake image"),
        raw_data_dir,
    )
    root.mkdir(parents=True, exist_ok=True)
    mark.touch()
    synsets = [f"n{90_000_000 + i}" for i in range(IMAGENET_SYNSETS)]
    training = [
        f"{TRAINING_DIRECTORY}/{synsets[i % len(synsets)]}/"
        f"{synsets[i % len(synsets)]}_{i // len(synsets)}.JPEG"
        for i in range(FAKE_TRAINING_IMAGES)
    ]
    validation = [
        f"{VALIDATION_DIRECTORY}/ILSVRC2012_val_{i + 1:08d}.JPEG"
        for i in range(FAKE_VALIDATION_IMAGES)
    ]
    start_forkserver()
    paths = [root / path for path in training + validation]
    with worker_pool(num_workers) as workers:
        drawn = workers.map(draw_fake_image, paths, range(len(paths)), chunksize=16)
        collections.deque(drawn, maxlen=0)  # raises what a worker raised
    labels = [synsets[i] for i in range(FAKE_VALIDATION_IMAGES)]
    write_text(str(root / LABELS_FILE), "\n".join(labels) + "\n")  # last: all is there


def draw_fake_image(path: pathlib.Path, seed: int) -> None:
    """Draws coloured shapes on a shaded ground, 500 x 375, a JPEG of 30 to 100 KB."""
    import numpy as np
    import tensorflow as tf

    rng = random.Random(seed)
    y, x = np.mgrid[0:375, 0:500].astype(np.float32)
    shade = (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) / 500
    pixels = _colour(rng) + shade[..., None] * _colour(rng)
    for _ in range(rng.randint(8, 16)):
        _draw_shape(rng, x, y, pixels)
    grain = np.random.default_rng(seed).integers(-8, 9, (375, 500, 1))
    jpeg = tf.io.encode_jpeg(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg.numpy())


def _colour(rng: random.Random) -> numpy.ndarray:
    import numpy as np

    return np.array([rng.uniform(20, 235) for _ in range(3)], np.float32)


def _draw_shape(
    rng: random.Random, x: numpy.ndarray, y: numpy.ndarray, pixels: numpy.ndarray
) -> None:
    """Draws a striped ellipse or box, turned by any angle, with soft edges."""
    import numpy as np

    centre_x, centre_y = rng.uniform(0, 500), rng.uniform(0, 375)
    left, top = max(0, int(centre_x) - 100), max(0, int(centre_y) - 100)
    window = np.s_[top : int(centre_y) + 100, left : int(centre_x) + 100]
    angle = rng.uniform(0, math.pi)
    dx, dy = x[window] - centre_x, y[window] - centre_y
    u = (dx * math.cos(angle) + dy * math.sin(angle)) / rng.uniform(15, 70)
    v = (dy * math.cos(angle) - dx * math.sin(angle)) / rng.uniform(15, 70)
    distance = rng.choice([np.hypot(u, v), np.maximum(abs(u), abs(v))])
    coverage = np.clip((1 - distance) * 20, 0, 1)[..., None]
    stripes = 1 + 0.2 * np.sin(u * rng.uniform(3, 30))[..., None]
    pixels[window] += coverage * (_colour(rng) * stripes - pixels[window])


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
elif PRELOAD in os.environ:
    _preload()
