"""Rendered files for clusters. The oracles: KubeRay's CRDs, Kubernetes' schemas, hadolint, bash, a fake API server."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from batchsd.cli import commands
from batchsd.infra import seconds_of
from batchsd.types import UsageError

ROOT = Path(__file__).parent.parent
CRDS = ROOT.parent / "shared" / "crds"
JOB = """\
# a comment: with "quotes", {{ braces }} and 100 %
plugins = ["./mine.py"]
[input]
manifest = "s3://prompts/{date}/*.parquet"
[model]
path = "/models/sd15"
[output]
uri = "s3://pictures/{date}"
[run]
grace = 300
[ray]
workers = 4
gpus_per_worker = 0.5
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("# a plugin: 'quoted'\n\nx = 1\n")
    path = tmp_path / "Night Shift.toml"
    path.write_text(JOB)
    return path


def infra(*arguments: str | Path) -> str:
    words = ["infra", *map(str, arguments)]
    result = CliRunner().invoke(commands, words, catch_exceptions=False, standalone_mode=False)
    assert not result.exception
    return result.output


def documents(text: str) -> dict[str, Any]:
    """By kind; each kind's last."""
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


K8S = ("--volume", "models:/models", "--secret", "s3-keys", "--gpu-selector", "gpu=a100", "--queue", "team")
FORMS: dict[str, tuple[str, ...]] = {
    "rayjob": (),
    "rayjob, limited, autoscaled": ("--time-limit", "3600", "--autoscale", "--service-account", "ray"),
    "cronjob": ("--schedule", "0 2 * * *", "--time-zone", "Europe/Berlin"),
}


# --- Kubernetes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_kubernetes_files_are_valid(form: str, job: Path) -> None:
    found = list(yaml.safe_load_all(infra("k8s", job, *K8S, *FORMS[form])))
    rays = [document for document in found if document["apiVersion"].startswith("ray.io")]
    for document in found:
        if document in rays:
            check_crd(document)
        else:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    assert bool(rays) == ("cronjob" not in form)


def test_a_raycronjob_is_valid_and_refused_where_it_could_not_tell_the_day(job: Path) -> None:
    schedule = ("--schedule", "0 2 * * *", "--raycronjob")
    with pytest.raises(UsageError, match="scheduled day"):
        infra("k8s", job, *K8S, *schedule)
    job.write_text(JOB.replace("{date}", "x"))
    found = documents(infra("k8s", job, *K8S, *schedule))
    assert found["RayCronJob"]["spec"]["schedule"] == "0 2 * * *"
    check_crd(found["RayCronJob"])


def check_crd(document: dict[str, Any]) -> None:
    if not CRDS.is_dir():
        pytest.skip("KubeRay's CRDs are not beside this checkout (shared/crds)")
    error = jsonschema.exceptions.best_match(validator(document["kind"]).iter_errors(document))
    if error is not None:
        raise error


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """Of KubeRay's definition, closed; once a kind: it is a megabyte of YAML."""
    text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return jsonschema.Draft202012Validator(closed(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]))


