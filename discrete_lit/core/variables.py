"""Numbers in the environment."""

import math
import os


def positive_number(variable: str, default: float) -> float:
    """Read a positive number from a variable of the environment; `default` where it is not set.

    Raises:
        ValueError: it is something else.
    """
    given = os.environ.get(variable, str(default))
    try:
        number = float(given)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"the environment variable {variable} is {given!r}; it must be a positive number")
    return number
