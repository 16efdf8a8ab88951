"""Tests that bad images are all named, and keep only their own shards from being."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import contract
import pytest
import tars
from command import UPLOAD, run_code, run_command
from emulator import Emulator
from processes import (
    contents,
    held,
    identities,
    started,
    unprivileged,
    uploads,
    wait_for,
)

SHARDS = ("--training_shards=40", "--validation_shards=10")


TWELVE_BITS = r"LC_ALL=C sed -i 's/\xff\xc0\x00\x11\x08/\xff\xc0\x00\x11\x0c/'"

DAMAGE = [
    ("truncate -s 1500 {}", "decode {}: it is cut short: no end marker"),
    ("truncate -s 0 {}", "decode {}: the file is empty"),
    (TWELVE_BITS + " {}", "decode {}: Unsupported JPEG data precision 12"),
    ("ln -sf nowhere {}", "read {}: it is a dangling link"),
    ("chmod 0 {}", "read {}: Permission denied"),
]


def test_bad_images_are_all_named_and_only_their_shards_are_missing(
    tmp_path: Path, emulator: Emulator
) -> None:
    """Every kind at once, two of them in one shard."""
    raw = contract.make_raw(tmp_path / "raw", 10, 8, 20)
    scratch = tmp_path / "scratch"
    plan = contract.expected_shards(raw, 40, 10)
    names = list(plan)
    bad_shards = [*names[3:6], *names[41:42]]
    victims = [Path(plan[name][0].path) for name in bad_shards]
    victims.append(Path(plan[names[3]][1].path))
    expected = []
    for path, (damage, problem) in zip(victims, DAMAGE, strict=True):
        shutil.copy2(path, tmp_path)
        contract.change(raw, damage.format(path))
        expected.append(f"Cannot {problem.format(path)}.")
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}"]
    flags += [*UPLOAD, *SHARDS, "--num_workers=2"]
    with started(*flags, env=emulator.environment, under=unprivileged()) as run:
        done = run.finish()
    assert done.status == 1
    assert sorted(done.errors) == sorted(expected)
    assert done.lines[-len(expected) :] == [f"ERROR: {error}" for error in done.errors]
    shards = contents(scratch)
    assert shards.keys() == plan.keys() - bad_shards
    assert sorted(uploads(emulator)) == sorted(shards)
    stored = {name.partition("/")[2]: d for name, d in emulator.objects().items()}
    assert stored == shards
    assert not (scratch / "manifest.json").exists()

    before = identities(scratch)
    for path in victims:
        path.unlink()
        shutil.copy2(tmp_path / path.name, path)
    done = run_command(*flags, env=emulator.environment)
    assert done.status == 0, done.stderr
    assert any("46 of 50 shards up to date" in line for line in done.lines)
    after = identities(scratch)
    assert {n for n in after if after[n] != before.get(n)} == set(bad_shards)
    assert sorted(uploads(emulator)[46:-1]) == sorted(bad_shards)
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


CHANGED = "has changed since the run began"


@pytest.mark.parametrize("layout", ["directories", "whole_tar"])
def test_image_is_named_when_it_changes_during_the_run(
    raw: Path, tmp_path: Path, layout: str
) -> None:
    """The same number of bytes, written after the run has listed them."""
    raw = tars.lay_out(raw, tmp_path / "other", layout, "flat")
    scratch = tmp_path / "scratch"
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}"]
    flags += ["--nogcs_upload", "--training_shards=4", "--validation_shards=2"]
    images = sorted(raw.glob("train/*/*.JPEG"))
    path = images[0] if images else raw / "ILSVRC2012_img_train.tar"
    go, env = held(tmp_path)
    with started(*flags, env=env) as run:
        wait_for(lambda: "Writing " in run.output(), run)
        path.write_bytes(path.read_bytes())
        go.touch()
        done = run.finish()
    assert done.status == (1 if images else 75)
    if images:
        assert done.errors == [f"Cannot read {path}: it {CHANGED}."]
    else:
        assert done.errors == [f"{path} {CHANGED}. Rerun the same command to resume."]
    done = run_command(*flags)
    assert done.status == 0, done.stderr


def test_lack_of_memory_is_no_image_s_fault(raw: Path, tmp_path: Path) -> None:
    """There is no memory to read one of 2 GB, most of it a hole."""
    path = min(raw.glob("train/*/*.JPEG"))
    os.truncate(path, 2_000_000_000)
    code = """if True:
        import resource, sys
        import imagenet_to_gcs as script
        import tensorflow

        dataset = script.read_dataset(sys.argv[1])
        shards = script.plan_shards(dataset, 1, 1)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        limit = size + 1_000_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            script.write_shard(shards[0], sys.argv[2], script.write_records, False)
        except script.MachineError as error:
            print(error)
    """
    done = run_code(code, str(raw), str(tmp_path / "scratch"))
    assert done.stdout == (
        f"Cannot read {path}: Cannot allocate memory. Allow the run more "
        "memory, or rerun it with fewer --num_workers.\n"
    ), done.stderr
