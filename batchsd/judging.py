"""The step between a decoded picture and its file: the job's scores in their order, then its filters in theirs.

    registry + job -> chosen(...)  in the driver: every name, setting and file is checked, nothing loads
                   -> judging(...) in the worker: (requests, pictures) -> a Verdict a picture

What a plugin raises is asked again picture by picture, so that one bad picture is one failed row, `error`, that names
the plugin. A plugin that fails on `MOST` pictures in a row, with no good one between, ends the job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

from batchsd.figures import moments
from batchsd.filters import Bound, Named, parse, reason_of
from batchsd.job import Job
from batchsd.job_errors import have, suggestion
from batchsd.model.fingerprint import content_hash
from batchsd.plugin_source import cause, short_name
from batchsd.plugins import Registry
from batchsd.scores import Pictures, Settings, Verdict, Viewer
from batchsd.types import BatchsdError, Request, UsageError

MOST = 8  # one decoded batch: a plugin that fails on all of it is broken, not its pictures
BOUNDED = ("mean", "deviation")  # figures that a filter may compare


@dataclass(frozen=True)
class Choice:
    """One score or filter of the job, not loaded: its plugin, and its settings with nothing left out."""

    name: str
    viewer: Viewer
    owner: str
    settings: Settings

    @property
    def title(self) -> str:
        return f"{self.viewer.kind} {self.name!r} (plugin {self.owner!r})"


@dataclass(frozen=True)
class Choices:
    """What the job asks of its pictures. `filters` are plugins' ones or comparisons, in the job's order."""

    scores: tuple[Choice, ...] = ()
    filters: tuple[Choice | Bound, ...] = ()
    keep_rejected: bool = False

    def facts(self) -> dict[str, Any]:
        """Hard facts of the plan: other numbers or other rejections are another dataset. Files by their content."""
        facts: dict[str, Any] = {}
        for choice in (*self.scores, *(one for one in self.filters if isinstance(one, Choice))):
            for key, value in choice.settings.items():
                pinned = content_hash(Path(value), key) if key in choice.viewer.files else value
                facts[f"plugin.{short_name(choice.owner)}.{key}"] = pinned
        return facts


def chosen(job: Job, registry: Registry) -> Choices:
    """The job's scores and filters, checked. Raises UsageError: unknown names and settings, files not there."""
    names = job.output.scores
    for i, name in enumerate(names):
        where = job.where("output.scores")
        if name not in registry.scores:
            raise UsageError(f"{where}: {name!r} is unknown{have(registry.scores)}; plugins bring scores")
        if name in names[:i]:
            raise UsageError(f"{where}: {name!r} is listed twice")
    filters = [_filter(text, job, registry) for text in job.output.filters]
    refuse_unknown_settings(job, registry)
    scores = tuple(_choice(registry.scores[name], name, job, registry) for name in names)
    return Choices(scores, tuple(filters), job.output.rejected == "keep")


def _filter(text: str, job: Job, registry: Registry) -> Choice | Bound:
    where = job.where("output.filters")
    found = parse(text, where)
    if isinstance(found, Named):
        if found.name in registry.filters:
            return _choice(registry.filters[found.name], found.name, job, registry)
        if found.name in registry.scores or found.name in BOUNDED:
            raise UsageError(f"{where}: {found.name!r} is a number; say which ones pass: '{found.name} > 0.5'")
        raise UsageError(f"{where}: {found.name!r} is unknown{have(registry.filters)}; plugins bring filters")
    if found.name in (*BOUNDED, *job.output.scores):
        return found
    if found.name in registry.scores:
        raise UsageError(f"{where}: {text!r} needs the score {found.name!r} in output.scores")
    known = (*BOUNDED, *registry.scores)
    raise UsageError(f"{where}: {text!r} compares {found.name!r}, which is no score{have(known)}")


def _choice(viewer: Viewer, name: str, job: Job, registry: Registry) -> Choice:
    """With its settings: those that the job says, else the defaults. Raises UsageError for a file that is not there."""
    owner = registry.owners[viewer.kind, name]
    section = f"plugin.{short_name(owner)}"
    said = job.plugin.get(short_name(owner), {})
    for key in viewer.files:
        where = f"{job.where(section)}.{key}"
        if key not in said:
            raise UsageError(f"{where}: {viewer.kind} {name!r} needs this file or folder; say where it is")
        path = said[key]
        if not isinstance(path, str) or not Path(path).is_absolute():
            raise UsageError(f"{where}: {path!r} is not a path; one beside the job is written './name'")
        if not Path(path).exists():
            raise UsageError(f"{where}: no file or folder {path}")
    settings = {key: said.get(key, default) for key, default in viewer.options.items()}
    return Choice(name, viewer, owner, {**settings, **{key: said[key] for key in viewer.files}})


def refuse_unknown_settings(job: Job, registry: Registry) -> None:
    """Every `[plugin.X]` is a plugin of this job, and has only what the plugin's scores and filters take."""
    known: dict[str, set[str]] = {short_name(source.name): set() for source in registry.sources[1:]}
    for things in (registry.scores, registry.filters):
        for name, viewer in things.items():
            owner = short_name(registry.owners[viewer.kind, name])
            known.setdefault(owner, set()).update((*viewer.files, *viewer.options))
    for plugin, settings in job.plugin.items():
        where = job.where(f"plugin.{plugin}")
        if plugin not in known:
            raise UsageError(f"{where}: {plugin!r} is no plugin of this job{suggestion(plugin, known)}")
        for key in settings:
            if key not in known[plugin]:
                raise UsageError(f"{where}.{key}: unknown setting{have(known[plugin])}")


