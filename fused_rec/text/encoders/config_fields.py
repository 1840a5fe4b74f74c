"""Checks of values of a config.json before a model is built from them."""

import math
from collections.abc import Mapping
from typing import Any

LARGEST = 1 << 24  # bound of integers: sizes of vocabularies, layers and texts
LARGEST_REAL = 1e12  # bound of floats; rotary bases of published models go up to 1e8
REQUIRED: Any = object()


def field(stored: Mapping[str, Any], name: str, kind: type, default: Any = REQUIRED) -> Any:
    """Reads a value of a config.

    Args:
      stored: content of the file.
      name: name of the value.
      kind: its type; a float may be written as an int.
      default: used where it is absent or null.

    Returns:
      The value.

    Raises:
      ValueError: it is required and absent, of another type, not finite, or out of bounds.
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
    """Checks settings for which one value is supported.

    Args:
      stored: content of the file.
      **supported: supported value by name of the setting.

    Raises:
      ValueError: a setting is present with another value.
    """
    for name, value in supported.items():
        if stored.get(name) is not None and stored[name] != value:
            raise ValueError(f"{name} is {stored[name]!r:.60}; supported is {value!r}")


def positive(config: Any, *names: str) -> None:
    """Checks that numbers of a config are at least 1.

    Args:
      config: an encoder config.
      *names: its fields.

    Raises:
      ValueError: one is below 1.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")


def multiple(config: Any, name: str, of: str) -> None:
    """Checks that a number of a config is a multiple of another.

    Args:
      config: an encoder config.
      name: field that must be a multiple.
      of: field that must divide it.

    Raises:
      ValueError: it is no multiple.
    """
    if getattr(config, name) % getattr(config, of):
        raise ValueError(f"{name} {getattr(config, name)} must be a multiple of {of} {getattr(config, of)}")


def one_of(name: str, value: Any, supported: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Checks that a value is supported.

    Args:
      name: name of the value, for the message.
      value: the value.
      supported: supported values, or a mapping with these as keys.

    Raises:
      ValueError: it is none of them.
    """
    if value not in supported:
        raise ValueError(f"{name} is {value!r:.60}; supported are {', '.join(supported)}")
