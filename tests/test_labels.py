"""Which class an image is of, and what contradicts it.

`imagenet_validation_labels.txt.xz` is the public list of ImageNet's validation labels,
from https://github.com/tensorflow/models (Apache License 2.0).
"""

import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path

import contract
import pytest
import tars
from command import UPLOAD, run_command
from emulator import Emulator

import imagenet_to_gcs as script

LABELS = lzma.decompress(
    (Path(__file__).parent / "imagenet_validation_labels.txt.xz").read_bytes()
).decode()
A, B, C, D = "n01440764", "n01440801", "n01440838", "n01440875"
VAL = "ILSVRC2012_val_"
V = [f"{VAL}{i:08d}.JPEG" for i in range(5)]
TO_DECIDE = "To have synset_labels.txt decide, give it two columns: file name, synset."
READ = "not named *.JPEG, or not where README, step 2, says."
INTO_FOLDERS = (
    "cd validation; for s in $(<../*.txt); do mkdir $s; mv *$((++i)).JPEG $s; done; "
)
HUGGING_FACE = (
    "cd validation; for s in $(<../*.txt); do i=$((i+1)); f=$(echo *0$i.JPEG); "
    "mv $f ${f%.JPEG}_$s.JPEG; done; "
)
UNKNOWN = (
    "Validation images must be of the classes of the training images, such as "
    "n01440764, n01440801, n01440838 and 1 more; found {}. See README, step 2."
)


def differ(one: str, other: str, wrong: int, first: int, path: str, says: str) -> str:
    x, y = says.split()
    return (
        f"The {one} and the {other} of {wrong} of 4 validation images disagree: image "
        f"{first}, RAW/{path}, is {x} by {one}, {y} by {other}. "
    )


def stray(found: str) -> str:
    return (
        f"Most classes are named like n01440764; move others out of RAW/train: {found}."
    )


NO_ZEROS = "Without leading zeros, names sort wrongly: 1, 10, 2."


def misplaced(lines: str, images: int, why: str) -> str:
    why = f" {why}" if why else ""
    return f"RAW/synset_labels.txt has {lines} for {images} images.{why} {TO_DECIDE}"


def no_image(numbers: str) -> str:
    return f"There is no image {numbers}."


def of_test_set(found: str) -> str:
    return f"Move images of the test set away: RAW/validation/{found}."


def twice(one: str, other: str) -> str:
    return (
        "The same image is there twice; remove the wrong one: "
        f"RAW/validation/{one} or RAW/validation/{other}."
    )


LINE_I = "Line i is for the i-th image (README, step 2). Beside it:"
NOT_TEXT = "RAW/synset_labels.txt is not text; save it as UTF-8."
WEB_PAGE = "RAW/synset_labels.txt is a web page; download the file itself."
T1 = "ILSVRC2012_test_00000001.JPEG"


