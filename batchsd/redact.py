"""Nothing secret is shown or stored: query strings, passwords in URIs and keys of known shapes are cut."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "<redacted>"

# Whole words of a setting's name; `tokenizer` and `tokens_cut` are no tokens.
SECRET_WORDS = {"secret", "secrets", "token", "password", "passwd", "credential", "credentials", "apikey"}
SECRET_NAMES = re.compile(r"(api|access|secret|private|account)[_-]?key", re.IGNORECASE)

URI_USER = re.compile(r"(?<=://)[^/@\s]+@")
URI_QUERY = re.compile(r"(\w://[^\s?#'\"]*)[?#][^\s'\"]*")
KEY_SHAPES = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS access keys
    r"|hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}"  # OpenAI and its kin, Slack, Google
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"  # JSON web tokens
)


def redact(value: Any) -> Any:
    """The same JSON value, or text, with whatever looks like a secret replaced by `<redacted>`."""
    if isinstance(value, dict):
        return {key: HIDDEN if inner and _is_secret(key) else redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    if not isinstance(value, str):
        return value
    value = URI_QUERY.sub(rf"\1?{HIDDEN}", value)
    value = URI_USER.sub(f"{HIDDEN}@", value)
    return KEY_SHAPES.sub(HIDDEN, value)


def _is_secret(name: str) -> bool:
    return bool(SECRET_NAMES.search(name)) or not SECRET_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))
