"""Do slots carry the computation, or decorate it? Diagnostics A to K of a trained model.

A ablation, B similarity, C correlation of gradients, D read-out weights, E effect norms, F norms,
H blocks of heights, I attention profile, J permutations, K rank of gradients, and the two tests of
what a slot is known by (G, the drift of rollouts, is part of the evaluation).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from latent_jax.core.types import PyTree
from latent_jax.ops import mdn
from latent_jax.ops.spectrum import effective_rank
from latent_jax.systems.spacing import ablation, losses, predict
from latent_jax.systems.spacing.model import Ablation

_PERMUTATIONS = 4
_BLOCKS = 8
_BLOCK_WINDOWS = 2048
_GRADIENT_WINDOWS = 64


def diagnose(system: Any, params: PyTree, windows: int = 256) -> dict[str, Any]:
    """All diagnostics of every seed; mean over seeds, ``.std`` between them.

    Args:
      system: the `SpacingSystem` of the run.
      params: parameters with a leading axis of seeds.
      windows: held-out windows that slots are changed in; blocks of heights have more.

    Returns:
      Flat numbers (differences of NLL in nats, at the last position) and ``findings`` in words.
    """
    c = system.config
    rows, many = (
        system.gaps.windows(system.gaps.spread(n), c.data.window) for n in (windows, _BLOCK_WINDOWS)
    )
    score = predict.predictor(system.model, c, last_only=True)
    parts = [
        _one(system, score, jax.tree.map(lambda x, i=i: x[i : i + 1], params), rows, many)
        for i in range(c.seeds)
    ]
    found: dict[str, Any] = {}
    # A share of next to nothing is left out, by each seed for itself.
    for name in (n for n in parts[0] if all(n in p for p in parts)):
        values = np.asarray([p[name] for p in parts], np.float64)
        found[name] = values.mean(0).tolist() if values.ndim > 1 else float(values.mean())
        if c.seeds > 1 and values.ndim == 1:
            found[f"{name}.std"] = float(values.std(ddof=1))
    return found | {"findings": findings(found)}


def _one(
    system: Any,
    score: Any,
    params: PyTree,
    rows: dict[str, np.ndarray],
    many: dict[str, np.ndarray],
) -> dict[str, Any]:
    c = system.config
    memory = c.model.memory

    def nll(change: Ablation | None, rows: dict[str, np.ndarray] = rows) -> np.ndarray:
        return predict.predict(score, params, rows, c.eval.batch_size, change).nll[0]

    base = ablation.none(c.model) if memory.kind != "none" else None
    found = _blocks(nll(base, many), many["log_height"])
    if base is None:
        return found
    own = nll(base)
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), params)
    content = _contents(system, one, rows)
    found |= _ablations(nll, own, base, memory.kind, content["mean"])
    found |= _identity(nll, own, base, found["slots.joint_delta"])
    found |= content["numbers"]
    found |= _gradients(system, one, rows, base)
    if memory.kind == "postfix":
        found |= _attention(system, one, rows)
    return found


def _blocks(own: np.ndarray, log_height: np.ndarray) -> dict[str, Any]:
    """H: likelihood in blocks of increasing height, with standard errors."""
    found: dict[str, Any] = {"nll.diagnosed": float(own.mean())}
    for i, part in enumerate(np.array_split(np.argsort(log_height, kind="stable"), _BLOCKS)):
        found[f"blocks.nll.{i}"] = float(own[part].mean())
        found[f"blocks.se.{i}"] = float(own[part].std(ddof=1) / np.sqrt(len(part)))
    return found


def _ablations(nll: Any, own: np.ndarray, base: Ablation, kind: str, mean: Array) -> dict[str, Any]:
    """A: what is lost without each slot, and without all of them.

    A prefix slot is hidden. A postfix slot's final content is replaced by its mean over windows
    (``ablation_delta``) or by zero (``zero_delta``): hiding it would let the others be read more.
    """
    m = len(base.keep)
    everything = list(range(m))

    def delta(change: Ablation) -> float:
        return float((nll(change) - own).mean())

    found: dict[str, Any] = {}
    for i in everything:
        if kind == "prefix":
            found[f"slots.ablation_delta.{i}"] = delta(ablation.hide(base, [i]))
            continue
        found[f"slots.ablation_delta.{i}"] = delta(ablation.overwrite(base, [i], mean))
        found[f"slots.zero_delta.{i}"] = delta(ablation.overwrite(base, [i], 0 * mean))
        found[f"slots.hidden_delta.{i}"] = delta(ablation.hide(base, [i])) if m > 1 else 0.0
    whole = (
        ablation.hide(base, everything)
        if kind == "prefix"
        else ablation.overwrite(base, everything, mean)
    )
    found["slots.joint_delta"] = delta(whole)
    for what in ("ablation", "hidden"):
        each = [found.get(f"slots.{what}_delta.{i}") for i in everything]
        if None not in each:
            found[f"slots.least_{what}_delta"] = min(each)
    return found


def _identity(
    nll: Any, own: np.ndarray, base: Ablation, joint: float
) -> dict[str, Any]:
    """J, and ID-only/content-only: what a slot is known by."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for what in ("identity", "content"):
        moved = [nll(ablation.exchange(base, rng, what)) - own for _ in range(_PERMUTATIONS)]
        shifts = np.mean(moved, axis=0)
        name = "slots.permutation_increase" + ("" if what == "identity" else ".content")
        found[name] = float(abs(shifts.mean()))
        found[f"{name}.se"] = float(shifts.std(ddof=1) / np.sqrt(len(shifts)))
    stripped = {"content_only": {"identity_share": 0.0}, "id_only": {"content_share": 0.0}}
    for name, change in stripped.items():
        without = base._replace(**{k: jnp.asarray(v) for k, v in change.items()})
        found[f"slots.{name}_delta"] = float((nll(without) - own).mean())
    if joint > 0.01:
        # What is lost without identities, as a share of what is lost without the slots.
        found["slots.content_only_loss"] = found["slots.content_only_delta"] / joint
    return found


