"""How the cells of our columns are filled, (record, shard name, run facts) -> a cell, and how they are read back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from batchsd.types import Record, Request

Value = Callable[[Record, str, Mapping[str, Any]], Any]

Wanted = bool | Collection[int]
"""Whose picture's bytes are read with the rows: everyone's, nobody's, or those of the rows with these numbers."""

SCORE = "score "
"""Before the name of a score of the job, where a column tells which of our values it holds."""

FIGURES = ("mean", "deviation", "dhash")


def value_of(ours: str) -> Value:
    """The filler of one of our columns."""
    if ours.startswith(SCORE):
        name = ours.removeprefix(SCORE)
        return lambda record, shard, facts: record.scores.get(name)
    if ours in FIGURES:
        return lambda record, shard, facts: record.figures.get(ours)
    if ours in _VALUES:
        return _VALUES[ours]
    return _asked(ours) if ours in Request.__dataclass_fields__ else _beside(ours)


def remembered(ours: Mapping[str, Any]) -> dict[str, Any]:
    """A row's figures and scores, for its `Record`, out of what its cells held by our names."""
    figures = {name: ours[name] for name in FIGURES if ours.get(name) is not None}
    scores = {name.removeprefix(SCORE): value for name, value in ours.items() if name.startswith(SCORE)}
    return {"figures": figures, "scores": scores}


def wants(pictures: Wanted, index: int) -> bool:
    return pictures if isinstance(pictures, bool) else index in pictures


def picture_name(name: str, index: int, extension: str) -> str:
    """A picture's bare file name, from its shard and row alone: `00042-000017.png`.

    Never from the user's id, which is data and may hold any character.
    """
    _, number, _, _, *plan = name.split("-")
    return f"{'-'.join([number, *plan, f'{index:06d}'])}.{extension}"


def row_index(picture: str) -> int:
    """The row that `picture_name` named: 17 of `00042-000017.png`."""
    return int(picture.partition(".")[0].rpartition("-")[2])


def _picture(record: Record, name: str) -> dict[str, Any] | None:
    if record.image is None:
        return None
    path = picture_name(name, record.request.index, record.extension)
    return {"bytes": record.image, "path": path}


def _beside(name: str) -> Value:
    """A picture that was made on the way: `00042-000017.estimated_depth.png`."""

    def picture(record: Record, shard: str, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        if name not in record.made:
            return None
        return {"bytes": record.made[name], "path": picture_name(shard, record.request.index, f"{name}.png")}

    return picture


def _asked(name: str) -> Value:
    return lambda record, shard, facts: getattr(record.request, name)


def _drawn(name: str) -> Value:
    def size(record: Record, shard: str, facts: Mapping[str, Any]) -> int | None:
        drawn = getattr(record, name)
        return getattr(record.request, name) if drawn is None else drawn

    return size


_VALUES: Mapping[str, Value] = {
    "height": _drawn("height"),
    "width": _drawn("width"),
    "image": lambda record, shard, facts: _picture(record, shard),
    "status": lambda record, shard, facts: record.status,
    # An exception's text may hold half a character (a file name that is not UTF-8).
    "error": lambda record, shard, facts: record.error and record.error.encode("utf-8", "replace").decode(),
    "tokens_cut": lambda record, shard, facts: record.tokens_cut,
    "row_hash": lambda record, shard, facts: record.request.row_hash or None,
    "model": lambda record, shard, facts: facts.get("model"),
    "batchsd": lambda record, shard, facts: facts.get("version"),
}
