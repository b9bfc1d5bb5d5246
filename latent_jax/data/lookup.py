"""Key lookup: the smallest question-answering task that needs the context.

A context is a list of facts such as ``amber: 42. cedar: 17.``; the question ``cedar?`` has the
answer ``17``. A reader of 0.3 million parameters solves it from full text and cannot guess it
without, so every control of the real evaluation means something at toy scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_jax.core.errors import DataError
from latent_jax.data.squad import QAExample

KEYS = tuple(
    "amber basil cedar delta ember fern grape hazel iris jade kelp lemon maple nectar olive pearl "
    "quartz raven sage thorn umber violet willow yarrow zinc acorn birch cobalt daisy elm falcon "
    "garnet heron indigo juniper kite lotus moss nutmeg onyx poppy quill rose slate topaz".split()
)
WORDS = tuple(
    "red blue green gold black white pink gray brown silver north south east west stone glass wood "
    "iron salt sand rain snow wind fire lake hill moon star bird fish wolf bear".split()
)
# Training, validation and the mixed-in episodes draw from disjoint seed spaces.
_STREAMS = {"train": 0, "validation": 1, "text": 2}
TEMPLATE = "{context}\nQ: {question}\nA: {answer}\n"


def _values(kind: str) -> Sequence[str]:
    if kind == "number":
        return [str(n) for n in range(10, 100)]
    if kind == "word":
        return WORDS
    raise DataError(f"lookup: values='{kind}' unknown, use 'number' or 'word'")


def _check(n: int, pairs: tuple[int, int]) -> None:
    low, high = pairs
    if n < 1:
        raise DataError(f"lookup: n={n} must be at least 1")
    if not 1 <= low <= high <= len(KEYS):
        raise DataError(f"lookup: pairs={pairs} must satisfy 1 <= low <= high <= {len(KEYS)}")


def _episode(
    rng: np.random.Generator, pairs: tuple[int, int], values: Sequence[str]
) -> tuple[str, list[tuple[str, str]]]:
    """A context and its facts; keys are distinct, values are too as long as there are enough."""
    count = int(rng.integers(pairs[0], pairs[1] + 1))
    keys = rng.choice(len(KEYS), size=count, replace=False)
    chosen = rng.choice(len(values), size=count, replace=count > len(values))
    facts = [(KEYS[k], values[v]) for k, v in zip(keys, chosen, strict=True)]
    return " ".join(f"{key}: {value}." for key, value in facts), facts


def lookup_examples(
    n: int | None = None,
    seed: int = 0,
    split: str = "train",
    pairs: tuple[int, int] = (4, 8),
    values: str = "number",
) -> list[QAExample]:
    """Generates lookup questions, one per context.

    Args:
        n: number of examples; default 4000 for training, 200 for validation.
        seed: same seed, same examples; the splits never share a random stream.
        split: ``train`` or ``validation``.
        pairs: fewest and most facts in a context.
        values: ``number`` (two digits) or ``word``.

    Returns:
        Examples in SQuAD form, so that the ordinary evaluation runs on them.

    Raises:
        DataError: impossible sizes or an unknown split or kind of value.
    """
    if split not in ("train", "validation"):
        raise DataError(f"lookup: split '{split}' unknown, use 'train' or 'validation'")
    n = (4000 if split == "train" else 200) if n is None else n
    _check(n, pairs)
    table = _values(values)
    rng = np.random.default_rng([seed, _STREAMS[split]])
    examples = []
    for index in range(n):
        context, facts = _episode(rng, pairs, table)
        key, value = facts[int(rng.integers(len(facts)))]
        # the fact's own position, not the value's first occurrence: values may repeat
        start = context.index(f"{key}: {value}.") + len(key) + 2
        ident = f"lookup-{split}-{seed}-{index}"
        examples.append(QAExample(ident, "lookup", context, f"{key}?", (value,), (start,)))
    return examples


def load_lookup(source: str, split: str) -> list[QAExample]:
    """Examples of a source string such as ``lookup:pairs=2-4,values=word,n=500,seed=1``.

    Raises:
        DataError: an option that `lookup_examples` does not have, or a value it cannot read.
    """
    options: dict[str, Any] = {}
    for item in filter(None, source.partition(":")[2].split(",")):
        name, _, value = (part.strip() for part in item.partition("="))
        try:
            if name in ("n", "seed"):
                options[name] = int(value)
            elif name == "pairs":
                low, _, high = value.partition("-")
                options[name] = (int(low), int(high or low))
            elif name == "values":
                options[name] = value
            else:
                raise ValueError
        except ValueError:
            raise DataError(
                f"source '{source}': '{item}' is not one of pairs=4-8, values=number|word, "
                "n=500, seed=0"
            ) from None
    return lookup_examples(split=split, **options)


def lookup_texts(
    n: int,
    seed: int = 0,
    pairs: tuple[int, int] = (4, 8),
    values: str = "number",
    questions: int = 3,
    template: str = TEMPLATE,
    mix: Sequence[str] = (),
) -> list[str]:
    """Generates training text for a reader that is to learn the task.

    Each text is a context followed by several solved questions on it, in the prompt format of
    `template`; a question may be asked again, as copying is what has to be learned.

    Args:
        n: number of lookup texts.
        seed: same seed, same texts.
        pairs: fewest and most facts in a context.
        values: ``number`` or ``word``.
        questions: solved questions per context.
        template: prompt with ``{context}``, ``{question}`` and ``{answer}``. From the second
            question on, the part before ``{question}``'s line is not repeated.
        mix: further documents, shuffled in between (ordinary prose, so that the reader is also a
            language model).

    Returns:
        `n` lookup texts and `mix`, in random order.

    Raises:
        DataError: impossible sizes, or a template that lacks one of the three fields.
    """
    _check(n, pairs)
    if questions < 1:
        raise DataError(f"lookup: questions={questions} must be at least 1")
    for field in ("{context}", "{question}", "{answer}"):
        if field not in template:
            raise DataError(f"lookup: template {template!r} lacks {field}")
    table = _values(values)
    rng = np.random.default_rng([seed, _STREAMS["text"]])
    head, tail = template.split("{context}", 1)
    tail = tail.lstrip("\n") if tail.startswith("\n") else tail
    joint = template[len(head) + len("{context}") : len(template) - len(tail)]
    texts = []
    for _ in range(n):
        context, facts = _episode(rng, pairs, table)
        asked = [facts[i] for i in rng.integers(len(facts), size=questions)]
        body = "".join(_fill(tail, question=f"{key}?", answer=value) for key, value in asked)
        texts.append(head + context + joint + body)
    texts += list(mix)
    return [texts[i] for i in rng.permutation(len(texts))]


def _fill(template: str, **fields: str) -> str:
    # str.replace, not str.format: a prompt may hold braces of its own
    for name, value in fields.items():
        template = template.replace("{" + name + "}", value)
    return template
