"""Tars are listed by their headers: all that is in them, or an error that says why."""

import gzip
import io
import itertools
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tars import BLOCK, END, FORMATS, MTIME, member, tar_bytes, with_field, write_tar

from imagenet_to_gcs import (
    TRAINING_TAR,
    InvalidInputError,
    RawImage,
    Tar,
    list_split,
    list_tar,
)

DOWNLOAD = "Download it again; compare its checksum."
FILES = {f"n01440764_{i}.JPEG": bytes([i]) * (700 * i) for i in range(4)}

needs_tar = pytest.mark.skipif(not shutil.which("tar"), reason="needs the command tar")
in_all_formats = pytest.mark.parametrize("tar_format", FORMATS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.tar"


def contents(path: Path, start: int = 0, end: int | None = None) -> dict[str, bytes]:
    """Reads the files of a tar where `list_tar` says they are."""
    data = path.read_bytes()
    _, members = list_tar(Tar(str(path), start=start, end=end))
    return {
        name: data[offset : offset + size] for name, (offset, size) in members.items()
    }


def problem(source: Tar) -> str:
    """Returns the error of a tar whose images cannot be listed."""
    with pytest.raises(InvalidInputError) as caught:
        source.list_images([])
    return str(caught.value).removeprefix(f"Cannot list the tar {source.place}: ")


def link(name: str, target: str) -> bytes:
    return member(name, kind=tarfile.SYMTYPE, target=target)


def pax_member(**headers: str) -> bytes:
    info = tarfile.TarInfo("a.JPEG")
    info.pax_headers = headers
    return info.tobuf(tarfile.PAX_FORMAT)


def global_header(**headers: str) -> bytes:
    return tarfile.TarInfo.create_pax_global_header(headers)


# ---------------------------------------------------------------- what is listed


def long_name(length: int) -> str:
    return f"{'d' * (length - 9 - 6)}/{'n' * 9}.JPEG"


NOT_TEXT = os.fsdecode(b"caf\xe9 \xff.JPEG")
NOT_FILES = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
NOT_FILES += [tarfile.DIRTYPE, tarfile.FIFOTYPE]
B = member("b.JPEG", b"b")
SIZE = 124  # where this field of a header begins
NUMBERS = {"mode": 100, "owner": 108, "group": 116, "time": 136, "device": 337}

LISTED: dict[str, tuple[bytes, dict[str, bytes]]] = {
    **{kind: (tar_bytes(FILES, kind), FILES) for kind in FORMATS},
    **{
        f"{kind} name of {length}": (
            tar_bytes({long_name(length): b"1", "b.JPEG": b"b"}, kind),
            {long_name(length): b"1", "b.JPEG": b"b"},
        )
        for kind in ("gnu", "ustar", "pax")
        for length in (99, 100, 101, 155, 160)
    },
    "nothing": (tar_bytes({}), {}),
    "names that are not text": (
        tar_bytes({NOT_TEXT: b"1", "caf\u00e9.JPEG": b"2"}),
        {NOT_TEXT: b"1", "caf\u00e9.JPEG": b"2"},
    ),
    **{
        f"odd name {name}": (member(name, b"1") + END, {plain: b"1"})
        for name, plain in {
            "a..b.JPEG": "a..b.JPEG",
            "..a.JPEG": "..a.JPEG",
            "./a.JPEG": "a.JPEG",
            "/a.JPEG": "a.JPEG",
            "x/../a.JPEG": "a.JPEG",
            "../a.JPEG": "a.JPEG",
        }.items()
    },
    **{
        f"size {size} in base 256": (
            with_field(
                member("a", bytes(size)), SIZE, b"\x80" + size.to_bytes(11, "big")
            )
            + B
            + END,
            {"a": bytes(size), "b.JPEG": b"b"},
        )
        for size in (0, 1, 512, 700)
    },
    **{
        # "a" has a sum of five digits at most, so that a space can stand before it.
        f"checksum {checksum!r}": (
            with_field(member("a", b"1"), 0, b"a", checksum) + END,
            {"a": b"1"},
        )
        for checksum in ("{:06o} \0", "{:06o}  ", "{:07o}\0", "{:6o}\0 ", "{:7o}\0")
    },
    "no size and no time": (
        with_field(member("a"), SIZE, bytes(24)) + B + END,
        {"a": b"", "b.JPEG": b"b"},
    ),
    **{
        f"metadata of {length} bytes": (
            pax_member(comment="x" * length) + B + END,
            {"a.JPEG": b"", "b.JPEG": b"b"},
        )
        for length in (10, 400, 490, 600, 1_500, 40_000, 900_000)
    },
    **{
        f"size in a hidden member of type {kind!r}": (
            with_field(member("._x", kind=kind, target="b.JPEG"), SIZE, b"00000001000")
            + B
            + END,
            {"b.JPEG": b"b"},
        )
        for kind in NOT_FILES
    },
    "hard link to itself, as to a file that was packed twice": (
        B + member("./b.JPEG", kind=tarfile.LNKTYPE, target="b.JPEG") + END,
        {"b.JPEG": b"b"},
    ),
    "hard link, the first in a directory": (
        B + member("a/c.JPEG", kind=tarfile.LNKTYPE, target="b.JPEG") + END,
        {"b.JPEG": b"b", "a/c.JPEG": b"b"},
    ),
    "infinite time": (pax_member(mtime="inf") + END, {"a.JPEG": b""}),
    **{
        f"{number} empty blocks": (B + bytes(number * BLOCK), {"b.JPEG": b"b"})
        for number in (1, 20)
    },
    "links and directories of a system": (
        link(".git/x", "y")
        + link("a/@eaDir/n1", "y")
        + member("x.JPEG", kind=tarfile.DIRTYPE)
        + B
        + END,
        {"b.JPEG": b"b"},
    ),
    "directory of v7": (
        member("sub/", kind=tarfile.AREGTYPE) + member("sub/b.JPEG", b"b") + END,
        {"sub/b.JPEG": b"b"},
    ),
}


@pytest.mark.parametrize(("tar", "files"), LISTED.values(), ids=LISTED)
def test_all_files_are_listed(path: Path, tar: bytes, files: dict[str, bytes]) -> None:
    path.write_bytes(tar)
    assert contents(path) == files


def test_offsets_are_right_when_a_member_is_of_9_gib(path: Path) -> None:
    size = 9 * 2**30
    header = tarfile.TarInfo("large")
    header.size = size
    with open(path, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.seek(size, os.SEEK_CUR)  # a hole: no disk is used
        file.write(B + END)
    _, members = list_tar(Tar(str(path)))
    assert members == {"large": (BLOCK, size), "b.JPEG": (size + 2 * BLOCK, 1)}


@pytest.mark.parametrize("kind", ["gnu", "oldgnu", "pax", "ustar", "v7"])
@needs_tar
def test_all_files_are_found_when_the_command_tar_packed_them(
    path: Path, kind: str
) -> None:
    directory = path.parent / "files"
    (directory / "sub").mkdir(parents=True)
    for name, data in FILES.items():
        (directory / name).write_bytes(data)
        (directory / "sub" / name).write_bytes(data[::-1])
    command = ["tar", f"--format={kind}", f"-cf{path}", f"-C{directory}", "."]
    subprocess.run(command, check=True)
    expected = {f"sub/{name}": data[::-1] for name, data in FILES.items()}
    assert contents(path) == {**FILES, **expected}


def random_members(seed: int) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Makes up a tree: files, links, directories; long, strange and equal names."""
    rng = random.Random(seed)
    kinds = [tarfile.REGTYPE] * 6 + [tarfile.AREGTYPE, tarfile.CONTTYPE]
    kinds += [tarfile.LNKTYPE, tarfile.DIRTYPE]
    names: list[str] = []
    for i in range(rng.randint(0, 12)):
        parts = ["n" * rng.choice((1, 9, 9, 60)) for _ in range(rng.choice((1, 2)))]
        if rng.random() < 0.1:
            parts += ["\u00e9" * rng.randint(1, 20)]
        info = tarfile.TarInfo(rng.choice(("", "./", "/")) + "/".join(parts) + f"_{i}")
        info.type = rng.choice(kinds) if names else tarfile.REGTYPE
        info.mtime = rng.choice((0, MTIME, 2**33 - 1))
        data = rng.randbytes(rng.choice((0, 1, 511, 512, 513, 2000)))
        if info.islnk():
            info.linkname = min(names, key=len)
        elif info.isreg():
            if names and rng.random() < 0.1:
                info.name = rng.choice(names)
            info.size = len(data)
            names.append(info.name)
        yield info, data[: info.size]


@pytest.mark.parametrize("tar_format", ["gnu", "ustar", "pax"])
@needs_tar
def test_files_are_those_that_are_extracted_when_a_tree_is_random(
    path: Path, tar_format: str
) -> None:
    for seed in range(60):
        with tarfile.open(path, "w", format=FORMATS[tar_format]) as tar:
            for info, data in random_members(seed):
                tar.addfile(info, io.BytesIO(data))
        out = path.parent / str(seed)
        out.mkdir()
        command = ["tar", f"-xf{path}", f"-C{out}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        files = [file for file in out.rglob("*") if file.is_file()]
        expected = {str(file.relative_to(out)): file.read_bytes() for file in files}
        assert contents(path) == expected, f"seed {seed}"


def test_images_are_listed_by_name_the_last_of_each(path: Path) -> None:
    names = ("n1_2.JPEG", "._n1_2.JPEG", ".JPEG", "n1_1.JPEG", "n1_1.jpg", "x.JPEG.txt")
    members = [*((name, b"old") for name in names), ("./n1_1.JPEG", b"newest")]
    path.write_bytes(b"".join(itertools.starmap(member, members)) + END)
    images = Tar(str(path), "n1").list_images([])
    assert [(i.filename, i.num_bytes, i.offset) for i in images] == [
        ("n1_1.JPEG", 6, 13 * BLOCK),
        ("n1_2.JPEG", 3, BLOCK),
    ]
    status = path.stat()
    fingerprint = (status.st_ino, status.st_size, status.st_mtime_ns)
    assert {(i.synset, i.fingerprint) for i in images} == {("n1", fingerprint)}


# ---------------------------------------------------------------- what is refused

CUT_SHORT = f"it is cut short. {DOWNLOAD}"
NO_TAR = "it is damaged, compressed, or not one tar, at byte"
DAMAGED = f"{NO_TAR} 0. {DOWNLOAD}"
WEB_PAGE = f"it is not a tar but a web page; log in first. {DOWNLOAD}"
NO_FILE = "in it is no plain file; extract the tar instead."
UNUSUAL = "in it is sparse, or follows a global header; extract the tar instead."

UNUSUAL_A = f"a.JPEG {UNUSUAL}"
SPARSE = pax_member(**{"GNU.sparse.realsize": "512"})
LONG_NAME = member("x", b"a.JPEG", kind=tarfile.GNUTYPE_LONGNAME)

REFUSED = {
    "empty": (b"", CUT_SHORT),
    "web page": (b"<!DOCTYPE html>" * 100, WEB_PAGE),
    "small web page": (b"\n <html>", WEB_PAGE),
    "JSON": (b'{"error": 404}', CUT_SHORT),
    "zip": (b"PK\3\4" * 500, DAMAGED),
    "joined by cat": (tar_bytes(FILES) * 2, f"{NO_TAR} 7,168. {DOWNLOAD}"),
    "random": (random.Random(0).randbytes(5000), DAMAGED),
    "gzip": (gzip.compress(random.Random(0).randbytes(5000)), DAMAGED),
    **{
        f"{name} of type {kind!r}": (
            B + member(name, kind=kind, target="not there") + END,
            f"{name} {NO_FILE}",
        )
        for kind in NOT_FILES
        if kind != tarfile.DIRTYPE
        for name in ("a.JPEG", "n1", "a.txt")
    },
    **{
        f"size {value!r}": (with_field(member("a"), SIZE, value) + B + END, DAMAGED)
        for value in (
            b"-0000001000\0",
            b"abc\0\0\0\0\0\0\0\0\0",
            b"00000000008\0",
            b"\xff" * 10 + b"\xfe\0",  # negative, in base 256
        )
    },
    **{
        f"{what} that is none": (
            with_field(member("a"), start, b"zz" + bytes(6)) + B + END,
            DAMAGED,
        )
        for what, start in NUMBERS.items()
    },
    **{
        f"pax size of {size}": (pax_member(size=size) + B + END, DAMAGED)
        for size in ("-1024", "-1")
    },
    "endless pax size": (pax_member(size=f"{10**30}"), CUT_SHORT),
    "sparse in name only": (SPARSE, UNUSUAL_A),
    "sparse behind another header": (
        pax_member(comment="c")[: 2 * BLOCK] + SPARSE,
        UNUSUAL_A,
    ),
    **{
        f"global {key}": (
            global_header(**{key: "a.JPEG"}) + member("a.JPEG"),
            UNUSUAL_A,
        )
        for key in ("path", "linkpath", "size", "hdrcharset", "comment")
    },
    "long name of 2 to the 80th bytes": (
        with_field(LONG_NAME, SIZE, b"\x80" + (2**80).to_bytes(11, "big")),
        DAMAGED,
    ),
    "endless chain": (LONG_NAME * 2_000 + B, DAMAGED),
    "long name": (
        member("x", bytes(2**20), kind=tarfile.GNUTYPE_LONGNAME) + B,
        DAMAGED,
    ),
    "long pax header": (pax_member(comment="x" * 2**20), DAMAGED),
}


@pytest.mark.parametrize(("tar", "reason"), REFUSED.values(), ids=REFUSED)
def test_error_says_what_is_wrong(path: Path, tar: bytes, reason: str) -> None:
    path.write_bytes(tar)
    assert problem(Tar(str(path))).replace(str(path), "PATH") == reason


@needs_tar
@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_image_is_refused_when_it_is_sparse(path: Path, kind: str) -> None:
    sparse = path.parent / "a.JPEG"
    with open(sparse, "wb") as file:
        file.seek(2**20)
        file.write(b"x")
    command = ["tar", "-S", f"--format={kind}", f"-cf{path}", f"-C{path.parent}"]
    subprocess.run([*command, sparse.name], check=True)
    assert problem(Tar(str(path))) == f"a.JPEG {UNUSUAL}"


CUT = {
    **{kind: tar_bytes(FILES, kind) for kind in FORMATS},
    "long_names": tar_bytes({f"{'d' * 120}/{n}": data for n, data in FILES.items()}),
    "directories": member("d", kind=tarfile.DIRTYPE) + tar_bytes(FILES),
}


@pytest.mark.parametrize("kind", CUT)
def test_error_is_raised_wherever_a_tar_is_cut_short(path: Path, kind: str) -> None:
    whole = CUT[kind]
    length = len(whole.rstrip(b"\0"))
    length += -length % BLOCK
    for cut in range(0, length + BLOCK, 128):
        path.write_bytes(whole[:cut])
        reason = problem(Tar(str(path)))
        assert reason.endswith(DOWNLOAD), cut
        if kind not in ("pax", "long_names"):  # whose headers are several
            assert reason == CUT_SHORT, cut
    path.write_bytes(whole[: length + BLOCK])
    assert [*contents(path).values()] == [*FILES.values()]


@in_all_formats
def test_error_is_raised_whichever_header_is_damaged(
    path: Path, tar_format: str
) -> None:
    """Also where a hole hides the rest, as where a piece of a download is missing."""
    whole = write_tar(path, FILES, tar_format).read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    starts = {start for m in members for start in (m.offset, m.offset_data - BLOCK)}
    for start in sorted(starts):
        damaged = bytearray(whole)
        damaged[start + 3] ^= 0x40
        path.write_bytes(damaged)
        assert problem(Tar(str(path))), start
    hole = slice(members[2].offset, members[2].offset_data)
    with_hole = bytearray(whole)
    with_hole[hole] = bytes(hole.stop - hole.start)
    path.write_bytes(with_hole)
    assert problem(Tar(str(path)))


# ---------------------------------------------------------------- tars in a tar


@in_all_formats
def test_tar_in_a_tar_is_listed_if_it_has_its_end(path: Path, tar_format: str) -> None:
    """What follows one without belongs to the other tar: a header, or its end."""
    whole = tar_bytes(FILES, tar_format)
    length = len(whole.rstrip(b"\0"))
    endless = whole[: length + -length % BLOCK]
    write_tar(path, dict.fromkeys("abcd", whole) | dict.fromkeys("bd", endless))
    _, members = list_tar(Tar(str(path)))
    for name, (start, size) in members.items():
        end = start + size
        if name in "bd":
            assert problem(Tar(str(path), name, start, end))
        else:
            assert contents(path, start, end) == FILES


def whole_tar(raw: Path, classes: list[tuple[str, bytes]]) -> list[RawImage]:
    """Lists the tar of a training split, in which names may come twice."""
    tar = b"".join(itertools.starmap(member, classes)) + END
    (raw / TRAINING_TAR).write_bytes(tar)
    return list_split(str(raw), "train", [])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda tar: tar[:1000], "it is cut short"),
        (lambda tar: b"x" + tar[1:], f"{NO_TAR} 2,560"),
    ],
    ids=["cut_short", "damaged"],
)
def test_error_names_the_class_when_its_tar_in_a_tar_is_bad(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    good = B + END  # 2,048 bytes
    classes = [("n1.tar", good[:-BLOCK]), ("n2.tar", damage(good))]
    with pytest.raises(InvalidInputError) as caught:
        whole_tar(tmp_path, classes)
    place = f"{tmp_path}/{TRAINING_TAR}/n2.tar"
    assert str(caught.value) == f"Cannot list the tar {place}: {reason}. {DOWNLOAD}"


# ---------------------------------------------------------------- folders in a tar

IN_FOLDERS: dict[str, dict[str, str]] = {
    "classes": {"a/1.JPEG": "a", "b/1.JPEG": "b"},
    "one class": {"a/1.JPEG": "a", "a/2.JPEG": "a"},
    "in a folder": {"./train/a/1.JPEG": "a", "train/b/1.JPEG": "b"},
    "deep": {"x/train/val/1.JPEG": "", "./x/train/val/2.JPEG": ""},
    "deep classes": {"x/y/val/a/1.JPEG": "a", "./x/y/val/b/1.JPEG": "b"},
    "class like a split, in one": {"val/train/a/1.JPEG": "a"},
    "no folder": {"./1.JPEG": "", "2.JPEG": ""},
    **{
        f"folder {name}": {f"{name}/1.JPEG": ""}
        for name in ("val", "validation", "train", "ILSVRC2012_img_val")
    },
    "other folders": {"a/1.JPEG": "a", "@eaDir/x/1.JPEG": "-", "__MACOSX/1.JPEG": "-"},
    "other files": {"a/1.JPEG": "a", "a/more/1.jpg": "-", "readme.txt": "-"},
    "no image in a folder": {"a/1.JPEG": "a", "b/1.jpg": "-"},
}


@pytest.mark.parametrize("synsets", IN_FOLDERS.values(), ids=IN_FOLDERS)
def test_class_is_the_folder_of_an_image_in_a_tar(
    path: Path, synsets: dict[str, str]
) -> None:
    """Unless it is named like the split. `-` is no image, such as what a NAS left."""
    write_tar(path, dict.fromkeys(synsets, b"1"))
    found = Tar(str(path)).list_images([])
    assert {(image.path, image.filename, image.synset) for image in found} == {
        (os.path.normpath(path / name), os.path.basename(name), synset)
        for name, synset in synsets.items()
        if synset != "-"
    }


def test_class_is_that_of_its_tar_whatever_the_folder(path: Path) -> None:
    write_tar(path, {"images/1.JPEG": b"1", "images/2.JPEG": b"1"})
    found = Tar(str(path), "n1").list_images([])
    assert [image.synset for image in found] == ["n1"] * 2


@pytest.mark.parametrize(
    ("synset", "names", "patterns"),
    [
        ("", ["1.JPEG", "a/1.JPEG"], "/*.JPEG, /*/*.JPEG"),
        ("", ["val/1.JPEG", "val/a/1.JPEG"], "val/*.JPEG, val/*/*.JPEG"),
        ("", ["2.JPEG", "val/1.JPEG"], "/*.JPEG, val/*.JPEG"),
        ("", ["a/1.JPEG", "a/more/1.JPEG"], "/*/*.JPEG, a/*/*.JPEG"),
        ("", ["train/a/1.JPEG", "val/a/2.JPEG"], "train/*/*.JPEG, val/*/*.JPEG"),
        ("", ["train/n1.tar", "train/n1/1.JPEG"], "train/*.tar, train/*/*.JPEG"),
        ("", ["x/n1.tar", "y/n1.tar"], "x/*.tar, y/*.tar"),
        ("n1", ["1.JPEG", "a/2.JPEG"], "/*.JPEG, a/*.JPEG"),
        ("n1", ["n1/1.JPEG", "n2/2.JPEG"], "n1/*.JPEG, n2/*.JPEG"),
    ],
)
def test_tar_is_refused_when_its_directories_do_not_lie_side_by_side(
    path: Path, synset: str, names: list[str], patterns: str
) -> None:
    write_tar(path, dict.fromkeys(names, CLASS))
    with pytest.raises(InvalidInputError) as caught:
        Tar(str(path), synset).list_images([])
    assert str(caught.value) == (
        f"A tar must hold images in one layout; {path} holds {patterns}. Extract it."
    )


CLASS = tar_bytes({"n1_1.JPEG": b"1"})


def test_class_is_the_last_of_its_name_when_it_comes_twice(tmp_path: Path) -> None:
    """And not the hidden double that a Mac left."""
    classes = [("._n1.tar", b"Mac"), ("n1.tar", CLASS), ("n2.tar", CLASS)]
    classes += [("n1.tar", tar_bytes({"n1_2.JPEG": b"2"}))]
    found = whole_tar(tmp_path, classes)
    listed = [("n1", "n1_2.JPEG"), ("n2", "n1_1.JPEG")]
    assert [(image.synset, image.filename) for image in found] == listed
