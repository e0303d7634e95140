"""The page from other people's text, read with the standard library's HTML parser, after runs without a network."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from null_model import job_at, run_job, write_manifest
from PIL import Image

from batchsd import report
from batchsd.report import TEXT, histogram, plain, write_report
from batchsd.store import LocalStore, open_store
from batchsd.survey import MOST

SCRIPT = '</figcaption></bdi></title><script>alert(1)</script><img src=x onerror="alert(2)">'
QUOTES = "\" onload='alert(3)' ` {{ 7 * 7 }} {% raw %} &lt;b&gt; <!-- ]]>"
TURNED = "right \u202eto left\u2066 \u05e9\u05dc\u05d5\u05dd \x00\x1b[31m"
LONG = "<b>" * 6_000  # characters that a row may have
TOO_LONG = "<i>" * 33_334  # 100 kB: refused
LINES = "two\nlines\r\nof 'text'"
HOSTILE = [SCRIPT, QUOTES, TURNED, LONG, TOO_LONG, LINES]
VOID = ("meta", "link", "img", "rect", "br")


@dataclass
class Page(HTMLParser):
    """Every tag with its attributes, and the text outside of styles."""

    text: str
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.inside:
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_alone(page: Page) -> None:
    """Nothing runs, nothing loads, and the policy in its head says so."""
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "link", "title", "style", "body", "h1", "h2", "h3", "div", "b", "p", "nav", "a", "bdi",
        "table", "tr", "th", "td", "small", "figure", "figcaption", "img", "svg", "rect", "pre",
    }  # fmt: skip
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "srcset", "action", "data", "background", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/webp;base64,", "data:,")), (tag, attributes)
    (policy,) = (each["content"] for each in page.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    style = page.text[page.text.index("<style>") : page.text.index("</style>")]
    assert "url(" not in style and "@import" not in style


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> tuple[Path, Page]:
    """A run, and its page, whose folder, ids, prompts and other columns are markup."""
    top = tmp_path_factory.mktemp("hostile")
    prompts = [*HOSTILE, None, "plain"]
    ids = [f"{text[:300]}{i}" for i, text in enumerate([*HOSTILE, SCRIPT, QUOTES])]
    pq.write_table(pa.table({"id": ids, "prompt": prompts, SCRIPT: ids}), top / "prompts.parquet")
    job = job_at(top, checkpoint, f"output.uri={top}/<b>run", "output.columns={seed='<u>seed'}", "input.repeat=2")
    run_job(job, top / "log", failing=(ids[5],))
    write_report(job.output.uri, LocalStore(top), "report.html", 1000)
    return Path(job.output.uri), Page((top / "report.html").read_text())


def test_hostile_text_stays_text(hostile: tuple[Path, Page]) -> None:
    _, page = hostile
    check_alone(page)
    assert page.inside in ([], ["html"])  # all that was opened was closed, by nobody else
    images = page.of("img")
    assert {image["alt"] for image in images} >= {SCRIPT, QUOTES, "plain"}
    shown = "".join(page.words)
    assert SCRIPT in shown and QUOTES in shown and "7 * 7" in shown and "<b>run" in shown
    assert "alert(1)" not in page.text.replace("&lt;script&gt;alert(1)", "")


def test_text_neither_turns_the_page_round_nor_fills_it(hostile: tuple[Path, Page]) -> None:
    _, page = hostile
    shown = "".join(page.words)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.text)
    assert "right \\u202eto left\\u2066 \u05e9\u05dc\u05d5\u05dd \\u0000\\u001b[31m" in shown
    assert "... (18,000 characters)" in shown and "... (100,002 characters)" in shown
    assert len(page.text) < 60_000 + sum(len(image["src"]) for image in page.of("img"))
    assert len(plain("x" * 10**6)) < TEXT + 40 and plain(None) == ""


def test_failures_by_kind_with_row_keys(hostile: tuple[Path, Page]) -> None:
    run, page = hostile
    rows = re.findall(r"<tr><td>(.*?)<td>(.*?)<td><bdi>(.*?)</bdi><td><bdi>(.*?)</bdi>", page.text, re.DOTALL)
    kinds = [(kind, count) for kind, count, _, _ in rows if kind]
    assert kinds == [("<bdi>bad_input</bdi>", "4"), ("<bdi>oom</bdi>", "2")]
    keys = [key for _, _, key, _ in rows]
    assert len(rows) == 6 and keys[0].startswith("&lt;i&gt;") and keys[2].startswith("&lt;/figcaption&gt;")
    assert "10</b>pictures" in page.text and "6</b>failed" in page.text and "</b>rejected" not in page.text


def test_the_same_run_gives_the_same_page(hostile: tuple[Path, Page], tmp_path: Path) -> None:
    run, page = hostile
    pictures, size = write_report(str(run), LocalStore(tmp_path), "again.html", 1000)
    again = (tmp_path / "again.html").read_bytes()
    assert again.decode() == page.text and len(again) == size
    assert pictures == len(page.of("img"))


def test_thumbnails_are_the_rows_own_pictures_and_only_those_are_read(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(tmp_path / "prompts.parquet", [f"row {i}" for i in range(160)])
    job = job_at(tmp_path, checkpoint, "output.rows_per_shard=80")
    run_job(job, tmp_path / "log")
    decoded: list[int] = []
    thumbnail = report.thumbnail
    monkeypatch.setattr(report, "thumbnail", lambda picture: decoded.append(1) or thumbnail(picture))
    pictures, _ = write_report(job.output.uri, open_store(job.output.uri), "report.html", 1000)
    assert pictures == len(decoded) == MOST  # of 160
    colours = {
        row["prompt"]: np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))[0, 0].astype(int)
        for row in pq.read_table(Path(job.output.uri) / "data").to_pylist()
    }
    page = Page((Path(job.output.uri) / "report.html").read_text())
    for image in page.of("img"):
        data = base64.b64decode(image["src"].partition(",")[2])
        drawn = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[0, 0].astype(int)
        assert abs(drawn - colours[image["alt"]]).max() <= 8  # WebP of one colour


def test_secrets_are_not_shown(tmp_path: Path, checkpoint: Path) -> None:
    write_manifest(tmp_path / "prompts.parquet", ["a"])
    job = job_at(tmp_path, checkpoint, "output.columns={prompt='hf_abcdefghijklmnopqrstuvwxyz'}")
    run_job(job, tmp_path / "log")
    write_report(job.output.uri, LocalStore(tmp_path), "report.html", 10)
    page = (tmp_path / "report.html").read_text()
    assert "hf_abc" not in page and "&lt;redacted&gt;" in page


def test_histogram() -> None:
    chart = histogram([0.0, 0.0, 1.0])
    assert [chart["bars"][0], chart["bars"][-1]] == [(100.0, 2), (50.0, 1)]
    assert sum(count for _, count in chart["bars"]) == 3 and chart["mean"] == pytest.approx(1 / 3)
