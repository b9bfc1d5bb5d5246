"""Training rows of a language model: text, solved lookups and copies, packed and supervised.

A lookup's facts and questions are noise that nothing can predict, so only its answers are
supervised, and of a copy only the second half; all of running text is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from latent_jax import data
from latent_jax.backbones.tokenizer import ByteTokenizer, Tokenizer
from latent_jax.core.errors import DataError
from latent_jax.data.lookup import KEYS, WORDS
from latent_jax.systems.lm.config import KINDS, LMDataConfig, StageConfig, TokenizerConfig

# A digit, with the space before a number.
_DIGIT = Regex(r" ?\p{N}")
EOS, PAD = "<|eos|>", "<|pad|>"
# Around an answer while a lookup is written; private use, so no text holds them.
_OPEN, _CLOSE = "\ue000", "\ue001"


def make_tokenizer(config: TokenizerConfig, source: LMDataConfig) -> Tokenizer:
    """The run's tokenizer: read, bytes, or a byte-level BPE trained on the mixture.

    Training is deterministic, so a resumed or evaluated run makes the same one again.
    """
    if config.path is not None:
        return Tokenizer.from_directory(config.path)
    if config.kind == "bytes":
        return ByteTokenizer()
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if config.digits:
        # Before anything else, so that nothing joins the digits of a number.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(_DIGIT, "isolated"), backend.pre_tokenizer]
        )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = data.load_texts(source.text, "train", source.root)
    # Often enough that every word of the task becomes a single token, also at the start of a text.
    words = [*KEYS, *(WORDS if source.values == "word" else map(str, range(10, 100)))]
    layout = source.template.replace("{context}", "").replace("{question}", "?")
    layout = layout.replace("{answer}", "")
    task = [f"{word} {word}" for word in words] * 1000 + [layout] * 1000
    backend.train_from_iterator([*texts, *task], trainer)
    return Tokenizer(
        backend, eos_id=backend.token_to_id(EOS), pad_id=backend.token_to_id(PAD)
    )


Document = tuple[list[int], list[int]]
"""Token ids, and for each its kind (place in `KINDS` + 1) where it is supervised, else 0."""


def lookup_documents(
    tokenizer: Tokenizer, config: LMDataConfig, stage: StageConfig, n: int, seed: int
) -> list[Document]:
    """Solved lookups; the answers, each with the newline that follows it, are supervised."""
    templates = stage.templates or (config.template,)
    texts, spans = [], []
    for number, template in enumerate(templates):
        count = (n + number) // len(templates)
        marked = template.replace("{answer}", f"{_OPEN}{{answer}}{_CLOSE}")
        for text in data.lookup_texts(
            count, len(templates) * seed + number, stage.pairs, config.values, stage.questions,
            template=marked,
        ) if count else ():  # fmt: skip
            plain, inside = _unmark(text)
            texts.append(plain)
            spans.append(inside)
    kind = 1 + KINDS.index("lookup")
    encodings = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    return [
        (e.ids, [kind if inside[end - 1] else 0 for _, end in e.offsets])
        for e, inside in zip(encodings, spans, strict=True)
    ]


def _unmark(text: str) -> tuple[str, np.ndarray]:
    """The text without the answers' marks, and which of its characters were between them."""
    plain, inside, on, stop = [], [], False, False
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece in (_OPEN, _CLOSE):
            on = piece == _OPEN
            if on and plain and plain[-1].endswith(" "):
                inside[-1] = True  # the space before an answer belongs to its first token
            stop = piece == _CLOSE
            continue
        shown = [on] * len(piece)
        if inside and piece.startswith("\n") and stop:
            shown[0] = True
        plain.append(piece)
        inside += shown
    return "".join(plain), np.asarray(inside, bool)


