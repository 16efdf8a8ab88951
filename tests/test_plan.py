"""Which image goes into which shard."""

import collections
import dataclasses
import re
from pathlib import Path
from typing import Any

import contract
import pytest

import imagenet_to_gcs as script


def make_images(number: int) -> list[script.RawImage]:
    """Makes images of files that do not exist: a plan must not look at any."""
    return [
        script.RawImage("/no/such", f"{i:05d}.JPEG", f"n{i % 7}", 100 + i, i)
        for i in range(number)
    ]


@pytest.mark.parametrize(
    ("num_images", "num_shards", "sizes"),
    [
        pytest.param(8, 4, [2, 2, 2, 2], id="even"),
        pytest.param(5, 4, [2, 2, 1, 0], id="last shorter and empty"),
        pytest.param(9, 4, [3, 3, 3, 0], id="last empty"),
        pytest.param(2, 4, [1, 1, 0, 0], id="fewer images than shards"),
        pytest.param(0, 3, [0, 0, 0], id="no images"),
        pytest.param(3, 1, [3], id="one shard"),
        pytest.param(1_025, 1_024, [2] * 512 + [1] + [0] * 511, id="one too many"),
        pytest.param(50_000, 128, [391] * 127 + [343], id="ImageNet validation"),
    ],
)
def test_chunks_are_equal_but_for_the_last(
    num_images: int, num_shards: int, sizes: list[int]
) -> None:
    """And no image is lost."""
    images = make_images(num_images)
    dataset = script.Dataset((), images, images)
    shards = script.plan_shards(dataset, num_shards, num_shards)
    assert [len(shard.images) for shard in shards] == [*sizes, *sizes]
    for split in (shards[:num_shards], shards[num_shards:]):
        found = [image for shard in split for image in shard.images]
        assert sorted(found, key=lambda image: image.filename) == images
    assert images == make_images(num_images), "the caller's list was shuffled"


@pytest.mark.parametrize(
    ("training_shards", "validation_shards"), [(1_024, 128), (3, 2), (1, 1), (5, 7)]
)
def test_plan_is_the_contracts(
    raw: Path, training_shards: int, validation_shards: int
) -> None:
    """Some labels are of synsets without training images."""
    labels = ["n00000001", "n01440764", "n01440801", "n09999999"]
    (raw / "synset_labels.txt").write_text("\n".join(labels))
    numbers = (training_shards, validation_shards)
    shards = script.plan_shards(script.read_dataset(str(raw)), *numbers)
    found = {
        shard.name: [
            contract.ExpectedRecord(
                i.filename, shard.labels[i.synset], i.synset, i.path
            )
            for i in shard.images
        ]
        for shard in shards
    }
    assert found == contract.expected_shards(raw, *numbers)


# ----------------------------------------------------------------------- the digest

LABELS = collections.defaultdict(int, {f"n{i}": i for i in range(10)})
SHARD = script.Shard("train", 3, 8, tuple(make_images(5)), LABELS)


def with_image(**changes: Any) -> script.Shard:
    """Changes the third image of the shard."""
    images = list(SHARD.images)
    images[2] = images[2]._replace(**changes)
    return dataclasses.replace(SHARD, images=tuple(images))


def with_images(*images: script.RawImage) -> script.Shard:
    return dataclasses.replace(SHARD, images=images)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(with_image(name="x.JPEG"), id="file name"),
        pytest.param(with_image(name="\udcff.JPEG"), id="file name not in UTF-8"),
        pytest.param(with_image(synset="n9"), id="synset"),
        pytest.param(
            dataclasses.replace(SHARD, labels={**LABELS, "n2": 9}), id="label"
        ),
        pytest.param(with_image(num_bytes=9), id="size"),
        pytest.param(with_images(*SHARD.images[::-1]), id="order"),
        pytest.param(with_images(*SHARD.images[:-1]), id="image removed"),
        pytest.param(with_images(*SHARD.images, SHARD.images[0]), id="image added"),
        pytest.param(with_images(), id="no images"),
        pytest.param(dataclasses.replace(SHARD, index=4), id="index"),
        pytest.param(dataclasses.replace(SHARD, num_shards=9), id="number of shards"),
        pytest.param(dataclasses.replace(SHARD, split="validation"), id="split"),
    ],
)
def test_digest_changes_with_the_plan(changed: script.Shard) -> None:
    assert changed.digest() != SHARD.digest()
    assert re.fullmatch("[0-9a-f]{64}", changed.digest())


def test_digest_changes_with_the_record_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = SHARD.digest()
    monkeypatch.setattr(script, "RECORD_FORMAT", script.RECORD_FORMAT + 1)
    assert SHARD.digest() != before


@pytest.mark.parametrize("separator", [" ", "\n", "\t", " 1 9\n", " 1 9 9\n"])
def test_digest_differs_when_only_the_borders_of_the_names_do(separator: str) -> None:
    """A file's or a directory's name may hold anything but `/` and NUL."""

    def image(filename: str, synset: str) -> script.RawImage:
        return script.RawImage("/no/such", filename, synset, 9, 9)

    shards = [
        with_images(image(f"a{separator}b", "c")),
        with_images(image("a", f"b{separator}c")),
        with_images(image("a", f"b{separator}c b")),
        with_images(image("a", "b"), image("c", "b")),
    ]
    assert len({shard.digest() for shard in shards}) == len(shards)


@pytest.mark.parametrize(
    ("changed", "fingerprint_changes"),
    [
        pytest.param(dataclasses.replace(SHARD), False, id="nothing"),
        pytest.param(with_image(source="/moved"), False, id="place"),
        pytest.param(with_image(fingerprint=9), True, id="time of modification"),
        pytest.param(
            with_image(fingerprint=(1, 2, 3)), True, id="fingerprint of the tar"
        ),
        pytest.param(with_image(offset=512), True, id="offset in the tar"),
    ],
)
def test_digest_is_the_same_on_every_machine(
    changed: script.Shard, fingerprint_changes: bool
) -> None:
    """Times and places are no part of it; of the fingerprint, they are all."""
    assert changed.digest() == SHARD.digest()
    assert (changed.fingerprint() != SHARD.fingerprint()) == fingerprint_changes
