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
"""Turns raw ImageNet into TFRecord shards and uploads them to Cloud Storage.

    python3 imagenet_to_gcs.py --project=$PROJECT --gcs_output_path=$DATA_DIR \\
      --raw_data_dir=$IMAGENET_HOME --local_scratch_dir=$IMAGENET_HOME/tf_records

What goes in, under --raw_data_dir:

    train/n01440764/n01440764_18.JPEG       1,281,167 images, a directory a synset
    validation/ILSVRC2012_val_00000001.JPEG    50,000 images
    synset_labels.txt              line i is the synset of the i-th validation image

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

The same raw directory gives the same bytes on every machine, whatever the number of
workers and however often a run was cut off: the same command goes on from there.

Exit status: 0 when all is done; 1 when something is wrong, said in a line for each;
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
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import logging as python_logging
import math
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import queue
import random
import re
import shlex
import shutil
import signal
import stat
import struct
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TypeAlias

import google_crc32c
from absl import app, flags, logging

if TYPE_CHECKING:
    import numpy
    import tensorflow as tf
    from google.cloud import storage

LABELS_FILE = "synset_labels.txt"
MANIFEST_FILE = "manifest.json"

TRAINING_SHARDS = 1024
VALIDATION_SHARDS = 128

TRAINING_DIRECTORY = "train"
VALIDATION_DIRECTORY = "validation"


FLAGS = flags.FLAGS

flags.DEFINE_string("project", None, "Google Cloud project of the upload.")
flags.DEFINE_string(
    "gcs_output_path", None, "gs://bucket or gs://bucket/directory to upload to."
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
    "Encoding processes. Default: the processors that this process may use.",
)
flags.DEFINE_integer("training_shards", TRAINING_SHARDS, "Number of training shards.")
flags.DEFINE_integer(
    "validation_shards", VALIDATION_SHARDS, "Number of validation shards."
)
flags.DEFINE_bool(
    "fake_imagenet",
    False,
    "Where --raw_data_dir is empty or absent, first draw a small fake ImageNet there.",
)
flags.DEFINE_bool(
    "keep_local_shards",
    True,
    "Keep a shard in --local_scratch_dir after its upload, or remove it.",
)
flags.DEFINE_integer(
    "task_index", None, "Which of --task_count machines this is, counted from 0."
)
flags.DEFINE_integer(
    "task_count", 1, "How many machines share the work; each has its own index."
)
flags.DEFINE_bool(
    "dry_run", False, "Check everything, print what would be done, and end."
)


class InvalidInputError(ValueError):
    """Something in the input that must be mended; nothing was done.

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
    """Adds to a list, in place of raising it, what keeps the run from beginning."""
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
    """What tells an image from a later one of its name and size: nanoseconds."""
    return status.st_mtime_ns


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


RECORD_FORMAT = 1  # to be raised when the same images would give other bytes
RECORD_OVERHEAD = 350  # bytes of a record besides the JPEG, about


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One shard as planned, before a byte of it is written.

    Attributes:
      split: `train` or `validation`.
      index: 0-based, below `num_shards`.
      images: In the order of their records; empty where the split is small.
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
        """Bytes of the images, and about those of the records around them."""
        return sum(image.num_bytes + RECORD_OVERHEAD for image in self.images)

    def digest(self) -> str:
        """Hashes what the shard is made of: 64 hexadecimal digits of SHA-256.

        It changes with any image's name, class, size or time of modification, with
        their order, and with the shard's number.
        """
        sha256 = hashlib.sha256(f"{RECORD_FORMAT} {self.name}\n".encode())
        for i in self.images:
            line = f"{i.filename} {i.synset} {i.label} {i.num_bytes} {i.version}\n"
            sha256.update(line.encode(errors="surrogateescape"))
        return sha256.hexdigest()


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
    """Cuts n images into chunks of ceil(n / num_shards); the last can be empty.

    5 images in 4 shards: 2, 2, 1, 0.
    """
    size = math.ceil(len(images) / num_shards)
    return [
        Shard(split, i, num_shards, tuple(images[i * size : (i + 1) * size]))
        for i in range(num_shards)
    ]


# ---------------------------------------------------------------------------------
# 3. One image: read, checked, repaired, measured


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as it goes into its record.

    Attributes:
      jpeg: A JPEG of 1 or 3 components.
      height, width: Pixels.
      repaired: Whether it was a PNG or a CMYK JPEG and was encoded again.
    """

    jpeg: bytes
    height: int
    width: int
    repaired: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Skeleton:
    """The marker segments of a JPEG, without the entropy-coded data between them.

    Attributes:
      jpeg: The segments, about 2 KB, closed by the end marker, as of an image of 8 x 8
        pixels, so that decoding it takes no time and no memory.
      height, width, num_components: As the image's frame header declares them.
    """

    jpeg: bytes
    height: int
    width: int
    num_components: int


class _ImageError(ValueError):
    """The reason why an image cannot be used, in words."""


JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"

# FF 00 is a data byte FF, FF FF is filling, FF D0 to FF D7 are restart markers
# inside the data: all others begin a segment (ITU-T T.81, B.1.1).
_FILLING = 0xFF
_RESTART_MARKERS = frozenset(range(0xD0, 0xD8))
_END_MARKER = 0xD9
_BARE_MARKER = 0x01
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

_MAX_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_MAX_VALUES = 2**29  # height x width x components; TensorFlow's limit (jpeg_mem.cc)


def encode_image(image: RawImage) -> EncodedImage:
    """Reads an image and makes it a JPEG that every reader can decode.

    Raises:
      _ImageError: It cannot be read, or a full decode would reject it.
    """
    data = _read_image(image)
    if data.startswith(PNG_START):
        return _encode_again(_decode_png(data))
    skeleton = read_skeleton(data)
    _check_values(skeleton.height, skeleton.width, max(3, skeleton.num_components))
    _check_decodes(skeleton)
    if skeleton.num_components == 4:
        return _encode_again(_decode_cmyk(data))
    return EncodedImage(data, skeleton.height, skeleton.width)


def _read_image(image: RawImage) -> bytes:
    in_tar = image.offset is not None
    try:
        path = image.source if in_tar else image.path
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            if in_tar:
                file.seek(image.offset or 0)
            data = file.read(image.num_bytes if in_tar else -1) or b""
    except FileNotFoundError as error:
        is_link = os.path.islink(image.path)
        raise _ImageError("a link to nothing" if is_link else "it is gone") from error
    except OSError as error:
        raise _ImageError(f"{error.strerror}") from error
    if len(data) != image.num_bytes:
        raise _ImageError(
            f"it had {image.num_bytes:,} bytes when the run began and now has "
            f"{len(data):,}"
        )
    return data


def _open_without_waiting(path: str, mode: int) -> int:
    """Opens a file, also a named pipe, for whose writer a plain open would wait."""
    return os.open(path, mode | os.O_NONBLOCK)


def read_skeleton(data: bytes) -> Skeleton:
    """Reads the marker segments of a JPEG.

    libjpeg fails on bad segments and on a missing end, never on what stands between:
    it fills up broken data. So the skeleton, decoded, gets the whole image's verdict
    in an eighth of the time.

    Raises:
      _ImageError: Not a JPEG, or one without frame header or end.
    """
    if not data.startswith(JPEG_START):
        raise _ImageError(_not_a_jpeg(data))
    import numpy as np

    values = np.frombuffer(data, np.uint8)
    is_marker = ((values[:-1] == 0xFF) & (values[1:] != 0)).tobytes()
    segments = [data[:2]]
    frame = b""
    position = 2
    while (start := is_marker.find(1, position)) >= 0:
        position = start + 2
        marker = data[start + 1]
        if marker == _FILLING:
            position = start + 1
        elif marker == _END_MARKER:
            break
        elif marker not in _RESTART_MARKERS:
            if marker != _BARE_MARKER:
                # The length counts its own two bytes; one that says less is damaged,
                # and libjpeg must see it to say so.
                length = int.from_bytes(data[position : position + 2], "big")
                position += max(2, length)
            segments.append(data[start:position])
            if marker in _FRAME_MARKERS and not frame:
                frame = segments[-1]
                segments[-1] = frame[:5] + struct.pack(">HH", 8, 8) + frame[9:]
    else:
        raise _ImageError("it is cut short: no end marker")
    if len(frame) < 10:
        raise _ImageError("it has no frame header")
    height, width, num_components = struct.unpack_from(">HHB", frame, 5)
    jpeg = b"".join((*segments, data[start : start + 2]))
    return Skeleton(jpeg, height, width, num_components)


def _not_a_jpeg(data: bytes) -> str:
    return f"not a JPEG (starts with {data[:4]!r})" if data else "the file is empty"


def _check_values(height: int, width: int, num_components: int = 3) -> None:
    """Refuses what a small file could blow up to gigabytes, as a full decode does."""
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
        # Bytes, or an int where a float is meant, would be converted the slow way.
        contents = tf.constant(skeleton.jpeg)
        tf.raw_ops.DecodeJpeg(contents=contents, ratio=8, acceptable_fraction=1.0)

    try:
        decode()
    except tf.errors.InvalidArgumentError as error:
        raise _ImageError(_reason_of_libjpeg(decode)) from error


def _reason_of_libjpeg(decode: Callable[[], None]) -> str:
    """Decodes again to catch libjpeg's reason, which it writes to stderr only."""
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


