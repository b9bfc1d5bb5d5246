"""What an abstractinator is worth, on held-out windows.

Bits per byte are those of a code that one could decode, window by window: the rows' digits under
the row model's own predictions, then every segment's bytes and its end under the expander given the
rows so far. Bytes beyond the budget of segments are charged 8 bits each.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.core.errors import DataError
from latent_jax.ops import vq_metrics
from latent_jax.systems.abstractinator import losses, segment, tokenizer
from latent_jax.systems.abstractinator.model import Abstractinator
from latent_jax.systems.abstractinator.sample import Choice, say
from latent_jax.systems.abstractinator.tokenizer import EOP, PAD

LN2 = math.log(2)


def compressed_bits_per_byte(raw: bytes) -> dict[str, float]:
    """Bits per byte of general-purpose compressors on a text, headers included.

    Raises:
      DataError: no bytes.
    """
    if not raw:
        raise DataError("baselines: there are no bytes to compress")
    sizes = {
        "gzip": len(gzip.compress(raw, 9, mtime=0)),
        "xz": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {f"bpb.{name}": 8 * size / len(raw) for name, size in sizes.items()}


class Measure:
    """Compiled measurements of one model; sums over a batch, to be added up."""

    def __init__(self, model: Abstractinator):
        self.model = model
        self.likelihoods = jax.jit(self._likelihoods)
        self.free_running = jax.jit(self._free_running)

    def _likelihoods(self, variables, ids, valid):
        model, codes = self.model, self.model.config.level.codes
        out = model.apply(variables, ids, valid, method="encode")
        nll, counted, _, _ = losses.reconstruction(model, variables, ids, out)
        logits, nats, known = losses.next_rows(model, variables, out)
        rank = jnp.sum(
            logits > jnp.take_along_axis(logits, jnp.maximum(out.digits, 0)[..., None], -1), -1
        )
        right = (jnp.argmax(logits, -1) == out.digits) & known
        first = known[..., 0]
        sums = {
            "bytes": valid.sum(),
            "covered": out.found.length.sum(),
            "rows": out.there.sum(),
            "byte_nats": jnp.sum(jnp.where(counted, nll, 0.0)),
            "digit_nats": jnp.sum(jnp.where(known, nats, 0.0), (0, 1)),
            "right": right.sum((0, 1)),
            "known": known.sum((0, 1)),
            "row_right": jnp.sum(first & (right | ~known).all(-1)),
            "top5": jnp.sum(first & (rank[..., 0] < 5)),
            "top10": jnp.sum(first & (rank[..., 0] < 10)),
            "usage": vq_metrics.histogram(out.digits, codes),
        }
        if model.config.byte_lm is not None:
            term = losses.byte_lm(model, variables, ids, valid)["byte_lm"]
            sums["peer_nats"] = term.sum
        if model.config.entropy is not None:
            term = losses.entropy_model(model, variables, ids, valid)["entropy_model"]
            sums["entropy_nats"] = term.sum
        return sums

    def _free_running(self, variables, ids, valid, stages):
        """Greedy bytes of rows whose digits from ``stages`` on are dropped."""
        model = self.model
        longest = model.config.segments.most
        out = model.apply(variables, ids, valid, method="encode")
        kept = jnp.where(jnp.arange(out.digits.shape[-1]) < stages, out.digits, -1)
        rows = model.apply(variables, kept, method="append")
        wanted, counted, is_byte = segment.targets(ids, out.found, longest, EOP)
        blank = jnp.full(wanted.shape, PAD, jnp.int32)
        said = say(model, variables, rows, out.there, blank, jax.random.key(0), Choice.of(0))
        right = said == wanted
        sums = {
            "bytes": is_byte.sum(),
            "right": (right & is_byte).sum(),
            "segments": out.there.sum(),
            "exact": jnp.sum((right | ~counted).all(-1) & out.there),
        }
        return sums, said


def _add(total: dict[str, Any] | None, part: Mapping[str, Any]) -> dict[str, Any]:
    part = {k: np.asarray(v, np.float64) for k, v in part.items()}
    return part if total is None else {k: total[k] + part[k] for k in total}


def evaluate(
    system: Any, variables: Mapping[str, Any], measure: Measure, report: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures a system on evenly spread held-out windows.

    Returns:
      metrics: ``bpb.codes``, ``bpb.bytes_given_codes`` and their sum ``bpb.total``;
        ``bpb.gzip|xz`` of the same bytes in one piece, ``bpb.byte_lm`` of the peer and
        ``bpb.entropy_model`` of the model that cuts segments, if there are any;
        ``reconstruction.byte_accuracy|exact_segments`` (free-running, greedy), and the same over
        ``rate_distortion.stages<i>`` with the digits after the first ``i`` dropped, beside the
        nominal ``code_bits_per_byte``; ``bytes_per_row``, ``segments.overflow`` (share of bytes);
        ``rvq.level0.stage<i>.perplexity|entropy_ratio|live``; ``top.accuracy|top5|top10`` of the
        first digit and its ``top.unigram_accuracy`` (always the held-out text's own favourite),
        ``top.stage<i>.accuracy`` (given the true digits before), ``top.row_accuracy`` (all of
        them), ``top.bits_per_row`` and ``top.unigram_bits_per_row``.
      artefacts: ``samples``.
    """
    c = system.config
    held = system.windows("validation")
    chosen = held.spread(c.eval.windows)
    stages = c.level.stages
    batches = list(held.batches(chosen, min(c.eval.batch_size, len(chosen))))
    sums, running, samples = None, [None] * stages, []
    for number, (ids, valid) in enumerate(batches):
        sums = _add(sums, measure.likelihoods(variables, ids, valid))
        for i in range(stages):
            found, said = measure.free_running(variables, ids, valid, i + 1)
            running[i] = _add(running[i], found)
        if number == 0:
            samples = _rebuilt(np.asarray(ids), np.asarray(said), c.eval.samples)
        report("windows", number + 1, len(batches))
    raw = b"".join(held.text[held.start[i] : held.stop[i]].tobytes() for i in chosen)
    metrics = {**_bits(sums), **compressed_bits_per_byte(raw), **_codes(sums), **_rows(sums)}
    for i, found in enumerate(running):
        scores = {
            "byte_accuracy": float(found["right"] / max(found["bytes"], 1)),
            "exact_segments": float(found["exact"] / max(found["segments"], 1)),
        }
        bits = (i + 1) * math.log2(c.level.codes) * sums["rows"] / max(sums["covered"], 1)
        name = f"rate_distortion.stages{i + 1}"
        metrics |= {f"{name}.{k}": v for k, v in scores.items()}
        metrics[f"{name}.code_bits_per_byte"] = float(bits)
        if i == stages - 1:
            metrics |= {f"reconstruction.{k}": v for k, v in scores.items()}
    metrics["eval.bytes"] = int(sums["bytes"])
    return metrics, {"samples": samples}


