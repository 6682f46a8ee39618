"""`python -m stageprune`: the command, for launchers of several processes."""

from .core.cli import main

main()