def _decode_png(data: bytes) -> tf.Tensor:
    """Decodes a PNG to pixels of shape (height, width, 3), uint8."""
    import tensorflow as tf

    if len(data) < 24:
        raise _ImageError("it is a PNG cut short")
    width, height = struct.unpack_from(">II", data, 16)
    _check_values(height, width)
    try:
        return tf.io.decode_png(data, channels=3)
    except tf.errors.InvalidArgumentError as error:
        raise _ImageError("it is a PNG that cannot be decoded") from error


def _decode_cmyk(data: bytes) -> tf.Tensor:
    """Decodes a JPEG of four components to pixels of shape (height, width, 3), uint8.

    TensorFlow's own conversion is what the reference's shards hold.
    """
    import tensorflow as tf

    try:
        return tf.io.decode_jpeg(data, channels=3)
    except tf.errors.InvalidArgumentError as error:
        raise _ImageError("it is a CMYK JPEG that cannot be decoded") from error


def _encode_again(pixels: tf.Tensor) -> EncodedImage:
    import tensorflow as tf

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


@dataclasses.dataclass(frozen=True, slots=True)
class Stamp:
    """What is known of a finished shard; kept beside it as a hidden JSON file.

    Attributes:
      digest: `Shard.digest()` of the plan it was written for.
      num_bytes: Size of the TFRecord file.
      crc32c: Of the file: base64 of 4 big-endian bytes, as Cloud Storage says it.
      num_repaired: How many of its images were encoded again.
    """

    digest: str
    num_examples: int
    num_bytes: int
    crc32c: str
    num_repaired: int

    def same_bytes(self, other: Stamp) -> bool:
        return (self.num_bytes, self.crc32c) == (other.num_bytes, other.crc32c)


@dataclasses.dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard that stands complete in the scratch directory."""

    path: str
    stamp: Stamp

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclasses.dataclass(frozen=True, slots=True)
class UnfinishedShard:
    """A shard that is written, but perhaps not yet on disk, under a hidden name."""

    temporary_path: str
    path: str
    stamp: Stamp


class BadImagesError(InvalidInputError):
    """Images that cannot be decoded; all was done but for the shards that hold them."""


def shard_path(shard: Shard, scratch_dir: str) -> str:
    """Where a shard goes: `<scratch_dir>/train/train-00007-of-01024`."""
    return os.path.join(scratch_dir, shard.split, shard.name)


def _stamp_path(path: str) -> str:
    """The stamp of `train/train-00007-of-01024`: `train/.train-00007-of-01024.json`."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.json")


def write_shard(shard: Shard, scratch_dir: str) -> FinishedShard:
    """Writes a shard and its stamp.

    Raises:
      BadImagesError: All bad images of the shard; nothing was written.
      OSError: The scratch directory cannot hold it; nothing was written.
    """
    return finish_shard(write_records(shard, scratch_dir))


def write_records(shard: Shard, scratch_dir: str) -> UnfinishedShard:
    """Writes a shard's records to a hidden file; runs in a worker process.

    To wait for the disk as well would take longer than the encoding does.

    Raises:
      BadImagesError, OSError: As `write_shard`.
    """
    path = shard_path(shard, scratch_dir)
    pathlib.Path(_stamp_path(path)).unlink(missing_ok=True)  # of another plan
    problems = []
    num_repaired = 0
    with _temporary_file(path) as file:
        records = RecordWriter(file)
        for image in shard.images:
            try:
                encoded = encode_image(image)
            except _ImageError as error:
                problems.append(f"Cannot decode {image.path}: {error}.")
            if not problems:
                records.write(make_example(image, encoded))
                num_repaired += encoded.repaired
        if problems:
            raise BadImagesError(*problems)
    stamp = Stamp(
        shard.digest(),
        len(shard.images),
        records.num_bytes,
        _crc32c_text(records.crc32c),
        num_repaired,
    )
    return UnfinishedShard(file.name, path, stamp)


def finish_shard(shard: UnfinishedShard) -> FinishedShard:
    """Waits until a shard is on disk, and gives it its name and its stamp.

    Raises:
      OSError: It cannot be; it is removed.
    """
    _publish(shard.temporary_path, shard.path)
    _write_json(_stamp_path(shard.path), dataclasses.asdict(shard.stamp))
    return FinishedShard(shard.path, shard.stamp)


def is_complete(shard: Shard, scratch_dir: str) -> bool:
    """Whether a shard is finished and made of the raw images as they are today."""
    return find_finished(shard, scratch_dir) is not None


def find_finished(shard: Shard, scratch_dir: str) -> FinishedShard | None:
    """Finds a shard that `is_complete`."""
    path = shard_path(shard, scratch_dir)
    stamp = read_stamp(path)
    if stamp is None or stamp.digest != shard.digest():
        return None
    return FinishedShard(path, stamp)


def read_stamp(path: str) -> Stamp | None:
    """Reads the stamp of a shard; None where it or the shard is not as stamped."""
    try:
        with open(_stamp_path(path), encoding="utf-8") as file:
            stamp = Stamp(**json.load(file))
        return stamp if os.path.getsize(path) == stamp.num_bytes else None
    except (OSError, ValueError, TypeError):
        return None


def measure(path: str) -> FinishedShard:
    """Reads a file, if it has no stamp, for its size and crc32c."""
    stamp = read_stamp(path)
    if not stamp:
        stamp = Stamp("", 0, os.path.getsize(path), read_crc32c(path), 0)
    return FinishedShard(path, stamp)


def read_crc32c(path: str) -> str:
    """Reads a file for its crc32c, as in `Stamp`."""
    crc32c = 0
    with open(path, "rb") as file:
        while block := file.read(READ_BLOCK_BYTES):
            crc32c = google_crc32c.extend(crc32c, block)
    return _crc32c_text(crc32c)


