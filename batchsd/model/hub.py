"""A checkpoint by its hub name, `org/name`, out of the local cache; nothing is fetched.

The cache is huggingface_hub's: models--org--name/refs/main names the commit, snapshots/<commit> holds the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where the hub's files lie, by the hub's own variables."""
    if chosen := environ.get("HF_HUB_CACHE"):
        return Path(chosen).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def cached_model(name: str, environ: Mapping[str, str]) -> Path | None:
    """The folder of `org/name` at its newest fetched commit, None where it was not fetched."""
    folder = cache_folder(environ) / f"models--{name.replace('/', '--')}"
    main = folder / "refs" / "main"
    if main.is_file():
        snapshot = folder / "snapshots" / main.read_text("utf-8").strip()
        if snapshot.is_dir():
            return snapshot
    fetched = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return max(fetched, key=lambda path: path.stat().st_mtime, default=None)
