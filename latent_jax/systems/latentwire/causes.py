"""What a training log says about why a compressor fails, one small function for each cause.

What counts as normal is written beside its threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latent_jax.systems.latentwire.config import TASKS
from latent_jax.systems.latentwire.diagnose import Evidence, answers_fail, ends, loss_shares

# Of the terms of one batch: what is left cannot steer.
DOMINANT_SHARE = 0.8
# Batches differ by a few percent; a tenth above the start is no noise.
WORSE = 1.1
# Nor is a twentieth below it progress: working runs lose half of their loss, or end below the
# floor of half a nat per token at which little is left to learn.
STUCK, LEARNED_NATS = 0.95, 0.5
# Skipped steps are rare accidents (an overflow); one in twenty is a run that fights itself.
SKIPPED = 0.05
# A task that makes up a hundredth of the loss is noise in the steps of the others.
STARVED_SHARE = 0.01
# An answer has a few tokens, of which the first is the hardest: two to three times their mean.
FIRST_TOKEN = 4.0
# Right in training, more often wrong than right on others, and a nat per token between them.
KNOWN, UNKNOWN, OVERFIT_NATS = 0.9, 0.5, 1.0


def diverged(e: Evidence) -> Iterator[str]:
    """A trained term ends above its start, or steps are not finite."""
    for name in _weighted(e.log):
        both = ends(e.log, f"term.{name}")
        if both is not None and both[1] > WORSE * both[0]:
            yield (
                f"the loss term {name} rose from {both[0]:.2f} to {both[1]:.2f}: lower "
                "train.optimizer.lr, or warm up longer"
            )
    steps = [row for row in e.log if "skipped_total" in row]
    if steps and steps[-1]["skipped_total"] > SKIPPED * len(steps):
        yield (
            f"{steps[-1]['skipped_total']:.0f} of {len(steps)} steps were not finite: lower "
            "train.optimizer.lr"
        )


def stuck(e: Evidence) -> Iterator[str]:
    """No trained term has moved, and nothing was learned before either."""
    both = {name: ends(e.log, f"term.{name}") for name in _weighted(e.log)}
    moved = [b for b in both.values() if b is None or not STUCK * b[0] < b[1] <= WORSE * b[0]]
    if both and not moved and answers_fail(e.results):
        for name, (begin, end) in both.items():
            if end > LEARNED_NATS:
                yield (
                    f"the loss term {name} has hardly moved, {begin:.2f} to {end:.2f}: raise "
                    "train.optimizer.lr or train.steps"
                )


def never_weighted(e: Evidence) -> Iterator[str]:
    """A task is in the data, but its weight has been 0 all along."""
    for name in TASKS:
        weights = [row.get(f"weight.{name}") for row in e.log if f"term.{name}" in row]
        if weights and not any(weights):
            gate = any(f"gate.{name}" in row for row in e.log)
            why = "its gate never opened" if gate else "its schedule never turned on"
            yield (
                f"the weight of {name} was 0 in all of its {len(weights)} batches, {why}: lower "
                f"the gate's threshold or begin earlier (losses)"
            )


def starved(e: Evidence) -> Iterator[str]:
    """A task has batches of its own, next to no part in the loss, and was not learned."""
    names = [n for n in TASKS if any(row.get(f"weight.{n}") for row in e.log)]
    part, batches = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for row in e.log:
        for name in names:
            if (value := row.get(f"term.{name}")) is not None:
                part[name] += row[f"weight.{name}"] * value
                batches[name] += 1
    total = sum(part.values())
    for name in names:
        both, share = ends(e.log, f"term.{name}"), part[name] / max(total, 1e-12)
        if both is None or share > STARVED_SHARE or both[1] <= max(0.5 * both[0], LEARNED_NATS):
            continue
        yield (
            f"{name} is {batches[name] / sum(batches.values()):.0%} of the batches, "
            f"{share:.2%} of the loss and still at {both[1]:.2f} nats: raise its weight (losses)"
        )


def dominant(e: Evidence) -> Iterator[str]:
    """One of several terms of a batch is nearly all of the loss."""
    for term, share in sorted(loss_shares(e.log).items()):
        if share > DOMINANT_SHARE:
            yield f"the loss term {term} is {share:.0%} of the loss: lower its weight (losses)"


def dead_parts(e: Evidence) -> Iterator[str]:
    """A part that is trained never had a gradient."""
    norms = _of_parts(e.log, "grad_norm.")
    # A LoRA's first factor has none in the first step, where the second is 0.
    dead = sorted(name for name, v in norms.items() if len(v) >= 10 and not any(v))
    if dead:
        yield (
            f"{', '.join(dead)} had no gradient in any of {len(norms[dead[0]])} steps: nothing "
            "that is trained reads them; open what is closed before them, or leave them out"
        )


def held_parts(e: Evidence) -> Iterator[str]:
    """A part that was never moved, although it has a gradient, and answers fail."""
    rates = _of_parts(e.log, "lr.")
    held = sorted(name for name, v in rates.items() if len(v) >= 10 and not any(v))
    if held and answers_fail(e.results):
        yield (
            f"{', '.join(held)} had learning rate 0 in all of {len(rates[held[0]])} steps: what "
            "is left cannot learn to answer; train them (train.optimizer.groups, train.phases)"
        )


def untrained_task(e: Evidence) -> Iterator[str]:
    """Questions were asked, never trained, and fail."""
    trained = [n for n in TASKS if any(f"term.{n}" in row for row in e.log)]
    if trained and "answer" not in trained and answers_fail(e.results):
        yield (
            f"questions are asked (F1 {e.results['squad.f1.latent']:.2f}), but only "
            f"{', '.join(trained)} was trained: give data.mix a share of answer"
        )


def padding_learned(e: Evidence) -> Iterator[str]:
    """The answer loss is low because most of its tokens need no text."""
    rows = [row for row in e.log if "term.answer" in row]
    mean, first = ends(rows, "term.answer"), ends(rows, "term.first_token")
    if mean is None or first is None or not answers_fail(e.results):
        return
    if first[1] > FIRST_TOKEN * mean[1] and first[1] > 2 * LEARNED_NATS:
        yield (
            f"answers cost {mean[1]:.2f} nats per token, their first token {first[1]:.2f}: most "
            "supervised tokens are padding or stops that need no text; shorten prompt.answer, or "
            "weigh losses.first_token"
        )


def memorised(e: Evidence) -> Iterator[str]:
    """Right on the questions of training, wrong on others."""
    accuracy, train = ends(e.log, "answer_accuracy"), ends(e.log, "term.answer")
    held_out, exact = e.results.get("squad.nll.latent"), e.results.get("squad.em.latent")
    if None in (accuracy, train, held_out, exact):
        return
    if accuracy[1] >= KNOWN and exact < UNKNOWN and held_out > train[1] + OVERFIT_NATS:
        yield (
            f"{accuracy[1]:.0%} of the answer tokens are right in training, {exact:.0%} of the "
            f"held-out answers ({train[1]:.2f} against {held_out:.2f} nats): memorised; train on "
            "more questions, or fewer steps"
        )


def _of_parts(log: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, list[float]]:
    """What was logged for each part under names that begin so."""
    found: dict[str, list[float]] = {}
    for row in log:
        for key, value in row.items():
            if key.startswith(prefix):
                found.setdefault(key.removeprefix(prefix), []).append(value)
    return found


def _weighted(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Terms that had a weight when they were last seen."""
    last = {
        key[5:]: row.get(f"weight.{key[5:]}")
        for row in log
        for key in row
        if key.startswith("term.")
    }
    return sorted(name for name, weight in last.items() if weight)


CAUSES = {
    "diverged": diverged, "never-weighted": never_weighted, "starved-task": starved,
    "dominant-term": dominant, "dead-part": dead_parts,
}  # fmt: skip
#: These explain answers that fail.
OF_ANSWERS = {
    "stuck": stuck, "held-part": held_parts, "untrained-task": untrained_task,
    "padding-learned": padding_learned, "memorised": memorised,
}  # fmt: skip
