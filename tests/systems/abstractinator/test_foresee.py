"""The Gaussian head of the entropy model, and boundaries from either head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latent_jax import run as runs
from latent_jax.core.errors import ConfigError
from latent_jax.systems.abstractinator import losses
from latent_jax.systems.abstractinator.foresee import Gaussian

TEXT = b"the cat sat on a mat and"
ENTROPY = {"layers": 1, "width": 8, "heads": 2, "ff": 16, "reach": 6, "head": "both"}


def config(tiny, **segments):
    tree = tiny(entropy=dict(ENTROPY), segments={"rule": "entropy", "budget": 24, **segments})
    del tree["byte_lm"]
    tree["level"]["vq"] = {"init": "random"}
    phase = {"name": "entropy", "steps": 1, "data": "entropy", "train": ["entropy"]}
    tree["train"]["phases"] = [phase, *tree["train"]["phases"][:2]]
    tree["train"]["phases"][-1]["steps"] = 0
    return tree


def test_density_and_entropy_are_those_of_a_gaussian():
    rng = np.random.default_rng(0)
    mean, target = rng.normal(size=(2, 1, 3, 5))
    scale = np.exp(rng.normal(size=(1, 3, 5)))
    found = Gaussian(*(jnp.asarray(a, jnp.float32) for a in (mean, scale, target)))
    every = stats.norm(mean, scale)
    np.testing.assert_allclose(found.nats(), -every.logpdf(target).mean(-1), rtol=1e-4)
    np.testing.assert_allclose(found.bits(), every.entropy().mean(-1) / np.log(2), rtol=1e-4)


@pytest.mark.slow
def test_either_head_cuts_and_each_has_its_loss(tiny):
    ids = jnp.asarray([list(TEXT)])
    there = jnp.ones(ids.shape, bool)
    made = {
        score: runs.system_class("abstractinator")(
            runs.resolve(config(tiny, score=score, threshold=1.0))
        )
        for score in ("logits", "gaussian")
    }
    variables = jax.jit(lambda key: made["logits"].init({"params": key}, {}))(jax.random.key(0))

    @jax.jit
    def look(params):
        held = {**variables, "params": params}
        bits = {s: m.model.apply(held, ids, there, method="entropies") for s, m in made.items()}
        whole = made["logits"].model.apply(held, ids, there, method="foresee")

        def terms_of(params):
            held = {**variables, "params": params}
            found = losses.entropy_model(made["logits"].model, held, ids, there)
            return {name: mean.value for name, mean in found.items()}

        value, pull = jax.vjp(terms_of, params)
        grads = pull({name: jnp.float32(name == "entropy_gaussian") for name in value})[0]
        return bits, whole, grads["entropy"]

    bits, whole, grads = look(variables["params"])
    np.testing.assert_array_equal(bits["gaussian"], whole.gaussian.bits())
    assert np.abs(np.asarray(bits["logits"] - bits["gaussian"])).min() > 0.1
    assert 7 < float(bits["logits"].mean()) < 8, "bits of a byte, untrained"
    # Embeddings learn as what is read; as what is foreseen they are held. "d" is never read.
    moved = np.abs(np.asarray(grads["bytes"]["embedding"])).max(-1)
    assert moved[ord("d")] == 0 and moved[ord("t")] > 1e-6
    assert np.abs(np.asarray(grads["gaussian"]["kernel"])).max() > 1e-4
    assert np.abs(np.asarray(grads["head"]["kernel"])).max() == 0
    target = np.asarray(whole.gaussian.target)
    np.testing.assert_allclose(target.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(target.std(-1), 1, atol=1e-2)


def test_a_head_that_is_not_there_cannot_cut(tiny):
    for score, head in (("gaussian", "logits"), ("logits", "gaussian")):
        tree = config(tiny, score=score, threshold=1.0)
        tree["entropy"]["head"] = head
        with pytest.raises(ConfigError, match=f"entropy.head={head} has no such head"):
            runs.resolve(tree)
