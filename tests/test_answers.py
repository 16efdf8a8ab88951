"""What answers of Cloud Storage, and of what leads to it, mean."""

import datetime
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from command import UPLOAD, run_code, run_command
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from emulator import Emulator, Status
from google.auth.exceptions import RefreshError

import imagenet_to_gcs as script

# ----------------------------------------------------------- refusals, in their words

PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "ALL_PROXY")
Refuse = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Refuse:
    """Reaches for a bucket in vain; gives the error, and what was logged before."""

    def reach_for(
        env: Mapping[str, str], seconds: float = 60, request_of: str = "probe"
    ) -> tuple[str, list[str]]:
        for name in ("STORAGE_EMULATOR_HOST", *PROXIES):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(script, "REQUEST_SECONDS", seconds)
        monkeypatch.setattr(script, "WARNING_SECONDS", 0)
        if seconds < 1:
            monkeypatch.setattr(script, "RETRY_DELAYS", (0.1,))
        with pytest.raises(script.RunError) as caught:
            destination = script.Destination(script.GcsPath("bucket", "d"), "project")
            if request_of == "list":
                destination.list_objects()
            destination.check_access("manifest.json")
        assert {record.levelname for record in caplog.records} <= {"WARNING"}
        return str(caught.value), caplog.messages

    return reach_for


