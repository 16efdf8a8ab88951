"""Section 7: Cloud Storage, by the real client over HTTP."""

import datetime
import functools
import json
import re
import shlex
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import contract
import pytest
from command import UPLOAD, Finished, run_code, run_command
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from emulator import Emulator, Status, crc32c_of

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
    assert (first.kind, first.name) == ("session", "data/imagenet/manifest.json")
    assert (second.method, second.status) == ("DELETE", 499)
    assert all("/b/bucket/o" in r.path.partition("?")[0] for r in requests)
    assert not any("userProject" in r.query for r in requests)
    kinds = [request.kind for request in requests]
    assert kinds.count("list") == 1 + 2  # the second one has two pages
    assert set(kinds) <= {"session", "other", "list", "chunk"}


def test_guide_ends_with_what_to_give_the_model(guide: Guide) -> None:
    last = guide.finished.lines[-2:]
    assert re.fullmatch(
        r"Uploaded 1,152 of 1,152 shards \([\d.]+ KB\) to gs://bucket/data/imagenet in "
        r"\d+ s\.",
        last[0],
    )
    assert re.fullmatch(
        r"The data set is complete: 1,152 shards of 16 images \([\d.]+ KB\) in "
        r"gs://bucket/data/imagenet: give the model "
        r"--data_dir=gs://bucket/data/imagenet\.",
        last[1],
    )
    warnings = [line for line in guide.finished.lines if line.startswith("WARNING")]
    assert [line for line in warnings if "shards will be empty" not in line] == []


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


def test_upload_is_refused_when_it_must_replace_what_is_held(
    raw: Path, emulator: Emulator
) -> None:
    emulator.put("imagenet/manifest.json", b"{}", temporaryHold=True)
    until = "2100-01-01T00:00:00.000Z"
    emulator.put(f"imagenet/{SMALL_NAMES[0]}", b"", retentionExpirationTime=until)
    past = "2020-01-01T00:00:00.000Z"
    emulator.put(f"imagenet/{SMALL_NAMES[1]}", b"", retentionExpirationTime=past)
    emulator.put("imagenet/README", b"", eventBasedHold=True)
    assert_refused(
        upload(raw, emulator),
        raw,
        "gs://bucket/imagenet must not hold back what this run has to replace; found "
        "manifest.json (temporary hold), train-00000-of-00002 (retained until "
        "2100-01-01 00:00:00+00:00). Release the holds, or choose another directory.",
    )


