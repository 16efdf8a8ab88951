"""Section 7: Cloud Storage, by the real client over HTTP."""

import base64
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import contract
import google_crc32c
import pytest
from command import Finished, run_code, run_command
from emulator import Emulator, Status

import imagenet_to_gcs as script

SMALL = ("--training_shards=2", "--validation_shards=1")
SMALL_NAMES = [
    "train-00000-of-00002",
    "train-00001-of-00002",
    "validation-00000-of-00001",
]


def crc32c_of(data: bytes) -> str:
    value = google_crc32c.value(data)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


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
        (" gs://bucket", None),
        ("gs://", ""),
        ("gs:///imagenet", ""),
        ("gs://ab", "ab"),
        ("gs://My-Bucket/imagenet", "My-Bucket"),
        ("gs://-bucket", "-bucket"),
        ("gs://bucket-", "bucket-"),
        ("gs://$BUCKET/imagenet", "$BUCKET"),
        ("gs://buck et", "buck et"),
        ("gs://" + "b" * 223, "b" * 223),
    ],
)
def test_path_is_refused(text: str, found: str | None) -> None:
    if found is None:
        problem = "must start with gs://, as in gs://bucket/directory."
    else:
        problem = (
            "must name a bucket after gs://: 3 to 222 characters of a-z, 0-9, '-', '_' "
            f"and '.'; found {found!r}."
        )
    with pytest.raises(ValueError) as caught:
        script.GcsPath.parse(text)
    assert str(caught.value) == f"--gcs_output_path={text} {problem}"


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


def test_guide_uploads_all_shards_flat_under_the_directory(guide: Guide) -> None:
    assert guide.finished.status == 0, guide.finished.stderr
    names = [*contract.expected_shards(guide.raw), "manifest.json"]
    assert len(names) == 1_153
    assert sorted(guide.objects) == sorted(f"data/imagenet/{name}" for name in names)


def test_guide_uploads_the_contracts_records(guide: Guide) -> None:
    shards = {
        name.removeprefix("data/imagenet/"): data
        for name, data in guide.objects.items()
        if not name.endswith("/manifest.json")
    }
    contract.assert_shards(shards, guide.raw)
    assert shards == contract.local_shards(guide.raw / "tf_records")


def test_guide_uploads_the_manifest_last(guide: Guide) -> None:
    stored = [
        r.name for r in guide.emulator.requests if r.kind in ("chunk", "multipart")
    ]
    assert len(stored) == 1_153
    assert stored[-1] == "data/imagenet/manifest.json"
    manifest = guide.objects["data/imagenet/manifest.json"]
    assert manifest == (guide.raw / "tf_records/manifest.json").read_bytes()


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
    }


def test_object_carries_the_digest_of_its_shard(guide: Guide) -> None:
    """And its checksum, for the digest does not hold where the bytes are others."""
    for shard in script.plan_shards(script.read_dataset(str(guide.raw))):
        name = f"data/imagenet/{shard.name}"
        assert guide.emulator.metadata(name) == {
            "digest": shard.digest(),
            "crc32c": crc32c_of(guide.objects[name]),
        }


def test_guide_needs_no_permission_on_buckets(guide: Guide) -> None:
    """Roles for objects lack `storage.buckets.get`: a 403 after hours of encoding."""
    requests = guide.emulator.requests
    paths = {request.path.partition("?")[0] for request in requests}
    assert all("/b/bucket/o" in path for path in paths)
    kinds = [request.kind for request in requests]
    assert kinds.count("list") == 1 + 2  # the second one has two pages
    assert set(kinds) <= {"session", "other", "list", "multipart"}


def test_guide_tries_the_access_first(guide: Guide) -> None:
    first, second = guide.emulator.requests[:2]
    assert (first.kind, first.name) == ("session", "data/imagenet/manifest.json")
    assert (second.method, second.status) == ("DELETE", 499)


