"""The fake ImageNet, if you have no ImageNet yet."""

import collections
import io
from pathlib import Path

import contract
import pytest
from command import Finished, run_code, run_command
from PIL import Image
from processes import small_disk

import imagenet_to_gcs as script


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """What the command says when it generates a fake, and the fake."""
    raw = tmp_path_factory.mktemp("fake") / "new" / "imagenet"
    flags = ["--fake_imagenet", f"--raw_data_dir={raw}", "--nogcs_upload"]
    return run_command(*flags), raw


def test_fake_has_the_shape_of_imagenet(fake: tuple[Finished, Path]) -> None:
    done, raw = fake
    assert done.status == 0, done.stderr
    assert done.lines[0] == f"Generating 2,304 fake images in {raw}."
    images = "2,048 training images in 1,000 synsets and 256 validation images"
    assert any(line.startswith(f"Found {images}") for line in done.lines)
    assert not [line for line in done.lines if line.startswith("WARNING")]
    paths = list((raw / "train").glob("*/*.JPEG"))
    classes = collections.Counter(path.parent.name for path in paths)
    assert len(classes) == 1_000
    assert set(classes.values()) == {2, 3}
    labels = (raw / "synset_labels.txt").read_text().split()
    assert len(labels) == 256
    assert set(labels) <= set(classes)


def test_fake_images_are_as_large_as_photographs(fake: tuple[Finished, Path]) -> None:
    contents = [path.read_bytes() for path in fake[1].glob("*/**/*.JPEG")]
    assert len(set(contents)) == len(contents) == 2_048 + 256
    assert 30_000 <= min(map(len, contents)) <= max(map(len, contents)) <= 100_000
    for data in contents:
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))


def test_fake_fills_all_shards(fake: tuple[Finished, Path]) -> None:
    raw = fake[1]
    shards = contract.local_shards(raw / "tf_records")
    assert len(shards) == 1_152
    assert min(len(data) for data in shards.values()) > 30_000
    expected = contract.expected_shards(raw)
    for name in list(expected)[::50]:
        contract._assert_records(contract.read_shard(shards[name]), expected[name])


def test_fake_is_used_again_when_it_is_there(fake: tuple[Finished, Path]) -> None:
    raw = fake[1]

    def times() -> dict[Path, int]:
        files = [path for path in raw.rglob("*") if path.suffix == ".JPEG"]
        files += (raw / "tf_records").glob("*/*-of-*")
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    again = run_command("--fake_imagenet", f"--raw_data_dir={raw}", "--nogcs_upload")
    assert again.status == 0, again.stderr
    assert not [line for line in again.lines if line.startswith("Generating")]
    assert times() == before


GENERATE = """if True:
    import contextlib
    import pathlib
    import sys
    from absl import logging
    import imagenet_to_gcs
    logging.set_verbosity(logging.INFO)
    imagenet_to_gcs.FAKE_TRAINING_IMAGES = 20
    imagenet_to_gcs.FAKE_VALIDATION_IMAGES = 4
    raw = pathlib.Path(sys.argv[1])
    (raw / "shards").mkdir(parents=True)
    (raw / "shards" / ".lock").touch()

    def make_fake(num_workers):
        local = str(raw), False, None, None, f"{raw}/shards"
        options = imagenet_to_gcs.Options(*local, num_workers=num_workers)
        with contextlib.closing(imagenet_to_gcs.Pool(num_workers)) as pool:
            imagenet_to_gcs.make_fake_imagenet(options, pool)

    make_fake(2)

    def contents():
        return {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}

    complete = contents()
    (raw / "synset_labels.txt").unlink()  # written last
    (raw / "train/n90000003/n90000003_0.JPEG").write_bytes(b"half")
    for path in (raw / "validation").iterdir():
        path.unlink()
    make_fake(1)
    print(len(complete), contents() == complete)
"""


def test_fake_is_the_same_however_often_it_is_interrupted(
    tmp_path: Path, fake: tuple[Finished, Path]
) -> None:
    """With any number of workers; it may contain the scratch directory already."""
    done = run_code(GENERATE, str(tmp_path / "raw"))
    assert done.stdout == "27 True\n", done.stderr
    name = "train/n90000000/n90000000_0.JPEG"
    image = (tmp_path / "raw" / name).read_bytes()
    assert image == (fake[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("names", "found"),
    [
        pytest.param([".hidden"], ".hidden", id="a hidden file"),
        pytest.param(list("abcdef"), "a, b, c and 3 more", id="many files"),
        pytest.param(
            ["synset_labels.txt", "train"],
            "synset_labels.txt, train",
            id="another ImageNet",
        ),
    ],
)
def test_fake_is_refused_when_the_directory_contains_something_else(
    tmp_path: Path, names: list[str], found: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    done = run_command(
        "--fake_imagenet", f"--raw_data_dir={tmp_path}", "--nogcs_upload"
    )
    error = (
        f"--raw_data_dir={tmp_path} must be empty or missing for --fake_imagenet; it "
        f"contains {found}. Choose another directory."
    )
    assert (done.status, done.errors) == (1, [error])
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_fake_image_is_named_when_it_cannot_be_written(tmp_path: Path) -> None:
    """As on a disk that something else fills meanwhile."""
    with small_disk(tmp_path / "disk", 20_000) as disk:
        path = disk / "train" / "x.JPEG"
        with pytest.raises(script.MachineError) as caught:
            script.draw_fake_image(path, 0)
    assert str(caught.value) == (
        f"Cannot write {path}: No space left on device. Fix this and rerun the same "
        "command."
    )


def test_mark_of_a_fake_neither_gives_images_away_nor_silences_warnings(
    raw: Path,
) -> None:
    """It may be left where the real ImageNet has been put since."""
    (raw / ".fake_imagenet").touch()
    (raw / "train" / "x.jpg").touch()
    flags = [f"--raw_data_dir={raw}", "--nogcs_upload"]
    done = run_command("--dry_run", *flags)
    assert done.status == 0, done.stderr
    assert any("WARNING: Skipped " in line for line in done.lines)
    (raw / "synset_labels.txt").unlink()
    before = {path: path.read_bytes() for path in raw.rglob("*.JPEG")}
    done = run_command("--fake_imagenet", *flags)
    [error] = done.errors
    assert error.startswith(f"--raw_data_dir={raw} must be empty or missing for")
    assert {path: path.read_bytes() for path in raw.rglob("*.JPEG")} == before
