"""Plays with a real bucket what the tests play with an emulator; run it by hand.

    python tests/real_bucket.py --project=PROJECT gs://BUCKET/EMPTY_DIRECTORY

It uploads about 30 MB (a cent), deletes what it wrote, and prints a transcript: a line
for each step with what was expected and what happened. Put it into a report.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import imagenet_to_gcs as script

SLOW_BYTES_PER_SECOND = 1_000_000


def say(step: str, expected: str, play: Callable[[], object]) -> bool:
    """Plays a step; prints what was expected of it and what happened."""
    start = time.monotonic()
    try:
        happened = str(play())
    except Exception as error:  # noqa: BLE001  # the transcript says which
        happened = f"{type(error).__name__}: {script.Fault(error).words}"
    is_right = expected in happened
    verdict = "as expected" if is_right else f"EXPECTED {expected}"
    print(
        f"{step}: {happened} ({time.monotonic() - start:.1f} s; {verdict})", flush=True
    )
    return is_right


class Play:
    """The steps, in their order."""

    def __init__(self, path: str, project: str, directory: str):
        self.destination = script.Destination(script.GcsPath.parse(path), project)
        self.client: Any = self.destination.client
        self.bucket = self.client.bucket(self.destination.path.bucket)
        self.small = self.new_file(directory, "train-00000-of-00002", 100_000)
        self.large = self.new_file(directory, "train-00001-of-00002", 12_000_000)

    @staticmethod
    def new_file(directory: str, name: str, num_bytes: int) -> str:
        path = os.path.join(directory, name)
        Path(path).write_bytes(os.urandom(num_bytes))
        return path

    def blob(self, path: str) -> Any:
        name = self.destination.path.name_of(os.path.basename(path))
        return self.bucket.blob(name, chunk_size=script.UPLOAD_CHUNK_BYTES)

    def listing(self) -> str:
        return f"{len(self.destination.list_objects())} objects"

    def probe(self) -> str:
        """Starts an upload that is abandoned: no object may come of it."""
        self.destination.check_access(os.path.basename(self.small))
        return self.listing()

    def upload(self, path: str, bytes_per_second: float = 1e12) -> str:
        def slowly(num_bytes: int) -> None:
            time.sleep(max(num_bytes, 0) / bytes_per_second)

        stamp = script.measure(path)
        self.destination.upload(path, stamp, slowly)
        there = self.destination.list_objects()[os.path.basename(path)]
        return "the same bytes" if there.same_bytes(stamp) else f"other bytes: {there}"

    def replace(self) -> str:
        Path(self.small).write_bytes(os.urandom(50_000))
        return self.upload(self.small)

    def create_only(self) -> None:
        with open(self.small, "rb") as file:
            self.blob(self.small).upload_from_file(file, if_generation_match=0)

    def wrong_crc32c(self) -> None:
        with open(self.large, "rb") as file:
            self.blob(self.large).upload_from_file(
                file, crc32c_checksum_value="AAAAAA=="
            )

    def read(self) -> str:
        manifest = self.new_file(os.path.dirname(self.small), script.MANIFEST_FILE, 0)
        Path(manifest).write_text('{"labels": {}}\n')
        self.upload(manifest)
        return self.destination.read(script.MANIFEST_FILE)

    def clean_up(self) -> str:
        for name in self.destination.list_objects():
            self.destination.delete(name)
        return self.listing()

    def all(self) -> bool:
        steps: list[tuple[str, str, Callable[[], object]]] = [
            ("listing an empty directory", "0 objects", self.listing),
            ("probe, whose session is abandoned", "0 objects", self.probe),
            ("small file", "the same bytes", lambda: self.upload(self.small)),
            (
                "large file, in chunks",
                "the same bytes",
                lambda: self.upload(self.large),
            ),
            ("replacing", "the same bytes", self.replace),
            ("create only, over an object", "412", self.create_only),
            ("wrong crc32c", "400", self.wrong_crc32c),
            (
                f"slow line, {SLOW_BYTES_PER_SECOND:,} bytes/s",
                "the same bytes",
                lambda: self.upload(self.large, SLOW_BYTES_PER_SECOND),
            ),
            ("reading a manifest", '{"labels": {}}', self.read),
            ("cleaning up", "0 objects", self.clean_up),
        ]
        return all([say(*step) for step in steps])  # noqa: C419  # all are played


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", help="an empty gs://bucket/directory")
    parser.add_argument("--project", required=True)
    arguments = parser.parse_args()
    from google.cloud import storage

    versions = f"Python {platform.python_version()}, storage {storage.__version__}"
    print(f"{arguments.path}: {versions}, version {script.__version__}")
    with tempfile.TemporaryDirectory() as directory:
        play = Play(arguments.path, arguments.project, directory)
        if play.destination.list_objects():
            sys.exit(f"{arguments.path} must be empty; nothing was done.")
        sys.exit(0 if play.all() else 1)


if __name__ == "__main__":
    main()
