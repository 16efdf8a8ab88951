"""Tests that what cannot work is refused before the first image, all of it at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import contract
import pytest
from command import UPLOAD, run_command
from emulator import Emulator, Status
from processes import (
    contents,
    kinds,
    pad,
    shard_paths,
    small_disk,
    started,
    unprivileged,
    uploads,
)

import imagenet_to_gcs

MAKE_ROOM = "Make room, or choose another disk."
SHARDS = ("--training_shards=4", "--validation_shards=2")


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """What is in a directory: each file's size and time of modification."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted([directory, *directory.rglob("*")])
    }


def errors_of(raw: Path, *flags: str) -> list[str]:
    """The errors of a run that must be refused, and must write nothing."""
    before = snapshot(raw.parent)
    done = run_command(f"--raw_data_dir={raw}", "--nogcs_upload", *SHARDS, *flags)
    assert done.status == 1, done.stderr
    assert done.errors, done.stderr
    assert done.lines[-len(done.errors) :] == [f"ERROR: {e}" for e in done.errors]
    assert snapshot(raw.parent) == before
    return done.errors


# ------------------------------------------------------------------ layout


def no_train(raw: Path) -> None:
    shutil.rmtree(raw / "train")


def no_validation(raw: Path) -> None:
    shutil.rmtree(raw / "validation")


def val(raw: Path) -> None:
    (raw / "validation").rename(raw / "val")


def kaggle(raw: Path) -> None:
    (raw / "ILSVRC/Data/CLS-LOC").mkdir(parents=True)
    (raw / "train").rename(raw / "ILSVRC/Data/CLS-LOC/train")


def tars_in_train(raw: Path) -> None:
    for folder in list((raw / "train").iterdir()):
        shutil.rmtree(folder)
        folder.with_suffix(".tar").touch()


def dangling_tar(raw: Path) -> None:
    (raw / "train" / "n09999999.tar").symlink_to("nowhere")


def small_suffix(suffix: str) -> Callable[[Path], None]:
    def rename(raw: Path) -> None:
        for path in raw.glob("validation/*.JPEG"):
            path.rename(path.with_suffix(suffix))

    return rename


def no_class_directories(raw: Path) -> None:
    for path in raw.glob("train/*/*.JPEG"):
        path.rename(raw / "train" / path.name)
    for folder in [path for path in (raw / "train").iterdir() if path.is_dir()]:
        folder.rmdir()


def empty_class(raw: Path) -> None:
    (raw / "train" / "n09999999").mkdir()


def class_of_hidden_files(raw: Path) -> None:
    (raw / "train" / "n09999999").mkdir()
    (raw / "train" / "n09999999" / "._x.JPEG").touch()


def train_is_a_file(raw: Path) -> None:
    no_train(raw)
    (raw / "train").touch()


