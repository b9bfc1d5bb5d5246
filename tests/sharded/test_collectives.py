"""A compiled step on eight devices exchanges what the plan lists, and nothing else."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_jax import run as runs
from latent_jax.backbones import Decoder
from latent_jax.backbones.cross_entropy import token_cross_entropy
from latent_jax.backbones.sharding import DECODER_RULES
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core.types import Mean
from latent_jax.sharding import MeshConfig, make_mesh, replicated, shard_batch, tree_shardings
from latent_jax.train.footprint import footprint
from latent_jax.train.setup import plan_state
from latent_jax.train.step import make_train_step
from latent_jax.train.testing import toy_config

_OPERATION = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\((.*)"
)
_GROUPS = re.compile(
    r"replica_groups=(\{[^a-z]*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\].*?\{.*?\})"
)


class Prompted:
    """Soft tokens and a low-rank delta before a frozen decoder, in chunks of the vocabulary."""

    rng_names = ()
    weights = {"nll": 1.0}
    logical_rules = (*DECODER_RULES, (r"q/a$", ("layers", "embed", "rank")),
                     (r"q/b$", ("layers", "rank", "heads")))

    def __init__(self):
        self.reader = tiny_config("llama", num_heads=4, vocab_size=96, num_layers=2)
        self.body = Decoder(self.reader)
        self.frozen = {"reader": random_params(self.reader, jax.random.key(0))}

    def init(self, rngs, batch):
        c = self.reader
        return {"params": {
            "prompt": jnp.ones((3, c.hidden_size)),
            "q": {"a": jnp.ones((c.num_layers, c.hidden_size, 4)),
                  "b": jnp.zeros((c.num_layers, 4, c.num_heads * c.head_dim))},
        }}  # fmt: skip

    def param_labels(self, params):
        return jax.tree.map(lambda _: "all", params)

    def loss_terms(self, variables, frozen, batch, rngs, train):
        p, reader, ids = variables["params"], frozen["reader"], batch["ids"]
        text = self.body.apply({"params": reader}, ids, method="embed")
        lead = jnp.broadcast_to(p["prompt"], (len(ids), *p["prompt"].shape))
        x = jnp.concatenate([lead, text], axis=1)
        hidden = self.body.apply({"params": reader}, x, lora={"q": p["q"]}).hidden
        nll, _ = token_cross_entropy(self.body, reader, hidden[:, 2:-1], ids, 32)
        return {"nll": Mean.of(nll)}, {}, {}

    def train_data(self, phase, start_state):
        return iter([{"ids": np.zeros((16, 12), np.int32)}])


def exchanged(text, mesh):
    """``(kind, axes)`` of every exchange in a compiled program."""
    shape, found = mesh.devices.shape, set()
    for line in text.splitlines():
        operation = _OPERATION.search(line)
        if operation is None:
            continue
        groups = _GROUPS.search(line)
        if groups is None:  # pairs of a permutation
            found.add((operation.group(1), mesh.axis_names))
            continue
        for group in members(groups.group(1), math.prod(shape)):
            places = np.array(np.unravel_index(group, shape))
            axes = tuple(
                a for a, at in zip(mesh.axis_names, places, strict=True) if len(set(at)) > 1
            )
            if axes:
                found.add((operation.group(1), axes))
    return found


def members(text, count):
    """Device numbers of each group, in the three ways in which XLA writes them."""
    if text.startswith("{"):  # {{0,1},{2,3}}
        rows = [row.split(",") for row in re.findall(r"\{([\d,]+)\}", text)]
        return [[int(n) for n in row] for row in rows] or [list(range(count))]
    if text.startswith("["):  # [2,2]<=[4], [2,2]<=[2,2]T(1,0)
        shape, source, order = re.fullmatch(r"\[(.*?)\]<=\[(.*?)\](?:T\((.*)\))?", text).groups()
        return numbered(count, source, order).reshape(integers(shape))
    # mesh['axis_0'=4,'axis_1'=2], device_ids=([4,2]T(1,0)) {'axis_1'}
    sizes, source, order, along = re.fullmatch(
        r"mesh\[(.*?)\](?:, device_ids=\(\[(.*?)\](?:T\((.*?)\))?\))? \{(.*)\}", text
    ).groups()
    shape = {name: int(n) for name, n in re.findall(r"('\w+')=(\d+)", sizes)}
    inside = [list(shape).index(name) for name in along.split(",")]
    places = numbered(count, source or str(count), order).reshape(list(shape.values()))
    last = np.moveaxis(places, inside, range(-len(inside), 0))
    return last.reshape(-1, math.prod(places.shape[i] for i in inside))


def integers(text):
    return [int(n) for n in text.split(",")]


def numbered(count, shape, order):
    """Device numbers as an array of a shape, with its axes in another order."""
    places = np.arange(count).reshape(integers(shape))
    return places.transpose(integers(order)) if order else places


def compiled(system, config, mesh):
    with jax.set_mesh(mesh):
        phase = config.train.phases[0].data if config.train.phases else "main"
        batch = next(iter(system.train_data(phase, None)))
        plan = plan_state(system, config, mesh, batch)
        step = make_train_step(
            system, plan.optimizer, seed=0, shardings=plan.shardings,
            metric_sharding=replicated(mesh),
        )  # fmt: skip

        def there(tree, places):
            return jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places
            )

        placed = shard_batch(batch, mesh)
        frozen = there(system.frozen, tree_shardings(system.frozen, system.logical_rules, mesh))
        batch = there(placed, {k: v.sharding for k, v in placed.items()})
        return step.lower(there(plan.abstract, plan.shardings), frozen, batch).compile().as_text()


def unlisted(system, config, mesh):
    listed = footprint(config, system, mesh).collectives
    every = exchanged(compiled(system, config, mesh), mesh)
    assert every
    allowed = {}
    for kind, axes, _ in listed:
        allowed[kind] = allowed.get(kind, set()) | set(axes)
    return {(kind, axes) for kind, axes in every if not set(axes) <= allowed.get(kind, set())}


def test_groups_of_devices_are_read_as_xla_writes_them():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    for text, axes in (
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[4,2]<=[4,2]T(1,0)", ("fsdp",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("{}", ("data", "fsdp", "tensor")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", ("data", "fsdp")),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", ("fsdp",)),
    ):
        line = f"  %x = f32[4] all-reduce(f32[4] %y), channel_id=1, replica_groups={text}, use"
        assert exchanged(line, mesh) == {("all-reduce", axes)}, text
    line = "  %x = f32[4] collective-permute(f32[4] %y), source_target_pairs={{0,1},{1,0}}"
    assert exchanged(line, mesh) == {("collective-permute", mesh.axis_names)}


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_a_frozen_reader_exchanges_nothing_that_is_not_listed(devices, shape):
    mesh = make_mesh(MeshConfig(*shape), devices)
    assert not unlisted(Prompted(), toy_config(), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm/tiny_reader", "latentwire/tiny"])
def test_a_system_exchanges_nothing_that_is_not_listed(devices, name):
    config = runs.resolve(name)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    assert not unlisted(runs.system_class(config.system)(config), config, mesh)
