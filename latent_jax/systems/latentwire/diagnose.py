"""Statistics of a compressor's latents, answers and training log; `findings` judges them."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from latent_jax.ops.spectrum import effective_rank
from latent_jax.systems.latentwire.metrics import normalise


class Evidence(NamedTuple):
    """What a run left behind.

    Attributes:
      statistics: of `latent_statistics`.
      results: of ``results.json``.
      samples: of ``samples.jsonl``.
      log: of ``metrics.jsonl``.
    """

    statistics: Mapping[str, float]
    results: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    log: Sequence[Mapping[str, Any]]


def repeats(text: str) -> bool:
    """Whether a text is mostly one word or one pair of words over and over ("the the the").

    Example:
      >>> repeats("the the the the"), repeats("of the of the of the"), repeats("a cat on a mat")
      (True, True, False)
    """
    words = text.lower().split()
    if len(words) < 4:
        return False
    for n in (1, 2):
        grams = collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        # A pair comes back at every second word at best.
        if grams.most_common(1)[0][1] * n > 0.6 * len(words):
            return True
    return False


def predictions(texts: Sequence[str], top: int = 10) -> dict[str, Any]:
    """How varied answers are: distinct ones and words, commonest, empty and repetitive ones."""
    n = max(len(texts), 1)
    cleaned = [normalise(t) for t in texts]
    counts = collections.Counter(cleaned)
    return {
        "count": len(texts),
        "distinct": len(counts),
        "distinct_words": len({w for t in cleaned for w in t.split()}),
        "empty": sum(not t.strip() for t in texts) / n,
        "repetitive": sum(map(repeats, texts)) / n,
        "commonest": counts.most_common(top),
        "commonest_share": counts.most_common(1)[0][1] / n if texts else 0.0,
    }


def cosines(
    z: Float[np.ndarray, "n m d"], mask: Bool[np.ndarray, "n m"], limit: int = 512
) -> dict[str, float]:
    """Cosine between latents of different texts: of their means, and slot by slot.

    Near 1 the encoder says the same of every text, whatever the loss says.
    """
    z, mask = np.asarray(z[:limit], np.float32), np.asarray(mask[:limit], bool)
    if len(z) < 2:
        return {"cosine": float("nan"), "slot_cosine": float("nan")}
    weight = mask[..., None].astype(np.float32)
    mean = (z * weight).sum(1) / np.maximum(weight.sum(1), 1)
    slots = [_pairwise(z[mask[:, j], j]) for j in range(z.shape[1]) if mask[:, j].sum() > 1]
    return {
        "cosine": _pairwise(mean),
        "slot_cosine": float(np.mean(slots)) if slots else float("nan"),
    }


def _pairwise(x: Float[np.ndarray, "n d"]) -> float:
    """Mean cosine over all pairs of different rows, from the norm of the sum of directions."""
    unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    n = len(unit)
    return float((np.square(unit.sum(0)).sum() - np.square(unit).sum()) / (n * (n - 1)))


def norm_ratio(vectors: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "v d"]) -> float:
    """Mean norm of some vectors ÷ mean norm of what the reader is used to."""
    size = lambda x: float(np.linalg.norm(np.asarray(x, np.float32), axis=-1).mean())  # noqa: E731
    return size(vectors) / max(size(reference), 1e-12)


def spectrum(vectors: Float[np.ndarray, "n d"]) -> dict[str, Any]:
    """Eigenvalues of the covariance (descending shares) and the effective rank."""
    x = np.asarray(vectors, np.float32)
    x = x - x.mean(0)
    energy = np.square(np.linalg.svd(x, compute_uv=False)).astype(np.float64)
    share = energy / max(energy.sum(), 1e-30)
    return {
        "effective_rank": effective_rank(energy),
        "first_share": float(share[0]) if len(share) else 0.0,
        "dims_for_90": int(np.searchsorted(np.cumsum(share), 0.9) + 1) if len(share) else 0,
        "shares": share.tolist(),
    }


def embedding_statistics(
    vectors: Float[np.ndarray, "n d"], table: Float[np.ndarray, "v d"]
) -> dict[str, float]:
    """Soft tokens against the vocabulary: per-token RMS, and per-dimension centre and spread."""
    x, e = np.asarray(vectors, np.float32), np.asarray(table, np.float32)
    rms = lambda a: float(np.sqrt(np.square(a).mean(-1)).mean())  # noqa: E731
    spread = np.maximum(e.std(0), 1e-8)
    return {
        "rms": rms(x),
        "vocabulary_rms": rms(e),
        "centre_shift": float((np.abs(x.mean(0) - e.mean(0)) / spread).mean()),
        "spread_ratio": float((x.std(0) / spread).mean()),
    }


def nearest_tokens(
    vectors: Float[np.ndarray, "n d"], table: Float[np.ndarray, "v d"], tokenizer: Any, k: int = 3
) -> list[list[tuple[str, float]]]:
    """The ``k`` vocabulary entries nearest each soft token, with their cosine."""
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)  # noqa: E731
    near = unit(np.asarray(vectors, np.float32)) @ unit(np.asarray(table, np.float32)).T
    best = np.argsort(-near, axis=-1)[:, :k]
    return [
        [(tokenizer.decode([int(i)], skip_special=False), float(near[row, i])) for i in ids]
        for row, ids in enumerate(best)
    ]


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a half-written last line is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def loss_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean share of each weighted loss term over the batches in which several terms compete.

    Tasks alternate batch by batch: in one with a single term that term is all of the loss, which
    says nothing.
    """
    found: dict[str, list[float]] = collections.defaultdict(list)
    for row in rows:
        shares = {
            k[6:]: float(v)
            for k, v in row.items()
            if k.startswith("share.") and isinstance(v, int | float)
        }
        if sum(v > 0 for v in shares.values()) > 1:
            for name, value in shares.items():
                found[name].append(value)
    return {k: float(np.mean(v)) for k, v in found.items()}