def no_labels(raw: Path) -> None:
    (raw / "synset_labels.txt").unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            no_train,
            (
                "No directory {raw}/train, and no ILSVRC2012_img_train.tar beside it. "
                "Found synset_labels.txt, validation."
            ),
        ),
        (
            no_validation,
            (
                "No directory {raw}/validation, and no ILSVRC2012_img_val.tar beside "
                "it. Found synset_labels.txt, train."
            ),
        ),
        (
            val,
            (
                "No directory {raw}/validation, and no ILSVRC2012_img_val.tar beside "
                "it. Found {raw}/val: rename it to validation."
            ),
        ),
        (
            kaggle,
            (
                "No directory {raw}/train, and no ILSVRC2012_img_train.tar beside it. "
                "Found {raw}/ILSVRC/Data/CLS-LOC (Kaggle's layout): README says which "
                "links it takes."
            ),
        ),
        (
            tars_in_train,
            (
                "Cannot list the tar {raw}/train/n01440801.tar: it is cut short. "
                "Download it again, and compare its checksum."
            ),
        ),
        (
            small_suffix(".jpg"),
            (
                "No images match {raw}/validation/*.JPEG. Found 4 .jpg files there: "
                "rename them to *.JPEG."
            ),
        ),
        (
            small_suffix(".jpeg"),
            (
                "No images match {raw}/validation/*.JPEG. Found 4 .jpeg files there: "
                "rename them to *.JPEG."
            ),
        ),
        (
            no_class_directories,
            (
                "No images match {raw}/train/*/*.JPEG. Found 12 .JPEG files there: "
                "move each into a directory named after its synset."
            ),
        ),
        (
            empty_class,
            (
                "Each class must have images, but 1 of 5 classes have none: "
                "n09999999. No images match {raw}/train/n09999999/*.JPEG. "
                "Found nothing there."
            ),
        ),
        (
            class_of_hidden_files,
            (
                "Each class must have images, but 1 of 5 classes have none: "
                "n09999999. No images match {raw}/train/n09999999/*.JPEG. "
                "Found ._x.JPEG there."
            ),
        ),
        (
            train_is_a_file,
            "Cannot list {raw}/train: Not a directory.",
        ),
        (
            no_labels,
            (
                "Cannot read {raw}/synset_labels.txt: No such file or directory. It "
                "must hold the synset of each validation image, a line each, in the "
                "order of their names."
            ),
        ),
        (
            contract.label_file("n01440764\n" * 3),
            (
                "{raw}/synset_labels.txt has 3 labels and {raw}/validation 4 images; "
                "they must be equal in number."
            ),
        ),
        (
            contract.label_file("n01440764\n\nn01440764\nn01440764\n"),
            (
                "Line 2 of {raw}/synset_labels.txt must be a single synset such as "
                "n01440764; found ''."
            ),
        ),
        (
            contract.label_file("n01440764\nn01440764\ntinca tinca\na b\n"),
            (
                "Line 3 of {raw}/synset_labels.txt must be a single synset such as "
                "n01440764; found 'tinca tinca' (2 such lines)."
            ),
        ),
    ],
    ids=[
        "no_train",
        "no_validation",
        "val",
        "kaggle",
        "tars",
        "jpg",
        "jpeg",
        "no_classes",
        "empty_class",
        "hidden_files",
        "file",
        "no_labels",
        "few_labels",
        "empty_label",
        "two_words",
    ],
)
def test_raw_is_refused_when_its_layout_is_wrong(
    raw: Path, change: Callable[[Path], None], expected: str
) -> None:
    change(raw)
    assert expected.format(raw=raw) in errors_of(raw)


def test_all_problems_are_listed_when_there_are_several(
    raw: Path, emulator: Emulator
) -> None:
    emulator.inject(Status(403, "No access."), kind="session", at=1)
    no_labels(raw)
    val(raw)
    empty_class(raw)
    scratch = raw.parent / "file"
    scratch.touch()
    done = run_command(
        f"--raw_data_dir={raw}",
        f"--local_scratch_dir={scratch}",
        *UPLOAD,
        *SHARDS,
        env=emulator.environment,
    )
    assert done.status == 1
    starts = [
        f"Cannot read {raw}/synset_labels.txt",
        "Each class must have images",
        f"No directory {raw}/validation, and no ILSVRC2012_img_val.tar beside it. ",
        "Access to gs://bucket/imagenet/manifest.json is denied",
        f"--local_scratch_dir={scratch}: {scratch} must be a directory.",
    ]
    assert len(done.errors) == len(starts), done.errors
    for error, start in zip(sorted(done.errors), sorted(starts), strict=True):
        assert error.startswith(start)
    assert done.lines == [f"ERROR: {error}" for error in done.errors]


def test_all_flags_are_named_when_several_are_wrong() -> None:
    done = run_command(
        "--raw_data_dir=/nowhere/raw",
        "--num_workers=0",
        "--training_shards=-1",
        "--validation_shards=100000",
        "--gcs_output_path=gs:///x",
    )
    assert done.status == 1
    assert done.errors == [
        (
            "--raw_data_dir=/nowhere/raw must be a directory with train/, validation/ "
            "and synset_labels.txt; there is none of that name."
        ),
        "--num_workers must be from 1 to 99,999; found 0.",
        "--training_shards must be from 1 to 99,999; found -1.",
        "--validation_shards must be from 1 to 99,999; found 100,000.",
        "--project must be given for the upload (or pass --nogcs_upload).",
        (
            "--gcs_output_path=gs:///x must name a bucket after gs://: 3 to 222 "
            "characters of a-z, 0-9, '-', '_' and '.'; found ''."
        ),
    ]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("bucket/x", "must start with gs://, as in gs://bucket/directory"),
        ("s3://bucket/x", "must start with gs://, as in gs://bucket/directory"),
        ("gs://", "must name a bucket {rule}; found ''"),
        ("gs:///x", "must name a bucket {rule}; found ''"),
        ("gs://Bucket/x", "must name a bucket {rule}; found 'Bucket'"),
        ("gs://b/x", "must name a bucket {rule}; found 'b'"),
        ("gs://$BUCKET/x", "must name a bucket {rule}; found '$BUCKET'"),
    ],
)
def test_output_path_is_refused_when_malformed(path: str, problem: str) -> None:
    """In this process: the flag's way there is that of the test above."""
    rule = "after gs://: 3 to 222 characters of a-z, 0-9, '-', '_' and '.'"
    with pytest.raises(imagenet_to_gcs.InvalidInputError) as caught:
        imagenet_to_gcs.GcsPath.parse(path)
    assert str(caught.value) == f"--gcs_output_path={path} {problem}.".format(rule=rule)