def test_guide_ends_with_what_to_give_the_model(guide: Guide) -> None:
    last = guide.finished.lines[-2:]
    assert re.fullmatch(
        r"Uploaded 1,152 shards \([\d.]+ KB\) of 1,152 to gs://bucket/data/imagenet in "
        r"\d+ s\.",
        last[0],
    )
    assert re.fullmatch(
        r"The data set is complete: 1,152 shards of 16 images \([\d.]+ KB\) in "
        r"gs://bucket/data/imagenet: give the model "
        r"--data_dir=gs://bucket/data/imagenet\.",
        last[1],
    )
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
    uploads = [r.name for r in program.emulator.requests if r.kind == "multipart"]
    assert len(uploads) == len(set(uploads)) == 10


def test_upload_to_gcs_is_refused_when_the_path_is_wrong() -> None:
    with pytest.raises(ValueError) as caught:
        script.upload_to_gcs([], [], "bucket/imagenet", "my-project")
    assert str(caught.value) == (
        "--gcs_output_path=bucket/imagenet must start with gs://, as in "
        "gs://bucket/directory."
    )


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


def test_upload_is_refused_when_the_bucket_is_missing(
    raw: Path, emulator: Emulator
) -> None:
    finished = upload(raw, emulator, "gs://nowhere/imagenet")
    assert_refused(
        finished,
        raw,
        "No bucket for gs://nowhere/imagenet/manifest.json: 404 The specified bucket "
        "does not exist. Create it: "
        "gcloud storage buckets create gs://nowhere",
    )
    assert len(emulator.requests) == 1


def test_upload_is_refused_when_access_is_denied(raw: Path, emulator: Emulator) -> None:
    said = "me@example.com does not have storage.objects.create access."
    emulator.inject(Status(403, said), kind="session", at=1, times=None)
    assert_refused(
        upload(raw, emulator),
        raw,
        f"Access to gs://bucket/imagenet/manifest.json is denied: 403 {said[:-1]}. "
        "Grant roles/storage.objectUser on the bucket to the account of this run; a VM "
        "also needs the access scope cloud-platform.",
    )


def test_upload_is_refused_when_there_are_no_credentials(raw: Path) -> None:
    finished = run_command(
        "--project=my-project",
        "--gcs_output_path=gs://bucket/imagenet",
        f"--raw_data_dir={raw}",
        env={"GOOGLE_APPLICATION_CREDENTIALS": "/no/such.json"},
    )
    assert_refused(
        finished,
        raw,
        "No credentials for gs://bucket/imagenet: File /no/such.json was not found. "
        "Run `gcloud auth application-default login`, or attach a service account to "
        "the VM.",
    )


@pytest.mark.parametrize(
    ("path", "names", "found"),
    [
        pytest.param(
            "gs://bucket/imagenet",
            ["imagenet/train-00000-of-01024"],
            "train-00000-of-01024",
            id="other number of shards",
        ),
        pytest.param(
            "gs://bucket",
            ["train-a", "train-b", "train-c", "validation-0", "other/train-d"],
            "train-a, train-b, train-c and 1 more",
            id="in the bucket itself",
        ),
    ],
)
def test_upload_is_refused_when_the_models_would_read_something_else(
    raw: Path, emulator: Emulator, path: str, names: list[str], found: str
) -> None:
    for name in names:
        emulator.put(name, b"")
    assert_refused(
        upload(raw, emulator, path),
        raw,
        f"{path} must hold no other train-* and validation-* than this run's, for "
        f"models read them all; found {found}. Delete them, or choose another "
        "directory.",
    )
    assert sorted(emulator.objects()) == sorted(names)


def test_raw_directory_and_bucket_are_refused_together(
    raw: Path, emulator: Emulator
) -> None:
    (raw / "synset_labels.txt").write_text("n01440764\n")
    assert_refused(
        upload(raw, emulator, "gs://nowhere/imagenet"),
        raw,
        f"{raw}/synset_labels.txt has 1 label and {raw}/validation 4 images; they must "
        "be equal in number.",
        "No bucket for gs://nowhere/imagenet/manifest.json: 404 The specified bucket "
        "does not exist. Create it: "
        "gcloud storage buckets create gs://nowhere",
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