NOT_NEEDED = (
    "RAW/synset_labels.txt must have a line for each of 4 images, or be removed; "
    "found {}."
)
REFUSED = {
    "cp -r train/n01440838 'train/n01440838 copy'": stray("n01440838 copy"),
    "mkdir train/{tmp,new}; echo >train/tmp/1.JPEG; echo >train/new/1.JPEG": stray(
        "new, tmp"
    ),
    "cd train; tar -cf 'n01440838 (1).tar' -C n01440838 .; for s in n*[0-9]; do "
    "tar -cf $s.tar -C $s .; rm -r $s; done": stray("n01440838 (1)"),
    "sed -i 2s/.*/tench/ *.txt": UNKNOWN.format("'tench'"),
    f"rm validation/{V[2]}; sed -i 4d *.txt": misplaced("3 lines", 3, no_image("2")),
    "cd validation; for i in 1 2 3 4; do mv *0$i.JPEG ILSVRC2012_val_$((3*i)).JPEG; "
    "done": misplaced("4 lines", 4, f"{no_image('1, 2, 4')} {NO_ZEROS}"),
    "cd validation; rename() { mv *$1.JPEG ILSVRC2012_val_0000050$1.JPEG; }; "
    "for i in 1 2 3 4; do rename $i; done": (
        misplaced("4 lines", 4, no_image("1, 2, 3 and 1 more"))
    ),
    f"rm validation/{V[2]}": misplaced("4 lines", 3, no_image("2")),
    # Only as many numbers are looked for as there are lines.
    f"mv validation/{V[4]} validation/{VAL}1700000004.JPEG": (
        misplaced("4 lines", 4, no_image("4"))
    ),
    f"rm validation/{V[4]}": misplaced("4 lines", 3, no_image("4")),
    f"mv validation/{V[1]} validation/a.JPEG": misplaced("4 lines", 4, no_image("1")),
    f"cd validation; mv {V[3]} x.jpg": (
        misplaced("4 lines", 3, no_image("3")) + "\n"
        f"Skipped RAW/validation/x.jpg: {READ}"
    ),
    f"cd validation; mkdir {C}; mv {V[3]} {C}": (
        misplaced("4 lines", 3, no_image("3")) + f"\nSkipped RAW/validation/{C}: {READ}"
    ),
    f"{INTO_FOLDERS} sed -i 3d ../*.txt": NOT_NEEDED.format(3),
    f"{INTO_FOLDERS} : >../*.txt": NOT_NEEDED.format(0),
    f"{INTO_FOLDERS} sed -i 3s/.*/{D}/ ../*.txt": (
        differ("directory", "line", 1, 3, f"validation/{C}/{V[3]}", f"{C} {D}")
        + f"Correct it. {TO_DECIDE}"
    ),
    f"{HUGGING_FACE} sed -i 1s/.*/{B}/ ../*.txt": (
        differ("name", "line", 1, 1, f"validation/{VAL}00000001_{A}.JPEG", f"{A} {B}")
        + f"Correct it. {TO_DECIDE}"
    ),
    f"{HUGGING_FACE} mkdir {A} {B} {C}; mv *_{A}.J* {A}; mv *_{C}.J* {C}; mv *_n* {B}; "
    "rm ../*.txt": (
        differ(
            "directory",
            "name",
            1,
            4,
            f"validation/{B}/{VAL}00000004_{D}.JPEG",
            f"{B} {D}",
        )
        + f"Correct it. {TO_DECIDE}"
    ),
    f"{INTO_FOLDERS} cp {A}/* {B}; rm ../*.txt": twice(f"{A}/{V[1]}", f"{B}/{V[1]}"),
    f"{INTO_FOLDERS} cp {A}/* {D}/{VAL}1.JPEG; cp {B}/* {D}/{VAL}02.JPEG; rm ../*.txt": (
        twice(f"{B}/{V[2]}", f"{D}/{VAL}02.JPEG")
    ),
    f"{INTO_FOLDERS} cp {A}/* '{B}/Copy of {V[1]}'; rm ../*.txt": (
        twice(f"{B}/Copy of {V[1]}", f"{A}/{V[1]}")
    ),
    f"{INTO_FOLDERS} cp {A}/* '{B}/{VAL}00000001 (1).JPEG'; rm ../*.txt": (
        twice(f"{B}/{VAL}00000001 (1).JPEG", f"{A}/{V[1]}")
    ),
    f"{INTO_FOLDERS} cp {A}/* {A}/{VAL}1.JPEG; rm ../*.txt": (
        twice(f"{A}/{V[1]}", f"{A}/{VAL}1.JPEG")
    ),
    "sed -i 1ilabel *.txt": misplaced("5 lines", 4, no_image("5")),
    f"mv validation/{V[1]} validation/{V[0]}": (misplaced("4 lines", 4, no_image("1"))),
    f"echo >validation/{T1}; echo {A} >>*.txt": of_test_set(T1),
    f"echo >validation/{T1}; for f in $(ls validation); do echo $f {A}; done >*.txt": (
        of_test_set(T1)
    ),
    f"{INTO_FOLDERS} echo >{A}/{T1}; rm ../*.txt": of_test_set(f"{A}/{T1}"),
    f"printf '{VAL}0000000%d {A}\\n' 1 2 4 >*.txt": (
        f"RAW/synset_labels.txt has no line for {V[3]}; its last is for "
        f"'{VAL}00000004'."
    ),
    **{
        f"printf '{content}' >*.txt": (
            f"RAW/synset_labels.txt has no line for {V[1]}, {V[2]}, {V[3]} and 1 more; "
            f"its last is for {last!r}."
        )
        for content, last in (
            ("404: Not Found", "404:"),
            ("version https://x/1\\noid sha256:1\\nsize 40\\n", "size"),
            (f"1 {A}\\n2 {B}\\n3 {C}\\n4 {D}\\n", "4"),
            (f"{A}\\ttench\\n{B}\\tgoldfish\\n", B),
        )
    },
    f"printf '%s\\n' 'a {A}' 'a {B}' 'b {A}' >*.txt": (
        "Line 1 of RAW/synset_labels.txt must be a file name and its only synset such "
        f"as n01440764; found 'a {A}'."
    ),
    "iconv -t utf-16le *.txt >x; mv x *.txt": NOT_TEXT,
    "sed -i '2s/$/\\x00/' *.txt": NOT_TEXT,
    "printf '\\n \\n<!DOCTYPE html>' >*.txt": WEB_PAGE,
    "printf '<!DOCTYPE html>\\n<html>\\n<p>' >*.txt": WEB_PAGE,
    "mv *.txt synset_labels.txt.txt; touch imagenet_2012_labels notes": (
        f"Cannot read RAW/synset_labels.txt: No such file or directory. {LINE_I} "
        "imagenet_2012_labels, synset_labels.txt.txt."
    ),
    **{
        f"{INTO_FOLDERS} cp {A}/* x.JPEG; {linked}": (
            f"RAW/synset_labels.txt has 4 lines for 1 image. {TO_DECIDE}\n"
            f"Skipped RAW/validation/{A} and {more} more: {READ}"
        )
        for linked, more in (
            ("", 3),
            ("mkdir ../c; mv n* ../c; ln -s $PWD/../c/* .; ln -s / n1", 4),
        )
    },
    f"{INTO_FOLDERS} echo '<html>' >../*.txt": WEB_PAGE,
    f"printf '{VAL}0000000%d,,{A}\\n' 1 2 3 4 >*.txt": (
        "Line 1 of RAW/synset_labels.txt must be a file name and its only synset such "
        f"as n01440764; found '{VAL}00000001,,{A}'."
    ),
    "rm -r train validation/* *.txt; mkdir -p {train,validation}/x "
    "train/caf$'\\xc3\\xa9' validation/cafe$'\\xcc\\x81'; "
    "for d in */*; do echo >$d/1.JPEG; done": (
        "Validation images must be of the classes of the training images, such as "
        "caf\xe9, x; found 'cafe\\u0301'. See README, step 2."
    ),
    "rm -r train validation/* *.txt; mkdir -p train/{0..3} validation/{1..4}; "
    "for d in */*; do echo >$d/x.JPEG; done": (
        "Validation images must be of the classes of the training images, such as "
        "0, 1, 2 and 1 more; found '4'. See README, step 2."
    ),
    f"cd validation; mkdir {C}; mv {V[3]} {C}; rm ../*.txt": (
        f"Cannot read RAW/synset_labels.txt: No such file or directory. {LINE_I} no "
        "other.\n"
        f"Skipped RAW/validation/{C}: {READ}"
    ),
    "sed -i 's/$/ tench/; 1s/.*/ImageId/; 3s/.*/x/' *.txt": (
        "Line 2 of RAW/synset_labels.txt must be a single synset such as n01440764; "
        f"found '{B} tench'."
    ),
    "sed -i '2s/$/\\xe2\\x80\\x8b/' *.txt": (
        "Line 2 of RAW/synset_labels.txt must be a single synset such as n01440764; "
        f"found '{B}\\u200b'."
    ),
}


