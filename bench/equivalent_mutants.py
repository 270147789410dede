"""Mutants that change nothing that anybody could see, or nothing on a CPU, each with its reason."""

from mutants import Mutant

# (module, a part of the source line, operator or "" for all, the start of the result or "", reason)
EQUIVALENT: tuple[tuple[str, str, str, str, str], ...] = ()


def reason(module: str, source: str, mutant: Mutant) -> str | None:
    """Why no test can find the mutant, or None."""
    line = source.splitlines()[mutant.line - 1]
    for of, part, operator, after, why in EQUIVALENT:
        same = of == module and part in line and operator in ("", mutant.operator)
        if same and mutant.after.startswith(after):
            return why
    return None
