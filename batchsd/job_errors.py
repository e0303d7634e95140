"""What is wrong with a job, one line a problem: where, what, and what would be right, as
`jobs/a.toml:3: unknown setting sampler.stepz - did you mean 'steps'?`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from batchsd.job_sources import Key
from batchsd.redact import redact

EXPECTED = {
    "model_type": "should be a table",
    "model_attributes_type": "should be a table",
    "dict_type": "should be a table",
    "tuple_type": "should be a list",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "string_too_short": "should not be empty",
    "too_short": "should be a list that is not empty",
    "literal_error": "should be {expected}",
    "greater_than_equal": "should be at least {ge:g}",
    "less_than_equal": "should be at most {le:g}",
    "less_than": "should be below {lt:g}",
    "multiple_of": "should be a multiple of {multiple_of}",
    "value_error": "{error}",
}


def describe(
    error: ValidationError,
    job: type[BaseModel],
    origins: Mapping[Key, str],
    values: Mapping[str, Any],
    file: str,
) -> list[str]:
    """One line for each wrong setting, in the job's order."""
    wrong: dict[Key, list[str]] = {}
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        location = tuple(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{origin(location, origins, file)}: {_unknown(location, job)}")
        elif problem["type"] == "missing":
            what = _field(location, job).description
            lines.append(f"{file}: {'.'.join(location)} is missing: {what}")
        else:
            # A choice ("auto" or a number) gives one problem for each, and a tail that is no key.
            key = _written(problem["loc"], values)
            text = EXPECTED.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))
            wrong.setdefault(key, []).append(text)
    for key, texts in wrong.items():
        value = json.dumps(redact(_value(key, values)), default=str, ensure_ascii=False)
        lines.append(f"{named(key, origins, file)} = {_short(value)} {_join(texts)}")
    return lines


def suggestion(name: str, known: Collection[str]) -> str:
    """` - did you mean 'steps'?`, or what there is."""
    close = get_close_matches(name, known, n=1)
    if close:
        return f" - did you mean {close[0]!r}?"
    return have(known)


def have(known: Collection[str]) -> str:
    """`; have ddim, euler`."""
    return f"; have {', '.join(sorted(known))}" if known else "; there are none"


def _unknown(location: Key, job: type[BaseModel]) -> str:
    *above, name = location
    siblings = _field(tuple(above), job).annotation.model_fields if above else job.model_fields
    elsewhere = [
        f"{section}.{name}"
        for section, field in job.model_fields.items()
        if name in getattr(field.annotation, "model_fields", {})
    ]
    if elsewhere and not get_close_matches(name, siblings):
        tail = f" - did you mean {elsewhere[0]!r}?"
    else:
        tail = suggestion(name, list(siblings))
    return f"unknown setting {'.'.join(location)}{tail}"


def _field(location: Key, job: type[BaseModel]) -> Any:
    field: Any = None
    model: Any = job
    for part in location:
        field = model.model_fields[part]
        model = field.annotation
    return field


def _written(location: tuple[int | str, ...], values: Mapping[str, Any]) -> Key:
    """As much of pydantic's location as names a value that somebody wrote."""
    key: list[str] = []
    value: Any = values
    for part in location:
        if not (isinstance(value, dict) and part in value):
            break
        value = value[part]
        key.append(str(part))
    return tuple(key)


def _value(key: Key, values: Any) -> Any:
    for part in key:
        values = values[part]
    return values


def named(key: Key, origins: Mapping[Key, str], file: str) -> str:
    """A setting with the place that it comes from: `jobs/a.toml:3: sampler.steps`, `--set sampler.steps`."""
    place, name = origin(key, origins, file), ".".join(key)
    if place.endswith(f" {name}"):
        return place
    return f"{place}: {name}" if place else name


def origin(key: Key, origins: Mapping[Key, str], file: str) -> str:
    """Where a key was written: itself, one of its own keys, or the table around it; else `file`."""
    if key in origins:
        return origins[key]
    # A table may have been written through its keys only, such as BATCHSD_SAMPLR__STEPS.
    within = [place for written, place in origins.items() if written[: len(key)] == key]
    around = [origins[key[:size]] for size in range(len(key) - 1, 0, -1) if key[:size] in origins]
    return next(iter([*within[-1:], *around]), file)


def _join(texts: list[str]) -> str:
    first, *rest = dict.fromkeys(texts)
    return " or ".join([first, *(text.removeprefix("should be ") for text in rest)])


def _short(text: str) -> str:
    # JSON leaves some line breaks (U+0085, U+2028) as they are, and a message is one line.
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 60 else text[:57] + "..."
