"""Tars are listed by their headers: all that is in them, or an error that says why."""

import bz2
import gzip
import io
import itertools
import lzma
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tars

import imagenet_to_gcs
from imagenet_to_gcs import ImageSource, InvalidInputError, list_tar

BLOCK = tars.BLOCK
END = bytes(2 * BLOCK)
DOWNLOAD = "Download it again, and compare its checksum."
FORMATS = ("gnu", "ustar", "v7", "pax")
FILES = {f"n01440764_{i}.JPEG": bytes([i]) * (700 * i) for i in range(4)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.tar"


def contents(path: Path, start: int = 0, end: int | None = None) -> dict[str, bytes]:
    """Reads the files of a tar where `list_tar` says they are."""
    data = path.read_bytes()
    _, members = list_tar(ImageSource(str(path), start=start, end=end))
    return {
        name: data[file.offset_data : file.offset_data + file.size]
        for name, file in members.items()
    }


def problem(path: Path, start: int = 0, end: int | None = None) -> str:
    """Returns the error of a tar that cannot be listed."""
    with pytest.raises(InvalidInputError) as caught:
        list_tar(ImageSource(str(path), start=start, end=end))
    return str(caught.value).removeprefix(f"Cannot list the tar {path}: ")


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.mtime = size, kind, tars.MTIME
    return member.tobuf(tarfile.GNU_FORMAT)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


# ---------------------------------------------------------------- what is listed


@pytest.mark.parametrize("files", [FILES, {}], ids=["files", "none"])
@pytest.mark.parametrize("tar_format", FORMATS)
def test_all_files_are_found_when_a_tar_is_plain(
    path: Path, tar_format: str, files: dict[str, bytes]
) -> None:
    tars.write_tar(path, files, tar_format)
    assert contents(path) == files


@pytest.mark.parametrize("tar_format", ["gnu", "ustar", "pax"])
def test_names_are_whole_when_they_are_long(path: Path, tar_format: str) -> None:
    files = {
        f"{'d' * (length - 9 - 6)}/{'n' * 9}.JPEG": bytes([length % 256]) * length
        for length in (99, 100, 101, 155, 160)
    }
    tars.write_tar(path, files, tar_format)
    assert contents(path) == files


def test_names_are_whole_when_they_are_not_text(path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.JPEG")
    tars.write_tar(path, {name: b"1", "caf\u00e9.JPEG": b"2"})
    assert contents(path) == {name: b"1", "caf\u00e9.JPEG": b"2"}


@pytest.mark.parametrize("kind", ["gnu", "oldgnu", "pax", "ustar", "v7"])
@pytest.mark.skipif(not shutil.which("tar"), reason="needs the command tar")
def test_all_files_are_found_when_the_command_tar_packed_them(
    path: Path, kind: str
) -> None:
    directory = path.parent / "files"
    (directory / "sub").mkdir(parents=True)
    for name, data in FILES.items():
        (directory / name).write_bytes(data)
        (directory / "sub" / name).write_bytes(data[::-1])
    subprocess.run(
        ["tar", f"--format={kind}", "-cf", path, "-C", directory, "."], check=True
    )
    expected = {f"sub/{name}": data[::-1] for name, data in FILES.items()}
    assert contents(path) == {**FILES, **expected}


def random_members(seed: int) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Makes up a tree: files, links, directories; long, foreign and equal names."""
    rng = random.Random(seed)
    kinds = [tarfile.REGTYPE] * 6 + [tarfile.AREGTYPE, tarfile.CONTTYPE]
    kinds += [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
    names: list[str] = []
    for i in range(rng.randint(0, 12)):
        parts = ["n" * rng.choice((1, 9, 9, 60)) for _ in range(rng.choice((1, 2)))]
        if rng.random() < 0.1:
            parts += ["\u00e9" * rng.randint(1, 20)]
        member = tarfile.TarInfo(
            rng.choice(("", "./", "/")) + "/".join(parts) + f"_{i}"
        )
        member.type = rng.choice(kinds) if names else tarfile.REGTYPE
        member.mtime = rng.choice((0, tars.MTIME, 2**33 - 1))
        data = rng.randbytes(rng.choice((0, 1, 511, 512, 513, 2000)))
        if member.islnk() or member.issym():
            target = min(names, key=len)
            up = "../" * os.path.normpath(member.name).lstrip("/").count("/")
            member.linkname = target if member.islnk() else up + target.lstrip("/")
        elif member.isreg():
            if names and rng.random() < 0.1:
                member.name = rng.choice(names)
            member.size = len(data)
            names.append(member.name)
        yield member, data[: member.size]


@pytest.mark.parametrize("tar_format", ["gnu", "ustar", "pax"])
@pytest.mark.skipif(not shutil.which("tar"), reason="needs the command tar")
def test_files_are_those_that_are_extracted_when_a_tree_is_random(
    path: Path, tar_format: str
) -> None:
    for seed in range(60):
        with tarfile.open(path, "w", format=tars.FORMATS[tar_format]) as tar:
            for member, data in random_members(seed):
                tar.addfile(member, io.BytesIO(data))
        out = path.parent / str(seed)
        out.mkdir()
        command = ["tar", f"-xf{path}", f"-C{out}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        files = [file for file in out.rglob("*") if file.is_file()]
        expected = {str(file.relative_to(out)): file.read_bytes() for file in files}
        assert contents(path) == expected, f"seed {seed}"


def changed(field: slice, value: bytes, size: int = 0) -> bytes:
    """Returns the header of `a.JPEG` with another field, and its checksum."""
    block = bytearray(header("a.JPEG", size))
    block[field] = value
    return tars.with_checksum(bytes(block))


SIZE, TIME = slice(124, 136), slice(136, 148)


@pytest.mark.parametrize("num_bytes", [0, 1, 512, 700], ids=str)
def test_size_is_read_when_it_is_in_base_256(path: Path, num_bytes: int) -> None:
    data = b"x" * num_bytes
    first = changed(SIZE, b"\x80" + num_bytes.to_bytes(11, "big")) + padded(data)
    path.write_bytes(first + header("b.JPEG", 1) + padded(b"b") + END)
    assert contents(path) == {"a.JPEG": data, "b.JPEG": b"b"}


def test_offsets_are_right_when_a_member_is_of_9_gib(path: Path) -> None:
    size = 9 * 2**30
    with open(path, "wb") as file:
        file.write(header("large", size))
        file.seek(size, os.SEEK_CUR)  # a hole: no disk is used
        file.write(header("b.JPEG", 1) + padded(b"b") + END)
    _, members = list_tar(ImageSource(str(path), start=0))
    found = {name: file.offset_data for name, file in members.items()}
    assert found == {"large": BLOCK, "b.JPEG": size + 2 * BLOCK}


@pytest.mark.parametrize(
    "checksum",
    ["{:06o}\0 ", "{:06o} \0", "{:06o}  ", "{:07o}\0", "{:6o}\0 ", "{:7o}\0"],
    ids=["posix", "space_nul", "spaces", "seven_digits", "v7_spaces", "seven_spaces"],
)
def test_checksum_is_accepted_however_it_is_written(path: Path, checksum: str) -> None:
    # "a" has a sum of five digits at most, so that a space can stand before it.
    blank = header("a", 1)
    blank = blank[:148] + b" " * 8 + blank[156:]
    field = checksum.format(sum(blank)).encode()
    path.write_bytes(blank[:148] + field + blank[156:] + padded(b"x") + END)
    assert contents(path) == {"a": b"x"}


def test_fields_are_zero_when_they_are_empty(path: Path) -> None:
    path.write_bytes(changed(slice(124, 148), bytes(24)) + END)
    assert contents(path) == {"a.JPEG": b""}


@pytest.mark.parametrize("num_blocks", [1, 2, 20], ids=str)
def test_tar_is_whole_when_it_ends_with_few_or_many_empty_blocks(
    path: Path, num_blocks: int
) -> None:
    path.write_bytes(header("a", 1) + padded(b"x") + bytes(num_blocks * BLOCK))
    assert contents(path) == {"a": b"x"}


# ------------------------------------------------- what is no file, and odd names


ODD = {
    "hard_link_to_nothing": tarfile.LNKTYPE,
    "link_to_nothing": tarfile.SYMTYPE,
    "character": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "directory": tarfile.DIRTYPE,
    "fifo": tarfile.FIFOTYPE,
}


@pytest.mark.parametrize("kind", ODD.values(), ids=ODD)
def test_member_that_is_no_file_is_refused_when_it_is_an_image(
    path: Path, kind: bytes
) -> None:
    file = header("b.JPEG", 1) + padded(b"b") + END
    path.write_bytes(link("a.JPEG", "c.JPEG", kind) + file)
    assert problem(path) == NO_FILE
    path.write_bytes(link("a.txt", "c.JPEG", kind) + file)
    assert contents(path) == {"b.JPEG": b"b"}


NO_FILE = (
    "a.JPEG in it is neither a plain file nor a link to one in it; extract it instead."
)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_links_are_followed_when_they_lead_to_links(
    path: Path, order: tuple[int, ...]
) -> None:
    members = [
        link("a.JPEG", "sub/b.JPEG"),
        link("sub/b.JPEG", "../c.JPEG"),
        header("c.JPEG", 1) + padded(b"c"),
    ]
    path.write_bytes(b"".join(members[i] for i in order) + END)
    assert contents(path) == dict.fromkeys(("a.JPEG", "sub/b.JPEG", "c.JPEG"), b"c")


def test_links_are_refused_when_they_lead_in_a_circle(path: Path) -> None:
    links = link("a.JPEG", "b.JPEG") + link("b.JPEG", "a.JPEG")
    path.write_bytes(links + END)
    assert problem(path) == NO_FILE


def test_directory_is_left_out_when_its_format_is_v7(path: Path) -> None:
    directory = header("sub/", 0, tarfile.AREGTYPE)
    path.write_bytes(directory + header("sub/b.JPEG", 1) + padded(b"b") + END)
    assert contents(path) == {"sub/b.JPEG": b"b"}


@pytest.mark.skipif(not shutil.which("tar"), reason="needs the command tar")
@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_image_is_refused_when_it_is_sparse(path: Path, kind: str) -> None:
    sparse = path.parent / "a.JPEG"
    with open(sparse, "wb") as file:
        file.seek(2**20)
        file.write(b"x")
    command = ["tar", "-S", f"--format={kind}", f"-cf{path}", f"-C{path.parent}"]
    subprocess.run([*command, sparse.name], check=True)
    assert problem(path) == NO_FILE


@pytest.mark.parametrize(
    "name", ["a..b.JPEG", "..a.JPEG", "./a.JPEG", "/a.JPEG", "x/../a.JPEG"]
)
def test_member_is_listed_when_its_name_is_odd(path: Path, name: str) -> None:
    tars.write_tar(path, {name: b"in"})
    assert contents(path) == {os.path.normpath(name).lstrip("/"): b"in"}


def test_image_is_refused_when_its_name_leads_out(path: Path) -> None:
    tars.write_tar(path, {"../a.JPEG": b"out", "b.JPEG": b"b"})
    assert problem(path) == f"../{NO_FILE}"


def test_class_is_refused_when_two_images_have_one_name(path: Path) -> None:
    tars.write_tar(path, {"x/a.JPEG": b"1", "y/a.JPEG": b"2"})
    with pytest.raises(InvalidInputError, match="must have different names"):
        ImageSource(str(path), "n1", start=0).list_images([])


def test_image_is_the_last_of_its_name_when_a_name_comes_twice(path: Path) -> None:
    twice = [("n1_1.JPEG", b"old"), ("n1_2.JPEG", b"2"), ("./n1_1.JPEG", b"newest")]
    path.write_bytes(b"".join(header(n, len(d)) + padded(d) for n, d in twice) + END)
    images = ImageSource(str(path), "n1", start=0).list_images([], 7)
    assert [(i.filename, i.num_bytes) for i in images] == [
        ("n1_1.JPEG", 6),
        ("n1_2.JPEG", 1),
    ]
    assert images[0].offset == 5 * BLOCK
    status = path.stat()
    version = (status.st_ino, status.st_size, status.st_mtime_ns)
    assert {(i.synset, i.label, i.version) for i in images} == {("n1", 7, version)}


def test_images_are_those_of_a_directory_when_other_files_are_there(path: Path) -> None:
    names = ["b.JPEG", "a.JPEG", "._a.JPEG", ".JPEG", "a.jpg", "a.JPEG.txt", "JPEG"]
    files = {name: name.encode() for name in names}
    tars.write_tar(path, files)
    directory = path.parent / "directory"
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    source = ImageSource(str(path), "n1", start=0)
    packed = [(i.filename, i.num_bytes) for i in source.list_images([])]
    unpacked = ImageSource(str(directory), "n1").list_images([])
    assert packed == [(i.filename, i.num_bytes) for i in unpacked]
    assert [name for name, _ in packed] == ["a.JPEG", "b.JPEG"]


# ---------------------------------------------------------------- what is refused

CUT_SHORT = f"it is cut short. {DOWNLOAD}"
WEB_PAGE = "it is not a tar but a web page; log in, and download it again."
SEVERAL = "it is damaged, or several tars in one: empty at byte 7,168, before its end."
COMPRESSED = "it is compressed; decompress it with"

NOT_TARS = {
    "empty": (b"", CUT_SHORT),
    "web_page": (b"<!DOCTYPE html>" * 100, WEB_PAGE),
    "small_web_page": (b"\n <html>", WEB_PAGE),
    "joined_by_cat": (tars.tar_bytes(FILES) * 2, f"{SEVERAL} {DOWNLOAD}"),
    "random": (
        random.Random(0).randbytes(5000),
        f"it is damaged, or not a tar, at byte 0. {DOWNLOAD}",
    ),
    "gzip": (gzip.compress(tars.tar_bytes(FILES)), f"{COMPRESSED} gzip -d first."),
    "bzip2": (bz2.compress(tars.tar_bytes(FILES)), f"{COMPRESSED} bzip2 -d first."),
    "xz": (lzma.compress(tars.tar_bytes(FILES)), f"{COMPRESSED} xz -d first."),
}


@pytest.mark.parametrize(("data", "reason"), NOT_TARS.values(), ids=NOT_TARS)
def test_error_says_so_when_it_is_not_a_tar(
    path: Path, data: bytes, reason: str
) -> None:
    path.write_bytes(data)
    assert problem(path) == reason


@pytest.mark.parametrize(
    "tar_format", ["gnu", "ustar", "v7", "pax", "long_names", "directories"]
)
def test_error_is_raised_wherever_a_tar_is_cut_short(
    path: Path, tar_format: str
) -> None:
    files = FILES
    if tar_format == "long_names":
        files = {f"{'d' * 120}/{name}": data for name, data in FILES.items()}
    whole = tars.tar_bytes(
        files, tar_format if tar_format in (*tars.FORMATS, "v7") else "gnu"
    )
    if tar_format == "directories":
        whole = header("d", 0, tarfile.DIRTYPE) + whole
    length = len(whole.rstrip(b"\0"))
    length += -length % BLOCK
    for cut in range(0, length + BLOCK, 128):
        path.write_bytes(whole[:cut])
        reason = problem(path)
        assert reason.endswith(DOWNLOAD), cut
        if tar_format not in ("pax", "long_names"):  # whose headers are several
            assert reason == CUT_SHORT, cut
    path.write_bytes(whole[: length + BLOCK])
    assert contents(path) == files


@pytest.mark.parametrize("tar_format", ["gnu", "ustar", "v7", "pax"])
def test_error_is_raised_whichever_header_is_damaged(
    path: Path, tar_format: str
) -> None:
    whole = tars.tar_bytes(FILES, tar_format)
    tars.write_tar(path, FILES, tar_format)
    with tarfile.open(path) as tar:
        starts = {member.offset for member in tar}
        starts |= {member.offset_data - BLOCK for member in tar}
    for start in sorted(starts):
        damaged = bytearray(whole)
        damaged[start + 3] ^= 0x40
        path.write_bytes(damaged)
        assert problem(path), start


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_error_is_raised_when_a_hole_hides_the_rest(
    path: Path, tar_format: str
) -> None:
    """A download in pieces leaves zeros where a piece is missing."""
    whole = bytearray(tars.tar_bytes(FILES, tar_format))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        third = tar.getmembers()[2]
    whole[third.offset : third.offset_data] = bytes(third.offset_data - third.offset)
    path.write_bytes(whole)
    assert problem(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (SIZE, b"-0000001000\0"),
        (SIZE, b"abc\0\0\0\0\0\0\0\0\0"),
        (SIZE, b"00000000008\0"),
        (SIZE, b"\xff" * 10 + b"\xfe\0"),
        (TIME, b"zzz\0\0\0\0\0\0\0\0\0"),
    ],
    ids=["negative", "no_number", "not_octal", "negative_base_256", "time_no_number"],
)
def test_error_says_where_when_a_header_has_no_numbers(
    path: Path, field: slice, value: bytes
) -> None:
    path.write_bytes(changed(field, value) + END)
    assert problem(path) == f"it is damaged, or not a tar, at byte 0. {DOWNLOAD}"


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"size": "-1024"}, "it is damaged, or not a tar, at byte 0"),
        ({"size": "-1"}, "it is damaged, or not a tar, at byte 0"),
        ({"size": "1" + 30 * "0"}, "it is cut short"),
        ({"comment": "x" * 2**20}, "it is damaged, or not a tar, at byte 0"),
    ],
    ids=["negative", "minus_1", "endless", "large_header"],
)
def test_error_is_a_line_when_a_pax_header_is_hostile(
    path: Path, headers: dict[str, str], reason: str
) -> None:
    member = tarfile.TarInfo("a.JPEG")
    member.pax_headers = headers
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + header("b", 0) + END)
    assert problem(path) == f"{reason}. {DOWNLOAD}"


def test_file_is_listed_when_its_time_is_infinite(path: Path) -> None:
    member = tarfile.TarInfo("a.JPEG")
    member.pax_headers = {"mtime": "inf"}
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + END)
    assert contents(path) == {"a.JPEG": b""}


def test_error_is_that_of_the_system_when_a_tar_is_gone(path: Path) -> None:
    assert problem(path) == "No such file or directory."


# ---------------------------------------------------------------- tars in a tar


def spans(path: Path) -> list[tuple[int, int]]:
    """Returns where each file in a tar begins and ends."""
    _, members = list_tar(ImageSource(str(path), start=0))
    return [(f.offset_data, f.offset_data + f.size) for f in members.values()]


@pytest.mark.parametrize("tar_format", FORMATS)
def test_files_are_found_when_their_tar_is_in_a_tar(
    path: Path, tar_format: str
) -> None:
    inner = {
        f"n{i}.tar": tars.tar_bytes({f"n{i}_1.JPEG": b"1" * i, f"n{i}_2.JPEG": b"2"})
        for i in range(3)
    }
    tars.write_tar(path, inner, tar_format)
    for i, (start, end) in enumerate(spans(path)):
        found = contents(path, start, end)
        assert found == {f"n{i}_1.JPEG": b"1" * i, f"n{i}_2.JPEG": b"2"}


@pytest.mark.parametrize("tar_format", FORMATS)
def test_error_is_raised_when_a_tar_in_a_tar_has_no_end(
    path: Path, tar_format: str
) -> None:
    """What follows it belongs to the other tar: a header, or the end of all."""
    inner = tars.tar_bytes(FILES, tar_format)
    length = len(inner.rstrip(b"\0"))
    inner = inner[: length + -length % BLOCK]
    tars.write_tar(path, {"n1.tar": inner, "n2.tar": inner})
    for start, end in spans(path):
        assert problem(path, start, end)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda tar: tar[:1000], "it is cut short"),
        (lambda tar: b"x" + tar[1:], "it is damaged, or not a tar, at byte 2,560"),
    ],
    ids=["cut_short", "damaged"],
)
def test_error_names_the_class_when_its_tar_in_a_tar_is_bad(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    good = header("n1_1.JPEG", 1) + padded(b"1") + END  # 2,048 bytes
    path = whole_tar(tmp_path, [("n1.tar", good[:-BLOCK]), ("n2.tar", damage(good))])
    first, second = imagenet_to_gcs.find_classes(str(tmp_path), [])
    assert len(first.list_images([])) == 1
    with pytest.raises(InvalidInputError) as caught:
        second.list_images([])
    place = f"Cannot list the tar {path}/n2.tar"
    assert str(caught.value) == f"{place}: {reason}. {DOWNLOAD}"


def whole_tar(tmp_path: Path, classes: list[tuple[str, bytes]]) -> Path:
    """Writes the tar of a training split; the names of classes may come twice."""
    path = tmp_path / imagenet_to_gcs.TRAINING_TAR
    path.write_bytes(b"".join(header(n, len(d)) + padded(d) for n, d in classes) + END)
    return path


CLASS = tars.tar_bytes({"n1_1.JPEG": b"1"})


def test_class_is_the_last_of_its_name_when_it_comes_twice(tmp_path: Path) -> None:
    """And not the hidden double that a Mac left."""
    newer = tars.tar_bytes({"n1_2.JPEG": b"2"})
    classes = [("._n1.tar", b"Mac"), ("n1.tar", CLASS), ("n2.tar", CLASS)]
    whole_tar(tmp_path, [*classes, ("n1.tar", newer)])
    found = imagenet_to_gcs.find_classes(str(tmp_path), [])
    assert [(c.synset, [i.filename for i in c.list_images([])]) for c in found] == [
        ("n1", ["n1_2.JPEG"]),
        ("n2", ["n1_1.JPEG"]),
    ]


def test_class_is_refused_when_its_training_tar_was_replaced(tmp_path: Path) -> None:
    """Between the listing of the classes and that of each: its images are others."""
    path = whole_tar(tmp_path, [("n1.tar", CLASS), ("n2.tar", CLASS)])
    first, _ = imagenet_to_gcs.find_classes(str(tmp_path), [])
    path.unlink()
    whole_tar(tmp_path, [("n2.tar", CLASS), ("n1.tar", CLASS)])
    os.utime(path, (1, 1))
    with pytest.raises(InvalidInputError) as caught:
        first.list_images([])
    reason = "it has changed since the run began"
    assert str(caught.value) == f"Cannot list the tar {path}/n1.tar: {reason}."


def test_error_names_the_class_when_its_tar_is_a_link_to_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "train").mkdir()
    link = tmp_path / "train" / "n1.tar"
    link.symlink_to("nothing")
    with pytest.raises(InvalidInputError) as caught:
        for class_ in imagenet_to_gcs.find_classes(str(tmp_path), []):
            class_.list_images([])
    reason = "No such file or directory"
    assert str(caught.value) == f"Cannot list the tar {link}: {reason}."
