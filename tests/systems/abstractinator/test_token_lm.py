"""A token model's bits per byte, against its own logits window by window."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.core.errors import BackboneError
from latent_jax.systems.abstractinator import token_lm


def test_bits_are_those_of_the_windows_tokens():
    # The second window begins in the middle of a character.
    windows = [b"The cat sat on the mat.", "élan".encode()[1:], b"and on."]
    seen = []
    found = token_lm.bits_per_byte("tiny", windows, lambda *at: seen.append(at))
    model = backbones.load("tiny")
    tokenizer = model.tokenizer
    first = tokenizer.token_to_id("<|eos|>")
    ids = np.zeros((8, 32), np.int32)
    bits = 8.0  # the half character
    texts = ["and on.", "lan", "The cat sat on the mat."]
    tokens = [[first, *tokenizer.encode(text)] for text in texts]
    for row, mine in zip(ids, tokens, strict=False):
        row[: len(mine)] = mine
    log_p = np.asarray(jax.nn.log_softmax(model.logits(ids)))
    for i, mine in enumerate(tokens):
        bits -= sum(log_p[i, t, token] for t, token in enumerate(mine[1:])) / np.log(2)
    assert found["token_lm.bytes"] == 23 + 4 + 7
    assert found["bpb.token_lm"] == pytest.approx(bits / 34, rel=1e-4)
    assert seen == [("token model", 3, 3)]


def test_auto_is_what_has_been_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENT_JAX_CACHE", str(tmp_path))
    assert token_lm.found("auto") is None
    assert token_lm.found(None) is None and token_lm.found("tiny") == "tiny"
    with pytest.raises(BackboneError, match="no such model"):
        token_lm.bits_per_byte("nowhere", [b"a"], print)
