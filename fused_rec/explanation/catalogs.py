"""Sentences of explanations in English, and in other languages by message catalogs (gettext).

`MESSAGES` has the English sentences. `locale/` has a catalog per language: `.po` to edit, `.mo` as gettext reads it
(`make catalogs` compiles them). A path to another `.mo` brings other sentences or another language.
"""

import dataclasses
import functools
import gettext
import os
import string
import struct
from pathlib import Path

LOCALE = Path(__file__).with_name("locale")
SOURCE = "en"
LANGUAGES = (SOURCE, *sorted(file.stem for file in LOCALE.glob("*.mo")))
COUNTS = (*range(1, 30), 100, 1_000, 1_000_000)  # which choose among the plurals of any language

# By name one sentence, or singular and plural. `n` is a number, written as the language writes it.
MESSAGES = {
    "thousands separator": (",",),
    "percent": ("{n}%",),
    "list": ("{first}, {last}",),
    "end of list": ("{first} and {last}",),
    "more": ("{n} more", "{n} more"),
    "share": ("{sentence} ({percent} of what speaks for it).",),
    "interaction": ("The customer holds {items}",),
    "own_text": ("It fits what the customer says and is described as",),
    "own_id": ("It fits what the customer has chosen so far as a whole",),
    "popularity": ("How many customers hold it",),
    "launch": ("It is new, and customers are expected to take it",),
    "similar_text": ("Customers who say much the same lean towards it",),
    "tie": (
        "{n} customer tied to this one ({tie}) leans towards it",
        "{n} customers tied to this one ({tie}) lean towards it",
    ),
    "nothing": ("Nothing known of the customer speaks for it; it is ranked by what speaks least against it.",),
    "review": ("what you wrote about {item}",),
    "similar customers": ("{n} customer with much the same text", "{n} customers with much the same text"),
    "tied customers": ("{n} customer tied to you ({tie})", "{n} customers tied to you ({tie})"),
    "leaves": (
        "You see this because of {sources}; without that it would be {item}.",
        "You see this because of {sources}; without them it would be {item}.",
    ),
    "leaves for nothing": (
        "You see this because of {sources}; without that it would not be listed.",
        "You see this because of {sources}; without them it would not be listed.",
    ),
    "enters": ("Without {sources} you would see this in place of {item}.",),
}


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The sentences of a language.

    Attributes:
      language: its code, as of HTML's `lang`.
      translations: of the English sentences.
    """

    language: str = SOURCE
    translations: gettext.NullTranslations = dataclasses.field(default_factory=gettext.NullTranslations)

    def say(self, message: str, n: int = 1, **fields: str) -> str:
        """Returns a sentence.

        Args:
          message: its name in `MESSAGES`.
          n: the number that chooses singular or plural, and the field `n`.
          **fields: the other fields.
        """
        return self._text(message, n).format(n=self.number(n), **fields)

    def number(self, n: int) -> str:
        """Writes a number with the language's separator of thousands."""
        return f"{n:,}".replace(",", self._text("thousands separator"))

    def joined(self, parts: list[str]) -> str:
        """Joins at least one part: "A", "A and B", "A, B and C"."""
        *head, last = parts
        if not head:
            return last
        first = functools.reduce(lambda first, last: self.say("list", first=first, last=last), head)
        return self.say("end of list", first=first, last=last)

    def _text(self, message: str, n: int = 1) -> str:
        one, *many = MESSAGES[message]
        return self.translations.ngettext(one, many[0], n) if many else self.translations.gettext(one)

    def faults(self) -> list[str]:
        """Lists what translations have between braces that their sentence does not have, or lack of it."""
        found = []
        for message, texts in MESSAGES.items():
            allowed, needed = _fields(texts[-1]), _fields(texts[-1]) - ({"n"} if len(texts) == 2 else set())
            for text in sorted({self._text(message, n) for n in COUNTS[: None if len(texts) == 2 else 1]}):
                try:
                    if needed <= _fields(text) <= allowed:
                        continue
                except ValueError:  # a single brace
                    pass
                found.append(f"{text!r}, of {texts[-1]!r}, must have the fields {sorted(allowed)}")
        return found


def _fields(text: str) -> set[str]:
    """The fields of a sentence; one with an attribute, index, format or conversion is not the name of any."""
    parts = string.Formatter().parse(text)
    return {f"{name}{':' * bool(form)}{turned or ''}" for _, name, form, turned in parts if name is not None}


ENGLISH = Catalog()


@functools.cache
def open_catalog(language: str | os.PathLike[str]) -> Catalog:
    """Opens the sentences of a language.

    Args:
      language: one of `LANGUAGES`, or the path of a compiled catalog (.mo). What that does not translate is said in the
        installed language of its header, or in English.

    Returns:
      The catalog.

    Raises:
      ValueError: the language is not installed, or the file is no catalog of these sentences.
    """
    name = os.fspath(language)
    if name == SOURCE:
        return ENGLISH
    own = name.endswith(".mo")
    if not own and name not in LANGUAGES:
        others = ", ".join(LANGUAGES)
        raise ValueError(f"language is {name!r}; it must be one of {others}, or the path of a compiled catalog (.mo)")
    remedy = "correct the .po (docs/EXPLANATIONS.md) and compile it: msgfmt -o FILE.mo FILE.po"
    try:
        with (Path(name) if own else LOCALE / f"{name}.mo").open("rb") as file:
            translations = gettext.GNUTranslations(file)
    except FileNotFoundError as error:
        raise ValueError(f"language is {name!r}, and there is no such file; give a compiled catalog (.mo)") from error
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise ValueError(f"language is {name!r}, which is no compiled catalog ({error}); {remedy}") from error
    code = translations.info().get("language") or SOURCE
    if own and code in LANGUAGES:
        translations.add_fallback(open_catalog(code).translations)
    catalog = Catalog(code, translations)
    if faults := catalog.faults():
        raise ValueError(f"language is {name!r}, with {len(faults)} faults, first: {faults[0]}; {remedy}")
    return catalog
