"""One tokenizer over GGUF fields, ``tokenizer.json``, llama2.c vocabularies and plain bytes."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
import tokenizers
import tokenizers.processors

from latent_jax.backbones import vocabularies
from latent_jax.core.errors import BackboneError
from latent_jax.core.files import parse_json

_BYTES = vocabularies.byte_characters()


class Tokenizer:
    """Text ↔ ids, with the model's special tokens and chat format.

    Args:
      backend: the underlying `tokenizers.Tokenizer`.
      bos_id: id that starts a sequence, or None.
      eos_id: id that ends one, or None.
      pad_id: id used for padding; defaults to ``eos_id``, else 0 (padding is masked everywhere).
      chat_template: Jinja2 source of the chat format, or None.
      stop_ids: further ids that end a generation.
      add_bos: whether the model expects every text to start with BOS (`encode` does not add it).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
        stop_ids: Sequence[int] = (),
        add_bos: bool = False,
    ):
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id if pad_id is not None else eos_id if eos_id is not None else 0
        self.chat_template = chat_template
        self.add_bos = add_bos and bos_id is not None
        self.stop_ids = tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *stop_ids]))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`: no BOS or EOS is added, special tokens written in it are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts, in parallel."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of each token of ``encode(text)``."""
        return self.backend.encode(text, add_special_tokens=False).offsets

    def token_to_id(self, token: str) -> int | None:
        """Id of one token's own string, or None."""
        return self.backend.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """A token's own string, or None."""
        return self.backend.id_to_token(int(index))

    def token_bytes(self, index: int) -> bytes:
        """UTF-8 bytes that a token stands for, which may be a part of a character; b'' of none.

        Example:
          >>> ByteTokenizer().token_bytes(195)
          b'\\xc3'
        """
        if (token := self.id_to_token(index)) is None:
            return b""
        if index in self._added:
            return token.encode()
        if "ByteLevel" in self._undone and all(c in _BYTES for c in token):
            return bytes(_BYTES[c] for c in token)
        if "ByteFallback" in self._undone:
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()
        return self.decode([index], skip_special=False).encode()

    @functools.cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    @functools.cached_property
    def _undone(self) -> frozenset[str]:
        """Kinds of the steps from tokens' strings to text."""
        decoder = json.loads(self.backend.to_str())["decoder"] or {}
        return frozenset(step["type"] for step in (decoder, *decoder.get("decoders", ())) if step)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included (a model's table may have more rows)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of everything that decides ids and chat text."""
        state = [self.backend.to_str(), self.bos_id, self.eos_id, self.pad_id, self.chat_template]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def apply_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Text of a conversation in the model's own format.

        Args:
          messages: ``{'role': 'system' | 'user' | 'assistant', 'content': str}`` each.
          add_generation_prompt: end with the start of the assistant's turn.

        Raises:
          BackboneError: the model has no chat template, or the template refuses the messages.
        """
        if not self.chat_template:
            raise BackboneError(
                "This model has no chat template; prompt it with plain text instead."
            )
        try:
            return _template(self.chat_template).render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token="" if self.bos_id is None else self.id_to_token(self.bos_id),
                eos_token="" if self.eos_id is None else self.id_to_token(self.eos_id),
            )
        except jinja2.TemplateError as error:
            raise BackboneError(
                f"The model's chat template refuses these messages: {error}."
            ) from error

    def save(self, directory: str | Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which transformers reads too."""
        directory = Path(directory)
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.add_bos:
            bos = self.id_to_token(self.bos_id)
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
            )
        backend.save(str(directory / "tokenizer.json"))
        special = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        config: dict[str, Any] = {
            key: self.id_to_token(index) for key, index in special.items() if index is not None
        }
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.chat_template:
            config["chat_template"] = self.chat_template
        (directory / "tokenizer_config.json").write_text(
            json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], where: str = "GGUF") -> Tokenizer:
        """Builds the tokenizer from a GGUF file's ``tokenizer.*`` fields."""

        def special(name: str) -> int | None:
            value = fields.get(f"tokenizer.ggml.{name}_token_id")
            return None if value is None else int(value)

        backend = vocabularies.from_gguf(fields, where)
        stops = [special(name) for name in ("eot", "eom")]
        # llama.cpp's defaults for files without the field
        sentencepiece = fields.get("tokenizer.ggml.model") == "llama"
        llama3 = fields.get("tokenizer.ggml.pre") in vocabularies.LLAMA3_NAMES
        add_bos = fields.get("tokenizer.ggml.add_bos_token", sentencepiece or llama3)
        return cls(
            backend,
            bos_id=special("bos"),
            eos_id=special("eos"),
            pad_id=special("padding"),
            chat_template=fields.get("tokenizer.chat_template"),
            stop_ids=[s for s in stops if s is not None],
            add_bos=bool(add_bos),
        )

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Reads ``tokenizer.json`` with the special tokens of the configs beside it."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BackboneError(
                f"{directory}: no tokenizer.json; save one there with transformers' "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…)."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BackboneError(f"{path}: cannot read it as a tokenizer ({error}).") from error
        try:
            return cls._with_specials(backend, directory)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise BackboneError(
                f"{directory}: a field of tokenizer_config.json, config.json or "
                f"generation_config.json is wrong ({reason})."
            ) from error

    @classmethod
    def _with_specials(cls, backend: tokenizers.Tokenizer, directory: Path) -> Tokenizer:
        """The tokenizer with what the configs beside it say of special tokens and chats."""
        tok = _read_json(directory / "tokenizer_config.json")
        model = _read_json(directory / "config.json")
        generation = _read_json(directory / "generation_config.json")

        def special(name: str) -> int | None:
            token = tok.get(f"{name}_token")
            token = token.get("content") if isinstance(token, Mapping) else token
            if token is not None and (index := backend.token_to_id(token)) is not None:
                return index
            return next(iter(ids(model.get(f"{name}_token_id"))), None)

        def ids(value: Any) -> list[int]:
            listed = value if isinstance(value, list) else [value]
            return [int(index) for index in listed if index is not None]

        chat = tok.get("chat_template")
        if isinstance(chat, list):
            chat = next((c["template"] for c in chat if c.get("name") == "default"), None)
        if chat is None and (directory / "chat_template.jinja").is_file():
            chat = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        if not isinstance(chat, str | None):
            raise TypeError(f"chat_template is {type(chat).__name__}, a text is needed")
        bos_id = special("bos")
        return cls(
            backend,
            bos_id=bos_id,
            eos_id=special("eos"),
            pad_id=special("pad"),
            chat_template=chat,
            # tokenizer.json's post-processor says whether texts start with BOS.
            add_bos=bos_id is not None and bos_id in backend.encode("a").ids[:1],
            stop_ids=ids(generation.get("eos_token_id")) + ids(model.get("eos_token_id")),
        )

    @classmethod
    def from_llama2c(cls, path: str | Path, vocab_size: int) -> Tokenizer:
        """Reads a llama2.c vocabulary (``tok512.bin``)."""
        return cls(vocabularies.from_llama2c(path, vocab_size), bos_id=1, eos_id=2, add_bos=True)


class ByteTokenizer(Tokenizer):
    """Ids 0–255 are UTF-8 bytes; special tokens follow, so no text is ever unknown.

    Args:
      special: strings of the tokens from id 256 on; the first three are BOS, EOS and padding.

    Example:
      >>> ByteTokenizer().encode('hé')
      [104, 195, 169]
    """

    def __init__(self, special: Sequence[str] = ("<|bos|>", "<|eos|>", "<|pad|>")):
        backend = vocabularies.of_bytes(special)
        ids = [backend.token_to_id(s) for s in special[:3]] + [None] * 3
        super().__init__(backend, bos_id=ids[0], eos_id=ids[1], pad_id=ids[2])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(tree, dict):
        raise BackboneError(f"{path}: a JSON object is needed, found {type(tree).__name__}.")
    return tree


@functools.lru_cache(maxsize=16)
def _template(source: str) -> jinja2.Template:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # As transformers renders them: sandboxed, since a template comes with the weights.
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env.from_string(source)
