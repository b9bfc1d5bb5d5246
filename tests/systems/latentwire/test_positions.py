"""Where the reader finds latents: in the middle of their spans, or numbered."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax.backbones.decoder import inverse_frequencies
from latent_jax.backbones.testing import byte_reader
from latent_jax.core.config import parse
from latent_jax.core.errors import ConfigError
from latent_jax.core.fields import to_dict
from latent_jax.systems.latentwire.config import LatentWireRun, ModelConfig
from latent_jax.systems.latentwire.first_shape import as_first
from latent_jax.systems.latentwire.latents import flatten_kv
from latent_jax.systems.latentwire.model import Compressor
from latent_jax.systems.latentwire.readers import ReaderAdapter
from latent_jax.systems.latentwire.reconstruct import evaluate_ae
from latent_jax.systems.latentwire.system import LatentWireSystem

READER = byte_reader(2)
ORDINAL = {"positions": "ordinal"}
# Two whole segments, one and a part of a span, and three tokens.
LENGTHS = jnp.array([16, 10, 3])


def prefixes(adapter, ratio=4.0, **changes):
    """What is made of one wire with the latents in their spans, and numbered."""
    rng, found = np.random.default_rng(0), []
    ids = jnp.asarray(rng.integers(3, 200, (3, 16)), jnp.int32)
    mask = jnp.arange(16) < LENGTHS[:, None]
    encoder = {"slots": "pooled"}
    for places in ({}, ORDINAL):
        shape = {"segment": 8, "ratio": ratio, "encoder": encoder, **changes}
        model = Compressor(
            parse(ModelConfig, {**shape, "adapter": {**adapter, **places}}), READER.config, sink=1
        )
        params = jax.jit(model.init)(jax.random.key(1), READER.params, ids, mask)
        wire = model.apply(params, READER.params, ids, mask, method="compress")
        found.append(model.apply(params, wire, frozen=READER.params, method="prefix"))
        found.append(wire)
    np.testing.assert_array_equal(found[1].positions, found[3].positions)  # the wire is the same
    np.testing.assert_array_equal(found[1].z, found[3].z)
    return found[0], found[2], found[1]


def raw(prefix):
    """Keys before rotation, and values."""
    return flatten_kv(prefix.kv, inverse_frequencies(READER.config), prefix.positions)


def test_latents_are_numbered_and_the_prompt_follows():
    span, ordinal, wire = prefixes({})
    np.testing.assert_array_equal(wire.positions[0], [1, 5, 9, 13])
    np.testing.assert_array_equal(wire.mask, [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(ordinal.positions[0], [0, 1, 2, 3])
    np.testing.assert_array_equal(ordinal.positions[1, :3], [0, 1, 2])
    assert ordinal.start.tolist() == [4, 4, 2] and span.start.tolist() == [16, 16, 8]
    # Keys are turned to where they stand, and are else the same.
    assert float(jnp.abs(ordinal.kv.k - span.kv.k)[:, :, 1].max()) > 1e-2
    np.testing.assert_allclose(raw(ordinal), raw(span), atol=1e-5)
    _, ordinal, _ = prefixes({}, follow="text")
    assert ordinal.start.tolist() == [4, 3, 1]


def test_at_one_token_per_latent_both_are_the_same():
    span, ordinal, _ = prefixes({}, ratio=1.0)
    jax.tree.map(np.testing.assert_array_equal, span.start, ordinal.start)
    real = np.asarray(span.mask)
    np.testing.assert_array_equal(span.kv.k[:, real], ordinal.kv.k[:, real])


def test_every_entry_of_a_latent_has_a_number_of_its_own():
    soft = {"kind": "soft", "entries": 2}
    _, ordinal, _ = prefixes(soft, wire={"d_z": 6})
    np.testing.assert_array_equal(ordinal.positions[0], np.arange(8))
    assert ordinal.start.tolist() == [8, 8, 4]
    _, ordinal, _ = prefixes({"kind": "cross", "depths": [1]})
    np.testing.assert_array_equal(ordinal.positions[0], np.arange(4))


def test_private_latents_are_numbered_with_the_others():
    _, ordinal, wire = prefixes({}, private=1, encoder={"slots": "both", "lora_rank": 2})
    assert ordinal.start.tolist() == [6, 6, 3]
    real = np.asarray(wire.mask)
    for row, places in zip(real, np.asarray(ordinal.positions), strict=True):
        assert places[row].tolist() == list(range(row.sum()))


def test_another_reader_numbers_its_entries():
    def made(places):
        reader = {"name": "tiny", "entries": 3, **places}
        shape = parse(ModelConfig, {"segment": 8, "readers": {"other": reader}})
        adapter = ReaderAdapter(shape, "other", READER.config, 5)
        rng = np.random.default_rng(0)
        _, _, wire = prefixes({})
        wire = wire._replace(z=jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32))
        params = adapter.init(jax.random.key(0), wire)["params"]
        params = {**params, "stretch": jnp.float32(1.5)}
        return adapter.apply({"params": params}, wire, method="prefix")

    span, ordinal = made({}), made(ORDINAL)
    np.testing.assert_array_equal(ordinal.positions[0], np.arange(12))
    assert ordinal.start.tolist() == [12, 12, 6] and span.start.tolist() == [24, 24, 12]
    np.testing.assert_allclose(raw(ordinal), raw(span), atol=1e-5)


def test_evaluation_reads_as_training_did():
    run = {
        "system": "latentwire",
        "model": {"segment": 16, "ratio": 4, "adapter": ORDINAL, "encoder": {"slots": "pooled"}},
        "data": {"text": "pydoc", "length": 16, "segments": 20},
        "eval": {"segments": 4}, "train": {"steps": 2, "batch_size": 2},
    }  # fmt: skip
    system = LatentWireSystem(parse(LatentWireRun, run), READER)
    batch = jax.tree.map(jnp.asarray, next(system.train_data("main", None)))
    params = system.init({"params": jax.random.key(1)}, batch)["params"]
    trained = system.loss_terms({"params": params}, system.frozen, batch, {}, False)[0]
    wire = system.wire({"params": params}, system.frozen)
    found, _ = evaluate_ae(
        wire.backbone, wire.latents, np.asarray(batch["context"]), arms=("latent",), batch_size=2,
        segment=16, sink=wire.sink,
    )  # fmt: skip
    np.testing.assert_allclose(found["ae.nll"], trained["reconstruct"].value, rtol=1e-4)


@pytest.mark.parametrize(
    "encoder, message",
    [
        ({"slots": "heads"}, "rotated to where their tokens stood"),
        ({"slots": "pooled", "carry": 1}, "reads the next segment where its text stands"),
    ],
)
def test_what_stands_where_its_text_stood_is_refused(encoder, message):
    with pytest.raises(ConfigError, match=f"positions=ordinal: .*{message}"):
        parse(ModelConfig, {"encoder": encoder, "adapter": ORDINAL})


def test_older_wires_stay_what_they_were():
    assert "positions" not in as_first(to_dict(ModelConfig()))["adapter"]
    other = parse(ModelConfig, {"adapter": ORDINAL})
    assert as_first(to_dict(other))["adapter"]["positions"] == "ordinal"
