"""Section 1: what is in the raw directory, and what is wrong with it."""

import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import contract
import pytest

import imagenet_to_gcs as script

SYNSETS = ["n01440764", "n01440801", "n01440838", "n01440875"]


def problems_of(raw: Path) -> list[str]:
    """Returns what `read_dataset` finds wrong, with the directory as `RAW`."""
    with pytest.raises(script.InvalidInputError) as caught:
        script.read_dataset(str(raw))
    return [line.replace(str(raw), "RAW") for line in str(caught.value).splitlines()]


def make_lines(raw: Path, labels: list[str]) -> bytes:
    content = "".join(f"{label}\n" for label in labels).encode()
    (raw / "synset_labels.txt").write_bytes(content)
    return content


def read_lines(raw: Path) -> list[str]:
    return script.read_labels(str(raw / "synset_labels.txt"))


# ------------------------------------------------------------------- what is listed


def test_dataset_is_the_contracts(raw: Path) -> None:
    dataset = script.read_dataset(str(raw))
    expected = contract.expected_shards(raw, 1, 1)
    training = sorted(expected["train-00000-of-00001"], key=lambda e: e.path)
    for found, wanted in (
        (dataset.training, training),
        (dataset.validation, expected["validation-00000-of-00001"]),
    ):
        assert [(i.path, i.filename, i.synset, i.label) for i in found] == [
            (e.path, e.filename, e.synset, e.label) for e in wanted
        ]
    assert dataset.synsets == tuple(SYNSETS)


def test_image_has_the_size_and_time_of_its_file(raw: Path) -> None:
    os.utime(raw / "train/n01440764/n01440764_1.JPEG", ns=(5, 1_234_567_890_123))
    dataset = script.read_dataset(str(raw))
    assert dataset.training[0].version == 1_234_567_890
    sizes = [path.stat().st_size for path in raw.rglob("*.JPEG")]
    assert dataset.num_bytes == sum(sizes)
    assert dataset.training[0].num_bytes == os.path.getsize(dataset.training[0].path)


def test_images_are_sorted_by_path_when_names_are_unusual(raw: Path) -> None:
    """`n1-a/` comes before `n1/`, because `-` comes before `/`."""
    (raw / "train").rename(raw / "old")
    names = ["n1", "n1-a", "n1.b", "n10", "N2", "n1 c", "né"]
    random.Random(3).shuffle(names)
    for name in names:
        (raw / "train" / name).mkdir(parents=True)
        for image in ("b.JPEG", "B.JPEG", "a_10.JPEG", "a_9.JPEG", "é.JPEG"):
            (raw / "train" / name / image).touch()
    paths = [image.path for image in script.read_dataset(str(raw)).training]
    assert paths == sorted(paths)
    assert len(paths) == 35


def test_label_counts_the_synsets_of_both_splits(raw: Path) -> None:
    make_lines(raw, ["n00000001", "n01440764", "n01440801", "n09999999"])
    dataset = script.read_dataset(str(raw))
    assert dataset.synsets == ("n00000001", *SYNSETS, "n09999999")
    assert [image.label for image in dataset.validation] == [1, 2, 3, 6]
    assert {image.synset: image.label for image in dataset.training} == {
        "n01440764": 2,
        "n01440801": 3,
        "n01440838": 4,
        "n01440875": 5,
    }


def test_other_files_are_left_out_when_there_are_images(raw: Path) -> None:
    listed = script.read_dataset(str(raw))
    for name in (
        "train/README",
        "train/.DS_Store",
        "train/n01440764/._n01440764_1.JPEG",
        "train/n01440764/.hidden.JPEG",
        "train/n01440764/notes.txt",
        "train/n01440764/n01440764_9.jpg",
        "train/n01440764/n01440764_9.jpeg",
        "train/n01440764/n01440764_9.JPEG.part",
        "validation/._ILSVRC2012_val_00000001.JPEG",
        "validation/Thumbs.db",
    ):
        (raw / name).touch()
    (raw / "train/.cache").mkdir()
    (raw / "tf_records").mkdir()
    assert script.read_dataset(str(raw)) == listed


def test_links_are_followed(raw: Path, tmp_path: Path) -> None:
    """The way to give another layout, such as Kaggle's, the names that it must have."""
    listed = script.read_dataset(str(raw))
    linked = tmp_path / "linked"
    (linked / "train").mkdir(parents=True)
    for synset in SYNSETS:
        (linked / "train" / synset).symlink_to(raw / "train" / synset)
    (linked / "validation").symlink_to(raw / "validation")
    (linked / "synset_labels.txt").symlink_to(raw / "synset_labels.txt")
    found = script.read_dataset(str(linked))
    assert [(i.filename, i.label, i.num_bytes) for i in found.training] == [
        (i.filename, i.label, i.num_bytes) for i in listed.training
    ]
    assert len(found.validation) == 4


