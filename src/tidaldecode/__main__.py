"""``python -m tidaldecode``: the command line."""

from tidaldecode.cli import main

main()
