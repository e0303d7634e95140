"""A run folder on S3 and what speaks its language: each operation is one request, which happens whole or not at all.

    create_only   PUT with If-None-Match: *        publish   server-side copy, staging stays until it is removed
    hand_in       PUT with Content-MD5             remove    list, then DELETE of each

Files are one PUT, never a multipart upload: nothing half-done can be left in the bucket, nor be finished late.
Credentials, region and endpoint are AWS's own variables and files; every request is tried again here alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from batchsd.redact import redact
from batchsd.scratch import Scratch
from batchsd.types import InfrastructureError, UsageError

Given = TypeVar("Given")

TRIES = 6  # of one request; with the waits between them about 15 seconds
FIRST_WAIT = 0.5  # seconds, doubled from try to try
AT_ONCE = 16  # requests in flight
READ_AHEAD = 1024  # files of `read_each`
MOST_BYTES = 5 * 2**30  # of one PUT or copy
READ_BYTES = 8 * 2**20  # fetched at once of a file that is read in pieces
PASSING = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted", "BadDigest"}
URI = re.compile(r"s3://([a-z0-9][a-z0-9.-]+[a-z0-9])(?:/+([^?#]*?))?/*")


class ObjectStore:
    """A run folder below a bucket's prefix. Workers build their files in `building`, on a local disk."""

    def __init__(self, uri: str, building: Scratch) -> None:
        """Raises UsageError for a URI that is not `s3://bucket/prefix`, or where the extra `s3` is not installed."""
        match = URI.fullmatch(uri)
        if match is None:
            raise UsageError(
                f"output.uri: {redact(uri)!r}: not of the form s3://bucket/folder; keys and endpoints come from the "
                "environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)"
            )
        self.bucket, self.prefix = match[1], match[2] or ""
        self.uri = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self.building = building
        self.client = client()

    def create_only(self, name: str, data: bytes) -> bool:
        sent = 0

        def put() -> bool:
            nonlocal sent
            sent += 1
            return self._put(name, data, IfNoneMatch="*")

        if self._ask(name, put, refused=("PreconditionFailed", "412")):
            return True
        # The answer to an earlier try may have been lost: then what stands there is ours.
        return sent > 1 and self.read(name) == data

    def put(self, name: str, data: bytes) -> None:
        self._ask(name, lambda: self._put(name, data))

    def read(self, name: str) -> bytes | None:
        return self._ask(name, lambda: self._get(name), refused=("NoSuchKey", "404"))

    def read_each(self, names: Iterable[str]) -> Iterator[bytes | None]:
        waiting = iter(names)
        while some := list(islice(waiting, READ_AHEAD)):
            yield from self._each(self.read, some)

    def open(self, name: str) -> BinaryIO | None:
        head = self._ask(name, lambda: self.client.head_object(**self._key(name)), refused=("NoSuchKey", "404"))
        if head is None:
            return None

        def fetch(first: int, last: int) -> bytes:
            return self._ask(name, lambda: self._get(name, first, last))

        return io.BufferedReader(_Pieces(head["ContentLength"], fetch), READ_BYTES)

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        return ((name, size) for name, size, _ in self.versions(folder))

    def versions(self, folder: str) -> Iterator[tuple[str, int, str]]:
        """`entries`, each with its ETag: another content has another."""
        top = self._path(folder) + "/"
        for page in self._pages(top, ""):
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):  # what consoles make for an empty folder
                    yield found["Key"][len(top) :], found["Size"], found["ETag"]

    def version(self, name: str) -> tuple[int, str] | None:
        """Bytes and ETag of one file; None where there is none."""
        head = self._ask(name, lambda: self.client.head_object(**self._key(name)), refused=("NoSuchKey", "404"))
        return None if head is None else (head["ContentLength"], head["ETag"])

    def etag_is_md5(self, name: str) -> bool:
        """Whether the ETag of a file of one PUT is its MD5: not where a key of KMS encrypts it."""
        head = self._ask(name, lambda: self.client.head_object(**self._key(name)))
        return head.get("ServerSideEncryption") in (None, "AES256")

    def read_part(self, name: str, first: int, last: int, etag: str) -> bytes:
        """Those bytes, the last included, of that version. Raises InfrastructureError where another took its place."""
        return self._ask(name, lambda: self._get(name, first, last, IfMatch=etag))

    def children(self, folder: str) -> list[str]:
        top = (self._path(folder) + "/").lstrip("/")
        names = set()
        for page in self._pages(top, "/"):
            names |= {found["Key"][len(top) :] for found in page.get("Contents", ())}
            names |= {found["Prefix"][len(top) : -1] for found in page.get("CommonPrefixes", ())}
        return sorted(names - {""})

    def publish(self, pairs: Sequence[tuple[str, str]]) -> bool:
        def copy(pair: tuple[str, str]) -> bool:
            source, target = pair
            there = {"Bucket": self.bucket, "Key": self._path(source)}
            copied = self._ask(
                target,
                lambda: self.client.copy_object(**self._key(target), CopySource=there),
                refused=("NoSuchKey", "404"),
            )
            return copied is not None

        return all([*self._each(copy, pairs)])

    def remove(self, folder: str) -> None:
        def delete(name: str) -> None:
            self._ask(name, lambda: self.client.delete_object(**self._key(name)))

        below = [f"{folder}/{name}" for name, _ in self.entries(folder)]
        list(self._each(delete, below or [folder]))

    def tidy(self, folder: str) -> None:
        """A PUT that was cut off leaves nothing."""

    def scratch(self, folder: str) -> Path:
        return self.building.make(folder)

    def hand_in(self, folder: str) -> None:
        local = self.building.place(folder)

        def upload(path: Path) -> None:
            name = f"{folder}/{path.relative_to(local).as_posix()}"
            if path.stat().st_size > MOST_BYTES:
                raise UsageError(f"{path}: more than 5 GiB in one file; lower output.rows_per_shard")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).digest()
                self._ask(name, lambda: self._put_file(name, file, digest))

        list(self._each(upload, sorted(path for path in local.rglob("*") if path.is_file())))
        self.building.remove(folder)

    # -- requests -----------------------------------------------------------------------------------------

    def _put(self, name: str, data: bytes, **conditions: str) -> bool:
        digest = hashlib.md5(data, usedforsecurity=False).digest()
        self.client.put_object(**self._key(name), Body=data, ContentMD5=_base64(digest), **conditions)
        return True

    def _put_file(self, name: str, file: BinaryIO, digest: bytes) -> None:
        file.seek(0)
        self.client.put_object(**self._key(name), Body=file, ContentMD5=_base64(digest))

    def _get(self, name: str, first: int | None = None, last: int = 0, **conditions: str) -> bytes:
        part = {} if first is None else {"Range": f"bytes={first}-{last}"}
        return self.client.get_object(**self._key(name), **part, **conditions)["Body"].read()

    def _pages(self, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
        asked: dict[str, str] = {"Bucket": self.bucket, "Prefix": prefix, "Delimiter": delimiter}
        while True:
            page = self._ask(prefix, lambda: self.client.list_objects_v2(**asked))
            yield page
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._path(name)}

    def _path(self, name: str) -> str:
        assert not name.startswith("/") and ".." not in name.split("/"), f"{name!r} leaves the run folder"
        return "/".join(part for part in (self.prefix, name) if part)

    def _each(self, do: Callable[[Any], Given], things: Sequence[Any]) -> Iterator[Given]:
        """Many requests at once, their answers in order."""
        if len(things) == 1:
            return iter([do(things[0])])
        return pool().map(do, things)

    def _ask(self, name: str, request: Callable[[], Any], refused: tuple[str, ...] = ()) -> Any:
        """The answer, or None for a refusal that is expected. What may pass is tried again.

        Raises InfrastructureError.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        tries = 0
        while True:
            try:
                return request()
            except (ClientError, BotoCoreError, OSError) as error:
                code, tries = code_of(error), tries + 1
                if code in refused:
                    return None
                if tries == TRIES or not passes(error, code):
                    raise InfrastructureError(self._said(name, error, code, tries)) from error
            time.sleep(FIRST_WAIT * 2 ** (tries - 1) * random.uniform(0.5, 1))

    def _said(self, name: str, error: Exception, code: str, tries: int) -> str:
        text = redact(" ".join(str(error).split()))
        next_step = NEXT.get(code, "run the same command again when that is mended")
        if "credentials" in text.lower():
            next_step = NEXT["InvalidAccessKeyId"]
        often = f" ({tries} tries)" if tries > 1 else ""
        return f"s3://{self.bucket}/{self._path(name)}: {text}{often}; {next_step}"


NEXT = {
    "NoSuchBucket": "make the bucket, or mend output.uri",
    **dict.fromkeys(
        ("AccessDenied", "403"), "batchsd must list, read, write, copy and delete there: mend the bucket's policy"
    ),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"),
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or another of AWS's sources of credentials",
    ),
}


class _Pieces(io.RawIOBase):
    """An object read by ranges. `fetch(first, last)` gives those bytes, the last included."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size, self._fetch, self._at = size, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        data = self._fetch(self._at, self._at + wanted - 1)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def code_of(error: Exception) -> str:
    """S3's word for what went wrong; "" where the request did not come through."""
    answer = getattr(error, "response", None) or {}  # None, where the connection was cut
    return answer.get("Error", {}).get("Code", "")


def passes(error: Exception, code: str) -> bool:
    """Whether the same request may succeed a moment later."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if response := getattr(error, "response", None):
        return code in PASSING or response["ResponseMetadata"].get("HTTPStatusCode", 500) >= 500
    cut = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
    return isinstance(error, (*cut, ResponseParserError, OSError))


@lru_cache(maxsize=1)
def client() -> Any:
    """One client a process: it takes a second to make, and threads may share it."""
    try:
        import botocore.session
        from botocore.config import Config
    except ModuleNotFoundError:
        raise UsageError("output.uri: s3:// needs the extra s3: pip install 'batchsd[s3]'") from None
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},  # `_ask` alone tries again
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=AT_ONCE,
        # Content-MD5 guards every PUT: all servers know it, S3's newer checksums only some.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = os.environ.get("AWS_REGION")  # the other SDKs' name, which botocore does not read
    return botocore.session.get_session().create_client("s3", region_name=region, config=config)


@lru_cache(maxsize=1)
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="s3")


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