def ends(
    rows: Sequence[Mapping[str, Any]], key: str, share: float = 0.1, least: int = 3
) -> tuple[float, float] | None:
    """Means of a logged number over the first and the last part of its finite values.

    Args:
      share: how much of the log an end is.
      least: rows of an end; one batch alone is noise.

    Returns:
      (begin, end), or None if there are fewer than two ends' worth of rows.
    """
    found = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    found = [float(v) for v in found if math.isfinite(v)]
    n = max(least, round(share * len(found)))
    if len(found) < 2 * n:
        return None
    return float(np.mean(found[:n])), float(np.mean(found[-n:]))


def first_step(rows: Sequence[Mapping[str, Any]], key: str, above: float) -> int | None:
    """The step from which a logged metric stays above a threshold until the end of the log."""
    began = None
    for row in rows:
        value = row.get(key)
        if not isinstance(value, int | float):
            continue
        if value < above:
            began = None
        elif began is None:
            began = int(row["step"])
    return began


def latent_statistics(
    z: Float[np.ndarray, "n m d"], mask: Bool[np.ndarray, "n m"]
) -> dict[str, float]:
    """Flat numbers about the latents of a set of texts.

    Args:
      z: latents.
      mask: which are real.
    """
    z, mask = np.asarray(z, np.float32), np.asarray(mask, bool)
    flat = z[mask]
    spread = spectrum(flat[:4096])
    return {
        **cosines(z, mask),
        "norm": float(np.linalg.norm(flat, axis=-1).mean()),
        "effective_rank": spread["effective_rank"],
        "first_share": spread["first_share"],
        "dims_for_90": float(spread["dims_for_90"]),
    }


def answers_fail(results: Mapping[str, Any]) -> bool:
    """Whether answers from latents are not surely better than from another text's, or less than
    half as good as from the text.
    """
    own, full = results.get("squad.f1.latent"), results.get("squad.f1.full_text")
    low = (results.get("squad.f1_gain.shuffled.ci95") or [None])[0]
    behind = own is not None and full is not None and own < 0.5 * full
    return behind or (low is not None and low <= 0)
