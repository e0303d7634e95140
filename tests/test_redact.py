"""Secrets of every known shape are hidden, and ordinary texts stay as they are."""

from batchsd.redact import redact


def test_redaction_hides_secrets_and_nothing_else():
    assert redact("s3://key:secret@bucket/a?token=1&x=2") == "s3://<redacted>@bucket/a?<redacted>"
    assert redact("https://host/a?X-Amz-Signature=ab cd") == "https://host/a?<redacted> cd"
    assert redact({"api_key": "x", "tokens_cut": 3, "tokenizer": "t", "hf-token": "y", "password": ""}) == {
        "api_key": "<redacted>", "tokens_cut": 3, "tokenizer": "t", "hf-token": "<redacted>", "password": "",
    }  # fmt: skip
    assert redact(["hf_" + "a" * 30, "AKIA" + "B" * 16, "is it red? a {colour}"]) == [
        "<redacted>", "<redacted>", "is it red? a {colour}",
    ]  # fmt: skip
