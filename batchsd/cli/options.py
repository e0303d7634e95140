"""What commands are given: the options that several share, and the job."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from batchsd.job import Job

set_option = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="over the job's settings")
json_option = click.option("--json", "as_json", is_flag=True, help="for programs")


def load_job(path: str, sets: tuple[str, ...]) -> Job:
    from batchsd.job import load

    return load(path, sets, os.environ)
