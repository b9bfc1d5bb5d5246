"""How a failing compressor shows in its latents, reconstructions and answers, one small function
for each symptom.

What counts as normal is written beside its threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from latent_jax.systems.latentwire.diagnose import (
    Evidence,
    answers_fail,
    ends,
    first_step,
    predictions,
)

# Unrelated texts' latents measure 0.2-0.9 in working compressors; beyond that, what tells texts
# apart is less than a tenth of a latent's energy.
COLLAPSED_COSINE = 0.9
# Soft tokens of another size than embeddings drown, or are drowned by, everything added to them.
HEALTHY_NORM = (0.8, 1.2)
# Values of a deep prefix may grow as their keys draw less attention; the reader never saw such.
HEALTHY_VALUES = (0.3, 3.0)
# A latent so close to the mean of its span keeps no order and no pairs of what it stands for.
SPAN_MEAN = 0.95
# A task that the reader cannot do from the text itself measures nothing about latents.
READER_F1 = 0.1
# One answer in three may be chance; and twice as often as it is right.
COMMON, COMMON_RIGHT = 0.3, 2.0
EMPTY, REPETITIVE = 0.2, 0.1
GREEDY_GAP = 0.2
# Rounding moves a loss by a millionth; a hundredth is attention.
PADDING_NATS = 0.01
# The same batch again, without what training adds to it: not twice the loss, and half a nat more.
AGAIN, AGAIN_NATS = 2.0, 0.5
# A number format may cost a point of F1.
LOSSY = 0.01
# Of the guessed tokens of a batch's answers one in four is the same, and twice as often as the
# commonest of the answers themselves; a batch is small, so ten in a row are averaged.
ONE_TOKEN, ONE_TOKEN_RIGHT, BATCHES = 0.25, 2.0, 10


def empty_everywhere(e: Evidence) -> Iterator[str]:
    """Answers are empty from the full text as well."""
    empty, own = e.results.get("squad.empty.full_text", 0.0), e.results.get("squad.empty.latent")
    if empty > 0.5:
        latents = "" if own is None else f" and {own:.0%} of those from latents"
        top = e.results.get("squad.first_top1.full_text")
        guess = "" if top is None else f", while its first token is guessed right in {top:.0%}"
        yield (
            f"{empty:.0%} of the answers from the full text{latents} are empty{guess}: what ends "
            "or cuts answers is at fault, not the latents; an answer must not begin with the stop "
            "(prompt.answer, prompt.stop)"
        )


def reader_fails(e: Evidence) -> Iterator[str]:
    """The reader cannot do the task from the text itself."""
    full, empty = e.results.get("squad.f1.full_text"), e.results.get("squad.empty.full_text", 0.0)
    if full is not None and full < READER_F1 and empty <= 0.5:
        yield (
            f"the reader answers with F1 {full:.2f} from the full text: nothing about latents can "
            "be seen; put questions as it knows them (prompt.*), or take another reader"
        )


def padding_read(e: Evidence) -> Iterator[str]:
    """What stands in the padding changes what is said."""
    for arm in ("full_text", "latent"):
        change = e.results.get(f"squad.padding.{arm}")
        if change is not None and change > PADDING_NATS:
            yield (
                f"other ids in the padding change the loss of {arm} by up to {change:.2f} nats per "
                "token: the reader attends to padding; hand it the attention mask with the "
                "embeddings"
            )


def not_what_was_trained(e: Evidence) -> Iterator[str]:
    """The evaluated weights do much worse on a training batch than the log ends with."""
    for name, again in e.results.items():
        end = ends(e.log, f"term.{name[6:]}") if name.startswith("train.") else None
        if end is not None and again > AGAIN * end[1] + AGAIN_NATS:
            yield (
                f"on a training batch {name[6:]} costs {again:.2f} nats where training ended at "
                f"{end[1]:.2f}: what is evaluated is not what was trained; a part was not loaded, "
                "or is switched off"
            )


def collapsed_latents(e: Evidence) -> Iterator[str]:
    """Latents of different texts look alike."""
    cosine = e.statistics.get("cosine", 0.0)
    if cosine >= COLLAPSED_COSINE:
        began = first_step(e.log, "latent_cosine", COLLAPSED_COSINE)
        since = "" if began is None else f", since step {began}"
        yield (
            f"latents of different texts have cosine {cosine:.2f}{since}: collapsed, the reader "
            "cannot tell texts apart; more latents per text (model.ratio), or reconstruct as well"
        )


def span_means(e: Evidence) -> Iterator[str]:
    """Latents are the mean of what the reader makes of their span, and answers fail."""
    cosine = e.statistics.get("span_mean_cosine", 0.0)
    if cosine >= SPAN_MEAN and answers_fail(e.results):
        yield (
            f"latents have cosine {cosine:.2f} to the mean of their span: what stood where in it "
            "is lost; train the pooling (train.optimizer.groups), or use slots=memory"
        )


def magnitude(e: Evidence) -> Iterator[str]:
    """What the reader gets is much larger or smaller than what it makes of text."""
    (low, high), ratio = HEALTHY_NORM, e.statistics.get("norm_ratio")
    if ratio is not None and not low <= ratio <= high:
        yield (
            f"latents have {ratio:.2f} times the norm of the reader's embeddings "
            f"({low}-{high} is healthy): calibrate the adapter, or use adapter.kind=kv"
        )
    (low, high), ratio = HEALTHY_VALUES, e.statistics.get("value_ratio")
    if ratio is not None and not low <= ratio <= high:
        yield (
            f"the latents' values have {ratio:.2f} times the norm of those of text ({low}-{high} "
            "is healthy): lower train.optimizer.lr"
        )


def greedy_gap(e: Evidence) -> Iterator[str]:
    """Reconstruction that is right only while the right tokens are given."""
    forced, greedy = e.results.get("ae.forced_accuracy"), e.results.get("ae.token_accuracy")
    if forced is not None and greedy is not None and forced - greedy > GREEDY_GAP:
        yield (
            f"reconstruction is {forced:.2f} teacher-forced and {greedy:.2f} greedy: the first "
            "miss derails the rest; train longer or with losses.corrupt"
        )


def reconstruction_ignores(e: Evidence) -> Iterator[str]:
    """Another text's latents rebuild as much."""
    own, other = (e.results.get(f"ae.token_accuracy{arm}") for arm in ("", ".shuffled"))
    if own is not None and other is not None and own < other + 0.02:
        yield (
            f"own latents rebuild no more than another text's ({own:.2f} against {other:.2f}): "
            "the reader ignores them"
        )