class RecordWriter:
    """Frames TFRecords and keeps the checksum of the whole file as it grows.

    A record is its length (8 bytes, little-endian), the masked crc32c of these 8
    bytes, the data, and the masked crc32c of the data
    (https://www.tensorflow.org/tutorials/load_data/tfrecord). TensorFlow's own writer
    does not tell the file's checksum, which would have to be read again for it.

    Attributes:
      num_bytes: Written so far.
      crc32c: Of all that, unmasked.
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
def _temporary_file(path: str) -> Iterator[BinaryIO]:
    """Opens a hidden file beside a path, which is removed where writing it fails."""
    directory, name = os.path.split(path)
    unique = f"{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}"
    temporary_path = os.path.join(directory, f".{name}.{unique}{TEMPORARY_SUFFIX}")
    os.makedirs(directory, exist_ok=True)
    with _removed_on_failure(temporary_path, path):
        file = open(temporary_path, "wb", buffering=WRITE_BUFFER_BYTES)  # noqa: SIM115
        try:
            yield file
        except BaseException:
            with contextlib.suppress(OSError):  # closing tries to write what is left
                file.close()
            raise
        file.close()


def _publish(temporary_path: str, path: str) -> None:
    """Gives a file its name, once it is on disk, where no loss of power undoes it."""
    with _removed_on_failure(temporary_path, path):
        file_descriptor = os.open(temporary_path, os.O_RDONLY)
        try:
            os.fsync(file_descriptor)
        finally:
            os.close(file_descriptor)
        os.replace(temporary_path, path)


@contextlib.contextmanager
def _removed_on_failure(temporary_path: str, path: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary_path)
        if isinstance(error, OSError) and error.filename in (None, temporary_path):
            error.filename = path  # a write does not say to which file
        raise


@contextlib.contextmanager
def _complete_or_absent(path: str) -> Iterator[BinaryIO]:
    """Opens a small file that appears under its name only once it is whole.

    It is not waited for: torn by a loss of power, it cannot be read, and is as good as
    absent.
    """
    with _temporary_file(path) as file:
        yield file
    os.replace(file.name, path)


def _write_json(path: str, value: Mapping[str, Any]) -> None:
    with _complete_or_absent(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


# ---------------------------------------------------------------------------------
# 6. All shards: the processes that write and the threads that upload


FINISHING_THREADS = 4  # each waits for the disk to have a shard
PROGRESS_SECONDS = 10.0

Future: TypeAlias = "concurrent.futures.Future[Any]"


@dataclasses.dataclass
class Progress:
    """What a run has to do and has done.

    Attributes:
      finished: Shards of which nothing is left to do: written, and uploaded where
        there is a bucket.
      bad_images: A line for each image whose shard is left out.
    """

    shards_to_write: int = 0
    images_to_write: int = 0
    shards_to_upload: int = 0
    shards_written: int = 0
    images_written: int = 0
    bytes_written: int = 0
    images_repaired: int = 0
    finished: list[FinishedShard] = dataclasses.field(default_factory=list)
    bad_images: list[str] = dataclasses.field(default_factory=list)
    start: float = dataclasses.field(default_factory=time.monotonic)
    next_line: float = dataclasses.field(
        default_factory=lambda: time.monotonic() + PROGRESS_SECONDS
    )

    def wrote(self, stamp: Stamp) -> None:
        self.shards_written += 1
        self.images_written += stamp.num_examples
        self.bytes_written += stamp.num_bytes
        self.images_repaired += stamp.num_repaired

    def log_when_due(self) -> None:
        if time.monotonic() >= self.next_line:
            logging.info("%s", self.line())
            self.next_line = time.monotonic() + PROGRESS_SECONDS

    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-3)

    def line(self) -> str:
        """Says how far the run is, and how long it will take at this speed."""
        parts = []
        done = []
        if self.shards_to_write:
            done.append(self.images_written / max(self.images_to_write, 1))
            parts += [
                f"{self.shards_written:,} of {self.shards_to_write:,} shards",
                (
                    f"{self.images_written:,} of {_count(self.images_to_write, 'image')} "
                    f"({math.floor(100 * done[0])}%)"
                ),
                self.speed(),
            ]
        if self.shards_to_upload:
            done.append(len(self.finished) / self.shards_to_upload)
            parts.append(
                f"uploaded {len(self.finished):,} of {self.shards_to_upload:,}"
            )
        slowest = min(done, default=1)
        if slowest > 0:
            parts.append(f"{_duration(self.seconds() * (1 / slowest - 1))} left")
        return ", ".join(parts) + "."

    def speed(self) -> str:
        images = self.images_written / self.seconds()
        return f"{images:,.0f} images/s, {_size(self.bytes_written / self.seconds())}/s"


def write_and_upload(
    to_write: Sequence[Shard],
    to_upload: Sequence[FinishedShard],
    scratch_dir: str,
    num_workers: int,
    upload: Callable[[FinishedShard], FinishedShard] | None,
    max_unfinished: int,
    progress: Progress,
) -> None:
    """Writes shards in processes, and uploads each in a thread once it is finished.

    Args:
      to_write: Shards that are not complete.
      to_upload: Shards that are, but are not in the bucket.
      upload: Uploads one shard and returns it; None where there is no bucket.
      max_unfinished: How many shards may be begun and not yet uploaded.
      progress: Counts, and keeps what was done.

    Raises:
      RunError, OSError, BrokenProcessPool: The first failure but for a bad image; what
        has not begun is cancelled.
    """
    done: queue.SimpleQueue[Future] = queue.SimpleQueue()
    next_step: dict[Future, Callable[[Any], None]] = {}
    waiting = collections.deque(to_write)

    def start(
        pool: concurrent.futures.Executor,
        function: Callable[..., Any],
        *arguments: Any,
        then: Callable[[Any], None],
    ) -> None:
        future = pool.submit(function, *arguments)
        next_step[future] = then
        future.add_done_callback(done.put)

    def on_written(shard: UnfinishedShard) -> None:
        start(finishers, finish_shard, shard, then=on_finished)

    def on_finished(shard: FinishedShard) -> None:
        progress.wrote(shard.stamp)
        send(shard)

    def send(shard: FinishedShard) -> None:
        if upload:
            start(uploaders, upload, shard, then=progress.finished.append)
        else:
            progress.finished.append(shard)

    if to_write:
        start_forkserver()
    with (
        _closing(concurrent.futures.ThreadPoolExecutor(UPLOAD_THREADS)) as uploaders,
        _closing(concurrent.futures.ThreadPoolExecutor(FINISHING_THREADS)) as finishers,
        _closing(_worker_pool(num_workers)) as workers,
    ):
        for shard in to_upload:
            send(shard)
        while waiting or next_step:
            while waiting and len(next_step) < max_unfinished:
                planned = waiting.popleft()
                start(workers, write_records, planned, scratch_dir, then=on_written)
            progress.log_when_due()
            with contextlib.suppress(queue.Empty):
                future = done.get(timeout=1)
                try:
                    next_step.pop(future)(future.result())
                except BadImagesError as error:
                    progress.bad_images.extend(error.problems)


@contextlib.contextmanager
def _closing(
    pool: concurrent.futures.Executor,
) -> Iterator[concurrent.futures.Executor]:
    """Waits for a pool's work, but drops it where something failed."""
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


# ---------------------------------------------------------------------------------
# 7. Cloud Storage: what is in the bucket, and getting more there


UPLOAD_THREADS = 8  # the client's connection pool holds 10
UPLOAD_CHUNK_BYTES = 5 * 2**20  # in memory for each thread
SMALL_UPLOAD_BYTES = 8 * 2**20  # up to here the client uploads in one request
TIMEOUT = (10, 60)  # seconds to connect, and to answer
CHUNK_TIMEOUT = (10, 300)  # and to send a chunk: at 0.02 MB/s at least
START_SECONDS = 120  # how long to wait for a fault to pass before the first image
UPLOAD_SECONDS = 600  # and for each request of an upload
WARNING_SECONDS = 10
RETRY_SECONDS = (1, 4, 16, 60)  # before a file is uploaded again from its start
LISTED_FIELDS = (
    "name,size,crc32c,metadata,retentionExpirationTime,temporaryHold,eventBasedHold"
)

