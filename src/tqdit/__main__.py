"""Run the command `tqdit` for `python -m tqdit`."""

from tqdit.cli.main import main

main()
