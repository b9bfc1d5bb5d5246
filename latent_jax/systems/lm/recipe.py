"""Training rows of a language model: running text, solved lookups and copies, packed with a supervised mask.

A lookup's facts and questions are noise that nothing can predict, so only its answers are supervised, and of a copy
only the second half; all of running text is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from latent_jax import data
from latent_jax.backbones.tokenizer import ByteTokenizer, Tokenizer
from latent_jax.core.errors import DataError
from latent_jax.data.lookup import KEYS, WORDS
from latent_jax.systems.lm.config import KINDS, LMDataConfig, StageConfig, TokenizerConfig

EOS, PAD = "<|eos|>", "<|pad|>"


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
"""Token ids, and for each the number of its kind in `KINDS` plus one where it is supervised, else 0."""


def lookup_documents(
    tokenizer: Tokenizer, config: LMDataConfig, stage: StageConfig, n: int, seed: int
) -> list[Document]:
    """Solved lookups; the answers, each with its newline, are supervised."""
    texts = data.lookup_texts(
        n, seed, stage.pairs, config.values, stage.questions, template=config.template
    )
    anchor = config.template.rpartition("{answer}")[0].rpartition("\n")[2].rstrip(" ")
    answer = re.compile(rf"(?<=\n{re.escape(anchor)})[^\n]*\n")
    kind = 1 + KINDS.index("lookup")
    documents = []
    for text, encoding in zip(
        texts, tokenizer.backend.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        inside = np.zeros(len(text) + 1, bool)
        for match in answer.finditer(text):
            inside[match.start() : match.end()] = True
        marks = [kind if inside[end - 1] else 0 for _, end in encoding.offsets]
        documents.append((encoding.ids, marks))
    return documents


def copy_documents(
    tokenizer: Tokenizer, texts: Sequence[str], stage: StageConfig, n: int, seed: int
) -> list[Document]:
    """``text, newline, the text again, newline``; the second copy is supervised."""
    rng = np.random.default_rng([seed, 3])
    low, high = stage.copy
    kind = 1 + KINDS.index("copy")
    newline = tokenizer.encode("\n")
    noisy = rng.random(n) < stage.noise
    windows = data.segments(tokenizer, texts, high, max(n - int(noisy.sum()), 1), seed=seed)
    documents, used = [], 0
    for noise in noisy:
        length = int(rng.integers(low, high + 1))
        if noise:
            ids = rng.integers(tokenizer.vocab_size, size=length).tolist()
        else:
            ids = windows[used % len(windows)][:length].tolist()
            used += 1
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
      ``tokens, segment_ids, positions, kinds``, int32 ``[rows, length]``. ``kinds`` is the number of a token's kind
      plus one where it is to be predicted, else 0; a document's first token never is.
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
            return copy_documents(tokenizer, texts, stage, n, seed)
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