def read(raw: Path, commands: str) -> script.Dataset:
    contract.change(raw, commands.replace("*.txt", "synset_labels.txt"))
    return script.read_dataset(str(raw))


@pytest.mark.parametrize("commands", REFUSED)
def test_what_contradicts_a_label_is_refused(raw: Path, commands: str) -> None:
    with pytest.raises(script.InvalidInputError) as caught:
        read(raw, commands)
    assert str(caught.value).replace(str(raw), "RAW") == REFUSED[commands]


def only(found: str) -> str:
    return f"Only one split has images of 1 synset: {found}."


def misnamed(count: str, name: str, folder: str = A) -> str:
    return (
        f"Directories overrule the names of {count} training images, such as "
        f"RAW/train/{folder}/{name}."
    )


RANK = "Labels are ranks of names as text: class {} has label {}."


BY_ORDER = "Lines of RAW/synset_labels.txt are for names sorted as text: 1, 10, 2."
EMPTY = (
    "4 images of zero bytes or without a file, such as RAW/validation/a1.JPEG: no shard "
    "with one will be written."
)
LINES = [A, B, C, D]
BY_NAME = "i=0; for s in $(<*.txt); do i=$((i+1)); echo {}; done >x; mv x *.txt"
EVERY = BY_NAME.format(f"{VAL}$(printf %08d $i){{}}$s{{}}")
RENAME = "for f in *.JPEG; do mv $f {}; done"
TEN = "rm -r train *.txt; cd validation; "

