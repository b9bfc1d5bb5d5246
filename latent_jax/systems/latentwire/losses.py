"""The loss terms of a batch: tasks done from latents, and the reader on the text as a teacher.

A reader that was trained on text behaves on latents as it did on text if every token that follows
has the same state in every layer. That is a far denser target than the few tokens of an answer: the
keys and values of question and answer (or of recalled text) are compared in all layers. They are
linear maps of the states, and what later tokens see of them. Next to that stands the usual
divergence of the predictions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.decoder import Decoder, inverse_frequencies
from latent_jax.backbones.substitution import substitution
from latent_jax.core.types import Mean
from latent_jax.systems.latentwire import codes, gist_head, scheduled_sampling
from latent_jax.systems.latentwire.config import MAIN, TASKS, LatentWireRun
from latent_jax.systems.latentwire.corrupt import corrupt_tokens
from latent_jax.systems.latentwire.given import prefill
from latent_jax.systems.latentwire.model import Compressor, Prefix, Wire, flatten_kv, read
from latent_jax.systems.latentwire.rates import Rates
from latent_jax.systems.latentwire.readers import Reader
from latent_jax.systems.latentwire.regularise import dropped, extra_terms, unit_means
from latent_jax.systems.latentwire.transcribe import field, room


class Forced(NamedTuple):
    """The reader on teacher-forced inputs.

    Attributes:
      hidden: states that predict each input.
      states: keys (before rotation) and values of the same places, per layer and kind.
    """

    hidden: Float[Array, "b t d"]
    states: Float[Array, "b t s e"]


def forced(
    body: Decoder,
    reader: Any,
    prefix: Prefix,
    lead: Float[Array, "b n d"],
    inputs: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    lora: Any = None,
) -> Forced:
    """Reads learned embeddings and all but the last input behind a prefix.

    Args:
      lead: learned embeddings before the inputs, at least one.
      mask: real inputs (right-padded).
      lora: deltas of a reader that is trained.
    """
    n, (b, t) = lead.shape[1], inputs.shape
    text = body.apply({"params": reader}, inputs[:, :-1], method="embed")
    embeds = jnp.concatenate([lead.astype(text.dtype), text], axis=1)
    seen = jnp.concatenate([jnp.ones((b, n - 1), bool), mask], axis=1)
    out = read(body, reader, prefix, embeds, seen, lora)
    where = prefix.start[:, None] + jnp.arange(n - 1 + t)
    flat = flatten_kv(out.kv, inverse_frequencies(body.config), where)[:, n - 1 :]
    width = body.config.num_kv_heads * body.config.head_dim
    return Forced(out.hidden[:, n - 1 :], flat.reshape(b, t, -1, width))


def raw_text(
    body: Decoder,
    reader: Any,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    sink: int | None,
) -> Prefix:
    """The text itself in the place of its latents."""
    first = None if sink is None else jnp.int32(sink)
    cache = jax.lax.stop_gradient(prefill(body, reader, ids, mask, first))
    where = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return Prefix(cache, None, mask, where, mask.sum(-1), first)


def unexplained(
    states: Float[Array, "b t s e"], target: Float[Array, "b t s e"], mask: Bool[Array, "b t"]
) -> Mean:
    """Squared error of each token's states over their variance in the batch, mean over layers and
    kinds: 0 where they agree, 1 where they are no better than the mean state.
    """
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    weight = mask.astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1)
    mean = jnp.einsum("btse,bt->se", target, weight) / count
    spread = jnp.einsum("btse,bt->s", (target - mean) ** 2, weight) / count
    error = jnp.sum((states.astype(jnp.float32) - target) ** 2, axis=-1)
    share = jnp.mean(error / (spread + 1e-6), axis=-1)
    return Mean(jnp.sum(share * weight), weight.sum())


def cosine_between(model: Compressor, wire: Wire) -> Float[Array, ""]:
    """Mean cosine between the mean latents of two different texts; near 1 they look alike.

    Of all pairs, by the length of the sum of unit vectors: texts of other devices add to a sum, and
    are not sent around. One text alone gives 0.
    """
    mean = unit_means(model, wire)
    pairs = jnp.sum(jnp.sum(mean, 0) ** 2) - jnp.sum(mean**2)
    return pairs / max(len(mean) * (len(mean) - 1), 1)


def _last(mask: Bool[Array, "b t"], width: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The marked places of every row, at most ``width``, in front; the mask of them comes first."""
    at = jnp.argsort(~mask, axis=1, stable=True)[:, : min(width, mask.shape[1])]

    def take(x):
        return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)

    return (take(mask), *map(take, arrays))


