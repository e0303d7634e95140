"""An S3 for tests: moto's server in a process of its own, a new bucket for each test; and ways to make it fail."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from batchsd import object_store


@contextmanager
def moto() -> Iterator[str]:
    """The endpoint of a server of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{endpoint}/moto-api/data.json")
        yield endpoint
    finally:
        server.kill()
        server.wait()


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