AnyCall: TypeAlias = "Callable[..., Any]"


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
        """Parses `gs://bucket` or `gs://bucket/directory`, with or without a final `/`.

        Raises:
          InvalidInputError: It is anything else.
        """
        match = re.fullmatch(r"gs://([^/]*)/?(.*)", text)
        bucket, directory = match.groups() if match else ("", "")
        if not match:
            problem = "must start with gs://, as in gs://bucket/directory"
        elif not _BUCKET_NAME.fullmatch(bucket):
            problem = (
                "must name a bucket after gs://: 3 to 222 characters of a-z, 0-9, '-', "
                f"'_' and '.'; found {bucket!r}"
            )
        else:
            return cls(bucket, directory.strip("/"))
        raise InvalidInputError(f"--gcs_output_path={text} {problem}.")

    def name_of(self, filename: str) -> str:
        """Names a file of the directory as the bucket does: `directory/filename`."""
        return "/".join(filter(None, [self.directory, filename]))


# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


class Destination:
    """A directory in a bucket, and the client that reaches it.

    It never calls the client's `get_bucket`, which needs `storage.buckets.get`: the
    roles for objects do not include that.

    Attributes:
      is_listed: Whether the last listing was permitted.
      held: Why an object of the last listing cannot be replaced, by base name.
    """

    def __init__(
        self,
        path: GcsPath,
        project: str | None,
        client: storage.Client | None = None,
    ):
        # Otherwise the client also asks for the bucket's metadata, in its own thread.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "1")
        for library in ("google", "urllib3"):  # each of their retries is a warning
            python_logging.getLogger(library).setLevel(python_logging.ERROR)
        from google.cloud import storage

        self.path = path
        self.is_listed = True
        self.held: dict[str, str] = {}
        self._next_warning = 0.0
        with self._explained(""):
            create = self._patiently(START_SECONDS)(storage.Client)
            self._client = client or create(project=project)
            self._bucket = self._client.bucket(path.bucket)
            _ = self._client._http  # created without a lock: do it before the threads
        self._payer = project or self._client.project

    def check_access(self) -> None:
        """Starts an upload and cancels it, which takes the permissions of an upload."""
        from google.api_core import exceptions

        with self._explained(MANIFEST_FILE):
            try:
                self._start_and_cancel()
            except exceptions.BadRequest as error:
                if "requester pays" not in str(error):
                    raise
                # To bill a project takes a permission in it: only where it must be.
                self._bucket = self._client.bucket(self.path.bucket, self._payer)
                self._start_and_cancel()

    def _start_and_cancel(self) -> None:
        blob = self._bucket.blob(self.path.name_of(MANIFEST_FILE))
        patiently = self._patiently(START_SECONDS)
        url = blob.create_resumable_upload_session(timeout=TIMEOUT, retry=patiently)
        patiently(self._client._http.delete)(url, timeout=TIMEOUT)

    def list_objects(self) -> dict[str, Stamp] | None:
        """Lists the destination by base name; None if listing is not permitted."""
        from google.api_core import exceptions

        prefix = self.path.directory + "/" if self.path.directory else ""
        with self._explained(""):
            blobs = self._client.list_blobs(
                self._bucket,
                prefix=prefix,
                delimiter="/",
                fields=f"items({LISTED_FIELDS}),nextPageToken",
                timeout=TIMEOUT,
                retry=self._patiently(START_SECONDS),
            )
            try:
                listed = {blob.name.removeprefix(prefix): blob for blob in blobs}
            except exceptions.Forbidden:
                self.is_listed = False
                return None
        self.held = {name: why for name, blob in listed.items() if (why := _hold(blob))}
        return {name: _stamp_of(blob) for name, blob in listed.items()}

    def upload(self, path: str, stamp: Stamp) -> None:
        """Uploads a file, from its start again if the client has given up.

        The client itself retries one request; not a lost upload (404 or 410), nor an
        answer that does not match.
        """
        name = os.path.basename(path)
        with self._explained(name):
            for seconds in RETRY_SECONDS:
                try:
                    return self._upload_once(path, stamp)
                except Exception as error:
                    if is_final(error):
                        raise
                    _check_undamaged(path, stamp)
                    again = f"Uploading {name} again in {_duration(seconds)}"
                    logging.warning(f"{again}: {words_of(error)}.")
                    time.sleep(seconds)
            self._upload_once(path, stamp)

    def _upload_once(self, path: str, stamp: Stamp) -> None:
        name = self.path.name_of(os.path.basename(path))
        blob = self._bucket.blob(name, chunk_size=UPLOAD_CHUNK_BYTES)
        blob.metadata = {"digest": stamp.digest, "crc32c": stamp.crc32c}
        is_small = stamp.num_bytes <= SMALL_UPLOAD_BYTES
        reader: AnyCall = io.BufferedReader if is_small else _ChunkReader
        with reader(open_regular(path)) as file:
            blob.upload_from_file(
                file,
                size=stamp.num_bytes,
                content_type="application/octet-stream",
                timeout=CHUNK_TIMEOUT,
                # The service refuses other bytes than of this checksum. For small files
                # the client computes it, for others it passes on what it is told.
                checksum="crc32c" if is_small else None,
                crc32c_checksum_value=stamp.crc32c,
                retry=self._patiently(UPLOAD_SECONDS),
            )
        stored = _stamp_of(blob)
        if not stored.same_bytes(stamp):
            raise ValueError(
                f"the bucket holds {stored.num_bytes:,} bytes of crc32c "
                f"{stored.crc32c}, not {stamp.num_bytes:,} of {stamp.crc32c}"
            )

    def delete(self, filename: str, must: bool) -> None:
        """Deletes a file of the directory if it is there.

        Args:
          must: Whether it is known to be there; otherwise a refusal is no error.
        """
        from google.api_core import exceptions

        no_error = [exceptions.NotFound, *([] if must else [exceptions.Forbidden])]
        blob = self._bucket.blob(self.path.name_of(filename))
        with self._explained(filename), contextlib.suppress(*no_error):
            blob.delete(timeout=TIMEOUT, retry=self._patiently(START_SECONDS))

    def _patiently(self, seconds: float) -> Callable[[AnyCall], AnyCall]:
        """Makes the `retry` of a request: it waits so long for a fault to pass."""
        from google.cloud.storage.retry import DEFAULT_RETRY

        retry = DEFAULT_RETRY.with_predicate(may_pass).with_timeout(seconds)
        retry = retry.with_delay(initial=1, maximum=10, multiplier=2)
        return lambda request: retry(
            request, on_error=functools.partial(self._warn, time.monotonic(), seconds)
        )

    def _warn(self, start: float, seconds: float, error: BaseException) -> None:
        """Says what a request waits for: after 10 s, for all threads once a minute."""
        now = time.monotonic()
        if now >= max(start + WARNING_SECONDS, self._next_warning):
            self._next_warning = now + 60
            what = f"Waiting up to {_duration(seconds)} for {self.path}"
            logging.warning(f"{what}: {words_of(error)}.")

    @contextlib.contextmanager
    def _explained(self, filename: str) -> Iterator[None]:
        """Turns any error but that of a missing file into one line."""
        try:
            yield
        except (RunError, FileNotFoundError):
            raise
        except Exception as error:
            place = f"{self.path}/{filename}".removesuffix("/")
            raise RunError(explain(error, place, f"gs://{self.path.bucket}")) from error


class _ChunkReader(io.BufferedReader):
    """Reads a file for the client, which asks for a chunk at a time, into one buffer.

    With `bytes` the client would hold two chunks a thread, each cleared by the kernel:
    8 threads took 120 MB then, and a fifth more processor time; now they take 41 MB.
    """

    def __init__(self, file: io.RawIOBase):
        super().__init__(file)
        self._chunk = memoryview(bytearray(UPLOAD_CHUNK_BYTES))

    def read(self, size: int | None = -1) -> Any:
        return self._chunk[: self.readinto(self._chunk[:size])]


def _stamp_of(blob: storage.Blob) -> Stamp:
    """What the bucket says of an object; its digest only if the bytes are as written.

    Some servers leave a size of 0 out.
    """
    metadata = blob.metadata or {}
    is_as_written = metadata.get("crc32c") == blob.crc32c
    digest = metadata.get("digest", "") if is_as_written else ""
    return Stamp(digest, 0, blob.size or 0, blob.crc32c or "", 0)