def batch_terms(
    model: Compressor,
    config: LatentWireRun,
    params: Any,
    frozen: Mapping[str, Any],
    batch: Mapping[str, Any],
    key: jax.Array | None,
    readers: Mapping[str, Reader] | None = None,
    rates: Mapping[str, Any] | None = None,
    collections: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Mean], dict[str, Any], dict[str, Any]]:
    """Cross-entropy of the supervised tokens per task (nats), what is distilled, and what the
    guards watch; of further readers as ``<term>.<reader>``.

    Args:
      model: compressor and adapter.
      config: the run.
      params: what is trained.
      frozen: parameters of the LLMs, ``reader`` and ``readers/<name>``.
      batch: of `recipe.train_stream`.
      key: of the inputs that are random or the reader's own; None leaves them as they are.
      readers: further readers by name; those read the batch whose inputs are in it.
      collections: Linen's, beside the parameters; without ``key`` they stay as they are.
      rates: what scheduled rates are now (`rates.Rates`); as at step 0 where it is not given.

    Returns:
      As `latent_jax.train.protocol.System.loss_terms`.
    """
    terms, aux, wire, moved = {}, {}, None, {}
    now = Rates.of(config.losses, rates)
    # Which entries are kept has no gradient; the heads' factors learn from what the reader teaches.
    # Other tasks learn to read the entries that are kept.
    softened = model.config.encoder.slots == "heads" and bool({"asked", "recalled"} & set(batch))
    if "raw" not in batch and not softened:
        variables, texts = {"params": params, **(collections or {})}, batch["context"]
        wire, found = model.apply(
            variables, frozen["reader"], texts, batch["context_mask"], key is not None,
            method="compress", mutable=[codes.TOLD, *([] if key is None else collections or {})],
        )  # fmt: skip
        terms, figures = codes.told(found)
        moved = {name: tree for name, tree in found.items() if name != codes.TOLD}
        aux |= figures
        aux["latent_cosine"] = cosine_between(model, wire)
        if key is not None and now.drops:
            wire = dropped(jax.random.fold_in(key, 1), wire, now.keep)
    if "inputs" in batch:
        found = _main_terms(model, config, params, frozen["reader"], batch, key, wire, now)
        terms, aux = terms | found[0], aux | found[1]
    for label, reader in (readers or {}).items():
        if field(label, "inputs") in batch:
            own = params["readers"][label], frozen["readers"][label]
            found = _reader_terms(reader, model.config.remat, config, *own, batch, key, wire, now)
            for out, new in zip((terms, aux), found, strict=True):
                out |= {f"{name}.{label}": value for name, value in new.items()}
    return terms, moved, aux


def _main_terms(model, config, params, reader, batch, key, wire, now):
    """Terms and aux of the reader that is the encoder's own LLM: behind a wire, on raw text, or
    behind a cache that is thinned out.
    """
    body, losses = Decoder(model.reader, remat=model.config.remat), config.losses
    apply = functools.partial(model.apply, {"params": params})
    asked, task, targets = "asked" in batch, batch["task"], batch["inputs"]
    lead = apply(task, asked, method="lead")
    real, supervised = batch["inputs_mask"], batch["supervised"]
    text = functools.partial(
        raw_text, body, reader, batch["context"], batch["context_mask"], model.sink
    )
    if wire is not None:
        prefix = apply(wire, reader["embed"].dtype, reader, task, method="prefix")
    elif "raw" in batch:
        prefix = text()
    else:
        texts = batch["context"], batch["context_mask"]
        prefix = apply(reader, *texts, method="softened")
    if not asked:
        prefix = apply(prefix, task, method="instructed")
    aux, terms = {}, {}
    # On text, which teaches, the reader is as it always was.
    lora = None if "raw" in batch else apply(method="deltas")
    inputs = _fed(config, body, reader, prefix, lead, targets, batch, key, now, lora=lora)
    own = forced(body, reader, prefix, lead, inputs, real, lora)
    hidden, teacher = own.hidden, None
    if losses.distils and "raw" not in batch and (asked or "recalled" in batch):
        teacher = forced(body, reader, text(), jax.lax.stop_gradient(lead), inputs, real)
        kinds = 2 * losses.distil_layers or None  # keys and values of each layer
        states = (x.states[:, :, :kinds] for x in (own, teacher))
        terms["distil_states"] = unexplained(*states, real)
    more = extra_terms(model, losses, body, reader, batch, wire, prefix, hidden, supervised)
    terms, aux = terms | more[0], aux | more[1]
    if wire is not None and losses.gist != 0:
        told = batch["context"], batch["context_mask"]
        draw = jax.random.fold_in(jax.random.key(0) if key is None else key, gist_head.STREAM)
        terms["gist"], aux["gist_cosine"] = gist_head.gist_term(
            model, params, wire, jnp.asarray(reader["embed"])[told[0]], told[1], reader["embed"],
            losses.gist_mask, draw,
        )  # fmt: skip
    full = None if teacher is None else teacher.hidden
    if asked:  # few of the tokens are supervised: only those meet the vocabulary
        places = supervised, config.data.max_answer
        supervised, targets, hidden = _last(*places, supervised, targets, hidden)[1:]
        full = None if teacher is None else _last(*places, full)[1]
    if full is None:
        nll, guess = token_cross_entropy(
            body, reader, hidden, targets, losses.chunk, losses.label_smoothing
        )
    else:
        temperature = losses.distil_temperature
        found = substitution(body, reader, full, hidden, targets, losses.chunk, temperature)
        nll, guess = found.nll, found.guess
        weight = supervised.astype(jnp.float32)
        compared = weight
        if losses.distil_first:
            compared = weight * (jnp.cumsum(weight, axis=1) <= losses.distil_first)
        terms["distil_logits"] = Mean(jnp.sum(found.kl * compared), compared.sum())
        aux["teacher_nll"] = Mean(jnp.sum(found.full_nll * weight), weight.sum())
        aux["teacher_accuracy"] = Mean(jnp.sum(found.full_hit * weight), weight.sum())
    by_task = _by_task(config, task, nll, guess == targets, supervised)
    if asked and "raw" not in batch:
        said = _but_last(supervised)
        size = model.reader.vocab_size
        aux["answer_commonest"] = commonest_share(guess, said, size)
        aux["answer_commonest_gold"] = commonest_share(targets, said, size)
    return terms | by_task[0], aux | by_task[1]


