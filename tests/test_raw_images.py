"""What is in the raw directory, and what is wrong with it."""

import itertools
import os
import random
from pathlib import Path

import contract
import pytest
from command import run_code, run_command

import imagenet_to_gcs as script

SYNSETS = ["n01440764", "n01440801", "n01440838", "n01440875"]


# ------------------------------------------------------------------- what is listed


def test_image_has_the_size_and_time_of_its_file(raw: Path) -> None:
    path = min(raw.glob("train/*/*.JPEG"))
    os.utime(path, ns=(5, 1_234_567_890_123))
    dataset = script.read_dataset(str(raw))
    first, size = dataset.training[0], path.stat().st_size
    found = (first.path, first.fingerprint, first.num_bytes)
    assert found == (str(path), 1_234_567_890, size)
    sizes = sorted(path.stat().st_size for path in raw.rglob("*.JPEG"))
    assert sorted(image.num_bytes for image in dataset.images) == sizes


NAMES = [b"n1", b"n1-a", b"n1.b", b"n10", b"N2", b"n1 c", b"n\xc3\xa9", b"n\xff"]
NAMES += ["n\ue000".encode()]  # as text before the byte FF, in bytes after it
IMAGES = [b"b", b"B", b"a_10", b"a_9", b"\xc3\xa9", b"\xff", "\ue000".encode()]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_order_is_by_bytes_in_any_locale(raw: Path, encoding: str) -> None:
    """`n1-a/` comes before `n1/`, because `-` comes before `/`."""
    names = random.Random(3).sample(NAMES, len(NAMES))
    for name, image in itertools.product(names, IMAGES):
        path = raw / "train" / os.fsdecode(name) / os.fsdecode(image + b".JPEG")
        path.parent.mkdir(exist_ok=True)
        path.touch()
    code = """
import os, sys, imagenet_to_gcs
found = imagenet_to_gcs.read_dataset(sys.argv[1])
for image in found.training: print(os.fsencode(image.path), found.labels[image.synset])
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
    labels = ["n00000001", "n01440764", "n01440801", "n09999999"]
    (raw / "synset_labels.txt").write_text("\n".join(labels))
    dataset = script.read_dataset(str(raw))
    assert dataset.synsets == ("n00000001", *SYNSETS, "n09999999")
    assert [dataset.labels[i.synset] for i in dataset.validation] == [1, 2, 3, 6]
    assert dataset.labels["n01440838"] == 4


def test_what_systems_leave_is_passed_over(raw: Path) -> None:
    listed = script.read_dataset(str(raw))
    for name in (
        "train/.DS_Store",
        "train/@eaDir/n01440764_1.JPEG",
        "train/n01440764/@eaDir/n01440764_1.JPEG/thumbnail.jpg",
        "train/__MACOSX/x.JPEG",
        "train/lost+found/n01440764/x.JPEG",
        "train/.AppleDouble/x.JPEG",
        "train/n01440764/._n01440764_1.JPEG",
        "train/n01440764/.hidden.JPEG",
        "validation/._ILSVRC2012_val_00000001.JPEG",
        "validation/Thumbs.db",
        "tf_records/train/x",
    ):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).touch()
    assert script.read_dataset(str(raw)) == listed


def test_links_are_followed(raw: Path) -> None:
    """The way to give another layout the names that it must have."""
    listed = script.read_dataset(str(raw))
    contract.change(raw, "mkdir -p linked/train; ln -s $PWD/train/* linked/train")
    contract.change(raw, "ln -s ../validation ../synset_labels.txt linked")
    found = script.read_dataset(str(raw / "linked"))
    assert [image._replace(source="") for image in found.images] == [
        image._replace(source="") for image in listed.images
    ]


# -------------------------------------------------------------------- the label file


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"n01\nn02\nn03\n", id="plain"),
        pytest.param(b"n01\nn02\nn03", id="no last newline"),
        pytest.param(b"n01\r\nn02\r\nn03\r\n", id="Windows"),
        pytest.param(b"n01\r\nn02\r\nn03", id="Windows, no last newline"),
        pytest.param(b"  n01\nn02\t\n n03 \n", id="spaces around"),
        pytest.param(b"n01\nn02\nn03\n\n \r\n", id="blank lines at the end"),
    ],
)
def test_labels_are_read(tmp_path: Path, content: bytes, mark: bytes) -> None:
    (tmp_path / "labels").write_bytes(mark + content)
    assert script.read_label_file(str(tmp_path / "labels")) == ["n01", "n02", "n03"]


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        pytest.param(b"n01\n\nn02\n", "2", "''", id="empty line"),
        pytest.param(b"n01\n \t\nn02\n", "2", "''", id="spaces"),
        pytest.param(b"n01\nn02 tench\n", "2", "'n02 tench'", id="two words"),
        pytest.param(b"a b\nc\n\nd e\n", "1", "'a b'", id="several"),
        pytest.param(b"a\n" + b"word " * 100, "2", repr("word " * 12), id="long line"),
        pytest.param(b"n01\n" * 1_233 + b"\nn02", "1,234", "''", id="late line"),
    ],
)
def test_labels_are_refused(
    tmp_path: Path, content: bytes, line: str, found: str
) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)
    rule = "must be a single synset such as n01440764; found"
    with pytest.raises(script.InvalidInputError) as caught:
        script.read_label_file(str(path))
    assert str(caught.value) == f"Line {line} of {path} {rule} {found}."


# ------------------------------------------------------ what a user has done to it


TWO_COLUMNS = (
    "To have synset_labels.txt decide, give it two columns: file name, synset."
)
NO_TRAIN = "and no ILSVRC2012_img_train.tar beside it. Found"
NO_VALIDATION = "No directory RAW/validation, and no ILSVRC2012_img_val.tar beside it."
BOTH = "there. Both splits are required; README, step 2, says in which layouts."
NO_IMAGES = "No images match RAW/train/<synset>/*.JPEG."
SEVERAL = "n01440764, n01440801, n01440838 and"
UNKNOWN = "Validation images must be of the classes of the training images, such as "
LINE_I = "Line i is for the i-th image (README, step 2). Beside it: no other."
HINT = "See README, step 2."
IMAGE = "train/n01440764/n01440764_1.JPEG"
EMPTY = "No images match RAW/train/n01440764/*.JPEG."
CLASS = "Classes must all be directories of *.JPEG, or all *.tar"
READ = "not named *.JPEG, or not where README, step 2, says."

REFUSALS = {
    **{
        f"rm synset_labels.txt; {command}": (
            f"Cannot read RAW/synset_labels.txt: {reason}. {LINE_I}"
        )
        for command, reason in (
            ("", "No such file or directory"),
            ("mkdir synset_labels.txt", "not a regular file"),
            ("mkfifo synset_labels.txt", "not a regular file"),
        )
    },
    "printf '\\xff\\xfen\\0' >synset_labels.txt": (  # as PowerShell's `>` writes
        "RAW/synset_labels.txt is not text; save it as UTF-8."
    ),
    **{
        command: (
            f"RAW/synset_labels.txt has {labels} for {images} images. {TWO_COLUMNS}"
        )
        for command, labels, images in (
            (": >synset_labels.txt", "0 lines", "4"),
            ("seq 3 >synset_labels.txt", "3 lines", "4"),
            ("seq 1 >s*; touch validation/{5..1001}.JPEG", "1 line", "1,001"),
        )
    },
    "rm -r train": (
        f"No directory RAW/train, {NO_TRAIN} synset_labels.txt, validation {BOTH}"
    ),
    "rm -r validation": f"{NO_VALIDATION} Found synset_labels.txt, train {BOTH}",
    "mv validation val": f"{NO_VALIDATION} Found synset_labels.txt, train, val {BOTH}",
    "rm -r train; ln -s train train": (
        "Cannot list RAW/train: Too many levels of symbolic links."
    ),
    "rm -r train; ln -s /nothing/train train": (
        "Cannot list RAW/train: No such file or directory."
    ),
    "rm -r train; touch train": "Cannot list RAW/train: Not a directory.",
    "rm -r train/*": f"{NO_IMAGES} Found nothing there.",
    "rm -r train/*; touch train/{a,b,c,d,e}": (
        f"{NO_IMAGES} Skipped RAW/train/a and 4 more: {READ}"
    ),
    "rm -r train/*; touch train/n1_1.JPEG": (
        f"{NO_IMAGES} Skipped RAW/train/n1_1.JPEG: {READ}"
    ),
    "rm train/n01440838/*": (
        "No images match RAW/train/n01440838/*.JPEG. Found nothing there."
    ),
    "mkdir train/n01440876; touch train/n01440876/x": (
        "No images match RAW/train/n01440876/*.JPEG. Skipped "
        f"RAW/train/n01440876/x: {READ}"
    ),
    "rm validation/*": "No images match RAW/validation/*.JPEG. Found nothing there.",
    "seq 171 174 >synset_labels.txt": (
        f"{UNKNOWN}{SEVERAL} 1 more; found '171', '172', '173' and 1 more. {HINT}"
    ),
    "rm *.txt; cd validation; mkdir 1 2; mv *[12].JPEG 1; mv *[34].JPEG 2": (
        f"{UNKNOWN}{SEVERAL} 1 more; found '1', '2'. {HINT}"
    ),
    "rm synset_labels.txt; mkdir validation/images; mv validation/*.JPEG $_": (
        f"{UNKNOWN}{SEVERAL} 1 more; found 'images'. {HINT}"
    ),
    "mkdir train/n2{001..996}; for d in train/n2*; do echo x >$d/1.JPEG; done; "
    "sed -i 4s/.*/n01440876/ synset_labels.txt": (
        f"{UNKNOWN}{SEVERAL} 997 more; found 'n01440876'. {HINT}"
    ),
    "cd train; rm -r n01440838; ln -s nothing n01440838": (
        "Cannot list RAW/train/n01440838: No such file or directory."
    ),
    "cd train; rm -r n01440838; ln -s n01440838 n01440838": (
        "Cannot list RAW/train/n01440838: Too many levels of symbolic links."
    ),
    "cd train; rm -r n01440838; touch n01440838": f"{CLASS}; found RAW/train/n01440838.",
    **{
        f"cd train; mv n01440838 ../x; touch {name}": f"{CLASS}; found RAW/train/{name}."
        for name in (
            *("n01440838.tar.gz", "n01440838.tar.part", "n01440838.TAR"),
            *("n01440838.7z", "n01440838.part1.rar"),
        )
    },
    "cd train; touch x.tar.part; for s in n*; do tar -cf $s.tar -C $s .; done; "
    "mv n01440838.tar n01440838.tar.gz; tar -cf ../ILSVRC2012_img_train.tar *.tar*; "
    "rm -r ../train": (
        f"{CLASS}; found RAW/ILSVRC2012_img_train.tar/n01440838.tar.gz."
    ),
    "cd train; rm n01440838/*; touch n01440838/n01440838_1.jpg; "
    "tar -cf ../ILSVRC2012_img_train.tar *; rm -r ../train": (
        f"{CLASS}; found RAW/ILSVRC2012_img_train.tar/n01440838/n01440838_1.jpg."
    ),
    "cd train; for s in n*; do tar -cf $s.tar -C $s .; done; "
    "tar -cf n01440838.tar n01440764; rm -r n*[0-9]": (
        "A tar must hold images in one layout; RAW/train/n01440838.tar holds "
        "class n01440838, n01440764/*.JPEG. Extract it."
    ),
    "mkdir train/n01440764/n01440764_9.JPEG": (
        "RAW/train/n01440764/n01440764_9.JPEG must be a regular file."
    ),
    "mkfifo validation/ILSVRC2012_val_00000009.JPEG": (
        "RAW/validation/ILSVRC2012_val_00000009.JPEG must be a regular file."
    ),
    "rm -r validation; ln -s nothing ILSVRC2012_img_val.tar": (
        "Cannot list the tar RAW/ILSVRC2012_img_val.tar: No such file or directory."
    ),
    "cd train; rm -r n01440838; ln -s nothing wolf": (
        "Cannot list RAW/train/wolf: No such file or directory."
    ),
    "rm -r train/*; mkfifo train/n01440764.tar": (
        "Cannot list RAW/train/n01440764.tar: Not a directory."
    ),
    "rm -r train/*; ln -s nothing train/n01440764.tar": (
        "Cannot list RAW/train/n01440764.tar: No such file or directory."
    ),
    "cd validation; for s in $(<../*.txt); do mkdir $s; mv *$((++i)).JPEG $s; done; "
    "sed -i 3s/.*/n01440875/ ../synset_labels.txt": (
        "The directory and the line of 1 of 4 validation images disagree: image 3, "
        "RAW/validation/n01440838/ILSVRC2012_val_00000003.JPEG, is n01440838 by directory, "
        f"n01440875 by line. Correct it. {TWO_COLUMNS}"
    ),
    "mkdir -p ILSVRC/Data/CLS-LOC; mv train $_": (
        f"No directory RAW/train, {NO_TRAIN} ILSVRC, synset_labels.txt, validation "
        f"{BOTH}"
    ),
    **{
        f"cd train/n01440764; for f in *; do mv $f ${{f%.JPEG}}{suffix}; done": (
            f"{EMPTY} Skipped RAW/train/n01440764/n01440764_1{suffix} and 2 more: "
            f"{READ}"
        )
        for suffix in (".png", ".jpg", ".JPG", ".Jpeg", ".webp", ".bmp")
    },
    "cd train/n01440764; mkdir images; mv *.JPEG images": (
        f"{EMPTY} Skipped RAW/train/n01440764/images: {READ}"
    ),
    "cd train/n01440764; tar -cf n01440764.tar *; rm *.JPEG": (
        f"{EMPTY} Skipped RAW/train/n01440764/n01440764.tar: {READ}"
    ),
    "rm train/*/*": f"{EMPTY} Found nothing there.",
    "tar -cf ILSVRC2012_img_train.tar -C train/n01440764 .; rm -r train": (
        "RAW/ILSVRC2012_img_train.tar/n01440764_1.JPEG must be below its class directory."
    ),
    "cd train; rm */*; touch {a,b}.txt; "
    "tar -cf ../ILSVRC2012_img_train.tar *.txt; rm -r ../train": (
        "No images match RAW/ILSVRC2012_img_train.tar/*.JPEG. Skipped "
        f"RAW/ILSVRC2012_img_train.tar/a.txt and 1 more: {READ}"
    ),
}


@pytest.mark.parametrize(("commands", "problem"), REFUSALS.items())
def test_command_says_what_is_wrong(raw: Path, commands: str, problem: str) -> None:
    contract.change(raw, commands)
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={raw.parent}/scratch"]
    done = run_command(*flags, "--nogcs_upload")
    assert "\n".join(done.errors).replace(str(raw), "RAW") == problem
    assert done.status == 1
    assert not (raw.parent / "scratch").exists()


def skipped(what: str) -> str:
    return f"Skipped RAW/{what}: {READ}"


WARNINGS = {
    "cd train; touch n01440764/{a.jpg,b.jpeg,c.JPG} n01440801/{d,e}.png": skipped(
        "train/n01440764/a.jpg and 4 more"
    ),
    "cd train; touch {README,n01440764.txt,wolf.tgz,n01440764.tar.gz} "
    "n01440764/{a.txt,n01440764_9.JPEG.xml}": skipped("train/README and 5 more"),
    "touch train/n01440764_9.JPEG": skipped("train/n01440764_9.JPEG"),
    "touch train/ILSVRC2012_img_train_t3.tar": skipped(
        "train/ILSVRC2012_img_train_t3.tar"
    ),
    "mkdir -p {train/n01440801,validation}/more/even; "
    "touch train/n01440801/more/m.JPEG validation/more/even/n.JPEG": skipped(
        "train/n01440801/more and 1 more"
    ),
    "cd validation; ln -s loop loop": skipped("validation/loop"),
    "cd validation; touch x.png; mkdir n01440764; mv *.JPEG n01440764; "
    "mkdir n01440764/deep; touch n01440764/deep/x.JPEG; rm ../*.txt": skipped(
        "validation/n01440764/deep and 1 more"
    ),
    "cd train; touch x.jpg; mkdir n01440801/more; touch n01440801/more/y.jpg; "
    "tar -cf ../ILSVRC2012_img_train.tar *; rm -r ../train": skipped(
        "ILSVRC2012_img_train.tar/n01440801/more/y.jpg and 1 more"
    ),
    "cd train; touch n01440801/d.png; for d in *; do tar -cf $d.tar -C $d .; done; "
    "tar -cf ../ILSVRC2012_img_train.tar *.tar; rm -r ../train": skipped(
        "ILSVRC2012_img_train.tar/n01440801.tar/d.png"
    ),
    f": >{IMAGE}; ln -sf nowhere validation/ILSVRC2012_val_00000001.JPEG": (
        f"2 images of zero bytes or without a file, such as RAW/{IMAGE}: no shard "
        "with one will be written."
    ),
    "sed -i 1s/.*/n00000001/ synset_labels.txt": (
        "Only one split has images of 2 synsets: n00000001 (validation, label 1), "
        "n01440764 (training, label 2)."
    ),
}
FEW = ("--training_shards=2", "--validation_shards=2")


@pytest.mark.parametrize(("commands", "warning"), WARNINGS.items())
def test_command_warns_of_what_is_missing(
    raw: Path, commands: str, warning: str
) -> None:
    contract.change(raw, commands)
    done = run_command(f"--raw_data_dir={raw}", "--nogcs_upload", *FEW, "--dry_run")
    assert done.status == 0, done.stderr
    assert f"WARNING: {warning.replace('RAW', str(raw))}" in done.lines


# ----------------------------------------------------- less than the real ImageNet


def warnings(dataset: script.Dataset) -> list[str]:
    return [*script.warnings_about(dataset)]


def images(sizes: list[int]) -> list[script.RawImage]:
    """Makes images of 1,000 synsets: `sizes[i]` of the i-th, and 0 of the others."""
    return [
        image
        for synset, size in enumerate(sizes)
        for image in [make_image(synset)] * size
    ]


def make_image(synset: int) -> script.RawImage:
    return script.RawImage("/raw", "1.JPEG", f"n{synset:08d}", 9, 9)


def imagenet(training: list[int], validation: list[int]) -> script.Dataset:
    synsets = tuple(f"n{synset:08d}" for synset in range(1_000))
    return script.Dataset(synsets, images(training), images(validation))


# As many as the real one has: 1,281,167 = 1,000 x 1,281 + 167.
COMPLETE = [1_282] * 167 + [1_281] * 833


NOT_IMAGENET = (
    "The 1,000 classes are not ImageNet-1k's: labels differ from those of models trained "
    "on it."
)


def test_shortfalls_are_named_when_it_is_nearly_imagenet() -> None:
    """A class whose extraction was cut off, and validation images lost; or one more."""
    validation = [50] * 1_000
    assert warnings(imagenet(COMPLETE, validation)) == [NOT_IMAGENET]
    assert warnings(imagenet([1_283, *COMPLETE[1:]], validation)) == [
        NOT_IMAGENET,
        "ImageNet-1k has 1,281,167 images in train/, found 1,281,168 (+1).",
    ]
    training = [700, *COMPLETE[1:]]
    validation[5:17] = [49] * 12
    assert warnings(imagenet(training, validation)) == [
        NOT_IMAGENET,
        (
            "ImageNet-1k has 1,281,167 images in train/, found 1,280,585 (-582), of "
            "n00000000 only 700."
        ),
        (
            "ImageNet-1k has 50,000 images in validation/, found 49,988 (-12), of n00000016 "
            "only 49."
        ),
    ]
