"""A job: what to draw, with which model, and where to put it; one frozen value for the whole run.

    --set  >  environment BATCHSD_<SECTION>__<KEY>  >  the TOML file  >  the defaults below

Every layer is read into plain tables first, with the place each setting came from, so that a wrong key or
value is one line `jobs/a.toml:3: ...`; pydantic then checks the whole at once.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from batchsd.fetch import Tell, local, local_spec, quiet
from batchsd.job_errors import describe, have, named
from batchsd.job_sources import HUB_NAME, Key, Layer, environment_layer, file_layer, set_layer
from batchsd.model.extras import extra_files
from batchsd.model.hub import cached_model
from batchsd.redact import redact
from batchsd.settings import Conditioning, Input, Model, Output, Ray, Run, Sampler, Texts
from batchsd.types import PIXELS_VERSION, UsageError

DATED = (("input", "manifest"), ("output", "uri"))  # the settings in which {date} is the day of the run


class Job(BaseSettings):
    """Every setting of a run, resolved and checked. Make one with `load`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", strict=True)

    input: Input
    model: Model
    sampler: Sampler = Sampler()
    conditioning: Conditioning = Conditioning()
    output: Output
    run: Run = Run()
    ray: Ray = Ray()
    plugins: Texts = Field(default=(), description="names, modules or ./files")
    plugin: dict[str, dict[str, Any]] = Field(
        default={}, description="settings of each plugin, [plugin.<name>]; a path begins with ./, ../, ~/ or /"
    )

    _origins: Mapping[Key, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: Any, **_: Any
    ) -> tuple[Any, ...]:
        """Only what `load` hands over: pydantic-settings' own sources ignore misspelt names silently."""
        return (init_settings,)

    def where(self, key: str) -> str:
        """The place of a dotted setting, to begin an error with: `jobs/a.toml:3: sampler.steps`."""
        return named(tuple(key.split(".")), self._origins, "")

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain JSON values; secrets too, so `redact` it before it is shown."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """128 bits, in hex, over the resolved job without its secrets (a new token is no new job)."""
        return digest(redact(self.resolved()))


def load(
    path: str | Path, sets: Sequence[str], environ: Mapping[str, str], day: datetime.date | None = None
) -> Job:
    """Read a job file, `--set` texts (`sampler.steps=30`) and the environment into one Job.

    Relative paths in the file are taken from the file's folder, in `sets` and `environ` from the current one.
    `{date}` in `DATED` settings becomes `day`, as 2026-11-23; None is today.
    Raises UsageError with one line a problem.
    """
    layers = [
        file_layer(Path(path)),
        environment_layer(environ, Job),
        *(set_layer(text, Job) for text in sets),
    ]
    values: dict[str, Any] = {name: {} for name in Job.model_fields if name != "plugins"}
    origins: dict[Key, str] = {}
    for layer in layers:
        _merge(values, layer)
        origins |= layer.origins
    for section, key in DATED:
        if key in values[section]:
            values[section][key] = _dated(values[section][key], day or datetime.date.today())
    try:
        job = Job(**values)
    except ValidationError as error:
        lines = describe(error, Job, origins, values, str(path))
        raise UsageError("\n".join(lines)) from None
    job._origins = origins
    return job


def _merge(values: dict[str, Any], layer: Layer) -> None:
    for key, value in layer.values.items():
        table = values
        for part in key[:-1]:
            inner = table.get(part)
            table[part] = table = dict(inner) if isinstance(inner, dict) else {}
        table[key[-1]] = value


def _dated(value: Any, day: datetime.date) -> Any:
    if isinstance(value, list):
        return [_dated(item, day) for item in value]
    return value.replace("{date}", day.isoformat()) if isinstance(value, str) else value


def check_names(job: Job, setting: str, known: Collection[str]) -> None:
    """Refuse a name that no plugin brings: `check_names(job, "sampler.scheduler", schedulers)`."""
    section, key = setting.split(".")
    name = getattr(getattr(job, section), key)
    if name not in known:
        raise UsageError(f"{job.where(setting)}: {name!r} is unknown{have(known)}")


def shipped_models() -> list[str]:
    """Names of the checkpoints that come with batchsd."""
    assets = Path(__file__).parent / "assets"
    return sorted(entry.name for entry in assets.iterdir() if (entry / "model_index.json").is_file())


def model_path(job: Job, tell: Tell = quiet) -> Path:
    """Where the job's checkpoint lies, fetched here where it is on S3. Raises UsageError where nothing is there."""
    return find_model(job.model.path, job.where("model.path"), tell)


