"""Section 9: the fake ImageNet, for who has no ImageNet (yet)."""

import collections
import io
from dataclasses import dataclass
from pathlib import Path

import contract
import pytest
from command import Finished, run_code, run_command
from PIL import Image

import imagenet_to_gcs as script


@dataclass(frozen=True)
class Fake:
    """The fake ImageNet, and what the command said when it drew and when it resumed."""

    drawn: Finished
    again: Finished
    raw: Path
    changed: list[str]  # by the second run


def times_of(directory: Path) -> dict[str, int]:
    return {
        str(path.relative_to(directory)): path.stat().st_mtime_ns
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    raw = tmp_path_factory.mktemp("fake") / "new" / "imagenet"
    flags = ["--fake_imagenet", f"--raw_data_dir={raw}", "--nogcs_upload"]
    drawn = run_command(*flags, timeout=500)
    before = times_of(raw)
    again = run_command(*flags)
    after = times_of(raw)
    changed = [
        name
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    return Fake(drawn, again, raw, changed)


def test_fake_has_the_shape_of_imagenet(fake: Fake) -> None:
    assert fake.drawn.status == 0, fake.drawn.stderr
    assert fake.drawn.lines[0] == f"Drawing 2,304 fake images into {fake.raw}."
    assert (
        "Found 2,048 training images in 1,000 synsets and 256 validation images"
    ) in fake.drawn.lines[1]
    assert not [line for line in fake.drawn.lines if line.startswith("WARNING")]
    classes = collections.Counter(
        path.parent.name for path in (fake.raw / "train").glob("*/*.JPEG")
    )
    assert len(classes) == 1_000
    assert set(classes.values()) == {2, 3}
    labels = (fake.raw / "synset_labels.txt").read_text().split()
    assert len(labels) == 256
    assert set(labels) <= set(classes)


def test_fake_images_look_like_photographs(fake: Fake) -> None:
    paths = sorted(fake.raw.glob("*/**/*.JPEG"))
    assert len(paths) == 2_048 + 256
    contents = [path.read_bytes() for path in paths]
    assert len(set(contents)) == len(contents)
    sizes = [len(data) for data in contents]
    assert min(sizes) >= 30_000
    assert max(sizes) <= 100_000
    for data in contents:
        image = Image.open(io.BytesIO(data))
        found = (image.format, image.mode, image.size)
        assert found == ("JPEG", "RGB", (500, 375))


def test_fake_fills_all_shards(fake: Fake) -> None:
    scratch = fake.raw / "tf_records"
    shards = contract.local_shards(scratch)
    assert len(shards) == 1_152
    assert min(len(data) for data in shards.values()) > 30_000
    expected = contract.expected_shards(fake.raw)
    for name in list(expected)[::50]:
        contract._assert_records(contract.read_shard(shards[name]), expected[name])


def test_fake_is_used_again_when_it_is_there(fake: Fake) -> None:
    assert fake.again.status == 0, fake.again.stderr
    assert not [line for line in fake.again.lines if line.startswith("Drawing")]
    assert (
        "Resuming: 1,152 of 1,152 shards are up to date, 0 only to be uploaded."
    ) in fake.again.lines
    assert [name for name in fake.changed if name.endswith(".JPEG")] == []
    assert [name for name in fake.changed if name.startswith("tf_records/t")] == []


def test_fake_image_is_the_same_each_time(fake: Fake, tmp_path: Path) -> None:
    """Also in another process than that which drew it."""
    script.draw_fake_image(tmp_path / "a" / "first.JPEG", 0)
    script.draw_fake_image(tmp_path / "a" / "second.JPEG", 0)
    first = (tmp_path / "a" / "first.JPEG").read_bytes()
    assert first == (tmp_path / "a" / "second.JPEG").read_bytes()
    assert first == (fake.raw / "train/n90000000/n90000000_0.JPEG").read_bytes()


DRAW = """if True:
    import pathlib
    import sys
    import imagenet_to_gcs
    imagenet_to_gcs.FAKE_TRAINING_IMAGES = 20
    imagenet_to_gcs.FAKE_VALIDATION_IMAGES = 4
    if __name__ == "__main__":
        raw = pathlib.Path(sys.argv[1])
        imagenet_to_gcs.make_fake_imagenet(str(raw), 2)

        def contents():
            return {
                path: path.read_bytes() for path in raw.rglob("*") if path.is_file()
            }

        complete = contents()
        (raw / "synset_labels.txt").unlink()  # written last
        (raw / "train/n90000003/n90000003_0.JPEG").write_bytes(b"half")
        for path in (raw / "validation").iterdir():
            path.unlink()
        imagenet_to_gcs.make_fake_imagenet(str(raw), 1)
        print(len(complete), contents() == complete)
"""


def test_fake_goes_on_when_its_drawing_was_cut_off(tmp_path: Path) -> None:
    finished = run_code(DRAW, str(tmp_path / "raw"))
    assert finished.stdout == "26 True\n", finished.stderr


@pytest.mark.parametrize(
    ("names", "found"),
    [
        pytest.param(["notes.txt"], "notes.txt", id="a file"),
        pytest.param([".hidden"], ".hidden", id="a hidden file"),
        pytest.param(
            ["a", "b", "c", "d", "e", "f"], "a, b, c and 3 more", id="many files"
        ),
        pytest.param(
            ["synset_labels.txt", "train"],
            "synset_labels.txt, train",
            id="another ImageNet",
        ),
    ],
)
def test_fake_is_refused_when_the_directory_holds_something_else(
    tmp_path: Path, names: list[str], found: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    finished = run_command(
        "--fake_imagenet", f"--raw_data_dir={tmp_path}", "--nogcs_upload"
    )
    assert finished.status == 1
    assert finished.lines == [
        (
            f"ERROR: --fake_imagenet must find --raw_data_dir={tmp_path} empty or "
            f"absent; it holds {found}."
        )
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        pytest.param(
            ["--nogcs_upload"],
            "--raw_data_dir must name the directory of the raw ImageNet.",
            id="no directory",
        ),
        pytest.param(
            ["--raw_data_dir={}/new", "--gcs_output_path=gs://bucket"],
            "--project must be given for the upload (or pass --nogcs_upload).",
            id="no project",
        ),
        pytest.param(
            ["--raw_data_dir={}/new", "--nogcs_upload", "--num_workers=0"],
            "--num_workers must be from 1 to 99,999; found 0.",
            id="no workers",
        ),
        pytest.param(
            ["--raw_data_dir={}/new", "--nogcs_upload", "--num_workers=-1"],
            "--num_workers must be from 1 to 99,999; found -1.",
            id="less than no workers",
        ),
    ],
)
def test_fake_is_not_drawn_when_the_flags_are_wrong(
    tmp_path: Path, flags: list[str], error: str
) -> None:
    given = [flag.replace("{}", str(tmp_path)) for flag in flags]
    finished = run_command("--fake_imagenet", *given, cwd=tmp_path)
    assert (finished.status, finished.lines) == (1, [f"ERROR: {error}"])
    assert list(tmp_path.iterdir()) == []


def test_fake_is_refused_when_the_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "raw").touch()
    finished = run_command(
        "--fake_imagenet", f"--raw_data_dir={tmp_path}/raw", "--nogcs_upload"
    )
    assert finished.status == 1
    assert len(finished.errors) == len(finished.lines) == 1
    assert f"--raw_data_dir={tmp_path}/raw" in finished.errors[0]
