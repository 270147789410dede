"""Accept options by position where former versions took them so, with a `DeprecationWarning`."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def formerly_positional(
    *names: str, stacklevel: int = 2, public: str = ""
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Let a function take the keyword-only options `names`, in this order, behind its positional arguments too.

    `stacklevel`: 2 where users call the function itself, one more for each function between. `public`: the name that
    users call, if it is not the function's own.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        parameters = inspect.signature(function).parameters.values()
        count = sum(parameter.kind in POSITIONAL for parameter in parameters)
        function_name = public or getattr(function, "__name__", "a function")

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            late = arguments[count:]
            if not late or len(late) > len(names):
                return function(*arguments, **options)
            given = dict(zip(names, late, strict=False))
            warnings.warn(
                f"{function_name}: give {', '.join(f'{name}=...' for name in given)} by name, not by position",
                DeprecationWarning,
                stacklevel=stacklevel,
            )
            return function(*arguments[:count], **given, **options)

        return call

    return decorate
