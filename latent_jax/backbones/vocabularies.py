"""`tokenizers` back ends from GGUF fields, llama2.c vocabularies and plain bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from latent_jax.core.errors import BackboneError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# GGUF's names of Llama 3's word splitting
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")

# ggml token types
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6


def byte_characters() -> dict[str, int]:
    """The character that each byte is written as in a byte-level vocabulary."""
    # Printable bytes as themselves and the others from U+0100 on.
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {chr(b if b in keep else next(others)): b for b in range(256)}


def _byte_level(regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), _byte_level(False)]
    )


def _pre_tokenizer(name: str, where: str) -> pre_tokenizers.PreTokenizer:
    """Word splitting of a byte-level BPE, by its GGUF name."""
    if name in ("smollm", "refact", "command-r", "starcoder"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, _byte_level(True)])
    if name in ("gpt-2", "default"):
        return _byte_level(True)
    if name in LLAMA3_NAMES:
        return _split(_LLAMA3)
    if name in ("qwen2", "deepseek-r1-qwen"):
        return _split(_QWEN2)
    raise BackboneError(
        f"{where}: pre-tokenizer '{name}' is not supported; load the Hugging Face directory "
        f"instead."
    )


def from_gguf(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """Byte-level BPE (``gpt2``) or SentencePiece-style BPE (``llama``) from a GGUF file's fields.

    Raises:
      BackboneError: a field is missing or the kind is unknown.
    """

    def need(key: str) -> Any:
        if f"tokenizer.ggml.{key}" not in fields:
            raise BackboneError(f"{where}: GGUF field 'tokenizer.ggml.{key}' is missing.")
        return fields[f"tokenizer.ggml.{key}"]

    kind, tokens = need("model"), need("tokens")
    types = [int(t) for t in fields.get("tokenizer.ggml.token_type", [1] * len(tokens))]
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2":
        pre = fields.get("tokenizer.ggml.pre", "default")
        merges = [tuple(m.split(" ")) for m in need("merges")]
        backend = Tokenizer(
            models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3_NAMES)
        )
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _pre_tokenizer(pre, where)
        backend.decoder = decoders.ByteLevel()
    elif kind == "llama":
        scores = [float(s) for s in need("scores")]
        prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
        unknown = int(fields.get("tokenizer.ggml.unknown_token_id", 0))
        pieces = {t for t, k in zip(tokens, types, strict=True) if k not in (_CONTROL, _BYTE)}
        backend = _sentencepiece(vocab, scores, pieces, tokens[unknown], prefix)
    else:
        raise BackboneError(
            f"{where}: tokenizer model '{kind}' is not supported (gpt2 and llama are)."
        )
    added = [t for t, k in zip(tokens, types, strict=True) if k == _CONTROL]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in added])
    user = [t for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED]
    backend.add_tokens([AddedToken(t, normalized=False) for t in user])
    if backend.get_vocab_size() != len(tokens):
        raise BackboneError(
            f"{where}: the vocabulary repeats tokens ({len(tokens)} listed, "
            f"{backend.get_vocab_size()} distinct)."
        )
    return backend


def _sentencepiece(
    vocab: dict[str, int], scores: Sequence[float], pieces: set[str], unknown: str, prefix: bool
) -> Tokenizer:
    """SentencePiece BPE: a pair merges when the joined piece exists, best score first."""
    merges = []
    for piece, index in vocab.items():
        if piece not in pieces:
            continue
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(a, b) for a, b in pairs if a in vocab and b in vocab]
        merges += sorted(
            ((scores[index], a, b) for a, b in pairs), key=lambda m: (vocab[m[1]], vocab[m[2]])
        )
    merges.sort(key=lambda m: m[0], reverse=True)
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for _, a, b in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [normalizers.Replace(" ", "▁")]
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    return backend


def from_llama2c(path: str | Path, vocab_size: int) -> Tokenizer:
    """llama2.c's ``tokenizer.bin``: (score, length, bytes) per piece, in id order."""
    path = Path(path)
    try:
        data = path.read_bytes()
        pieces, scores, at = [], [], 4
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, at)
            raw = data[at + 8 : at + 8 + length]
            if len(raw) != length:
                raise struct.error("piece cut short")
            at += 8 + length
            pieces.append(raw.decode("utf-8"))
            scores.append(score)
    except OSError as error:
        raise BackboneError(f"{path}: cannot read the llama2.c vocabulary ({error}).") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise BackboneError(
            f"{path}: not a llama2.c vocabulary of {vocab_size} pieces ({error})."
        ) from error
    # llama2.c's exporter writes BOS and EOS with line breaks around them and ▁ as a space.
    tokens = [p.strip("\n") if i in (1, 2) else p.replace(" ", "▁") for i, p in enumerate(pieces)]
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {t for i, t in enumerate(tokens) if i >= 3 + 256}
    backend = _sentencepiece(vocab, scores, normal, tokens[0], prefix=True)
    special = [AddedToken(t, normalized=False, special=True) for t in tokens[:3]]
    backend.add_special_tokens(special)
    return backend


def of_bytes(special: Sequence[str]) -> Tokenizer:
    """One token per byte, then `special`."""
    backend = Tokenizer(models.BPE(vocab=byte_characters(), merges=[]))
    backend.pre_tokenizer = _byte_level(False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in special])
    return backend
