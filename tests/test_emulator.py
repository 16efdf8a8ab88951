"""Tests the emulator of Cloud Storage, with the real client.

What faults do to an upload is in test_upload_faults.py.
"""

from __future__ import annotations

import io
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import emulator as module
import pytest
import requests
from emulator import (
    Emulator,
    LostResponse,
    Reset,
    Status,
    crc32c_of,
)
from google.api_core.exceptions import BadRequest, Forbidden, NotFound
from google.cloud import storage

MIB = 1024 * 1024
SMALL = random.Random(1).randbytes(100_000)
LARGE = random.Random(2).randbytes(9 * MIB + 1)  # a `session` and 3 `chunk`s
CHUNK_SIZE = 4 * MIB
METADATA = {"digest": "0123abcd", "examples": "1,251"}


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "1")
    with Emulator(bucket="bucket") as emulator:
        for key, value in emulator.environment.items():
            monkeypatch.setenv(key, value)
        yield emulator


@pytest.fixture
def bucket(emulator: Emulator) -> storage.Bucket:
    client = storage.Client(project="project")
    client._http  # noqa: B018
    return client.bucket("bucket")


def upload(bucket: storage.Bucket, name: str, data: bytes) -> storage.Blob:
    blob = bucket.blob(name, chunk_size=CHUNK_SIZE)
    blob.metadata = METADATA
    blob.upload_from_file(
        io.BytesIO(data), checksum=None, crc32c_checksum_value=crc32c_of(data)
    )
    return blob


def answers(emulator: Emulator) -> str:
    """Returns, say, `session 200, chunk 308`; without an answer the status is None."""
    return ", ".join(f"{each.kind} {each.status}" for each in emulator.requests)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SMALL, "session 200, chunk 200"),
        (LARGE, "session 200, chunk 308, chunk 308, chunk 200"),
    ],
    ids=["small", "large"],
)
def test_upload_is_stored(
    emulator: Emulator, bucket: storage.Bucket, data: bytes, expected: str
) -> None:
    blob = upload(bucket, "a/b%2Fc d", data)
    assert (blob.crc32c, blob.size) == (crc32c_of(data), len(data))
    assert answers(emulator) == expected
    assert {each.name for each in emulator.requests} == {"a/b%2Fc d"}
    assert emulator.objects() == {"a/b%2Fc d": data}
    assert emulator.metadata("a/b%2Fc d") == METADATA
    upload(bucket, "a/b%2Fc d", b"new")
    assert emulator.objects() == {"a/b%2Fc d": b"new"}
    bucket.blob("a/b%2Fc d").delete()
    assert emulator.objects() == {}


def test_fault_strikes_the_requests_it_is_for(
    emulator: Emulator, bucket: storage.Bucket
) -> None:
    emulator.inject(Status(403), kind="chunk", at=2, times=2, name="train")
    statuses = {}
    for name in ("train-0", "validation-0", "train-1", "train-2", "train-3"):
        try:
            upload(bucket, name, SMALL)
        except Forbidden:
            statuses[name] = 403
    assert statuses == {"train-1": 403, "train-2": 403}
    emulator.inject(Status(403), kind="list", at=1, times=None)
    for _ in range(2):
        with pytest.raises(Forbidden):
            list(bucket.list_blobs())
    emulator.heal()
    assert len(list(bucket.list_blobs())) == 3