def closed(schema: Any) -> Any:
    """The schema with unknown fields as errors, as a strict API server has it."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) for key, value in schema.items()}
    fields, free = schema.get("properties"), schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(fields, dict) and schema.get("type") == "object" and not free:
        out.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    return out


MISSPELT = [("shutdownAfterJobFinishes", "shutdownAfterJobFinish"), ("replicas", "replica")]


@pytest.mark.parametrize("right, wrong", MISSPELT)
def test_a_misspelling_is_caught(right: str, wrong: str, job: Path) -> None:
    text = infra("k8s", job, *K8S)
    check_crd(documents(text)["RayJob"])
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        check_crd(documents(text.replace(f"{right}:", f"{wrong}:"))["RayJob"])


def test_a_misspelling_in_a_core_kind_is_caught(job: Path) -> None:
    text = infra("k8s", job, *K8S, *FORMS["cronjob"]).replace("concurrencyPolicy:", "concurencyPolicy:")
    with pytest.raises(kubernetes_validate.ValidationError, match="concurencyPolicy"):
        kubernetes_validate.validate(documents(text)["CronJob"], kubernetes_validate.latest_version(), strict=True)


def test_a_rayjob_holds_the_job_and_its_sizes(job: Path) -> None:
    found = documents(infra("k8s", job, *K8S, "--set", "sampler.steps=30", "--image", "me/batchsd:1"))
    files = found["ConfigMap"]["data"]
    assert files == {"Night Shift.toml": JOB, "mine.py": "# a plugin: 'quoted'\n\nx = 1\n"}
    rayjob = found["RayJob"]
    assert rayjob["metadata"]["name"] == "night-shift"
    assert rayjob["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    spec = rayjob["spec"]
    assert spec["suspend"] is True and spec["shutdownAfterJobFinishes"] is True
    assert spec["entrypoint"] == (
        "batchsd run '/etc/batchsd/Night Shift.toml' --set sampler.steps=30 --set model.path=/models/sd15 "
        """--set 'plugins=["/etc/batchsd/mine.py"]'"""
    )
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 2  # four workers, two to a GPU
    pod = group["template"]["spec"]
    (worker,) = pod["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker["image"] == "me/batchsd:1"
    assert worker["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    assert pod["nodeSelector"] == {"gpu": "a100"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "models"}


def test_an_autoscaled_job_waits_for_its_gpus(job: Path) -> None:
    """The cluster begins without one, where the device "auto" is refused (`place.size_crew`)."""
    for options, expected in ((FORMS["rayjob, limited, autoscaled"], True), ((), False)):
        found = documents(infra("k8s", job, *K8S, *options))["RayJob"]["spec"]["entrypoint"]
        assert ("--set model.device=cuda" in found) is expected


def test_a_cpu_job_asks_for_no_gpu(job: Path) -> None:
    text = infra("k8s", job, "--volume", "models:/models", "--set", "model.device=cpu")
    assert "nvidia" not in text and "-cpu" in text
    assert documents(text)["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "model.path: /models/sd15 is on this machine"),
        (("--volume", "models"), "CLAIM:/path"),
        (("--volume", "m:/models", "--set", "ray.workers=auto", "--autoscale"), "ray.workers"),
        (("--volume", "m:/models", "--gpu-selector", "a100"), "key=value"),
        (("--volume", "m:/models", "--name", "---"), "needs a letter"),
        (("--volume", "m:/models", "--set", "run.scratch=/tmp/x"), "run.scratch: /tmp/x is on this machine"),
    ],
)
def test_what_no_pod_could_run_is_refused(arguments: tuple[str, ...], message: str, job: Path) -> None:
    with pytest.raises(UsageError) as caught:
        infra("k8s", job, *arguments)
    assert message in str(caught.value)


# --- the CronJob's pod -----------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """As much of an API server as submit.py meets."""

    rayjobs: dict[str, Any]
    annotations: dict[str, str]
    polls: list[str]

    def do_GET(self) -> None:
        assert self.headers["Authorization"] == "Bearer secret"
        if "/jobs/" in self.path:
            return self.reply(200, {"metadata": {"annotations": self.annotations}})
        self.polls.append(self.path)
        if len(self.polls) == 2:
            return self.reply(500, {})
        state = {"jobDeploymentStatus": "Complete", "jobStatus": self.rayjobs["end"]} if len(self.polls) > 3 else {}
        return self.reply(200, {"status": state})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["metadata"]["name"]
        if name in self.rayjobs:
            return self.reply(409, {})
        self.rayjobs[name] = body
        return self.reply(201, body)

    def reply(self, code: int, value: Any) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    Server.rayjobs, Server.annotations, Server.polls = {"end": "SUCCEEDED"}, {}, []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def submit(text: str, server: http.server.HTTPServer, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    data = [d for d in yaml.safe_load_all(text) if d["metadata"]["name"].endswith("-submit") and "data" in d][0]["data"]
    for file in ("submit.py", "rayjob.json"):
        (folder / file).write_text(data[file])
    (folder / "token").write_text("secret\n")
    environ = {
        "JOB_NAME": name,
        "TIME_ZONE": "Europe/Berlin",
        "SERVER": f"http://127.0.0.1:{server.server_port}",
        "ACCOUNT_FOLDER": str(folder),
        "POLL_SECONDS": "0.01",
    }
    command = [sys.executable, str(folder / "submit.py"), str(folder / "rayjob.json")]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("stamp", ["2026-11-23T00:30:00+01:00", ""])
def test_the_pod_makes_one_rayjob_for_the_scheduled_day(stamp: str, job: Path, server, tmp_path: Path) -> None:
    """2026-11-22 23:30 UTC is the 23rd in Berlin, by the annotation and by the minutes in the Job's name."""
    if stamp:
        Server.annotations["batch.kubernetes.io/cronjob-scheduled-timestamp"] = stamp
    text = infra("k8s", job, *K8S, *FORMS["cronjob"])
    name = f"night-shift-{1795390200 // 60}"
    first = submit(text, server, name, tmp_path)
    assert first.returncode == 0, first.stderr
    assert Server.rayjobs[name]["spec"]["entrypoint"].endswith(" --date 2026-11-23")
    again = submit(text, server, name, tmp_path)
    assert again.returncode == 0 and "there already" in again.stdout
    assert len(Server.rayjobs) == 2  # the one, and "end"