@pytest.mark.parametrize(
    ("path", "names", "found", "globs"),
    [
        pytest.param(
            "gs://bucket/imagenet",
            [
                *(f"train-{i:05}-of-01024" for i in range(9)),
                "validation-00003-of-00128",
                "train-00002-of-00002",
            ],
            "train-00000-of-01024, train-00001-of-01024, train-00002-of-00002 and 8 more",
            ["train-*-of-01024", "train-00002-of-00002", "validation-*-of-00128"],
            id="other number of shards",
        ),
        pytest.param(
            "gs://bucket",
            ["train-a b", "validation-0"],
            "train-a b, validation-0",
            ["train-a b", "validation-0"],
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
    globs: list[str],
) -> None:
    """The command for it deletes just that, and none of this run's shards."""
    directory = path.removeprefix("gs://bucket").removeprefix("/")
    others = [*SMALL_NAMES, "other/train-d", "README"]
    for name in [*names, *others]:
        emulator.put(f"{directory}/{name}".removeprefix("/"), b"")
    finished = upload(raw, emulator, path)
    command = shlex.join(
        ["gcloud", "storage", "rm", *(f"{path}/{glob}" for glob in sorted(globs))]
    )
    assert_refused(
        finished,
        raw,
        f"{path} contains train-* or validation-* objects from elsewhere, which models "
        f"would also read: {found}. Delete them ({command}), or choose another "
        "directory.",
    )
    matched = [n for n in [*names, *others] if any(fnmatch(n, g) for g in globs)]
    assert matched == names


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


# ----------------------------------------------------------- refusals, in their words

PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "ALL_PROXY")
Refuse = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Refuse:
    """Reaches for a bucket in vain; gives the error, and what was logged before."""

    def reach_for(env: Mapping[str, str], seconds: float = 20) -> tuple[str, list[str]]:
        for name in ("STORAGE_EMULATOR_HOST", *PROXIES):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(script, "REQUEST_SECONDS", seconds)
        monkeypatch.setattr(script, "WARNING_SECONDS", 0.001)
        with pytest.raises(script.RunError) as caught:
            script.Destination(script.GcsPath("bucket", "d"), "project").check_access()
        assert {record.levelname for record in caplog.records} <= {"WARNING"}
        return str(caught.value), caplog.messages

    return reach_for


ROLE = "Grant roles/storage.objectUser on gs://bucket to the account of this run."
SCOPE = (
    "Stop the VM and run: gcloud compute instances set-service-account NAME "
    "--scopes=cloud-platform"
)
CREATE = "Create it: gcloud storage buckets create gs://bucket"
CONSUMER = (
    "Grant roles/serviceusage.serviceUsageConsumer on the project to the account of "
    "this run."
)


@pytest.mark.parametrize(
    ("status", "reason", "said", "remedy"),
    [
        (403, "forbidden", "a@b.c does not have storage.objects.create access.", ROLE),
        (403, "insufficientPermissions", "Provided scope(s) are not authorized", SCOPE),
        (403, "insufficientPermissions", "insufficient authentication scopes.", SCOPE),
        (
            403,
            "userProjectAccessDenied",
            "no serviceusage.services.use here.",
            CONSUMER,
        ),
        (403, "accountDisabled", "The billing account is disabled in state absent", ""),
        (403, "accessNotConfigured", "The API is off. Visit https://a.b/c then.", ""),
        (403, "forbidden", "Permission denied on Cloud KMS key k. " + "Word " * 99, ""),
        (403, "forbidden", "Prohibited: vpcServiceControlsUniqueIdentifier: a.", ""),
        (403, "retentionPolicyNotMet", "Object is subject to retention policy.", ""),
        (412, "conditionNotMet", "'us' violates constraint 'constraints/x'", ""),
        (400, "required", "Bucket is a requester pays bucket but that is wrong.", ""),
        (404, "notFound", "The specified bucket does not exist.", CREATE),
    ],
    ids=lambda value: str(value)[:40],
)
def test_access_is_refused_in_the_words_of_the_service(
    emulator: Emulator,
    refuse: Refuse,
    status: int,
    reason: str,
    said: str,
    remedy: str,
) -> None:
    fault = Status(status, said, reason)
    emulator.inject(fault, kind="session", at=1, times=None)
    what = {403: "Access to {} is denied", 404: "No bucket for {}"}.get(
        status, "Cloud Storage failed at {}"
    )
    what = what.format("gs://bucket/d/manifest.json")
    words = f"{status} {' '.join(said.split())}".rstrip(".")
    assert refuse(emulator.environment) == (f"{what}: {words}. {remedy}".rstrip(), [])


# ------------------------------------------------------------------------ logging in


def new_certificate(directory: Path) -> Path:
    """Writes a private key and a certificate that it has signed itself."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = serialization.Encoding.PEM
    kind = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = directory / "certificate.pem"
    path.write_bytes(key.private_bytes(pem, *kind) + certificate.public_bytes(pem))
    return path


def credentials(directory: Path, emulator: Emulator, kind: str) -> dict[str, str]:
    """Writes a file of credentials; returns an environment that has them used."""
    url = emulator.url
    account = {
        "type": "service_account",
        "client_email": "me@example.com",
        "private_key": new_certificate(directory)
        .read_text()
        .partition("-----BEGIN C")[0],
        "token_uri": f"{url}/token",
    }
    workload = {
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/x",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": f"{url}/token",
        "credential_source": {"file": str(directory / "subject")},
    }
    (directory / "subject").write_text("token")
    files: dict[str, object] = {
        "key": account,
        "workload": workload,
        "impersonation": {
            **workload,
            "service_account_impersonation_url": (
                f"{url}/serviceAccounts/me@example.com:generateAccessToken"
            ),
        },
        "unknown": {"type": "unknown"},
    }
    path = directory / f"{kind}.json"
    if kind in files:
        path.write_text(json.dumps(files[kind]))
    return {
        "GOOGLE_APPLICATION_CREDENTIALS": str(path),
        "GOOGLE_CLOUD_PROJECT": "project",
        "API_ENDPOINT_OVERRIDE": url,
        "NO_GCE_CHECK": "true",
        "HTTPS_PROXY": "http://127.0.0.1:9",  # nothing leaves this machine
        "NO_PROXY": "127.0.0.1",
    }


JWT = (
    "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable "
    "timeframe."
)
ACT_AS = "Permission 'iam.serviceAccounts.getAccessToken' denied on resource."
CREATOR = (
    "Grant roles/iam.serviceAccountTokenCreator on that service account to the account "
    "that impersonates it."
)


@pytest.mark.parametrize(
    ("kind", "fault", "said", "remedy"),
    [
        (
            "key",
            Status(400, JWT, "invalid_grant"),
            f"invalid_grant: {JWT[:-1]}",
            "Set the clock of this machine.",
        ),
        (
            "key",
            Status(400, "Token has been expired or revoked.", "invalid_grant"),
            "invalid_grant: Token has been expired or revoked",
            "Run `gcloud auth application-default login` again.",
        ),
        (
            "key",
            Status(400, "Account has been deleted", "invalid_grant"),
            "invalid_grant: Account has been deleted",
            "",
        ),
        (
            "impersonation",
            Status(403, ACT_AS),
            f"403 {ACT_AS[:-1]}",
            CREATOR,
        ),
        (
            "workload",
            Status(400, "The audience is wrong.", "invalid_target"),
            "Error code invalid_target: The audience is wrong",
            "",
        ),
    ],
    ids=["clock", "revoked", "deleted", "impersonation", "workload"],
)
def test_login_is_refused_at_once_when_no_waiting_helps(
    emulator: Emulator,
    tmp_path: Path,
    refuse: Refuse,
    kind: str,
    fault: Status,
    said: str,
    remedy: str,
) -> None:
    name = "generateAccessToken" if kind == "impersonation" else "token"
    emulator.inject(fault, kind="token", at=1, times=None, name=name)
    env = credentials(tmp_path, emulator, kind)
    line = (
        f"Cannot log in for gs://bucket/d: {said} "
        f"(GOOGLE_APPLICATION_CREDENTIALS={tmp_path}/{kind}.json). {remedy}"
    )
    refused, warnings = refuse(env)
    assert refused.replace("/manifest.json", "") == line.rstrip()
    assert warnings == []


@pytest.mark.parametrize("kind", ["key", "impersonation"])
def test_login_is_tried_again_when_the_fault_passes(
    emulator: Emulator, tmp_path: Path, refuse: Refuse, kind: str
) -> None:
    name = "generateAccessToken" if kind == "impersonation" else "token"
    emulator.inject(Status(503), kind="token", at=1, times=4, name=name)
    env = credentials(tmp_path, emulator, kind)
    emulator.inject(Status(403, "So far."), kind="session", at=1)
    line = "Access to gs://bucket/d/manifest.json is denied: 403 So far."
    refused, warnings = refuse(env)
    assert refused == line
    assert warnings[0].startswith("Waiting up to 20 s for gs://bucket/d: ")


def test_login_is_tried_again_when_the_metadata_server_is_busy(
    emulator: Emulator, raw: Path
) -> None:
    """That of a VM; the client's own patience ends after 15 s."""
    emulator.inject(Status(503, "Busy."), kind="token", at=1, times=7, name="default")
    host = emulator.url.removeprefix("http://")
    env = {
        "GCE_METADATA_HOST": host,
        "GCE_METADATA_IP": host,
        "API_ENDPOINT_OVERRIDE": emulator.url,
        "HOME": str(raw),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
    }
    finished = run_command(*UPLOAD, f"--raw_data_dir={raw}", "--dry_run", env=env)
    assert finished.status == 0, finished.stderr
    warnings = [line for line in finished.lines if "WARNING: Wait" in line]
    assert re.fullmatch(
        r"WARNING: Waiting up to 2 min for gs://bucket/imagenet: .*"
        r"Compute Engine Metadata server unavailable.*",
        warnings[0],
    )
    assert not any("http" in line or "{" in line for line in warnings)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "File {} was not found"),
        ("unknown", "The file {} does not have a valid type"),
    ],
)
def test_file_of_credentials_is_named_when_it_does_not_work(
    emulator: Emulator, tmp_path: Path, raw: Path, kind: str, said: str
) -> None:
    env = credentials(tmp_path, emulator, kind)
    path = env["GOOGLE_APPLICATION_CREDENTIALS"]
    done = run_command(*UPLOAD, f"--raw_data_dir={raw}", env=env)
    [line] = done.errors
    assert done.status == 1
    assert line.startswith(
        f"No credentials for gs://bucket/imagenet: {said.format(path)}"
    )
    assert line.endswith(f" (GOOGLE_APPLICATION_CREDENTIALS={path}).")
    assert not (raw / "tf_records").exists()


