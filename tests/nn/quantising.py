"""What the tests of the residual quantiser share: small modules, and calls compiled once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from latent_jax import ResidualVQ
from latent_jax.nn.vq_config import ResetConfig, VQConfig

X = jax.random.normal(jax.random.key(7), (64, 4))
RANDOM = VQConfig(init="random", reset=ResetConfig(fraction=0.0))


def config(**kw):
    return dataclasses.replace(RANDOM, **kw)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("train", "frozen"))
def call(module, variables, x, mask=None, train=True, frozen=False, step=None):
    return module.apply(
        variables, x, mask, train=train, frozen=frozen, step=step, mutable=["codebook"]
    )


@functools.partial(jax.jit, static_argnums=(0,))
def decode(module, variables, indices):
    return module.apply(variables, indices, method="decode")


@functools.partial(jax.jit, static_argnums=(0, 3))
def loss_gradient(module, variables, x, name):
    """Gradients of one loss in the parameters and in the input."""

    def loss(params, x):
        out = module.apply({**variables, "params": params}, x, train=True)
        return out.losses[name].value

    return jax.value_and_grad(loss, (0, 1))(variables.get("params", {}), x)


@functools.partial(jax.jit, static_argnums=(0,))
def init(module):
    return module.init(jax.random.key(0), X)


def make(stages=2, codes=8, **kw):
    module = ResidualVQ(4, codes, stages, config(**kw))
    return module, init(module)


def moved(a, b):
    return any(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
