"""Packs raw ImageNets the other ways in which they are found, and tars of all kinds.

    write_tar(tmp_path / "x.tar", {"a.JPEG": b"..."}, "pax")
    lay_out(raw, tmp_path / "other", "whole_tar", "folders")

Times of modification are whole seconds, as in a tar of ImageNet, so that every layout
of a raw ImageNet gives shards of the same digests.
"""

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

MTIME = 1_300_000_000
BLOCK = 512

FORMATS = {
    "gnu": tarfile.GNU_FORMAT,
    "ustar": tarfile.USTAR_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
"""Formats by name; files in a `pax` one have a time with a fraction, so that all have
headers of that format. `v7` is made of `ustar`, see `as_v7`."""


def tar_bytes(files: Mapping[str, bytes], tar_format: str = "gnu") -> bytes:
    """Packs files by name, closed by the two empty blocks and filling."""
    file = io.BytesIO()
    is_v7 = tar_format == "v7"
    kind = FORMATS["ustar" if is_v7 else tar_format]
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mtime = MTIME + (0.5 if tar_format == "pax" else 0)
            tar.addfile(member, io.BytesIO(data))
    return as_v7(file.getvalue()) if is_v7 else file.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], tar_format: str = "gnu") -> Path:
    """Writes `tar_bytes` to a file, whose directory is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, tar_format))
    return path


def as_v7(tar: bytes) -> bytes:
    """Makes a tar of regular files one of Unix V7: no magic, type and user names."""
    changed = bytearray(tar)
    position = 0
    while any(header := changed[position : position + BLOCK]):
        size = int(header[124:135], 8)
        header[156] = 0
        header[257:] = bytes(BLOCK - 257)
        changed[position : position + BLOCK] = with_checksum(bytes(header))
        position += BLOCK + -(-size // BLOCK) * BLOCK
    return bytes(changed)


def with_checksum(header: bytes) -> bytes:
    """Sets the checksum of a header that was changed."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + f"{sum(blank):06o}\0 ".encode() + blank[156:]


# ---------------------------------------------------------------- layouts


def lay_out(raw: Path, directory: Path, training: str, validation: str) -> Path:
    """Copies a raw ImageNet, `train/<synset>/` and flat, in another layout."""
    directory.mkdir(parents=True)
    TRAINING_LAYOUTS[training](raw, directory)
    VALIDATION_LAYOUTS[validation](raw, directory)
    for path in directory.glob("*/**/*.JPEG"):
        os.utime(path, (MTIME, MTIME))
    return directory


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def class_tars(raw: Path) -> dict[str, bytes]:
    """Packs each class of a raw ImageNet: `n01440764.tar` and so on."""
    return {
        f"{directory.name}.tar": tar_bytes(_files(directory))
        for directory in sorted((raw / "train").iterdir())
    }


def _copy_train(raw: Path, directory: Path) -> None:
    shutil.copytree(raw / "train", directory / "train")


def _write_class_tars(raw: Path, directory: Path) -> None:
    (directory / "train").mkdir()
    for name, data in class_tars(raw).items():
        (directory / "train" / name).write_bytes(data)


def _write_whole_tar(raw: Path, directory: Path) -> None:
    write_tar(directory / "ILSVRC2012_img_train.tar", class_tars(raw))


def _copy_labels(raw: Path, directory: Path) -> None:
    shutil.copy(raw / "synset_labels.txt", directory)


def _copy_flat(raw: Path, directory: Path) -> None:
    shutil.copytree(raw / "validation", directory / "validation")
    _copy_labels(raw, directory)


def _copy_to_folders(raw: Path, directory: Path) -> None:
    labels = (raw / "synset_labels.txt").read_text().split()
    images = sorted((raw / "validation").iterdir())
    for image, synset in zip(images, labels, strict=True):
        folder = directory / "validation" / synset
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(image, folder)


def _copy_to_labelled_folders(raw: Path, directory: Path) -> None:
    _copy_to_folders(raw, directory)
    _copy_labels(raw, directory)


def _write_validation_tar(raw: Path, directory: Path) -> None:
    write_tar(directory / "ILSVRC2012_img_val.tar", _files(raw / "validation"))
    _copy_labels(raw, directory)


Layout = Callable[[Path, Path], None]

TRAINING_LAYOUTS: dict[str, Layout] = {
    "directories": _copy_train,
    "class_tars": _write_class_tars,
    "whole_tar": _write_whole_tar,
}

VALIDATION_LAYOUTS: dict[str, Layout] = {
    "flat": _copy_flat,
    "folders": _copy_to_folders,
    "labelled_folders": _copy_to_labelled_folders,
    "tar": _write_validation_tar,
}