# -------------------------------------------------------------------- on the way there


def test_certificate_is_refused_at_once_when_it_is_not_trusted(
    tmp_path: Path, refuse: Refuse
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(new_certificate(tmp_path))
    with Emulator(tls=context) as emulator:
        line, warnings = refuse(emulator.environment)
    assert re.fullmatch(
        r"Cloud Storage failed at gs://bucket/d/manifest\.json: cannot reach 127\.0\.0\.1 "
        r"\(self[- ]signed certificate\)\. If your network has its own certificate "
        r"authority, set REQUESTS_CA_BUNDLE to the file of its certificate\.",
        line,
    )
    assert warnings == []


def test_proxy_is_said_at_once_when_it_wants_a_password(
    emulator: Emulator, refuse: Refuse
) -> None:
    host = "storage.invalid"
    env = {"STORAGE_EMULATOR_HOST": f"https://{host}", "HTTPS_PROXY": emulator.url}
    line, warnings = refuse(env)
    assert line == (
        f"Cloud Storage failed at gs://bucket/d/manifest.json: cannot reach {host} "
        "(Tunnel connection failed: 407 Proxy Authentication Required). Set "
        "HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT."
    )
    assert warnings == []


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("http://127.0.0.1:9", r"127\.0\.0\.1 \(Connection refused\)"),
        ("http://no.such.host.invalid", r"no\.such\.host\.invalid \(.*[Nn]ame.*\)"),
    ],
)
def test_cause_is_said_when_nothing_is_reached(
    refuse: Refuse, host: str, said: str
) -> None:
    line, warnings = refuse({"STORAGE_EMULATOR_HOST": host}, seconds=2)
    assert re.fullmatch(
        rf"Cloud Storage failed at gs://bucket/d/manifest\.json: cannot reach {said}\. "
        r"Rerun the same command to resume\.",
        line,
    )
    [warning] = warnings
    assert re.fullmatch(
        rf"Waiting up to 2 s for gs://bucket/d: cannot reach {said}\.", warning
    )