def test_what_cannot_be_read_is_named(raw: Path) -> None:
    """A directory of a class, the list of labels, and an image: that comes later."""
    folder, other = sorted((raw / "train").iterdir())[:2]
    image = min(other.iterdir())
    for path in (folder, raw / "synset_labels.txt", image):
        path.chmod(0)
    scratch = raw.parent / "scratch"
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}"]
    flags += ["--nogcs_upload", *SHARDS]
    with started(*flags, under=unprivileged()) as run:
        done = run.finish()
    assert done.status == 1
    assert done.errors == [
        (
            f"Cannot read {raw}/synset_labels.txt: Permission denied. It must hold the "
            "synset of each validation image, a line each, in the order of their names."
        ),
        f"Cannot list {folder}: Permission denied.",
    ]
    for path in (folder, raw / "synset_labels.txt"):
        path.chmod(0o755)
    with started(*flags, under=unprivileged()) as run:
        done = run.finish()
    assert done.status == 1
    assert done.errors == [f"Cannot decode {image}: Permission denied."]
    assert len(shard_paths(scratch)) == 5


def test_dangling_tar_is_named(raw: Path) -> None:
    dangling_tar(raw)
    [error] = errors_of(raw)
    assert "n09999999" in error


def test_no_process_is_left_when_run_is_refused(raw: Path, tmp_path: Path) -> None:
    """It ends while the process that imports TensorFlow is still starting."""
    (tmp_path / "file").touch()
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={tmp_path}/file"]
    for _ in range(3):
        with started(*flags, "--nogcs_upload") as run:
            assert run.finish().status == 1


# ------------------------------------------------------------------ accepted


def test_raw_is_accepted_when_it_is_only_odd(raw: Path, tmp_path: Path) -> None:
    """Windows line ends, no last newline, hidden files, classes only of validation."""
    path = raw / "synset_labels.txt"
    text = path.read_text().split()
    (raw / "validation" / "._ILSVRC2012_val_00000001.JPEG").write_bytes(b"\0\5\x16\7")
    (min((raw / "train").iterdir()) / ".DS_Store").touch()
    (raw / "train" / "._n01440764").touch()
    path.write_text("\n".join([*text[:-1], "n09999999"]))
    scratch = tmp_path / "scratch"
    flags = ["--nogcs_upload", *SHARDS, f"--raw_data_dir={raw}"]
    done = run_command(*flags, f"--local_scratch_dir={scratch}")
    assert done.status == 0, done.stderr
    assert (
        "WARNING: 1 of 5 synsets have validation images but no training images: "
        "n09999999." in done.lines
    )
    for hidden in raw.rglob(".*"):
        hidden.unlink()
    contract.assert_shards(contents(scratch), raw, 4, 2)
    path.write_bytes("\r\n".join([*text[:-1], "n09999999"]).encode())
    done = run_command(*flags, f"--local_scratch_dir={scratch}")
    assert done.status == 0, done.stderr
    assert (
        "Resuming: 6 of 6 shards are up to date, 0 only to be uploaded." in done.lines
    )


def test_shortfall_is_named_when_it_has_the_shape_of_imagenet(tmp_path: Path) -> None:
    """1,000 synsets of one image each; a link of each to the same image."""
    raw = contract.make_raw(tmp_path / "raw", 1, 1, 1)
    image = next(raw.glob("train/*/*.JPEG"))
    for index in range(999):
        folder = raw / "train" / f"n2{index:07}"
        folder.mkdir()
        os.link(image, folder / f"n2{index:07}_1.JPEG")
    done = run_command(f"--raw_data_dir={raw}", "--nogcs_upload", "--dry_run")
    assert done.status == 0
    warnings = [line for line in done.lines if line.startswith("WARNING: ")]
    names = ", ".join(["n01440764 (1)", *(f"n2{i:07} (1)" for i in range(9))])
    assert warnings == [
        (
            "WARNING: ImageNet-1k has 1,281,167 training images, found 1,000 "
            f"(-1,280,167). Classes of fewer than 732: {names} and 990 more."
        ),
        (
            "WARNING: ImageNet-1k has 50,000 validation images, found 1 (-49,999). "
            "Classes of fewer than 50: n01440764 (1)."
        ),
    ]


