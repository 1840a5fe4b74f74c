"""Whether an encoder reads the language of the texts, by the words that its tokenizer has in one piece.

A tokenizer has most words of its own language as one piece and splits those of others. Single texts are judged, and
most of them decide: names, tickers and tags are split in any language, so texts of few words are not judged.

Measured with all-MiniLM-L6-v2: every judged sentence of fourteen other languages (`tests/languages.py`) is found
foreign, and of English texts 0 % of Amazon's reviews and of company profiles, 3 % of review titles, film titles and
tweets about stocks, 9 % of company names and of abstracts as bags of words; of names of artists, which are of many
languages, 31 %. A detector of languages (py3langid) errs on fewer bags of words (1 %), and on more tweets (8 %), film
titles (17 %), company names (29 %) and artists (63 %).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import tokenizers

TEXTS, CHARACTERS = 500, 300  # read at most, of all texts and of each
MULTILINGUAL = 100_000  # larger vocabularies are of many languages, in each of which they split words
WORD_LETTERS, WORDS = 4, 3  # shorter words are whole in too many languages; texts of fewer words are not judged
SPLIT = 0.45  # a text with a larger share of split words is of another language
JUDGED = 10  # of fewer texts nothing is said
MOST = 0.5  # a larger share of foreign texts is warned of
ADVISED = "intfloat/multilingual-e5-small@614241f622f53c4eeff9890bdc4f31cfecc418b3"  # of about a hundred languages
OTHER_SCRIPTS = "\u0370"  # first letter behind Latin: words of other scripts count from one letter on
# Words without @, #, $ or digits, which are handles, tags, tickers and codes.
_WORD = re.compile(r"(?<![@#$\w])[^\W\d_]+(?!\w)")
_WITHOUT_SPACES = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # kana and Han, where a word is not seen


class Coverage(NamedTuple):
    """How many of the judged texts are of another language than an encoder's.

    Attributes:
      judged: number of texts with enough words.
      foreign: number of these with more split words than `SPLIT`.
    """

    judged: int
    foreign: int

    @property
    def share(self) -> float:
        """The share of foreign texts; 0 where too few are judged."""
        return self.foreign / self.judged if self.judged >= JUDGED else 0.0


def measure_coverage(texts: Sequence[str], tokenizer: tokenizers.Tokenizer) -> Coverage:
    """Counts the texts of other languages than the tokenizer's, in an even sample of `TEXTS`.

    Args:
      texts: all texts.
      tokenizer: of the encoder.

    Returns:
      The counts; none are judged where the vocabulary is multilingual.
    """
    judged = [found for found in _judged(texts[:: -(-len(texts) // TEXTS) or 1], tokenizer) if found is not None]
    return Coverage(len(judged), sum(judged))


def foreign_texts(texts: Sequence[str], tokenizer: tokenizers.Tokenizer) -> list[bool]:
    """Judges which texts are of another language than the tokenizer's.

    Args:
      texts: the texts.
      tokenizer: of the encoder.

    Returns:
      Of each text, whether it is foreign; False where it is too short to be judged, or the vocabulary is multilingual.
    """
    return [bool(found) for found in _judged(texts, tokenizer)]


def _judged(texts: Sequence[str], tokenizer: tokenizers.Tokenizer) -> list[bool | None]:
    """Whether each text is foreign; None where it is not judged."""
    if tokenizer.get_vocab_size() > MULTILINGUAL:
        return [None] * len(texts)
    found: list[bool | None] = []
    of_texts = [_words(text) for text in texts]
    words = sorted({word for of_text in of_texts for word in of_text})
    split = dict(zip(words, _are_split(words, tokenizer), strict=True))
    for of_text in of_texts:
        weights = [_weight(word) for word in of_text]
        total = sum(weights)
        gone = sum(w for w, word in zip(weights, of_text, strict=True) if split[word])
        found.append(gone > SPLIT * total if total >= WORDS else None)
    return found


def foreign_text_warning(model: str, found: Coverage) -> str | None:
    """Returns a warning where most texts are of another language than the encoder's.

    Args:
      model: text.model.
      found: counts of its tokenizer.
    """
    if found.share <= MOST:
        return None
    return (
        f"{found.share:.0%} of the texts are of another language than text.model {model!r} reads (its tokenizer splits "
        f"their words), and at most {MOST:.0%} should be: their vectors say little. Train in a new workdir with a "
        f"multilingual model: --config.text.model={ADVISED} --config.text.offline=False (docs/ENCODERS.md)"
    )


def _words(text: str) -> list[str]:
    """Finds the words that are judged: neither short, nor in capitals as tickers are."""
    return [
        word
        for word in _WORD.findall(text[:CHARACTERS])
        if word[0] >= OTHER_SCRIPTS or len(word) >= WORD_LETTERS and not word.isupper()
    ]


def _weight(word: str) -> float:
    """Returns the number of words that a run of letters counts for."""
    return max(1.0, len(word) / WORD_LETTERS) if _WITHOUT_SPACES.match(word) else 1.0


def _are_split(words: Sequence[str], tokenizer: tokenizers.Tokenizer) -> list[bool]:
    """Whether the tokenizer splits each word, or does not know it; a run of Han or kana may have a piece a letter."""
    unknown = {tokenizer.token_to_id(name) for name in ("[UNK]", "<unk>")} - {None}
    # With the space before it: some tokenizers have other pieces at the start of a text.
    encoded = tokenizer.encode_batch([f" {word}" for word in words], add_special_tokens=False)
    return [
        bool(unknown & set(pieces.ids)) or len(pieces.ids) > (len(word) if _WITHOUT_SPACES.match(word) else 1)
        for word, pieces in zip(words, encoded, strict=True)
    ]
