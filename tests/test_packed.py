"""Texts without padding between them: the vectors of padded batches, and batches that are full."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained import TINY

from fused_rec import kernels
from fused_rec.text import encode
from fused_rec.text.encoders.bert import BertConfig
from fused_rec.text.encoders.layers import layer_norm
from fused_rec.text.encoders.packed import AddNorm, PackedDense, packed_attention
from fused_rec.text.encoders.registry import apply_encoder, apply_packed, encoder, packs
from fused_rec.text.pretrained import open_model

CONFIG = BertConfig(60, 64, 2, 2, 96, 40, 2, 1e-12, "gelu")
LENGTHS = np.array([1, 17, 5, 33, 2, 0, 16])
needs_kernel = pytest.mark.skipif(not kernels.usable(), reason="no kernel was compiled")


def params_of(config):
    sample = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    params = encoder(config).init(jax.random.key(0), *sample)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Zero biases and unit scales would hide a mistake.
    drawn = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, drawn)


@needs_kernel
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_attention_is_that_of_each_text_alone(width):
    rng, heads, ends = np.random.default_rng(0), 3, np.cumsum(LENGTHS)
    query, key, value = (rng.normal(size=(ends[-1] + 6, heads * width)).astype(np.float32) for _ in range(3))
    starts = np.concatenate([[0], ends, ends[-1:]]).astype(np.int32)  # one padded text
    found = np.asarray(packed_attention(*map(jnp.asarray, (query * 3, key, value, starts)), heads=heads))
    assert not found[ends[-1] :].any()
    for first, last in zip(starts[:-2], starts[1:-1], strict=True):
        for head in range(heads):
            q, k, v = (part[first:last, head * width : (head + 1) * width] for part in (query * 3, key, value))
            scores = q.astype(np.float64) @ k.T.astype(np.float64) / width**0.5
            weights = np.exp(scores - scores.max(1, keepdims=True, initial=-np.inf))
            expected = weights @ v / weights.sum(1, keepdims=True)
            # Scores are float32 and reach 12: rounded, they move a weight by up to some 4e-6 of itself.
            np.testing.assert_allclose(found[first:last, head * width : (head + 1) * width], expected, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rows, depth, features", [(1, 32, 64), (131, 96, 32), (300, 64, 1504), (7, 40, 48)])
def test_gelu_of_a_linear_layer_is_that_of_its_formula(monkeypatch, dtype, tiles, rows, depth, features):
    if tiles and not kernels.has_tiles():
        pytest.skip("the processor has no tile registers")
    monkeypatch.setattr(kernels, "has_tiles", lambda: tiles)
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, depth), (depth, features)))
    bias = rng.normal(size=features).astype(np.float32)
    layer = PackedDense(features, dtype, "gelu")
    found: Any = layer.apply({"params": {"kernel": kernel, "bias": bias}}, jnp.asarray(x))
    if dtype == "bfloat16":
        x, kernel = (np.asarray(jnp.asarray(part).astype(dtype), np.float64) for part in (x, kernel))
    sums = x.astype(np.float64) @ kernel + bias
    expected = sums * np.vectorize(lambda z: 0.5 * (1 + math.erf(z / 2**0.5)))(sums)
    assert found.dtype == dtype
    # Half a step of bfloat16 is up to 2^-8 of a number.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-7.99 * (dtype != "float32"), atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("rows, size", [(1, 16), (37, 48), (700, 384)])
def test_normalized_sum_is_that_of_flax(rows, size):
    rng = np.random.default_rng(0)
    x, added = (jnp.asarray(3 * rng.normal(size=(rows, size)) + 5, jnp.float32) for _ in range(2))
    params = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name in ("scale", "bias")}
    found: Any = AddNorm(0.1).apply({"params": params}, x, added)
    expected: Any = layer_norm(0.1, "norm").apply({"params": params}, x + added)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("padding_token", [None, 1])
def test_vectors_are_those_of_padded_batches(pooling, padding_token):
    config = dataclasses.replace(CONFIG, padding_token=padding_token)
    params, rng = params_of(config), np.random.default_rng(0)
    texts = [rng.integers(0, 60, length).astype(np.int32) for length in LENGTHS]
    ids, mask = np.zeros((len(texts), 34), np.int32), np.zeros((len(texts), 34), bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, True
    expected = apply_encoder(params, ids, mask, config, pooling, True)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    flat = np.concatenate([*texts, np.full(6, 7, np.int32)])
    found = apply_packed(params, flat, starts, config, pooling, True)
    np.testing.assert_allclose(found, expected, atol=3e-6)


@needs_kernel
def test_products_of_bfloat16_are_near():
    params, rng = params_of(CONFIG), np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    flat = rng.integers(0, 60, starts[-1]).astype(np.int32)
    narrow = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    one, other = (apply_packed(params, flat, starts, config, "mean", True) for config in (CONFIG, narrow))
    cosines = (np.asarray(one) * np.asarray(other)).sum(1)[LENGTHS > 0]
    assert 0 < 1 - cosines.min() < 1e-3


def test_batches_hold_each_text_once_and_are_nearly_full():
    lengths = np.random.default_rng(0).integers(0, 120, 3000).astype(np.int32)
    batches = list(encode._packed_batches(lengths, 2048))
    assert sorted(np.concatenate([texts for texts, _ in batches])) == list(range(len(lengths)))
    sizes = np.array([lengths[texts].sum() for texts, _ in batches])
    assert (sizes <= [tokens for _, tokens in batches]).all() and {tokens for _, tokens in batches[:-1]} == {2048}
    assert sizes[:-1].sum() > 0.99 * 2048 * (len(sizes) - 1)


def test_a_few_texts_are_a_small_batch():
    [(texts, tokens)] = encode._packed_batches(np.array([9, 3], np.int32), 2048)
    assert (sorted(texts), tokens) == ([0, 1], 64)
    [(texts, tokens)] = encode._packed_batches(np.array([300], np.int32), 300)
    assert tokens == 300


@needs_kernel
def test_encoded_texts_do_not_depend_on_packing(monkeypatch):
    tiny = open_model(TINY)
    config = dataclasses.replace(tiny.config, hidden_size=64, num_attention_heads=2, intermediate_size=48)
    model = dataclasses.replace(tiny, config=config, params=jax.tree.map(np.asarray, params_of(config)))
    texts = [" ".join(["rate", "fund", "of", "shares"][: 1 + place % 4] * (1 + place % 7)) for place in range(90)] + [
        ""
    ]
    found = []
    for packed in (True, False):
        monkeypatch.setattr(encode, "packs", lambda config, packed=packed: packed)
        found.append(encode.encode_texts(texts, model, cache=None, batch_tokens=128, progress=False))
    np.testing.assert_allclose(*found, atol=3e-6)


def test_what_is_packed(monkeypatch):
    """Heads of known widths, no distances between tokens, one device."""
    monkeypatch.setattr(kernels, "usable", lambda: True)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    assert packs(CONFIG)
    assert not packs(dataclasses.replace(CONFIG, distance_buckets=32))
    assert not packs(dataclasses.replace(CONFIG, num_attention_heads=4))
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert not packs(CONFIG)
