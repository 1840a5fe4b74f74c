"""Message catalogs: compiled as committed, complete, right in plurals and numbers, refused where they are damaged."""

import io
import re

import numpy as np
import pytest
from babel.messages.mofile import read_mo, write_mo
from babel.messages.pofile import read_po
from test_decomposition import MARKET, data_split

from fused_rec.explanation.catalogs import LANGUAGES, LOCALE, MESSAGES, open_catalog
from fused_rec.explanation.counterfactual import CounterfactualSet
from fused_rec.explanation.decomposition import INTERACTION, LAUNCH, POPULARITY
from fused_rec.explanation.reasons import reasons, set_sentence
from fused_rec.explanation.sources import Source

TRANSLATED = LANGUAGES[1:]


def po(language: str) -> str:
    return (LOCALE / f"{language}.po").read_text(encoding="utf-8")


def compiled(text: str) -> bytes:
    out = io.BytesIO()
    write_mo(out, read_po(io.StringIO(text)))
    return out.getvalue()


def entries(mo: bytes) -> dict:
    """Its translations; the header has the time of the compilation."""
    return {str(message.id): message.string for message in read_mo(io.BytesIO(mo)) if message.id}


def test_the_languages():
    assert LANGUAGES == ("en", "de", "fr")
    assert sorted(file.stem for file in LOCALE.glob("*.po")) == [*TRANSLATED]


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_catalog_is_compiled_and_complete(language):
    stored = (LOCALE / f"{language}.mo").read_bytes()
    assert entries(stored) == entries(compiled(po(language))), "run: make catalogs"
    catalog = read_po(io.StringIO(po(language)))
    found = {(message.id,) if isinstance(message.id, str) else tuple(message.id) for message in catalog if message.id}
    assert found == set(MESSAGES.values())
    assert all(message.string and not message.fuzzy for message in catalog)
    assert all(all(message.string or ()) for message in catalog if message.pluralizable)
    assert open_catalog(language).faults() == [] and open_catalog(language).language == language


