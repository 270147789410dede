"""Backends that are fast on one kind of device.

`ops.dispatch` loads them by name; nothing imports them.
"""
