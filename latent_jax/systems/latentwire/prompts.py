"""How a question about a compressed text is put to a reader, in training and in evaluation.

Layout, the same for every arm and every loss::

    [context, or what stands for it] [after_context] [question + anchor] [answer] [stop]

Each bracket is tokenised on its own, so that what the wire replaces is exactly the context's
tokens, and the first supervised token is by construction the first one the reader has to produce.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Text around a question. ``{q}`` is the question."""

    format: Literal["plain", "chat"] = field(
        default="plain", help="plain text, or a chat turn of the reader's own template",
        choices=("plain", "chat"),
    )  # fmt: skip
    question: str = field(default="\nQuestion: {q}", help="text that follows the context")
    anchor: str = field(default="\nAnswer:", help="text after which the answer begins (plain)")
    answer: str = field(default=" {a}", help="how an answer is written after the anchor (plain)")
    after_context: str = field(
        default="", help="text between the context and the question, all arms"
    )
    bos_after_context: bool = field(default=False, help="put BOS after the context, all arms")
    replay_anchor: str = field(
        default="\n\n", help="text after the context in the arm embedding_replay_anchor"
    )
    stop: Literal["newline", "eos"] = field(
        default="newline", help="what ends a plain answer; generation stops at EOS as well",
        choices=("newline", "eos"),
    )  # fmt: skip

    def validate(self) -> None:
        if "{q}" not in self.question:
            raise ConfigError(f"prompt.question: {self.question!r} has no {{q}} for the question")
        if "{a}" not in self.answer:
            raise ConfigError(f"prompt.answer: {self.answer!r} has no {{a}} for the answer")