def test_the_pod_fails_where_the_rayjob_failed(job: Path, server, tmp_path: Path) -> None:
    Server.rayjobs["end"] = "FAILED"
    text = infra("k8s", job, *K8S, *FORMS["cronjob"])
    assert submit(text, server, "night-shift-29923170", tmp_path).returncode == 1


# --- Slurm and cron --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", ["1", "3"])
def test_an_sbatch_script_is_bash_and_says_what_the_job_says(nodes: str, job: Path, tmp_path: Path) -> None:
    text = infra("slurm", job, "--nodes", nodes, "--time-limit", "12:00:00", "--set", "sampler.scheduler=Euler a")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {f"#SBATCH --nodes={nodes}", "#SBATCH --gpus-per-node=1", "#SBATCH --time=12:00:00"} <= set(lines)
    assert "#SBATCH --signal=B:USR1@360" in lines  # grace, and a minute
    assert "--set 'sampler.scheduler=Euler a'" in text
    assert ("ray start" in text) == (nodes == "3")


def test_workers_of_several_nodes_are_counted(job: Path) -> None:
    text = infra("slurm", job, "--nodes", "3", "--gpus-per-node", "4", "--set", "ray.workers=auto")
    assert "--set ray.workers=24" in text  # 3 x 4 GPUs, two workers a GPU
    assert "model.device" not in text
    text = infra("slurm", job, "--nodes", "3", "--gpus-per-node", "0", "--set", "ray.workers=auto")
    assert "--set ray.workers=3 --set model.device=cpu" in text and "#SBATCH --gpus" not in text


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("90:30", 5430), ("12:00:00", 43200), ("2-12", 216000), ("2-12:30", 217800), ("1-00:00:05", 86405)],
)
def test_slurm_s_times(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(("limit", "said"), [("7", "too short"), ("7:00", "too short"), ("noon", "12:00:00")])
def test_a_limit_that_leaves_no_time_is_refused(limit: str, said: str, job: Path) -> None:
    with pytest.raises(UsageError, match=f"--time-limit {limit}: .*{said}"):
        infra("slurm", job, "--time-limit", limit)  # its grace is 5 minutes


def test_a_crontab_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cron's part done by hand: five fields off, `\\%` to `%`, the rest to sh."""
    folder = tmp_path / "a 100% good folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    here = JOB.replace('plugins = ["./mine.py"]', "").replace("s3://", "./").replace("/models/sd15", "tiny-scenes")
    (folder / "job.toml").write_text(here)
    line = infra("cron", "job.toml", "--schedule", "5 3 * * 1").splitlines()[-1]
    assert line.startswith("5 3 * * 1 ")
    command = line.split(" ", 5)[5].replace("\\%", "%")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], env=environ, capture_output=True, text=True, timeout=300)
    assert done.stdout == done.stderr == ""
    today = date.today().isoformat()
    (said,) = (folder / "job.log").read_text().splitlines()  # exit 2: no second try
    assert f"input.manifest: {folder}/prompts/{today}/*.parquet: no file matches" in said


# --- the image -------------------------------------------------------------------------------------------


def test_the_dockerfile_is_clean() -> None:
    program = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert program
    done = subprocess.run([program, str(ROOT / "infra" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_pins_the_ray_that_rayjobs_name(job: Path) -> None:
    spec = documents(infra("k8s", job, *K8S))["RayJob"]["spec"]
    version = spec["rayClusterSpec"]["rayVersion"]
    assert f"rayproject/ray:{version}-py311" in (ROOT / "infra" / "Dockerfile").read_text()
    assert f"ray=={version.rsplit('.', 1)[0]}.*" in (ROOT / "constraints.txt").read_text()
