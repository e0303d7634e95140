"""`python -m batchsd`: the command line."""

from batchsd.cli import main

main()
