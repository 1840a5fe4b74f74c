"""Texts of other languages than the encoder's are found by their tokens, and names and tickers are not taken for them.

Rates are those of `fused_rec/text/coverage.py`, on sentences of `languages.py` and, where FUSED_REC_DATA is set, on
English texts of every kind that the readers give.
"""

import gzip
import importlib.util
import json
import logging
import os
import time
from pathlib import Path

import pytest
import tokenizers
from languages import SENTENCES, SHORT_ENGLISH
from market import write_tables
from tokenizers import models, normalizers, pre_tokenizers

import fused_rec as fr
from fused_rec.text.coverage import (
    ADVISED,
    JUDGED,
    MULTILINGUAL,
    Coverage,
    foreign_text_warning,
    foreign_texts,
    measure_coverage,
)
from fused_rec.text.pretrained import HUB_ID, MINILM, MINILM_PACKAGE

needs_minilm = pytest.mark.skipif(importlib.util.find_spec(MINILM_PACKAGE) is None, reason="MiniLM is not installed")
DATA = os.environ.get("FUSED_REC_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="FUSED_REC_DATA is not set")
ENGLISH = "The fund holds bonds of large companies and pays a dividend every year."


@pytest.fixture(scope="module")
def minilm() -> tokenizers.Tokenizer:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    [file] = (file for folder in spec.submodule_search_locations for file in Path(folder).rglob("tokenizer.json"))
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def wordpiece(*words: str, more: int = 0) -> tokenizers.Tokenizer:
    """A tokenizer with these words and all letters as pieces."""
    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    vocabulary = ["[UNK]", *letters, *words, *(f"w{number}" for number in range(more))]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


def test_texts_are_judged_by_their_words():
    tokenizer = wordpiece("this", "fund", "holds", "bonds")
    assert measure_coverage(["This fund holds bonds"], tokenizer) == Coverage(1, 0)
    assert measure_coverage(["Dieser Fonds kauft Anleihen"], tokenizer) == Coverage(1, 1)
    assert measure_coverage(["this fund bought shares", "this fund holds shares"], tokenizer) == Coverage(2, 1)
    # Too few words, tickers, handles, tags, codes and short words are no evidence.
    few = [
        "",
        "kauft Anleihen",
        "AAPL GOOGL MSFT AMZN",
        "@hans $tesla #boerse",
        "abcd1 ef2gh 3ijkl4",
        "an der zu im um",
    ]
    assert measure_coverage(few, tokenizer) == Coverage(0, 0)
    assert measure_coverage([], tokenizer) == Coverage(0, 0)
    texts = ["Dieser Fonds kauft Anleihen", "This fund holds bonds", "Anleihen"]
    assert foreign_texts(texts, wordpiece("this", "fund", "holds", "bonds")) == [True, False, False]


def test_a_run_of_han_may_have_a_piece_a_letter():
    sentence = "基金投资于大型公司的股票"
    assert measure_coverage([sentence], wordpiece(*sentence, *(f"##{letter}" for letter in sentence))) == Coverage(1, 0)
    assert measure_coverage([sentence], wordpiece(*sentence[:-1])) == Coverage(1, 1)


def test_a_multilingual_vocabulary_is_not_judged():
    texts = ["Dieser Fonds kauft Anleihen"] * 20
    assert measure_coverage(texts, wordpiece()) == Coverage(20, 20)
    assert measure_coverage(texts, wordpiece(more=MULTILINGUAL)) == Coverage(0, 0)


def test_the_warning_names_share_encoder_and_remedy():
    assert foreign_text_warning(MINILM, Coverage(100, 50)) is None
    assert foreign_text_warning(MINILM, Coverage(JUDGED - 1, JUDGED - 1)) is None
    said = foreign_text_warning(MINILM, Coverage(100, 83))
    assert said is not None and said.startswith("83% of the texts are of another language than text.model 'all-MiniLM")
    assert f"--config.text.model={ADVISED} --config.text.offline=False" in said
    found = HUB_ID.fullmatch(ADVISED)
    assert found is not None and len(found["revision"]) == 40


@needs_minilm
def test_sentences_of_other_languages_are_foreign(minilm):
    for language, sentences in SENTENCES.items():
        found = measure_coverage(sentences, minilm)
        assert found.foreign == found.judged >= 5, (language, found)


@needs_minilm
def test_short_english_texts_are_not_foreign(minilm):
    found = measure_coverage(SHORT_ENGLISH, minilm)
    assert found.foreign <= 1 and found.share == 0, found
    assert measure_coverage([ENGLISH], minilm) == Coverage(1, 0)


@needs_minilm
def test_most_decides(minilm):
    foreign = [sentence for sentences in SENTENCES.values() for sentence in sentences]
    texts = foreign + [ENGLISH] * 2 * len(foreign)
    assert 0.3 < measure_coverage(texts, minilm).share < 0.4
    texts = foreign * 2 + [ENGLISH] * len(foreign)
    assert 0.6 < measure_coverage(texts, minilm).share < 0.7


def lines(file: str) -> list[str]:
    with gzip.open(Path(DATA) / file, "rt", encoding="utf-8") as stream:
        return stream.read().splitlines()


@needs_minilm
@needs_data
@pytest.mark.parametrize(
    ("file", "field", "most"),
    [
        ("amazon_musical_instruments/reviews_Musical_Instruments_5.json.gz", "reviewText", 0.01),
        ("amazon_musical_instruments/reviews_Musical_Instruments_5.json.gz", "summary", 0.06),
        ("stocknet/items.jsonl.gz", "summary", 0.01),
        ("stocknet/items.jsonl.gz", "name", 0.15),
        ("stocknet/tweets.jsonl.gz", "text", 0.15),  # of which 10 % are of other languages
    ],
)
def test_rates_on_english_texts(minilm, file, field, most):
    texts = [text for line in lines(file) if (text := json.loads(line).get(field))]
    found = measure_coverage(texts, minilm)
    assert found.share <= most and found.judged >= JUDGED, found


@needs_minilm
@needs_data
def test_rates_on_bags_of_words_and_names(minilm):
    vocabulary = lines("citeulike_t/vocabulary.dat.gz")
    bags = [
        " ".join(vocabulary[int(entry.split(":")[0])] for entry in line.split()[1:])
        for line in lines("citeulike_t/mult.dat.gz")
    ]
    assert measure_coverage(bags, minilm).share <= 0.15
    movies = (Path(DATA) / "ml_100k" / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]
    assert measure_coverage([" ".join(movie.split("\t")[1:]) for movie in movies], minilm).share <= 0.06


@needs_minilm
def test_many_texts_take_less_than_a_second(minilm):
    foreign = [sentence for sentences in SENTENCES.values() for sentence in sentences]
    texts = [f"{text} {number}" for number, text in enumerate(foreign * (100_000 // len(foreign)))]
    began = time.process_time()
    measure_coverage(texts, minilm)
    assert time.process_time() - began < 1


def test_a_training_warns_once(tmp_path, caplog):
    """The tiny encoder's vocabulary has few words of any language."""
    config = fr.configure(
        data={"name": "tables", "path": str(write_tables(tmp_path / "tables"))},
        text={"model": str(Path(__file__).parent / "golden" / "tiny_bert"), "cache": str(tmp_path / "cache")},
        model={"dim": 8, "num_layers": 1},
        train={"batch_size": 32, "max_steps": 2, "eval_every": 1, "refit": "all"},
    )
    with caplog.at_level(logging.WARNING):
        run = fr.train(config, tmp_path / "run")
    assert [record.getMessage() for record in caplog.records if "another language" in record.getMessage()] == [
        foreign_text_warning(config.text.model, Coverage(JUDGED, JUDGED))
    ]
    assert run.results["data"]["foreign_texts"] == 1.0
    assert "another language than" in (tmp_path / "run" / "README.md").read_text()
