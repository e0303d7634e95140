"""The report of 5,000 rows in a real browser: headless Chromium loads it, from nowhere else, without a complaint.

    pytest -m heavy tests/test_browser.py -s        # prints weight and times; needs `chromium`

The rows have real pictures (PIL draws them), six samplers, two scores, rejections, failures and hostile prompts.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from null_model import job_at, run_job
from PIL import Image, ImageDraw

from batchsd.figures import figures
from batchsd.report import write_report
from batchsd.store import open_store
from batchsd.types import Record, Request

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine"),
]
ROWS, SIDE = 5_000, 128
SAMPLERS = ("ddim", "euler", "euler_a", "heun", "lms", "dpmpp_2m")
COLOURS = ("red", "green", "blue", "orange", "purple", "teal", "gold", "black")
PLUGIN = """
from batchsd import Filter, Score, hookimpl

@hookimpl
def register_scores():
    return {name: Score.of(lambda requests, pictures: []) for name in ("redness", "busyness")}

@hookimpl
def register_filters():
    return {"not_gold": Filter.of(lambda requests, pictures: [])}
"""


def picture(prompt: str, seed: int) -> np.ndarray:
    random = Random(seed)
    sheet = Image.new("RGB", (SIDE, SIDE), (random.randrange(150, 256),) * 3)
    pen = ImageDraw.Draw(sheet)
    colour = next((name for name in COLOURS if name in prompt), "gray")
    for _ in range(random.randrange(1, 6)):
        x, y, size = random.randrange(SIDE), random.randrange(SIDE), random.randrange(10, 60)
        pen.ellipse((x - size, y - size, x + size, y + size), colour, "black")
    return np.asarray(sheet)


def record(request: Request) -> Record:
    """What an engine with two scores and two filters gives."""
    if request.error:
        return Record(request, request.error.status, str(request.error))
    if request.seed % 333 == 5:
        return Record(request, "nan", "the network gave numbers that are not finite")
    drawn = picture(request.prompt, request.seed)
    told = {"height": SIDE, "width": SIDE, "figures": figures(drawn)}
    told["scores"] = {"redness": drawn[..., 0].mean() / 255, "busyness": float(np.abs(np.diff(drawn[..., 1])).mean())}
    reason = "not_gold: gold" if "gold" in request.prompt and request.seed % 3 == 0 else None
    if told["scores"]["redness"] < 0.2:
        reason = f"redness is {told['scores']['redness']:.6g}, wanted > 0.2"
    data = io.BytesIO()
    Image.fromarray(drawn).save(data, "png", compress_level=1)
    return Record(request, "rejected" if reason else "ok", reason, data.getvalue(), **told)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    top = tmp_path_factory.mktemp("large")
    prompts = [f"a {COLOURS[i % 8]} pebble, no. {i}, on the shore in the evening light" for i in range(ROWS)]
    prompts[7], prompts[8] = "<script>alert(1)</script>", "\u202e\u05e9\u05dc\u05d5\u05dd \"'><img src=http://x.test/>"
    prompts[9::1000] = ["x" * 100_000] * len(prompts[9::1000])
    columns = {
        "id": [f"row {i}" for i in range(ROWS)], "prompt": prompts, "seed": [i % 4_900 for i in range(ROWS)],
        "scheduler": [SAMPLERS[i % 6] for i in range(ROWS)], "guidance_scale": [float(i % 13) for i in range(ROWS)],
        "steps": [10 + i % 30 for i in range(ROWS)],
    }  # fmt: skip
    pq.write_table(pa.table(columns), top / "prompts.parquet")
    (top / "mine.py").write_text(PLUGIN)
    settings = ("plugins=['./mine.py']", "output.scores=['redness', 'busyness']", "output.rejected='keep'")
    (top / "job.toml").touch()
    job = job_at(
        top, checkpoint, *(text.replace("./mine", f"{top}/mine") for text in settings),
        "output.filters=['not_gold', 'redness > 0.2']", "output.rows_per_shard=250", "input.repeat=1",
    )  # fmt: skip
    tally = run_job(job, top / "log", record=record)
    assert tally.rows == ROWS and tally.rejected > 100 and tally.failures.keys() == {"bad_input", "nan"}
    return Path(job.output.uri)


def asked(net: Path) -> set[str]:
    """The addresses elsewhere that a browser asked for, but those of the browser's own services."""
    log = json.dumps(json.loads(net.read_text()), separators=(",", ":"))
    urls = {url for url in re.findall(r'"url":"(.*?)"', log) if url.startswith(("http", "ws", "ftp"))}
    own = re.compile(r"https?://([\w-]+\.)*(google|googleapis|gvt1|gstatic)\.com/")
    return {url for url in urls if not own.match(url)}


def chromium(*words: str) -> subprocess.CompletedProcess[str]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    return subprocess.run(["chromium", *flags, *words], capture_output=True, text=True, timeout=300, check=True)


def test_a_browser_loads_the_page_from_nowhere_else(run: Path, tmp_path: Path) -> None:
    began = time.process_time()
    pictures, size = write_report(str(run), open_store(str(run)), "report.html", 100_000)
    made = time.process_time() - began
    page, net = f"file://{run}/report.html", tmp_path / "net.json"
    began = time.perf_counter()
    dumped = chromium(f"--log-net-log={net}", "--dump-dom", page)
    loaded = time.perf_counter() - began
    print(f"\n{ROWS} rows: {made:.1f} CPU s to make; {pictures} pictures, {size / 2**20:.2f} MiB; read in {loaded:.1f}")
    assert 300 <= pictures <= 600 and size < 3 * 2**20
    assert dumped.stdout.count("<img ") == pictures  # the parser found what we wrote, and no more
    assert "CONSOLE" not in dumped.stderr, dumped.stderr
    assert asked(net) == set()
    spoilt = tmp_path / "spoilt.html"  # the test has teeth: what the page must not do is seen
    spoilt.write_text((run / "report.html").read_text() + "<script>alert(1)</script><img src=http://127.0.0.1:9/a.png>")
    assert "CONSOLE" in chromium("--dump-dom", f"file://{spoilt}").stderr  # the policy refuses both
    shot = tmp_path / "page.png"
    chromium("--window-size=1240,9000", f"--screenshot={shot}", page)
    drawn = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    coloured = (drawn.max(-1) - drawn.min(-1) > 60).mean()
    assert drawn.shape == (9000, 1240, 3) and coloured > 0.02  # pictures are there to be seen
    shutil.copy(shot, run / "page.png")
    print(run / "page.png")