# ------------------------------------------------------------------ room


def test_scratch_is_refused_when_it_has_no_room(raw: Path) -> None:
    os.truncate(next(raw.glob("train/*/*.JPEG")), 2 * 10**12)
    [error] = errors_of(raw)
    start = f"--local_scratch_dir={raw}/tf_records must have room for 2.0 TB of "
    assert error.startswith(f"{start}shards; its disk has ")
    assert error.endswith(f" free. {MAKE_ROOM}")


def test_room_is_needed_only_for_what_is_left(raw: Path, tmp_path: Path) -> None:
    """A disk of 4 MB: the shards of 5 MB do not go there, those of 3 MB do."""
    pad(raw, 1_000_000, "train/*/*_1.JPEG")
    with small_disk(tmp_path / "disk", 4_096_000) as disk:
        pad(raw, 250_000, "validation/*.JPEG")
        flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={disk}"]
        flags += ["--nogcs_upload", *SHARDS]
        done = run_command(*flags)
        assert done.status == 1
        [error] = done.errors
        assert error == (
            f"--local_scratch_dir={disk} must have room for 5.0 MB of shards; its "
            f"disk has 4.1 MB free. {MAKE_ROOM}"
        )
        assert list(disk.iterdir()) == []
        for path in raw.glob("validation/*.JPEG"):
            os.truncate(path, path.stat().st_size - 250_000)
        os.truncate(next(raw.glob("train/*/*_1.JPEG")), 20_000)
        for _ in range(2):
            done = run_command(*flags)
            assert done.status == 0, done.stderr


def below_a_file(directory: Path) -> str:
    (directory / "file").touch()
    return "{0}/file/scratch: {0}/file must be a directory."


def not_writable(directory: Path) -> str:
    (directory / "file").mkdir(mode=0o555)
    return "{0}/file/scratch: {0}/file must be writable."


@pytest.mark.parametrize("obstacle", [below_a_file, not_writable])
def test_scratch_is_refused_when_it_cannot_be_made(
    raw: Path, tmp_path: Path, obstacle: Callable[[Path], str]
) -> None:
    expected = obstacle(tmp_path).format(tmp_path)
    scratch = tmp_path / "file" / "scratch"
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}"]
    with started(*flags, "--nogcs_upload", *SHARDS, under=unprivileged()) as run:
        done = run.finish()
    assert (done.status, done.errors) == (1, [f"--local_scratch_dir={expected}"])


