"""Section 1: what is in the raw directory, and what is wrong with it."""

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path

import contract
import pytest
import tars
from command import run_code, run_command
from conftest import SHARED

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


NAMES = [b"n1", b"n1-a", b"n1.b", b"n10", b"N2", b"n1 c", b"n\xc3\xa9", b"n\xff"]
NAMES += ["n\ue000".encode()]  # as text before the byte FF, in bytes after it
IMAGES = [b"b", b"B", b"a_10", b"a_9", b"\xc3\xa9", b"\xff", "\ue000".encode()]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_order_is_by_bytes_in_any_locale(raw: Path, encoding: str) -> None:
    """`n1-a/` comes before `n1/`, because `-` comes before `/`."""
    names = random.Random(3).sample(NAMES, len(NAMES))
    for name, image in itertools.product(names, IMAGES):
        path = os.path.join(os.fsencode(raw), b"train", name, image + b".JPEG")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).touch()
    code = """
import os, sys, imagenet_to_gcs
found = imagenet_to_gcs.read_dataset(sys.argv[1])
for image in found.training: print(os.fsencode(image.path), image.label)
"""
    locale = {"LC_ALL": "C", "PYTHONUTF8": str(int(encoding == "utf-8"))}
    done = run_code(code, str(raw), env={**locale, "PYTHONCOERCECLOCALE": "0"})
    assert done.status == 0, done.stderr
    paths = sorted(os.fsencode(path) for path in raw.glob("train/*/*.JPEG"))
    classes = sorted({os.path.dirname(path) for path in paths})
    assert done.stdout.splitlines() == [
        f"{path!r} {classes.index(os.path.dirname(path)) + 1}" for path in paths
    ]


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