def _reader_terms(reader, remat, config, params, frozen, batch, key, wire, now):
    """Terms and aux of a further reader."""
    body, adapter = Decoder(reader.backbone.config, remat=remat), reader.adapter
    mine = functools.partial(field, reader.label)
    asked, task, targets = "asked" in batch, batch["task"], batch[mine("inputs")]
    real, supervised = batch[mine("inputs_mask")], batch[mine("supervised")]
    apply = functools.partial(adapter.apply, {"params": params})
    prefix = apply(wire, frozen["embed"].dtype, method="prefix")
    lead = apply(task, asked, method="lead")
    inputs = _fed(config, body, frozen, prefix, lead, targets, batch, key, now, reader=reader)
    hidden = forced(body, frozen, prefix, lead, inputs, real).hidden
    if asked:
        width = room(reader.config, config.data.max_answer)
        supervised, targets, hidden = _last(supervised, width, supervised, targets, hidden)[1:]
    losses = config.losses
    nll, guess = token_cross_entropy(
        body, frozen, hidden, targets, losses.chunk, losses.label_smoothing
    )
    return _by_task(config, task, nll, guess == targets, supervised)


def _but_last(mask: Bool[Array, "b t"]) -> Bool[Array, "b t"]:
    """Without the last marked place of every row: of an answer, its stop."""
    count = jnp.cumsum(mask, axis=1)
    return mask & (count < count[:, -1:])


def commonest_share(ids: Int[Array, "b t"], mask: Bool[Array, "b t"], size: int) -> Mean:
    """How large a share of the marked ids is their commonest.

    Args:
      size: of the vocabulary.
    """
    counts = jnp.zeros(size).at[ids.reshape(-1)].add(mask.reshape(-1).astype(jnp.float32))
    return Mean(counts.max(), counts.sum())


def _fed(
    config, body, frozen, prefix, lead, gold, batch, key, now, reader=None, lora=None
):  # fmt: skip
    """Teacher-forced inputs: in training, of reconstructions and answers a share is the reader's
    own, and of reconstructions a share random.
    """
    if key is None:
        return gold
    mine = functools.partial(field, MAIN if reader is None else reader.label)
    asked, inputs = "asked" in batch, gold
    rebuilt = (batch["task"] == TASKS.index("reconstruct"))[:, None]
    if now.samples:
        real, supervised = batch[mine("inputs_mask")], batch[mine("supervised")]
        prefix, lead, lora = scheduled_sampling.still(prefix, lead, lora)
        answer = config.data.max_answer
        answer = answer if reader is None else room(reader.config, answer)

        def guess():
            hidden = forced(body, frozen, prefix, lead, gold, real, lora).hidden
            if not asked:
                return token_cross_entropy(body, frozen, hidden, gold, config.losses.chunk)[1]
            # Few of the tokens may give way: only those meet the vocabulary.
            order = jnp.broadcast_to(jnp.arange(gold.shape[1]), gold.shape)
            there, at, found = _last(supervised, answer, order, hidden)
            said = token_cross_entropy(body, frozen, found, at, config.losses.chunk)[1]
            at = jnp.where(there, at, gold.shape[1])  # beyond the end: dropped
            return gold.at[jnp.arange(len(gold))[:, None], at].set(said, mode="drop")

        swappable = supervised if asked else supervised & rebuilt
        draw = jax.random.fold_in(key, scheduled_sampling.STREAM)
        inputs = scheduled_sampling.own_inputs(draw, now.sampled, gold, swappable, guess)
    if now.corrupts and not asked:
        noisy = corrupt_tokens(key, inputs, now.corrupt, body.config.vocab_size)
        inputs = jnp.where(rebuilt, noisy, inputs)
    return inputs


def _by_task(config, task, nll, hit, supervised) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Terms and accuracies of every task, and of first tokens."""
    supervised = supervised.astype(jnp.float32)
    first = supervised * (jnp.cumsum(supervised, axis=1) == 1)
    terms, aux = {"first_token": Mean(jnp.sum(nll * first), jnp.sum(first))}, {}
    for number, name in enumerate(TASKS):
        if config.data.mix.get(name):
            mask = supervised * (task == number)[:, None]
            terms[name] = Mean(jnp.sum(nll * mask), jnp.sum(mask))
            aux[f"{name}_accuracy"] = Mean(jnp.sum(hit * mask), jnp.sum(mask))
    return terms, aux
