"""The evaluation while training: held-out texts rebuilt teacher-forced, by every reader."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.systems.latentwire.codes import as_variables
from latent_jax.systems.latentwire.compressed import Latents
from latent_jax.systems.latentwire.config import MAIN, TASKS
from latent_jax.systems.latentwire.losses import cosine_between, forced
from latent_jax.systems.latentwire.prompts import pad_rows
from latent_jax.systems.latentwire.transcribe import own_tokens, room


def make_quick(system: Any, name: str) -> Callable[..., Any]:
    """Compiles, for one reader: texts and what it makes of them -> NLL and accuracy with own and
    with a neighbour's latents, and the cosine between neighbours.
    """
    model, chunk = system.model, system.config.losses.chunk

    @jax.jit
    def quick(params, frozen, ids, gold, mask):
        shown = Latents(model, params, frozen["reader"]).compress(ids, jnp.ones(ids.shape, bool))
        body, reader, receiver, own = system.body, frozen["reader"], model, params
        if name != MAIN:
            body, reader = system.readers[name].backbone.decoder, frozen["readers"][name]
            receiver, own = system.readers[name].adapter, params["readers"][name]
        apply = functools.partial(receiver.apply, as_variables(own))
        task = jnp.full(len(ids), TASKS.index("reconstruct"), jnp.int32)
        lead = apply(task, method="lead")
        weight = mask / mask.sum()
        lora = apply(method="deltas") if name == MAIN else None

        def score(wire):
            table = {"frozen": reader, "task": task} if name == MAIN else {}
            prefix = apply(wire, reader["embed"].dtype, **table, method="prefix")
            if name == MAIN:
                prefix = apply(prefix, task, method="instructed")
            hidden = forced(body, reader, prefix, lead, gold, mask, lora).hidden
            nll, guess = token_cross_entropy(body, reader, hidden, gold, chunk)
            return jnp.sum(nll * weight), jnp.sum((guess == gold) * weight)

        other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), shown)
        return score(shown), score(other), cosine_between(model, shown)

    return quick


def quick_eval(
    system: Any, params: Any, frozen: Any, segments: Int[np.ndarray, "n t"]
) -> dict[str, float]:
    """``reconstruct`` (nats per token), ``reconstruct_accuracy`` and its ``.shuffled`` of the main
    reader, ``<name>.<reader>`` of every other that is trained, and ``latent_cosine``.
    """
    found: dict[str, float] = {}
    for name, quick in system.quick.items():
        gold, suffix = segments, ""
        mask = np.ones(gold.shape, bool)
        if name != MAIN:
            reader, suffix = system.readers[name], f".{name}"
            rows = own_tokens(system.backbone.tokenizer, reader, segments)
            gold, mask = pad_rows(rows, room(reader.config, segments.shape[1]))
        own, other, cosine = quick(params, frozen, *map(jnp.asarray, (segments, gold, mask)))
        found[f"reconstruct{suffix}"] = float(own[0])
        found[f"reconstruct_accuracy{suffix}"] = float(own[1])
        found[f"reconstruct_accuracy{suffix}.shuffled"] = float(other[1])
        found["latent_cosine"] = float(cosine)
    return found
