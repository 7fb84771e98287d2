"""`python -m sigattn COMMAND ...` and the script `sigattn`; see cli.py."""

import sys

from sigattn import extras


def main() -> None:
  """Runs the command. Missing packages end the program with one line."""
  try:
    from sigattn import cli  # It needs packages that may be missing.

    cli.main()
  except extras.MissingPackagesError as error:
    sys.exit(f"sigattn: {error}")


if __name__ == "__main__":
  main()
