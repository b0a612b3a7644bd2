"""A sampler with some of its settings replaced, as a user turns them one at a time."""

from copy import copy
from typing import Any


def with_settings(sampler: Any, **settings: float | int | None) -> Any:
    """Return a sampler with other values of some settings; None leaves one as it is.

    Args:
        sampler: any sampler; it is not changed.
        **settings: `guidance_scale`, `temperature`, and `steps`, which a sampler of vectors has in its solver.

    Raises:
        ValueError: a setting that this sampler does not have, or a value that is out of its range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    changed = copy(sampler)
    for name, value in given.items():
        least = 1 if name == "steps" else 0
        if isinstance(value, bool) or not value >= least:
            raise ValueError(f"{name}={value!r}, accepted: a number of at least {least}")
        if name not in adjustable(sampler):
            has = ", ".join(adjustable(sampler)) or "none"
            raise ValueError(f"a {type(sampler).__name__} has no {name} to set; it has {has}")
        if name == "steps" and not hasattr(sampler, "steps"):
            changed.solver = sampler.solver.with_steps(int(value))
        else:
            setattr(changed, name, int(value) if name == "steps" else float(value))
    return changed


def adjustable(sampler: Any) -> dict[str, float | int]:
    """Return those of `guidance_scale`, `temperature` and `steps` that a sampler has, with their values."""
    found = {
        name: getattr(sampler, name)
        for name in ("guidance_scale", "temperature", "steps")
        if isinstance(getattr(sampler, name, None), int | float)
    }
    solver = getattr(sampler, "solver", None)
    if "steps" not in found and hasattr(solver, "with_steps") and isinstance(getattr(solver, "steps", None), int):
        found["steps"] = solver.steps  # type: ignore[union-attr]
    return found
