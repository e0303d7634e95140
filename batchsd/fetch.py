"""A checkpoint on S3 becomes files of this machine: fetched once, under a lock, and checked.

    s3://bucket/models/sd15  ->  <cache>/<hash of the URI and its files' ETags>/sd15

Whoever comes second waits, and finds it done; a folder of the cache is whole or not there. Another version in the
bucket has other ETags and so another folder. The cache is BATCHSD_CACHE, else batchsd below XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from batchsd.object_store import ObjectStore
from batchsd.redact import redact
from batchsd.scratch import Scratch, disk_trouble
from batchsd.types import InfrastructureError, UsageError

PIECE = 2**25  # bytes a request
AT_ONCE = 8  # requests in flight
FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "depth_estimator")
"""What is read of a folder in diffusers' layout; its safety checker alone would be another gigabyte."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
PLAIN_MD5 = re.compile(r'"?([0-9a-f]{32})"?')  # of one PUT without KMS; a multipart upload's has a tail

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Remote:
    """A file in the bucket: its name below the checkpoint ("" where that is one file), bytes and ETag."""

    name: str
    size: int
    etag: str


def quiet(line: str) -> None:
    """For whoever has nobody to tell."""


def local_spec(spec: str, where: str, tell: Tell = quiet) -> str:
    """The same with a URI made a path of this machine; a weight behind a colon (`s3://b/a.safetensors:0.8`) stays."""
    found = re.fullmatch(r"(\w+://.+?)(:[-+.\de]+)?", spec)
    return f"{local(found[1], where, tell)}{found[2] or ''}" if found else spec


def local(uri: str, where: str, tell: Tell = quiet) -> Path:
    """The file or folder of that URI on this machine, fetched where it is not there yet.

    Raises UsageError, beginning with `where`, for what is no checkpoint's URI; InfrastructureError where the store
    or the disk fails.
    """
    uri = uri.rstrip("/")
    store, name = _opened(uri, where)
    files = sorted(_wanted(store, name), key=lambda file: file.name)
    if not files:
        raise UsageError(f"{where}: {redact(uri)}: no file of that name, and no unet/, vae/, ... below it")
    said = json.dumps([uri, *map(asdict, files)])
    root = cache_root(os.environ) / hashlib.blake2b(said.encode(), digest_size=12).hexdigest()
    with disk_trouble(root), _alone(root, uri, tell):
        if not _whole(root / name, files):
            shutil.rmtree(root, ignore_errors=True)
            gigabytes = sum(file.size for file in files) / 1e9
            tell(f"fetching {redact(uri)}: {len(files)} files, {gigabytes:.2f} GB, to {root.parent}")
            _fetch(store, name, files, root)
    return root / name


def cache_root(environ: Mapping[str, str]) -> Path:
    """Where fetched checkpoints lie; old ones may be removed at any time when nothing runs."""
    if chosen := environ.get("BATCHSD_CACHE"):
        return Path(chosen).expanduser()
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "batchsd"


def _opened(uri: str, where: str) -> tuple[ObjectStore, str]:
    """The store of the folder above, and the checkpoint's name in it."""
    if not uri.startswith("s3://"):
        raise UsageError(f"{where}: {redact(uri)!r}: checkpoints are paths, org/name or s3://bucket/folder")
    above, _, name = uri.rpartition("/")
    if above == "s3:/":
        raise UsageError(f"{where}: {redact(uri)!r} is a whole bucket; name the folder or file in it")
    return ObjectStore(above, Scratch(Path())), name  # it writes nothing, so it needs no place to build in


def _wanted(store: ObjectStore, name: str) -> Iterator[Remote]:
    """The file itself; of a folder what a loader reads, pickles only where there is nothing better."""
    if single := store.version(name):
        yield Remote("", *single)
        return
    found = [Remote(*entry) for entry in store.versions(name)]
    better = {PurePosixPath(file.name).parent for file in found if file.name.endswith(".safetensors")}
    for file in found:
        path = PurePosixPath(file.name)
        in_parts = len(path.parts) == 2 and path.parts[0] in FOLDERS
        if file.name == "model_index.json" or (in_parts and not (path.suffix in PICKLES and path.parent in better)):
            yield file


@contextmanager
def _alone(root: Path, uri: str, tell: Tell) -> Iterator[None]:
    """One process of this machine at a time; a process that dies leaves no lock behind."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{root}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"{redact(uri)}: another process fetches it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _whole(path: Path, files: Sequence[Remote]) -> bool:
    """Whether every file lies there in its size; its content was checked when it was fetched."""
    places = [(path / file.name if file.name else path, file.size) for file in files]
    return all(place.is_file() and place.stat().st_size == size for place, size in places)


def _fetch(store: ObjectStore, name: str, files: Sequence[Remote], root: Path) -> None:
    """Fills a folder beside, checks it, and gives it its name."""
    part = root.with_name(f"{root.name}.part")  # what a process that died left there is of no use
    shutil.rmtree(part, ignore_errors=True)
    with ThreadPoolExecutor(AT_ONCE, "fetch") as pool:
        sums = list(map(partial(_fetch_file, store, name, part / name, pool), files))
    facts = [{**asdict(file), "sha256": digest} for file, digest in zip(files, sums, strict=True)]
    (part / "fetched.json").write_text(json.dumps({"from": f"{store.uri}/{name}", "files": facts}, indent=1))
    os.replace(part, root)


def _fetch_file(store: ObjectStore, name: str, to: Path, pool: ThreadPoolExecutor, file: Remote) -> str:
    """One file, by pieces of the one version that was listed; its sha256."""
    path, key = (to / file.name, f"{name}/{file.name}") if file.name else (to, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        out.truncate(file.size)

        def piece(start: int) -> None:
            data = store.read_part(key, start, min(start + PIECE, file.size) - 1, file.etag)
            os.pwrite(out.fileno(), data, start)

        list(pool.map(piece, range(0, file.size, PIECE)))
        out.flush()
        os.fsync(out.fileno())
    with path.open("rb") as back:
        digest = hashlib.file_digest(back, "sha256").hexdigest()
        expected = PLAIN_MD5.fullmatch(file.etag)
        if expected and store.etag_is_md5(key):
            back.seek(0)
            md5 = hashlib.file_digest(back, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
            if md5 != expected[1]:
                raise InfrastructureError(f"{store.uri}/{key}: arrived damaged (MD5 {md5}); run the same command again")
    if path.stat().st_size != file.size:
        raise InfrastructureError(f"{store.uri}/{key}: arrived cut off; run the same command again")
    return digest
