"""Cloud Storage, by the real client over HTTP."""

import functools
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import contract
import pytest
from command import Finished, run_code, run_command
from emulator import Emulator, Status, crc32c_of
from processes import contents

import imagenet_to_gcs as script

SMALL = ("--training_shards=2", "--validation_shards=1")
SMALL_NAMES = [
    "train-00000-of-00002",
    "train-00001-of-00002",
    "validation-00000-of-00001",
]


# ------------------------------------------------------------------------- the path


@pytest.mark.parametrize(
    ("text", "bucket", "directory", "printed"),
    [
        ("gs://bucket", "bucket", "", "gs://bucket"),
        ("gs://bucket/", "bucket", "", "gs://bucket"),
        ("gs://bucket/imagenet", "bucket", "imagenet", "gs://bucket/imagenet"),
        ("gs://bucket/imagenet/", "bucket", "imagenet", "gs://bucket/imagenet"),
        ("gs://bucket/a/b c/", "bucket", "a/b c", "gs://bucket/a/b c"),
        ("gs://my-b_1.example.com/a", "my-b_1.example.com", "a", None),
        ("gs://abc", "abc", "", None),
        ("gs://" + "b" * 63, "b" * 63, "", None),
        ("gs://1.2.3", "1.2.3", "", None),
    ],
)
def test_path_is_parsed(
    text: str, bucket: str, directory: str, printed: str | None
) -> None:
    path = script.GcsPath.parse(text)
    assert (path.bucket, path.directory) == (bucket, directory)
    assert str(path) == (printed or text)
    names = [name for name in (directory, "train-0") if name]
    assert path.name_of("train-0") == "/".join(names)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("bucket/imagenet", None),
        ("/home/me/imagenet", None),
        ("s3://bucket/imagenet", None),
        ("gs:/bucket", None),
        ("GS://bucket", None),
        ("gs://", ""),
        ("gs:///imagenet", ""),
        ("gs://ab", "ab"),
        ("gs://My-Bucket/imagenet", "My-Bucket"),
        ("gs://bucket-", "bucket-"),
        ("gs://$BUCKET/imagenet", "$BUCKET"),
        ("gs://-a", "-a"),
        ("gs://-ab", "-ab"),
    ],
)
def test_path_is_refused(text: str, found: str | None) -> None:
    if found is None:
        problem = "must start with gs://, as in gs://bucket/directory."
    else:
        problem = f"must name a bucket after gs://; found {found!r}."
    with pytest.raises(ValueError) as caught:
        script.GcsPath.parse(text)
    assert str(caught.value) == f"--gcs_output_path={text} {problem}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gs://bucket/a\n", r"'\n'"),
        ("gs://bucket\r", r"'\r'"),
        ("gs://bucket/a\tb", r"'\t'"),
        ("gs://bucket/a ", "a final blank"),
        (" gs://bucket/a", None),
        ("gs://bucket/a*", "'*'"),
        ("gs://bucket/a?b#[1]", "'?', '#', '[', ']'"),
        ("gs://bucket/../a", "'..'"),
        ("gs://bucket/./a", "'.'"),
        ("gs://bucket//a", "'//'"),
        ("gs://bucket/a//", "'//'"),
        ("gs://bucket/\udcff", r"'\udcff'"),
    ],
)
def test_path_is_refused_when_it_holds_what_nobody_means(
    text: str, found: str | None
) -> None:
    with pytest.raises(script.InvalidInputError) as caught:
        script.GcsPath.parse(text)
    shown = text.encode("unicode_escape").decode()
    line = f"--gcs_output_path={shown} must not contain {found}: "
    line += "readers would not find the data set."
    if found is None:
        line = f"--gcs_output_path={shown} must start with gs://, as in "
        line += "gs://bucket/directory."
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "name", ["$USER", "it's", 'a"b', "a b", "ü/日本", "a.b", "..a"]
)
def test_path_may_hold_what_is_merely_rare(name: str) -> None:
    assert script.GcsPath.parse(f"gs://bucket/{name}").directory == name