def _bits(sums: Mapping[str, Any]) -> dict[str, float]:
    size = max(float(sums["bytes"]), 1.0)
    beyond = float(sums["bytes"] - sums["covered"])
    codes = float(sums["digit_nats"].sum()) / LN2 / size
    given = (float(sums["byte_nats"]) / LN2 + 8 * beyond) / size
    out = {
        "bpb.codes": codes,
        "bpb.bytes_given_codes": given,
        "bpb.total": codes + given,
        "bytes_per_row": float(sums["covered"] / max(sums["rows"], 1)),
        "segments.overflow": beyond / size,
    }
    if "peer_nats" in sums:
        out["bpb.byte_lm"] = float(sums["peer_nats"]) / LN2 / size
    if "entropy_nats" in sums:
        out["bpb.entropy_model"] = float(sums["entropy_nats"]) / LN2 / size
    return out


def _codes(sums: Mapping[str, Any]) -> dict[str, float]:
    figures = vq_metrics.usage(jnp.asarray(sums["usage"], jnp.float32))
    out = {}
    for i in range(len(sums["usage"])):
        name = f"rvq.level0.stage{i}"
        out[f"{name}.perplexity"] = float(figures["perplexity"][i])
        out[f"{name}.entropy_ratio"] = float(figures["entropy_ratio"][i])
        out[f"{name}.live"] = float(1 - figures["dead"][i])
    return out


def _rows(sums: Mapping[str, Any]) -> dict[str, float]:
    known = np.maximum(sums["known"], 1)
    usage = sums["usage"]
    rows = max(float(sums["known"][0]), 1.0)
    entropy = np.asarray(vq_metrics.entropy(jnp.asarray(usage, jnp.float32)))
    out = {
        "top.accuracy": float(sums["right"][0] / known[0]),
        "top.top5": float(sums["top5"] / known[0]),
        "top.top10": float(sums["top10"] / known[0]),
        "top.row_accuracy": float(sums["row_right"] / known[0]),
        "top.unigram_accuracy": float(usage[0].max() / rows),
        "top.bits_per_row": float(sums["digit_nats"].sum() / LN2 / rows),
        "top.unigram_bits_per_row": float(entropy.sum() / LN2),
    }
    accuracy = sums["right"] / known
    return out | {f"top.stage{i}.accuracy": float(a) for i, a in enumerate(accuracy)}


def _rebuilt(ids: np.ndarray, said: np.ndarray, count: int) -> list[dict[str, str]]:
    """The first windows beside what free-running expansion made of them."""
    rows = []
    for window, parts in zip(ids[:count], said[:count], strict=True):
        text = tokenizer.decode(window)
        rebuilt = b"".join(tokenizer.to_bytes(part) for part in parts)[: len(text.encode())]
        rows.append(
            {"kind": "reconstruction", "text": text,
             "reconstruction": rebuilt.decode("utf-8", errors="replace")}
        )  # fmt: skip
    return rows
