"""Decoders over texts without padding between them: kernels by formula, and the vectors of padded batches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained import TINY
from test_packed import params_of

from fused_rec import kernels
from fused_rec.text import encode
from fused_rec.text.encoders import packed_decoder
from fused_rec.text.encoders.config_fields import LARGEST
from fused_rec.text.encoders.decoder import EVERYWHERE, DecoderConfig
from fused_rec.text.encoders.layers import Rope, as_bits, rms_norm
from fused_rec.text.encoders.packed import Reach, packed_attention
from fused_rec.text.encoders.registry import apply_encoder, apply_packed, packs
from fused_rec.text.pretrained import open_model

LENGTHS = np.array([1, 17, 5, 70, 33, 2, 0, 16])
ROPE = Rope(tuple(10.0 ** -(i / 5) for i in range(16)), 1.1)
LLAMA = DecoderConfig(60, 64, 3, 6, 3, 32, 96, 160, 1e-5, ROPE, (EVERYWHERE,) * 3)
# Kept apart: grouped heads, heads of keys for each query, windows, biases, norms of heads, both directions.
FAMILIES = {
    "llama": LLAMA,
    "llama with biases": dataclasses.replace(LLAMA, qkv_bias=True, output_bias=True, inner_bias=True),
    "mistral": dataclasses.replace(LLAMA, windows=(11,) * 3, num_key_value_heads=1),
    "qwen2": dataclasses.replace(LLAMA, windows=(EVERYWHERE, 7, 1), qkv_bias=True, num_key_value_heads=6),
    "qwen3": dataclasses.replace(LLAMA, head_norms=True),
    "both directions": dataclasses.replace(LLAMA, causal=False, windows=(EVERYWHERE, 9, EVERYWHERE)),
}
needs_kernel = pytest.mark.skipif(not kernels.usable(), reason="no kernel was compiled")


@pytest.fixture(params=[False, True], ids=["without tiles", "with tiles"])
def tiles(request, monkeypatch):
    """Whether tile registers multiply."""
    if request.param and not kernels.has_tiles():
        pytest.skip("the processor has no tile registers")
    monkeypatch.setattr(kernels, "has_tiles", lambda: request.param)
    compiled: Any = apply_packed
    compiled.clear_cache()  # programs are traced for one answer
    yield request.param
    compiled.clear_cache()


def rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def in_parts(x, parts):
    """The numbers as the sum of so many in bfloat16, [P, N, D]."""
    found = []
    for _ in range(parts):
        found.append(rounded(x))
        x = x - found[-1]
    return jnp.asarray(np.stack(found), jnp.bfloat16)


def attended(q, k, v, low, high, narrow):
    """Attention of one head; query i sees the keys from low[i] to before high[i]."""
    kept = rounded if narrow else np.asarray
    scores = kept(q / q.shape[1] ** 0.5) @ kept(k).T
    places = np.arange(len(k))
    scores[(places < low[:, None]) | (places >= high[:, None])] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True, initial=-1e9))
    return kept(weights) @ kept(v) / weights.sum(1, keepdims=True)


def turned(x, angles):
    """Pairs of numbers, half a head apart, as complex numbers that are rotated by these angles."""
    half = x.shape[1] // 2
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=1)


@needs_kernel
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("window", [1, 6, 40, LARGEST])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width, heads, groups", [(32, 3, 1), (64, 4, 2), (96, 2, 2), (128, 2, 1)])
def test_attention_by_formula(width, heads, groups, causal, window, narrow):
    if narrow and not kernels.has_tiles():
        pytest.skip("the processor has no tile registers")
    rng, ends = np.random.default_rng(0), np.cumsum(LENGTHS)
    count = ends[-1] + 6
    query, key, value = (
        rng.normal(size=(count, n * width)).astype(np.float32).astype(np.float64) for n in (heads, groups, groups)
    )
    query = 3 * query
    angles = rng.uniform(0, 6, (count, width // 2))
    turns = jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), jnp.float32)
    starts = np.concatenate([[0], ends, ends[-1:]]).astype(np.int32)  # one padded text
    reach = Reach(jnp.int32(window), turns, causal, narrow)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    found = np.asarray(packed_attention(q, k, v, jnp.asarray(starts), heads, reach))
    assert not found[ends[-1] :].any()
    for first, last in zip(starts[:-2], starts[1:-1], strict=True):
        places = np.arange(last - first)
        low = np.maximum(places - window + 1, 0)
        high = places + 1 if causal else np.minimum(places + window, last - first)
        for head in range(heads):
            group = head // (heads // groups)
            q = turned(query[first:last, head * width : (head + 1) * width], angles[first:last])
            k = turned(key[first:last, group * width : (group + 1) * width], angles[first:last])
            v = value[first:last, group * width : (group + 1) * width]
            expected = attended(q, k, v, low, high, narrow)
            # A weight next to the middle of two numbers of bfloat16 may be rounded to either.
            np.testing.assert_allclose(
                found[first:last, head * width : (head + 1) * width], expected, atol=0.03 if narrow else 2e-5
            )


@needs_kernel
@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("rows, size", [(1, 16), (37, 48), (700, 64)])
@pytest.mark.parametrize("adds", [False, True])
def test_normalized_sum_is_that_of_flax(rows, size, parts, adds):
    rng = np.random.default_rng(0)
    x, added = (jnp.asarray(3 * rng.normal(size=(rows, size)), jnp.float32) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=size), jnp.float32)
    shape = jax.ShapeDtypeStruct((parts, rows, size), jnp.bfloat16) if parts else jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, y = packed_decoder._normalized(jnp.array(x), added if adds else jnp.zeros(0), scale, 0.1, shape)
    wanted = x + added if adds else x
    expected: Any = rms_norm(0.1, "norm").apply({"params": {"scale": scale}}, wanted)
    np.testing.assert_array_equal(total, wanted)
    whole = np.asarray(y, np.float64).sum(0) if parts else np.asarray(y)
    np.testing.assert_allclose(whole, expected, rtol=2**-8 if parts == 1 else 1e-6, atol=1e-6)


def weights_of(rng, dtype, depth, features):
    """Kernel and bias of three layers, of which the second is used."""
    kernel = rng.normal(size=(3, depth, features)).astype(np.float32)
    bias = rng.normal(size=(3, features)).astype(np.float32)
    if dtype == "bits":
        return as_bits({"kernel": np.asarray(jnp.asarray(kernel, jnp.bfloat16)), "bias": bias})
    if dtype == "two parts":
        return {"kernel": rounded(kernel).astype(np.float32) * np.float32(1 + 2**-7), "bias": bias}
    return {"kernel": kernel.astype(dtype), "bias": bias}


def kernel_of(weights):
    kernel = weights["kernel"][1]
    return np.asarray(kernel.view(jnp.bfloat16) if kernel.dtype == np.uint16 else kernel, np.float64)


@needs_kernel
@pytest.mark.parametrize("stored", ["float32", "two parts", "bfloat16", "bits", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_layers_by_formula(stored, dtype, biased, tiles):
    config = dataclasses.replace(LLAMA, compute_dtype=dtype)
    rng = np.random.default_rng(0)
    gate, up = (weights_of(rng, stored, 64, 96) for _ in range(2))
    if not biased:
        del gate["bias"], up["bias"]
    x = rng.normal(size=(2080, 64)).astype(np.float32)
    given = in_parts(x.astype(np.float64), packed_decoder._parts(config)) if tiles else jnp.asarray(x, dtype)
    found = np.asarray(packed_decoder._dense(given, up, jnp.int32(1), config), np.float64)
    y = packed_decoder._gated(given, {"gate": gate, "up": up}, jnp.int32(1), config)
    both = np.asarray(y, np.float64).sum(0) if tiles else np.asarray(y, np.float64)
    kept = rounded if dtype == "bfloat16" else np.asarray
    sums = [
        kept(x).astype(np.float64) @ kept(kernel_of(of)) + (np.asarray(of["bias"][1]) if biased else 0)
        for of in (gate, up)
    ]
    np.testing.assert_allclose(found, sums[1], atol=2e-5)
    expected = sums[0] / (1 + np.exp(-sums[0])) * sums[1]
    np.testing.assert_allclose(both, expected, rtol=2**-8 if dtype == "bfloat16" else 3e-6, atol=1e-4)


def packed_and_padded(config, params, pooling):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab_size, length).astype(np.int32) for length in LENGTHS]
    ids, mask = np.zeros((len(texts), 71), np.int32), np.zeros((len(texts), 71), bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, True
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    flat = np.concatenate([*texts, np.full(7, 7, np.int32)])
    padded = apply_encoder(params, ids, mask, config, pooling, True)
    return np.asarray(apply_packed(params, flat, starts, config, pooling, True)), np.asarray(padded)


@needs_kernel
@pytest.mark.parametrize(
    "name, pooling", [*((name, "lasttoken") for name in FAMILIES), ("llama", "mean"), ("qwen2", "cls")]
)
def test_vectors_are_those_of_padded_batches(name, pooling, tiles):
    found, expected = packed_and_padded(FAMILIES[name], params_of(FAMILIES[name]), pooling)
    assert not found[LENGTHS == 0].any()
    np.testing.assert_allclose(found, expected, atol=5e-6)


@needs_kernel
@pytest.mark.parametrize("name", ["llama", "mistral", "both directions"])
def test_vectors_in_bfloat16_are_near_those_of_padded_batches(name, tiles):
    config = dataclasses.replace(FAMILIES[name], compute_dtype="bfloat16")
    found, expected = packed_and_padded(config, params_of(config), "mean")
    exact, _ = packed_and_padded(FAMILIES[name], params_of(config), "mean")  # in float32
    there = LENGTHS > 0
    ours, theirs = (1 - (x * exact).sum(1)[there] for x in (found, expected))
    assert 0 < ours.max() < 2 * theirs.max() + 1e-5


@needs_kernel
def test_weights_in_half_precision_are_read_as_they_are(tiles):
    params = params_of(LLAMA)
    narrow = jax.tree_util.tree_map(lambda x: np.asarray(x.astype(jnp.bfloat16)), params)
    for stored in (as_bits(narrow), jax.tree_util.tree_map(lambda x: np.asarray(x, np.float16), params)):
        found, expected = packed_and_padded(LLAMA, stored, "lasttoken")
        np.testing.assert_allclose(found, expected, atol=5e-6)


@needs_kernel
def test_other_multiples_of_16_are_multiplied_by_xla():
    config = dataclasses.replace(LLAMA, hidden_size=48, intermediate_size=80)
    assert packed_decoder._parts(config) == 0
    found, expected = packed_and_padded(config, params_of(config), "lasttoken")
    np.testing.assert_allclose(found, expected, atol=5e-6)


@needs_kernel
def test_encoded_texts_do_not_depend_on_packing(monkeypatch, tiles):
    config = dataclasses.replace(LLAMA, vocab_size=open_model(TINY).config.vocab_size)
    params = jax.tree.map(np.asarray, params_of(config))
    model = dataclasses.replace(open_model(TINY), config=config, params=params, pooling="lasttoken")
    texts = [" ".join(["rate", "fund", "of", "shares"][: 1 + place % 4] * (1 + place % 7)) for place in range(90)]
    found = []
    for packed in (True, False):
        monkeypatch.setattr(encode, "packs", lambda config, packed=packed: packed)
        found.append(encode.encode_texts([*texts, ""], model, cache=None, batch_tokens=130, progress=False))
    np.testing.assert_allclose(*found, atol=5e-6)


def test_what_is_packed(monkeypatch):
    """Heads of known widths, sizes that are multiples of 16, one device."""
    monkeypatch.setattr(kernels, "usable", lambda: True)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    assert all(packs(config) for config in FAMILIES.values())
    assert not packs(dataclasses.replace(LLAMA, head_dim=48))
    assert not packs(dataclasses.replace(LLAMA, hidden_size=72))
    assert not packs(dataclasses.replace(LLAMA, intermediate_size=72))
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert not packs(LLAMA)