# ------------------------------------------------------------------ the guide's command


@dataclass(frozen=True)
class Guide:
    """The guide's command, finished."""

    finished: Finished
    emulator: Emulator
    raw: Path

    @functools.cached_property
    def objects(self) -> dict[str, bytes]:
        """As a reader finds them in the bucket once the command has ended."""
        return self.emulator.objects()


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    kinds = ("baseline", "png", "cmyk", "progressive")
    raw = contract.make_raw(tmp_path_factory.mktemp("guide") / "raw", kinds=kinds)
    with Emulator() as emulator:
        finished = run_command(
            "--project=my-project",
            "--gcs_output_path=gs://bucket/data/imagenet",
            f"--raw_data_dir={raw}",
            f"--local_scratch_dir={raw}/tf_records",
            env=emulator.environment,
        )
        yield Guide(finished, emulator, raw)


def test_guide_uploads_the_contracts_records_flat_and_the_manifest_last(
    guide: Guide,
) -> None:
    assert guide.finished.status == 0, guide.finished.stderr
    names = [r.name for r in guide.emulator.requests if r.kind == "chunk"]
    assert len(names) == 1_153
    assert names[-1] == "data/imagenet/manifest.json"
    assert sorted(names) == sorted(guide.objects)
    shards = {name.rpartition("/")[2]: data for name, data in guide.objects.items()}
    manifest = shards.pop("manifest.json")
    assert manifest == (guide.raw / "tf_records/manifest.json").read_bytes()
    assert sorted(shards) == sorted(contract.expected_shards(guide.raw))
    contract.assert_shards(shards, guide.raw)
    assert shards == contract.local_shards(guide.raw / "tf_records")


def test_manifest_lists_what_there_is(guide: Guide) -> None:
    manifest = json.loads(guide.objects["data/imagenet/manifest.json"])
    shards = [
        (name, guide.objects[f"data/imagenet/{name}"], len(records))
        for name, records in contract.expected_shards(guide.raw).items()
    ]
    assert manifest == {
        "examples": {"train": 12, "validation": 4},
        "bytes": sum(len(data) for _, data, _ in shards),
        "labels": {
            "1": "n01440764",
            "2": "n01440801",
            "3": "n01440838",
            "4": "n01440875",
        },
        "shards": [
            {
                "name": name,
                "examples": num_records,
                "bytes": len(data),
                "crc32c": crc32c_of(data),
            }
            for name, data, num_records in shards
        ],
        "imagenet_1k": {"classes": False, "validation_labels": False},
    }


def test_object_carries_the_digest_of_its_shard(guide: Guide) -> None:
    """And its checksum, for the digest does not hold where the bytes are others."""
    for shard in script.plan_shards(script.read_dataset(str(guide.raw))):
        name = f"data/imagenet/{shard.name}"
        assert guide.emulator.metadata(name) == {
            "digest": shard.digest(),
            "crc32c": crc32c_of(guide.objects[name]),
        }


def test_guide_tries_the_access_first_and_needs_no_permission_on_buckets(
    guide: Guide,
) -> None:
    """Roles for objects lack `storage.buckets.get`: a 403 after hours of encoding."""
    requests = guide.emulator.requests
    first, second = requests[:2]
    assert first.kind == "list"
    assert (second.kind, second.name) == (
        "session",
        "data/imagenet/train-00000-of-01024",
    )
    assert all("/b/bucket/o" in r.path.partition("?")[0] for r in requests)
    assert not any("userProject" in r.query for r in requests)
    kinds = [request.kind for request in requests]
    assert kinds.count("list") == 1 + 2  # the second one has two pages
    assert set(kinds) <= {"session", "list", "chunk"}