def test_dangling_link_is_listed(raw: Path) -> None:
    """So that the image is not silently missing: reading it says what is wrong."""
    link = raw / "train/n01440764/n01440764_0.JPEG"
    link.symlink_to("nothing")
    dataset = script.read_dataset(str(raw))
    assert dataset.training[0] == script.RawImage(
        str(link.parent), link.name, "n01440764", 1, 0, 0
    )
    assert len(dataset.training) == 13


# -------------------------------------------------------------------- the label file


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"n01\nn02\nn03\n", id="plain"),
        pytest.param(b"n01\nn02\nn03", id="no last newline"),
        pytest.param(b"n01\r\nn02\r\nn03\r\n", id="Windows"),
        pytest.param(b"n01\r\nn02\r\nn03", id="Windows, no last newline"),
        pytest.param(b"\xef\xbb\xbfn01\nn02\nn03\n", id="byte order mark"),
        pytest.param(b"\xef\xbb\xbfn01\r\nn02\r\nn03\r\n", id="Windows with a mark"),
        pytest.param(b"  n01\nn02\t\n n03 \n", id="spaces around"),
    ],
)
def test_labels_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "synset_labels.txt").write_bytes(content)
    assert read_lines(tmp_path) == ["n01", "n02", "n03"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(b"\n", "Line 1 of {} found ''.", id="only a newline"),
        pytest.param(b"n01\n\nn02\n", "Line 2 of {} found ''.", id="empty line"),
        pytest.param(b"n01\nn02\n\n", "Line 3 of {} found ''.", id="empty last line"),
        pytest.param(b"n01\n \t\nn02\n", "Line 2 of {} found ''.", id="spaces"),
        pytest.param(
            b"n01\nn02 tench\n", "Line 2 of {} found 'n02 tench'.", id="two words"
        ),
        pytest.param(
            b"n01 tench\nn02\n\nn03,4 x\n",
            "Line 1 of {} found 'n01 tench' (3 such lines).",
            id="several",
        ),
        pytest.param(
            b"n01\n" + b"word " * 100,
            f"Line 2 of {{}} found {('word ' * 12)!r}.",
            id="long line",
        ),
        pytest.param(
            b"n01\n" * 1_233 + b"\n", "Line 1,234 of {} found ''.", id="late line"
        ),
    ],
)
def test_labels_are_refused(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "synset_labels.txt"
    path.write_bytes(content)
    rule = f"{path} must be a single synset such as n01440764;"
    with pytest.raises(script.InvalidInputError) as caught:
        read_lines(tmp_path)
    assert str(caught.value) == what.replace("{}", rule)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_labels_are_refused_when_not_utf8(raw: Path, encoding: str) -> None:
    """PowerShell's `>` writes UTF-16: no line of it is a synset."""
    text = (raw / "synset_labels.txt").read_text()
    (raw / "synset_labels.txt").write_bytes(text.encode(encoding))
    [problem] = problems_of(raw)
    assert "RAW/synset_labels.txt" in problem


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(Path.unlink, "No such file or directory", id="missing"),
        pytest.param(
            lambda path: (path.unlink(), path.mkdir()),
            "Is a directory",
            id="a directory",
        ),
    ],
)
def test_labels_are_refused_when_there_is_no_file(
    raw: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(raw / "synset_labels.txt")
    assert problems_of(raw) == [
        (
            f"Cannot read RAW/synset_labels.txt: {reason}. It must hold the synset of each "
            "validation image, a line each, in the order of their names."
        )
    ]


@pytest.mark.parametrize(
    ("num_labels", "num_images", "counts"),
    [
        pytest.param(0, 4, ("0 labels", "4 images"), id="no labels"),
        pytest.param(3, 4, ("3 labels", "4 images"), id="fewer labels"),
        pytest.param(5, 4, ("5 labels", "4 images"), id="more labels"),
        pytest.param(1, 1_001, ("1 label", "1,001 images"), id="one label"),
    ],
)
def test_dataset_is_refused_when_labels_and_images_differ(
    raw: Path, num_labels: int, num_images: int, counts: tuple[str, str]
) -> None:
    make_lines(raw, ["n01440764"] * num_labels)
    for index in range(4, num_images):
        (raw / f"validation/ILSVRC2012_val_{index + 1:08d}.JPEG").touch()
    assert problems_of(raw) == [
        (
            f"RAW/synset_labels.txt has {counts[0]} and RAW/validation {counts[1]}; they "
            "must be equal in number."
        )
    ]


# ------------------------------------------------------------------- a wrong layout


def remove(path: Path) -> None:
    """Removes a file, or a directory with the files in it and below."""
    if path.is_dir():
        for child in path.iterdir():
            remove(child)
        path.rmdir()
    else:
        path.unlink()


def empty(directory: Path, *names: str) -> None:
    """Leaves nothing in a directory but empty files of these names."""
    remove(directory)
    directory.mkdir()
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).touch()


