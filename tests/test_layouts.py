"""Every layout of raw ImageNet gives the shards of the directory layout."""

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import contract
import pytest
import tars
from command import Finished, run_command

from imagenet_to_gcs import (
    TRAINING_TAR,
    VALIDATION_TAR,
    InvalidInputError,
    RawImage,
    plan_shards,
    read_dataset,
)

SYNSETS = ["n01440764", "n01440801", "n01440838", "n01440875"]
SHARDS = ("--training_shards=5", "--validation_shards=3", "--num_workers=2")

Content = tuple[str, str, bytes]


def problems(raw: Path) -> list[str]:
    """Returns what is wrong with a raw directory, which it calls RAW."""
    with pytest.raises(InvalidInputError) as caught:
        read_dataset(str(raw))
    return [problem.replace(str(raw), "RAW") for problem in caught.value.args]


def convert(raw: Path, scratch: Path) -> Finished:
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}", *SHARDS]
    return run_command(*flags, "--nogcs_upload")


# ---------------------------------------------------------------- the same shards


def content(image: RawImage) -> Content:
    """Returns what of an image becomes a record, read from where it is said to be."""
    path = image.path if image.offset is None else image.source
    with open(path, "rb") as file:
        file.seek(image.offset or 0)
        data = file.read(image.num_bytes)
    return image.filename, image.synset, data


def planned(raw: Path) -> tuple[tuple[str, ...], list[list[Content]]]:
    """Plans shards; returns the synsets, in the order of labels, and the contents."""
    dataset = read_dataset(str(raw))
    shards = plan_shards(dataset, 5, 3)
    contents = [[content(image) for image in shard.images] for shard in shards]
    return dataset.synsets, contents


@pytest.mark.parametrize("training", tars.TRAINING_LAYOUTS)
@pytest.mark.parametrize("validation", tars.VALIDATION_LAYOUTS)
def test_plan_is_that_of_directories_in_any_layout(
    mixed_raw: Path, tmp_path: Path, training: str, validation: str
) -> None:
    other = tars.lay_out(mixed_raw, tmp_path / "other", training, validation)
    assert planned(other) == planned(mixed_raw)


