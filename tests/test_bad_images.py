"""Tests that bad images are all named, and keep only their own shards from being."""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import contract
import jpegs
from command import UPLOAD, run_command
from emulator import Emulator
from processes import (
    contents,
    identities,
    started,
    unprivileged,
    uploads,
    wait_for,
)

SHARDS = ("--training_shards=40", "--validation_shards=10")


def truncated(path: Path) -> str:
    os.truncate(path, path.stat().st_size // 2)
    return "it is cut short: no end marker"


def empty(path: Path) -> str:
    os.truncate(path, 0)
    return "the file is empty"


def html(path: Path) -> str:
    path.write_bytes(b"<html><body>404 Not Found</body></html>")
    return "not a JPEG (starts with b'<htm')"


def directory(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "Is a directory"


def dangling_link(path: Path) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "a link to nothing"


def unreadable(path: Path) -> str:
    path.chmod(0)
    return "Permission denied"


def png_cut_short(path: Path) -> str:
    data = jpegs.png(1)
    path.write_bytes(data[: len(data) // 2])
    return "it is a PNG that cannot be decoded"


def png_of_signature(path: Path) -> str:
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    return "it is a PNG cut short"


def enormous(path: Path) -> str:
    """Declares 65,500 x 65,500 pixels in the frame header."""
    data = path.read_bytes()
    start = re.search(rb"\xff[\xc0-\xc2]", data)
    assert start
    size = struct.pack(">HH", 65_500, 65_500)
    path.write_bytes(data[: start.start() + 5] + size + data[start.start() + 9 :])
    return (
        "its header declares 65,500 x 65,500 pixels of 3 components; the product must "
        "be from 1 to 536,870,911"
    )


def enormous_png(path: Path) -> str:
    data = jpegs.png(1, 8, 8)
    path.write_bytes(data[:16] + struct.pack(">II", 65_500, 65_500) + data[24:])
    return (
        "its header declares 65,500 x 65,500 pixels of 3 components; the product must "
        "be from 1 to 536,870,911"
    )


def no_tables(path: Path) -> str:
    """Zeroes the segments between the first and the data."""
    data = path.read_bytes()
    path.write_bytes(data[:2] + data[data.index(b"\xff\xc0") :])
    return "Quantization table 0x00 was not defined"


DAMAGE: list[Callable[[Path], str]] = [
    truncated,
    empty,
    html,
    directory,
    dangling_link,
    unreadable,
    png_cut_short,
    png_of_signature,
    enormous,
    enormous_png,
    no_tables,
]


def restore(path: Path, good: Path) -> None:
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    shutil.copy2(good, path)


def test_bad_images_are_all_named_and_only_their_shards_are_missing(
    tmp_path: Path, emulator: Emulator
) -> None:
    """Every kind at once, of two a shard; memory is bounded all the while."""
    raw = contract.make_raw(tmp_path / "raw", 10, 8, 20)
    good = shutil.copytree(raw, tmp_path / "good")
    scratch = tmp_path / "scratch"
    plan = contract.expected_shards(raw, 40, 10)
    names = list(plan)
    bad_shards = [*names[3:10], *names[41:44]]
    victims = [Path(plan[name][0].path) for name in bad_shards]
    victims.append(Path(plan[names[3]][1].path))
    expected = [
        f"Cannot decode {path}: {damage(path)}."
        for path, damage in zip(victims, DAMAGE, strict=True)
    ]
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}"]
    flags += [*UPLOAD, *SHARDS, "--num_workers=2"]
    with started(*flags, env=emulator.environment, under=unprivileged()) as run:
        done = run.finish()
    assert done.status == 1
    assert sorted(done.errors) == sorted(expected)
    assert done.lines[-len(expected) :] == [f"ERROR: {error}" for error in done.errors]
    warning = next(i for i, line in enumerate(done.lines) if "of no bytes" in line)
    assert done.lines[warning].startswith("WARNING: 2 images of no bytes ")
    assert done.lines[warning + 1].startswith("Writing 50 shards ")
    shards = contents(scratch)
    assert shards.keys() == plan.keys() - bad_shards
    assert sorted(uploads(emulator)) == sorted(shards)
    stored = {name.partition("/")[2]: d for name, d in emulator.objects().items()}
    assert stored == shards
    assert not (scratch / "manifest.json").exists()

    before = identities(scratch)
    for path in victims:
        restore(path, good / path.relative_to(raw))
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    assert (
        "Resuming: 40 of 50 shards are up to date, 0 only to be uploaded." in done.lines
    )
    after = identities(scratch)
    assert {name for name in after if after[name] != before.get(name)} == set(
        bad_shards
    )
    assert sorted(uploads(emulator)[40:-1]) == sorted(bad_shards)
    assert uploads(emulator)[-1] == "manifest.json"
    contract.assert_shards(contents(scratch), raw, 40, 10)


def test_bad_image_takes_one_line_whatever_its_name(raw: Path, tmp_path: Path) -> None:
    path = min(raw.glob("train/*/*.JPEG"))
    path = path.rename(path.with_name("\x1b[31mtwo\nlines\u2028 and \x85.JPEG"))
    path.write_bytes(b"")
    done = run_command(
        f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}", "--nogcs_upload"
    )
    assert done.status == 1
    assert done.lines[-1] == (
        f"ERROR: Cannot decode {path.parent}/\\x1b[31mtwo\\nlines\\u2028 and "
        "\\x85.JPEG: the file is empty."
    )


def test_memory_is_flat_when_small_files_declare_enormous_images(
    raw: Path, tmp_path: Path
) -> None:
    """Also those that a check of the size alone lets pass: 13,000 x 13,000 is legal."""
    images = sorted(raw.glob("train/*/*.JPEG"))
    for path in images[::2]:
        enormous(path)
    for path in images[1::2]:
        data = path.read_bytes()
        start = data.index(b"\xff\xc0") + 5
        path.write_bytes(
            data[:start] + struct.pack(">HH", 13_000, 13_000) + data[start + 4 :]
        )
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}/scratch"]
    flags += ["--nogcs_upload", "--training_shards=4", "--validation_shards=2"]
    peaks: dict[int, int] = {}
    with started(*flags, "--num_workers=1") as run:

        def watch() -> bool:
            for pid in run.workers():
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                peak = re.search(r"VmHWM:\s+(\d+) kB", status)
                peaks[pid] = int(peak[1]) if peak else 0
            return run.process.poll() is not None

        wait_for(watch)
        done = run.finish()
    assert done.status == 1
    assert 0 < max(peaks.values()) < 700_000, peaks


def test_image_is_named_when_it_changes_during_the_run(
    raw: Path, tmp_path: Path
) -> None:
    """The run is halted after its listing, and the image grows."""
    scratch = tmp_path / "scratch"
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}"]
    flags += ["--nogcs_upload", "--training_shards=4", "--validation_shards=2"]
    path = min(raw.glob("train/*/*.JPEG"))
    size = path.stat().st_size
    with started(*flags) as run:
        wait_for(lambda: (scratch / ".lock").exists(), run)
        with path.open("ab") as file:
            file.write(b"x")
        done = run.finish()
    assert done.status == 1
    assert done.errors == [
        (
            f"Cannot decode {path}: it had {size:,} bytes when the run began and now "
            f"has {size + 1:,}."
        )
    ]
    done = run_command(*flags)
    assert done.status == 0, done.stderr
    contract.assert_shards(contents(scratch), raw, 4, 2)


def test_pipe_is_named_and_does_not_hold_the_run(raw: Path, tmp_path: Path) -> None:
    path = min(raw.glob("train/*/*.JPEG"))
    path.unlink()
    os.mkfifo(path)
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}/scratch"]
    flags += ["--nogcs_upload", "--training_shards=4", "--validation_shards=2"]
    with started(*flags) as run:
        done = run.finish(timeout=30)
    assert done.status == 1
    assert len(done.errors) == 1
    assert done.errors[0].startswith(f"Cannot decode {path}: ")
