"""What results are called: their sections, arms and measures, read from dotted names."""

from __future__ import annotations

import re

# First part of a name → the title of its section; others are titled by their own name. The order
# here is the order on the page.
TITLES = {
    "squad": "Question answering (SQuAD)",
    "qed": "Question answering (QED, out of distribution)",
    "ood": "Question answering (another source than was trained on)",
    "lookup": "Key lookup",
    "qa": "Question answering",
    "ae": "Reconstruction",
    "continuation": "Continuation",
    "annealing": "Annealing (verdict 1: improved, 0: stable, -1: degraded, -2: collapsed)",
    "reconstruction": "Reconstruction",
    "bpb": "Bits per byte",
    "token_lm": "Bits per byte",
    "rate_distortion": "Reconstruction against code bits",
    "nll": "Negative log-likelihood",
    "recovery": "Recovery (0: nothing of the history, 1: all of it)",
    "nll_at_h": "Loss over the horizon, nats per token",
    "regret": "Loss above the measured oracle's, nats per token",
    "gain": "Share of the measured oracle's gain on recency",
    "task": "Facts hidden in a history: answers",
    "reach": "Facts that the allocator alone brings to level of detail 0",
    "baseline": "Baselines",
    "floor": "Exact floors of random-matrix gaps (nats)",
    "rmse": "Scores of the last gap",
    "mae": "Scores of the last gap",
    "crps": "Scores of the last gap",
    "windows": "Scores of the last gap",
    "pit": "Calibration: probability integral transform",
    "coverage": "Calibration: coverage of central intervals",
    "slots": "Memory slots",
    "rollout": "Rollouts: error growth, and statistics beside the truth's",
    "rvq": "Residual quantiser",
    "top": "Row model",
    "segments": "Rows and segments",
    "bytes_per_row": "Rows and segments",
    "bytes_per_top_row": "Rows and segments",
    "eval": "Rows and segments",
    "latent": "Latent statistics",
    "latents": "Latent statistics",
    "reader": "The reader (frozen 0: it was trained with the compressor)",
    "telemetry": "Latent statistics",
    "diagnostics": "Diagnostics",
    "throughput": "Cost",
    "memory": "Cost",
    "cost": "Cost",
    "flops": "Cost",
    "parameters": "Cost",
    "ratio": "Cost",
    "wire": "The wire: numbers, bytes, and what they hold",
    "train": "Training",
}

# What each arm of a comparison is. Rows of a table follow this order.
ARMS = {
    "latent": "the compressed text",
    "cramming": "latents optimised per text (upper bound)",
    "full_text": "the whole text, as a prompt",
    "full_text_tuned": "the whole text with a tuned soft prompt",
    "embedding_replay": "the whole text through the embedding input",
    "embedding_replay_anchor": "the same, with the anchor text",
    "token_budget_head": "the first M tokens of the text",
    "token_budget_head_tuned": "the first M tokens with a tuned soft prompt",
    "token_budget_tail": "the last M tokens of the text",
    "token_budget_tail_tuned": "the last M tokens with a tuned soft prompt",
    "stride_tokens": "every n-th token",
    "mean_pool": "mean-pooled embeddings",
    "pca": "PCA of embeddings",
    "kv_stride": "every n-th key/value of a prefill",
    "kv_topk": "keys/values with most attention",
    "kv_question": "keys/values nearest the question",
    "full": "the whole history as raw text",
    "windowed": "raw keys/values, encoded in windows of their own",
    "lod0": "the fact raw, all else gists",
    "gist": "gists",
    "recency": "as many of the newest raw keys/values",
    "scrambled": "control: own latents in random order",
    "shuffled": "control: another text's latents or gists",
    "zero": "control: latents set to zero",
    "dropped": "control: no history",
    "no_context": "control: the question alone",
    "no_context_tuned": "control: the question with a tuned soft prompt",
}

# Last parts that are measures rather than rows.
MEASURES = frozenset(
    "f1 em nll accuracy loss token_accuracy exact_prefix exact bleu crps perplexity entropy_ratio "
    "live found top5 top10 mean std rmse".split()
)
# Columns that come first.
FIRST = ("f1", "em", "f1_share", "f1_gain", "token_accuracy", "exact_match", "exact_prefix")
# What stands on top of a page, where the run has it.
HEADLINES = (
    "reader.frozen",  # there only where it is not
    "squad.f1.latent",
    "squad.f1.full_text",
    "squad.f1.no_context",
    "qed.f1.latent",
    "lookup.f1.latent",
    "qa.f1.latent",
    "ae.token_accuracy",
    "reconstruction.byte_accuracy",
    "bpb.total",
    "top.accuracy",
    "nll.last",
    "nll.position_averaged",
    "crps",
    "ratio",
)


def place(name: str) -> tuple[str, str, str] | None:
    """Splits a dotted name into (table, row, measure), or None where it is a single number.

    Example:
      >>> place("squad.f1.latent")
      ('squad', 'latent', 'f1')
      >>> place("squad.first_top1.shuffled")
      ('squad', 'shuffled', 'first_top1')
      >>> place("squad.qwen.x8.f1.shuffled")
      ('squad.qwen.x8', 'shuffled', 'f1')
      >>> place("rvq.level0.stage2.live"), place("baseline.unigram.nll")
      (('rvq.level0', 'stage2', 'live'), ('baseline', 'unigram', 'nll'))
      >>> place("nll_at_h.bm25.w512"), place("nll_at_h.dropped.minus_full")
      (('nll_at_h', 'bm25', 'w512'), ('nll_at_h', 'dropped', 'minus_full'))
      >>> place("ae.token_accuracy") is None
      True
    """
    parts = name.split(".")
    if len(parts) < 3:
        return None
    *head, second, last = parts
    if last in ARMS or last.removesuffix("_tuned") in ARMS:
        return ".".join(head), last, second
    if second in ARMS or re.fullmatch(r"w\d+", last):  # an arm, or a policy at a size
        return ".".join(head), second, last
    indexed = re.fullmatch(r"[a-z_]+\d+", second) and not re.fullmatch(r"[a-z_]+\d+", last)
    if second not in MEASURES and (last in MEASURES or indexed):
        return ".".join(head), second, last
    return ".".join(head), last, second


def rank(row: str) -> tuple[int, list[tuple[float, str]]]:
    """Arms in their order; other rows by name, with the numbers in it as numbers."""
    names = list(ARMS)
    if row in ARMS:
        return names.index(row), []
    parts = re.split(r"(\d+)", row)
    return len(names), [(float(p), "") if p.isdigit() else (-1.0, p) for p in parts]
