"""One manifest row becomes one Request: its values over the job's, every default resolved.

A row's seed, where it gives none, is blake2b(job seed, repeat, key) mod 2^32: no other row, batch or worker
can change it. A refused value fails its row alone, with status `bad_input`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from batchsd.columns import IMAGE_INPUTS
from batchsd.job import Job
from batchsd.job_errors import have
from batchsd.settings import MAX_SEED, MAX_SIZE, MAX_STEPS, MIN_SIZE
from batchsd.types import RowError, UsageError

MAX_CHARACTERS = 20_000  # far beyond what any text encoder reads; stops a manifest that is not one of prompts

ADAPTER = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>", re.IGNORECASE)

# The settings of a job that each row resolves for itself: they count through the row's own values.
ROW_SETTINGS = frozenset(
    {f"sampler.{name}" for name in ("scheduler", "steps", "guidance_scale", "height", "width")}
    | {f"conditioning.{name}" for name in ("task", "strength", "image_guidance_scale", "resize", "paste_back")}
    | {f"conditioning.{name}" for name in ("depth_convention", "keep_depth")}
    | {"input.columns", "input.prompt", "run.seed"}
)


@dataclass(frozen=True, slots=True)
class Names:
    """What rows may say: scheduler names (every alias), and tasks with the manifest columns they want."""

    schedulers: Collection[str]
    tasks: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class InvalidText:
    """Stands where a text value held bytes that are not UTF-8."""

    position: int


class Refused(ValueError):
    """A value that a row may not have; the message says which and why."""


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def whole(name: str, value: Any, low: int, high: int, multiple: int = 1) -> int:
    """An integer of that range; integral floats and decimals are taken. Raises Refused."""
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"{name}: {_shown(value)} is not a whole number")
    if not low <= value <= high:
        raise Refused(f"{name}: {_shown(value)} is outside {low} to {high}")
    if value % multiple:
        raise Refused(f"{name}: {_shown(value)} is not a multiple of {multiple}")
    return value


def finite(name: str, value: Any) -> float:
    """A number as a float, neither infinite nor NaN. Raises Refused."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise Refused(f"{name}: {_shown(value)} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Refused(f"{name}: {_shown(value)} is not a finite number")
    return number


def text(name: str, value: Any) -> str:
    """A text of at most 20,000 characters. Raises Refused."""
    if isinstance(value, InvalidText):
        raise Refused(f"{name}: not valid UTF-8 at byte {value.position}")
    if not isinstance(value, str):
        raise Refused(f"{name}: {_shown(value)} is not text")
    if len(value) > MAX_CHARACTERS:
        raise Refused(f"{name}: {len(value):,} characters, at most {MAX_CHARACTERS:,}")
    return value


def one_of(name: str, value: Any, known: Collection[str]) -> str:
    """One of the known names. Raises Refused, naming what there is."""
    value = text(name, value)
    if value not in known:
        raise Refused(f"{name}: {_shown(value)} is unknown{have(known)}")
    return value