def rename_all(directory: Path, suffix: str) -> None:
    for path in directory.glob("**/*.JPEG"):
        path.rename(path.with_suffix(suffix))


def make_train_a_file(raw: Path) -> None:
    remove(raw / "train")
    (raw / "train").touch()


def make_kaggle(raw: Path) -> None:
    remove(raw)
    (raw / "ILSVRC/Data/CLS-LOC/train").mkdir(parents=True)
    (raw / "synset_labels.txt").write_text("n01440764\n")


NO_TRAIN = "No directory RAW/train, and no ILSVRC2012_img_train.tar beside it."
NO_VALIDATION = "No directory RAW/validation, and no ILSVRC2012_img_val.tar beside it."
NO_IMAGES = "No images match RAW/train/*/*.JPEG. Found"


@pytest.mark.parametrize(
    ("make", "problems"),
    [
        pytest.param(
            lambda raw: remove(raw / "train"),
            [f"{NO_TRAIN} Found synset_labels.txt, validation."],
            id="no train",
        ),
        pytest.param(
            lambda raw: (raw / "validation").rename(raw / "val"),
            [
                f"{NO_VALIDATION} Found RAW/val: rename it to validation.",
            ],
            id="val",
        ),
        pytest.param(
            make_kaggle,
            [
                f"{none} Found RAW/ILSVRC/Data/CLS-LOC (Kaggle's layout): README says "
                "which links it takes."
                for none in (NO_TRAIN, NO_VALIDATION)
            ],
            id="Kaggle",
        ),
        pytest.param(
            lambda raw: empty(raw / "train"),
            [f"{NO_IMAGES} nothing there."],
            id="empty train",
        ),
        pytest.param(
            lambda raw: empty(raw / "train", "a", "b", "c", "d", "e"),
            [f"{NO_IMAGES} a, b, c and 2 more there."],
            id="other files in train",
        ),
        pytest.param(
            lambda raw: empty(raw / "train", "n1_1.JPEG"),
            [
                (
                    f"{NO_IMAGES} 1 .JPEG file there: move each into a directory named after "
                    "its synset."
                )
            ],
            id="images without a class",
        ),
        pytest.param(
            lambda raw: rename_all(raw / "train", ".jpg"),
            [
                (
                    "Each class must have images, but 4 of 4 classes have none: "
                    "n01440764, n01440801, n01440838 and 1 more. No images match "
                    "RAW/train/n01440764/*.JPEG. Found 3 .jpg files there: rename them to "
                    "*.JPEG."
                )
            ],
            id=".jpg in train",
        ),
        pytest.param(
            lambda raw: rename_all(raw / "validation", ".JPG"),
            [
                (
                    "No images match RAW/validation/*.JPEG. Found 4 .JPG files there: "
                    "rename them to *.JPEG."
                )
            ],
            id=".JPG in validation",
        ),
        pytest.param(
            lambda raw: empty(raw / "train/n01440838"),
            [
                (
                    "Each class must have images, but 1 of 4 classes have none: "
                    "n01440838. No images match RAW/train/n01440838/*.JPEG. Found nothing "
                    "there."
                )
            ],
            id="empty class",
        ),
        pytest.param(
            lambda raw: empty(raw / "validation"),
            ["No images match RAW/validation/*.JPEG. Found nothing there."],
            id="empty validation",
        ),
        pytest.param(
            make_train_a_file,
            ["Cannot list RAW/train: Not a directory."],
            id="train is a file",
        ),
    ],
)
def test_dataset_is_refused_when_its_layout_is_wrong(
    raw: Path, make: Callable[[Path], object], problems: list[str]
) -> None:
    make(raw)
    assert problems_of(raw) == problems


