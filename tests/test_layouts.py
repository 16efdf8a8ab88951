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


@pytest.mark.parametrize(
    ("layouts", "commands", "training", "validation"),
    [
        ([TARS, ("directories", "flat")], "", "4 directories", "a directory"),
        (
            [("directories", "folders"), ("class_tars", "tar")],
            "",
            "4 directories",
            "4 directories",
        ),
        (
            [("class_tars", "flat"), ("whole_tar", "labelled_folders")],
            "",
            "4 tars",
            "a directory",
        ),
        ([TARS], "mkdir train validation", "a tar", "a tar"),
        (
            [TARS],
            "mkdir train validation; touch {train,validation}/.DS_Store",
            "a tar",
            "a tar",
        ),
        ([TARS], MOVE, "a tar", "a tar"),
        ([TARS, ("directories", "tar")], MOVE, "4 directories", "a tar"),
        ([TARS, ("class_tars", "tar")], MOVE, "4 tars", "a tar"),
    ],
)
def test_first_layout_of_the_table_is_used_when_several_are_there(
    raw: Path,
    tmp_path: Path,
    layouts: list[tuple[str, str]],
    commands: str,
    training: str,
    validation: str,
) -> None:
    """Unless it is empty. A whole tar that lies in its directory is no class."""
    merged = merge(raw, tmp_path, layouts)
    contract.change(merged, commands)
    found = read_dataset(str(merged))
    splits = found.training, found.validation
    assert [sources(images) for images in splits] == [training, validation]
    unread = merged.glob("validation/*/*.JPEG") if validation == "a directory" else []
    assert sorted(found.skipped) == sorted(map(str, unread))
    assert planned(merged) == planned(raw)


def test_order_is_the_same_when_a_name_is_in_two_folders(tmp_path: Path) -> None:
    for synset, split in itertools.product(("n2", "n1", "n3"), ("train", "validation")):
        path = tmp_path / split / synset / "x.JPEG"
        path.parent.mkdir(parents=True)
        path.touch()
    validation = read_dataset(str(tmp_path)).validation
    assert [image.synset for image in validation] == ["n1", "n2", "n3"]


# ------------------------------------------------------- half extracted, and damaged


DIRECTORIES, CLASS_TARS = ("directories", "flat"), ("class_tars", "flat")
TAR_OF_FOLDERS = ("tar_of_folders", "flat")


def three_in(place: str, synset: str = "n01440838") -> str:
    return ", ".join(f"RAW/{place}/{synset}_{i}.JPEG" for i in (1, 2, 3))


@pytest.mark.parametrize(
    ("layouts", "commands", "left"),
    [
        (
            [DIRECTORIES, CLASS_TARS],
            "rm -r train/n014408{01,75}",
            three_in("train/n01440801.tar", "n01440801") + " and 3 more",
        ),
        (  # README's loop removes a tar once it is extracted: the last was cut off
            [DIRECTORIES, CLASS_TARS],
            "rm train/n01440{764,801,838}.tar train/n01440875/n01440875_3.JPEG",
            "RAW/train/n01440875.tar/n01440875_3.JPEG",
        ),
        (  # the same, between two classes: nothing that is left was extracted
            [DIRECTORIES, CLASS_TARS],
            "rm -r train/n01440{764,801}.tar train/n014408{38,75}",
            three_in("train/n01440838.tar") + " and 3 more",
        ),
        (
            [DIRECTORIES, TARS],
            "rm -r train/n01440838",
            three_in(TRAINING_TAR),
        ),
        (
            [DIRECTORIES, TARS],
            "rm train/n01440838/*_[12].JPEG; rm *_val.tar",
            f"RAW/{TRAINING_TAR}/n01440838_1.JPEG, RAW/{TRAINING_TAR}/n01440838_2.JPEG",
        ),
        (
            [CLASS_TARS, TARS],
            "rm train/n01440838.tar",
            three_in(TRAINING_TAR),
        ),
        (
            [DIRECTORIES, TAR_OF_FOLDERS],
            "rm -r train/n01440838",
            three_in(f"{TRAINING_TAR}/train/n01440838"),
        ),
        (
            [DIRECTORIES, TAR_OF_FOLDERS],
            "rm train/n01440838/n01440838_2.JPEG",
            f"RAW/{TRAINING_TAR}/train/n01440838/n01440838_2.JPEG",
        ),
        (  # or labels by name would fit what is there
            [DIRECTORIES, TARS],
            "mv validation/*01.JPEG validation/another.JPEG",
            f"RAW/{VALIDATION_TAR}/ILSVRC2012_val_00000001.JPEG",
        ),
        (
            [("directories", "labelled_folders"), TARS],
            "rm -r validation/n01440838",
            f"RAW/{VALIDATION_TAR}/ILSVRC2012_val_00000003.JPEG",
        ),
    ],
)
def test_error_names_what_is_left_in_tars_when_they_are_half_extracted(
    raw: Path,
    tmp_path: Path,
    layouts: list[tuple[str, str]],
    commands: str,
    left: str,
) -> None:
    half = merge(raw, tmp_path, layouts)
    contract.change(half, commands)
    (problem,) = problems(half)
    assert problem == (
        f"Tars must be extracted whole, not at all, or be elsewhere; left in them: {left}."
    )


def test_tar_of_other_images_is_passed_over(raw: Path, tmp_path: Path) -> None:
    both = merge(raw, tmp_path, [DIRECTORIES, TARS])
    contract.change(both, "cd validation; for i in *; do mv $i my_$i; done")
    assert [i.filename[:3] for i in read_dataset(str(both)).validation] == ["my_"] * 4


def test_all_damaged_tars_are_named_at_once(raw: Path, tmp_path: Path) -> None:
    packed = tars.lay_out(raw, tmp_path / "packed", "class_tars", "tar")
    for path in packed.glob("**/*.tar"):
        path.write_bytes(b"<!DOCTYPE html>" * 100)
    names = [VALIDATION_TAR, *(f"train/n0{n}.tar" for n in (1440764, 1440801, 1440838))]
    reason = "it is not a tar but a web page; log in, and download it again."
    assert problems(packed) == [
        *(f"Cannot list the tar RAW/{name}: {reason}" for name in names),
        "1 more class cannot be listed.",
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