def test_other_files_are_passed_over_when_there_are_images(raw: Path) -> None:
    listed = script.read_dataset(str(raw))
    for name in (
        "train/README",
        "train/.DS_Store",
        "train/ILSVRC2012_img_train_t3.tar",
        "train/@eaDir/n01440764_1.JPEG",
        "train/n01440764/@eaDir/n01440764_1.JPEG/thumbnail.jpg",
        "train/lost+found/x.JPEG",
        "train/__MACOSX/x.JPEG",
        "train/#recycle/n01440764/x.JPEG",
        "train/.AppleDouble/x.JPEG",
        "train/n01440764/._n01440764_1.JPEG",
        "train/n01440764/.hidden.JPEG",
        "train/n01440764/notes.txt",
        "train/n01440764/n01440764_9.JPEG.part",
        "validation/._ILSVRC2012_val_00000001.JPEG",
        "validation/Thumbs.db",
    ):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).touch()
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


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


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
            make_directory,
            "not a regular file",
            id="a directory",
        ),
        pytest.param(
            make_pipe,
            "not a regular file",
            id="a pipe",
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


NO_TRAIN = "No directory RAW/train, and no ILSVRC2012_img_train.tar beside it."
NO_VALIDATION = "No directory RAW/validation, and no ILSVRC2012_img_val.tar beside it."
BOTH = "Both splits are required."
NO_IMAGES = "No images match RAW/train/*/*.JPEG. Found"


def test_all_problems_are_named_at_once(raw: Path) -> None:
    remove(raw / "train")
    make_lines(raw, ["n01440764", "", "n01440764", "n01440764"])
    remove(raw / "validation")
    assert problems_of(raw) == [
        f"{NO_TRAIN} Found synset_labels.txt. {BOTH}",
        f"{NO_VALIDATION} Found synset_labels.txt. {BOTH}",
        (
            "Line 2 of RAW/synset_labels.txt must be a single synset such as "
            "n01440764; found ''."
        ),
    ]


# ------------------------------------------------------ what a user has done to it


def relabel(*labels: str) -> Callable[[Path], object]:
    return lambda raw: make_lines(raw, list(labels))


def replace_class(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(raw: Path) -> None:
        remove(raw / "train/n01440838")
        make(raw / "train/n01440838")

    return change


def replace_image(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(raw: Path) -> None:
        path = raw / "train/n01440764/n01440764_1.JPEG"
        path.unlink()
        make(path)

    return change


def enlarge(raw: Path) -> None:
    os.truncate(raw / "validation/ILSVRC2012_val_00000002.JPEG", 2**31)


def sort_validation(raw: Path, names: list[str]) -> None:
    """Moves each validation image into a directory."""
    for path, name in zip(sorted((raw / "validation").iterdir()), names, strict=True):
        (path.parent / name).mkdir(exist_ok=True)
        path.rename(path.parent / name / path.name)


def sort_into(*names: str) -> Callable[[Path], object]:
    def change(raw: Path) -> None:
        sort_validation(raw, list(names))
        (raw / "synset_labels.txt").unlink()

    return change


def contradict(raw: Path) -> None:
    sort_validation(raw, SYNSETS)
    make_lines(raw, [*SYNSETS[:2], "n01440875", "n01440838"])


def give_1000_classes(raw: Path) -> None:
    for index in range(996):
        (raw / f"train/n2{index:07}").mkdir()
        (raw / f"train/n2{index:07}/1.JPEG").write_bytes(b"x")
    make_lines(raw, [*SYNSETS[:3], "n01440876"])


def pack_inside(raw: Path) -> None:
    """Leaves each class's tar in the directory that was made for its images."""
    for name, data in tars.class_tars(raw).items():
        empty(raw / "train" / name[:-4])
        (raw / "train" / name[:-4] / name).write_bytes(data)


def remake_training_tar(raw: Path) -> None:
    images = sorted(raw.glob("train/*/*"))
    files = {str(path.relative_to(raw)): path.read_bytes() for path in images}
    tars.write_tar(raw / "ILSVRC2012_img_train.tar", files)
    remove(raw / "train")


def nest(raw: Path) -> None:
    for path in sorted(raw.glob("train/*/*.JPEG")):
        (path.parent / "images").mkdir(exist_ok=True)
        path.rename(path.parent / "images" / path.name)


def make_tar_a_pipe(raw: Path) -> None:
    empty(raw / "train")
    os.mkfifo(raw / "train/n01440764.tar")


def pack_a_png(raw: Path) -> None:
    (raw / "train/n01440801/d.png").touch()
    tars.TRAINING_LAYOUTS["whole_tar"](raw, raw)
    remove(raw / "train")


def link_train_to_nothing(raw: Path) -> None:
    remove(raw / "train")
    (raw / "train").symlink_to("/nothing/train")


FOREIGN = "Validation images must be of the classes of the training images, such as "
HINT = (
    "Line i of synset_labels.txt is the synset of the i-th validation image; README, "
    "step 2, says where to get it."
)
EACH = "Each class must be a directory or a tar; RAW/train/n01440838 is"
UNFIT = "Images must be regular files of less than 2 GiB; "
UNFIT_1 = f"{UNFIT}RAW/train/n01440764/n01440764_1.JPEG is not."
ALL_EMPTY = (
    "Each class must have images, but 4 of 4 classes have none: n01440764, n01440801, "
    "n01440838 and 1 more. No images match RAW/train/n01440764/*.JPEG. Found"
)
SEVERAL = "n01440764, n01440801, n01440838 and 1 more"

REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no train": (
        lambda raw: remove(raw / "train"),
        f"{NO_TRAIN} Found synset_labels.txt, validation. {BOTH}",
    ),
    "no validation": (
        lambda raw: remove(raw / "validation"),
        f"{NO_VALIDATION} Found synset_labels.txt, train. {BOTH}",
    ),
    "val": (
        lambda raw: (raw / "validation").rename(raw / "val"),
        f"{NO_VALIDATION} Found RAW/val: rename it to validation. {BOTH}",
    ),
    "empty train": (lambda raw: empty(raw / "train"), f"{NO_IMAGES} nothing there."),
    "other files in train": (
        lambda raw: empty(raw / "train", "a", "b", "c", "d", "e"),
        f"{NO_IMAGES} a, b, c and 2 more there.",
    ),
    "images without a class": (
        lambda raw: empty(raw / "train", "n1_1.JPEG"),
        (
            f"{NO_IMAGES} 1 .JPEG file there: move each into a directory named after its "
            "synset."
        ),
    ),
    "empty class": (
        lambda raw: empty(raw / "train/n01440838"),
        (
            "Each class must have images, but 1 of 4 classes have none: n01440838. No images "
            "match RAW/train/n01440838/*.JPEG. Found nothing there."
        ),
    ),
    "empty validation": (
        lambda raw: empty(raw / "validation"),
        "No images match RAW/validation/*.JPEG. Found nothing there.",
    ),
    "train is a file": (
        make_train_a_file,
        "Cannot list RAW/train: Not a directory.",
    ),
    "labels are numbers": (
        relabel("171", "361", "490", "7"),
        f"{FOREIGN}{SEVERAL}; found 171, 361, 490 and 1 more. {HINT}",
    ),
    "folders are numbers": (
        sort_into("1", "2", "3", "3"),
        f"{FOREIGN}{SEVERAL}; found 1, 2, 3. {HINT}",
    ),
    "folder is images": (
        sort_into("images", "images", "images", "images"),
        f"{FOREIGN}{SEVERAL}; found images. {HINT}",
    ),
    "one unknown label in ImageNet": (
        give_1000_classes,
        f"{FOREIGN}n01440764, n01440801, n01440838 and 997 more; found n01440876. {HINT}",
    ),
    "labels contradict folders": (
        contradict,
        (
            "RAW/synset_labels.txt and the folders of validation/ must agree; line 3 says "
            "n01440875, RAW/validation/n01440838/ILSVRC2012_val_00000003.JPEG is in "
            "n01440838. If the folders are right, remove the label file; they do without "
            "it."
        ),
    ),
    "class is a broken link": (
        replace_class(lambda path: path.symlink_to("nothing")),
        f"{EACH} a broken link.",
    ),
    "class link loops": (
        replace_class(lambda path: path.symlink_to(path)),
        f"{EACH} a broken link.",
    ),
    "class is a file": (replace_class(Path.touch), f"{EACH} a file."),
    "class tar is a pipe": (
        make_tar_a_pipe,
        "Cannot list the tar RAW/train/n01440764.tar: not a regular file.",
    ),
    "image is a device": (
        replace_image(lambda path: path.symlink_to("/dev/zero")),
        UNFIT_1,
    ),
    "image is a pipe": (replace_image(os.mkfifo), UNFIT_1),
    "image is a directory": (replace_image(Path.mkdir), UNFIT_1),
    "image is of 2 GiB": (
        enlarge,
        f"{UNFIT}RAW/validation/ILSVRC2012_val_00000002.JPEG is not.",
    ),
    **{
        suffix: (
            lambda raw, suffix=suffix: rename_all(raw / "train", suffix),  # type: ignore[misc]
            f"{ALL_EMPTY} 3 {suffix} files there: {remedy} them to *.JPEG.",
        )
        for suffix, remedy in (
            *((".png", "rename"), (".jpg", "rename"), (".JPG", "rename")),
            *((".Jpeg", "rename"), (".webp", "convert"), (".bmp", "convert")),
        )
    },
    "images one deeper": (
        nest,
        (f"{ALL_EMPTY} 3 .JPEG files there: move each one up."),
    ),
    "tars inside classes": (
        pack_inside,
        f"{ALL_EMPTY} 1 .tar file there: extract them there.",
    ),
    "training tar of directories": (
        remake_training_tar,
        (
            "No images match */*.JPEG in RAW/ILSVRC2012_img_train.tar. Found 12 .JPEG "
            "files there: extract each into train/<synset>/."
        ),
    ),
    "train is a link to nothing": (
        link_train_to_nothing,
        (
            "No directory RAW/train, and no ILSVRC2012_img_train.tar beside it. Found a link "
            "to /nothing/train, which does not exist. Both splits are required."
        ),
    ),
}


@pytest.mark.parametrize(("make", "problem"), REFUSALS.values(), ids=REFUSALS)
def test_command_says_what_is_wrong(
    raw: Path, make: Callable[[Path], object], problem: str
) -> None:
    make(raw)
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={raw.parent}/scratch"]
    done = run_command(*flags, "--nogcs_upload", timeout=60)
    assert [line.replace(str(raw), "RAW") for line in done.errors] == [problem]
    assert done.status == 1


def add(*names: str) -> Callable[[Path], object]:
    """Adds files to the raw directory."""

    def change(raw: Path) -> None:
        for name in names:
            (raw / name).parent.mkdir(parents=True, exist_ok=True)
            (raw / name).write_bytes(b"x")

    return change


READ = "only *.JPEG directly in train/<synset>/ and validation/ are read."

WARNINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other suffixes": (
        add(
            *(f"train/n01440764/{name}" for name in ("a.jpg", "b.jpeg", "c.JPG")),
            *("train/n01440801/d.png", "train/n01440801/e.png"),
        ),
        (
            "5 images left out (1 *.JPG, 1 *.jpeg, 1 *.jpg, 2 *.png), such as "
            f"RAW/train/n01440764/?: {READ}"
        ),
    ),
    "loose in train": (
        add("train/n01440764_9.JPEG"),
        f"1 image left out (1 *.JPEG), such as RAW/train/n01440764_9.JPEG: {READ}",
    ),
    "deeper": (
        add("train/n01440801/more/m.JPEG", "validation/more/even/n.JPEG"),
        f"2 images left out (2 *.JPEG), such as RAW/train/n01440801/more/m.JPEG: {READ}",
    ),
    "in a tar": (
        pack_a_png,
        f"1 image left out (1 *.png), such as RAW/ILSVRC2012_img_train.tar/d.png: {READ}",
    ),
    "unknown label": (
        relabel(*SYNSETS[1:], "n00000001"),
        (
            "1 of 5 synsets have validation images but no training images: n00000001 (label "
            "1)."
        ),
    ),
    "directory that is no class": (
        add("train/images/x.JPEG"),
        "1 of 5 synsets have training images but no validation images: images (label 1).",
    ),
}


