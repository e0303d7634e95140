"""The command line, and the only room that prints: results to stdout, progress and errors to stderr.

Exit codes: 0 all rows done; 1 too many rows failed; 2 usage, job or manifest (do not retry); 3 cluster or
storage (a retry may help); 75 stopped by a signal after a clean stop; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys

import click

from batchsd.cli.begin import init, new_plugin
from batchsd.cli.export import export, report
from batchsd.cli.health import doctor
from batchsd.cli.infra import infra
from batchsd.cli.look import inspect, plan, plugins, schema, status, validate
from batchsd.cli.operate import reproduce, verify
from batchsd.cli.run import retry, run
from batchsd.cli.terminal import say
from batchsd.types import BatchsdError


def main() -> None:
    """Run a command and exit with its code; a known error is one message, never a traceback."""
    try:
        code = commands.main(prog_name="batchsd", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BatchsdError as error:
        say(f"batchsd: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `batchsd ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="batchsd")
def commands() -> None:
    """Turn a Parquet manifest of prompts into a dataset of pictures."""


looking = (plan, validate, status, verify, reproduce, report, inspect, plugins, schema, doctor)
for command in (init, new_plugin, run, retry, export, infra, *looking):
    commands.add_command(command)
