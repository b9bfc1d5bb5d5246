"""Residual VQ on the wire: codebooks that train beside the parameters, digits that are stored."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError, WireError
from latent_jax.systems.latentwire import codes, suite
from latent_jax.systems.latentwire import wire as files
from latent_jax.systems.latentwire.api import LatentWire
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.system import LatentWireSystem

RUN = {
    "system": "latentwire",
    "model": {"segment": 16, "ratio": 4, "encoder": {"slots": "pooled"},
              "wire": {"d_z": 6, "codes": 5, "stages": 3}},
    "data": {"text": "pydoc", "qa": "lookup", "length": 16, "max_context": 128, "max_prompt": 64,
             "segments": 40, "questions": 20, "mix": {"reconstruct": 1.0}},
    "eval": {"segments": 4, "quick_segments": 4},
    "train": {"steps": 6, "batch_size": 8},
}  # fmt: skip
TEXTS = ["a mill at Dunmore burned down in 1911", "short", "exactly sixteen!"]


@pytest.fixture(scope="module")
def system():
    return LatentWireSystem(parse(LatentWireRun, RUN), byte_reader())


@pytest.fixture(scope="module")
def batches(system):
    stream = system.train_data("main", None)
    return [jax.tree.map(jnp.asarray, next(stream)) for _ in range(4)]


@pytest.fixture(scope="module")
def fresh(system, batches):
    return system.init({"params": jax.random.key(1)}, batches[0])


@pytest.fixture(scope="module")
def steps(system, batches, fresh):
    """Variables after each of some steps that move nothing but the codebooks, and what was told."""

    @jax.jit
    def step(variables, batch):
        rngs = {"corrupt": jax.random.key(0)}
        terms, moved, aux = system.loss_terms(variables, system.frozen, batch, rngs, True)
        return {**variables, **moved}, terms, aux

    rows, variables = [], fresh
    for batch in batches:
        variables, terms, aux = step(variables, batch)
        rows.append((variables, terms, aux))
    return rows


@pytest.fixture(scope="module")
def wire(system, steps):
    return system.wire(steps[-1][0], system.frozen)


def real(z):
    return np.asarray(z.z)[np.asarray(z.mask)]


def test_codebooks_are_a_collection_that_one_stage_a_step_fills(system, fresh, steps):
    assert set(fresh) == {"params", "codebook"} and "codebook" not in fresh["params"]
    ready = [v["codebook"]["rvq"]["ready"][0].tolist() for v, _, _ in ((fresh, 0, 0), *steps)]
    assert [sum(r) for r in ready] == [0, 1, 2, 3, 3]
    left = [float(aux["wire_error"].value) for _, _, aux in steps]
    assert left[2] < left[0] < 1
    assert 1 < float(steps[-1][2]["codes_used"]) <= 5


def test_evaluation_leaves_codebooks_alone(system, batches, steps):
    variables = steps[-1][0]
    terms, moved, aux = system.loss_terms(variables, system.frozen, batches[0], {}, False)
    assert moved == {} and "commitment" not in terms and "wire_error" not in aux
    assert np.isfinite(system.quick_eval(variables, system.frozen)["reconstruct"])


def test_the_commitment_pulls_on_the_encoder_and_the_task_goes_straight_through(
    system, batches, steps
):
    variables = steps[-1][0]

    def loss(params, name):
        rngs = {"corrupt": jax.random.key(0)}
        whole = {**variables, "params": params}
        return system.loss_terms(whole, system.frozen, batches[0], rngs, True)[0][name].value

    def reached(name):
        flat = jax.grad(loss)(variables["params"], name)
        return {k for k, g in flat.items() if any(jnp.abs(x).max() > 0 for x in jax.tree.leaves(g))}

    assert {"pool", "down"} <= reached("commitment") and "up" not in reached("commitment")
    assert {"pool", "down", "up", "tasks"} <= reached("reconstruct")


def test_latents_are_sums_of_codes_and_padding_is_none(wire):
    z = wire.compress(TEXTS)
    digits = np.asarray(z.wire.digits)
    assert digits.shape == (*z.mask.shape, 3)
    assert digits[np.asarray(z.mask)].min() >= 0 and digits.max() < 5
    assert (digits[~np.asarray(z.mask)] == -1).all()
    code = np.asarray(wire.params["codebook"]["rvq"]["code"])[0]
    rows = digits[np.asarray(z.mask)]
    expected = sum(code[s][rows[:, s]] for s in range(3))
    np.testing.assert_allclose(real(z), expected, atol=1e-5)
    # A text alone is coded as in company.
    one = wire.compress(TEXTS[1])
    np.testing.assert_array_equal(
        one.wire.digits[np.asarray(one.mask)], digits[1][np.asarray(z.mask)[1]]
    )


def test_training_and_evaluation_see_the_same_latents(system, wire, batches, steps):
    variables, batch = steps[-1][0], batches[0]
    args = system.frozen["reader"], batch["context"], batch["context_mask"]
    run = lambda train: system.model.apply(variables, *args, train, method="compress")  # noqa: E731
    trained, evaluated = run(True), run(False)
    np.testing.assert_array_equal(trained.digits, evaluated.digits)
    np.testing.assert_allclose(trained.z, evaluated.z, atol=1e-5)


def test_digits_travel_exactly_and_in_few_bytes(wire, tmp_path):
    z = wire.compress(TEXTS)
    data, latents = z.pack("codes"), sum(z.latents)
    parts = z.save(tmp_path / "z", "codes")
    assert parts.total == len(data) == (tmp_path / "z").stat().st_size
    assert parts.scales == 0 and parts.payload == -(-latents * 3 * 3 // 8)  # 3 bits for 5 codes
    assert parts.payload < z.size("int4").payload
    back = wire.open(tmp_path / "z")
    np.testing.assert_array_equal(real(back), real(z))
    np.testing.assert_array_equal(back.wire.digits, z.wire.digits)
    assert back.bits == "codes" and wire.rebuild_ids(back) == wire.rebuild_ids(z)
    assert back.pack("codes") == data  # it can be sent on
    np.testing.assert_allclose(real(wire.unpack(z.pack("int8"))), real(z), atol=0.1)


def test_what_has_no_codes_cannot_send_any_and_others_cannot_read_them(wire, system, fresh):
    z = wire.compress(TEXTS)
    bare = dataclasses.replace(z, wire=z.wire._replace(digits=None))
    with pytest.raises(WireError, match="not made of codes"):
        bare.pack("codes")
    with pytest.raises(WireError, match="no wire format 'int5'; known: .*codes"):
        z.pack("int5")
    untrained = system.wire(fresh, system.frozen)
    with pytest.raises(WireError, match="never saw a text"):
        untrained.compress(TEXTS).pack("codes")
    with pytest.raises(WireError, match="made by another"):  # other codebooks are another encoder
        untrained.unpack(z.pack("codes"))
    header = files.read_header(z.pack("codes"))[0]
    assert (header.codes, header.digits, header.form) == (5, 3, "codes")
    assert "codes" not in str(files.read_header(z.pack("fp32"))[0].form)


def test_levels_travel_as_digits_too(batches):
    model = {**RUN["model"], "wire": {"d_z": 6, "levels": 7}}
    system = LatentWireSystem(parse(LatentWireRun, {**RUN, "model": model}), byte_reader())
    variables = system.init({"params": jax.random.key(1)}, batches[0])
    assert set(variables) == {"params"}
    wire = system.wire(variables, system.frozen)
    z = wire.compress(TEXTS)
    back = wire.unpack(z.pack("codes"))
    np.testing.assert_array_equal(real(back), real(z))
    assert z.size("codes").payload == -(-sum(z.latents) * 6 * 3 // 8)
    # Exactly what is sent, with the gradient of what was rounded.
    args = system.frozen["reader"], batches[0]["context"], batches[0]["context_mask"]

    def size(params):
        return jnp.square(system.model.apply({"params": params}, *args, method="compress").z).sum()

    assert float(jnp.abs(jax.grad(size)(variables["params"])["down"]).max()) > 0


def test_digits_are_packed_to_the_bit():
    rng = np.random.default_rng(0)
    for size in (2, 5, 256, 1024, 4097):
        digits = rng.integers(0, size, 37)
        data = codes.pack_digits(digits, size)
        assert len(data) == codes.digit_bytes(37, size) == -(-37 * codes.bits(size) // 8)
        np.testing.assert_array_equal(codes.unpack_digits(data, 37, size), digits)
    with pytest.raises(ValueError, match="digit 7 where there are 5 codes"):
        codes.unpack_digits(codes.pack_digits(np.array([7]), 8), 1, 5)
    with pytest.raises(ValueError, match="2 bytes are not 1 digits"):
        codes.unpack_digits(b"ab", 1, 5)


def test_an_exported_compressor_writes_the_same_codes(system, steps, wire, tmp_path):
    out = tmp_path / "made"
    system.export(steps[-1][0], system.frozen, str(out))
    loaded = LatentWire.load(out, system.backbone)
    z, theirs = wire.compress(TEXTS), loaded.compress(TEXTS)
    np.testing.assert_array_equal(theirs.wire.digits, z.wire.digits)
    np.testing.assert_array_equal(real(theirs), real(z))
    cost = suite.wire_cost(loaded)
    assert cost["wire.bits_per_token"] == pytest.approx(3 * np.log2(5) / 4)


@pytest.mark.parametrize(
    "wire", [{"codes": 1, "d_z": 4}, {"codes": 8}, {"codes": 8, "d_z": 4, "levels": 5}]
)
def test_codes_need_a_width_and_stand_alone(wire):
    with pytest.raises(ConfigError, match="use 2 or more .* with wire.d_z and levels=0"):
        parse(ModelConfig, {"wire": wire})
