"""`batchsd infra`: the job as files for Kubernetes, Slurm or cron, on stdout."""

from __future__ import annotations

from pathlib import Path

import click

from batchsd.cli.options import load_job, set_option
from batchsd.types import UsageError

name_option = click.option("--name", default="", help="of what is made; the job file's if left out")


@click.group()
def infra() -> None:
    """Render a job for a cluster's own scheduler."""


@infra.command()
@click.argument("job", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@set_option
@name_option
@click.option("--image", default="", help="with batchsd in it (infra/Dockerfile)")
@click.option("--namespace", default="default", show_default=True)
@click.option("--volume", "volumes", multiple=True, metavar="CLAIM:/PATH", help="a claim that every pod mounts")
@click.option("--secret", "secrets", multiple=True, help="whose keys become environment variables")
@click.option("--gpu-selector", "selectors", multiple=True, metavar="KEY=VALUE", help="labels of the GPU nodes")
@click.option("--queue", default="", help="of Kueue")
@click.option("--service-account", default="", help="of the Ray pods")
@click.option("--time-limit", type=click.IntRange(min=60), default=None, metavar="SECONDS")
@click.option("--autoscale", is_flag=True, help="from no worker to the job's ray.workers")
@click.option("--schedule", default="", metavar="CRON", help="as '0 2 * * *': a CronJob that makes a RayJob each time")
@click.option("--time-zone", default="Etc/UTC", show_default=True, help="of the schedule and its day")
@click.option("--raycronjob", "alpha", is_flag=True, help="KubeRay's own scheduler (alpha) instead of a CronJob")
@click.option("--submit-image", default="python:3.11-slim", show_default=True, help="of the pod that makes the RayJob")
def k8s(
    job: Path, sets: tuple[str, ...], volumes: tuple[str, ...], selectors: tuple[str, ...], **options: object
) -> None:
    """A KubeRay RayJob, once or by a schedule."""
    from batchsd.infra import Volume, kubernetes

    if options["alpha"] and not options["schedule"]:
        raise click.UsageError("--raycronjob needs a --schedule")
    labels = {}
    for text in selectors:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--gpu-selector {text}: write it as key=value")
        labels[key] = value
    seconds = options.pop("time_limit") or 0
    mounted = tuple(Volume.parse(text) for text in volumes)
    loaded = load_job(str(job), sets)
    text = kubernetes(job, loaded, sets, volumes=mounted, node_selector=labels, seconds=seconds, **options)  # type: ignore[arg-type]
    click.echo(text.rstrip())


@infra.command()
@click.argument("job", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@set_option
@name_option
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(min=0), default=None, help="the job's GPUs a worker if left out")
@click.option("--cpus", type=click.IntRange(min=1), default=4, show_default=True, help="a node")
@click.option("--time-limit", default="", metavar="TIME", help="as Slurm writes it, 12:00:00")
@click.option("--partition", default="")
@click.option("--account", default="")
@click.option("--setup", default="", metavar="COMMAND", help="run first, as 'module load cuda'")
def slurm(job: Path, sets: tuple[str, ...], **options: object) -> None:
    """An sbatch script, for one node or several."""
    from batchsd.infra import slurm as render

    click.echo(render(job, load_job(str(job), sets), sets, **options).rstrip())  # type: ignore[arg-type]


@infra.command()
@click.argument("job", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@set_option
@name_option
@click.option("--schedule", default="0 2 * * *", show_default=True, metavar="CRON")
def cron(job: Path, sets: tuple[str, ...], name: str, schedule: str) -> None:
    """A line for crontab."""
    from batchsd.infra import crontab

    load_job(str(job), sets)
    click.echo(crontab(job, sets, name=name, schedule=schedule).rstrip())
