"""Random streams have one name a purpose, and nothing draws beside them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from fused_rec.rng import Stream, numbered_rng, numpy_rng

PACKAGE = Path(__file__).parents[1] / "fused_rec"
COINCIDE = {"SHUFFLED_TEXTS": Stream.NEIGHBORS}  # drawn at different steps, or once


def test_streams_are_apart():
    """Two names of one value are one member, so that a new purpose cannot take another's number unseen."""
    aliases = {name: stream for name, stream in Stream.__members__.items() if name != stream.name}
    assert aliases == COINCIDE
    firsts = [numpy_rng(0, 0, stream).random() for stream in Stream]
    assert len(set(firsts)) == len(Stream)


def test_values_are_those_of_published_runs():
    expected = {"BATCH_ORDER": 0, "BATCH_SAMPLES": 1, "NEIGHBORS": 2, "SHUFFLED_TEXTS": 2, "RANDOM_TEXTS": 3}
    expected |= {
        "REWIRED_TIES": 4,
        "FINETUNE_TEXTS": 5,
        "FUSION_USERS": 6,
        "TERM_SIGNS": 7,
        "EDGE_DROPOUT": 1000,
        "EMBEDDING_NOISE": 1001,
    }
    assert {name: int(stream) for name, stream in Stream.__members__.items()} == expected
    assert numpy_rng(7, 3, Stream.NEIGHBORS).random() == np.random.default_rng((7, 3, 2)).random()
    assert numbered_rng(7, 3).random() == np.random.default_rng([7, 3]).random()
    key = jax.random.key(7)
    found, expected_key = (jax.random.fold_in(key, stream) for stream in (Stream.EDGE_DROPOUT, 1000))
    assert (jax.random.key_data(found) == jax.random.key_data(expected_key)).all()


def unnamed(source: str) -> Iterator[str]:
    """Draws whose stream is a number or a constant of the file itself instead of a `Stream`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name, given = ast.unparse(node.func).rpartition(".")[2], node.args[-1]
        composed = name == "default_rng" and not isinstance(given, ast.Name | ast.Attribute)
        fixed = name == "fold_in" and ast.unparse(given) == ast.unparse(given).upper()
        if composed or fixed:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def test_everything_draws_by_name():
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "rng.py"]
    found = [f"{file.relative_to(PACKAGE)}: {call}" for file in files for call in unnamed(file.read_text("utf-8"))]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("np.random.default_rng((seed, step, 2))", 1),
        ("np.random.default_rng([seed, n])", 1),
        ("np.random.default_rng(0)", 1),
        ("np.random.default_rng(seed)", 0),
        ("np.random.default_rng(SEED.value)", 0),
        ("jax.random.fold_in(key, 1000)", 1),
        ("fold_in(key, NOISE)", 1),
        ("fold_in(key, Stream.NOISE)", 0),
        ("jax.random.fold_in(key, level)", 0),
    ],
)
def test_what_counts_as_unnamed(source, count):
    assert len(list(unnamed(source))) == count