def _contents(system: Any, params: PyTree, rows: dict[str, np.ndarray]) -> dict[str, Any]:
    """B, D, E, F from the slots' final contents; their mean over windows."""
    c = system.config
    out = _forward(system, params, rows, ablation.none(c.model))
    slots = np.asarray(out.slots[:, -1])  # n m w
    norm = np.linalg.norm(slots, axis=-1)
    unit = slots / np.maximum(norm[..., None], 1e-9)
    cosine = np.abs(np.einsum("niw,njw->nij", unit, unit)).mean(0)
    m = slots.shape[1]
    numbers: dict[str, Any] = {
        "slots.similarity": float(cosine[~np.eye(m, dtype=bool)].mean()) if m > 1 else 0.0,
        "slots.norm": norm.mean(0).tolist(),
    }
    if out.read_out is not None:
        weight = np.asarray(out.read_out[:, -1])
        effect = (weight * norm).mean(0)
        numbers |= {
            "slots.read_out": weight.mean(0).tolist(),
            "slots.read_out_entropy": entropy_share(weight.mean(0)),
            "slots.effect": effect.tolist(),
            "slots.effect_entropy": entropy_share(effect),
        }
    return {"mean": jnp.asarray(slots.mean(0)), "numbers": numbers}


def _forward(
    system: Any, params: PyTree, rows: dict[str, np.ndarray], change: Ablation | None, **extra: Any
) -> Any:
    def apply(params: PyTree, gaps: Array, log_height: Array, change: Ablation | None) -> Any:
        return system.model.apply(
            {"params": params}, gaps, log_height,
            ablation=change, rngs={"sample": jax.random.key(0)}, **extra,
        )  # fmt: skip

    gaps, log_height = jnp.asarray(rows["gaps"][:, :-1]), jnp.asarray(rows["log_height"])
    return jax.jit(apply)(params["model"], gaps, log_height, change)


def entropy_share(weights: Float[np.ndarray, " m"]) -> float:
    """Entropy of non-negative weights ÷ that of even ones: 1 even, 0 a single one."""
    p = np.asarray(weights, np.float64) / max(float(np.sum(weights)), 1e-12)
    if len(p) < 2:
        return 1.0
    return float(-(p * np.log(np.maximum(p, 1e-12))).sum() / np.log(len(p)))


def _gradients(
    system: Any, params: PyTree, rows: dict[str, np.ndarray], base: Ablation
) -> dict[str, Any]:
    """C and K: gradients of the loss with respect to each slot's start, window by window."""
    c = system.config
    few = {k: v[:_GRADIENT_WINDOWS] for k, v in rows.items()}

    def loss(shift: Array, gaps: Array, log_height: Array) -> Array:
        out = system.model.apply(
            {"params": params["model"]}, gaps[None, :-1], log_height[None],
            ablation=base._replace(shift=shift), rngs={"sample": jax.random.key(0)},
        )  # fmt: skip
        density = jax.tree.map(lambda x: x[0, -1], losses.mixture(c, out.raw))
        return -mdn.log_prob(density, gaps[-1], c.model.head.family)

    gradient = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))
    g = np.asarray(gradient(base.shift, jnp.asarray(few["gaps"]), jnp.asarray(few["log_height"])))
    flat = g.transpose(1, 0, 2).reshape(g.shape[1], -1)
    return gradient_geometry(flat)