@pytest.mark.parametrize(("make", "warning"), WARNINGS.values(), ids=WARNINGS)
def test_command_warns_of_what_is_missing(
    raw: Path, make: Callable[[Path], object], warning: str
) -> None:
    make(raw)
    done = run_command(f"--raw_data_dir={raw}", "--nogcs_upload", *FEW, "--dry_run")
    assert done.status == 0, done.stderr
    start, _, end = f"WARNING: {warning}".replace("RAW", str(raw)).partition("?")
    found = [line for line in done.lines if line.startswith(start)]
    assert [line for line in found if line.endswith(end)] != [], done.stderr


FEW = ("--training_shards=2", "--validation_shards=2")


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="needs the inputs of users")
def test_users_inputs_come_out_right() -> None:
    counts = {}
    for name in (
        "hard_links_in_tar/raw",
        "images_left_out/raw",
        "train_tar_left_in_train/alone",
        "train_tar_left_in_train/beside_directories",
        "unclear/nas_directories",
    ):
        dataset = script.read_dataset(str(SHARED / "cases" / name))
        counts[name] = len(dataset.training), len(dataset.left_out)
    assert [*counts.values()] == [(9, 0), (5, 24), (5, 0), (5, 0), (5, 0)]
    for name in (
        "labels_are_numbers/raw",
        "unclear/png",
        "unclear/tars_inside_classes",
    ):
        assert problems_of(SHARED / "cases" / name)