def test_interrupted_upload_tells_how_far_it_got(
    emulator: Emulator, bucket: storage.Bucket
) -> None:
    url = bucket.blob("name").create_resumable_upload_session()

    def put(data: bytes, content_range: str) -> tuple[int, str | None]:
        headers = {"Content-Range": f"bytes {content_range}/{2 * MIB}"}
        answer = requests.put(url, data=data, headers=headers, timeout=10)
        return answer.status_code, answer.headers.get("Range")

    first, last = LARGE[:MIB], LARGE[MIB : 2 * MIB]
    assert put(b"", "*") == (308, None)
    assert put(first, f"0-{MIB - 1}") == (308, f"bytes=0-{MIB - 1}")
    assert put(first, f"0-{MIB - 1}") == (308, f"bytes=0-{MIB - 1}")
    emulator.inject(Reset(), kind="chunk", at=1)
    with pytest.raises(requests.ConnectionError):
        put(last, f"{MIB}-{2 * MIB - 1}")
    assert put(b"", "*") == (308, f"bytes=0-{MIB - 1}")
    emulator.inject(LostResponse(), kind="chunk", at=1)
    with pytest.raises(requests.ConnectionError):
        put(last, f"{MIB}-{2 * MIB - 1}")
    assert put(b"", "*") == (200, None)
    assert emulator.objects() == {"name": first + last}


def test_session_can_be_cancelled(emulator: Emulator, bucket: storage.Bucket) -> None:
    url = bucket.blob("name").create_resumable_upload_session()
    assert requests.delete(url, timeout=10).status_code == 499
    assert requests.put(url, data=b"", timeout=10).status_code == 404
    assert answers(emulator) == "session 200, other 499, chunk 404"
    assert emulator.objects() == {}


def test_what_is_not_right_is_refused(
    emulator: Emulator, bucket: storage.Bucket
) -> None:
    elsewhere = bucket.client.bucket("elsewhere").blob("name")
    with pytest.raises(NotFound, match="The specified bucket does not exist."):
        elsewhere.create_resumable_upload_session()
    with pytest.raises(BadRequest, match="CRC32C"):
        bucket.blob("name").upload_from_file(
            io.BytesIO(LARGE), checksum=None, crc32c_checksum_value=crc32c_of(SMALL)
        )
    emulator.requester_pays = True
    with pytest.raises(BadRequest, match="requester pays"):
        upload(bucket, "name", SMALL)
    assert emulator.objects() == {}
    upload(bucket.client.bucket("bucket", user_project="payer"), "name", SMALL)
    assert emulator.objects() == {"name": SMALL}


def test_listing_has_pages(emulator: Emulator, bucket: storage.Bucket) -> None:
    for index in range(1_001):
        emulator.put(f"a/{index:04}", SMALL[:index], METADATA)
    emulator.put("b", b"")
    blobs = list(bucket.list_blobs(prefix="a/"))
    assert [blob.name for blob in blobs] == [f"a/{index:04}" for index in range(1_001)]
    assert [blob.size for blob in blobs] == list(range(1_001))
    assert (blobs[7].metadata, blobs[7].crc32c) == (METADATA, crc32c_of(SMALL[:7]))
    assert answers(emulator) == "list 200, list 200"


def test_throttle_limits_all_connections_together(
    emulator: Emulator, bucket: storage.Bucket
) -> None:
    emulator.bytes_per_second = 1e6
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: upload(bucket, f"{index}", SMALL), range(8)))
    assert time.monotonic() - started >= 0.8
    emulator.bytes_per_second, emulator.latency = None, 0.3
    started = time.monotonic()
    upload(bucket, "name", SMALL)
    assert time.monotonic() - started >= 0.3


def test_process_throws_away_what_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(module.__file__), "--bytes_per_second=1e9"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", process.stdout.readline().strip())
        bucket = storage.Client(project="project").bucket("bucket")
        for data in (b"", SMALL, LARGE):
            blob = bucket.blob(f"{len(data)}", chunk_size=CHUNK_SIZE)
            blob.metadata = {"crc32c": crc32c_of(data)}
            blob.upload_from_file(
                io.BytesIO(data), checksum=None, crc32c_checksum_value=crc32c_of(data)
            )
        assert bucket.blob(f"{len(SMALL)}").download_as_bytes(checksum=None) == b""
        listed = {blob.name: (blob.size, blob.crc32c) for blob in bucket.list_blobs()}
        process.kill()
    assert listed == {f"{len(d)}": (len(d), crc32c_of(d)) for d in (b"", SMALL, LARGE)}
