"""Emulates Cloud Storage over HTTP, with faults on demand, for the tests.

    with Emulator(bucket="bucket") as emulator:
        emulator.inject(Status(503), kind="chunk", at=2, times=3)
        subprocess.run([...], env={**os.environ, **emulator.environment})
        assert emulator.objects()["imagenet/train-00000-of-01024"] == ...

As a process, `python tests/emulator.py --bytes_per_second=1e8` prints its URL, takes
uploads and throws their bytes away, until it is killed.

It does what a client of the real service could notice: a chunk sent twice is stored
once, a finished upload still answers with its object (both follow a lost connection),
a session can be cancelled (499), a wrong crc32c is refused (400), a listing comes in
pages of 1,000 objects, and errors carry the JSON that the client takes its message
from. It also issues tokens, as Google's token endpoint, the metadata server of a VM and
the impersonation of a service account do.

NOTE: permissions are not checked: inject a `Status`.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLContext
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

Kind = Literal["session", "chunk", "list", "delete", "token", "other"]
UPLOAD_KINDS = ("session", "chunk")

PIECE_SIZE = 64 * 1024  # bytes of a body read, and throttled, at a time
CHUNK_UNIT = 256 * 1024  # the real service keeps multiples of it of a chunk
PAGE_SIZE = 1000  # objects in a page of a listing

# ---------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Status:
    """Answers with an error, 400 to 599, and does nothing else.

    Attributes:
        message: By default the status's name.
        reason: By default made of the status's name. Of a token: `invalid_grant`, say.
    """

    status: int
    message: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Reset:
    """Resets the connection (TCP RST) after 64 KiB of the body at most."""


@dataclass(frozen=True)
class LostResponse:
    """Carries the request out, then resets the connection instead of answering."""


@dataclass(frozen=True)
class ShortRange:
    """Stores half of a chunk (of nothing else), and answers so (308)."""


@dataclass(frozen=True)
class Stall:
    """Carries the request out, then waits before it answers."""

    seconds: float


@dataclass(frozen=True)
class WrongContent:
    """Stores a wrong byte in the object, once its upload is complete.

    The answer has the crc32c of what is stored, as any later listing has, or with
    `answer_looks_right` the one of what was sent.
    """

    answer_looks_right: bool = False


Fault = Status | Reset | LostResponse | ShortRange | Stall | WrongContent


@dataclass(frozen=True)
class Request:
    """A request as the emulator received it; the path is with the query.

    A `session` starts a resumable upload, a `chunk` is a PUT of one (data, or the
    question how far it got), a `token` is of anything to log in with. To cancel a
    session is `other`.
    """

    method: str
    path: str
    kind: Kind
    name: str
    status: int | None = None  # of the answer; None if there was none, or not yet

    @property
    def query(self) -> dict[str, str]:
        return {key: v[0] for key, v in parse_qs(urlsplit(self.path).query).items()}


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


def crc32c_of(data: bytes) -> str:
    """The checksum of an object, as Cloud Storage says it."""
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


@dataclass
class _Upload:
    """What has arrived of an object; without `data` where bytes are thrown away."""

    resource: dict[str, Any]
    num_bytes: int = 0
    data: bytearray = field(default_factory=bytearray)
    finished: bool = False


@dataclass
class _Answer:
    status: int
    content: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        return b"" if self.content is None else json.dumps(self.content).encode()


def _refusal(error: Status, kind: str = "") -> _Answer:
    """An error like the real service's; those of a token have another shape."""
    phrase = http.client.responses.get(error.status, "Client Closed Request")
    message = error.message or phrase
    reason = error.reason or phrase[0].lower() + phrase[1:].replace(" ", "")
    if kind == "token" and error.reason:
        return _Answer(error.status, {"error": reason, "error_description": message})
    one = {"message": message, "domain": "global", "reason": reason}
    content = {"code": error.status, "message": message, "errors": [one]}
    return _Answer(error.status, {"error": content})


