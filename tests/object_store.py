"""A server that speaks S3, on the loopback interface."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_dist.storage import at
from tests.processes import PATIENCE_S

BUCKET = "bucket"
# Made anew, so that a search for the secret does not find this line.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex}


@contextlib.contextmanager
def object_store(log: Path) -> Iterator[str]:
    """The address of a folder in a bucket; the credentials are in the environment meanwhile.

    Args:
        log: for what the server prints.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=out, stderr=out,
        )  # fmt: skip
    try:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.2)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in CREDENTIALS.items():
                patch.setenv(name, value)
            query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
            bucket = at(f"s3://{BUCKET}?{query}&allow_bucket_creation=true")
            bucket.mkdir(exist_ok=True)
            yield f"s3://{BUCKET}/runs?{query}"
    finally:
        server.terminate()
        server.wait()