def test_all_problems_are_named_at_once(raw: Path) -> None:
    remove(raw / "train")
    make_lines(raw, ["n01440764", "", "n01440764", "n01440764"])
    remove(raw / "validation")
    assert problems_of(raw) == [
        f"{NO_TRAIN} Found synset_labels.txt.",
        f"{NO_VALIDATION} Found synset_labels.txt.",
        (
            "Line 2 of RAW/synset_labels.txt must be a single synset such as "
            "n01440764; found ''."
        ),
    ]


# -------------------------------------------------------------------- other layouts


def pack(directory: Path, tar_path: Path) -> None:
    """Packs what is in a directory into a tar, and removes the directory."""
    with tarfile.open(tar_path, "w") as tar:
        for path in sorted(directory.iterdir()):
            tar.add(path, path.name)
    remove(directory)


def pack_classes(raw: Path) -> None:
    for synset in SYNSETS:
        pack(raw / "train" / synset, raw / "train" / f"{synset}.tar")


def pack_train(raw: Path) -> None:
    pack_classes(raw)
    pack(raw / "train", raw / "ILSVRC2012_img_train.tar")


def pack_validation(raw: Path) -> None:
    pack(raw / "validation", raw / "ILSVRC2012_img_val.tar")


def sort_validation(raw: Path) -> None:
    """Moves each image into a directory named after its synset."""
    labels = (raw / "synset_labels.txt").read_text().split()
    images = sorted((raw / "validation").glob("*.JPEG"))
    for path, synset in zip(images, labels, strict=True):
        (path.parent / synset).mkdir(exist_ok=True)
        path.rename(path.parent / synset / path.name)


def sort_validation_without_labels(raw: Path) -> None:
    sort_validation(raw)
    remove(raw / "synset_labels.txt")


def content_of(dataset: script.Dataset) -> list[tuple[str, str, int, bytes]]:
    """Returns what all records will hold, in their order."""
    return [
        (image.filename, image.synset, image.label, script._read_image(image))
        for image in [*dataset.training, *dataset.validation]
    ]


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        pytest.param(
            lambda raw: None,
            "training images in 4 directories, validation images in a directory",
            id="directories",
        ),
        pytest.param(
            pack_classes,
            "training images in 4 tars, validation images in a directory",
            id="class tars",
        ),
        pytest.param(
            pack_train,
            "training images in a tar, validation images in a directory",
            id="training tar",
        ),
        pytest.param(
            pack_validation,
            "training images in 4 directories, validation images in a tar",
            id="validation tar",
        ),
        pytest.param(
            sort_validation,
            "training images in 4 directories, validation images in 3 directories",
            id="validation in classes",
        ),
        pytest.param(
            sort_validation_without_labels,
            "training images in 4 directories, validation images in 3 directories",
            id="validation in classes, no label file",
        ),
    ],
)
def test_layouts_give_the_same_data_set(
    raw: Path, make: Callable[[Path], None], layout: str
) -> None:
    expected = content_of(script.read_dataset(str(raw)))
    make(raw)
    dataset = script.read_dataset(str(raw))
    assert dataset.layout == layout
    assert content_of(dataset) == expected


def test_name_with_dots_in_a_tar_is_listed(raw: Path) -> None:
    """Only a path that climbs (`../x.JPEG`) is left out, not any two dots."""
    path = raw / "train/n01440764/n01440764_1.JPEG"
    path.rename(path.with_name("n01440764..1.JPEG"))
    expected = content_of(script.read_dataset(str(raw)))
    pack_classes(raw)
    assert content_of(script.read_dataset(str(raw))) == expected


def pack_beside(raw: Path, synset: str) -> None:
    """Packs a class into a tar and keeps its directory."""
    with tarfile.open(raw / "train" / f"{synset}.tar", "w") as tar:
        for path in sorted((raw / "train" / synset).iterdir()):
            tar.add(path, path.name)


def test_directories_are_read_when_the_tars_are_still_there(raw: Path) -> None:
    listed = script.read_dataset(str(raw))
    for synset in SYNSETS:
        pack_beside(raw, synset)
    assert script.read_dataset(str(raw)) == listed


def test_dataset_is_refused_when_extraction_stopped_half_way(raw: Path) -> None:
    """Two classes were not begun, and one is without its last image."""
    for synset in SYNSETS:
        pack_beside(raw, synset)
    remove(raw / "train/n01440838")
    remove(raw / "train/n01440875")
    remove(raw / "train/n01440764/n01440764_3.JPEG")
    assert problems_of(raw) == [
        (
            "All classes in RAW/train must be extracted, or none; found 3 classes whose "
            "images are not all in directories: n01440838, n01440875, n01440764. Extract "
            "these too, or remove the directories, and the tars are read as they are."
        )
    ]