CASES = {
    "en": (
        "The customer holds Bond fund, Cash and 1 more (50% of what speaks for it).",
        "1,234 customers tied to this one (x) lean towards it",
        "You see this because of Cash, i1 and 2 customers tied to you (x); without them it would be Gold.",
        "You see this because of Cash; without that it would be Gold.",
        "Without Cash you would see this in place of Gold.",
    ),
    "de": (
        "Im Bestand: Bond fund, Cash und 1 weiteres (50\u00a0% dessen, was dafür spricht).",
        "1.234 verbundene Personen (x) neigen dazu",
        "Sie sehen dies aufgrund von Cash, i1 und 2 Personen, mit denen Sie verbunden sind (x); ohne diese wäre es "
        "Gold.",
        "Sie sehen dies aufgrund von Cash; ohne dies wäre es Gold.",
        "Ohne Cash sähen Sie dies anstelle von Gold.",
    ),
    "fr": (
        "Le client détient Bond fund, Cash et 1 autre (50\u00a0% de ce qui parle en sa faveur).",
        "1\u202f234 clients liés à celui-ci (x) s’y intéressent",
        "Vous voyez ceci en raison des éléments suivants\u00a0: Cash, i1 et 2 clients liés à vous (x)\u202f; sans eux, "
        "ce serait Gold.",
        "Vous voyez ceci en raison de l’élément suivant\u00a0: Cash\u202f; sans lui, ce serait Gold.",
        "Sans Cash, vous verriez ceci à la place de Gold.",
    ),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences(language):
    catalog, (holds, tied, leaves, alone, enters) = open_catalog(language), CASES[language]
    split = data_split(
        *(
            (INTERACTION, 0, 0.15),
            (INTERACTION, 1, 0.1),
            (INTERACTION, 2, 0.25),
            ("tie:x", 1, 0.2),
            (POPULARITY, -1, 0.3),
        )
    )
    found = reasons(MARKET, split, split.value, 0, catalog)
    assert found[0].text == holds
    assert [reason.code for reason in found] == ["INTERACTIONS", "POPULAR", "TIES"]
    assert catalog.say("tie", 1234, tie="x") == tied
    cash, second, *ties = (
        Source(INTERACTION, 0, ()),
        Source(INTERACTION, 1, ()),
        *(Source("tie:x", n, ()) for n in (1, 2)),
    )
    whole = CounterfactualSet((cash, second, *ties), True, 1, 2, 3, 0)
    assert set_sentence(MARKET, whole, catalog) == leaves
    assert set_sentence(MARKET, whole._replace(sources=(cash,)), catalog) == alone
    assert set_sentence(MARKET, CounterfactualSet((cash,), True, 5, 1, 0, 3), catalog) == enters


@pytest.mark.parametrize("language", LANGUAGES)
def test_codes_are_those_of_every_language(language):
    kinds = [INTERACTION, "own_text", "own_id", "similar_text", POPULARITY, LAUNCH, "tie:x"]
    split = data_split(*((kind, 0 if kind in (INTERACTION, "tie:x", "similar_text") else -1, 0.1) for kind in kinds))
    found = reasons(MARKET, split, np.full((7, 1), np.nan), 0, open_catalog(language))
    codes = ["INTERACTIONS", "OWN_TEXT", "USER_EMBEDDING", "SIMILAR_USERS", "POPULAR", "NEW", "TIES"]
    assert [reason.code for reason in found] == codes and len({reason.text for reason in found}) == 7
    against = data_split((INTERACTION, 0, -0.1))
    [reason] = reasons(MARKET, against, against.value, 0, open_catalog(language))
    assert reason.code == "NO_POSITIVE_CONTRIBUTION" and reason.text


def test_names_of_products_are_only_names():
    """Braces in them are no fields."""
    catalog = open_catalog("de")
    assert catalog.say("interaction", items="{n} {0.__class__} %s") == "Im Bestand: {n} {0.__class__} %s"


def test_a_catalog_of_ones_own(tmp_path):
    """It may translate a part: the rest is said in the installed language of its header, or in English."""
    header = 'msgid ""\nmsgstr ""\n"Language: {}\\n"\n"Content-Type: text/plain; charset=UTF-8\\n"\n\n'
    own = 'msgid "The customer holds {items}"\nmsgstr "Sie haben {items}"\n'
    for language, popular in (
        ("de", "Es ist bei Kundinnen und Kunden verbreitet"),
        ("it", "How many customers hold it"),
    ):
        (tmp_path / f"{language}.mo").write_bytes(compiled(header.format(language) + own))
        catalog = open_catalog(tmp_path / f"{language}.mo")
        assert catalog.say("interaction", items="A") == "Sie haben A" and catalog.language == language
        assert catalog.say("popularity") == popular


def test_what_is_no_language_is_refused(tmp_path):
    with pytest.raises(ValueError, match="language is 'es'; it must be one of en, de, fr, or the path of a compiled"):
        open_catalog("es")
    with pytest.raises(ValueError, match="language is '../de'; it must be one of"):
        open_catalog("../de")
    with pytest.raises(ValueError, match="no such file; give a compiled catalog"):
        open_catalog(tmp_path / "none.mo")
    whole = (LOCALE / "de.mo").read_bytes()
    for number, damaged in enumerate((b"", b"msgid", po("de").encode(), whole[:40], whole[: len(whole) // 2])):
        (tmp_path / f"{number}.mo").write_bytes(damaged)
        with pytest.raises(ValueError, match="is no compiled catalog .*compile it: msgfmt"):
            open_catalog(tmp_path / f"{number}.mo")


@pytest.mark.parametrize("text", ["{item}", "{items.__class__}", "{items!r}", "{items:>9}", "{}", "A", "{items"])
def test_a_translation_with_other_fields_is_refused(tmp_path, text):
    changed = po("de").replace("Im Bestand: {items}", text)
    (tmp_path / "own.mo").write_bytes(compiled(changed))
    with pytest.raises(
        ValueError, match=f"1 faults, first: {re.escape(repr(text))}, of 'The customer holds {{items}}'"
    ):
        open_catalog(tmp_path / "own.mo")
