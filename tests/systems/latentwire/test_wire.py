"""The wire as bytes: exact round trips, exact sizes, and refusal of everything else."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.backbones.tokenizer import ByteTokenizer
from latent_jax.core.errors import CheckpointError, ConfigError, DataError, WireError
from latent_jax.ops.wire import FORMATS, round_trip, sizes
from latent_jax.systems.latentwire import baselines, suite
from latent_jax.systems.latentwire import wire as files
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.assets import CENTRE, save_centre, save_compressor
from latent_jax.systems.latentwire.baselines import encode
from latent_jax.systems.latentwire.bits import Memory, Rounded, report
from latent_jax.systems.latentwire.config import EncoderConfig, EvalConfig, ModelConfig
from latent_jax.systems.latentwire.model import Compressor, num_latents
from latent_jax.systems.latentwire.prompts import PromptBuilder, PromptConfig

READER = tiny_config("llama", vocab_size=300)
CONFIG = ModelConfig(ratio=4, segment=8, encoder=EncoderConfig(lora_rank=2))
TEXTS = ["abcdefghijklmnopqr", "xyz", "12345678"]


@functools.cache
def compressor(seed=1, name="tiny-4x", slots="memory", family="llama"):
    reader = tiny_config(family, vocab_size=300)
    params = random_params(reader, jax.random.key(0))
    digest = f"{family:x<64}"
    backbone = Backbone("r-" + family, reader, params, ByteTokenizer(), digest, Decoder(reader))
    config = dataclasses.replace(CONFIG, encoder=EncoderConfig(lora_rank=2, slots=slots))
    model, ids = Compressor(config, reader), np.zeros((1, 8), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), params, ids, ids == 0)["params"]
    draw = np.random.default_rng(seed).standard_normal
    weights = jax.tree.map(lambda s: 0.1 * draw(s.shape).astype(np.float32), shapes)
    builder = PromptBuilder(backbone.tokenizer, PromptConfig())
    return LatentWire(backbone, config, weights, builder, ("reconstruct",), name)


@functools.cache
def message():
    return compressor().compress(TEXTS)


def real(z):
    return np.asarray(z.z)[np.asarray(z.mask)]


@pytest.mark.parametrize("bits", FORMATS)
def test_bytes_give_back_what_the_format_can_hold(bits):
    z = message()
    back = compressor().unpack(z.pack(bits))
    expected = round_trip(jnp.asarray(real(z)), bits)
    np.testing.assert_array_equal(real(back), expected)
    for name in ("mask", "length"):
        np.testing.assert_array_equal(getattr(back, name), getattr(z, name))
    np.testing.assert_array_equal(back.positions[back.mask], z.positions[z.mask])
    assert back.bits == bits and back.latents == [5, 1, 2] and len(back) == 3
    assert (back.ratio, back.segment, back.origin) == (4, 8, compressor().origin)


@pytest.mark.parametrize("bits", FORMATS)
def test_every_byte_is_accounted_for(bits, tmp_path):
    z = message()
    parts = z.save(tmp_path / "z", bits)
    assert parts.total == (tmp_path / "z").stat().st_size == len(z.pack(bits))
    assert parts[1:] == sizes(8, z.z.shape[-1], bits)
    assert z.size(bits) == parts
    header, again = files.read_header(z.pack(bits))
    assert again == parts and header.lengths == (18, 3, 8) and header.positions is None
    # A text less is its payload less, to the byte.
    assert z[0].size("fp32").payload == 5 * z.z.shape[-1] * 4


def test_what_is_read_back_says_the_same():
    z, wire = message(), compressor()
    back = wire.unpack(z.pack("fp32"))
    assert wire.rebuild_ids(back) == wire.rebuild_ids(z)
    assert wire.answer(back, "why?", 3) == wire.answer(z, "why?", 3)


def test_other_positions_travel_too():
    z = message()
    moved = dataclasses.replace(z, wire=z.wire._replace(positions=z.wire.positions + 7))
    data = moved.pack("int8")
    assert files.read_header(data)[0].positions is not None
    back = compressor().unpack(data)
    np.testing.assert_array_equal(back.positions[back.mask], moved.positions[moved.mask])


@settings(max_examples=200)
@given(st.data())
def test_any_flipped_bit_and_any_cut_is_refused(data):
    sent = sent_bytes()
    place = data.draw(st.integers(0, len(sent) * 8 - 1))
    flipped = bytearray(sent)
    flipped[place // 8] ^= 1 << place % 8
    with pytest.raises(WireError):
        files.read_header(bytes(flipped))
    with pytest.raises(WireError):
        files.read_header(sent[: place // 8])


@functools.cache
def sent_bytes():
    return message().pack("int6")


def reheaded(change):
    """The same wire with another header and a right checksum, as a malicious sender would."""
    data = message().pack("int8")
    start = len(files.SIGNATURE) + files._PREAMBLE.size
    length = files._PREAMBLE.unpack_from(data, len(files.SIGNATURE))[1]
    header = json.loads(data[start : start + length])
    change(header)
    text = json.dumps(header).encode()
    made = files.SIGNATURE + files._PREAMBLE.pack(1, len(text)) + text
    made += data[start + length : -files._CHECKSUM]
    return made + files._digest(made)


BAD = {
    "foreign": (lambda: b"PK\x03\x04" + b"x" * 100, "not a stored wire"),
    "empty": (lambda: b"", "not a stored wire"),
    "cut": (lambda: sent_bytes()[:20], "cut off after 20 bytes"),
    "damaged": (lambda: sent_bytes()[:-1] + b"!", "damaged"),
    "version": (lambda: sent_bytes().replace(b"\r\n\x01\0", b"\r\n\x07\0", 1), "version 7"),
    "no format": (lambda: reheaded(lambda h: h.update(form="int3")), "header makes no sense"),
    "unknown": (lambda: reheaded(lambda h: h.update(extra=1)), "header makes no sense"),
    "missing": (lambda: reheaded(lambda h: h.pop("latents")), "header makes no sense"),
    "counts": (lambda: reheaded(lambda h: h.update(lengths=[18, 3])), "do not match"),
    "M": (lambda: reheaded(lambda h: h.update(latents=[4, 2, 2])), "do not match"),
    "too big": (lambda: reheaded(lambda h: h.update(width=10**9)), "header announces"),
    "no centre": (lambda: reheaded(lambda h: h.update(centred=True)), "needs the centre"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_bytes_are_one_clear_line(case):
    make, line = BAD[case]
    with pytest.raises(WireError, match=line) as caught:
        compressor().unpack(make(), "some.wire")
    assert str(caught.value).startswith("some.wire: ") and "\n" not in str(caught.value)


def test_another_encoders_wire_is_refused():
    data = message().pack("int8")
    with pytest.raises(WireError, match="another version of tiny-4x"):
        compressor(seed=2).unpack(data)
    with pytest.raises(WireError, match="made by the encoder tiny-4x .* load tiny-4x"):
        compressor(seed=2, name="other").unpack(data)
    with pytest.raises(WireError, match=r"r-qwen2 \(qwen2\) has no adapter"):
        compressor(family="qwen2").unpack(data)
    with pytest.raises(WireError, match="another version"):
        compressor(seed=2).answer(message(), "?")
    with pytest.raises(WireError, match="no such file|No such file"):
        compressor().open("nowhere.wire")


def test_numbers_that_do_not_fit_are_refused():
    z = message()
    large = dataclasses.replace(z, wire=z.wire._replace(z=z.wire.z.at[0, 0, 0].set(1e5)))
    with pytest.raises(WireError, match="fp16 cannot hold; use bf16"):
        large.pack("fp16")
    np.testing.assert_allclose(real(compressor().unpack(large.pack("int8")))[0, 0], 1e5, rtol=1e-2)
    broken = dataclasses.replace(z, wire=z.wire._replace(z=z.wire.z.at[0, 0, 0].set(jnp.nan)))
    with pytest.raises(WireError, match="not finite"):
        broken.pack("int8")
    with pytest.raises(WireError, match="no wire format 'int5'; known: fp32"):
        z.pack("int5")


def test_the_encoder_is_known_by_all_that_makes_its_latents(tmp_path):
    wire = compressor()
    save_compressor(tmp_path, wire.params, CONFIG, wire.backbone, wire.tasks, {})
    loaded = LatentWire.load(tmp_path, wire.backbone)
    assert loaded.origin.encoder_sha256 == wire.origin.encoder_sha256
    other = dataclasses.replace(wire, config=dataclasses.replace(CONFIG, sink=False))
    again = dataclasses.replace(wire, config=dataclasses.replace(CONFIG, remat=True))
    centred = wire.fit_centre(TEXTS)
    assert other.origin.encoder_sha256 != wire.origin.encoder_sha256
    assert again.origin.encoder_sha256 == wire.origin.encoder_sha256
    assert centred.origin.encoder_sha256 != wire.origin.encoder_sha256
    save_centre(tmp_path, centred.centre, "three texts")
    loaded = LatentWire.load(tmp_path, wire.backbone)
    assert loaded.origin.encoder_sha256 == centred.origin.encoder_sha256
    (tmp_path / CENTRE).write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="not a readable centre"):
        LatentWire.load(tmp_path, wire.backbone)


def test_the_centre_is_the_mean_and_few_bits_go_further_with_it():
    wire = compressor()
    centred = wire.fit_centre(TEXTS, batch_size=2)
    np.testing.assert_allclose(centred.centre, real(message()).mean(0), atol=1e-5)
    plain, sent = message(), centred.compress(TEXTS)
    error = [
        np.abs(real(w.unpack(z.pack("int4"))) - real(plain)).mean()
        for w, z in ((wire, plain), (centred, sent))
    ]
    assert error[1] < error[0]
    np.testing.assert_array_equal(real(centred.unpack(sent.pack("fp32"))), real(plain))
    assert sent.size("int4")[1:] == plain.size("int4")[1:]


def test_the_evaluation_rounds_as_the_wire_does():
    wire = compressor().fit_centre(TEXTS)
    z = wire.compress(TEXTS)
    ids, mask = wire._padded(TEXTS)
    for form in ("int4", "bf16"):
        rounded = Rounded(wire.latents, jnp.asarray(wire.centre), form)
        seen = encode(rounded, jnp.asarray(ids), jnp.asarray(mask))
        np.testing.assert_allclose(real(seen), real(wire.unpack(z.pack(form))), atol=1e-6)


def test_texts_are_encoded_once_for_all_formats(monkeypatch):
    wire, made, real_encode = compressor(), [], baselines._encode
    ids, mask = wire._padded(TEXTS)

    def counted(*args):
        made.append(len(args))
        return real_encode(*args)

    monkeypatch.setattr(baselines, "_encode", counted)
    memory = Memory()
    for form in ("fp32", "int4", "int8"):
        for _ in range(2):
            seen = encode(Rounded(wire.latents, None, form, memory), ids, mask)
        want = round_trip(jnp.asarray(encode(wire.latents, ids, mask).z), form)
        np.testing.assert_allclose(seen.z, want, atol=1e-6)
    assert len(made) == 1 + 3  # and the three that were wanted
    other = encode(Rounded(wire.latents, None, "fp32", memory), ids[:, ::-1].copy(), mask)
    assert len(made) == 5 and not np.allclose(other.z, memory.encode(wire.latents, ids, mask).z)


def test_what_is_known_is_not_evaluated_again(monkeypatch):
    """The latents as they are have been scored before the formats are."""
    scored = []

    def score(system, wire, sent, rebuilds, progress):
        scored.append(sent.form)
        return {"squad.f1.latent": 0.5, "squad.ratio": 4.0}, [0.5, 0.5]

    monkeypatch.setattr(suite, "_scored", score)
    run = types.SimpleNamespace(
        model=CONFIG, seed=0, eval=EvalConfig(segments=0, questions=2, wire_bits=("fp32", "int4"))
    )
    system = types.SimpleNamespace(config=run, centre=lambda latents: None)
    exact = {"squad.f1.latent": 0.75, "squad.ratio": 4.0}, [1.0, 0.5]
    out = suite.quality_against_bits(system, compressor(), exact)
    assert scored == ["int4"] and out["wire.fp32.f1"] == 0.75
    assert out["wire.fp32.f1_loss"] == 0 and out["wire.int4.f1_loss"] == 0.25
    again = suite.quality_against_bits(system, compressor())
    assert scored == ["int4", "fp32", "int4"] and again["wire.int4.f1_loss"] == 0


def test_scores_against_bits():
    found = {"squad.f1.latent": 0.4, "squad.f1.latent.ci95": [0.1, 0.7], "ae.nll": 2.0}
    scores = {"fp32": (found, [1.0, 0.0, 0.5]), "int4": (found | {"ae.nll": 3.0}, [1.0, 0.0, 0.2])}
    out = report(100, 4.0, scores, [1.0, 0.0, 0.5])
    assert out["wire.fp32.bytes_per_token"] == 100 and out["wire.int4.bytes_per_token"] == 54 / 4
    assert out["wire.int4.nll"] == 3.0 and out["wire.int4.f1.ci95"] == [0.1, 0.7]
    assert out["wire.fp32.f1_loss"] == 0 and out["wire.int4.f1_loss"] == pytest.approx(0.1)
    low, high = out["wire.int4.f1_loss.ci95"]
    assert low <= 0.1 <= high


@pytest.mark.parametrize("ratio", [2, 8])
def test_ratio_is_honoured_exactly(ratio):
    z = compressor().compress(TEXTS, ratio=ratio)
    assert z.latents == [num_latents(len(t), ratio) for t in TEXTS] and z.ratio == ratio
    back = compressor().unpack(z.pack("fp32"))
    assert back.latents == z.latents and back.ratio == ratio
    np.testing.assert_array_equal(back.positions[back.mask], z.positions[z.mask])


def test_places_are_those_of_the_compressor():
    config = dataclasses.replace(CONFIG, ratio=2.5)
    made = dataclasses.replace(compressor(), config=config).encode(TEXTS)
    mask, positions = files.places([18, 3, 8], 24, 2.5, 8)
    np.testing.assert_array_equal(mask, made.mask)
    np.testing.assert_array_equal(positions, made.positions)


def test_ratios_that_cannot_be_honoured_state_what_is_possible():
    with pytest.raises(DataError, match="18 tokens become 7 latents .* and not 6"):
        compressor().compress(TEXTS, ratio=3)
    with pytest.raises(DataError, match=r"trained at 4 tokens per latent \(M = ceil"):
        compressor(slots="both").compress(TEXTS, ratio=8)
    with pytest.raises(DataError, match="at least 1 token"):
        compressor().compress(TEXTS, ratio=0.5)
    assert compressor(slots="both").compress(TEXTS, ratio=4).latents == [5, 1, 2]


def test_unknown_formats_are_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="wire_bits: unknown .'int5'.; allowed: fp32"):
        EvalConfig(wire_bits=("int8", "int5")).validate()


def test_questions_are_paired_with_texts():
    wire, z = compressor(), message()
    several = wire.answer(z[0], ["why?", "who?", "when?"], 2)
    assert several == [wire.answer(z[0], q, 2)[0] for q in ("why?", "who?", "when?")]
    with pytest.raises(DataError, match="2 questions about 3 texts"):
        wire.answer(z, ["why?", "who?"])
    with pytest.raises(DataError, match="no text"):
        wire.compress([])


def test_what_is_no_compressor_is_said(tmp_path):
    message().save(tmp_path / "z.wire")
    with pytest.raises(CheckpointError, match="is a stored wire"):
        LatentWire.load(tmp_path / "z.wire")


@pytest.mark.slow
def test_another_process_reads_it(tmp_path):
    """With the packaged tiny reader: one process writes, another, started anew, says the same."""
    from latent_jax import backbones

    reader = backbones.load("tiny")
    config = dataclasses.replace(CONFIG, segment=16)
    model, ids = Compressor(config, reader.config), np.zeros((1, 16), np.int32)
    weights = jax.jit(model.init)(jax.random.key(0), reader.params, ids, ids == 0)["params"]
    save_compressor(tmp_path / "c", weights, config, reader, ("reconstruct",), {})
    wire = LatentWire.load(tmp_path / "c")
    z = wire.compress("The mill at Dunmore burned down.")
    z.save(tmp_path / "z", "int8")
    code = (
        "import sys; from latent_jax import LatentWire\n"
        "wire = LatentWire.load(sys.argv[1]); print(wire.rebuild_ids(wire.open(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c"), str(tmp_path / "z")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == wire.rebuild_ids(wire.open(tmp_path / "z"))
