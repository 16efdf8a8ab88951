"""Emulates Cloud Storage over HTTP, with faults on demand, for the tests.

    with Emulator(bucket="bucket") as emulator:
        emulator.inject(Status(503), kind="chunk", at=2, times=3)
        subprocess.run([...], env={**os.environ, **emulator.environment})
        assert emulator.objects()["imagenet/train-00000-of-01024"] == ...

The answers come from gcp-storage-emulator, which keeps everything in memory. This file
puts many threads and the faults in front of it, and corrects what a client of the real
service could notice: a chunk sent twice is stored once, a finished upload still answers
with its object (both follow a lost connection), an upload of which nothing has arrived
has no `Range`, a session can be cancelled (499), a listing comes in pages of 1,000
objects with only the `fields` asked for, errors carry the JSON that the client takes
its message from, connections are kept alive, and a dying client leaves nothing behind.

NOTE: permissions and `if_generation_match` are not checked: inject a `Status`.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from email.message import Message
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.exceptions import BadRequest
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.server import HANDLERS, Response
from gcp_storage_emulator.server import Request as EmulatorRequest
from gcp_storage_emulator.storage import Storage

Kind = Literal["session", "chunk", "multipart", "list", "get", "delete", "other"]
UPLOAD_KINDS = ("session", "chunk", "multipart")

PIECE_SIZE = 64 * 1024  # bytes of a body read, and throttled, at a time
CHUNK_UNIT = 256 * 1024  # the real service keeps multiples of it of a chunk
PAGE_SIZE = 1000  # objects in a page of a listing

# ---------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Status:
    """Answers with an error, 400 to 599, and does nothing else."""

    status: int
    message: str = ""  # of the client's exception; by default the status's name


@dataclass(frozen=True)
class Reset:
    """Resets the connection (TCP RST) after 64 KiB of the body at most."""


@dataclass(frozen=True)
class Stall:
    """Carries the request out, then waits before it answers."""

    seconds: float


@dataclass(frozen=True)
class ShortRange:
    """Stores half of a resumable upload's chunk, and answers so (308)."""


@dataclass(frozen=True)
class LostResponse:
    """Carries the request out, then resets the connection instead of answering."""


@dataclass(frozen=True)
class WrongContent:
    """Stores a wrong byte in the object, once its upload is complete.

    The answer has the crc32c of what is stored, as any later listing has, or with
    `answer_looks_right` the one of what was sent.
    """

    answer_looks_right: bool = False


Fault = Status | Reset | Stall | ShortRange | LostResponse | WrongContent


@dataclass(frozen=True)
class Request:
    """A request as the emulator received it; the path is with the query.

    A `session` starts a resumable upload, a `chunk` is a PUT of one (data, or the
    question how far it got), a `multipart` is an upload in one POST, a `get` is of an
    object or its metadata. To cancel a session is `other`.
    """

    method: str
    path: str
    kind: Kind
    name: str
    status: int | None = None  # of the answer; None if there was none, or not yet


@dataclass
class _Injection:
    """A fault and the requests it strikes; `num_seen` counts those that match."""

    fault: Fault
    kind: str
    at: int
    times: int | None
    name: str
    num_seen: int = 0

    def strikes(self, request: Request) -> bool:
        """Counts the request if it matches, and tells whether it gets the fault."""
        kinds = UPLOAD_KINDS if self.kind == "upload" else (self.kind,)
        if request.kind not in kinds or self.name not in request.name:
            return False
        self.num_seen += 1
        since = self.num_seen - self.at
        return since >= 0 and (self.times is None or since < self.times)


# ----------------------------------------------------------------- the emulated service


