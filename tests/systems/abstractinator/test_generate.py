"""Generation from caches against generation that reads everything again, and what is refused."""

from __future__ import annotations

import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.commands.show import Bytes
from latent_jax.core.errors import ConfigError, DataError
from latent_jax.systems.abstractinator.generate import Generator
from latent_jax.systems.abstractinator.sample import Choice
from latent_jax.systems.abstractinator.tokenizer import EOP, PAD

PROMPTS = ["the cat sa", "", "x" * 40]


@pytest.fixture(scope="module")
def generator(made):
    return Generator(made[0].model)


@pytest.fixture(scope="module")
def slow(made, generator):
    """Greedy continuation without a cache: every digit and byte from a whole pass."""
    system, variables, _ = made
    c, model = system.config, system.model
    size, stages, longest = c.budget, c.level.stages, c.segments.most
    predict = jax.jit(lambda *a: model.apply(variables, *a, method="predict")[0])
    expand = jax.jit(lambda *a: model.apply(variables, *a, method="expand"))
    append = jax.jit(lambda digits: model.apply(variables, digits, method="append"))

    def run(prompt, count):
        context, _, begun = generator.start(variables, [prompt])
        given = np.asarray(begun.bytes)
        known = int(context.count[0])
        rows = [np.asarray(context.rows[0, i]) for i in range(known)]
        given, told = [g for g in given[0].tolist() if g != PAD], b""
        while len(told) < count:
            if len(rows) == size:
                rows = rows[size - size // 2 :]
            at = len(rows)
            table = np.zeros((1, size, c.level.row_width), np.float32)
            table[0, :at] = np.reshape(rows, (at, -1)) if rows else 0.0
            there = jnp.arange(size)[None] < at
            digits = np.full((1, size, stages), -1, np.int32)
            for stage in range(stages):
                digits[0, at, stage] = np.argmax(predict(table, there, digits)[0, at, stage])
            rows.append(np.asarray(append(digits[:, at])[0]))
            table[0, at] = rows[-1]
            said = np.full((1, size, longest), PAD, np.int32)
            for place in range(longest):
                if place < len(given):
                    said[0, at, place] = given[place]
                    continue
                logits = expand(table, jnp.arange(size)[None] <= at, said)
                said[0, at, place] = np.argmax(logits[0, at, place])
                if said[0, at, place] == EOP:
                    break
            told += bytes(b for b in said[0, at, len(given) :].tolist() if b < 256)
            given = []
        return told[:count]

    return run


def test_cached_is_uncached(made, generator, slow):
    system, variables, _ = made
    choice = Choice.of(system.config.level.stages)
    # Long enough that every context fills and moves.
    found = generator(variables, PROMPTS, 70, choice)
    assert found == [slow(prompt, 70) for prompt in PROMPTS]
    assert len(set(found)) == 3 and all(len(text) == 70 for text in found)


def test_generation_keeps_what_is_given(made, generator):
    system, variables, _ = made
    context, _, begun = generator.start(variables, PROMPTS)
    given = np.asarray(begun.bytes)
    assert np.asarray(context.count).tolist() == [2, 0, 4], "24 bytes of x: four times six"
    # The open segment is to be said again, closed ones are rows.
    assert given[0].tolist()[:3] == [ord("s"), ord("a"), PAD] and (given[1:] == PAD).all()
    system._generator = generator
    sampled = dict(temperature=1.0, seed=3, slide=True)
    texts = system.generate(variables, {}, PROMPTS, 9, **sampled)
    assert texts == system.generate(variables, {}, PROMPTS, 9, **sampled)
    assert texts != system.generate(variables, {}, PROMPTS, 9, **sampled | {"seed": 4})
    assert [t["prompt"] for t in texts] == PROMPTS
    # Greedy text does not depend on what is beside it, and a nucleus of one code is greedy.
    greedy = system.generate(variables, {}, PROMPTS, 9, slide=True)
    turned = system.generate(variables, {}, PROMPTS[1:] + PROMPTS[:1], 9, slide=True)
    assert turned == greedy[1:] + greedy[:1]
    assert all(len(t["continuation"]) > 0 for t in greedy)
    nucleus = system.generate(variables, {}, PROMPTS, 9, slide=True, temperature=1.0, top_p=1e-6)
    assert nucleus == greedy


def test_bytes_come_as_they_are_made(made, generator):
    system, variables, _ = made
    system._generator = generator
    parts = []
    answer = system.generate(variables, {}, "the ", 20, tell=parts.append)
    assert len(parts) >= 4 and sum(map(len, parts)) == 20
    assert b"".join(parts).decode("utf-8", errors="replace") == answer["continuation"]


@pytest.mark.parametrize("raw", [False, True])
def test_a_terminal_gets_text_and_a_file_the_bytes(monkeypatch, raw):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n")
    monkeypatch.setattr(sys, "stdout", out)
    with Bytes(raw) as shown:
        for part in (b"caf\xc3", b"\xa9\x1b[2J\xff", b"\xc2\x9b\xe2"):
            shown(part)
    written = out.buffer.getvalue()
    if raw:
        assert written == b"caf\xc3\xa9\x1b[2J\xff\xc2\x9b\xe2"
    else:
        assert written.decode() == "café␛[2J\ufffd\ufffd\ufffd\n"


def test_refused(made):
    system, variables, _ = made
    with pytest.raises(DataError, match="no prompt"):
        system.generate(variables, {}, [])
    with pytest.raises(DataError, match="longer than the context of 24 bytes.*at most 14"):
        system.generate(variables, {}, ["the cat sa"], 15)
    with pytest.raises(ConfigError, match="temperature is -1"):
        system.generate(variables, {}, "a", 3, temperature=-1.0)
    with pytest.raises(ConfigError, match="5 values of top_p for 3 stages"):
        system.generate(variables, {}, "a", 3, temperature=1.0, top_p=[0.5] * 5)


def test_one_rule_per_stage():
    choice = Choice.of(3, temperature=[1.0, 0.0], top_p=[1.0, 1.0, 1.0, 0.5])
    assert [mode.greedy for mode in choice.modes] == [False, True, True, True]
    logits = jnp.tile(jnp.asarray([0.0, 1.0]), (64, 1))
    first = choice.pick(0, jax.random.key(0), logits)
    assert set(np.asarray(first).tolist()) == {0, 1}
    assert np.asarray(choice.pick(1, jax.random.key(0), logits)).tolist() == [1] * 64