def test_guide_ends_with_what_to_give_the_model(guide: Guide) -> None:
    done, encoded, complete = guide.finished.lines[-3:]
    assert re.fullmatch(
        r"Done in \d+ s: 1,152 of 1,152 shards written, 1,152 uploaded, "
        r"\d+ images/s, [\d.]+ (bytes|KB)/s\.",
        done,
    )
    assert re.fullmatch(
        r"The data set is complete: 16 images in 1,152 shards \([\d.]+ KB\) in "
        r"gs://bucket/data/imagenet: give the model "
        r"--data_dir=gs://bucket/data/imagenet\.",
        complete,
    )
    assert encoded.startswith("Encoded ")
    assert not [line for line in guide.finished.lines if line.startswith("WARNING")]


# ------------------------------------------------------------- imported by a program

PROGRAM = """if True:
    import os
    import sys
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage
    import imagenet_to_gcs
    raw, scratch, url = sys.argv[1:]
    # Another client would find neither the emulator nor credentials.
    client = storage.Client(
        project="p",
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": url},
    )
    imagenet_to_gcs.run(
        raw_data_dir=raw,
        gcs_upload=True,
        gcs_project="p",
        gcs_output_path="gs://bucket/run",
        local_scratch_dir=scratch,
        client=client,
        training_shards=2,
        validation_shards=1,
    )
    train = [f"{scratch}/train/train-0000{i}-of-00002" for i in range(2)]
    validation = [f"{scratch}/validation/validation-00000-of-00001"]
    for path in ("gs://bucket", "gs://bucket/a/b/"):
        imagenet_to_gcs.upload_to_gcs(train, validation, path, None, client=client)
    num_before = len(list(client.list_blobs("bucket")))
    os.unlink(f"{scratch}/train/.train-00000-of-00002.json")
    imagenet_to_gcs.upload_to_gcs(train, validation, "gs://bucket/a/b", "p", client)
    print(num_before)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    raw = contract.make_raw(tmp_path_factory.mktemp("program") / "raw")
    with Emulator() as emulator:
        finished = run_code(
            PROGRAM,
            str(raw),
            str(raw.parent / "scratch"),
            emulator.url,
            env={"NO_GCE_CHECK": "true", "GOOGLE_APPLICATION_CREDENTIALS": "/no/file"},
        )
        yield Guide(finished, emulator, raw)


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        pytest.param("run/", ["manifest.json"], id="run"),
        pytest.param("", [], id="upload_to_gcs, to the bucket itself"),
        pytest.param("a/b/", [], id="upload_to_gcs, to a directory"),
    ],
)
def test_client_is_used_when_given(
    program: Guide, prefix: str, others: list[str]
) -> None:
    assert program.finished.status == 0, program.finished.stderr
    found = {
        name.removeprefix(prefix): data
        for name, data in program.objects.items()
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    }
    assert sorted(found) == sorted([*SMALL_NAMES, *others])
    for name in others:
        del found[name]
    contract.assert_shards(found, program.raw, 2, 1)


def test_upload_to_gcs_uploads_nothing_when_all_is_there(program: Guide) -> None:
    """Nor where a stamp is lost: then the file is read for its checksum."""
    assert program.finished.stdout == "10\n"
    uploads = [r.name for r in program.emulator.requests if r.kind == "chunk"]
    assert len(uploads) == len(set(uploads)) == 10


# --------------------------------------------------------- an upload that cannot work


def upload(
    raw: Path, emulator: Emulator, path: str = "gs://bucket/imagenet"
) -> Finished:
    return run_command(
        "--project=my-project",
        f"--gcs_output_path={path}",
        f"--raw_data_dir={raw}",
        *SMALL,
        env=emulator.environment,
    )


def assert_refused(finished: Finished, raw: Path, *errors: str) -> None:
    """Asserts the error lines, and that nothing was written."""
    assert (finished.status, finished.errors) == (1, list(errors))
    assert finished.lines[-1] == f"ERROR: {errors[-1]}"
    assert "Traceback" not in finished.stderr
    assert not (raw / "tf_records").exists()


@pytest.mark.parametrize(
    ("path", "names", "found"),
    [
        pytest.param(
            "gs://bucket/imagenet",
            [
                *(f"train-{i:05}-of-01024" for i in range(9)),
                "validation-00003-of-00128",
                "train-00002-of-00002",
            ],
            "train-00000-of-01024, train-00001-of-01024, train-00002-of-00002 and 8 more",
            id="other number of shards",
        ),
        pytest.param(
            "gs://bucket",
            ["train-a b", "validation-0"],
            "train-a b, validation-0",
            id="in the bucket itself",
        ),
    ],
)
def test_upload_is_refused_when_the_models_would_read_something_else(
    raw: Path,
    emulator: Emulator,
    path: str,
    names: list[str],
    found: str,
) -> None:
    directory = path.removeprefix("gs://bucket").removeprefix("/")
    others = [*SMALL_NAMES, "other/train-d", "README"]
    for name in [*names, *others]:
        emulator.put(f"{directory}/{name}".removeprefix("/"), b"")
    finished = upload(raw, emulator, path)
    assert_refused(
        finished,
        raw,
        f"{path} contains train-* or validation-* objects from elsewhere, which models "
        f"would also read: {found}. Delete them, or choose another directory.",
    )


def test_other_objects_are_left_alone(raw: Path, emulator: Emulator) -> None:
    """Those that no model reads, and those of other directories."""
    others = {
        "imagenet/README": b"1",
        "imagenet/more/train-00000-of-01024": b"2",
        "imagenet2/train-00000-of-01024": b"3",
        "train-00000-of-01024": b"4",
    }
    for name, data in others.items():
        emulator.put(name, data)
    finished = upload(raw, emulator)
    assert finished.status == 0, finished.stderr
    objects = emulator.objects()
    assert {name: objects[name] for name in others} == others
    assert len(objects) == len(others) + 4


def test_objects_that_will_be_replaced_are_counted(
    raw: Path, emulator: Emulator
) -> None:
    emulator.put("imagenet/train-00000-of-00002", b"of a script without a manifest")
    finished = upload(raw, emulator)
    assert finished.status == 0, finished.stderr
    (line,) = [line for line in finished.lines if line.startswith("Writing")]
    assert line.endswith("to gs://bucket/imagenet, replacing 1 object.")


def test_project_pays_where_the_requester_must(raw: Path, emulator: Emulator) -> None:
    emulator.requester_pays = True
    finished = upload(raw, emulator)
    assert finished.status == 0, finished.stderr
    refused, *others = emulator.requests
    assert refused.status == 400
    assert {r.query.get("userProject") for r in others} == {"my-project"}


def test_empty_objects_have_a_size_when_the_service_leaves_it_out(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Google's own testbench does."""
    emulator.leaves_out_zero = True
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    destination = script.Destination(script.GcsPath("bucket", "imagenet"), "project")
    (tmp_path / "train-0").write_bytes(b"")
    stamp = script.Stamp("digest", 0, 0, crc32c_of(b""), 0)
    destination.upload(str(tmp_path / "train-0"), stamp)
    assert destination.list_objects() == {"train-0": stamp}