def lossy_format(e: Evidence) -> Iterator[str]:
    """Rounding the latents costs answers."""
    for key, interval in sorted(e.results.items()):
        if key.startswith("wire.") and key.endswith(".f1_loss.ci95") and interval[0] > LOSSY:
            form, loss = key.split(".")[1], e.results[key.removesuffix(".ci95")]
            yield (
                f"latents sent as {form} lose {loss:.2f} F1 ({interval[0]:.2f} to "
                f"{interval[1]:.2f}): send them with more bits"
            )


def empty_answers(e: Evidence) -> Iterator[str]:
    """Answers from latents are empty, those from the text are not."""
    own, full = (e.results.get(f"squad.empty.{arm}", 0.0) for arm in ("latent", "full_text"))
    if own > EMPTY and own > 2 * full:
        yield (
            f"{own:.0%} of the answers from latents are empty, {full:.0%} of those from the text: "
            "unless a line above says why, answers begin with padding or the stop (prompt.answer, "
            "prompt.stop), or training was too short"
        )


def one_token(e: Evidence) -> Iterator[str]:
    """Training has come to guess one token for every answer ("the the the"), from some step on."""
    rows = [row for row in e.log if isinstance(row.get("answer_commonest"), int | float)]
    if len(rows) < BATCHES:
        return
    shares, gold = (
        np.convolve([row[key] for row in rows], np.ones(BATCHES) / BATCHES, "valid")
        for key in ("answer_commonest", "answer_commonest_gold")
    )
    beyond = shares - np.maximum(ONE_TOKEN, ONE_TOKEN_RIGHT * gold)
    # A window is told by its middle; before the first there is nothing.
    steps = [rows[0]["step"], *(row["step"] for row in rows[BATCHES // 2 + 1 :])]
    averaged = [{"step": at, "beyond": x} for at, x in zip(steps, beyond, strict=False)]
    began = first_step(averaged, "beyond", 0.0)
    if began is not None:
        yield (
            f"since step {began} of {rows[-1]['step']} many answers of a batch are guessed to be "
            f"one token, {shares[-1]:.0%} of all at the end, where the commonest of the answers "
            f"themselves has {gold[-1]:.0%}: collapsed onto function words; reconstruct as well, "
            "or start where the reader can read (encoder.slots, adapter.kind)"
        )


def repetitive_answers(e: Evidence) -> Iterator[str]:
    """ "the the the"."""
    said = said_from_latents(e.samples)
    share = predictions(said)["repetitive"]
    if len(said) >= 8 and share > REPETITIVE:
        yield (
            f"{share:.0%} of the answers from latents repeat one word or pair: the reader is off "
            "its text; reconstruct as well, or look at the size of the latents"
        )


def collapsed_answers(e: Evidence) -> Iterator[str]:
    """One answer to many questions."""
    said = said_from_latents(e.samples)
    if len(said) < 8:
        return
    p, gold = predictions(said), predictions(_gold(e.samples))["commonest_share"]
    common, share = p["commonest"][0][0], p["commonest_share"]
    if common and share > COMMON and share > COMMON_RIGHT * gold:
        yield (
            f"{share:.0%} of the answers from latents are {common!r} ({p['distinct']} different "
            f"ones to {len(said)} questions): answers collapsed"
        )


def ignored(e: Evidence) -> Iterator[str]:
    """Another text's latents answer as well."""
    own, other = e.results.get("squad.f1.latent"), e.results.get("squad.f1.shuffled")
    low = (e.results.get("squad.f1_gain.shuffled.ci95") or [None])[0]
    if own is not None and other is not None and low is not None and low <= 0:
        yield (
            f"answers from own latents (F1 {own:.2f}) are not surely better than from another "
            f"text's ({other:.2f})"
        )


def said_from_latents(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answers from latents of ``samples.jsonl``."""
    return [
        s["predictions"]["latent"]
        for s in samples
        if s.get("kind") == "answer" and "latent" in s.get("predictions", {})
    ]


def _gold(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    return [s["answers"][0] for s in samples if s.get("kind") == "answer" and s.get("answers")]


#: Of the evaluation itself: nothing that follows from answers is then worth saying.
OF_EVALUATION = {
    "padding-read": padding_read, "not-what-was-trained": not_what_was_trained,
    "empty-everywhere": empty_everywhere, "reader-fails": reader_fails,
}  # fmt: skip
SYMPTOMS = {
    "latents-collapsed": collapsed_latents, "magnitude": magnitude, "greedy-gap": greedy_gap,
    "reconstruction-ignores-latents": reconstruction_ignores, "lossy-format": lossy_format,
    "one-token": one_token,
}  # fmt: skip
OF_ANSWERS = {
    "span-means": span_means, "empty-answers": empty_answers,
    "repetitive-answers": repetitive_answers, "answers-collapsed": collapsed_answers,
    "answers-ignore-latents": ignored,
}  # fmt: skip