LOG_IN = (
    "Check GOOGLE_APPLICATION_CREDENTIALS or, as a person, run `gcloud auth "
    "application-default login`."
)
ROLE = "Grant roles/storage.objectUser on gs://bucket to this account."
SCOPE = (
    "Stop the VM and run: gcloud compute instances set-service-account NAME "
    "--scopes=cloud-platform"
)
CREATE = (
    "Create it: gcloud storage buckets create gs://bucket --project=project "
    "--location=LOCATION"
)
CONSUMER = (
    "Grant roles/serviceusage.serviceUsageConsumer on the project to this run's "
    "account."
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
    words = f"{status} {' '.join(said.split())}".rstrip(".")
    line = f"Cannot use gs://bucket/d/manifest.json: {words}. {remedy}"
    assert refuse(emulator.environment) == (line.rstrip(), [])


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
INVALID_GRANT = (
    "As a person, run `gcloud auth application-default login` again; with a key, check "
    "the clock."
)
OTHER_LOGIN = (
    "Unset GOOGLE_APPLICATION_CREDENTIALS and, on your own machine, run `gcloud auth "
    "application-default login`."
)
CREATOR = (
    "Grant roles/iam.serviceAccountTokenCreator (to a pod, "
    "roles/iam.workloadIdentityUser) on that service account to this run's account."
)


@pytest.mark.parametrize(
    ("kind", "fault", "said", "remedy"),
    [
        (
            "key",
            Status(400, JWT, "invalid_grant"),
            f"invalid_grant: {JWT[:-1]}",
            INVALID_GRANT,
        ),
        (
            "key",
            Status(400, "Token has been expired or revoked.", "invalid_grant"),
            "invalid_grant: Token has been expired or revoked",
            INVALID_GRANT,
        ),
        (
            "key",
            Status(400, "Account has been deleted", "invalid_grant"),
            "invalid_grant: Account has been deleted",
            INVALID_GRANT,
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
    refused, warnings = refuse(env)
    line = f"Cannot use gs://bucket/d: {said}. {remedy}".rstrip()
    assert refused.replace("/manifest.json", "") == line
    assert warnings == []


# Of a key, the client itself asks some times more.
@pytest.mark.parametrize(("kind", "times"), [("key", 7), ("impersonation", 4)])
def test_login_is_tried_again_when_the_fault_passes(
    emulator: Emulator, tmp_path: Path, refuse: Refuse, kind: str, times: int
) -> None:
    name = "generateAccessToken" if kind == "impersonation" else "token"
    emulator.inject(Status(503), kind="token", at=1, times=times, name=name)
    env = credentials(tmp_path, emulator, kind)
    emulator.inject(Status(403, "So far."), kind="session", at=1)
    line = "Cannot use gs://bucket/d/manifest.json: 403 So far."
    refused, warnings = refuse(env)
    assert refused == line
    assert warnings[0].startswith("Waiting up to 60 s for gs://bucket/d: ")


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
    said = "WARNING: Waiting up to 2 min for gs://bucket/imagenet: 503 Busy."
    assert set(warnings) == {said}


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
    assert line.startswith(f"Cannot use gs://bucket/imagenet: {said.format(path)}")
    assert line.endswith(f". {OTHER_LOGIN}")


# -------------------------------------------------------------------- on the way there

AUTHORITY = (
    "Check this machine's clock. If your network has its own certificate authority, "
    "name its certificate (PEM) in REQUESTS_CA_BUNDLE."
)
PROXY = "Check the proxy: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT."


def test_certificate_is_refused_at_once_when_it_is_not_trusted(
    tmp_path: Path, refuse: Refuse
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(new_certificate(tmp_path))
    with Emulator(tls=context) as emulator:
        line, warnings = refuse(emulator.environment)
    assert re.fullmatch(
        r"Cannot use gs://bucket/d/manifest\.json: "
        rf".*self[- ]signed certificate.*\. {re.escape(AUTHORITY)}",
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
        "Cannot use gs://bucket/d/manifest.json: 407 Proxy Authentication Required. "
        f"{PROXY}"
    )
    assert warnings == []


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://no.such.host.invalid", ".*[Nn]ame.*"),
    ],
)
def test_cause_is_said_when_nothing_is_reached(
    refuse: Refuse, host: str, said: str
) -> None:
    line, warnings = refuse({"STORAGE_EMULATOR_HOST": host}, seconds=2)
    assert re.fullmatch(
        rf"Cannot use gs://bucket/d/manifest\.json: {said}\. "
        r"Rerun the same command to resume\.",
        line,
    )
    [warning] = warnings
    assert re.fullmatch(rf"Waiting up to 2 s for gs://bucket/d: {said}\.", warning)


# ----------------------------------------------------------------------- odd answers

Reply = Callable[[str], tuple[int, bytes, Mapping[str, str]]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, body, headers = self.server.reply(self.path)  # type: ignore[attr-defined]
        self.send_response(status)
        json_type = {"Content-Type": "application/json"}
        length = {"Content-Length": str(len(body))}
        for key, value in {**json_type, **length, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = do_CONNECT = _serve


@contextmanager
def serving(reply: Reply) -> Iterator[str]:
    """Answers any request as told; yields the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        server.reply = reply  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()  # or a test that fails would keep pytest from its end


def always(status: int, body: bytes, **headers: str) -> Reply:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda path: (status, body, names)


PLACE = "gs://bucket/d"
PYTHON = re.compile(
    r"object has no|Expecting|must be|indices|Traceback|Error\(|NoneType|not subscript"
)
ODD = {
    "message is an object": b'{"error":{"code":"503","message":{"error":{"message":"M"}}}}',
    "message is a list": b'{"error":{"message":["a"]}}',
    "message is a number": b'{"error":{"code":null,"message":5}}',
    "error is a list": b'{"error":[1]}',
    "error is null": b'{"error":null}',
    "error is a string": b'{"error":"M"}',
    "a number": b"5",
    "a string": b'"abc"',
    "a list": b"[]",
    "a web page": b"<!doctype html><title>503</title>",
    "nothing": b"",
    "cut short": b'{"error":',
    "deep": b"[" * 5000,
    "not UTF-8": b"\xe9",
}


@pytest.mark.parametrize("request_of", ["list", "probe"])
@pytest.mark.parametrize("body", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("status", [503, 403, 501])
def test_status_decides_whatever_the_body_is(
    refuse: Refuse, request_of: str, body: bytes, status: int
) -> None:
    with serving(always(status, body)) as url:
        env = {"STORAGE_EMULATOR_HOST": url}
        line, warnings = refuse(env, seconds=0.3, request_of=request_of)
    assert not PYTHON.search(line)
    words = {503: "Service Unavailable", 403: "Forbidden", 501: "Not Implemented"}
    said = "M" if b'"message":"M"' in body else words[status]
    assert f": {status} {said}." in line
    assert line.endswith(script.RERUN) == (status == 503)
    assert any(w.startswith("Waiting up to") for w in warnings) == (status == 503)


@pytest.mark.parametrize(
    "encoding", [{"Content_Encoding": "gzip"}, {"Content_Type": "a/b; charset=klingon"}]
)
@pytest.mark.parametrize("request_of", ["list", "probe"])
def test_status_decides_when_the_body_cannot_be_decoded(
    refuse: Refuse, encoding: dict[str, str], request_of: str
) -> None:
    with serving(always(503, b"{}", **encoding)) as url:
        env = {"STORAGE_EMULATOR_HOST": url}
        line, _ = refuse(env, seconds=0.3, request_of=request_of)
    assert ": 503 Service Unavailable. Rerun" in line


@pytest.mark.parametrize("reason", ["rateLimitExceeded", "RATE_LIMIT_EXCEEDED"])
def test_403_is_repeated_when_its_reason_is_a_rate(
    emulator: Emulator, refuse: Refuse, reason: str
) -> None:
    said = "Quota exceeded for quota metric 'x' per minute."
    emulator.inject(Status(403, said, reason), kind="session", at=1, times=2)
    emulator.inject(Status(403, "So far."), kind="session", at=3)
    line, warnings = refuse(emulator.environment)
    assert line == f"Cannot use {PLACE}/manifest.json: 403 So far."
    assert warnings == [f"Waiting up to 60 s for {PLACE}: 403 {said[:-1]}."]


@pytest.mark.parametrize("request_of", ["list", "probe"])
def test_web_page_with_status_200_is_called_one_at_once(
    refuse: Refuse, request_of: str
) -> None:
    with serving(
        always(200, b" <html>Sign in</html>", Content_Type="text/html")
    ) as url:
        line, warnings = refuse({"STORAGE_EMULATOR_HOST": url}, request_of=request_of)
    place = PLACE if request_of == "list" else f"{PLACE}/manifest.json"
    assert line == (
        f"Cannot use {place}: a web page came back. A sign-in page or a "
        "proxy may be in the way."
    )
    assert warnings == []


def test_web_page_with_status_403_is_no_missing_permission(refuse: Refuse) -> None:
    page = always(403, b"<html>Blocked</html>", Content_Type="text/html")
    with serving(page) as url:
        line, warnings = refuse({"STORAGE_EMULATOR_HOST": url}, request_of="list")
    portal = "A sign-in page or a proxy may be in the way."
    assert line == f"Cannot use {PLACE}: 403 Forbidden. {portal}"
    assert warnings == []


@pytest.mark.parametrize(
    "listing",
    [
        '{"items":[{"name":"d/a","size":"abc"}]}',
        '{"items":[{"name":"d/a","size":[1]}]}',
        '{"items":[{"name":"d/a","crc32c":"x","size":"1","metadata":[1]}]}',
        '{"items":[{"size":"1"}]}',
        '{"items":[{"name":5}]}',
        '{"items":5}',
        "5",
    ],
)
def test_junk_in_a_listing_is_said_in_a_line(refuse: Refuse, listing: str) -> None:
    with serving(always(200, listing.encode())) as url:
        line, _ = refuse({"STORAGE_EMULATOR_HOST": url}, request_of="list")
    assert line.startswith(
        f"Cannot use {PLACE}: what came back is not as it should be."
    )


# ----------------------------------------------------------------- wherever it is said


def answer(status: int, body: str) -> requests.Response:
    response = requests.Response()
    response.status_code, response._content = status, body.encode()
    return response


def within(error: Exception) -> Exception:
    outer = RuntimeError("outer")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "words", "remedy"),
    [
        pytest.param(
            requests.HTTPError('{"code": 503}', response=answer(403, "")),
            "403 Forbidden",
            "",
            id="status of the answer before that of a text",
        ),
        pytest.param(
            within(RefreshError("Busy", '{"error": {"code": 503}}')),  # type: ignore[no-untyped-call]
            "503 Service Unavailable",
            script.RERUN,
            id="status within",
        ),
        pytest.param(
            RefreshError("invalid_grant: Bad Request", "{}"),  # type: ignore[no-untyped-call]
            "invalid_grant: Bad Request",
            INVALID_GRANT,
            id="error of OAuth in a text",
        ),
        pytest.param(
            requests.HTTPError(response=answer(404, '{"message": "No route."}')),
            "404 No route",
            "",
            id="404 of something else than Cloud Storage",
        ),
        pytest.param(
            RefreshError("No.", '{"error": {"code": 404, "reason": "notFound"}}'),  # type: ignore[no-untyped-call]
            "404 Not Found",
            LOG_IN,
            id="404 of a service account, not of the bucket",
        ),
        pytest.param(
            ConnectionResetError(104, "Connection reset by peer"),
            "Connection reset by peer",
            script.RERUN,
            id="lost connection of Python's own",
        ),
    ],
)
def test_fault_is_read_from(error: Exception, words: str, remedy: str) -> None:
    fault = script.Fault(error)
    assert (fault.words, fault.remedy) == (words, remedy)
    assert fault.may_pass == (remedy == script.RERUN)


# ------------------------------------------------------------- proxies, certificates


@pytest.mark.parametrize(
    ("env", "start", "end"),
    [
        (
            {"REQUESTS_CA_BUNDLE": "/no/such"},
            "Cannot use gs://bucket/d: Could not find a suitable TLS CA",
            "invalid path: /no/such.",
        ),
        (
            {"HTTPS_PROXY": "socks5://127.0.0.1:9"},
            "Cannot use gs://bucket/d: Missing dependencies for SOCKS",
            "Run: python3 -m pip install 'requests[socks]'",
        ),
    ],
)
def test_setting_of_the_network_is_named_at_once(
    refuse: Refuse, env: dict[str, str], start: str, end: str
) -> None:
    host = {"STORAGE_EMULATOR_HOST": "https://storage.invalid"}
    line, warnings = refuse({**host, **env}, request_of="list")
    assert line.startswith(start)
    assert line.endswith(end)
    assert warnings == []


def test_file_that_holds_no_certificate_is_named_at_once(
    tmp_path: Path, refuse: Refuse
) -> None:
    (tmp_path / "bundle").write_text("junk")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(new_certificate(tmp_path))
    with Emulator(tls=context) as emulator:
        bundle = {"REQUESTS_CA_BUNDLE": str(tmp_path / "bundle")}
        line, warnings = refuse({**emulator.environment, **bundle})
    assert line.endswith("REQUESTS_CA_BUNDLE must name a file (PEM) of certificates.")
    assert warnings == []


@pytest.mark.parametrize("status", [403, 503])
def test_proxy_that_refuses_is_named(refuse: Refuse, status: int) -> None:
    with serving(always(status, b"<html>")) as url:
        host = {"STORAGE_EMULATOR_HOST": "https://storage.invalid"}
        line, _ = refuse({**host, "HTTPS_PROXY": url}, seconds=0.3, request_of="list")
    assert line.startswith(f"Cannot use {PLACE}: {status} ")
    assert PROXY in line
    assert line.endswith(script.RERUN) == (status == 503)


# ------------------------------------------------------------------ odd identities


@pytest.mark.parametrize("text", ["[1]", "5", '"a"', "null"])
def test_file_of_credentials_is_named_when_it_is_no_object(
    tmp_path: Path, refuse: Refuse, text: str
) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(text)
    line, _ = refuse({"GOOGLE_APPLICATION_CREDENTIALS": str(path)})
    assert line == (
        f"Cannot use {PLACE}: the file of credentials is not understood. {OTHER_LOGIN}"
    )


@pytest.mark.parametrize("body", [b"{}", b"[]", b"", b"5", b"<html>", b'{"error":5}'])
@pytest.mark.parametrize("status", [200, 400])
def test_odd_answer_to_a_login_is_said_in_a_line(
    emulator: Emulator, tmp_path: Path, refuse: Refuse, body: bytes, status: int
) -> None:
    env = credentials(tmp_path, emulator, "key")
    path = Path(env["GOOGLE_APPLICATION_CREDENTIALS"])
    with serving(always(status, body)) as url:
        account = {**json.loads(path.read_text()), "token_uri": url}
        path.write_text(json.dumps(account))
        line, _ = refuse(env, request_of="list")
    assert line.startswith(f"Cannot use {PLACE}: ")
    assert not PYTHON.search(line)


def test_person_is_told_to_log_in_again(emulator: Emulator) -> None:
    from google.cloud import storage
    from google.oauth2.credentials import Credentials

    emulator.inject(Status(400, "Bad Request", "invalid_grant"), "token", 1, None)
    person = Credentials(  # type: ignore[no-untyped-call]
        None,
        "refresh",
        token_uri=f"{emulator.url}/token",
        client_id="i",
        client_secret="s",
    )
    client = storage.Client(
        "project", person, client_options={"api_endpoint": emulator.url}
    )
    with pytest.raises(script.ServiceError) as caught:
        script.Destination(script.GcsPath("bucket", "d"), None, client).list_objects()
    assert str(caught.value) == (
        f"Cannot use {PLACE}: invalid_grant: Bad Request. {INVALID_GRANT}"
    )


METADATA = """if True:
    import sys
    import imagenet_to_gcs as script
    script.REQUEST_SECONDS, script.RETRY_DELAYS = float(sys.argv[1]), (0.1,)
    try:
        script.Destination(script.GcsPath("bucket", "d"), "project").list_objects()
    except script.ServiceError as error:
        print(error.may_pass, error)
"""


def ask_metadata(reply: Reply, home: Path, seconds: float) -> str:
    """Lists the bucket as a machine of Google's; the server is all of its network."""
    with serving(reply) as url:
        host = url.removeprefix("http://")
        env = {
            "GCE_METADATA_HOST": host,
            "GCE_METADATA_IP": host,
            "API_ENDPOINT_OVERRIDE": url,
            "HOME": str(home),
        }
        done = run_code(METADATA, str(seconds), env=env)
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def metadata(token: tuple[int, bytes], account: tuple[int, bytes]) -> Reply:
    google = {"Metadata-Flavor": "Google"}

    def reply(path: str) -> tuple[int, bytes, Mapping[str, str]]:
        if "/token" in path:
            return (*token, google)
        if "/service-accounts/" in path:
            return (*account, google)
        return (404 if "universe" in path else 200), b"{}", google

    return reply


ACCOUNT = 200, b'{"email":"a@b.c","scopes":[],"aliases":[]}'
TOKEN = 200, b'{"access_token":"t","expires_in":3600}'
DENIED = b"Permission 'iam.serviceAccounts.getAccessToken' denied on resource."


@pytest.mark.parametrize(
    ("token", "account", "said"),
    [
        pytest.param(
            (403, DENIED),
            ACCOUNT,
            f"False Cannot use {PLACE}: 403 {DENIED[:-1].decode()}. {CREATOR}",
            id="workload identity is not bound",
        ),
        pytest.param(
            TOKEN,
            (404, b"<html>"),
            f"True Cannot use {PLACE}: 404 Not Found. Attach a service account to this "
            f"machine. {script.RERUN}",
            id="no service account",
        ),
        pytest.param(
            (200, b"[1]"),
            ACCOUNT,
            f"False Cannot use {PLACE}: what came back is not as it should be.",
            id="odd token",
        ),
    ],
)
def test_metadata_server_is_quoted(
    tmp_path: Path, token: tuple[int, bytes], account: tuple[int, bytes], said: str
) -> None:
    assert ask_metadata(metadata(token, account), tmp_path, 0.5) == said


@pytest.mark.parametrize("status", [404, 503])
def test_identity_is_waited_for_when_it_comes_late(tmp_path: Path, status: int) -> None:
    """At first there is no service account, or no server at all."""
    asked: list[str] = []
    late, good = metadata(TOKEN, (404, b"")), metadata(TOKEN, ACCOUNT)

    def reply(path: str) -> tuple[int, bytes, Mapping[str, str]]:
        asked.append(path)
        if status == 503 and len(asked) <= 2:
            return 503, b"", {}
        return (good if len(asked) > 8 else late)(path)

    assert ask_metadata(reply, tmp_path, 120) == ""
    assert any(path.startswith("/storage/") for path in asked)


def test_machine_is_googles_when_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its maker's name, or by a variable that only Google's machines have."""
    names = "GCE_METADATA_HOST", "K_SERVICE", "CLOUD_RUN_JOB", "KUBERNETES_SERVICE_HOST"
    for name in (*names, "NO_GCE_CHECK"):
        monkeypatch.delenv(name, raising=False)

    def is_googles(product: str, variable: str = "") -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(script, "read_text", lambda path: product)
            patch.setenv(variable or "OTHER", "x")
            return script._is_googles_machine()

    assert not is_googles("")
    assert is_googles("Google Compute Engine")
    assert [is_googles("", name) for name in names] == [True] * len(names)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    assert not is_googles("Google Compute Engine")
