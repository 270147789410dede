"""`python -m tqdit` is the command `tqdit`."""

from tqdit.cli.main import main

main()
