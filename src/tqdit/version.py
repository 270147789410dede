"""The version of tqdit, in artifacts and result files."""

VERSION = "0.1.0"