ACCEPTED: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "": (LINES, []),
    EVERY.format(".JPEG ", ""): (LINES, []),
    EVERY.format(" ", ""): (LINES, []),
    # No-break spaces, which no editor shows
    "sed -i 's/$/\\xc2\\xa0/' *.txt": (LINES, []),
    EVERY.format("', '", ""): (LINES, []),
    EVERY.format("'\t\t'", "'\ttench'"): (LINES, []),
    EVERY.format("'.JPEG, '", "', 12'"): (LINES, []),
    EVERY.format("' '", "' tench, Tinca tinca'"): (LINES, []),
    f"cd validation; rm *[34].JPEG; mv {V[1]} {VAL}00000009_a.JPEG; "
    f"mv {V[2]} {VAL}00000009_b.JPEG; sed -i 3,4d ../*.txt": (
        [A, B],
        [BY_ORDER],
    ),
    "rm -r train validation/* *.txt; mkdir train x; echo >x/1.JPEG; "
    "for s in cat dog train; do tar -cf train/$s.tar -C x .; done; "
    "cp train/* validation": (["cat", "dog", "train"], []),
    EVERY.format("'\t'", "'\ttench'"): (LINES, []),
    EVERY.format(",", "' 12 34 56,7'") + "; sed -i 1iImageId,Prediction *.txt; "
    "sort -r *.txt >x; mv x *.txt": (LINES, []),
    "iconv -t utf-8 *.txt >x; printf '\\r\\n\\n' >>x; mv x *.txt": (LINES, []),
    f"{HUGGING_FACE} rm ../*.txt": (LINES, []),
    f"{HUGGING_FACE} mv *1_n* {V[1]}; mv *4_n* {V[4]}": (LINES, []),
    f"{INTO_FOLDERS} rm ../*.txt": (LINES, []),
    INTO_FOLDERS: (LINES, []),
    f"{HUGGING_FACE} sort -r ../*.txt >x; mv x ../*.txt": (
        LINES,
        [
            differ(
                "name", "line", 4, 1, f"validation/{VAL}00000001_{A}.JPEG", f"{A} {D}"
            )
            + "The name decides."
        ],
    ),
    f"{INTO_FOLDERS} cd ..; {EVERY.format(' ', '')}; sed -i s/{B}/{A}/ *.txt": (
        [A, A, C, D],
        [
            differ("row", "directory", 1, 2, f"validation/{B}/{V[2]}", f"{A} {B}")
            + "The row decides.",
            only(f"{B} (training, label 2)"),
        ],
    ),
    f"{HUGGING_FACE} mkdir cat dog; mv *[13]_n* cat; mv *.JPEG dog; rm ../*.txt; "
    "cd ../train; for s in *; do mkdir -p cat dog; mv $s/*[13].JPEG cat; "
    "mv $s/*2.JPEG dog; rmdir $s; done": (
        ["cat", "dog", "cat", "dog"],
        [
            differ(
                "directory",
                "name",
                4,
                1,
                f"validation/cat/{VAL}00000001_{A}.JPEG",
                f"cat {A}",
            )
            + "The directory decides.",
            misnamed("12 of 12", f"{A}_1.JPEG", "cat"),
        ],
    ),
    f"mv train/{B}/{B}_1.JPEG train/{A}": (
        LINES,
        [misnamed("1 of 12", f"{B}_1.JPEG")],
    ),
    f"cd train/{A}; mv {A}_1.JPEG {A}_1_{B}.JPEG": (
        LINES,
        [misnamed("1 of 12", f"{A}_1_{B}.JPEG")],
    ),
    "mkdir train/odd; echo >train/odd/1.JPEG; sed -i 4s/.*/odd/ *.txt": (
        [A, B, C, "odd"],
        [
            "Classes that are named unlike most are used, too: odd.",
            only(f"{D} (training, label 4)"),
        ],
    ),
    f"{TEN} {RENAME.format('val_$((i+=4)).JPEG')}; cd ..; "
    "mkdir -p train/a; echo >train/a/1.JPEG; printf 'a\\na\\na\\na\\n' >*.txt": (
        ["a"] * 4,
        [BY_ORDER],
    ),
    f"{TEN} rm *; touch a{{1,2,10}}.JPEG b1.JPEG; cd ..; "
    "mkdir -p train/a; echo >train/a/1.JPEG; printf 'a\\na\\na\\na\\n' >*.txt": (
        ["a"] * 4,
        [EMPTY, BY_ORDER],
    ),
    f"{TEN} rm *; mkdir -p ../train/{{dog,dog\\ sled,@Recycled_paper,web.jpg}}; "
    'for d in ../train/*; do echo >"$d/1.JPEG"; done; echo >1.JPEG; echo >2.JPEG; '
    "printf '1.JPEG,dog sled\\n2.JPEG,@Recycled_paper\\n' >../*.txt": (
        ["dog sled", "@Recycled_paper"],
        [],
    ),
    f"{TEN} {RENAME.format('$((i+=7))-x.JPEG')}; cd ..; "
    "mkdir -p train/a; echo >train/a/1.JPEG; printf 'a\\na\\na\\na\\n' >*.txt": (
        ["a"] * 4,
        [BY_ORDER],
    ),
    f"{TEN} {RENAME.format('val_$((++i == 3 ? 5 : i)).JPEG')}; cd ..; "
    "mkdir -p train/a; echo >train/a/1.JPEG; printf 'a\\na\\na\\na\\n' >*.txt": (
        ["a"] * 4,
        [BY_ORDER],
    ),
    f"{TEN} rm *; mkdir {{0..10}} ../train; for d in *; do echo >$d/1.JPEG; done; "
    "cp -r * ../train": (
        [str(i) for i in sorted(map(str, range(11)))],
        [RANK.format("9", 11)],
    ),
    f"{TEN} rm *; mkdir 00{{0..9}} ../train; for d in *; do echo >$d/1.JPEG; done; "
    "cp -r * ../train": (
        [f"00{i}" for i in range(10)],
        [RANK.format("009", 10)],
    ),
    f"{TEN} rm *; mkdir 1 2 4 x ../train; for d in *; do echo >$d/1.JPEG; done; "
    "cp -r * ../train": (
        ["1", "2", "4", "x"],
        [RANK.format("4", 3)],
    ),
    # A class may be called nearly like a synset.
    "mv train/n01440875 train/n01440875_x; cd validation; "
    "for i in 1 2 3 4; do f=$(echo *0$i.JPEG); echo $f,n01440875_x; done >../*.txt; rm *[234].JPEG": (
        [f"{D}_x"],
        [
            misnamed("3 of 12", f"{D}_1.JPEG", f"{D}_x"),
            f"Classes that are named unlike most are used, too: {D}_x.",
        ],
    ),
    f"{TEN} rm *; mkdir cat dog ../train; for d in *; do echo >$d/0001.JPEG; done; "
    "cp -r * ../train": (["cat", "dog"], []),
    f"{TEN} rm *; mkdir class_{{1..10}} ../train; for d in *; do echo >$d/1.JPEG; done; "
    "cp -r * ../train": (
        ["class_1", "class_10", *(f"class_{i}" for i in range(2, 10))],
        [],
    ),
    'cd validation; for i in 1 2 3 4; do mv *0$i.JPEG "my $i.JPEG"; done; '
    f"printf 'my 1.JPEG\\t{D}\\nmy 2\\t{C} x\\nmy 3.JPEG,{B}\\n\"my 4\" , {A},1\\n' "
    ">../*.txt": ([D, C, B, A], []),
    # Folders and names that say all need no label file, whatever their numbers.
    f"{INTO_FOLDERS} for f in */*; do mv $f ${{f/_0000000/_1000000}}; done": (
        LINES,
        [],
    ),
    f"{INTO_FOLDERS} cd {D}; mv * {VAL}10.JPEG; mv ../{C}/* ../{C}/{VAL}9.JPEG; "
    f"cd ../..; printf '{A}\\n{B}\\n{D}\\n{C}\\n' >*.txt": ([A, B, D, C], []),
    # Validation images of few classes: a trial.
    "cd validation; rm *[34].JPEG; sed -i 3,4d ../*.txt": ([A, B], []),
    "cd validation; rm *4.JPEG; sed -i 4d ../*.txt": (
        [A, B, C],
        [only(f"{D} (training, label 4)")],
    ),
    "touch {.,train,validation}/.DS_Store validation/Thumbs.db": (LINES, []),
}