@pytest.mark.parametrize("name", ["train", ".lock", "validation"])
def test_scratch_is_refused_in_one_line_when_a_part_of_it_cannot_be_written(
    raw: Path, tmp_path: Path, name: str
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    if name == ".lock":
        (scratch / name).touch(mode=0o444)
    else:
        (scratch / name).mkdir(mode=0o555)
    flags = [f"--raw_data_dir={raw}", f"--local_scratch_dir={scratch}"]
    with started(*flags, "--nogcs_upload", *SHARDS, under=unprivileged()) as run:
        done = run.finish()
    assert done.status == 1
    [error] = done.errors
    assert error.startswith(f"Cannot write {scratch}/{name}")
    assert ": Permission denied" in error
    assert done.lines[-1] == f"ERROR: {error}"


# ------------------------------------------------------------------ the bucket


def run_upload(
    raw: Path, emulator: Emulator, *flags: str
) -> tuple[int, list[str], list[str]]:
    """Status, warnings and errors of a run that may upload."""
    done = run_command(
        f"--raw_data_dir={raw}", *UPLOAD, *SHARDS, *flags, env=emulator.environment
    )
    warnings = [line for line in done.lines if line.startswith("WARNING: ")]
    return done.status, warnings, done.errors


def test_bucket_is_refused_when_it_is_missing(raw: Path, emulator: Emulator) -> None:
    status, _, errors = run_upload(
        raw, emulator, "--gcs_output_path=gs://elsewhere/imagenet"
    )
    assert status == 1
    assert errors == [
        (
            "No bucket for gs://elsewhere/imagenet/manifest.json: 404 Not Found. "
            "Create it: gcloud storage buckets create gs://elsewhere"
        )
    ]
    assert not (raw / "tf_records").exists()
    assert uploads(emulator) == []


def test_bucket_is_refused_when_access_is_denied(raw: Path, emulator: Emulator) -> None:
    emulator.inject(Status(403, "Provided scope(s) are not authorized."), at=1)
    status, _, errors = run_upload(raw, emulator)
    assert status == 1
    assert errors == [
        (
            "Access to gs://bucket/imagenet/manifest.json is denied: 403 Provided "
            "scope(s) are not authorized. Grant roles/storage.objectUser on the bucket "
            "to the account of this run; a VM also needs the access scope "
            "cloud-platform."
        )
    ]
    assert not (raw / "tf_records").exists()
    assert kinds(emulator) == ["session"]


def test_all_is_uploaded_when_listing_is_denied(raw: Path, emulator: Emulator) -> None:
    emulator.inject(Status(403), kind="list", at=1, times=None)
    for _ in range(2):
        num_before = len(uploads(emulator))
        status, warnings, errors = run_upload(raw, emulator)
        assert (status, errors) == (0, [])
        assert warnings == [
            (
                "WARNING: Cannot list gs://bucket/imagenet (storage.objects.list is "
                "not granted): all shards will be uploaded, whatever is there."
            ),
            (
                "WARNING: Cannot list gs://bucket/imagenet: only the answer to each "
                "upload says that it is right."
            ),
        ]
        uploaded = uploads(emulator)[num_before:]
        assert len(uploaded) == 7
        assert uploaded[-1] == "manifest.json"


def test_bucket_is_refused_when_it_holds_shards_of_another_count(
    raw: Path, emulator: Emulator
) -> None:
    names = ["train-00000-of-01024", "train-00001-of-01024", "validation-x", "train-y"]
    for name in [*names, "trainer", "README"]:
        emulator.put(f"imagenet/{name}", b"x")
    emulator.put("imagenet/below/train-00000-of-00009", b"x")
    status, _, errors = run_upload(raw, emulator)
    assert status == 1
    assert errors == [
        (
            "gs://bucket/imagenet must hold no other train-* and validation-* than "
            "this run's, for models read them all; found train-00000-of-01024, "
            "train-00001-of-01024, train-y and 1 more. Delete them, or choose another "
            "directory."
        )
    ]
    assert uploads(emulator) == []
    assert not (raw / "tf_records").exists()


def test_run_is_refused_when_there_are_no_credentials(
    raw: Path, tmp_path: Path
) -> None:
    (tmp_path / "key.json").write_text("{}")
    for name, said in (("nowhere.json", "was not found"), ("key.json", "valid type")):
        env = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / name)}
        env["NO_GCE_CHECK"] = "true"
        done = run_command(f"--raw_data_dir={raw}", *UPLOAD, *SHARDS, env=env)
        assert done.status == 1
        [error] = done.errors
        assert error.startswith("No credentials for gs://bucket/imagenet: ")
        assert said in error
        assert error.endswith(
            ". Run `gcloud auth application-default login`, or attach a service "
            "account to the VM."
        )
    assert not (raw / "tf_records").exists()


# ------------------------------------------------------------------ --dry_run


def test_dry_run_prints_the_plan_and_writes_nothing(
    raw: Path, emulator: Emulator
) -> None:
    before = snapshot(raw.parent)
    done = run_command(
        f"--raw_data_dir={raw}", *UPLOAD, "--dry_run", env=emulator.environment
    )
    assert done.status == 0
    num_bytes = sum(path.stat().st_size for path in raw.rglob("*.JPEG"))
    assert done.lines == [
        (
            "Found 12 training images in 4 synsets and 4 validation images "
            f"({num_bytes / 1000:.1f} KB) in {raw}: training images in 4 directories, "
            "validation images in a directory."
        ),
        (
            f"Would write 1,152 shards of 16 images ({(num_bytes + 5600) / 1000:.1f} "
            f"KB) to {raw}/tf_records, and from there to gs://bucket/imagenet."
        ),
    ]
    assert snapshot(raw.parent) == before
    assert kinds(emulator) == ["session", "other", "list"]
    assert emulator.objects() == {}


def test_dry_run_draws_nothing_when_asked_for_a_fake_imagenet(tmp_path: Path) -> None:
    done = run_command(
        f"--raw_data_dir={tmp_path}/raw",
        "--nogcs_upload",
        "--fake_imagenet",
        "--dry_run",
    )
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--fake_imagenet",),
        ("--fake_imagenet", "--raw_data_dir={0}/raw", "--num_workers=-1"),
        ("--fake_imagenet", "--raw_data_dir={0}/raw", "--training_shards=0"),
        ("--fake_imagenet", "--raw_data_dir={0}/raw", "--gcs_upload"),
    ],
    ids=["no_directory", "workers", "shards", "no_project"],
)
def test_nothing_is_drawn_when_other_flags_are_wrong(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    done = run_command("--nogcs_upload", *(flag.format(tmp_path) for flag in flags))
    assert done.status == 1
    assert done.errors
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
