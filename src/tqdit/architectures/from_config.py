"""A float model made by its own class out of a config."""

from collections.abc import Iterable, Mapping
from typing import Any

from tqdit.errors import InputError

QUANTIZATION = "quantization_config"  # a key of a config that the classes of float models do not take


def float_model(kind: type[Any], config: Mapping[str, Any], unknown: Iterable[str] = ()) -> Any:
    """Make the float model of a class by its `from_config`, without the `unknown` keys, which the class does not have.

    Raises `InputError` with diffusers' reason for a config that diffusers refuses.
    """
    skipped = {QUANTIZATION, *unknown}
    try:
        return kind.from_config({key: value for key, value in config.items() if key not in skipped})
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"diffusers refuses it: {str(error).strip().partition(chr(10))[0]}") from None