# ----------------------------------------------------- no more permissions than needed

NO_DELETE = Status(403, "a@b.c does not have storage.objects.delete access.")
NO_CREATE = Status(403, "a@b.c does not have storage.objects.create access.")
NO_LIST = Status(403, "a@b.c does not have storage.objects.list access.")


def test_complete_set_needs_neither_probe_nor_write(
    raw: Path, emulator: Emulator
) -> None:
    assert upload(raw, emulator).status == 0
    num_before = len(emulator.requests)
    emulator.inject(NO_CREATE, kind="session", at=1, times=None)
    emulator.inject(NO_DELETE, kind="delete", at=1, times=None)
    finished = upload(raw, emulator)
    assert finished.status == 0, finished.stderr
    assert {request.kind for request in emulator.requests[num_before:]} == {"list"}


def test_what_is_there_is_passed_over_when_it_may_be_neither_seen_nor_replaced(
    raw: Path, emulator: Emulator
) -> None:
    """Then nobody knows whether the set is complete, and nothing says so."""
    emulator.put(f"imagenet/{SMALL_NAMES[0]}", b"another")
    emulator.inject(NO_LIST, kind="list", at=1, times=None)
    emulator.inject(NO_DELETE, kind="session", at=1, times=None, name=SMALL_NAMES[0])
    emulator.inject(NO_DELETE, kind="delete", at=1, times=None)
    finished = upload(raw, emulator)
    assert (finished.status, finished.errors) == (
        1,
        [
            (
                f"{SMALL_NAMES[0]} in gs://bucket/imagenet may be neither seen nor replaced. "
                "Grant roles/storage.objectUser on gs://bucket and rerun."
            )
        ],
    )
    names = {name.rpartition("/")[2] for name in emulator.objects()}
    assert names == set(SMALL_NAMES)
    assert emulator.objects()[f"imagenet/{SMALL_NAMES[0]}"] == b"another"
    warnings = [line for line in finished.lines if "WARNING: Leaving" in line]
    assert warnings == [
        "WARNING: Leaving what is in gs://bucket/imagenet: it may not be replaced."
    ]


