"""Every layout of raw ImageNet gives the shards of the directory layout."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import contract
import pytest
import tars
from command import REPOSITORY, Finished, run_command
from conftest import SHARED

from imagenet_to_gcs import InvalidInputError, RawImage, plan_shards, read_dataset

TRAINING_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
DOWNLOAD = "Download it again, and compare its checksum."
README = REPOSITORY / "README.md"

MIXTURES = list(itertools.product(tars.TRAINING_LAYOUTS, tars.VALIDATION_LAYOUTS))


def problems(raw: Path) -> list[str]:
    """Returns what keeps a raw directory from being a data set."""
    with pytest.raises(InvalidInputError) as caught:
        read_dataset(str(raw))
    return list(caught.value.args)


def convert(raw: Path, scratch: Path, *flags: str) -> Finished:
    return run_command(
        f"--raw_data_dir={raw}",
        f"--local_scratch_dir={scratch}",
        "--nogcs_upload",
        *flags,
    )


SHARDS = ("--training_shards=5", "--validation_shards=3", "--num_workers=2")


# ---------------------------------------------------------------- the same shards


def content(image: RawImage) -> tuple[str, str, int, bytes]:
    """Returns what of an image becomes a record, read from where it is said to be."""
    path = image.path if image.offset is None else image.source
    with open(path, "rb") as file:
        file.seek(image.offset or 0)
        data = file.read(image.num_bytes)
    return image.filename, image.synset, image.label, data


@pytest.mark.parametrize(
    ("training", "validation"), MIXTURES, ids=["-".join(m) for m in MIXTURES]
)
def test_plan_is_that_of_directories_in_any_layout(
    mixed_raw: Path, tmp_path: Path, training: str, validation: str
) -> None:
    base = tars.lay_out(mixed_raw, tmp_path / "base", "directories", "flat")
    other = tars.lay_out(mixed_raw, tmp_path / "other", training, validation)
    expected = plan_shards(read_dataset(str(base)), 5, 3)
    found = plan_shards(read_dataset(str(other)), 5, 3)
    for shard, expected_shard in zip(found, expected, strict=True):
        contents = [content(image) for image in shard.images]
        assert contents == [content(image) for image in expected_shard.images]


@pytest.fixture(scope="module")
def base_shards(
    mixed_raw: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The shards of the directory layout."""
    scratch = tmp_path_factory.mktemp("base")
    assert convert(mixed_raw, scratch, *SHARDS).status == 0
    shards = contract.local_shards(scratch)
    contract.assert_shards(shards, mixed_raw, 5, 3)
    return shards


@pytest.mark.parametrize(
    ("training", "validation", "layout"),
    [
        ("whole_tar", "tar", "training images in a tar, validation images in a tar"),
        (
            "class_tars",
            "folders",
            "training images in 7 tars, validation images in 7 directories",
        ),
    ],
    ids=["tars", "class_tars-folders"],
)
def test_shards_are_those_of_directories_in_another_layout(
    mixed_raw: Path,
    base_shards: dict[str, bytes],
    tmp_path: Path,
    training: str,
    validation: str,
    layout: str,
) -> None:
    raw = tars.lay_out(mixed_raw, tmp_path / "raw", training, validation)
    before = sorted(raw.rglob("*"))
    finished = convert(raw, tmp_path / "scratch", *SHARDS)
    assert finished.status == 0
    assert re.fullmatch(
        r"Found 21 training images in 7 synsets and 8 validation images "
        rf"\([\d.]+ KB\) in {re.escape(str(raw))}: {layout}\.",
        finished.lines[0],
    )
    assert contract.local_shards(tmp_path / "scratch") == base_shards
    assert sorted(raw.rglob("*")) == before, "something was extracted"


