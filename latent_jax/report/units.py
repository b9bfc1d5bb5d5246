"""In which unit a result is, and on how much of what it was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# The first pattern that is found in a dotted name decides; arms, levels and stages do not matter.
_UNITS = tuple(
    (re.compile(pattern), unit)
    for pattern, unit in (
        (r"(^|\.)f1_share\b", "latents ÷ arm"),
        (r"(^|\.)f1_gain\b", "latents − arm"),
        (r"^share\.|share_hurt|host_share", "share"),
        (r"^units\.", "per step"),
        (r"^weight\.", "weight"),
        (r"^parameters\.", "parameters"),
        (r"^flops\..*per_byte", "FLOPs per byte"),
        (r"^flops\b|_flops\b", "FLOPs"),
        (r"seconds", "seconds"),
        (r"^cost\.speedup", "full text ÷ latents"),
        (r"^throughput\.(?:\w+\.)*(?:encode_|generate_)?(?P<what>\w+?)_per_second",
         "{what} per second"),
        (r"^throughput\.", ""),
        (r"^grad_norm", "norm"),
        (r"^lr(\.|$)", "rate per step"),
        (r"^telemetry\.(mean_)?residency|residency", "iterations"),
        (r"code_bits_per_byte|^bpb\.", "bits per byte"),
        (r"bits_per_row|\.bits$", "bits per row"),
        (r"bytes_per_token", "bytes per token"),
        (r"floats_per_token", "numbers per token"),
        (r"^wire\.d_z$", "numbers per latent"),
        (r"value_ratio", "ratio"),
        (r"diverged", "share"),
        (r"bytes_per_(top_)?row", "bytes per row"),
        (r"positions_per_byte", "rows per byte"),
        (r"^ratio$|\.ratio$", "tokens per latent"),
        (r"exact_prefix|(^|\.)length$", "tokens"),
        (r"^term\.(commit|top_mse\w*|top_vq)|quantisation_error|mse_|top\.vq", "mean square"),
        (r"perplexity", "codes"),
        (r"resets", "codes so far"),
        (r"accuracy|(^|\.)(f1|em|bleu|exact\w*|empty|live|dead|stale|usage|overflow)\b",
         "share"),
        (r"entropy_ratio|top\d+\b|coverage|conformal|first_top\d|first_share|ordered", "share"),
        (r"^pit\.ks_p|p_value", "probability"),
        (r"^pit\.ks", "largest gap of shares"),
        (r"^pit\.histogram|pair_correlation", "density"),
        (r"cosine|similarity|correlation", "cosine"),
        (r"effective_rank|dims_for_90", "dimensions"),
        (r"^recovery\.(?!.*histories)|^gain\.", "share recovered"),
        (r"^slots\.\w*delta|permutation_increase", "nats"),
        (r"rmse|mae\b|crps|rollout\.error", "mean gaps"),
        (r"number_variance", "gaps squared"),
        (r"rollout\.line", "power"),
        (r"^nll_at_h|^regret", "nats per token"),
        (r"^(ae|squad|qa|lookup|qed|ood|continuation)\.(\w+\.)*nll", "nats per token"),
        (r"(^|\.)nll(\b|_)|^floor\.|^blocks\.|(^|\.)loss$|^term\.|^lost$|entropy\b|first_margin",
         "nats"),
        (r"^eval\.(reconstruct|substitute|upper|next_token|top|byte_lm\w*|last|answer)$", "nats"),
        (r"norm", "norm"),
    )
)  # fmt: skip
_COSTS = ("throughput", "memory", "cost", "flops", "parameters", "ratio")
_COUNTED = "(questions|segments|windows|histories|rows|targets|bytes|positions)"


def unit(name: str) -> str:
    """The unit of a result or of a column of the training log; empty for counts and the unknown.

    Example:
      >>> unit("squad.f1.latent"), unit("ae.nll.shuffled"), unit("bpb.total"), unit("crps")
      ('share', 'nats per token', 'bits per byte', 'mean gaps')
      >>> unit("throughput.bytes_per_second"), unit("eval.segments")
      ('bytes per second', '')
      >>> unit("throughput.encode_bytes_per_second"), unit("wire.d_z")
      ('bytes per second', 'numbers per latent')
    """
    if re.search(rf"(^|\.){_COUNTED}$", name):
        return ""
    for pattern, found in _UNITS:
        if match := pattern.search(name):
            return found.format(**match.groupdict())
    return ""


# Section of a page → results and settings (after `config:`) that say on how much it was measured.
_SIZES: dict[str, tuple[tuple[str, str], ...]] = {
    **{name: ((f"{name}.questions", "questions"),) for name in ("squad", "qed", "ood")},
    "ae": (("ae.segments", "texts"), ("ae.length", "tokens each")),
    "continuation": (("continuation.segments", "texts"),),
    "wire": (("wire.questions", "questions"), ("squad.questions", "questions")),
    "latent": (("ae.segments", "texts"),),
    "nll": (("windows", "windows of gaps"),),
    "baseline": (("windows", "windows of gaps"),),
    "pit": (("windows", "windows of gaps"),),
    "coverage": (("windows", "windows of gaps"),),
    "crps": (("windows", "windows of gaps"),),
    "rmse": (("windows", "windows of gaps"),),
    "slots": (("windows", "windows of gaps"),),
    "rollout": (("config:eval.rollouts", "continuations"), ("config:eval.horizon", "gaps each")),
    "recovery": (("recovery.lod1.histories", "histories"), ("config:eval.rows", "histories")),
    "nll_at_h": (("recovery.lod1.histories", "histories"), ("config:eval.rows", "histories")),
    "task": (("config:eval.task_rows", "histories each"),),
    "token_lm": (("token_lm.bytes", "bytes"),),
} | dict.fromkeys(
    ("bpb", "reconstruction", "rate_distortion", "rvq", "top", "segments"),
    (("eval.bytes", "held-out bytes"), ("config:eval.windows", "windows")),
)  # fmt: skip


def _setting(config: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _phrases(
    pairs: tuple[tuple[str, str], ...], results: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    found: dict[str, str] = {}
    for source, what in pairs:
        kind, _, dotted = source.rpartition("config:")
        value = _setting(config, dotted) if source != dotted else results.get(source)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            found.setdefault(what, f"{value:,.0f} {what}")
    return list(found.values())


def measured_on(key: str, results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """On what the results of a section were measured, and the seed.

    Example:
      >>> measured_on("squad", {"squad.questions": 96}, {"seed": 1})
      'n = 96 questions; seed 1'
    """
    if key in _COSTS:  # of the machine and the shape: neither a sample nor a draw
        return ""
    sizes = _phrases(_SIZES.get(key, ()), results, config)
    seeds = _seeds(config)
    return "; ".join([f"n = {', '.join(sizes)}"] * bool(sizes) + [seeds] * bool(seeds))


def _seeds(config: Mapping[str, Any]) -> str:
    first, count = config.get("seed"), config.get("seeds") or 1
    if first is None:
        return ""
    return f"seed {first}" if count == 1 else f"seeds {first} to {first + count - 1}, their mean"


def trained_on(config: Mapping[str, Any], held_out: bool = False) -> str:
    """What one point of a training curve stands for, and the seed.

    Example:
      >>> trained_on({"seed": 0, "train": {"batch_size": 32}})
      'a point: one batch of 32; seed 0'
      >>> trained_on({"seed": 0, "eval": {"quick_rows": 16}}, held_out=True)
      'a point: the same 16 held-out rows; seed 0'
    """
    if held_out:
        evaluation = config.get("eval")
        sizes = evaluation if isinstance(evaluation, Mapping) else {}
        size = next((sizes[k] for k in ("quick", "quick_rows", "quick_segments") if k in sizes), "")
        what = f"a point: the same {size} held-out rows" if size else "a point: held-out rows"
    else:
        size = _setting(config, "train.batch_size")
        what = f"a point: one batch of {size}" if size else "a point: one batch"
    return "; ".join(filter(None, (what, _seeds(config))))
