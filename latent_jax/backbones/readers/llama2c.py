"""llama2.c's ``.bin`` checkpoints (version 0, fp32) with the vocabulary beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from latent_jax.backbones.config import DecoderConfig
from latent_jax.backbones.readers import table
from latent_jax.backbones.readers.digest import file_sha256
from latent_jax.backbones.readers.table import Rule
from latent_jax.backbones.tokenizer import Tokenizer
from latent_jax.core.errors import BackboneError

_HEADER_BYTES = 7 * 4
_NEWER_MAGIC = 0x616B3432  # "ak42": llama2.c's versions 1 and 2


def rules() -> list[Rule]:
    """Load table; names are `_layout`'s."""
    layer = r"layers\.(?P<layer>\d+)\."
    return [
        Rule("embed", "embed"),
        Rule("final_norm", "final_norm/scale"),
        Rule("head", "head", transpose=True),
        Rule(layer + "attn_norm", "layers/attn_norm/scale"),
        Rule(layer + "mlp_norm", "layers/mlp_norm/scale"),
        Rule(layer + "q", "layers/q/kernel", True, "num_heads"),
        Rule(layer + "k", "layers/k/kernel", True, "num_kv_heads"),
        *(Rule(layer + n, f"layers/{n}/kernel", True) for n in ("v", "o", "gate", "up", "down")),
    ]


def _layout(c: DecoderConfig) -> list[tuple[str, int, tuple[int, ...]]]:
    """(name, layers or 0, shape of one) in file order."""
    d, f, n = c.hidden_size, c.intermediate_size, c.num_layers
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    rope = (c.max_position, c.head_dim // 2)
    layout = [
        ("embed", 0, (c.vocab_size, d)),
        ("attn_norm", n, (d,)),
        ("q", n, (q, d)),
        ("k", n, (kv, d)),
        ("v", n, (kv, d)),
        ("o", n, (d, q)),
        ("mlp_norm", n, (d,)),
        ("gate", n, (f, d)),
        ("down", n, (d, f)),
        ("up", n, (f, d)),
        ("final_norm", 0, (d,)),
        ("rope_cos", 0, rope),
        ("rope_sin", 0, rope),
    ]
    return layout if c.tie_embeddings else [*layout, ("head", 0, (c.vocab_size, d))]


class Llama2cFile:
    """A memory-mapped llama2.c checkpoint as named tensors.

    Raises:
      BackboneError: the file cannot be read, is another version, or has another length than its
        header says.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            data = np.memmap(self.path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise BackboneError(f"{self.path}: cannot read it as llama2.c ({error}).") from error
        if len(data) < _HEADER_BYTES:
            raise BackboneError(
                f"{self.path}: truncated: {len(data)} bytes hold no llama2.c header."
            )
        header = [int(x) for x in data[:_HEADER_BYTES].view("<i4")]
        if header[0] == _NEWER_MAGIC:
            raise BackboneError(
                f"{self.path}: llama2.c version {header[1]} is not supported; export it as "
                f"version 0."
            )
        dim, hidden, layers, heads, kv_heads, vocab, length = header
        sane = min(dim, hidden, layers, heads, kv_heads, abs(vocab), length) > 0
        if not sane or dim % heads or heads % kv_heads or max(header) > 1 << 24:
            raise BackboneError(f"{self.path}: not a llama2.c checkpoint (header {header}).")
        self.config = DecoderConfig(
            family="llama",
            vocab_size=abs(vocab),
            hidden_size=dim,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim // heads,
            intermediate_size=hidden,
            max_position=length,
            tie_embeddings=vocab > 0,
        )
        layout = _layout(self.config)
        # Before the tensors are listed: a wrong header may name millions of layers.
        floats = sum(max(count, 1) * math.prod(shape) for _, count, shape in layout)
        if (implied := _HEADER_BYTES + 4 * floats) != len(data):
            raise BackboneError(
                f"{self.path}: truncated or damaged: the header implies {implied:,} bytes, the "
                f"file has {len(data):,}."
            )
        self._tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
        at = _HEADER_BYTES
        for name, count, shape in layout:
            for layer in range(max(count, 1)):
                full = f"layers.{layer}.{name}" if count else name
                self._tensors[full] = (at, shape)
                at += 4 * math.prod(shape)
        # The stored rotary tables are recomputed from the config.
        self._tensors.pop("rope_cos")
        self._tensors.pop("rope_sin")
        self._data = data

    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensors[name][1]

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32."""
        at, shape = self._tensors[name]
        return self._data[at : at + 4 * math.prod(shape)].view("<f4").reshape(shape)


def find_vocabulary(path: Path, vocab_size: int) -> Path:
    """The vocabulary beside a checkpoint: ``tok<vocab>.bin`` or ``tokenizer.bin``."""
    for name in (f"tok{vocab_size}.bin", "tokenizer.bin"):
        if (path.parent / name).is_file():
            return path.parent / name
    raise BackboneError(
        f"{path}: no vocabulary beside it; put tok{vocab_size}.bin or tokenizer.bin in "
        f"{path.parent}."
    )


def read(
    path: str | Path, dtype: Any = np.float32, shardings: Any = None
) -> tuple[DecoderConfig, dict[str, Any], Tokenizer, str]:
    """Reads a llama2.c model; see `gguf.read` for arguments and result."""
    file = Llama2cFile(path)
    slots = table.plan(file, rules(), file.config)
    params = table.assemble(file, slots, file.config, dtype, shardings)
    config, tokenizer, sha256 = _outline(file)
    return config, params, tokenizer, sha256


def outline(path: str | Path) -> tuple[DecoderConfig, Tokenizer, str]:
    """`read` without the parameters."""
    return _outline(Llama2cFile(path))


def _outline(file: Llama2cFile) -> tuple[DecoderConfig, Tokenizer, str]:
    vocabulary = find_vocabulary(file.path, file.config.vocab_size)
    tokenizer = Tokenizer.from_llama2c(vocabulary, file.config.vocab_size)
    return file.config, tokenizer, file_sha256(file.path)
