"""Section 2: which image goes into which shard."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import pytest

import imagenet_to_gcs as script


def make_images(number: int) -> list[script.RawImage]:
    """Makes images of files that do not exist: a plan must not look at any."""
    return [
        script.RawImage("/no/such", f"{i:05d}.JPEG", f"n{i % 7}", i % 7 + 1, 100 + i, i)
        for i in range(number)
    ]


def plan(
    training: int, validation: int, training_shards: int, validation_shards: int
) -> list[script.Shard]:
    dataset = script.Dataset((), make_images(training), make_images(validation), "")
    return script.plan_shards(dataset, training_shards, validation_shards)


@pytest.mark.parametrize(
    ("num_images", "num_shards", "sizes"),
    [
        pytest.param(8, 4, [2, 2, 2, 2], id="even"),
        pytest.param(5, 4, [2, 2, 1, 0], id="last shorter and empty"),
        pytest.param(9, 4, [3, 3, 3, 0], id="last empty"),
        pytest.param(2, 4, [1, 1, 0, 0], id="fewer images than shards"),
        pytest.param(0, 3, [0, 0, 0], id="no images"),
        pytest.param(3, 1, [3], id="one shard"),
        pytest.param(50_000, 128, [391] * 127 + [343], id="ImageNet validation"),
    ],
)
def test_chunks_are_equal_but_for_the_last(
    num_images: int, num_shards: int, sizes: list[int]
) -> None:
    for shards in (
        plan(num_images, 0, num_shards, 1)[:-1],
        plan(0, num_images, 1, num_shards)[1:],
    ):
        assert [len(shard.images) for shard in shards] == sizes


@pytest.mark.parametrize("num_images", [1, 1_023, 1_024, 1_025, 99_999])
def test_no_image_is_lost(num_images: int) -> None:
    shards = plan(num_images, num_images, 1_024, 128)
    for split, num_shards in (("train", 1_024), ("validation", 128)):
        images = [i for shard in shards if shard.split == split for i in shard.images]
        assert sorted(images, key=lambda i: i.version) == make_images(num_images)
        size = math.ceil(num_images / num_shards)
        assert max(len(s.images) for s in shards if s.split == split) == size


def test_names_are_the_references() -> None:
    names = [shard.name for shard in plan(1, 1, 1_024, 128)]
    assert names == list(contract._cut("train", [], 1_024)) + list(
        contract._cut("validation", [], 128)
    )
    assert names[0] == "train-00000-of-01024"
    assert names[-1] == "validation-00127-of-00128"


@pytest.mark.parametrize(
    ("training_shards", "validation_shards"), [(1_024, 128), (3, 2), (1, 1), (5, 7)]
)
def test_plan_is_the_contracts(
    raw: Path, training_shards: int, validation_shards: int
) -> None:
    numbers = (training_shards, validation_shards)
    shards = script.plan_shards(script.read_dataset(str(raw)), *numbers)
    found = {
        shard.name: [
            contract.ExpectedRecord(i.filename, i.label, i.synset, i.path)
            for i in shard.images
        ]
        for shard in shards
    }
    assert found == contract.expected_shards(raw, *numbers)


def test_plan_is_the_contracts_for_the_sample(sample: Path) -> None:
    shards = script.plan_shards(script.read_dataset(str(sample)))
    found = {shard.name: [i.path for i in shard.images] for shard in shards}
    expected = contract.expected_shards(sample)
    assert found == {name: [r.path for r in expected[name]] for name in expected}


def test_plan_is_pure() -> None:
    dataset = script.Dataset((), make_images(20), make_images(10), "")
    first = script.plan_shards(dataset, 4, 2)
    assert first == script.plan_shards(dataset, 4, 2)
    assert dataset == script.Dataset((), make_images(20), make_images(10), "")


def test_shard_says_the_bytes_it_will_take() -> None:
    shard = script.Shard("train", 0, 1, tuple(make_images(3)))
    assert shard.num_bytes == 100 + 101 + 102 + 3 * script.RECORD_OVERHEAD


@pytest.mark.parametrize(
    ("index", "num_shards", "message"),
    [
        (5, 5, "No shard 5 of 5."),
        (-1, 5, "No shard -1 of 5."),
        (0, 0, "No shard 0 of 0."),
        (1_024, 1_024, "No shard 1,024 of 1,024."),
    ],
)
def test_shard_is_refused_when_its_number_is_impossible(
    index: int, num_shards: int, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        script.Shard("train", index, num_shards, ())
    assert str(caught.value) == message


SHARD = script.Shard("train", 3, 8, tuple(make_images(5)))


def with_image(**changes: Any) -> script.Shard:
    """Changes the third image of the shard."""
    images = list(SHARD.images)
    images[2] = images[2]._replace(**changes)
    return dataclasses.replace(SHARD, images=tuple(images))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(with_image(filename="x.JPEG"), id="file name"),
        pytest.param(with_image(synset="n9"), id="synset"),
        pytest.param(with_image(label=9), id="label"),
        pytest.param(with_image(num_bytes=9), id="size"),
        pytest.param(with_image(version=9), id="time"),
        pytest.param(dataclasses.replace(SHARD, images=SHARD.images[::-1]), id="order"),
        pytest.param(
            dataclasses.replace(SHARD, images=SHARD.images[:-1]), id="image removed"
        ),
        pytest.param(
            dataclasses.replace(SHARD, images=SHARD.images + SHARD.images[:1]),
            id="image added",
        ),
        pytest.param(dataclasses.replace(SHARD, images=()), id="no images"),
        pytest.param(dataclasses.replace(SHARD, index=4), id="index"),
        pytest.param(dataclasses.replace(SHARD, num_shards=9), id="number of shards"),
        pytest.param(dataclasses.replace(SHARD, split="validation"), id="split"),
    ],
)
def test_digest_changes(changed: script.Shard) -> None:
    assert changed.digest() != SHARD.digest()


def test_digest_changes_with_the_record_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = SHARD.digest()
    monkeypatch.setattr(script, "RECORD_FORMAT", script.RECORD_FORMAT + 1)
    assert SHARD.digest() != before


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: dataclasses.replace(SHARD), id="nothing changed"),
        pytest.param(
            lambda: dataclasses.replace(
                SHARD,
                images=tuple(i._replace(source="/moved") for i in SHARD.images),
            ),
            id="raw directory moved",
        ),
    ],
)
def test_digest_stays(make: Callable[[], script.Shard]) -> None:
    assert make().digest() == SHARD.digest()


def test_digest_is_64_hexadecimal_digits_when_a_name_is_not_utf8() -> None:
    for shard in (SHARD, with_image(filename="\udcff.JPEG")):
        assert len(shard.digest()) == 64
        assert int(shard.digest(), 16) >= 0