def _hold(blob: storage.Blob) -> str:
    """Says what keeps an object from being replaced or deleted; empty if nothing."""
    until = blob.retention_expiration_time
    is_retained = until and until.timestamp() > time.time()
    holds = [
        (blob.temporary_hold, "temporary hold"),
        (blob.event_based_hold, "event-based hold"),
        (is_retained, f"retained until {until and until.isoformat(' ', 'seconds')}"),
    ]
    return ", ".join(why for is_held, why in holds if is_held)


def held_problem(path: GcsPath, held: Mapping[str, str]) -> str:
    """Words that a run must replace objects that cannot be (some of `held`)."""
    some = _some([f"{name} ({why})" for name, why in sorted(held.items())])
    return (
        f"{path} must not hold back what this run has to replace; found {some}. Release "
        "the holds, or choose another directory."
    )


def foreign_problem(path: GcsPath, names: Sequence[str]) -> str:
    """Words that models would read other objects too, and how to delete just those."""
    pattern = r"(\w+-)(\d{5})(-of-(\d{5}))"
    globs = {  # not of an index beyond the count: that may be the count of this run
        re.sub(pattern, lambda m: f"{m[1]}*{m[3]}" if m[2] < m[4] else m[0], name)
        for name in names
    }
    objects = " ".join(shlex.quote(f"{path}/{glob}") for glob in sorted(globs))
    remedy = "Delete them" + f" (gcloud storage rm {objects})" * (len(globs) <= 10)
    return (
        f"{path} contains train-* or validation-* objects from elsewhere, which models "
        f"would also read: {_some(sorted(names))}. {remedy}, or choose another directory."
    )


def _check_undamaged(path: str, stamp: Stamp) -> None:
    """Checks that a file whose upload failed is still as it was written."""
    if read_crc32c(path) != stamp.crc32c:
        pathlib.Path(_stamp_path(path)).unlink(missing_ok=True)
        raise RunError(
            f"{path} has changed since it was written. Rerun the same command: it "
            "writes the file again."
        )


# ---------------------------------------------------------------------------------
# 8. One run: what is left to do, whether it can be done, doing it


@dataclasses.dataclass(frozen=True)
class Work:
    """What of a plan is left to do.

    Attributes:
      to_write: Shards that are finished neither here nor in the bucket.
      to_upload: Shards that are finished here but not in the bucket.
      done: The others, by base name, as they stand in the bucket or here.
    """

    to_write: list[Shard]
    to_upload: list[FinishedShard]
    done: dict[str, Stamp]

    @property
    def is_done(self) -> bool:
        return not (self.to_write or self.to_upload)


def find_work(
    shards: Iterable[Shard],
    scratch_dir: str,
    objects: Mapping[str, Stamp] | None,
) -> Work:
    """Compares a plan with what the scratch directory and the bucket hold.

    Args:
      objects: Of the bucket, by base name; None where nothing is uploaded.
    """
    work = Work([], [], {})
    for shard in shards:
        finished = find_finished(shard, scratch_dir)
        stored = objects.get(shard.name) if objects else None
        if finished and (
            objects is None or (stored and stored.same_bytes(finished.stamp))
        ):
            work.done[shard.name] = finished.stamp
        elif finished:
            work.to_upload.append(finished)
        elif stored and stored.digest == shard.digest():
            work.done[shard.name] = stored
        else:
            work.to_write.append(shard)
    return work


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, with all that is known before its first image.

    Attributes:
      synsets: As in `Dataset`.
      shards: The whole plan, that of the other tasks too.
      destination: Where to upload to; None to write the shards only.
      objects: What the bucket holds there, by base name; None without an upload.
      work: What is left to do of this task's share.
    """

    options: Options
    synsets: tuple[str, ...]
    shards: list[Shard]
    destination: Destination | None
    objects: Mapping[str, Stamp] | None
    work: Work


def _prepare(options: Options) -> Job:
    """Reads, plans and checks whatever can be before the first image.

    Raises:
      InvalidInputError: All that keeps the run from beginning.
    """
    problems: list[str] = []
    dataset = EMPTY_DATASET
    destination, objects = None, None
    with _closing(concurrent.futures.ThreadPoolExecutor(1)) as background:
        opened = background.submit(_open_destination, options)
        with _collecting(problems):
            dataset = read_dataset(options.raw_dir)
            _log_dataset(dataset, options.raw_dir)
        with _collecting(problems):
            destination, objects = opened.result()
    shards = plan_shards(dataset, options.training_shards, options.validation_shards)
    _warn_of_foreign_files(options.scratch_dir, shards)
    work = find_work(options.share(shards), options.scratch_dir, objects)
    problems += _scratch_problems(options, work)
    if destination and (foreign := _foreign(objects or (), shards)):
        problems.append(foreign_problem(destination.path, foreign))
    replaced = {shard.name for shard in work.to_write}
    replaced |= {finished.name for finished in work.to_upload}
    if not work.is_done:
        replaced.add(MANIFEST_FILE)
    if destination and (held := replaced & destination.held.keys()):
        reasons = {name: destination.held[name] for name in held}
        problems.append(held_problem(destination.path, reasons))
    if problems:
        raise InvalidInputError(*problems)
    return Job(options, dataset.synsets, shards, destination, objects, work)


def _log_dataset(dataset: Dataset, raw_dir: str) -> None:
    classes = len({image.synset for image in dataset.training})
    logging.info(
        "Found %s in %s and %s (%s) in %s: %s.",
        _count(len(dataset.training), "training image"),
        _count(classes, "synset"),
        _count(len(dataset.validation), "validation image"),
        _size(dataset.num_bytes),
        raw_dir,
        dataset.layout,
    )
    if not os.path.exists(os.path.join(raw_dir, FAKE_MARK)):
        for line in shortfalls(dataset):
            logging.warning("%s", line)


def _open_destination(
    options: Options,
) -> tuple[Destination | None, Mapping[str, Stamp] | None]:
    """Reaches the bucket and lists it; neither where nothing is to be uploaded.

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
            "Cannot list %s (storage.objects.list is not granted): all shards will be "
            "uploaded, whatever is there.",
            path,
        )
    return destination, objects or {}


def _foreign(filenames: Iterable[str], shards: Iterable[Shard]) -> list[str]:
    """Picks what models would read besides the shards of this plan."""
    planned = {shard.name for shard in shards}
    pattern = re.compile(f"({TRAINING_DIRECTORY}|{VALIDATION_DIRECTORY})-")
    return sorted(n for n in filenames if pattern.match(n) and n not in planned)


def _shard_files(scratch_dir: str) -> Iterable[pathlib.Path]:
    """Finds what is named like a finished shard, of whatever plan."""
    return pathlib.Path(scratch_dir).glob("*/*-of-*")


def _warn_of_foreign_files(scratch_dir: str, shards: Iterable[Shard]) -> None:
    found = [path.name for path in _shard_files(scratch_dir)]
    if foreign := _foreign(found, shards):
        logging.warning(
            "%s also holds %s of another plan: %s. Remove what you do not need.",
            scratch_dir,
            _count(len(foreign), "shard"),
            _some(foreign),
        )


def _scratch_problems(options: Options, work: Work) -> Iterator[str]:
    """Words why the scratch directory cannot take the shards still to be written."""
    place = pathlib.Path(options.scratch_dir)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield f"--local_scratch_dir={options.scratch_dir}: {place} must be a directory."
    elif not os.access(place, os.W_OK | os.X_OK):
        yield f"--local_scratch_dir={options.scratch_dir}: {place} must be writable."
    else:
        sizes = sorted((shard.num_bytes for shard in work.to_write), reverse=True)
        needed = sum(sizes[: options.max_unfinished])
        free = shutil.disk_usage(place).free
        remedy = "Make room, or choose another disk."
        if options.gcs_upload and options.keep_local_shards:
            remedy = "Make room, choose another disk, or pass --nokeep_local_shards."
        elif options.gcs_upload:  # those that the bucket has will be removed first
            shards = _shard_files(options.scratch_dir)
            free += sum(s.stat().st_size for s in shards if s.name in work.done)
        if needed > free:
            yield (
                f"--local_scratch_dir={options.scratch_dir} must have room for "
                f"{_size(needed)} of shards; its disk has {_size(free)} free. {remedy}"
            )