def copy_documents(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: LMDataConfig,
    stage: StageConfig,
    n: int,
    seed: int,
) -> list[Document]:
    """``text, newline, the text again, newline``; the second copy is supervised.

    The text is random tokens, a lookup's facts, or running text. Random tokens are the fastest
    teacher of induction (nothing else helps); facts, where every other token is common, ask it to
    match more than one token back.
    """
    rng = np.random.default_rng([seed, 3])
    low, high = stage.copy
    kind = 1 + KINDS.index("copy")
    newline = tokenizer.encode("\n")
    draw = rng.random(n)
    noisy, factual = draw < stage.noise, draw >= 1 - stage.facts
    plain = n - int(noisy.sum()) - int(factual.sum())
    # On one line: a line break inside the text would look like its end.
    lines = [" ".join(text.split()) for text in texts] if plain else []
    windows = data.segments(tokenizer, lines, high, plain, seed=seed).tolist() if plain else []
    facts = []
    if factual.any():
        contexts = [
            e.context
            for e in data.lookup_examples(
                int(factual.sum()), seed, pairs=stage.pairs, values=config.values
            )
        ]
        facts = tokenizer.encode_batch(contexts)
    documents = []
    for i in range(n):
        length = int(rng.integers(low, high + 1))
        if noisy[i]:
            ids = rng.integers(tokenizer.vocab_size, size=length).tolist()
        elif factual[i]:
            ids = facts.pop()
        else:
            # A short source has fewer windows than copies are wanted: they come round again.
            windows.append(windows.pop(0))
            ids = windows[-1][:length]
        ids = ids + newline
        documents.append((ids + ids, [0] * len(ids) + [kind] * len(ids)))
    return documents


def text_documents(
    tokenizer: Tokenizer, texts: Sequence[str], stage: StageConfig, n: int, seed: int
) -> list[Document]:
    """Row-long windows of running text."""
    windows = data.segments(tokenizer, texts, stage.length, n, seed=seed)
    kind = 1 + KINDS.index("text")
    marks = [kind] * stage.length
    repeats = -(-n // len(windows))
    return [(w.tolist(), marks) for _ in range(repeats) for w in windows][:n]


def rows(
    tokenizer: Tokenizer,
    config: LMDataConfig,
    stage: StageConfig,
    seed: int = 0,
    split: str = "train",
    limit: int | None = None,
) -> dict[str, np.ndarray]:
    """Packed rows of a stage.

    Args:
      limit: number of rows; the stage's own by default.

    Returns:
      ``tokens, segment_ids, positions, kinds``, int32 ``[rows, length]``. ``kinds`` is the number
      of a token's kind plus one where it is to be predicted, else 0; a document's first token never
      is.
    """
    wanted = limit or stage.rows
    total = sum(stage.mix.values())
    texts = data.load_texts(config.text, split, config.root)
    # Seeds, too, are apart: validation never sees a training episode.
    seed = 2 * seed + (split != "train")
    documents: list[Document] = []
    for name, share in stage.mix.items():
        budget = int(wanted * stage.length * share / total)
        if budget:
            documents += _fill(name, budget, tokenizer, config, stage, texts, seed)
    order = np.random.default_rng([seed, 5]).permutation(len(documents))
    tokens, marks = zip(*(documents[i] for i in order), strict=True)
    packed = data.pack(tokens, stage.length, tokenizer.pad_id, wanted)
    # Packing only looks at lengths, so the marks fall beside their tokens.
    kinds = data.pack(marks, stage.length, 0, wanted)["tokens"]
    return {**packed, "kinds": np.where(packed["positions"] > 0, kinds, 0)}


def _fill(name, budget, tokenizer, config, stage, texts, seed) -> list[Document]:
    """Documents of one kind that hold about ``budget`` tokens."""

    def make(n: int) -> list[Document]:
        if name == "lookup":
            return lookup_documents(tokenizer, config, stage, n, seed)
        if name == "copy":
            return copy_documents(tokenizer, texts, config, stage, n, seed)
        return text_documents(tokenizer, texts, stage, n, seed)

    probe = make(8)
    longest = max(len(ids) for ids, _ in probe)
    if name == "lookup" and longest > stage.length:
        raise DataError(
            f"a lookup of pairs={stage.pairs} and {stage.questions} questions has {longest} tokens "
            f"and does not fit rows of {stage.length}; make the row longer or the lookup smaller"
        )
    mean = sum(len(ids) for ids, _ in probe) / len(probe)
    return make(max(1, round(budget / mean)))
