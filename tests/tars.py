"""Packs raw ImageNets the other ways in which they are found, and tars of all kinds.

    write_tar(tmp_path / "x.tar", {"a.JPEG": b"..."}, "pax")
    lay_out(raw, tmp_path / "other", "whole_tar", "folders")

Times of modification are whole seconds, as in a tar of ImageNet, so that every layout
of a raw ImageNet gives shards of the same digests.
"""

import os
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

MTIME = 1_300_000_000
BLOCK = 512
END = bytes(2 * BLOCK)

FORMATS: dict[str, Literal[0, 1, 2]] = {
    "gnu": tarfile.GNU_FORMAT,
    "ustar": tarfile.USTAR_FORMAT,
    "pax": tarfile.PAX_FORMAT,
    "v7": tarfile.USTAR_FORMAT,  # without magic, type and user names
}
"""Formats by name. In a `pax` tar, times have a fraction, so that all members have
headers of that format."""


def member(
    name: str,
    data: bytes = b"",
    tar_format: str = "gnu",
    kind: bytes = tarfile.REGTYPE,
    target: str = "",
) -> bytes:
    """Makes a member of a tar: its header, and its data filled up to whole blocks."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, target
    info.mtime = MTIME + (0.5 if tar_format == "pax" else 0)
    header = info.tobuf(FORMATS[tar_format])
    if tar_format == "v7":
        header = with_field(header[:257] + bytes(255), 156, b"\0")
    return header + data + bytes(-len(data) % BLOCK)


def with_field(
    member: bytes, start: int, value: bytes, checksum: str = "{:06o}\0 "
) -> bytes:
    """Changes a field of a member's header, and the checksum."""
    changed = member[:start] + value + member[start + len(value) :]
    total = sum(changed[:148] + b" " * 8 + changed[156:BLOCK])
    return changed[:148] + checksum.format(total).encode() + changed[156:]


def tar_bytes(files: Mapping[str, bytes], tar_format: str = "gnu") -> bytes:
    """Packs files by name, closed by the two empty blocks and filling."""
    members = (member(name, data, tar_format) for name, data in files.items())
    tar = b"".join(members) + END
    return tar + bytes(-len(tar) % tarfile.RECORDSIZE)


def write_tar(path: Path, files: Mapping[str, bytes], tar_format: str = "gnu") -> Path:
    path.write_bytes(tar_bytes(files, tar_format))
    return path


# ---------------------------------------------------------------- layouts


def lay_out(raw: Path, directory: Path, training: str, validation: str) -> Path:
    """Copies a raw ImageNet, `train/<synset>/` and flat, in another layout."""
    directory.mkdir(parents=True)
    TRAINING_LAYOUTS[training](raw, directory)
    VALIDATION_LAYOUTS[validation](raw, directory)
    if validation not in ("folders", "tar_of_folders"):
        shutil.copy(raw / "synset_labels.txt", directory)
    for path in directory.glob("*/**/*.JPEG"):
        os.utime(path, (MTIME, MTIME))
    return directory


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _class_tars(raw: Path) -> dict[str, bytes]:
    """Packs each class of a raw ImageNet: `n01440764.tar` and so on."""
    return {
        f"{directory.name}.tar": tar_bytes(_files(directory))
        for directory in sorted((raw / "train").iterdir())
    }


def _copy_train(raw: Path, directory: Path) -> None:
    shutil.copytree(raw / "train", directory / "train")


def _write_class_tars(raw: Path, directory: Path) -> None:
    (directory / "train").mkdir()
    for name, data in _class_tars(raw).items():
        (directory / "train" / name).write_bytes(data)


def _write_whole_tar(raw: Path, directory: Path) -> None:
    write_tar(directory / "ILSVRC2012_img_train.tar", _class_tars(raw))


def _write_tar_of_folders(raw: Path, directory: Path) -> None:
    _copy_train(raw, directory / "unpacked")
    _pack(directory / "unpacked", directory / "ILSVRC2012_img_train.tar")


def _pack(directory: Path, path: Path) -> None:
    """Packs a tree, `./` and all directories too, and removes it."""
    with tarfile.open(path, "w") as tar:
        tar.add(directory, ".")
    shutil.rmtree(directory)


def _copy_flat(raw: Path, directory: Path) -> None:
    shutil.copytree(raw / "validation", directory / "validation")


def _copy_to_folders(raw: Path, directory: Path) -> None:
    labels = (raw / "synset_labels.txt").read_text().split()
    images = sorted((raw / "validation").iterdir())
    for image, synset in zip(images, labels, strict=True):
        folder = directory / "validation" / synset
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(image, folder)


def _write_validation_tar(raw: Path, directory: Path) -> None:
    write_tar(directory / "ILSVRC2012_img_val.tar", _files(raw / "validation"))


def _write_validation_tar_of_folders(raw: Path, directory: Path) -> None:
    _copy_to_folders(raw, directory / "unpacked")
    _pack(directory / "unpacked", directory / "ILSVRC2012_img_val.tar")


Layout = Callable[[Path, Path], None]

TRAINING_LAYOUTS: dict[str, Layout] = {
    "directories": _copy_train,
    "class_tars": _write_class_tars,
    "whole_tar": _write_whole_tar,
    "tar_of_folders": _write_tar_of_folders,
}

VALIDATION_LAYOUTS: dict[str, Layout] = {
    "flat": _copy_flat,
    "folders": _copy_to_folders,  # without a label file
    "labelled_folders": _copy_to_folders,
    "tar": _write_validation_tar,
    "tar_of_folders": _write_validation_tar_of_folders,  # without a label file
}
