"""Sampling held against the float64 loops of Quire's conformance suite."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from quire_jax import sampling
from quire_jax.random_numbers import uniform

from quire.conformance.oracles import logits as oracle
from quire.core.worker import random_numbers as engine_numbers

SLACK = 4e-6
"""What float32 probabilities and their sums may be off by."""
ROWS, VOCAB = 32, 300


@pytest.fixture
def logits() -> np.ndarray:
    """float32 [ROWS, VOCAB], with ties."""
    numbers = np.random.default_rng(5).standard_normal((ROWS, VOCAB)) * 3
    numbers[:, 100] = numbers[:, 200]
    return numbers.astype(np.float32)


@pytest.mark.parametrize("limit", ["none", "top_k", "top_p", "min_p", "all", "greedy"])
def test_sample_takes_an_admissible_token(logits, limit):
    """The inverse of the cumulative distribution, in the order of ids, after the filters."""
    rng = np.random.default_rng(7)
    has = {name: limit in (name, "all") for name in ("top_k", "top_p", "min_p")}
    settings = {
        "temperature": rng.uniform(0.4, 2.0, ROWS) * (limit != "greedy"),
        "top_k": rng.integers(1, 40, ROWS) if has["top_k"] else np.full(ROWS, VOCAB),
        "top_p": rng.uniform(0.1, 0.99, ROWS) if has["top_p"] else np.ones(ROWS),
        "min_p": rng.uniform(0.01, 0.4, ROWS) if has["min_p"] else np.zeros(ROWS),
        "uniform": uniform(list(range(ROWS)), [3] * ROWS),
    }
    device = {
        name: jnp.asarray(column, jnp.int32 if name == "top_k" else jnp.float32)
        for name, column in settings.items()
    }
    tokens = sampling.sample(jnp.asarray(logits), device, has_filter=any(has.values()))
    for row, token in enumerate(np.asarray(tokens)):
        one = {name: float(np.asarray(device[name])[row]) for name in settings if name != "top_k"}
        asked = oracle.RowSettings(top_k=int(settings["top_k"][row]), **one)
        assert int(token) in oracle.admissible(logits[row].astype(np.float64), asked, SLACK), asked


def test_logprobs_and_ranks_equal_the_oracle(logits):
    """Ties share the better rank and are listed by lowest id."""
    tokens = np.arange(ROWS) * 7 % VOCAB
    tokens[0] = 200
    got = sampling.logprobs(jnp.asarray(logits), jnp.asarray(tokens), num_top=8)
    expected = oracle.logprobs(logits.astype(np.float64), tokens, 8)
    for name, mine, theirs in zip(("chosen", "rank", "ids", "best"), got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine), theirs, atol=2e-5, err_msg=name)


def test_penalties_equal_the_oracle_and_padding_changes_nothing(logits):
    """Entries past the last row are padding."""
    rows, token_ids = np.array([0, 0, 3, ROWS, ROWS]), np.array([4, 9, 4, 0, 0])
    counts = np.array([2.0, 0.0, 1.0, 0.0, 0.0], np.float32)
    settings = np.tile(np.array([1.3, 0.5, 0.2], np.float32), (ROWS, 1))
    parts = (jnp.asarray(part) for part in (logits, rows, token_ids, counts, settings))
    got = sampling.apply_penalties(*parts)
    expected = oracle.apply_penalties(logits, rows[:3], token_ids[:3], counts[:3], settings)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-6)


def test_random_numbers_are_those_of_the_engine():
    """Else a text would depend on the device that samples it."""
    seeds, places = [0, 1, 7, 2**64 - 1, 2**63], [0, 1, 5, 100_000, 2]
    theirs = engine_numbers.uniform(np.array(seeds, np.uint64), np.array(places, np.int64))
    np.testing.assert_array_equal(uniform(seeds, places), theirs)