def test_first_run_is_complete_when_it_may_only_create(
    raw: Path, emulator: Emulator
) -> None:
    emulator.inject(NO_LIST, kind="list", at=1, times=None)
    emulator.inject(NO_DELETE, kind="delete", at=1, times=None)
    finished = upload(raw, emulator)
    assert finished.status == 0, finished.stderr
    assert "imagenet/manifest.json" in emulator.objects()


# ------------------------------------------------------------ other people's data sets


@pytest.fixture(scope="module")
def finished_set(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A raw directory, with its finished set in tf_records, and its objects."""
    raw = contract.make_raw(tmp_path_factory.mktemp("finished") / "raw")
    with Emulator() as emulator:
        assert upload(raw, emulator).status == 0
        yield raw, emulator.objects()


@pytest.mark.parametrize(
    ("classes", "images", "said"),
    [
        (4, 2, "examples train: 12, not 8"),
        (3, 4, "labels 4: n01440875, not None"),
        (5, 3, "examples train: 12, not 15; labels 5: None, not n01440912"),
    ],
)
@pytest.mark.parametrize("place", ["gs://bucket/imagenet", "scratch"])
def test_finished_set_of_other_raw_data_is_never_replaced(
    finished_set: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    emulator: Emulator,
    place: str,
    classes: int,
    images: int,
    said: str,
) -> None:
    old, objects = finished_set
    raw = contract.make_raw(tmp_path / "raw", classes, images, 4)
    scratch = raw / "tf_records"
    if place == "scratch":
        shutil.copytree(old / "tf_records", scratch)
        place, remove = str(scratch), f"rm {scratch}/manifest.json"
    else:
        remove = f"gcloud storage rm {place}/manifest.json"
        for name, data in objects.items():
            emulator.put(name, data)
    before = emulator.objects(), contents(scratch)
    finished = upload(raw, emulator)
    assert (finished.status, finished.errors) == (
        1,
        [
            (
                f"{place} holds a finished data set of other raw data (manifest.json says "
                f"{said}). Choose another directory or, to replace it, run: {remove}"
            )
        ],
    )
    assert (emulator.objects(), contents(scratch)) == before


def test_labels_of_a_manifest_count_even_without_its_examples(
    raw: Path, emulator: Emulator
) -> None:
    emulator.put("imagenet/manifest.json", b'{"labels": {"1": "n00000001"}}')
    before = emulator.objects()
    finished = upload(raw, emulator)
    assert finished.status == 1
    assert "manifest.json says labels 1: n00000001, not n01440764" in finished.stderr
    assert emulator.objects() == before


@pytest.mark.parametrize("junk", [b"", b"junk", b"[1]", b'{"labels":5,"examples":[]}'])
def test_manifest_that_cannot_be_read_vouches_for_nothing(
    raw: Path, emulator: Emulator, junk: bytes
) -> None:
    emulator.put("imagenet/manifest.json", junk)
    finished = upload(raw, emulator)
    assert finished.status == 0, finished.stderr
    assert json.loads(emulator.objects()["imagenet/manifest.json"])["examples"]
