"""``python -m jobs.cli`` is ``winnow``."""

from jobs.cli import main

main()