# ----------------------------------------------------- less than the real ImageNet


def warnings(dataset: script.Dataset, num_shards: int = 1) -> list[str]:
    return [*script.warnings_about(dataset, num_shards, 1)]


def test_shortfall_is_named_when_images_are_empty(raw: Path) -> None:
    training = sorted(raw.glob("train/*/*.JPEG"))
    training[1].write_bytes(b"")
    image = min(raw.glob("validation/*.JPEG"))
    image.unlink()
    image.symlink_to("nowhere")
    assert warnings(script.read_dataset(str(raw))) == [
        (
            "2 images are empty (zero bytes or dangling links), such as "
            f"{training[1]}; their shards will not be written."
        )
    ]


def test_no_shortfall_is_named_when_the_data_set_is_another(raw: Path) -> None:
    assert warnings(script.read_dataset(str(raw))) == []


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
    return script.Dataset(synsets, images(training), images(validation))


# As many as the real one has: 1,281,167 = 1,000 x 1,281 + 167.
COMPLETE = [1_282] * 167 + [1_281] * 833


def test_shortfalls_are_named_when_it_is_nearly_imagenet() -> None:
    """A class whose extraction was cut off, and validation images lost."""
    validation = [50] * 1_000
    assert warnings(imagenet(COMPLETE, validation)) == []
    training = [700, *COMPLETE[1:]]
    validation[5:17] = [49] * 12
    assert warnings(imagenet(training, validation)) == [
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
    assert warnings(imagenet(training, [50] * 1_000)) == [
        "ImageNet-1k has 1,281,167 training images, found 1,281,168 (+1)."
    ]


@pytest.mark.parametrize(
    ("num_shards", "num_images", "num_empty"),
    [(10, 12, 4), (4, 4, 0), (1_024, 12, 1_012), (1, 0, 1)],
)
def test_empty_shards_are_counted(
    num_shards: int, num_images: int, num_empty: int
) -> None:
    """12 images in 10 shards: six of 2, and 4 without."""
    dataset = script.Dataset(("n00000000",), images([num_images]), images([1]))
    found = [line for line in warnings(dataset, num_shards) if "empty" in line]
    plan = script.plan_shards(dataset, num_shards, 1)
    assert sum(not shard.images for shard in plan) == num_empty
    noun = "shard" if num_shards == 1 else "shards"
    expected = (
        f"{num_empty:,} of {num_shards:,} training {noun} will be empty: there are only "
        f"{num_images} training images. A smaller --training_shards avoids that."
    )
    assert found == [expected] * bool(num_empty)
