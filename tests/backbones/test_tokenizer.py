"""Tokenizers: GGUF fields, tokenizer.json, llama2.c vocabularies, bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_jax.backbones import ByteTokenizer, Tokenizer
from latent_jax.backbones.readers.gguf_file import GGUFFile
from latent_jax.core.errors import BackboneError

TEXTS = [
    "Hello world",
    "  leading and   many spaces\n\n\tand tabs ",
    "In 2024, 1,234.5 kg cost 99€.",
    "I'll say: don't — naïve café, 東京, Ελλάδα, 🙂👩‍👩‍👧",
    "def f(x):\n    return x**2  # squared\r\n",
    "",
]


@pytest.fixture(scope="module")
def smollm2(smollm2_path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(smollm2_path).metadata)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(smollm2, text):
    ids = smollm2.encode(text)
    assert all(type(i) is int and 0 <= i < 49152 for i in ids)
    assert smollm2.decode(ids) == text


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(text.encode()) == text


def test_specials(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.add_bos) == (1, 2, 2, False)
    assert smollm2.vocab_size == 49152
    assert smollm2.token_to_id("<|im_start|>") == 1
    assert smollm2.token_to_id("no such token") is None
    ids = smollm2.encode("<|im_start|>user")
    assert ids[0] == 1 and len(ids) == 2
    assert smollm2.decode(ids) == "user"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>user"


def test_digits_are_split_one_by_one(smollm2):
    assert [smollm2.id_to_token(i) for i in smollm2.encode("x 2024")] == ["x", "Ġ", *"2024"]


def test_known_ids(smollm2_path, smollm2):
    """Ids that transformers' own GGUF tokenizer gave (see tests/parity/make_golden_logits.py)."""
    golden = Path(__file__).parents[1] / "parity" / "golden_smollm2.npz"
    text = "The capital of France is Paris. The capital of Italy is"
    with np.load(golden) as arrays:
        assert smollm2.encode(text) == arrays["fact/ids"].tolist()


def test_chat(smollm2):
    text = smollm2.apply_chat([{"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    plain = smollm2.apply_chat(own, add_generation_prompt=False)
    assert plain == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_no_chat_template():
    with pytest.raises(BackboneError, match="no chat template"):
        ByteTokenizer().apply_chat([{"role": "user", "content": "Hi"}])


def test_template_that_refuses():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = "{{ raise_exception('only user turns') }}"
    with pytest.raises(BackboneError, match="only user turns"):
        tokenizer.apply_chat([])


def test_template_is_sandboxed():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BackboneError):
        tokenizer.apply_chat([])


def test_saved_tokenizer_reads_back(smollm2, tmp_path):
    smollm2.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert [again.encode(t) for t in TEXTS] == [smollm2.encode(t) for t in TEXTS]
    assert (again.bos_id, again.eos_id, again.pad_id) == (1, 2, 2)
    assert again.chat_template == smollm2.chat_template
    assert again.sha256 == smollm2.sha256


@pytest.mark.parametrize("add_bos", [False, True])
def test_add_bos_survives_saving(tmp_path, add_bos):
    tokenizer = ByteTokenizer()
    tokenizer.add_bos = add_bos
    tokenizer.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert again.add_bos is add_bos
    assert again.encode("ab") == [97, 98]


def test_batch_and_offsets(smollm2):
    assert smollm2.encode_batch(TEXTS) == [smollm2.encode(t) for t in TEXTS]
    text = "Paris is a city"
    pieces = [text[a:b] for a, b in smollm2.offsets(text)]
    assert "".join(pieces) == text and len(pieces) == len(smollm2.encode(text))


def test_agrees_with_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    smollm2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == smollm2.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    chat = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == smollm2.apply_chat(messages)


def sentencepiece_fields(**more):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", "a", "b", "ab", "▁a", "▁ab", "ba"]
    scores = [0.0] * 259 + [-7.0, -6.0, -5.0, -3.0, -2.0, -1.0, -4.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | more


def test_sentencepiece_fields():
    tokenizer = Tokenizer.from_gguf(sentencepiece_fields())
    # best score first: ▁a (-2) before ab (-3), then ▁a + b gives ▁ab (-1)
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("ab ba")] == ["▁ab", "▁", "ba"]
    assert tokenizer.decode(tokenizer.encode("ab ba é🙂")) == "ab ba é🙂"
    assert tokenizer.add_bos and tokenizer.bos_id == 1
    spelled = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode("ab é🙂"))
    assert spelled == " ab é🙂".encode()  # the space that such tokenizers put first
    assert tokenizer.token_bytes(1) == b"<s>" and tokenizer.token_bytes(999) == b""


def test_the_bytes_of_tokens_are_those_of_the_text(smollm2):
    text = "Grüße, 日本語 🦄 a\n<|im_end|>"
    ids = smollm2.encode(text)
    assert b"".join(smollm2.token_bytes(i) for i in ids) == text.encode()
    assert any("\ufffd" in smollm2.decode([i]) for i in ids)  # some are parts of characters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "'rwkv' is not supported"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.merges' is missing"),
        (
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.merges": [],
                "tokenizer.ggml.pre": "odd",
            },
            "pre-tokenizer 'odd' is not supported",
        ),
    ],
)
def test_bad_fields(change, message):
    with pytest.raises(BackboneError, match=message):
        Tokenizer.from_gguf(sentencepiece_fields(**change), "x.gguf")


def test_no_tokenizer_json(tmp_path):
    with pytest.raises(BackboneError, match="no tokenizer.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BackboneError, match="cannot read it as a tokenizer"):
        Tokenizer.from_directory(tmp_path)


def test_llama2c_vocabulary(tmp_path):
    root = os.environ.get("LATENT_JAX_DATA")
    path = Path(root or "") / "models" / "tok512.bin"
    if not root or not path.is_file():
        pytest.skip("needs LATENT_JAX_DATA with models/tok512.bin")
    tokenizer = Tokenizer.from_llama2c(path, 512)
    text = "Once upon a time, Lily saw 3 big dogs. Café 🙂"
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    (tmp_path / "cut.bin").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BackboneError, match="not a llama2.c vocabulary"):
        Tokenizer.from_llama2c(tmp_path / "cut.bin", 512)