def gradient_geometry(flat: Float[np.ndarray, "m n"]) -> dict[str, float]:
    """Mean absolute cosine of slots' gradients, and their effective rank ÷ slots (at most 1)."""
    m = len(flat)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-20)
    gram = unit @ unit.T
    off = ~np.eye(m, dtype=bool)
    return {
        "slots.gradient_correlation": float(np.abs(gram[off]).mean()) if m > 1 else 0.0,
        "slots.gradient_rank_ratio": effective_rank(np.linalg.eigvalsh(gram)) / m,
    }


def _attention(system: Any, params: PyTree, rows: dict[str, np.ndarray]) -> dict[str, Any]:
    """I: where in the past each slot looks, in gaps before the cut.

    Centre of mass and width of the attention on data, for the last layer, the last three and all;
    or of what the slots claim.
    """
    c = system.config
    few = {k: v[:_GRADIENT_WINDOWS] for k, v in rows.items()}
    _, seen = _forward(system, params, few, None, mutable=["intermediates"])
    t = c.data.window - 1
    if c.model.memory.read == "claims":
        claims = np.asarray(seen["intermediates"]["claims"][0])[:, -1]
        return _profiles({"claims": claims[..., ::-1][..., -t:]})
    profiles = []
    for layer in c.model.attending:
        block = seen["intermediates"][f"block_{layer}"]
        q, k = np.asarray(block["q"][0])[:, t:], np.asarray(block["k"][0])
        logits = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        profiles.append(weight[..., :t].mean(1))  # n m t
    return _profiles({
        "last": profiles[-1], "top3": np.mean(profiles[-3:], axis=0),
        "all": np.mean(profiles, axis=0),
    })  # fmt: skip


def _profiles(weights: dict[str, Float[np.ndarray, "n m t"]]) -> dict[str, Any]:
    """Centre and width of each profile, and how far apart slots' centres are.

    ``centre_std`` is of the slots' mean centres; ``centre_std_within`` is between the slots of one
    window, on average: slots that are drawn anew for every window have no mean place.
    """
    found: dict[str, Any] = {}
    for name, p in weights.items():
        ago = np.arange(p.shape[-1] - 1, -1, -1.0)
        p = p / np.maximum(p.sum(-1, keepdims=True), 1e-12)
        centre = p @ ago  # n m
        width = np.sqrt(np.maximum(p @ ago**2 - centre**2, 0))
        found[f"attention.{name}.centre"] = centre.mean(0).tolist()
        found[f"attention.{name}.width"] = width.mean(0).tolist()
        found[f"attention.{name}.centre_std"] = float(centre.mean(0).std())
        found[f"attention.{name}.centre_std_within"] = float(centre.std(1).mean())
    return found


def findings(found: dict[str, Any]) -> list[str]:
    """What the numbers say, in words."""
    if "slots.joint_delta" not in found:
        return ["no slots: only the likelihood by height is diagnosed"]
    said = []
    deltas = {k: v for k, v in found.items() if k.startswith("slots.ablation_delta.")
              and not k.endswith(".std")}
    idle = [k.rpartition(".")[2] for k, v in deltas.items() if v < 0.02]
    if found["slots.joint_delta"] < 0.02:
        said.append("memory is decoration: without all slots the NLL rises by less than 0.02 nats")
    elif idle:
        said.append(f"slots {', '.join(idle)} are idle: each costs less than 0.02 nats to lose")
    if found["slots.permutation_increase"] > 0.002:
        said.append("slots are known by their identity: exchanging identities costs "
                    f"{found['slots.permutation_increase']:.3f} nats")
    if found["slots.similarity"] > 0.3:
        said.append(f"slots resemble each other: mean |cosine| {found['slots.similarity']:.2f}")
    if found["slots.gradient_rank_ratio"] < 0.5:
        said.append("slots are trained alike: gradient rank ratio "
                    f"{found['slots.gradient_rank_ratio']:.2f}")
    return said or ["nothing suspicious"]
