"""What an abstractinator is worth, on held-out windows.

Bits per byte are those of a code that one could decode, window by window: the digits of the
highest rows under the row model's own predictions, those of each level below under the expander
given the rows above, then every segment's bytes and its end under the expander given the rows so
far. Bytes beyond the budget of segments are charged 8 bits each.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from latent_jax.core.errors import DataError
from latent_jax.ops import vq_metrics
from latent_jax.systems.abstractinator import cost, progress, token_lm, tokenizer
from latent_jax.systems.abstractinator.config import part
from latent_jax.systems.abstractinator.measure import Measure

LN2 = math.log(2)
_BARS = 64


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


def _add(total: dict[str, Any] | None, part: Mapping[str, Any]) -> dict[str, Any]:
    part = {k: np.asarray(v, np.float64) for k, v in part.items()}
    return part if total is None else {k: total[k] + part[k] for k in total}


def evaluate(
    system: Any, variables: Mapping[str, Any], measure: Measure, report: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures a system on evenly spread held-out windows.

    Returns:
      metrics: ``bpb.codes``, with several levels ``bpb.level<i>_given_level<i+1>``,
        ``bpb.bytes_given_codes`` and their sum ``bpb.total``;
        ``bpb.gzip|xz`` of the same bytes in one piece, ``bpb.byte_lm|byte_lm_flops`` of the peers,
        ``bpb.entropy_model`` of the model that cuts segments, and ``bpb.smollm2`` (see `token_lm`),
        if there are any;
        ``reconstruction.byte_accuracy|exact_segments`` (free-running, greedy), and the same over
        ``rate_distortion.stages<i>`` with the digits after the first ``i`` dropped, beside the
        nominal ``code_bits_per_byte``; ``reconstruction.listed.<peer>.byte_share|segments``: what
        a list of as many strings as there are rows holds at least, the likeliest under a peer that
        has read the text before (what a code of fixed length could say);
        ``bytes_per_row``, ``segments.overflow`` (share of bytes);
        ``rvq.level<l>.stage<i>.perplexity|entropy_ratio|live|resets``, ``usage`` (share of the rows
        that each code has, the most used first, in at most 64 bars) and
        ``rvq.level<l>.quantisation_error``; with several levels
        ``reconstruction.level<l>.byte_accuracy|exact_segments|digit_accuracy`` free-running from
        the rows of level ``l`` alone (``digit_accuracy`` of the rows just below, and
        ``level<m>_digit_accuracy`` of those further down), beside their nominal
        ``code_bits_per_byte``, the same over ``rate_distortion.level<l>.stages<i>``;
        ``reconstruction.others_of_level<l>`` from the rows of another window (a level whose own
        rows do no better says nothing by them), and
        ``expander.level<l>.stage<i>.accuracy`` (given the true digits before);
        ``top.accuracy|top5|top10`` of the first digit and its ``top.unigram_accuracy`` (always the
        held-out text's own favourite),
        ``top.stage<i>.accuracy|top5|top10|bits`` (given the true digits before),
        ``top.row_accuracy`` (all of them), ``top.bits_per_row``, ``top.expected_bits_per_row`` (the
        entropy of its predictions: the same where they are calibrated) and
        ``top.unigram_bits_per_row``; ``top.mse_pre|mse_post|
        mse_mean|vq|margin`` of a head that predicts rows (see `losses.values`);
        ``top.effective_positions``, the rows that the row model was trained on, and
        ``top.positions_per_byte`` of that text; costs as `cost.flops` names them, and
        ``throughput.encode_bytes_per_second|generate_bytes_per_second``.
      artefacts: ``samples``.
    """
    c = system.config
    held = system.windows("validation")
    chosen = held.spread(c.eval.windows)
    levels = len(c.levels)
    batches = list(held.batches(chosen, min(c.eval.batch_size, len(chosen))))
    sums, samples = None, []
    running, other = [[None] * level.stages for level in c.levels], [None] * levels
    for number, (ids, valid) in enumerate(batches):
        sums = _add(sums, measure.likelihoods(variables, ids, valid))
        for i, level in enumerate(c.levels):
            for stage in range(level.stages):
                found, said = measure.free_running(variables, ids, valid, stage + 1, i)
                running[i][stage] = _add(running[i][stage], found)
            found, _ = measure.free_running(variables, ids, valid, level.stages, i, True)
            other[i] = _add(other[i], found)
        if number == 0:
            samples = _rebuilt(np.asarray(ids), np.asarray(said), c.eval.samples)
        report("windows", number + 1, len(batches))
    texts = [held.text[held.start[i] : held.stop[i]].tobytes() for i in chosen]
    metrics = {
        **_bits(sums), **compressed_bits_per_byte(b"".join(texts)), **_rows(sums, levels - 1)
    }  # fmt: skip
    for level in range(levels):
        metrics |= _codes(sums, variables, level)
    for i, level in enumerate(c.levels):
        where = f".level{i}" if i else ""
        for stage, found in enumerate(running[i], 1):
            each = _exactness(found, i)
            each["code_bits_per_byte"] = _nominal(sums, i, stage, level.codes)
            name = f"rate_distortion{where}.stages{stage}"
            metrics |= {f"{name}.{k}": v for k, v in each.items()}
        metrics |= {f"reconstruction{where}.{k}": v for k, v in each.items()}
        if len(batches[0][0]) > 1:  # there is another window
            name = f"reconstruction.others_of_level{i}"
            metrics |= {f"{name}.{k}": v for k, v in _exactness(other[i], i).items()}
    for name in c.peers:
        for key, found, every in (("byte_share", "listed_bytes", "covered"),
                                  ("segments", "listed", "rows0")):  # fmt: skip
            share = float(sums[f"{found}/{name}"] / max(sums[every], 1))
            metrics[f"reconstruction.listed.{name}.{key}"] = share
    for name, (total, count) in ((k, v) for k, v in sums.items() if k.startswith("mean/")):
        metrics[name.removeprefix("mean/")] = float(total / max(count, 1))
    metrics |= seen_by_top(variables)
    metrics["eval.bytes"] = int(sums["bytes"])
    metrics |= cost.flops(system, variables)
    speed = cost.encoding_speed(measure, variables, batches)
    metrics["throughput.encode_bytes_per_second"] = speed
    prompts = [text[: len(text) // 2] for text in texts[: c.eval.samples]]
    continued, found = cost.continuations(system, variables, prompts)
    metrics |= found
    name = token_lm.found(c.eval.token_lm)
    if name is not None:
        few = np.unique(np.linspace(0, len(texts) - 1, c.eval.token_lm_windows).astype(int))
        metrics |= token_lm.bits_per_byte(name, [texts[i] for i in few], report)
    return metrics, {"samples": [*samples, *continued]}


def seen_by_top(variables: Mapping[str, Any]) -> dict[str, float]:
    """Rows that the row model was trained on, and how many of them a byte of their text gives."""
    if "progress" not in variables:
        return {}
    rows, size = (progress.total(variables["progress"][name]) for name in ("positions", "bytes"))
    return {
        "top.effective_positions": float(rows),
        "top.positions_per_byte": float(rows / max(size, 1)),
    }


def _exactness(found: Mapping[str, Any], level: int) -> dict[str, float]:
    out = {
        "byte_accuracy": float(found["right"] / max(found["bytes"], 1)),
        "exact_segments": float(found["exact"] / max(found["segments"], 1)),
    }
    for i in range(level):
        name = "digit_accuracy" if i == level - 1 else f"level{i}_digit_accuracy"
        out[name] = float(found[f"digits_right{i}"] / max(found[f"digits{i}"], 1))
    return out


def _nominal(sums: Mapping[str, Any], level: int, stages: int, codes: int) -> float:
    """Bits per byte of digits that are written down as they are."""
    return float(stages * math.log2(codes) * sums[f"rows{level}"] / max(sums["covered"], 1))


def _bits(sums: Mapping[str, Any]) -> dict[str, float]:
    size = max(float(sums["bytes"]), 1.0)
    beyond = float(sums["bytes"] - sums["covered"])
    parts = {"bpb.codes": float(sums["digit_nats"].sum()) / LN2 / size}
    levels = sum(name.startswith("rows") for name in sums)
    for i in range(levels - 1, 0, -1):
        nats = float(sums[f"nats{i}"].sum())
        parts[f"bpb.level{i - 1}_given_level{i}"] = nats / LN2 / size
    parts["bpb.bytes_given_codes"] = (float(sums["byte_nats"]) / LN2 + 8 * beyond) / size
    out = {
        **parts,
        "bpb.total": sum(parts.values()),
        "bytes_per_row": float(sums["covered"] / max(sums["rows0"], 1)),
        "segments.overflow": beyond / size,
    }
    if levels > 1:
        out["bytes_per_top_row"] = float(sums["covered"] / max(sums[f"rows{levels - 1}"], 1))
    for i in range(1, levels):
        for stage, right in enumerate(sums[f"right{i}"] / np.maximum(sums[f"known{i}"], 1)):
            out[f"expander.level{i}.stage{stage}.accuracy"] = float(right)
    for name, nats in sums.items():
        if name.startswith("nats/"):
            out[f"bpb.{name.removeprefix('nats/')}"] = float(nats) / LN2 / size
    return out


def _codes(sums: Mapping[str, Any], variables: Mapping[str, Any], level: int) -> dict[str, Any]:
    usage = sums[f"usage{level}"]
    figures = vq_metrics.usage(jnp.asarray(usage, jnp.float32))
    resets = np.ravel(variables["codebook"][part("quantiser", level)]["resets"])
    out = {}
    for i in range(len(usage)):
        name = f"rvq.level{level}.stage{i}"
        out[f"{name}.perplexity"] = float(figures["perplexity"][i])
        out[f"{name}.entropy_ratio"] = float(figures["entropy_ratio"][i])
        out[f"{name}.live"] = float(1 - figures["dead"][i])
        out[f"{name}.resets"] = int(resets[i % len(resets)])
        share = np.sort(usage[i])[::-1] / max(usage[i].sum(), 1)
        bars = np.array_split(share, min(_BARS, len(share)))
        out[f"{name}.usage"] = [float(bar.sum()) for bar in bars]
    return out


def _rows(sums: Mapping[str, Any], highest: int) -> dict[str, float]:
    known = np.maximum(sums["known"], 1)
    usage = sums[f"usage{highest}"]
    rows = max(float(sums["known"][0]), 1.0)
    entropy = np.asarray(vq_metrics.entropy(jnp.asarray(usage, jnp.float32)))
    out = {
        "top.accuracy": float(sums["right"][0] / known[0]),
        "top.top5": float(sums["top5"][0] / known[0]),
        "top.top10": float(sums["top10"][0] / known[0]),
        "top.row_accuracy": float(sums["row_right"] / known[0]),
        "top.unigram_accuracy": float(usage[0].max() / rows),
        "top.bits_per_row": float(sums["digit_nats"].sum() / LN2 / rows),
        "top.expected_bits_per_row": float(sums["expected_nats"] / LN2 / rows),
        "top.unigram_bits_per_row": float(entropy.sum() / LN2),
    }
    stages = {
        "accuracy": sums["right"], "top5": sums["top5"], "top10": sums["top10"],
        "bits": sums["digit_nats"] / LN2,
    }  # fmt: skip
    return out | {
        f"top.stage{i}.{name}": float(share)
        for name, each in stages.items()
        for i, share in enumerate(each / known)
    }


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