class PromptBuilder:
    """Turns contexts, questions and answers into token ids for one tokenizer.

    Args:
      tokenizer: anything with ``encode``, ``decode``, ``eos_id``, ``bos_id`` and, for chat,
        ``token_to_id``.
      config: the layout.

    Raises:
      ConfigError: chat format with a tokenizer that has no ChatML tokens, or a stop token it lacks.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig | None = None):
        self.tokenizer = tokenizer
        self.config = config = config or PromptConfig()
        self.chat = config.format == "chat"
        end = _special(tokenizer, "<|im_end|>")
        if self.chat and end is None:
            raise ConfigError(
                "prompt.format: chat needs a tokenizer with <|im_start|> and <|im_end|>; use plain"
            )
        newline = tokenizer.encode("\n")
        if self.chat:
            self.stop_id = end
        elif config.stop == "newline" and newline:
            self.stop_id = newline[-1]
        elif tokenizer.eos_id is not None:
            self.stop_id = tokenizer.eos_id
        else:
            raise ConfigError("prompt.stop: this tokenizer has no EOS token; use newline")
        # SentencePiece puts a space before every text by itself: an answer must not bring another.
        piece = getattr(tokenizer, "id_to_token", None)
        start = tokenizer.encode("a")[:1]
        self._adds_space = piece is not None and (piece(start[0]) or "").startswith("▁")
        #: Ids at which generation ends. Text is cut at the first newline as well (`text`).
        self.stop_ids = tuple(
            sorted({self.stop_id, *(() if tokenizer.eos_id is None else (tokenizer.eos_id,))})
        )
        self._after = tokenizer.encode(config.after_context) if config.after_context else []
        if config.bos_after_context and tokenizer.bos_id is not None:
            self._after = [tokenizer.bos_id, *self._after]
        self.replay_anchor_ids = (
            tokenizer.encode(config.replay_anchor) if config.replay_anchor else []
        )

    @property
    def pad_id(self) -> int:
        """Filler under a False mask; its value never matters."""
        pad = getattr(self.tokenizer, "pad_id", None)
        return 0 if pad is None else pad

    def context_ids(self, context: str) -> list[int]:
        """Tokens of the text that a wire replaces."""
        return self.tokenizer.encode(context)

    def prompt_text(self, question: str) -> str:
        """What follows the context, up to where the answer begins."""
        question = self.config.question.format(q=question)
        if not self.chat:
            return question + self.config.anchor
        return f"<|im_start|>user{question}<|im_end|>\n<|im_start|>assistant\n"

    def prompt_ids(self, question: str) -> list[int]:
        """Tokens of `prompt_text`, after the optional text and BOS that follow every context."""
        return self._after + self.tokenizer.encode(self.prompt_text(question))

    def answer_text(self, answer: str) -> str:
        """An answer as it is written after the anchor."""
        return answer if self.chat else self.config.answer.format(a=answer)

    def answer_ids(self, answer: str, stop: bool = True) -> list[int]:
        """Tokens of an answer, with the stop token unless ``stop=False``."""
        text = self.answer_text(answer)
        ids = self.tokenizer.encode(text[1:] if self._adds_space and text[:1] == " " else text)
        return ids + ([self.stop_id] if stop else [])

    def supervised(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Prompt and answer ids of one training example, checked against the joint tokenisation.

        Raises:
          DataError: if prompt and answer, tokenised as one text, do not split at the boundary: the
            reader would then be trained on a first token that it never has to produce.
        """
        prompt, gold = self.prompt_ids(question), self.answer_ids(answer, stop=False)
        self.check_boundary(question, answer)
        return prompt, [*gold, self.stop_id]

    def check_boundary(self, question: str, answer: str) -> None:
        """Asserts that the first gold token after the anchor is the supervised one."""
        text = self.prompt_text(question)
        alone = self.tokenizer.encode(text)
        first = self.answer_ids(answer, stop=False)[:1]
        joint = self.tokenizer.encode(text + self.answer_text(answer))
        if not first or joint[: len(alone)] != alone or joint[len(alone) : len(alone) + 1] != first:
            raise DataError(
                f"answer {answer!r} does not start a token of its own after the anchor "
                f"{text[-12:]!r}; change prompt.anchor or prompt.answer so that one ends, or the "
                "other begins, with the space"
            )

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as an answer: up to the first stop token, then up to the first newline."""
        return self.tokenizer.decode(self.kept(ids)).lstrip().split("\n", 1)[0].strip()

    def kept(self, ids: Sequence[int]) -> list[int]:
        """Generated ids up to the first stop token."""
        return list(itertools.takewhile(lambda i: i not in self.stop_ids, map(int, ids)))


def _special(tokenizer: Any, token: str) -> int | None:
    lookup = getattr(tokenizer, "token_to_id", None)
    return lookup(token) if callable(lookup) else None


def pad_rows(
    rows: Sequence[Sequence[int]], length: int, fill: int = 0, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks ragged id lists to ``[b, length]`` with the mask of what is real.

    Raises:
      ValueError: if a row is longer than ``length``; nothing is ever cut silently.
    """
    ids = np.full((len(rows), length), fill, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} ids and does not fit {length}")
        at = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, True
    return ids, mask


def qa_batch(
    builder: PromptBuilder,
    contexts: Sequence[Sequence[int]],
    questions: Sequence[str],
    answers: Sequence[str],
    lengths: tuple[int, int, int],
) -> dict[str, np.ndarray]:
    """A padded batch for the answer loss.

    Args:
      contexts: context token ids.
      lengths: padded lengths of context, prompt and answer.

    Returns:
      ``context_ids, context_mask`` (right-padded), ``prompt_ids, prompt_mask`` (left-padded, so
      that the answer follows without a hole) and ``answer_ids, answer_mask`` (right-padded, stop
      token included).
    """
    pairs = [builder.supervised(q, a) for q, a in zip(questions, answers, strict=True)]
    context, context_mask = pad_rows(contexts, lengths[0], builder.pad_id)
    prompt, prompt_mask = pad_rows([p for p, _ in pairs], lengths[1], builder.pad_id, left=True)
    answer, answer_mask = pad_rows([a for _, a in pairs], lengths[2], builder.pad_id)
    return {
        "context_ids": context, "context_mask": context_mask,
        "prompt_ids": prompt, "prompt_mask": prompt_mask,
        "answer_ids": answer, "answer_mask": answer_mask,
    }  # fmt: skip