@contextlib.contextmanager
def _locked(options: Options) -> Iterator[None]:
    """Keeps a second run of this task out; the lock dies with the process.

    Raises:
      RunError: There is one already.
    """
    name = ".lock"
    if options.task_count > 1:
        name += f"-{options.task}-of-{options.task_count}"
    os.makedirs(options.scratch_dir, exist_ok=True)
    with open(os.path.join(options.scratch_dir, name), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"Another run is writing to {options.scratch_dir}: wait for its end, "
                "or choose another --local_scratch_dir."
            ) from None
        except OSError as error:  # some network file systems cannot
            logging.warning(
                "Cannot lock %s (%s): do not run two at once.",
                options.scratch_dir,
                error.strerror,
            )
        yield


def _log_intent(job: Job) -> None:
    """Says what is there and what will be done."""
    options, work = job.options, job.work
    num_shards = len(options.share(job.shards))
    if len(work.to_write) < num_shards:
        logging.info(
            "Resuming: %s of %s are up to date, %s only to be uploaded.",
            f"{len(work.done):,}",
            _count(num_shards, "shard"),
            f"{len(work.to_upload):,}",
        )
    if options.task_count > 1:
        whole = find_work(job.shards, options.scratch_dir, job.objects)
        logging.info(
            "Task %s of %s. Over all tasks, %s of %s are still missing.",
            f"{options.task:,}",
            f"{options.task_count:,}",
            f"{len(whole.to_write) + len(whole.to_upload):,}",
            _count(len(job.shards), "shard"),
        )
    if work.to_write:
        logging.info(
            "%s %s of %s (%s) to %s%s.",
            "Would write" if options.dry_run else "Writing",
            _count(len(work.to_write), "shard"),
            _count(sum(len(shard.images) for shard in work.to_write), "image"),
            _size(sum(shard.num_bytes for shard in work.to_write)),
            options.scratch_dir,
            f", and from there to {job.destination.path}" if job.destination else "",
        )


def _carry_out(job: Job) -> None:
    """Does the work, checks that all is where it should be, and says so.

    Raises:
      BadImagesError: All was done but the shards of these images.
      RunError: What stopped it.
    """
    _remove_temporary_files(job.options)
    if not job.work.is_done:
        _remove_manifest(job)
    if not job.options.keep_local_shards:
        _remove_uploaded(job)
    progress = _new_progress(job)
    _write_and_upload(job, progress)
    if progress.bad_images:
        logging.info(
            "%s cannot be used; their shards are left out. Replace them and run the "
            "same command again.",
            _count(len(progress.bad_images), "image"),
        )
        raise BadImagesError(*sorted(progress.bad_images))
    stored = dict(job.work.done)
    stored.update((s.name, s.stamp) for s in progress.finished)
    objects = job.objects
    if job.destination:
        objects = check_uploaded(job.destination, stored)
        _log_uploaded(job.destination, progress)
    if job.options.task_count > 1:
        stored |= find_work(job.shards, job.options.scratch_dir, objects).done
    missing = len(job.shards) - len(stored)
    if missing:
        logging.info(
            "This task is done; %s of other tasks are still missing.",
            _count(missing, "shard"),
        )
    else:
        _write_manifest(job, stored)
        _log_complete(job, stored)


def _new_progress(job: Job) -> Progress:
    work = job.work
    num_uploads = len(work.to_write) + len(work.to_upload)
    return Progress(
        shards_to_write=len(work.to_write),
        images_to_write=sum(len(shard.images) for shard in work.to_write),
        shards_to_upload=num_uploads if job.destination else 0,
    )


def _write_and_upload(job: Job, progress: Progress) -> None:
    options, work = job.options, job.work
    try:
        write_and_upload(
            work.to_write,
            work.to_upload,
            options.scratch_dir,
            options.workers,
            _upload_function(job),
            options.max_unfinished,
            progress,
        )
    except BaseException:
        logging.info(
            "Stopping: %s of %s are done.",
            f"{len(work.done) + len(progress.finished):,}",
            _count(len(options.share(job.shards)), "shard"),
        )
        raise
    _log_written(job, progress)


def _upload_function(job: Job) -> Callable[[FinishedShard], FinishedShard] | None:
    if not job.destination:
        return None
    keep = job.options.keep_local_shards
    return functools.partial(_upload_shard, job.destination, keep)


def _upload_shard(
    destination: Destination, keep: bool, shard: FinishedShard
) -> FinishedShard:
    """Uploads a shard; unless kept, removes it but for its stamp."""
    destination.upload(shard.path, shard.stamp)
    if not keep:
        os.unlink(shard.path)
    return shard


def _log_written(job: Job, progress: Progress) -> None:
    if progress.shards_to_write:
        logging.info(
            "Wrote %s (%s, %s) of %s to %s in %s, %s; encoded %s again as RGB JPEG.",
            _count(progress.shards_written, "shard"),
            _count(progress.images_written, "image"),
            _size(progress.bytes_written),
            f"{progress.shards_to_write:,}",
            job.options.scratch_dir,
            _duration(progress.seconds()),
            progress.speed(),
            _count(progress.images_repaired, "PNG or CMYK image"),
        )


def _log_uploaded(destination: Destination, progress: Progress) -> None:
    if progress.shards_to_upload:
        logging.info(
            "Uploaded %s (%s) of %s to %s in %s.",
            _count(len(progress.finished), "shard"),
            _size(sum(shard.stamp.num_bytes for shard in progress.finished)),
            f"{progress.shards_to_upload:,}",
            destination.path,
            _duration(progress.seconds()),
        )


def _log_complete(job: Job, stored: Mapping[str, Stamp]) -> None:
    place = f"in {job.options.scratch_dir}"
    if job.destination:
        place = f"in {job.destination.path}: give the model --data_dir={job.destination.path}"
    logging.info(
        "The data set is complete: %s of %s (%s) %s.",
        _count(len(stored), "shard"),
        _count(sum(len(shard.images) for shard in job.shards), "image"),
        _size(sum(found.num_bytes for found in stored.values())),
        place,
    )


def _differing(
    objects: Mapping[str, Stamp], expected: Mapping[str, Stamp]
) -> list[str]:
    """Names what is not in the bucket, or is there with other bytes."""
    return [
        name
        for name, shard in expected.items()
        if name not in objects or not objects[name].same_bytes(shard)
    ]


def check_uploaded(
    destination: Destination, expected: Mapping[str, Stamp]
) -> Mapping[str, Stamp]:
    """Lists the destination once and compares it with what should be there.

    Returns:
      What was listed, by base name; nothing where listing is not granted.

    Raises:
      RunError: An object is missing or is not of the right size and crc32c.
    """
    objects = destination.list_objects()
    if objects is None:
        logging.warning(
            "Cannot list %s: only the answer to each upload says that it is right.",
            destination.path,
        )
        return {}
    wrong = _differing(objects, expected)
    if wrong:
        raise RunError(
            f"All {_count(len(expected), 'object')} in {destination.path} must be as "
            f"written; found {len(wrong):,} missing or different: {_some(wrong)}. Run "
            "the same command again: it uploads them again."
        )
    return objects


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
    """Removes shards that the bucket held before this run, but for their stamps."""
    for shard in job.options.share(job.shards):
        if shard.name in job.work.done:
            path = pathlib.Path(shard_path(shard, job.options.scratch_dir))
            path.unlink(missing_ok=True)


