"""Requests of the HTTP server as checked values: query strings and JSON bodies that anybody may have written."""

import dataclasses
import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from fused_rec.data.dataset import printable

MAX_ID = 1_000  # characters of an id
MAX_WHERE = 2_000  # characters of a condition; each of its comparisons reads a column
EXAMPLE = '{"users": ["ID"]}'
FIELDS = ("users", "k", "where", "items", "include_seen")


class RequestError(Exception):
    """Error that a request is answered with.

    Args:
      status: HTTP status.
      message: value, bound and remedy; read by the client.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of what a request may ask for, and of what the server does at once.

    Attributes:
      max_users: users of a request.
      max_k: items per user, and similar items.
      max_body: bytes of a body.
      max_pending: requests that compute or wait for it; more are answered with status 503.
      timeout: seconds in which the body must arrive, and then the result be computed.
    """

    max_users: int = 100
    max_k: int = 100
    max_body: int = 1 << 18
    max_pending: int = 64
    timeout: float = 10.0


@dataclasses.dataclass(frozen=True)
class RecommendRequest:
    """Checked request for recommendations; fields as of `fused_rec.run.Run.recommend`."""

    users: tuple[str, ...]
    k: int = 10
    where: str | None = None
    items: tuple[str, ...] | None = None
    include_seen: bool = False


def parse_query(
    pairs: Iterable[tuple[str, str]], required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Reads the parameters of a query string.

    Args:
      pairs: names and values, in their order.
      required: names that must be given.
      optional: names that may be given.

    Returns:
      Values by name: an integer for `k`, true or false for `include_seen`, a list for `items`, else text.

    Raises:
      RequestError: a name is unknown, missing or repeated, or a value has another type.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name not in (*required, *optional):
            raise RequestError(400, f"{shown(name)} is no parameter; give {', '.join((*required, *optional))}")
        if name == "items":
            found.setdefault(name, []).append(value)
        elif name in found:
            raise RequestError(400, f"{name} is given more than once; give it once")
        else:
            found[name] = value
    for name in required:
        if name not in found:
            raise RequestError(400, f"{name} is missing; give ?{name}=...")
    if "k" in found:
        digits = found["k"].isascii() and found["k"].removeprefix("-").isdigit() and len(found["k"]) <= 20
        found["k"] = int(found["k"]) if digits else found["k"]  # what is no integer is refused with its bounds
    if "include_seen" in found:
        found["include_seen"] = {"true": True, "false": False}.get(found["include_seen"], found["include_seen"])
    return found


def parse_body(body: bytes) -> dict[str, Any]:
    """Reads the JSON object of a body.

    Args:
      body: the bytes.

    Returns:
      Its fields.

    Raises:
      RequestError: it is not UTF-8, not JSON (NaN and Infinity are not), nested too deeply, or no object.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body cannot be read as JSON; send an object: {EXAMPLE}") from error
    if not isinstance(found, dict):
        raise RequestError(400, f"the body is {shown(found)}; it must be an object: {EXAMPLE}")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def recommend_request(values: Mapping[str, Any], limits: Limits) -> RecommendRequest:
    """Checks the fields of a request for recommendations.

    Args:
      values: fields by name; null counts as left out.
      limits: bounds.

    Returns:
      The request.

    Raises:
      RequestError: a field is unknown, or a value has another type or is out of bounds.
    """
    for name in values:
        if name not in FIELDS:
            raise RequestError(400, f"{shown(name)} is no field; give {', '.join(FIELDS)}")
    given = {name: value for name, value in values.items() if value is not None}
    if "users" not in given:
        raise RequestError(400, f'users is missing; give a list of 1 to {limits.max_users} ids: "users": ["ID"]')
    users = _ids("users", given["users"])
    if not 1 <= len(users) <= limits.max_users:
        raise RequestError(400, f"users has {len(users):,} ids; it must have 1 to {limits.max_users:,}: ask in parts")
    where = given.get("where")
    if where is not None and not isinstance(where, str):
        raise RequestError(400, f"where is {shown(where)}; it must be text, such as \"type == 'fund'\"")
    if where is not None and len(where) > MAX_WHERE:
        raise RequestError(400, f"where has {len(where):,} characters; it must have {MAX_WHERE:,} at most")
    include_seen = given.get("include_seen", False)
    if not isinstance(include_seen, bool):
        raise RequestError(400, f"include_seen is {shown(include_seen)}; it must be true or false")
    items = _ids("items", given["items"]) if "items" in given else None
    return RecommendRequest(users, check_k(given.get("k", 10), limits), where, items, include_seen)


def check_k(k: Any, limits: Limits) -> int:
    """Checks a number of items.

    Args:
      k: the number.
      limits: bounds.

    Returns:
      The number.

    Raises:
      RequestError: it is no integer of 1 to `limits.max_k`.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= limits.max_k:
        raise RequestError(400, f"k is {shown(k)}; it must be an integer from 1 to {limits.max_k:,}")
    return k


def check_id(name: str, given: Any) -> str:
    """Checks an id.

    Args:
      name: of the parameter.
      given: the id, as text or integer.

    Returns:
      The id as text.

    Raises:
      RequestError: it is neither text nor integer, or is too long, empty or not valid Unicode.
    """
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise RequestError(400, f"{name} has {shown(given)}; give ids as text or integers")
    text = str(given)
    if not 1 <= len(text) <= MAX_ID:
        raise RequestError(400, f"{name} has an id of {len(text):,} characters; it must have 1 to {MAX_ID:,}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RequestError(400, f"{name} has {shown(text)}, which is not valid Unicode; correct it")
    return text


def _ids(name: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list):
        raise RequestError(400, f"{name} is {shown(given)}; it must be a list of ids")
    return tuple(check_id(name, value) for value in given)


def shown(value: Any) -> str:
    """Returns a short printable form of any value."""
    return printable(reprlib.repr(value))
