"""`python -m sigattn COMMAND ...`; see sigattn/cli.py."""

from sigattn import cli

cli.main()