def _manifest_path(job: Job) -> str:
    return os.path.join(job.options.scratch_dir, MANIFEST_FILE)


def _remove_manifest(job: Job) -> None:
    """Removes the mark of a complete data set while it is not one."""
    pathlib.Path(_manifest_path(job)).unlink(missing_ok=True)
    is_there = MANIFEST_FILE in (job.objects or {})
    if job.destination and (is_there or not job.destination.is_listed):
        job.destination.delete(MANIFEST_FILE, must=is_there)


def _write_manifest(job: Job, stored: Mapping[str, Stamp]) -> None:
    """Writes, and last uploads, the mark of a complete data set.

    It lists the examples, bytes and crc32c of each shard, their totals, and the synset
    of each label, which is written nowhere else.
    """
    shards = [
        {
            "name": shard.name,
            "examples": len(shard.images),
            "bytes": stored[shard.name].num_bytes,
            "crc32c": stored[shard.name].crc32c,
        }
        for shard in job.shards
    ]
    examples = collections.Counter[str]()
    for shard in job.shards:
        examples[shard.split] += len(shard.images)
    manifest = {
        "examples": examples,
        "bytes": sum(found.num_bytes for found in stored.values()),
        "labels": dict(enumerate(job.synsets, start=1)),
        "shards": shards,
    }
    path = _manifest_path(job)
    _write_json(path, manifest)
    finished = measure(path)
    there = (job.objects or {}).get(MANIFEST_FILE) if job.work.is_done else None
    if job.destination and not (there and there.same_bytes(finished.stamp)):
        job.destination.upload(finished.path, finished.stamp)


# ---------------------------------------------------------------------------------
# 9. Command line


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
        problems = [*self._directory_problems(), *self._number_problems()]
        if self.gcs_upload:
            problems += self._upload_problems()
        elif not self.keep_local_shards:
            problems.append("--nokeep_local_shards must go with an upload.")
        if not importlib.util.find_spec("tensorflow"):
            problems.append("TensorFlow is missing: pip install -r requirements.txt.")
        if problems:
            raise InvalidInputError(*problems)

    @property
    def raw_dir(self) -> str:
        return os.path.abspath(self.raw_data_dir or "")

    @property
    def scratch_dir(self) -> str:
        return os.path.abspath(
            self.local_scratch_dir or os.path.join(self.raw_dir, "tf_records")
        )

    @property
    def draws(self) -> bool:
        """Whether to draw the fake ImageNet first, if it is not there."""
        return self.fake_imagenet and not self.dry_run

    @property
    def workers(self) -> int:
        return self.num_workers or _num_processors()

    @property
    def max_unfinished(self) -> int:
        """How many shards may be begun and not yet uploaded."""
        if self.keep_local_shards:
            return self.training_shards + self.validation_shards
        return self.workers + 2 * UPLOAD_THREADS

    @property
    def task(self) -> int:
        return self.task_index or 0

    def share(self, shards: Iterable[Shard]) -> list[Shard]:
        """This task's part of a plan, of both splits."""
        return [s for s in shards if s.index % self.task_count == self.task]

    def _directory_problems(self) -> Iterator[str]:
        if not self.raw_data_dir:
            yield "--raw_data_dir must name the directory of the raw ImageNet."
        elif self.draws and not os.path.lexists(self.raw_data_dir):
            pass  # it will be made
        elif not os.path.isdir(self.raw_data_dir):
            yield (
                f"--raw_data_dir={self.raw_data_dir} must be a directory with "
                f"{TRAINING_DIRECTORY}/, {VALIDATION_DIRECTORY}/ and {LABELS_FILE}; "
                "there is none of that name."
            )
        elif os.path.realpath(self.scratch_dir) == os.path.realpath(self.raw_dir):
            yield "--local_scratch_dir must be another directory than --raw_data_dir."

    def _upload_problems(self) -> Iterator[str]:
        if not self.gcs_project:
            yield "--project must be given for the upload (or pass --nogcs_upload)."
        if not self.gcs_output_path:
            yield (
                "--gcs_output_path=gs://bucket/directory must be given for the upload "
                "(or pass --nogcs_upload)."
            )
            return
        try:
            GcsPath.parse(self.gcs_output_path)
        except InvalidInputError as error:
            yield from error.problems

    def _number_problems(self) -> Iterator[str]:
        flags_of_counts = (
            "num_workers",
            "training_shards",
            "validation_shards",
            "task_count",
        )
        for flag in flags_of_counts:
            value = getattr(self, flag)
            if value is not None and not 0 < value < 100_000:
                yield f"--{flag} must be from 1 to 99,999; found {value:,}."
        if self.task_index is None and self.task_count > 1:
            yield "--task_index must be given with --task_count."
        elif not 0 <= self.task < max(self.task_count, 1):
            yield (
                "--task_index must be from 0 to --task_count - 1; found "
                f"{self.task:,} of {self.task_count:,}."
            )


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
    """Writes the shards that are missing, and uploads those that the bucket misses.

    To be called under `if __name__ == "__main__":`, as all that starts processes.

    Args:
      raw_data_dir: `train/`, `validation/` and `synset_labels.txt`.
      gcs_upload: Whether to upload, which takes a project and an output path.
      gcs_output_path: `gs://bucket` or `gs://bucket/directory`.
      local_scratch_dir: By default `tf_records` under the raw directory.
      client: To use for the upload instead of a new one.
      **options: Other fields of `Options`.

    Raises:
      BadImagesError: An InvalidInputError; all but the shards of these images are done.
      InvalidInputError: A ValueError: what must be mended; nothing was done.
      RunError: What stopped the run; finished shards are kept.
    """
    checked = Options(
        raw_data_dir=raw_data_dir,
        gcs_upload=gcs_upload,
        gcs_project=gcs_project,
        gcs_output_path=gcs_output_path,
        local_scratch_dir=local_scratch_dir,
        client=client,
        **options,
    )
    if not checked.dry_run:
        start_forkserver()
    with _failures_in_words():
        if checked.draws:
            make_fake_imagenet(checked.raw_dir, checked.workers)
        job = _prepare(checked)
        _log_intent(job)
        if not checked.dry_run:
            with _locked(checked):
                _carry_out(job)


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
    empty_plan = plan_shards(EMPTY_DATASET)
    paths = [shard_path(shard, local_scratch_dir) for shard in empty_plan]
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
    destination = Destination(GcsPath.parse(gcs_output_path), gcs_project, client)
    destination.check_access()
    shards = [measure(path) for path in [*training_records, *validation_records]]
    expected = {shard.name: shard.stamp for shard in shards}
    missing = set(_differing(destination.list_objects() or {}, expected))
    to_upload = [shard for shard in shards if shard.name in missing]
    progress = Progress(shards_to_upload=len(to_upload))
    upload = functools.partial(_upload_shard, destination, True)
    write_and_upload([], to_upload, "", 1, upload, 1, progress)
    check_uploaded(destination, expected)


@contextlib.contextmanager
def _failures_in_words() -> Iterator[None]:
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


class _LogFormatter(python_logging.Formatter):
    """Formats a log line as '2026-11-22 07:10:33 WARNING: ...', INFO without its name.

    It stays one line, whatever is in a file's name.
    """

    def format(self, record: python_logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno > python_logging.INFO else ""
        message = re.sub(
            r"[\0-\x1f\x7f-\x9f\u2028\u2029]",
            lambda control: repr(control[0])[1:-1],
            record.getMessage(),
        )
        return f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} {level}{message}"


