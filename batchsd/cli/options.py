"""What commands are given: the options that several share, and the job."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from datetime import datetime

    from batchsd.job import Job

set_option = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="over the job's settings")
json_option = click.option("--json", "as_json", is_flag=True, help="for programs")
date_option = click.option(
    "--date", "day", type=click.DateTime(["%Y-%m-%d"]), help="what {date} in the job stands for; today if left out"
)


def load_job(path: str, sets: tuple[str, ...], day: datetime | None = None) -> Job:
    from batchsd.job import load

    return load(path, sets, os.environ, day.date() if day else None)
