"""The command line of tqdit."""
