"""Backends that are fast on one kind of device. Loaded by name from `ops.dispatch`; nothing imports them."""