@pytest.mark.parametrize("commands", ACCEPTED)
def test_what_is_meant_is_accepted(raw: Path, commands: str) -> None:
    dataset = read(raw, commands)
    synsets, warnings = ACCEPTED[commands]
    assert [image.synset for image in dataset.validation] == synsets
    found = [w.replace(str(raw), "RAW") for w in script.warnings_about(dataset)]
    assert found == warnings


def test_folders_in_a_tar_decide_as_they_do_extracted(
    raw: Path, tmp_path: Path
) -> None:
    packed = tars.lay_out(raw, tmp_path / "packed", "directories", "tar_of_folders")
    (packed / "synset_labels.txt").write_text(f"{D}\n{C}\n{B}\n{A}")
    found = script.read_dataset(str(packed))
    assert [image.synset for image in found.validation] == LINES
    (warning,) = found.warnings
    assert warning.endswith(f"is {A} by directory, {D} by line. The directory decides.")
    (packed / "synset_labels.txt").write_text(f"{A}\n{C}\n{C}\n{D}")
    with pytest.raises(script.InvalidInputError, match="n01440801 by directory"):
        script.read_dataset(str(packed))


def test_images_of_the_test_set_in_a_tar_are_refused(raw: Path, tmp_path: Path) -> None:
    (raw / "validation" / V[1]).rename(raw / "validation" / T1)
    for layout in "tar", "tar_of_folders":
        packed = tars.lay_out(raw, tmp_path / layout, "directories", layout)
        with pytest.raises(
            script.InvalidInputError, match=f"test set away: .*tar/.*{T1}"
        ):
            script.read_dataset(str(packed))