def _shown(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float) else str(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def derived_seed(job_seed: int, key: str, repeat_index: int) -> int:
    """The seed of a row that gives none: blake2b over `seed:repeat:key`, mod 2^32."""
    hashed = hashlib.blake2b(f"{job_seed}:{repeat_index}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") % 2**32


# --- templates -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt over columns: `a photo of a {color} {shape}`; `{{` and `}}` stand for braces.

    Only plain column names stand between braces: no attributes, indices or formats.
    """

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, template: str) -> Template:
        """Raises ValueError where braces do not match or hold more than a name."""
        parts = []
        for before, name, form, conversion in string.Formatter().parse(template):
            if form or conversion or name == "":
                raise ValueError(f"{{{name}}} needs a plain column name, as {{color}}")
            parts.append((before, name))
        return cls(tuple(parts))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt for a row. Raises Refused where a named column is null or not valid text."""
        return "".join(before + (self._value(name, row[name]) if name else "") for before, name in self.parts)

    def _value(self, name: str, value: Any) -> str:
        if _missing(value):
            raise Refused(f"prompt: the template needs {name!r}, which is null")
        return text(name, value) if isinstance(value, str | InvalidText) else str(value)


# --- a row ---------------------------------------------------------------------------------------------


ReadImage = Callable[[str, Any], bytes]
"""(column, by our name; cell) -> the bytes of an image file."""


@dataclass(frozen=True, slots=True)
class Resolver:
    """Turns a row's values, under our column names, into the fields of a Request."""

    job: Job
    names: Names
    hasher: Callable[[Mapping[str, Any]], str]
    template: Template | None = field(default=None)

    def requests(
        self,
        row: Mapping[str, Any],
        manifest_row: Mapping[str, Any],
        place: str,
        read_image: ReadImage,
    ) -> Iterator[tuple[dict[str, Any], RowError | None]]:
        """(fields of Request, what is wrong) for each repeat.

        `row` is by our names, `manifest_row` by the manifest's (for the template); `place` is `<file>:<row>`,
        the key where the row has no `id`; `read_image` turns the cell of an image's column into file bytes, or
        raises RowError. An explicit seed moves by one a repeat, mod 2^32. Where a value is refused its field is None,
        except for text, which stays as it was given.
        """
        problems: list[str] = []
        values = self._values(row, manifest_row, place, problems)
        status = "bad_input" if problems else "bad_image"
        seed, inputs = values.pop("seed"), self._inputs(row, values["task"], read_image, problems)
        error = RowError(status, "; ".join(problems)) if problems else None
        for repeat_index in range(self.job.input.repeat):
            fields = values | {"repeat_index": repeat_index, "inputs": inputs}
            if seed == -1:
                fields["seed"] = derived_seed(self.job.run.seed, values["key"], repeat_index)
            else:
                fields["seed"] = None if seed is None else (seed + repeat_index) % 2**32
            fields["row_hash"] = "" if problems else self.hasher(fields)
            yield fields, error

    def _values(
        self, row: Mapping[str, Any], manifest_row: Mapping[str, Any], place: str, problems: list[str]
    ) -> dict[str, Any]:
        def check(name: str, default: Any, rule: Callable[..., Any], *limits: Any) -> Any:
            value = row.get(name)
            try:
                return default if _missing(value) else rule(name, value, *limits)
            except Refused as refusal:
                problems.append(str(refusal))
                return value if isinstance(value, str) else None

        sampler = self.job.sampler
        return {
            "key": check("id", place, key_text) or place,
            "prompt": self._prompt(row, manifest_row, problems),
            "negative_prompt": check("negative_prompt", None, text),
            "seed": check("seed", -1, whole, -1, MAX_SEED),
            "steps": check("steps", sampler.steps, whole, 1, MAX_STEPS),
            "guidance_scale": check("guidance_scale", sampler.guidance_scale, finite),
            "height": check("height", sampler.height, whole, MIN_SIZE, MAX_SIZE, 8),
            "width": check("width", sampler.width, whole, MIN_SIZE, MAX_SIZE, 8),
            "scheduler": check("scheduler", sampler.scheduler, one_of, self.names.schedulers),
            "task": check("task", self.job.conditioning.task, one_of, self.names.tasks),
        }

    def _prompt(
        self, row: Mapping[str, Any], manifest_row: Mapping[str, Any], problems: list[str]
    ) -> str | None:
        value = row.get("prompt")
        try:
            if self.template:
                value = None
                value = self.template.fill(manifest_row)
            if value is None:
                raise Refused("prompt: null (an empty text is a valid prompt)")
            return self._without_loras(text("prompt", value))
        except Refused as refusal:
            problems.append(str(refusal))
            return value if isinstance(value, str) else None

    def _without_loras(self, prompt: str) -> str:
        """Raises Refused where A1111's syntax asks for an adapter in the prompt: the network is one for all rows."""
        if self.job.conditioning.prompt_syntax == "a1111" and (found := ADAPTER.search(prompt)):
            raise Refused(f"prompt: {_shown(found[0])} would hold for this row alone; give LoRAs as model.loras")
        return prompt

    def _inputs(
        self,
        row: Mapping[str, Any],
        task: str | None,
        read_image: ReadImage,
        problems: list[str],
    ) -> dict[str, Any]:
        """What the task declared: the row's value, else the job's [conditioning] setting of that name."""
        inputs: dict[str, Any] = {}
        for name in self.names.tasks.get(task or "", ()):
            value = None if _missing(row.get(name)) else row[name]
            if value is None:
                value = getattr(self.job.conditioning, name, None)
            elif name in IMAGE_INPUTS:
                try:
                    value = read_image(name, value)
                except RowError as error:
                    problems.append(f"{name}: {error}")
                    value = None
            inputs[name] = value
        return inputs


def key_text(name: str, value: Any) -> str:
    """A row's `id` as text: integers and integral floats in digits, bytes in hex. Raises Refused."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return text(name, value if isinstance(value, str | InvalidText) else str(value))


def row_hasher(checkpoint_hash: str, settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    """A function from a Request's fields to 128 bits, in hex, over all that makes its pixels.

    `settings` are `pixel_settings(job)`; those that every row resolves for itself count by the row's values
    alone, so a new default leaves the hashes of rows that do not use it. Input images count by their bytes.
    """
    shared = {name: value for name, value in settings.items() if name not in ROW_SETTINGS}
    base = hashlib.blake2b(_canonical({"checkpoint": checkpoint_hash, "settings": shared}), digest_size=16)

    def hash_of(fields: Mapping[str, Any]) -> str:
        state = base.copy()
        state.update(_canonical({name: fields[name] for name in HASHED}))
        return state.hexdigest()

    return hash_of


HASHED = (
    "prompt", "negative_prompt", "seed", "steps", "guidance_scale", "height", "width", "scheduler", "task",
    "inputs",
)  # fmt: skip


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_hashable).encode()


def _hashable(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"blake2b": hashlib.blake2b(value, digest_size=16).hexdigest()}
    return f"{type(value).__name__}:{value}"


def parse_template(job: Job) -> Template | None:
    """The job's prompt template. Raises UsageError where it is not one."""
    if job.input.prompt is None:
        return None
    if "prompt" in job.input.columns:
        raise UsageError(
            f"{job.where('input.prompt')} and input.columns.prompt both say where prompts come from; keep one"
        )
    try:
        return Template.parse(job.input.prompt)
    except ValueError as error:
        raise UsageError(f"{job.where('input.prompt')}: {error} (write {{{{ and }}}} for braces)") from None
