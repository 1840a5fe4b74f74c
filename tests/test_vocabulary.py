"""Identifiers use the terms of the field (docs/GLOSSARY.md). A word that was replaced once must not come back."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fused_rec", "experiments", "tests", "notebooks")
# old word: what the field says
REPLACED = {
    "books": "decomposition",
    "hear": "aggregate",
    "heard": "in_degree, aggregated",
    "hears": "adjacency",
    "holders": "item_degree",
    "ledger": "decomposition",
    "ledgers": "decomposition",
    "lexical": "tfidf",
    "lexicon": "tfidf_model",
    "mute": "baseline",
    "neighbour": "neighbor",
    "neighbours": "neighbors",
    "nobody": "none",
    "optimiser": "optimizer, opt_state",
    "optimisers": "optimizers",
    "readout": "layer_combination",
    "regularisation": "regularization",
    "saying": "with_text",
    "silent": "isolated",
    "spectrum": "ease",
    "spoken": "with_finetuned_text",
    "told": "receivers, leaks, reported",
    "tower": "branch",
    "towers": "branches",
    "voice": "source_scale",
    "voices": "source_scale",
    "wordless": "no_text",
    "worded": "text_node_types",
}


def old_words(source: str) -> list[tuple[int, str]]:
    """Returns (line, identifier) of every name in which a replaced word stands."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            parts = re.findall(r"[a-z]+", re.sub(r"(?<![A-Z])([A-Z])", r"_\1", token.string).lower())
            if set(parts) & REPLACED.keys():
                found.append((token.start[0], token.string))
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_identifiers_are_terms_of_the_field(folder):
    problems = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file != Path(__file__)
        for line, name in old_words(file.read_text(encoding="utf-8"))
    ]
    assert problems == []


@pytest.mark.parametrize(
    "source", ["heard = 1", "def told_by(x): ...", "class TwoTowers: ...", "f(neighbours=3)", "HEARS = 1"]
)
def test_a_replaced_word_is_found(source):
    assert len(old_words(source)) == 1


def test_text_and_other_words_are_free():
    assert old_words("x = 'towers'  # voice\nheardle = booking = 1") == []