# ------------------------------------------------------------- ImageNet's own list


SYNSETS = sorted(set(LABELS.split()))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training image of each of ImageNet's classes, and 50,000 validation images."""
    raw = tmp_path_factory.mktemp("imagenet") / "raw"
    (raw / "validation").mkdir(parents=True)
    image = raw / "validation" / V[1]
    image.write_bytes(b"x")
    for i in range(2, 50_001):
        os.link(image, raw / f"validation/{VAL}{i:08d}.JPEG")
    for synset in SYNSETS:
        (raw / "train" / synset).mkdir(parents=True)
        os.link(image, raw / f"train/{synset}/{synset}_1.JPEG")
    return raw


NOT_ITS_LABELS = "Labels of validation images, in order of names, are not ImageNet's."
SWAPPED = [*LABELS.split()]
SWAPPED[7], SWAPPED[8] = SWAPPED[8], SWAPPED[7]
BOTH_COLUMNS = [f"{VAL}{i:08d} {synset}" for i, synset in enumerate(SWAPPED, 1)]


@pytest.mark.parametrize(
    ("lines", "status", "says"),
    [
        (LABELS.split(), 0, None),
        (SWAPPED, 1, f"ERROR: {NOT_ITS_LABELS} {TO_DECIDE}"),
        (BOTH_COLUMNS, 0, f"WARNING: {NOT_ITS_LABELS}"),
    ],
    ids=["true", "two swapped", "two swapped, by name"],
)
def test_labels_of_all_validation_images_must_be_imagenets(
    imagenet: Path, lines: list[str], status: int, says: str | None
) -> None:
    (imagenet / "synset_labels.txt").write_text("\n".join(lines) + "\n")
    done = run_command(f"--raw_data_dir={imagenet}", "--nogcs_upload", "--dry_run")
    assert done.status == status
    found = [line for line in done.lines if "abels" in line]
    assert found == ([says] if says else [])


