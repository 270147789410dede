"""Read `--set NAME=VALUE`, which sets any setting of a recipe."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

# Options of `quantize`, and the recipe settings that they set under other names.
SETTINGS_OF: Mapping[str, tuple[str, ...]] = {
    "bits": ("bits", "weight_bits", "activation_bits"),
    "ho": ("hessian",),
    "mrq": ("softmax_grid", "gelu_grid"),
    "tgq": ("time_grouped",),
}

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="any setting of a recipe, such as samples=8; may be repeated (docs/settings.md)",
    ),
]


def parsed(assignments: Iterable[str] | None) -> dict[str, str]:
    """Return the settings that `--set` gives, as texts by name. The recipe converts a text to the type of its field.

    Raises `InputError` for a text that is no assignment, and for a name that is given twice.
    """
    from tqdit.errors import InputError

    found: dict[str, str] = {}
    for text in assignments or ():
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise InputError(f"--set takes NAME=VALUE such as samples=8, got '{text}'")
        if name in found:
            raise InputError(f"--set {name} is given twice, as {found[name]} and {value}")
        found[name] = value
    return found


def typed(context: typer.Context, name: str) -> bool:
    """Say whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def flag(context: typer.Context, name: str) -> str:
    """Return an option as it was typed, such as "--no-ho" for `ho` that was turned off."""
    return f"--no-{name}" if context.params[name] is False else f"--{name}"


def check_once(context: typer.Context, names: Iterable[str], assigned: Mapping[str, Any]) -> None:
    """Raise `InputError` naming an option of `names` whose setting `--set` gives too."""
    from tqdit.errors import InputError

    for name in names:
        both = [setting for setting in SETTINGS_OF.get(name, (name,)) if setting in assigned]
        if both and typed(context, name):
            raise InputError(f"{flag(context, name)} and --set {both[0]} exclude each other")
