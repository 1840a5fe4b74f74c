"""Values of a published config.json, checked before anything is built from them."""

import math
from collections.abc import Mapping
from typing import Any

LARGEST = 1 << 24  # of the whole numbers: what a vocabulary, a layer or a text may have
LARGEST_REAL = 1e12  # of the others; the rotary base of published models goes up to 1e8
REQUIRED: Any = object()


def field(stored: Mapping[str, Any], name: str, kind: type, default: Any = REQUIRED) -> Any:
    """The value called `name`, of this type; where it is absent or null, the default.

    A float may be written as an int. Raises ValueError where it is required and absent, of another type, not finite,
    or beyond the bounds.
    """
    value = stored.get(name)
    if value is None:
        if default is REQUIRED:
            raise ValueError(f"it lacks {name}; fetch the publisher's file again")
        return default
    fits = type(value) is kind or (kind is float and type(value) is int)
    largest = LARGEST if kind is int else LARGEST_REAL
    if not fits or (kind in (int, float) and not (math.isfinite(value) and abs(value) <= largest)):
        raise ValueError(
            f"{name} is {value!r:.60}; it must be of type {kind.__name__}, whole numbers at most {LARGEST:,}"
        )
    return float(value) if kind is float else value


def require(stored: Mapping[str, Any], **supported: Any) -> None:
    """Raises ValueError where one of these settings is there and is not the value that is supported."""
    for name, value in supported.items():
        if stored.get(name) is not None and stored[name] != value:
            raise ValueError(f"{name} is {stored[name]!r:.60}; supported is {value!r}")


def positive(config: Any, *names: str) -> None:
    """Raises ValueError where one of these numbers of a config is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")


def multiple(config: Any, name: str, of: str) -> None:
    """Raises ValueError where one number of a config is no multiple of another."""
    if getattr(config, name) % getattr(config, of):
        raise ValueError(f"{name} {getattr(config, name)} must be a multiple of {of} {getattr(config, of)}")


def one_of(name: str, value: Any, supported: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raises ValueError where a value is none of those supported."""
    if value not in supported:
        raise ValueError(f"{name} is {value!r:.60}; supported are {', '.join(supported)}")
