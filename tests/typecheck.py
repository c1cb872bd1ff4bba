"""The run-time type checkers of the suite: shapes and dtypes by jaxtyping, an int where a float is asked for as usual.

``checked`` looks at every annotation, where the tests run. ``checked_tensors`` looks at those that name a tensor's shape
and is installed on ranks, where tests put stand-ins of other classes into the loop.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

Function = TypeVar("Function", bound=Callable[..., Any])

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked_tensors(function: Function) -> Function:
    """Checks the annotations of a function that hold a shape; what jaxtyping hands over is a function made for the check."""
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)
    }
    return checked(function) if function.__annotations__ else function


def _has_shape(hint: Any) -> bool:
    is_array = inspect.isclass(hint) and issubclass(hint, AbstractArray)
    return is_array or any(map(_has_shape, get_args(hint)))
