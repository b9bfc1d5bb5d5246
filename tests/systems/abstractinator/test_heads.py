"""Heads of the row model: what they predict is what the quantiser makes of it, and what trains."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import run as runs
from latent_jax.core.errors import ConfigError
from latent_jax.systems.abstractinator import losses, progress
from latent_jax.systems.abstractinator.model import Rows
from latent_jax.systems.abstractinator.sample import Choice, next_digits

CODES, STAGES, WIDTH = 16, 3, 16


@pytest.fixture(scope="module", params=["continuous", "mixed"])
def headed(request, tiny):
    """System, variables, and rows of random digits in two windows, the second a shorter one."""
    top = {"layers": 1, "width": 16, "heads": 2, "ff": 32, "head": request.param}
    tree = tiny(top=top)
    tree["level"]["vq"] = {"init": "random"}
    system = runs.system_class("abstractinator")(runs.resolve(tree))
    variables = jax.jit(lambda key: system.init({"params": key}, {}))(jax.random.key(0))
    # The head starts at zero, which would hide what it reads.
    value = variables["params"]["top"]["value"]
    value["kernel"] = 0.3 * jax.random.normal(jax.random.key(4), value["kernel"].shape)
    digits = jax.random.randint(jax.random.key(1), (2, 8, STAGES), 0, CODES)
    there = jnp.arange(8) < jnp.asarray([[8], [5]])
    digits = jnp.where(there[..., None], digits, -1)
    rows = jax.jit(lambda d: system.model.apply(variables, d, method="append"))(digits)
    return system, variables, Rows(rows, digits, there, None, None)


@pytest.mark.slow
def test_where_the_heads_gradients_go(headed):
    system, variables, out = headed
    head = system.config.top.head

    def terms_of(params, code):
        codebook = variables["codebook"]["quantiser"] | {"code": code}
        held = {"params": params, "codebook": {"quantiser": codebook}}
        # The target must be held by the loss itself, wherever the rows come from.
        rows = system.model.apply(held, out.digits, method="append") + 0 * code.sum()
        terms, aux = losses.top(system.model, held, out._replace(rows=rows + code.sum() * 1e-3))
        return {k: v.value for k, v in terms.items()}, aux

    @jax.jit
    def gradients(params, code):
        value, pull, aux = jax.vjp(terms_of, params, code, has_aux=True)
        zero = {k: jnp.float32(0) for k in value}
        return value, {k: pull(zero | {k: jnp.float32(1)}) for k in value}, aux

    code = variables["codebook"]["quantiser"]["code"]
    value, found, aux = gradients(variables["params"], code)
    assert set(value) == {"top", "top_mse", "top_vq"}
    size = lambda tree: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))  # noqa: E731
    for name, (params, codes) in found.items():
        assert size(codes) == 0, f"{name} moves codebooks, or its own target"
        assert size({k: v for k, v in params.items() if k != "top"}) == 0, name
        assert size(params["top"]["sharpness"]) > 0 or name != "top"
    # Only the mixed head lets the likelihood of digits move the predicted row.
    moved = size(found["top"][0]["top"]["value"])
    assert (moved > 1e-8) == (head == "mixed")
    assert size(found["top_mse"][0]["top"]["value"]) > 1e-4
    assert size(found["top_vq"][0]["top"]["value"]) > 1e-6
    # A prediction of the mean has the rows' variance as its error; an untrained one is no better.
    assert float(aux["top.mse_mean"].value) < float(value["top_mse"]) * 1.5


@pytest.mark.slow
def test_the_likeliest_digits_are_those_of_the_quantised_row(headed):
    system, variables, out = headed
    if system.config.top.head == "mixed":
        # Without its free part the mixed head is the continuous one.
        top = variables["params"]["top"]
        top = top | {name: jnp.zeros_like(top[name]) for name in ("head", "bias")}
        variables = {**variables, "params": variables["params"] | {"top": top}}

    @jax.jit
    def both(rows, count):
        state, _ = system.model.apply(variables, rows, count, method="top_start")
        digits = next_digits(
            system.model, variables, state, jax.random.key(0), Choice.of(STAGES)
        )
        row = system.model.apply(variables, state, method=lambda m, s: m.top.row(s))
        there = jnp.ones((len(row), 1), bool)
        found = system.model.apply(variables, row[:, None], there, method="requantise")
        return digits, found.indices[:, 0], row

    count = jnp.asarray([5, 2])
    digits, indices, row = both(out.rows, count)
    np.testing.assert_array_equal(digits, indices)
    assert len(np.unique(np.asarray(digits))) > 1
    # What is predicted in generation is what training scored: one function of the same rows.
    _, trained = jax.jit(
        lambda: system.model.apply(variables, out.rows, out.there, out.digits, method="predict")
    )()
    np.testing.assert_allclose(row[0], trained[0, 5], atol=1e-5)
    np.testing.assert_allclose(row[1], trained[1, 2], atol=1e-5)


@pytest.mark.slow
def test_figures_of_predicted_rows_by_hand(headed):
    system, variables, out = headed
    code = np.asarray(variables["codebook"]["quantiser"]["code"])[0]
    row = jax.random.normal(jax.random.key(2), out.rows.shape)
    terms, aux = jax.jit(lambda row: losses.values(system.model, variables, out, row))(row)
    there, target = np.asarray(out.there), np.asarray(out.rows)
    mine = np.asarray(row)[there]
    assert float(terms["top_mse"].value) == pytest.approx(
        float(np.mean((mine - target[there]) ** 2)), rel=1e-4
    )
    left, error = mine, 0.0
    for stage in code:
        chosen = np.argmin(((left[:, None] - stage) ** 2).sum(-1), -1)
        left = left - stage[chosen]
        error += np.sum(left**2) / left.size
    assert float(terms["top_vq"].value) == pytest.approx(error, rel=1e-4)
    post = np.mean((mine - left - target[there]) ** 2)
    assert float(aux["top.mse_post"].value) == pytest.approx(float(post), rel=1e-4)
    assert float(aux["top.mse_mean"].value) == pytest.approx(
        float(target[there].var(0).mean()), rel=1e-4
    )
    distance = ((mine[:, None] - code[0]) ** 2).mean(-1)
    right = np.asarray(out.digits)[there][:, 0]
    wrong = np.where(np.arange(CODES) == right[:, None], np.inf, distance).min(-1)
    margin = wrong - distance[np.arange(len(right)), right]
    assert float(aux["top.margin"].value) == pytest.approx(float(margin.mean()), rel=1e-3)


@pytest.mark.slow
def test_the_loss_after_quantisation_passes_straight_through(headed):
    system, variables, out = headed
    config = runs.resolve(system.config, {"losses.top_mse_post": 0.5})
    model = runs.system_class("abstractinator")(config).model
    row = jax.random.normal(jax.random.key(2), out.rows.shape)

    def post(row):
        terms, aux = losses.values(model, variables, out, row)
        return terms["top_mse_post"].value, aux["top.mse_post"].value

    (value, figure), grad = jax.jit(jax.value_and_grad(post, has_aux=True))(row)
    assert float(value) == pytest.approx(float(figure), rel=1e-5)
    there = np.asarray(out.there)
    own = jax.jit(lambda row: model.apply(variables, row, out.there, method="requantise"))(row)
    expected = 2 * np.asarray(own.quantized - out.rows)[there] / (there.sum() * WIDTH)
    np.testing.assert_allclose(np.asarray(grad)[there], expected, atol=1e-6)
    assert np.abs(np.asarray(grad)[~there]).max() == 0


def test_positions_are_counted_beyond_32_bits():
    count = jnp.zeros(2, jnp.int32)
    for _ in range(9):
        count = progress.add(count, 2**29 + 3)
    assert int(count[1]) * 2**20 + int(count[0]) == 9 * (2**29 + 3) > 2**32
    assert float(progress.total(count)) == pytest.approx(9 * (2**29 + 3))


def test_heads_that_cannot_be(tiny):
    tree = tiny(top={"head": "continuous"})
    tree["level"]["vq"] = {"distance": "cosine"}
    with pytest.raises(ConfigError, match="level.vq.distance=euclidean"):
        runs.resolve(tree)
    with pytest.raises(ConfigError, match="discrete"):
        runs.resolve(tiny(top={"head": "both"}))