class _Storage(Storage):  # type: ignore[misc]
    """The emulator's storage in memory, with resumable uploads like the real ones."""

    def __init__(self, bucket: str) -> None:
        super().__init__(use_memory_fs=True)
        self.arrived: dict[str, bytearray] = {}  # by upload id
        buckets.create_bucket(bucket, self)
        # Else each object deleted stays in memory.
        self.buckets[bucket]["softDeletePolicy"] = {"retentionDurationSeconds": "0"}

    def _write_config_to_file(self) -> None:
        """Saves nothing: to serialise all objects at each request takes minutes."""

    def get_resumable_byte_count(self, file_id: str) -> int:
        return len(self.arrived.get(file_id, b""))

    def add_to_resumable_upload(
        self, file_id: str, content: bytes, total_size: int | None, expected_start: int
    ) -> bytes | None:
        """Appends what is new in a chunk: it may come again if the answer was lost."""
        data = self.arrived.setdefault(file_id, bytearray())
        if expected_start > len(data):
            raise BadRequest(f"Chunk starts at {expected_start}, expected {len(data)}")
        data += content[len(data) - expected_start :]
        if total_size is None or len(data) < total_size:
            return None
        return bytes(data)

    def damage(self, bucket: str, name: str, truncate: bool = False) -> dict[str, Any]:
        """Changes an object's bytes, if it has any, and returns its new resource."""
        data = bytearray(self.get_file(bucket, name))
        if truncate:
            del data[len(data) // 2 :]
        elif data:
            data[len(data) // 2] ^= 0xFF
        hashes = {"crc32c": None, "md5Hash": None, "etag": None}
        resource: dict[str, Any] = objects._checksums(
            bytes(data),
            {**self.get_file_obj(bucket, name), **hashes, "size": str(len(data))},
        )
        self.create_file(bucket, name, bytes(data), resource)
        return resource


class _Answer(Response):  # type: ignore[misc]
    """The emulator's answer to a request, before it is sent."""

    def __init__(self) -> None:
        super().__init__(None)

    @property
    def headers(self) -> dict[str, str]:
        return self._headers  # type: ignore[no-any-return]

    @property
    def body(self) -> bytes:
        content: str | bytes = self._content
        return content.encode() if isinstance(content, str) else content

    def refuse(self, status: int, message: str = "") -> None:
        """Makes it an error like the real service's."""
        phrase = http.client.responses.get(status, "Client Closed Request")
        message = message or phrase
        reason = phrase[0].lower() + phrase[1:].replace(" ", "")
        error = {"message": message, "domain": "global", "reason": reason}
        self.status = status
        self.json({"error": {"code": status, "message": message, "errors": [error]}})


def _list_page(
    listing: dict[str, Any], query: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Cuts a page out of a complete listing, and the fields asked for out of it.

    `fields` is as in `items(name,size),nextPageToken`. A page's token is the last name
    of the page before.
    """
    after = query.get("pageToken", [""])[0]
    items = [item for item in listing["items"] if item["name"] > after]
    size = min(int(query.get("maxResults", [PAGE_SIZE])[0]), PAGE_SIZE)
    listing["items"] = items[:size]
    if len(items) > size:
        listing["nextPageToken"] = items[size - 1]["name"]
    fields = query.get("fields", [""])[0]
    kept: dict[str, str] = dict(re.findall(r"(\w+)(?:\(([^)]*)\))?", fields))
    if kept.get("items"):
        keys = set(kept["items"].split(","))
        listing["items"] = [
            {key: item[key] for key in keys & item.keys()} for item in listing["items"]
        ]
    return {key: listing[key] for key in listing if key in kept or not kept}


def _keep_half(headers: Message, body: bytes) -> bytes:
    """Cuts a chunk short, with its `Content-Range: bytes START-END/TOTAL`.

    A chunk of less than 512 KiB becomes the question how far the upload got.
    """
    match = re.fullmatch(r"bytes (\d+)-\d+/(.+)", headers.get("Content-Range", ""))
    if match is None:
        return body
    start, total = int(match[1]), match[2]
    kept = body[: len(body) // 2 // CHUNK_UNIT * CHUNK_UNIT]
    span = f"{start}-{start + len(kept) - 1}/{total}" if kept else "*/*"
    headers.replace_header("Content-Range", f"bytes {span}")
    return kept


# ------------------------------------------------------------------------- the server


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, emulator: Emulator, *args: Any) -> None:
        self.emulator = emulator
        super().__init__(*args)

    def setup(self) -> None:
        super().setup()
        self.emulator._connections.add(self.connection)

    def finish(self) -> None:
        self.emulator._connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._read(min(length, PIECE_SIZE))
        index, fault = self.emulator._begin(self._identify(bytes(body)))
        if isinstance(fault, Reset):
            self._reset()
            return
        body += self._read(length - len(body))
        if len(body) < length:  # the client died
            self.close_connection = True
            return
        answer = self.emulator._answer(self, index, fault, bytes(body))
        stall = fault.seconds if isinstance(fault, Stall) else 0.0
        self.emulator._closing.wait(self.emulator.latency + stall)
        if isinstance(fault, LostResponse):
            self._reset()
        else:
            self.emulator._end(index, int(answer.status))
            self._send(answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _read(self, length: int) -> bytearray:
        """Reads as much of the body, or less if the connection ends."""
        data = bytearray()
        while len(data) < length:
            piece = self.rfile.read(min(PIECE_SIZE, length - len(data)))
            if not piece:
                break
            data += piece
            self.emulator._throttle(len(piece))
        return data

    def _identify(self, start_of_body: bytes) -> Request:
        """Tells what the request is about; the body's first 64 KiB are enough."""
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        _, is_object, quoted_name = url.path.partition("/o/")
        name = unquote(quoted_name)
        kind: Kind = "other"
        if "upload_id" in query:
            kind = "chunk" if self.command == "PUT" else "other"
            name = self.emulator._name_of_upload(query["upload_id"][0])
        elif "uploadType" in query:
            kind = "multipart" if query["uploadType"] == ["multipart"] else "session"
            text = start_of_body or b"{}"
            if kind == "multipart":  # its first part is the JSON
                text = text.partition(b"\r\n\r\n")[2].partition(b"\r\n--")[0]
            name = query["name"][0] if "name" in query else json.loads(text)["name"]
        elif is_object:
            kinds: dict[str, Kind] = {"GET": "get", "DELETE": "delete"}
            kind = kinds.get(self.command, "other")
        elif url.path.endswith("/o") and self.command == "GET":
            kind = "list"
        return Request(self.command, self.path, kind, name)

    def _send(self, answer: _Answer) -> None:
        self.send_response(int(answer.status))
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def _reset(self) -> None:
        """Resets the connection; `close` alone would say an orderly farewell first."""
        for_0_seconds = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, for_0_seconds)
        os.close(self.connection.detach())
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default 5 delays the sixth client by a second

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that died
            super().handle_error(request, client_address)


class Emulator:
    """A Cloud Storage with one bucket, on a free port of this machine.

    Attributes:
        bucket: The only bucket there is; any other answers 404.
        bytes_per_second: Limits the upload of all connections together; None does not.
        latency: Seconds before each answer.
    """

    def __init__(self, bucket: str = "bucket") -> None:
        self.bucket = bucket
        self.bytes_per_second: float | None = None
        self.latency = 0.0
        self._lock = threading.RLock()  # over all below; never held while waiting
        self._storage = _Storage(bucket)
        self._requests: list[Request] = []
        self._injections: list[_Injection] = []
        self._finished: dict[str, dict[str, Any]] = {}  # by upload id, the object
        self._wrong_content: dict[str, WrongContent] = {}  # by object, until complete
        self._next_piece = 0.0  # time.monotonic() at which the throttle lets it pass
        self._connections: set[socket.socket] = set()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    def __enter__(self) -> Emulator:  # noqa: PYI034
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this Cloud Storage."""
        return {"STORAGE_EMULATOR_HOST": self.url, "NO_GCE_CHECK": "true"}

    @property
    def requests(self) -> list[Request]:
        """The requests so far, in the order in which they arrived."""
        with self._lock:
            return list(self._requests)

    def inject(
        self,
        fault: Fault,
        kind: Kind | Literal["upload"] = "upload",
        at: int = 3,
        times: int | None = 1,
        name: str = "",
    ) -> None:
        """Has a fault strike requests to come; the fault injected first wins.

        Args:
            kind: What is struck and counted; `upload` is any of session (also one that
                only checks the access), chunk and multipart.
            at: The first request struck; 1 is the next one of the kind.
            times: How many in a row are struck, retries included; None is for ever.
            name: Only requests whose object's name contains this count.

        Raises:
            ValueError: If a `ShortRange` is to strike anything but chunks.
        """
        if isinstance(fault, ShortRange) and kind != "chunk":
            raise ValueError(f"ShortRange needs kind='chunk', not {kind!r}")
        with self._lock:
            self._injections.append(_Injection(fault, kind, at, times, name))

    def heal(self) -> None:
        """Takes back all faults injected so far."""
        with self._lock:
            self._injections.clear()
            self._wrong_content.clear()

    def objects(self) -> dict[str, bytes]:
        """Returns the content of each object."""
        with self._lock:
            return {
                name: self._storage.get_file(self.bucket, name)
                for name in self._storage.objects.get(self.bucket, {})
            }

    def metadata(self, name: str) -> dict[str, str]:
        """Returns an object's custom metadata."""
        with self._lock:
            resource = self._storage.get_file_obj(self.bucket, name)
            return dict(resource.get("metadata") or {})

    def put(
        self, name: str, data: bytes, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Places an object as somebody else would; no request is recorded."""
        custom = {"metadata": dict(metadata)} if metadata else None
        resource = objects._make_object_resource(
            self.url, self.bucket, name, "text/plain", str(len(data)), custom
        )
        with self._lock:
            resource = objects._checksums(data, resource)
            self._storage.create_file(self.bucket, name, data, resource)

    def delete(self, name: str) -> None:
        """Deletes an object as somebody else would."""
        with self._lock:
            self._storage.delete_file(self.bucket, name)

    def corrupt(self, name: str, *, truncate: bool = False) -> None:
        """Changes a byte of an object, or drops its second half; its crc32c follows."""
        with self._lock:
            self._storage.damage(self.bucket, name, truncate)

    # What follows is called by the connections' threads.

    def _begin(self, request: Request) -> tuple[int, Fault | None]:
        """Records a request; returns its index and the fault that strikes it."""
        with self._lock:
            self._requests.append(request)
            striking = [each for each in self._injections if each.strikes(request)]
            fault = striking[0].fault if striking else None
            if isinstance(fault, WrongContent) and request.kind in UPLOAD_KINDS:
                self._wrong_content[request.name] = fault
            return len(self._requests) - 1, fault

    def _end(self, index: int, status: int) -> None:
        with self._lock:
            self._requests[index] = replace(self._requests[index], status=status)

    def _answer(
        self, handler: _Handler, index: int, fault: Fault | None, body: bytes
    ) -> _Answer:
        """Carries a request out, unless the fault is that it is not."""
        answer = _Answer()
        if isinstance(fault, Status):
            answer.refuse(fault.status, fault.message)
            return answer
        if isinstance(fault, ShortRange):
            body = _keep_half(handler.headers, body)
        with self._lock:
            request = self._requests[index]
            query = parse_qs(urlsplit(request.path).query)
            upload_id = query.get("upload_id", [""])[0]
            if upload_id and request.method == "DELETE":
                self._storage.resumable.pop(upload_id, None)
                self._storage.arrived.pop(upload_id, None)
                answer.refuse(499)
            elif upload_id in self._finished:
                answer.json(self._finished[upload_id])
            else:
                self._route(handler, body, answer)
                self._correct(request, query, answer)
        return answer

    def _route(self, handler: _Handler, body: bytes, answer: _Answer) -> None:
        """Has gcp-storage-emulator answer."""
        sent = SimpleNamespace(
            path=handler.path,
            headers=handler.headers,
            rfile=io.BytesIO(body),
            server=self._server,
        )
        request = EmulatorRequest(sent, handler.command)
        for pattern, methods in HANDLERS:
            match = re.fullmatch(pattern, request.path)
            if match and handler.command in methods:
                request.set_match(match)
                methods[handler.command](request, answer, self._storage)
                return
        answer.refuse(501)

    def _correct(
        self, request: Request, query: dict[str, list[str]], answer: _Answer
    ) -> None:
        """Makes an answer of gcp-storage-emulator one of the real service."""
        if answer.status >= 400 and not answer.body:
            answer.refuse(int(answer.status))
        elif answer.status == 308 and answer.headers["Range"] == "bytes=0-0":
            del answer.headers["Range"]
        elif answer.status == 200 and request.kind == "list":
            answer.json(_list_page(json.loads(answer.body), query))
        elif answer.status == 200 and request.kind in ("chunk", "multipart"):
            fault = self._wrong_content.pop(request.name, None)
            if fault is not None:
                resource = self._storage.damage(self.bucket, request.name)
                if not fault.answer_looks_right:
                    answer.json(resource)
            if request.kind == "chunk":
                upload_id = query["upload_id"][0]
                self._finished[upload_id] = json.loads(answer.body)
                self._storage.arrived.pop(upload_id, None)

    def _name_of_upload(self, upload_id: str) -> str:
        with self._lock:
            for uploads in (self._storage.resumable, self._finished):
                if upload_id in uploads:
                    return str(uploads[upload_id]["name"])
            return ""

    def _throttle(self, num_bytes: int) -> None:
        """Waits until the bytes may pass, in turn with the other connections."""
        if self.bytes_per_second is None:
            return
        with self._lock:
            seconds = num_bytes / self.bytes_per_second
            self._next_piece = max(self._next_piece, time.monotonic()) + seconds
            pause = self._next_piece - time.monotonic()
        self._closing.wait(pause)