def find_model(name: str, where: str, tell: Tell = quiet) -> Path:
    """A name without "/" ships with batchsd; else a path, `org/name` in the hub's local cache, or an s3:// URI.

    Raises UsageError beginning with `where`.
    """
    if "://" in name:
        return local(name, where, tell)
    if "/" not in name:
        if name not in shipped_models():
            raise UsageError(
                f"{where}: {name!r} does not ship with batchsd"
                f"{have(shipped_models())} (a path of your own needs a slash: ./{name})"
            )
        return Path(__file__).parent / "assets" / name
    if Path(name).exists():
        return Path(name)
    if not HUB_NAME.fullmatch(name):
        raise UsageError(f"{where}: no file or folder {name}")
    cached = cached_model(name, os.environ)
    if cached is None:
        raise UsageError(f"{where}: {name} is no path and not in the local hub cache; `hf download {name}` fetches it")
    return cached


def fetch_models(job: Job, tell: Tell) -> None:
    """Brings what the job's model needs from S3 to this machine, and says so; the rest then finds it here."""
    model_path(job, tell)
    _model_here(job, tell)


def model_extras(job: Job) -> list[tuple[str, Path]]:
    """The files that the job adds to its checkpoint, each with its use: for the checkpoint's hash."""
    model = _model_here(job)
    return extra_files(model.vae, model.loras, model.embeddings, model.tokenizer)


def model_options(job: Job) -> dict[str, Any]:
    """What `model.checkpoint.load` takes by name."""
    names = ("vae", "loras", "embeddings", "clip_skip", "tokenizer", "ema")
    model = _model_here(job)
    return {name: getattr(model, name) for name in names}


def _model_here(job: Job, tell: Tell = quiet) -> Model:
    """The section with every s3:// URI beside the checkpoint's own made a path of this machine."""
    model = job.model
    lists = {
        name: tuple(local_spec(spec, job.where(f"model.{name}"), tell) for spec in getattr(model, name))
        for name in ("loras", "embeddings")
    }
    texts = {name: local_spec(getattr(model, name), job.where(f"model.{name}"), tell) for name in ("vae", "tokenizer")}
    return model.model_copy(update={**lists, **texts})


def pixel_settings(job: Job) -> dict[str, Any]:
    """Every setting that changes pixels: the plan's hard facts, by dotted name.

    Files (the checkpoint, VAE, LoRAs, embeddings, tokenizer) count by their content, which the loader hashes,
    never by path; the device, backend, batch size and workers are soft: they move pixels by rounding only.
    """
    settings: dict[str, Any] = {"pixels_version": PIXELS_VERSION}
    resolved = job.resolved()
    for section in ("sampler", "conditioning"):
        settings |= {f"{section}.{key}": value for key, value in resolved[section].items()}
    settings["model.clip_skip"] = job.model.clip_skip
    settings["model.ema"] = job.model.ema
    settings["input.columns"] = dict(job.input.columns)
    settings["input.prompt"] = job.input.prompt
    settings["output.image"] = job.output.image.options()
    settings["run.seed"] = job.run.seed
    return settings


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, for editors."""
    return Job.model_json_schema()


def digest(value: Any) -> str:
    """128 bits of blake2b, in hex, over a JSON value written in one fixed way."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