def _list_page(items: list[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """Cuts a page out of a listing; its token is the last name of the page before."""
    prefix, after = query.get("prefix", ""), query.get("pageToken", "")
    beyond = query.get("delimiter") or "\0"
    items = [
        item
        for item in items
        if item["name"].startswith(prefix)
        and item["name"] > after
        and beyond not in item["name"].removeprefix(prefix)
    ]
    page = items[:PAGE_SIZE]
    more = {"nextPageToken": page[-1]["name"]} if len(items) > PAGE_SIZE else {}
    return {"items": page, **more}


# ------------------------------------------------------------------------- the server


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, emulator: Emulator, *args: Any) -> None:
        self.emulator = emulator
        self.body, self.length = bytearray(), 0
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._read(min(length, PIECE_SIZE))
        request = self._identify(bytes(body))
        index, fault = self.emulator._begin(request)
        if isinstance(fault, Reset):
            self._reset()
            return
        if self.emulator.keep or request.kind not in UPLOAD_KINDS:
            body += self._read(length - len(body))
            num_bytes = len(body)
        else:
            num_bytes = len(body) + self._discard(length - len(body))
        if num_bytes < length:  # the client died
            self.close_connection = True
            return
        self.body, self.length = body, length
        answer = self.emulator._answer(self, request, fault)
        stall = fault.seconds if isinstance(fault, Stall) else 0.0
        self.emulator._closing.wait(self.emulator.latency + stall)
        if isinstance(fault, LostResponse):
            self._reset()
        else:
            self.emulator._end(index, answer.status)
            self._send(answer)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def do_CONNECT(self) -> None:
        """Is a proxy that lets nobody through."""
        self._send(_refusal(Status(407)))

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

    def _discard(self, length: int) -> int:
        """Reads the body, the most of it uncopied: on 2 processors that counts."""
        if not length:
            return 0
        here = self.rfile.read(min(length, len(self.rfile.peek())))  # type: ignore[attr-defined]
        num_bytes = len(here)
        nowhere = bytearray(2**20)
        while num_bytes < length:
            left = min(length - num_bytes, len(nowhere))
            piece = self.connection.recv_into(nowhere, left, socket.MSG_TRUNC)
            if not piece:
                break
            num_bytes += piece
            self.emulator._throttle(piece)
        return num_bytes

    def _identify(self, start_of_body: bytes) -> Request:
        """Tells what the request is about; the body's first 64 KiB are enough."""
        request = Request(self.command, self.path, "other", "")
        url, query = urlsplit(self.path), request.query
        _, is_object, quoted_name = url.path.partition("/o/")
        kind: Kind = "other"
        name = unquote(quoted_name)
        if not url.path.startswith(("/storage/", "/upload/", "/download/")):
            kind, name = "token", url.path
        elif "upload_id" in query:
            kind = "chunk" if self.command == "PUT" else "other"
            name = self.emulator._name_of_upload(query["upload_id"])
        elif "uploadType" in query:
            kind = "session"
            name = query.get("name") or json.loads(start_of_body)["name"]
        elif is_object:
            kind = "delete" if self.command == "DELETE" else "other"
        elif url.path.endswith("/o") and self.command == "GET":
            kind = "list"
        return replace(request, kind=kind, name=name)

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
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

    def __init__(self, *args: Any) -> None:
        self.connections: set[Any] = set()  # that are open
        super().__init__(*args)

    def get_request(self) -> Any:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that died
            super().handle_error(request, client_address)


class Emulator:
    """A Cloud Storage with one bucket, on a free port of this machine.

    Attributes:
        bucket: The only bucket there is; any other answers 404.
        keep: Whether to keep what is uploaded. Else an object has its size, and the
            crc32c that its metadata tell.
        requester_pays: Whether each request must say which project pays.
        leaves_out_zero: Whether a resource has no `size` where it is 0.
        bytes_per_second: Limits the upload of all connections together; None does not.
        latency: Seconds before each answer.
    """

    def __init__(
        self, bucket: str = "bucket", keep: bool = True, tls: SSLContext | None = None
    ) -> None:
        self.bucket = bucket
        self.keep = keep
        self.requester_pays = False
        self.leaves_out_zero = False
        self.bytes_per_second: float | None = None
        self.latency = 0.0
        self._lock = threading.RLock()  # over all below; never held while waiting
        self._resources: dict[str, dict[str, Any]] = {}  # by name
        self._contents: dict[str, bytes] = {}
        self._uploads: dict[str, _Upload] = {}  # by upload id
        self._upload_ids = itertools.count(1)
        self._requests: list[Request] = []
        self._injections: list[_Injection] = []
        self._wrong_content: dict[str, WrongContent] = {}  # by object, until complete
        self._next_piece = 0.0  # time.monotonic() at which the throttle lets it pass
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), partial(_Handler, self))
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._scheme = "https" if tls else "http"
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
        for connection in list(self._server.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"

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
                only checks the access) and chunk.
            at: The first request struck; 1 is the next one of the kind.
            times: How many in a row are struck, retries included; None is for ever.
            name: Only requests whose object's name contains this count.
        """
        with self._lock:
            self._injections.append(_Injection(fault, kind, at, times, name))

    def heal(self) -> None:
        """Takes back all faults injected so far."""
        with self._lock:
            self._injections.clear()
            self._wrong_content.clear()

    def settle(self) -> None:
        """Waits until all is done that clients which have ended had asked for."""
        last = http.client.HTTPConnection("127.0.0.1", self._server.server_port)
        last.request("HEAD", "/")  # is refused, but only after theirs were accepted
        last.getresponse()
        last.close()
        while self._server.connections:
            time.sleep(0.01)

    def has_struck(self) -> bool:
        """Tells whether each fault injected so far has struck as often as it was to."""
        with self._lock:
            return all(
                i.num_seen >= i.at - 1 + (i.times or 1) for i in self._injections
            )

    def objects(self) -> dict[str, bytes]:
        """Returns the content of each object."""
        with self._lock:
            return dict(self._contents)

    def metadata(self, name: str) -> dict[str, str]:
        """Returns an object's custom metadata."""
        with self._lock:
            return dict(self._resources[name].get("metadata") or {})

    def put(
        self,
        name: str,
        data: bytes,
        metadata: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> None:
        """Places an object as somebody else would; no request is recorded.

        Args:
            **fields: Of its resource, such as `temporaryHold`.
        """
        with self._lock:
            resource = {"name": name, "metadata": dict(metadata or {}), **fields}
            self._store(_Upload(resource, len(data), bytearray(data)))

    def delete(self, name: str) -> None:
        """Deletes an object as somebody else would."""
        with self._lock:
            del self._resources[name], self._contents[name]

    def corrupt(self, name: str, *, truncate: bool = False) -> None:
        """Changes a byte of an object, or drops its second half; its crc32c follows."""
        with self._lock:
            data = bytearray(self._contents[name])
            if truncate:
                del data[len(data) // 2 :]
            elif data:
                data[len(data) // 2] ^= 0xFF
            resource = {**self._resources[name], "crc32c": None}
            self._store(_Upload(resource, len(data), data))

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
        self, handler: _Handler, request: Request, fault: Fault | None
    ) -> _Answer:
        """Carries a request out, unless the fault is that it is not."""
        if isinstance(fault, Status):
            return _refusal(fault, request.kind)
        if request.kind == "token":
            return _token(request)
        if f"/b/{self.bucket}/o" not in request.path:
            return _refusal(Status(404, "The specified bucket does not exist."))
        if self.requester_pays and "userProject" not in request.query:
            said = "Bucket is a requester pays bucket but no user project provided."
            return _refusal(Status(400, said, "required"))
        with self._lock:
            is_new = request.query.get("ifGenerationMatch") == "0"
            if is_new and request.name in self._resources:
                return _refusal(Status(412, "", "conditionNotMet"))
            if request.kind == "session":
                return self._answer_session(request, bytes(handler.body))
            if "upload_id" in request.query:
                if isinstance(fault, ShortRange):
                    handler.length = handler.length // 2 // CHUNK_UNIT * CHUNK_UNIT
                return self._answer_chunk(handler, request)
            if request.kind == "list":
                items = [self._resources[name] for name in sorted(self._resources)]
                return _Answer(200, _list_page(items, request.query))
            if request.name not in self._resources:
                return _refusal(Status(404, f"No such object: {request.name}"))
            if request.path.startswith("/download/"):
                return _Answer(200, self._contents[request.name])
            if request.kind == "delete":
                self.delete(request.name)
                return _Answer(204)
            return _refusal(Status(501))

    def _answer_session(self, request: Request, body: bytes) -> _Answer:
        upload_id = str(next(self._upload_ids))
        resource = {**json.loads(body or b"{}"), "name": request.name}
        self._uploads[upload_id] = _Upload(resource)
        url = f"{self.url}{request.path}&upload_id={upload_id}"
        return _Answer(200, {}, {"Location": url})

    def _answer_chunk(self, handler: _Handler, request: Request) -> _Answer:
        """Appends what is new in a chunk: it may come again if the answer was lost."""
        upload_id = request.query["upload_id"]
        upload = self._uploads.get(upload_id)
        if request.method == "DELETE":
            self._uploads.pop(upload_id, None)
            return _refusal(Status(499))
        if not upload:
            return _refusal(Status(404))
        if upload.finished:
            return _Answer(200, self._resources[request.name])
        text = handler.headers["Content-Range"]
        match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", text)
        assert match, text
        start = int(match[1]) if match[1] else upload.num_bytes
        if start > upload.num_bytes:
            said = f"Chunk starts at {start}, expected {upload.num_bytes}"
            return _refusal(Status(400, said))
        if self.keep:
            upload.data += handler.body[upload.num_bytes - start : handler.length]
        upload.num_bytes = max(upload.num_bytes, start + handler.length)
        if match[2] == str(upload.num_bytes):
            upload.finished = True
            return self._store(upload)
        arrived = {"Range": f"bytes=0-{upload.num_bytes - 1}"}
        html = {"Content-Type": "text/html; charset=UTF-8"}  # as Google's, though empty
        return _Answer(308, None, html | (arrived if upload.num_bytes else {}))

    def _store(self, upload: _Upload) -> _Answer:
        """Makes an object of what has arrived, and answers with its resource."""
        data, resource = bytes(upload.data), upload.resource
        upload.data = bytearray()
        name, declared = resource["name"], resource.get("crc32c")
        resource["size"] = str(upload.num_bytes)
        if self.leaves_out_zero and not upload.num_bytes:
            del resource["size"]
        if self.keep:
            resource["crc32c"] = crc32c_of(data)
        else:
            data = b""
            resource["crc32c"] = resource["metadata"]["crc32c"]
        if declared and declared != resource["crc32c"]:
            said = (
                f'Provided CRC32C "{declared}" doesn\'t match calculated CRC32C '
                f'"{resource["crc32c"]}".'
            )
            return _refusal(Status(400, said, "invalid"))
        resource["generation"] = str(time.time_ns())
        self._resources[name], self._contents[name] = resource, data
        answer = _Answer(200, dict(resource))
        if fault := self._wrong_content.pop(name, None):
            self.corrupt(name)
            if not fault.answer_looks_right:
                answer.content = self._resources[name]
        return answer

    def _name_of_upload(self, upload_id: str) -> str:
        with self._lock:
            upload = self._uploads.get(upload_id)
            return upload.resource["name"] if upload else ""

    def _throttle(self, num_bytes: int) -> None:
        """Waits until the bytes may pass, in turn with the other connections."""
        if self.bytes_per_second is None:
            return
        with self._lock:
            seconds = num_bytes / self.bytes_per_second
            self._next_piece = max(self._next_piece, time.monotonic()) + seconds
            pause = self._next_piece - time.monotonic()
        self._closing.wait(pause)


def _token(request: Request) -> _Answer:
    """Logs anybody in: at the token endpoint, the metadata server, or as another."""
    if request.name.endswith("universe-domain"):
        return _Answer(404)
    content = {
        "access_token": "token",
        "accessToken": "token",
        "email": "me@example.com",
        "expires_in": 3600,
        "expireTime": "2100-01-01T00:00:00Z",
        "scopes": [],
    }
    return _Answer(200, content, {"Metadata-Flavor": "Google"})


if __name__ == "__main__":
    with Emulator(keep=False) as emulator:
        if len(sys.argv) > 1:
            emulator.bytes_per_second = float(sys.argv[1].partition("=")[2]) or None
        print(emulator.url, flush=True)
        signal.pause()
