"""Runs in the CronJob's pod: creates one RayJob for this scheduled time and waits for its end. Standard library only.

The RayJob bears the name of the pod's Job, which Kubernetes derives from the scheduled time: a pod that is started
again finds the RayJob that is there. DATE in its entrypoint becomes the scheduled day, in the schedule's time zone.
"""

import datetime
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
import zoneinfo

ACCOUNT = os.environ.get("ACCOUNT_FOLDER", "/var/run/secrets/kubernetes.io/serviceaccount")
SERVER = os.environ.get("SERVER", "https://kubernetes.default.svc")
DATE = "__DATE__"
SCHEDULED = "batch.kubernetes.io/cronjob-scheduled-timestamp"  # on the Job, since Kubernetes 1.32


def call(path, body=None):
    """The API server's answer to a GET, or to a POST of `body`."""
    with open(f"{ACCOUNT}/token") as file:  # read anew: tokens are renewed while we wait
        headers = {"Authorization": f"Bearer {file.read().strip()}", "Content-Type": "application/json"}
    request = urllib.request.Request(SERVER + path, json.dumps(body).encode() if body else None, headers)
    trust = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt") if SERVER.startswith("https") else None
    with urllib.request.urlopen(request, timeout=30, context=trust) as answer:
        return json.load(answer)


def scheduled_day(job, name, zone):
    """The day for which the CronJob made `job`, as 2026-11-23. Its name ends with the minutes since 1970."""
    stamp = job["metadata"].get("annotations", {}).get(SCHEDULED)
    if stamp:
        at = datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00"))
    else:
        at = datetime.datetime.fromtimestamp(int(name.rsplit("-", 1)[1]) * 60, datetime.UTC)
    return at.astimezone(zoneinfo.ZoneInfo(zone)).date().isoformat()


def main():
    name, zone = os.environ["JOB_NAME"], os.environ.get("TIME_ZONE", "UTC")
    with open(sys.argv[1]) as file:
        rayjob = json.load(file)
    namespace = rayjob["metadata"]["namespace"]
    owner = call(f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}")
    rayjob["metadata"]["name"] = name
    rayjob["spec"]["entrypoint"] = rayjob["spec"]["entrypoint"].replace(DATE, scheduled_day(owner, name, zone))
    jobs = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
    try:
        call(jobs, rayjob)
        print(f"created {name}: {rayjob['spec']['entrypoint']}", flush=True)
    except urllib.error.HTTPError as error:
        if error.code != 409:  # it is there: an earlier pod of this Job made it
            raise
        print(f"{name} is there already", flush=True)
    while True:
        try:
            status = call(f"{jobs}/{name}").get("status", {})
        except (urllib.error.URLError, OSError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                sys.exit(f"{name} was deleted")
            print(f"cannot read {name}, trying again: {error}", flush=True)
            status = {}
        if status.get("jobDeploymentStatus") in ("Complete", "Failed"):
            done = status.get("jobStatus") == "SUCCEEDED"
            sys.exit(None if done else f"{name}: {status.get('reason', '')} {status.get('message', '')}")
        time.sleep(float(os.environ.get("POLL_SECONDS", "15")))


if __name__ == "__main__":
    main()