@pytest.mark.parametrize("prefix", [VAL, ""])
@pytest.mark.parametrize("by", ["directory", "name", "line"])
@pytest.mark.parametrize(
    ("synsets", "says"), [(LABELS.split(), []), (SWAPPED, [NOT_ITS_LABELS])]
)
def test_labels_in_the_order_of_names_are_compared(
    tmp_path: Path, by: str, prefix: str, synsets: list[str], says: list[str]
) -> None:
    images = []
    for i, synset in enumerate(synsets, start=1):
        name = (
            f"{prefix}{i:08d}_{synset}.JPEG"
            if by == "name"
            else f"{prefix}{i:08d}.JPEG"
        )
        folder = synset if by == "directory" else ""
        images.append(script.RawImage("/", name, folder, 9, 9))
    if by == "line":
        lines = [f"{i.name} {synset}\n" for i, synset in zip(images, synsets)]
        (tmp_path / "labels").write_text("".join(lines))
    images.sort(key=lambda image: image.name)
    found = script.assign_synsets(images, str(tmp_path / "labels"), [])
    assert found[1] == says
    assert sorted(i.synset for i in found[0]) == sorted(synsets)


@pytest.mark.parametrize(
    ("synsets", "warning"),
    [
        (SYNSETS, None),
        (SYNSETS[:899], None),
        ([*SYNSETS, "n00005787"], "The 1,001 classes are"),
        ([*SYNSETS[1:], "n00005787"], "The 1,000 classes are"),
        (SYNSETS[:-1], "The 999 classes are"),
        ([*SYNSETS[:600], *map(str, range(300))], "The 900 classes are"),
    ],
    ids=["ImageNet-1k", "subset", "one more", "another", "one less", "mixed"],
)
def test_classes_that_are_not_imagenets_are_said(
    synsets: list[str], warning: str | None
) -> None:
    images = [script.RawImage("/", f"{s}_1.JPEG", s, 9, 9) for s in synsets]
    dataset = script.Dataset(tuple(sorted(synsets)), images, images)
    found = [w for w in script.warnings_about(dataset) if "labels differ" in w]
    rule = "not ImageNet-1k's: labels differ from those of models trained on it."
    assert found == ([f"{warning} {rule}"] if warning else [])


def test_manifest_of_version_2_is_kept(
    raw: Path, tmp_path: Path, emulator: Emulator
) -> None:
    """It lacks what the manifest says of ImageNet-1k, and nothing else."""
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}/scratch"]
    flags += [*UPLOAD, "--training_shards=2", "--validation_shards=1"]
    env = emulator.environment
    assert run_command(*flags, env=env).status == 0
    path = tmp_path / "scratch/manifest.json"
    facts = json.loads(path.read_text())
    assert facts.pop("imagenet_1k") == {"classes": False, "validation_labels": False}
    old = script.json_text(facts)
    path.write_text(old)
    emulator.put("imagenet/manifest.json", old.encode())
    for remove in (False, True):
        if remove:
            path.unlink()
        before = len(emulator.requests)
        assert run_command(*flags, env=env).status == 0
        sent = [
            r for r in emulator.requests[before:] if r.kind in ("session", "delete")
        ]
        assert not [r for r in sent if "manifest" in r.name]
        assert emulator.objects()["imagenet/manifest.json"] == old.encode()
