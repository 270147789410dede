"""`python -m tqdit` is the command `tqdit`."""

from tqdit.cli import main

main()
