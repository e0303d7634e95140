"""`batchsd doctor`: what is wrong here, with a job, on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING

import click

from batchsd.cli.options import load_job, set_option

if TYPE_CHECKING:
    from batchsd.doctor import Finding, NodeFacts

MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


@click.command()
@click.argument("job", required=False)
@set_option
@click.option("--address", help="a Ray cluster: host:port, auto")
def doctor(job: str | None, sets: tuple[str, ...], address: str | None) -> None:
    """Look at this installation, at JOB if given, and at the Ray cluster if there is one."""
    from batchsd import doctor as look
    from batchsd.access import check_access, is_node
    from batchsd.cluster import Cluster
    from batchsd.place import choose_address
    from batchsd.prepare import prepare

    facts = look.node_facts()
    groups: list[Callable[[], Iterator[Finding]]] = [partial(look.installation, facts)]
    loaded = load_job(job, sets) if job else None
    if loaded:
        plan = partial(prepare, loaded, 1, bool(facts.gpus) and loaded.model.device != "cpu")
        groups.append(partial(look.job, loaded, facts, plan))
    where = choose_address(address, loaded.ray.address if loaded else "auto", os.environ)
    with ExitStack() as stack:
        if where not in ("none", "local"):

            def everywhere(call: Callable[[], NodeFacts]) -> dict[str, NodeFacts]:
                allowed = bool(loaded and loaded.ray.allow_unauthenticated)
                check_access(where, allowed, "ray.allow_unauthenticated", os.environ, is_node(where))
                return stack.enter_context(closing(Cluster(where))).on_every_node(call)

            groups.append(partial(look.cluster, everywhere, where))
        found = []
        for finding in look.findings(groups):
            found.append(finding)
            click.echo(f"{MARKS[finding.state]}  {finding.text}")
    raise SystemExit(look.worst(found))