def test_records_are_the_reference_s_in_any_layout(
    sample: Path, tmp_path: Path
) -> None:
    packed = tars.lay_out(sample, tmp_path / "packed", "whole_tar", "tar")
    assert convert(packed, tmp_path / "a").status == 0
    checked = subprocess.run(
        [sys.executable, SHARED / "check_records.py", tmp_path / "a"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    other = tars.lay_out(sample, tmp_path / "other", "class_tars", "folders")
    assert convert(other, tmp_path / "b").status == 0
    assert contract.local_shards(tmp_path / "b") == contract.local_shards(
        tmp_path / "a"
    )


# ---------------------------------------------------------------- which one is used


def merge(raw: Path, directory: Path, *layouts: tuple[str, str]) -> Path:
    """Lays a raw ImageNet out in several layouts at once."""
    for number, (training, validation) in enumerate(layouts):
        part = tars.lay_out(raw, directory / f"part{number}", training, validation)
        shutil.copytree(part, directory / "all", dirs_exist_ok=True)
    return directory / "all"


@pytest.mark.parametrize(
    ("layouts", "layout"),
    [
        (
            [("directories", "flat"), ("whole_tar", "tar")],
            "training images in 4 directories, validation images in a directory",
        ),
        (
            [("directories", "folders"), ("class_tars", "tar")],
            "training images in 4 directories, validation images in 4 directories",
        ),
        (
            [("class_tars", "flat"), ("whole_tar", "labelled_folders")],
            "training images in 4 tars, validation images in a directory",
        ),
    ],
    ids=["all_and_tars", "class_tars_too", "folders_too"],
)
def test_first_layout_of_the_table_is_used_when_several_are_there(
    raw: Path, tmp_path: Path, layouts: list[tuple[str, str]], layout: str
) -> None:
    assert read_dataset(str(merge(raw, tmp_path, *layouts))).layout == layout


@pytest.mark.parametrize("hidden", [False, True], ids=["empty", "hidden_file"])
def test_tars_are_used_when_directories_are_empty(
    raw: Path, tmp_path: Path, hidden: bool
) -> None:
    packed = tars.lay_out(raw, tmp_path / "packed", "whole_tar", "tar")
    for split in ("train", "validation"):
        (packed / split).mkdir()
        if hidden:
            (packed / split / ".DS_Store").write_bytes(b"Mac OS X")
    layout = "training images in a tar, validation images in a tar"
    assert read_dataset(str(packed)).layout == layout


@pytest.mark.parametrize(
    ("training", "layout"),
    [
        ("whole_tar", "training images in a tar, validation images in a tar"),
        ("directories", "training images in 4 directories, validation images in a tar"),
        ("class_tars", "training images in 4 tars, validation images in a tar"),
    ],
)
def test_tars_are_no_classes_when_they_lie_in_the_directories(
    raw: Path, tmp_path: Path, training: str, layout: str
) -> None:
    """Alone, they are read in place; beside what was extracted, they are compared."""
    packed = merge(raw, tmp_path, (training, "tar"), ("whole_tar", "tar"))
    for split, name in (("train", TRAINING_TAR), ("validation", VALIDATION_TAR)):
        (packed / split).mkdir(exist_ok=True)
        (packed / name).rename(packed / split / name)
    dataset = read_dataset(str(packed))
    assert (dataset.layout, dataset.left_out) == (layout, [])
    assert [content(image) for image in dataset.images] == [
        content(image) for image in read_dataset(str(raw)).images
    ]


def test_order_is_the_same_when_a_name_is_in_two_folders(tmp_path: Path) -> None:
    for synset in ("n2", "n1", "n3"):
        for split in ("train", "validation"):
            path = tmp_path / split / synset / "x.JPEG"
            path.parent.mkdir(parents=True)
            path.write_bytes(b"")
    validation = read_dataset(str(tmp_path)).validation
    assert [image.synset for image in validation] == ["n1", "n2", "n3"]


# ---------------------------------------------------------------- half extracted


HALF_EXTRACTED = {
    "rm -r train/n014408{01,75}": (
        ("directories", "class_tars"),
        "RAW/train/n01440801.tar, RAW/train/n01440875.tar",
    ),
    # README's loop removes a tar once it is extracted: the last was cut off.
    "rm train/n01440{764,801,838}.tar train/n01440875/n01440875_3.JPEG": (
        ("directories", "class_tars"),
        "RAW/train/n01440875.tar",
    ),
    "rm -r train/n01440838": (
        ("directories", "whole_tar"),
        f"RAW/{TRAINING_TAR}/n01440838.tar",
    ),
    "rm train/n01440838.tar": (
        ("class_tars", "whole_tar"),
        f"RAW/{TRAINING_TAR}/n01440838.tar",
    ),
}


@pytest.mark.parametrize("remove", HALF_EXTRACTED)
def test_error_names_the_tars_when_they_are_half_extracted(
    raw: Path, tmp_path: Path, remove: str
) -> None:
    layouts, left = HALF_EXTRACTED[remove]
    half = merge(raw, tmp_path, *((layout, "flat") for layout in layouts))
    subprocess.run(["bash", "-ec", remove], cwd=half, check=True)
    assert [problem.replace(str(half), "RAW") for problem in problems(half)] == [
        (
            "Class tars must all be extracted, or none; these are not, or only in part: "
            f"{left}. Extract these too."
        )
    ]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("training", "name"),
    [("class_tars", "train/n01440801.tar"), ("whole_tar", TRAINING_TAR)],
    ids=["class_tar", "whole_tar"],
)
def test_nothing_is_written_when_a_tar_is_cut_short(
    raw: Path, tmp_path: Path, training: str, name: str
) -> None:
    packed = tars.lay_out(raw, tmp_path / "packed", training, "tar")
    os.truncate(packed / name, 3 * 512)
    finished = convert(packed, tmp_path / "scratch")
    reason = f"it is cut short. {DOWNLOAD}"
    assert finished.lines == [f"ERROR: Cannot list the tar {packed / name}: {reason}"]
    assert finished.status == 1
    assert not (tmp_path / "scratch").exists()


def test_all_damaged_tars_are_named_at_once(raw: Path, tmp_path: Path) -> None:
    packed = tars.lay_out(raw, tmp_path / "packed", "class_tars", "tar")
    for path in packed.glob("**/*.tar"):
        path.write_bytes(b"<!DOCTYPE html>" * 100)
    paths = [packed / VALIDATION_TAR, *sorted((packed / "train").iterdir())]
    reason = "it is not a tar but a web page; log in, and download it again."
    assert problems(packed) == [
        *(f"Cannot list the tar {path}: {reason}" for path in paths[:4]),
        "1 more class cannot be listed.",
    ]


def test_bad_image_is_named_with_its_tar(raw: Path, tmp_path: Path) -> None:
    (raw / "train/n01440801/n01440801_2.JPEG").write_bytes(b"<html>")
    packed = tars.lay_out(raw, tmp_path / "packed", "whole_tar", "flat")
    finished = convert(packed, tmp_path / "scratch", *SHARDS)
    assert finished.errors == [
        (
            f"Cannot decode {packed}/{TRAINING_TAR}/n01440801_2.JPEG: not a JPEG (starts with "
            "b'<htm')."
        )
    ]
    assert finished.status == 1
    assert len(contract.local_shards(tmp_path / "scratch")) == 7


# ---------------------------------------------------------------- Kaggle


def _kaggle(raw: Path, directory: Path) -> Path:
    """Makes Kaggle's tree of a raw ImageNet; its solutions are in no order."""
    data = directory / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(raw / "train", data / "train")
    shutil.copytree(raw / "validation", data / "val")
    (data / "test").mkdir()
    labels = (raw / "synset_labels.txt").read_text().split()
    solutions = [
        f"ILSVRC2012_val_{i:08d},{label} 12 34 56 78 {label} 1 2 3 4 "
        for i, label in enumerate(labels, 1)
    ]
    text = "\n".join(["ImageId,PredictionString", *reversed(solutions)])
    (directory / "LOC_val_solution.csv").write_text(text + "\n")
    return directory


@pytest.mark.skipif(not README.exists(), reason="needs README.md")
def test_kaggle_s_download_fits_after_readme_s_commands(
    raw: Path, tmp_path: Path
) -> None:
    blocks = re.findall(
        r"^```bash\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL
    )
    (commands,) = (block for block in blocks if "LOC_val_solution" in block)
    kaggle = _kaggle(raw, tmp_path / "kag gle" if '"$KAGGLE' in commands else tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=home,
        env={**os.environ, "KAGGLE": str(kaggle), "IMAGENET_HOME": str(home)},
        check=True,
    )
    labels = (home / "synset_labels.txt").read_bytes()
    assert labels == (raw / "synset_labels.txt").read_bytes()
    expected = [shard.images for shard in plan_shards(read_dataset(str(raw)), 5, 3)]
    found = [shard.images for shard in plan_shards(read_dataset(str(home)), 5, 3)]
    assert [[content(i) for i in images] for images in found] == [
        [content(i) for i in images] for images in expected
    ]


def test_error_points_to_readme_when_kaggle_s_tree_is_given(
    raw: Path, tmp_path: Path
) -> None:
    kaggle = _kaggle(raw, tmp_path / "kaggle")
    found = f"{kaggle}/ILSVRC/Data/CLS-LOC (Kaggle's layout)"
    for problem in problems(kaggle)[:2]:
        assert problem.endswith(
            f"Found {found}: README says which links it takes. Both splits are required."
        )