def main(arguments: Sequence[str]) -> None:
    """Runs the command; ends the process with the exit status of the manual."""
    logging.get_absl_handler().setFormatter(_LogFormatter())
    if FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.INFO)
    if len(arguments) > 1:
        raise app.UsageError(f"All arguments must be flags; found {arguments[1]!r}.")
    warnings.filterwarnings("ignore", module="google", category=FutureWarning)
    _stop_at_signals()
    try:
        names = [field.name for field in dataclasses.fields(Options)]
        options: dict[str, Any] = {n: FLAGS[n].value for n in names if n in FLAGS}
        run(gcs_project=FLAGS.project, **options)
    except InvalidInputError as error:
        for line in error.problems:
            logging.error("%s", line)
        _exit(1)
    except RunError as error:
        logging.error("%s", error)
        _exit(1)
    except Stopped as error:
        logging.error(
            "Stopped by %s; the same command goes on from here.", error.signal.name
        )
        _exit(128 + error.signal)


def _exit(status: int) -> NoReturn:
    """Ends the process at once, without waiting for uploads that hang in a request.

    The kernel ends the forkserver with it, and the workers with that.
    """
    logging.flush()
    sys.stdout.flush()
    os._exit(status)


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


def _worker_pool(num_workers: int) -> concurrent.futures.ProcessPoolExecutor:
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


def make_fake_imagenet(raw_data_dir: str, num_workers: int) -> None:
    """Draws 2,048 training and 256 validation images of 1,000 synsets.

    They have ImageNet's layout, and its usual size of 500 x 375; no shard of the 1,024
    and 128 stays empty. The synsets, from n90000000 on, are not of WordNet. One that
    stands complete is left as it is; one cut off is drawn again.

    Raises:
      InvalidInputError: The directory holds something else.
    """
    root = pathlib.Path(raw_data_dir)
    mark = root / FAKE_MARK
    if root.is_dir() and any(root.iterdir()) and not mark.exists():
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
    with _closing(_worker_pool(num_workers)) as workers:
        paths = [root / path for path in training + validation]
        drawn = workers.map(draw_fake_image, paths, range(len(paths)), chunksize=16)
        collections.deque(drawn, maxlen=0)  # raises what a worker raised
    labels = [synsets[i] for i in range(FAKE_VALIDATION_IMAGES)]
    with _complete_or_absent(str(root / LABELS_FILE)) as file:  # last: all is there
        file.write(("\n".join(labels) + "\n").encode())


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


# ---------------------------------------------------------------------------------
# E. Errors of Cloud Storage: which of them pass, and what they say


CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS"

# Patterns for what `_read` says of an error: its classes, its status and its words.
_LASTING = (
    r"SSLCertVerificationError|407 Proxy"  # though they look like lost connections
)
_PASSING = (
    r"HTTP (408|429|5\d\d)|Metadata server unavailable|temporarily_unavailable|"
    r"internal_failure|server_error|Internal Server Error|Bad Gateway|Service Unavail"
)
_FINAL = (
    rf"{_LASTING}|GoogleAuthError|Unauthorized|Forbidden|\bNotFound\b|"
    r"PreconditionFailed|BadRequest(?!.*CRC32C)|"  # a file can be damaged on its way
    r"TypeError|Project was not passed"  # TypeError: an argument unknown to the client
)
_KINDS = {
    r"DefaultCredentialsError": "No credentials for {}",
    r"GoogleAuthError|Unauthorized": "Cannot log in for {}",
    r"Forbidden": "Access to {} is denied",
    r"\bNotFound\b": "No bucket for {}",
    r"": "Cloud Storage failed at {}",
}
_REMEDIES = {  # only where the error itself proves what is missing
    r"Invalid JWT.*timeframe": "Set the clock of this machine.",
    r"expired or revoked|Reauth": "Run `gcloud auth application-default login` again.",
    r"credentials were not found": (
        "Run `gcloud auth application-default login`, or attach a service account to "
        "the VM."
    ),
    r"getAccessToken": (
        "Grant roles/iam.serviceAccountTokenCreator on that service account to the "
        "account that impersonates it."
    ),
    r"certificate (has expired|is not yet valid)": "Check this machine's clock.",
    r"SSLCertVerificationError": (
        "If your network has its own certificate authority, set REQUESTS_CA_BUNDLE to "
        "the file of its certificate."
    ),
    r"407 Proxy": "Set HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT.",
    r"serviceusage\.services\.use": (
        "Grant roles/serviceusage.serviceUsageConsumer on the project to the account "
        "of this run."
    ),
    r"Forbidden.*\bscope": (
        "Stop the VM and run: gcloud compute instances set-service-account NAME "
        "--scopes=cloud-platform"
    ),
    r"Forbidden.* storage\.objects\.": (
        "Grant roles/storage.objectUser on {bucket} to the account of this run."
    ),
    r"\bNotFound\b": "Create it: gcloud storage buckets create {bucket}",
}


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    facts, _ = _read(error)
    if re.search(_LASTING, facts) or re.search(_PASSING, facts):
        return not re.search(_LASTING, facts)
    return any(
        DEFAULT_RETRY._predicate(each) or getattr(each, "retryable", False)
        for each in _chain(error)
    )


def is_final(error: BaseException) -> bool:
    """Whether uploading the same file again would fail in the same way."""
    return not may_pass(error) and bool(re.search(_FINAL, _read(error)[0]))


def words_of(error: BaseException) -> str:
    """What an error says, in one line without its JSON, URL and final period."""
    return _read(error)[1]


def explain(error: BaseException, place: str, bucket: str) -> str:
    """Puts an error in one line: what failed, why, and what to do if that is known."""
    facts, words = _read(error)
    what = next(kind for pattern, kind in _KINDS.items() if re.search(pattern, facts))
    path = os.environ.get(CREDENTIALS)
    if path and ("GoogleAuthError" in facts or path == getattr(error, "filename", "")):
        words += f" ({CREDENTIALS}={path})"
    known = [line for pattern, line in _REMEDIES.items() if re.search(pattern, facts)]
    if may_pass(error) or not (known or is_final(error)):
        known = ["Rerun the same command to resume."]
    remedy = "".join(known[:1]).replace("{bucket}", bucket)
    return f"{what.format(place)}: {words}. {remedy}".rstrip()


def _read(error: BaseException) -> tuple[str, str]:
    """What is known of an error, for the patterns above, and what it says."""
    chain = list(_chain(error))
    classes = {cls.__name__ for each in chain for cls in type(each).__mro__}
    responses = [getattr(each, "response", None) for each in chain]
    response = next((r for r in responses if r is not None), None)
    status = getattr(response, "status_code", 0)
    words = getattr(response, "reason", "") or _words_without_answer(chain)
    # The service's own words; google.auth has them in the arguments of its errors.
    for text in [getattr(response, "text", ""), *(a for e in chain for a in e.args)]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            answer = (text if isinstance(text, dict) else json.loads(text))["error"]
            status, words = answer["code"], answer["message"]
            break
    if status and not words.startswith(str(status)):
        words = f"{status} {words}"
    words = " ".join(words.split()).rstrip(".")
    if status in (404, 410) and "upload_id=" in getattr(response, "url", ""):
        classes = {"LostUpload"}  # no bucket is missing
    return f"{' '.join(classes)} HTTP {status} {words}", words


def _words_without_answer(chain: Sequence[BaseException]) -> str:
    """What the innermost error says, and which host could not be reached."""
    cause = chain[-1]
    text = getattr(cause, "verify_message", "") or getattr(cause, "strerror", "")
    text = text or str(next(iter(cause.args), "")) or repr(cause)
    text = re.sub(r"(?s)<[^>]*>|https?://\S+|Response( details)?:.*|{.*", " ", text)
    for each in chain:
        if request := getattr(each, "request", None):
            return (
                f"cannot reach {urllib.parse.urlsplit(request.url).hostname} ({text})"
            )
    return text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those within it, outermost first: each library wraps in its way."""
    while error is not None:
        yield error
        # As google.api_core, urllib3, requests and google.auth, and `raise from` do.
        wrapped = [getattr(error, name, None) for name in ("cause", "reason")]
        wrapped += [*error.args, error.__cause__]
        error = next((e for e in wrapped if isinstance(e, BaseException)), None)


if __name__ == "__main__":
    app.run(main)
elif PRELOAD in os.environ:
    _preload()
