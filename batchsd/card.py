"""The dataset's card: a README.md in the run folder that says what is there, to people and to `datasets`.

Its head names the files of each configuration, so that `load_dataset(RUN)` takes the pictures and, for Parquet,
`load_dataset(RUN, "failed")` the failed rows. It is JSON, which is YAML too: no name in it needs quoting by hand.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from batchsd.columns import holds_bytes
from batchsd.ledger import DATA, FAILED, Tally
from batchsd.plan import Plan
from batchsd.progress import counted
from batchsd.redact import redact
from batchsd.store import Store

CARD = "README.md"
PATTERNS = {"parquet": f"{DATA}/*.parquet", "webdataset": f"{DATA}/*.tar", "folder": f"{DATA}/**"}


def write_card(store: Store, plan: Plan, total: Tally, schema: pa.Schema) -> None:
    """Write (again) the card of a run; layouts of plugins get one without configurations."""
    picture = plan.job["output"]["image"]["format"].replace("jpeg", "jpg")
    store.put(CARD, card(plan, total, schema, picture, bool(store.children(FAILED))).encode())


def card(plan: Plan, total: Tally, schema: pa.Schema, extension: str, aside: bool) -> str:
    """The card's text. `aside`: failed rows have a table of their own in `failed/`."""
    head: dict[str, Any] = {"tags": ["batchsd", "synthetic"]}
    parts = []
    kept = total.rejected if plan.job["output"].get("rejected") == "keep" else 0  # rejected rows with a picture
    if plan.sink in PATTERNS and (total.ok + kept if aside else total.rows):
        parts.append(_config("default", PATTERNS[plan.sink]))
        parts[0]["default"] = True
    if plan.sink == "parquet" and aside:
        parts.append(_config("failed", f"{FAILED}/*.parquet"))
    if parts:
        head["configs"] = parts
    if plan.sink == "webdataset":
        head["dataset_info"] = [{"config_name": "default", "features": tar_features(schema, extension)}]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    failed = f"; {counted(total.failures.total(), 'row')} failed" if total.failures else ""
    rejected = f"; {total.rejected:,} were rejected by the job's filters" if total.rejected else ""
    lines += [
        "# Pictures made by batchsd",
        "",
        f"{counted(total.ok, 'picture')}{failed}{rejected}. They were drawn by a trained model from text; none is a "
        "photograph.",
        "",
        *_failed_lines(total, aside, kept),
        "The job, resolved:",
        "",
        *("    " + line for line in json.dumps(redact(dict(plan.job)), indent=1).splitlines()),
        "",
        f"Plan {plan.hash}; checkpoint {plan.hard.get('checkpoint')}; "
        + ", ".join(f"{name} {value}" for name, value in plan.soft.items()),
        "",
    ]
    return "\n".join(lines)


def _config(name: str, pattern: str) -> dict[str, Any]:
    return {"config_name": name, "data_files": [{"split": "train", "path": pattern}]}


def _failed_lines(total: Tally, aside: bool, kept: int) -> list[str]:
    """Where the rows are that are not `ok`; `kept` rejected ones have their pictures."""
    lines = []
    kinds = [kind for kind, count in (("Failed", total.failures.total()), ("rejected", total.rejected - kept)) if count]
    if kinds:
        rows = " and ".join(kinds).capitalize() + " rows"
        how = f'load_dataset("parquet", data_files="{FAILED}/*.parquet")'
        there = f"lie in `{FAILED}/`: `{how}`" if aside else "are among the others, their picture null"
        lines += [f"{rows}, with `status` and the reason (`error`) of each, {there}.", ""]
    if kept:
        lines += ["Rejected rows have their pictures: take those whose `status` is `ok` to leave them out.", ""]
    return lines


def tar_features(schema: pa.Schema, extension: str) -> list[dict[str, Any]]:
    """What `datasets` should take the members of a sample for; it would guess from the first five rows alone."""
    row = [_feature(field) for field in schema if not holds_bytes(field.type)]
    return [
        {"name": extension, "dtype": "image"},
        {"name": "txt", "dtype": "string"},
        {"name": "json", "struct": sorted(row, key=lambda feature: feature["name"])},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def _feature(field: pa.Field) -> dict[str, Any]:
    """A column as JSON brings it: numbers, texts, lists and objects; all else is text."""
    kind, types = field.type, pa.types
    if types.is_struct(kind):
        return {"name": field.name, "struct": [_feature(inner) for inner in kind]}
    if types.is_list(kind) or types.is_large_list(kind):
        inner = _feature(kind.value_field)
        return {"name": field.name, "list": inner.get("dtype") or [*inner.values()][1]}
    if types.is_floating(kind):
        return {"name": field.name, "dtype": "float64"}
    return {"name": field.name, "dtype": str(kind) if types.is_integer(kind) or types.is_boolean(kind) else "string"}