def test_dataset_is_refused_when_folders_and_labels_disagree(raw: Path) -> None:
    sort_validation(raw)
    labels = read_lines(raw)
    wrong = next(synset for synset in SYNSETS if synset != labels[2])
    make_lines(raw, [*labels[:2], wrong, labels[3]])
    assert problems_of(raw) == [
        (
            "RAW/synset_labels.txt and the folders of validation/ must agree; line 3 says "
            f"{wrong}, RAW/validation/{labels[2]}/ILSVRC2012_val_00000003.JPEG is in "
            f"{labels[2]}."
        )
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "it is cut short", id="empty"),
        pytest.param(bytes(100), "it is cut short", id="cut in a header"),
        pytest.param(
            b"\x1f\x8b" + bytes(600),
            "it is compressed; decompress it with gzip -d first",
            id="gzip",
        ),
        pytest.param(
            b"<html>" * 100, "it is damaged, or not a tar, at byte 0", id="HTML"
        ),
    ],
)
def test_dataset_is_refused_when_a_tar_is_damaged(
    raw: Path, content: bytes, reason: str
) -> None:
    remedy = " Download it again, and compare its checksum."
    if "compressed" in reason:
        remedy = ""
    pack_classes(raw)
    (raw / "train/n01440801.tar").write_bytes(content)
    assert problems_of(raw) == [
        f"Cannot list the tar RAW/train/n01440801.tar: {reason}.{remedy}"
    ]


# ----------------------------------------------------- less than the real ImageNet


def test_shortfall_is_named_when_a_synset_has_no_training_images(raw: Path) -> None:
    make_lines(raw, ["n00000001", "n01440764", "n01440801", "n09999999"])
    assert script.shortfalls(script.read_dataset(str(raw))) == [
        (
            "2 of 6 synsets have validation images but no training images: n00000001, "
            "n09999999."
        )
    ]


def test_shortfall_is_named_when_images_are_empty(raw: Path) -> None:
    training = sorted(raw.glob("train/*/*.JPEG"))
    training[1].write_bytes(b"")
    image = min(raw.glob("validation/*.JPEG"))
    image.unlink()
    image.symlink_to("nowhere")
    assert script.shortfalls(script.read_dataset(str(raw))) == [
        (
            "2 images of no bytes (empty files, links to nothing), the first "
            f"{training[1]}: no shard that would hold one is written."
        )
    ]


def test_no_shortfall_is_named_when_the_data_set_is_another(raw: Path) -> None:
    assert script.shortfalls(script.read_dataset(str(raw))) == []


def images(sizes: list[int]) -> list[script.RawImage]:
    """Makes images of 1,000 synsets: `sizes[i]` of the i-th, and 0 of the others."""
    return [
        image
        for synset, size in enumerate(sizes)
        for image in [make_image(synset)] * size
    ]


def make_image(synset: int) -> script.RawImage:
    return script.RawImage("/raw", "1.JPEG", f"n{synset:08d}", synset + 1, 9, 9)


def imagenet(training: list[int], validation: list[int]) -> script.Dataset:
    synsets = tuple(f"n{synset:08d}" for synset in range(1_000))
    return script.Dataset(synsets, images(training), images(validation), "")


# As many as the real one has: 1,281,167 = 1,000 x 1,281 + 167.
COMPLETE = [1_282] * 167 + [1_281] * 833


def test_shortfalls_are_named_when_it_is_nearly_imagenet() -> None:
    """A class whose extraction was cut off, and validation images lost."""
    validation = [50] * 1_000
    assert script.shortfalls(imagenet(COMPLETE, validation)) == []
    training = [700, *COMPLETE[1:]]
    validation[5:17] = [49] * 12
    assert script.shortfalls(imagenet(training, validation)) == [
        (
            "ImageNet-1k has 1,281,167 training images, found 1,280,585 (-582). Classes of "
            "fewer than 732: n00000000 (700)."
        ),
        "ImageNet-1k has 50,000 validation images, found 49,988 (-12). Classes of "
        "fewer than 50: "
        + ", ".join(f"n{synset:08d} (49)" for synset in range(5, 15))
        + " and 2 more.",
    ]


def test_shortfalls_are_named_when_there_is_too_much() -> None:
    training = [COMPLETE[0] + 1, *COMPLETE[1:]]
    assert script.shortfalls(imagenet(training, [50] * 1_000)) == [
        "ImageNet-1k has 1,281,167 training images, found 1,281,168 (+1)."
    ]
