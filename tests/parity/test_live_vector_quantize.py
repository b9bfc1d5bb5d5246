"""Live parity with vector-quantize-pytorch: same codebooks, same inputs, the same 100 steps."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peer = pytest.importorskip("vector_quantize_pytorch")

from latent_jax import ResidualVQ  # noqa: E402
from latent_jax.core.errors import CheckpointError, ConfigError  # noqa: E402
from latent_jax.nn.vq_config import ResetConfig, VQConfig  # noqa: E402
from latent_jax.nn.vq_torch import export_state, import_state, refresh  # noqa: E402
from latent_jax.ops import fsq  # noqa: E402

D, K, S, DECAY = 6, 16, 3, 0.9
BASE = VQConfig(init="random", decay=DECAY, reset=ResetConfig(fraction=0.0))


def config(**kw):
    return dataclasses.replace(BASE, **kw)


def theirs(**kw):
    torch.manual_seed(0)
    defaults = {"dim": D, "num_quantizers": S, "codebook_size": K, "decay": DECAY}
    return peer.ResidualVQ(**(defaults | {"rotation_trick": False} | kw))


def arrays(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


@functools.partial(jax.jit, static_argnums=(0,))
def encode(module, variables, x):
    return module.apply(variables, x).indices


def batches(count, rows=48, dim=D):
    return np.random.default_rng(1).normal(size=(count, rows, dim)).astype(np.float32)


def compare(module, torch_module, variables, steps, mask=None):
    apply = jax.jit(lambda v, x, m: module.apply(v, x, m, train=True, mutable=["codebook"]))
    for x in batches(steps):
        out, new = apply(variables, x, mask)
        variables = {**variables, **new}
        given = None if mask is None else torch.as_tensor(mask)[None]
        q, index, loss = torch_module(torch.as_tensor(x)[None], mask=given)
        np.testing.assert_array_equal(out.indices, index[0].numpy())
        np.testing.assert_allclose(out.quantized, q[0].detach().numpy(), atol=1e-5)
        ours = out.metrics["commitment"].value
        np.testing.assert_allclose(ours, loss.detach().reshape(-1).numpy(), rtol=1e-4, atol=1e-5)
    return variables


@pytest.mark.parametrize(
    "case",
    ["plain", "masked", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cosine", "sizes")),
     "projected"],
)  # fmt: skip
def test_a_hundred_training_steps(case):
    kw, options, codes = {}, {}, K
    if case == "cosine":
        kw, options = {"use_cosine_sim": True}, {"distance": "cosine"}
    if case == "sizes":
        codes, kw = (16, 8, 4), {"codebook_size": (16, 8, 4)}
    if case == "projected":
        kw, options = {"codebook_dim": 4}, {"code_dim": 4}
    torch_module = theirs(**kw).train()
    module = ResidualVQ(D, codes, S, config(**options))
    variables = import_state(module, arrays(torch_module))
    mask = np.arange(48) < 30 if case == "masked" else None
    steps = 100 if case in ("plain", "masked", "cosine") else 10
    variables = compare(module, torch_module, variables, steps, mask)
    end = arrays(torch_module)
    for name, value in export_state(module, variables).items():
        np.testing.assert_allclose(value, end[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_the_input_gradient_is_the_peers_at_depth_one():
    torch_module = theirs(num_quantizers=1, commitment_weight=0.25).train()
    module = ResidualVQ(D, K, 1, BASE)
    variables = import_state(module, arrays(torch_module))
    x, weight = batches(1)[0], batches(2)[1]

    def loss(x):
        out = module.apply(variables, x, train=True)
        return (out.quantized * weight).sum() + out.loss

    given = torch.tensor(x[None], requires_grad=True)
    q, _, commitment = torch_module(given)
    ((q * torch.as_tensor(weight)).sum() + commitment.sum()).backward()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), given.grad[0].numpy(), atol=1e-5)


def test_state_dicts_round_trip_and_decode_alike():
    torch_module = theirs().train()
    for x in batches(3):
        torch_module(torch.as_tensor(x)[None])
    torch_module.eval()
    module = ResidualVQ(D, K, S, BASE)
    variables = import_state(module, arrays(torch_module))
    back = export_state(module, variables)
    assert set(back) == set(torch_module.state_dict())
    for name, value in arrays(torch_module).items():
        np.testing.assert_array_equal(back[name], value)
    theirs_again = theirs()
    theirs_again.load_state_dict({n: torch.tensor(v) for n, v in back.items()})
    x = batches(1)
    q, index, _ = torch_module(torch.as_tensor(x))
    assert torch.equal(theirs_again.eval()(torch.as_tensor(x))[1], index)
    np.testing.assert_array_equal(encode(module, variables, x), index.numpy())
    np.testing.assert_allclose(
        module.apply(variables, index.numpy(), method="decode"), q.numpy(), atol=1e-5
    )


def test_groups_shared_codebooks_single_quantisers_and_gradient_codebooks_are_read():
    x = batches(1)
    grouped = peer.GroupedResidualVQ(
        dim=D, groups=2, num_quantizers=S, codebook_size=K, rotation_trick=False
    ).eval()
    module = ResidualVQ(D, K, S, config(groups=2))
    index = grouped(torch.as_tensor(x))[1].numpy()  # g b n s
    ours = encode(module, import_state(module, arrays(grouped)), x)
    np.testing.assert_array_equal(ours, np.concatenate(index, -1))

    shared = theirs(shared_codebook=True).eval()
    module = ResidualVQ(D, K, S, config(shared=True))
    state = arrays(shared)
    ours = encode(module, import_state(module, state), x)
    np.testing.assert_array_equal(ours, shared(torch.as_tensor(x))[1].numpy())

    single = peer.VectorQuantize(dim=D, codebook_size=K).eval()
    for options in ({}, {"learn": "gradient"}):
        module = ResidualVQ(D, K, 1, config(**options))
        ours = encode(module, import_state(module, arrays(single)), x)
        np.testing.assert_array_equal(ours[..., 0], single(torch.as_tensor(x))[1].numpy())


def test_what_does_not_fit_is_named():
    module = ResidualVQ(D, K, S, BASE)
    state = arrays(theirs())
    with pytest.raises(CheckpointError, match="layers.2._codebook.embed' is missing"):
        import_state(module, {k: v for k, v in state.items() if k != "layers.2._codebook.embed"})
    with pytest.raises(CheckpointError, match="no place for layers.2._codebook"):
        import_state(ResidualVQ(D, K, 2, BASE), state)
    with pytest.raises(CheckpointError, match=r"has shape \(1, 16, 6\), expected \(1, 8, 6\)"):
        import_state(ResidualVQ(D, 8, S, BASE), state)
    with pytest.raises(ConfigError, match="groups and code_dim"):
        import_state(ResidualVQ(D, K, S, config(groups=2, code_dim=2)), state)


def test_codes_put_in_by_hand_need_their_norms():
    module = ResidualVQ(D, K, 1, BASE)
    x = batches(1)[0]
    variables = jax.jit(module.init)(jax.random.key(0), x)
    book = dict(variables["codebook"])
    book["code"] = book["code"] * jnp.linspace(0.1, 3.0, K)[:, None]
    fresh = refresh({"codebook": book})
    distance = ((x[:, None] - np.asarray(book["code"][0, 0])) ** 2).sum(-1)
    np.testing.assert_array_equal(encode(module, fresh, x)[:, 0], distance.argmin(-1))


def test_fsq_values_and_indices():
    for levels in ((8, 5, 5, 5), (3, 4, 7, 6)):
        x = batches(1, dim=4) * 2
        value, index = peer.FSQ(levels=list(levels))(torch.as_tensor(x))
        ours, digits = fsq.fsq(x, levels)
        np.testing.assert_array_equal(digits[..., 0], index.numpy())
        np.testing.assert_allclose(ours, value.numpy(), atol=1e-5)