@dataclass
class Loaded:
    """A score or filter at work. `checked` raises where its answer for a picture is of no use."""

    title: str
    ask: Callable[[Sequence[Request], Pictures], Sequence[Any]]
    checked: Callable[[Any], Any]
    out_of_memory: Callable[[BaseException], bool]
    failures: int = 0

    def __call__(self, requests: Sequence[Request], pictures: Pictures) -> list[Any]:
        """Its answer for each picture; a `Verdict` where it failed."""
        try:
            answers = list(self.ask(requests, pictures))
            if len(answers) != len(pictures):
                raise ValueError(f"gave {len(answers)} answers for {len(pictures)} pictures")
            found = [self.checked(answer) for answer in answers]
        except BatchsdError as error:
            raise type(error)(f"{self.title}: {error}") from error
        except Exception as error:
            if len(pictures) == 1:
                return [self._failed(error)]
            pairs = zip(requests, pictures, strict=True)
            return [self([request], [picture])[0] for request, picture in pairs]
        self.failures = 0
        return found

    def _failed(self, error: Exception) -> Verdict:
        said = f"{self.title}: {cause(error)}"
        if self.out_of_memory(error):
            return Verdict(status="oom", reason=said, keeps_picture=False)
        self.failures += 1
        if self.failures == MOST:
            raise UsageError(f"{said}; it failed on {MOST} pictures in a row: mend it, or take it out of the job")
        return Verdict(status="error", reason=said, keeps_picture=False)


@dataclass(frozen=True)
class Judging:
    """Looks at decoded pictures; see the module."""

    scores: Mapping[str, Loaded]
    filters: Sequence[Loaded | Bound]
    keep_rejected: bool

    def __call__(self, requests: Sequence[Request], pictures: Pictures) -> list[Verdict]:
        for picture in pictures:
            picture.flags.writeable = False
        batch = Batch(requests, pictures)
        for name, score in self.scores.items():
            for i, value in batch.asked(score):
                batch.scores[i][name] = value
        for one in self.filters:
            for i, reason in batch.compared(one) if isinstance(one, Bound) else batch.asked(one):
                if reason is not None:
                    batch.ends[i] = Verdict(status="rejected", reason=reason, keeps_picture=self.keep_rejected)
        return [
            replace(batch.ends.get(i, Verdict()), scores=batch.scores[i])
            for i in range(len(pictures))
        ]


@dataclass
class Batch:
    """What is known of some pictures by now; `ends` are the verdicts of those that are not asked about any more."""

    requests: Sequence[Request]
    pictures: Pictures
    scores: list[dict[str, float | None]] = field(init=False)
    ends: dict[int, Verdict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores = [{} for _ in self.pictures]

    @property
    def standing(self) -> list[int]:
        return [i for i in range(len(self.pictures)) if i not in self.ends]

    def asked(self, plugin: Loaded) -> list[tuple[int, Any]]:
        """Its answers for the pictures that still stand."""
        asked = self.standing
        answers = plugin([self.requests[i] for i in asked], [self.pictures[i] for i in asked]) if asked else []
        pairs = list(zip(asked, answers, strict=True))
        self.ends |= {i: answer for i, answer in pairs if isinstance(answer, Verdict)}
        return [(i, answer) for i, answer in pairs if i not in self.ends]

    def compared(self, bound: Bound) -> list[tuple[int, str | None]]:
        return [(i, bound.reason(value_of(bound.name, self.scores[i], self.pictures[i]))) for i in self.standing]


def value_of(name: str, scores: Mapping[str, float | None], picture: Any) -> float | None:
    """What a comparison compares: a score, or a figure of the picture."""
    return scores[name] if name in scores else moments(picture)[BOUNDED.index(name)]


def judging(choices: Choices, device: str, out_of_memory: Callable[[BaseException], bool]) -> Judging | None:
    """Load what was chosen. None where nothing was. Raises UsageError that names what does not load."""

    def load(choice: Choice, checked: Callable[[Any], Any]) -> Loaded:
        try:
            ask = choice.viewer.load(choice.settings, device)
        except BatchsdError as error:
            raise type(error)(f"{choice.title}: {error}") from error
        except Exception as error:
            raise UsageError(f"{choice.title} does not load: {cause(error)}") from error
        if not callable(ask):
            raise UsageError(f"{choice.title}: load gave {type(ask).__name__}, not a function of requests and pictures")
        return Loaded(choice.title, ask, checked, out_of_memory)

    if not choices.scores and not choices.filters:
        return None
    scores = {choice.name: load(choice, checked_score) for choice in choices.scores}
    filters = [one if isinstance(one, Bound) else load(one, checked_reason(one.name)) for one in choices.filters]
    return Judging(scores, filters, choices.keep_rejected)


def checked_score(value: Any) -> float | None:
    """A plain number; not-a-number and infinity as None, a null. Raises TypeError for anything else."""
    if value is None:
        return None
    if not isinstance(value, Real) and getattr(value, "ndim", None) == 0:  # a tensor's element
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"a score is a number or None, not {type(value).__name__}")
    number = float(value)
    return number if math.isfinite(number) else None


def checked_reason(name: str) -> Callable[[Any], str | None]:
    """Of a filter's answer: a text, with the filter's name before it, or None. Raises TypeError for anything else.

    True would be read either way.
    """

    def checked(value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            raise TypeError(f"a filter gives the reason to reject a picture, a text, or None; not {value!r}")
        return reason_of(name, value)

    return checked