@pytest.fixture(scope="module")
def base_shards(
    mixed_raw: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The shards of the directory layout."""
    scratch = tmp_path_factory.mktemp("base")
    assert convert(mixed_raw, scratch).status == 0
    shards = contract.local_shards(scratch)
    contract.assert_shards(shards, mixed_raw, 5, 3)
    return shards


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        ("whole_tar", "tar"),
        ("class_tars", "folders"),
        ("tar_of_folders", "tar_of_folders"),
    ],
    ids=["tars", "class_tars-folders", "tars_of_folders"],
)
def test_shards_are_those_of_directories_in_another_layout(
    mixed_raw: Path,
    base_shards: dict[str, bytes],
    tmp_path: Path,
    training: str,
    validation: str,
) -> None:
    raw = tars.lay_out(mixed_raw, tmp_path / "raw", training, validation)
    before = sorted(raw.rglob("*"))
    finished = convert(raw, tmp_path / "scratch")
    assert finished.status == 0
    assert re.fullmatch(
        r"Found 21 training images in 7 synsets and 8 validation images "
        rf"\([\d.]+ KB\) in {re.escape(str(raw))}\.",
        finished.lines[0],
    )
    assert contract.local_shards(tmp_path / "scratch") == base_shards
    assert sorted(raw.rglob("*")) == before, "something was extracted"


# ---------------------------------------------------------------- which one is used


def merge(raw: Path, directory: Path, layouts: Sequence[tuple[str, str]]) -> Path:
    """Lays a raw ImageNet out in several layouts at once."""
    for number, (training, validation) in enumerate(layouts):
        part = tars.lay_out(raw, directory / f"part{number}", training, validation)
        shutil.copytree(part, directory / "all", dirs_exist_ok=True)
    return directory / "all"


def sources(images: Sequence[RawImage]) -> str:
    """Says where images are: 'a directory', '4 tars'."""
    one, many = "directory", "directories"
    if images[0].offset is not None:
        one, many = "tar", "tars"
    num_sources = len({image.source for image in images})
    return f"a {one}" if num_sources == 1 else f"{num_sources} {many}"


TARS = ("whole_tar", "tar")
MOVE = "mkdir -p train validation; mv *_train.tar train; mv *_val.tar validation"
CLASS_TARS = [f"train/{synset}.tar" for synset in SYNSETS]


@pytest.mark.parametrize(
    ("layouts", "commands", "training", "validation", "unread"),
    [
        (
            [TARS, ("directories", "flat")],
            "",
            "4 directories",
            "a directory",
            [TRAINING_TAR, VALIDATION_TAR],
        ),
        (
            [("directories", "folders"), ("class_tars", "tar")],
            "",
            "4 directories",
            "4 directories",
            [*CLASS_TARS, VALIDATION_TAR],
        ),
        (
            [("class_tars", "flat"), ("whole_tar", "labelled_folders")],
            "",
            "4 tars",
            "a directory",
            [TRAINING_TAR, *(f"validation/{synset}" for synset in SYNSETS)],
        ),
        ([TARS], "mkdir train validation", "a tar", "a tar", []),
        (
            [TARS],
            "mkdir train validation; touch {train,validation}/.DS_Store",
            "a tar",
            "a tar",
            [],
        ),
        ([TARS], MOVE, "a tar", "a tar", []),
        (
            [TARS, ("directories", "tar")],
            MOVE,
            "4 directories",
            "a tar",
            [f"train/{TRAINING_TAR}"],
        ),
        (
            [TARS, ("class_tars", "tar")],
            MOVE,
            "4 tars",
            "a tar",
            [f"train/{TRAINING_TAR}"],
        ),
    ],
)
def test_first_layout_of_the_table_is_used_when_several_are_there(
    raw: Path,
    tmp_path: Path,
    layouts: list[tuple[str, str]],
    commands: str,
    training: str,
    validation: str,
    unread: list[str],
) -> None:
    """Unless it is empty. A whole tar that lies in its directory is no class."""
    merged = merge(raw, tmp_path, layouts)
    contract.change(merged, commands)
    found = read_dataset(str(merged))
    splits = found.training, found.validation
    assert [sources(images) for images in splits] == [training, validation]
    assert sorted(found.skipped) == sorted(str(merged / path) for path in unread)
    assert planned(merged) == planned(raw)


def test_tars_are_not_named_beside_all_of_imagenet(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was extracted whole is known by the number of its images."""
    sizes = {"train": 12, "validation": 4}
    monkeypatch.setattr("imagenet_to_gcs.IMAGENET_SIZES", sizes)
    merged = merge(raw, tmp_path, [TARS, ("directories", "flat")])
    assert read_dataset(str(merged)).skipped == []
    (merged / "train/n01440764/n01440764_1.JPEG").unlink()
    assert read_dataset(str(merged)).skipped == [str(merged / TRAINING_TAR)]


def test_order_is_the_same_when_a_name_is_in_two_folders(tmp_path: Path) -> None:
    for synset, split in itertools.product(("n2", "n1", "n3"), ("train", "validation")):
        path = tmp_path / split / synset / "x.JPEG"
        path.parent.mkdir(parents=True)
        path.touch()
    validation = read_dataset(str(tmp_path)).validation
    assert [image.synset for image in validation] == ["n1", "n2", "n3"]


# ------------------------------------------------------- half extracted, and damaged


@pytest.mark.parametrize(
    ("commands", "found"),
    [
        ("rm -r train/n014408{01,75}", "n01440801"),
        # README's loop removes a tar once it is extracted, and was cut off.
        (
            "rm -r train/n01440{764,801}.tar train/n014408{38,75}",
            "n01440838",
        ),
    ],
)
def test_class_tars_are_refused_beside_directories_of_other_classes(
    raw: Path, tmp_path: Path, commands: str, found: str
) -> None:
    half = merge(raw, tmp_path, [("directories", "flat"), ("class_tars", "flat")])
    contract.change(half, commands)
    rule = "Classes must all be directories of *.JPEG, or all *.tar"
    assert problems(half) == [f"{rule}; found RAW/train/{found}.tar."]


@pytest.mark.parametrize(
    ("layouts", "commands", "unread"),
    [
        (  # README's loop was cut off in the last tar
            [("directories", "flat"), ("class_tars", "flat")],
            "rm train/n01440{764,801,838}.tar train/n01440875/n01440875_3.JPEG",
            ["train/n01440875.tar"],
        ),
        (
            [("directories", "flat"), TARS],
            "rm -r train/n01440838 *_val.tar",
            [TRAINING_TAR],
        ),
        (
            [("class_tars", "flat"), TARS],
            "rm train/n01440838.tar *_val.tar",
            [TRAINING_TAR],
        ),
        (
            [("directories", "labelled_folders"), TARS],
            "rm -r validation/n01440838; sed -i 3d *.txt; rm *_train.tar",
            [VALIDATION_TAR],
        ),
    ],
)
def test_tars_are_named_beside_what_is_read(
    raw: Path,
    tmp_path: Path,
    layouts: list[tuple[str, str]],
    commands: str,
    unread: list[str],
) -> None:
    """For they may hold more than was extracted."""
    half = merge(raw, tmp_path, layouts)
    contract.change(half, commands)
    assert read_dataset(str(half)).skipped == [str(half / path) for path in unread]


def test_first_damaged_tar_of_each_split_is_named(raw: Path, tmp_path: Path) -> None:
    packed = tars.lay_out(raw, tmp_path / "packed", "class_tars", "tar")
    for path in packed.glob("**/*.tar"):
        path.write_bytes(b"<!DOCTYPE html>" * 100)
    reason = "it is not a tar but a web page; log in first. Download it again; compare "
    assert problems(packed) == [
        f"Cannot list the tar RAW/{name}: {reason}its checksum."
        for name in (VALIDATION_TAR, "train/n01440764.tar")
    ]


def test_bad_image_is_named_with_its_tar(raw: Path, tmp_path: Path) -> None:
    (raw / "train/n01440801/n01440801_2.JPEG").write_bytes(b"<html>")
    packed = tars.lay_out(raw, tmp_path / "packed", "whole_tar", "flat")
    finished = convert(packed, tmp_path / "scratch")
    image = f"{packed}/{TRAINING_TAR}/n01440801_2.JPEG"
    assert finished.errors == [
        f"Cannot decode {image}: not a JPEG (starts with b'<htm')."
    ]
    assert finished.status == 1
    assert len(contract.local_shards(tmp_path / "scratch")) == 7
