"""State dicts of vector-quantize-pytorch, read and written.

Covers its `VectorQuantize` (as one stage), `ResidualVQ` and `GroupedResidualVQ` without neural
codebooks, affine parameters or heads. Arrays are numpy on both sides: ``{name:
tensor.numpy()}`` goes in, and ``torch.as_tensor`` of what comes out goes into ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.core.errors import CheckpointError, ConfigError
from latent_jax.nn.residual_vq import ResidualVQ
from latent_jax.ops import vq_state

_FIELDS = {"embed": "code", "cluster_size": "size", "embed_avg": "total"}


def _prefixes(module: ResidualVQ, keys: Any) -> list[list[str]]:
    """Key prefixes of every group's stages."""
    if module.config.groups > 1:
        groups = [f"rvqs.{g}." for g in range(module.config.groups)]
    else:
        groups = [""]
    if module.digits == 1 and "_codebook.embed" in keys:
        return [["_codebook."]]
    return [[f"{g}layers.{s}._codebook." for s in range(module.stages)] for g in groups]


def _template(module: ResidualVQ) -> Any:
    """Zeros in the shape of the module's variables, without compiling its initialisers."""
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, module.dim)))
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)


def _no_grouped_projection(module: ResidualVQ) -> None:
    if module.config.groups > 1 and module.config.code_dim is not None:
        raise ConfigError(
            "vector-quantize-pytorch projects each group on its own, ResidualVQ all of them "
            "together: codebooks with groups and code_dim cannot be exchanged"
        )


def import_state(module: ResidualVQ, state: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of ``module`` that hold a state dict.

    Args:
      module: with the sizes, groups and projections of the torch module.
      state: its ``state_dict()``, as arrays.

    Raises:
      CheckpointError: a key is missing, unknown, or of another shape.
    """
    _no_grouped_projection(module)
    left = {name: np.asarray(value) for name, value in state.items()}
    shared, sizes = module.config.shared, module.sizes

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in left:
            raise CheckpointError(f"state dict: {name!r} is missing")
        value = left.pop(name)
        if value.shape != shape:
            raise CheckpointError(f"state dict: {name!r} has shape {value.shape}, expected {shape}")
        return value

    variables = _template(module)
    book = dict(variables["codebook"])
    gradient = module.config.learn == "gradient"
    params = dict(variables.get("params", {}))
    width = module.config.code_dim or module.dim // module.config.groups
    code = np.zeros((*book["usage"].shape, width), np.float32)
    size, total = np.zeros(code.shape[:-1], np.float32), np.zeros_like(code)
    for g, stages in enumerate(_prefixes(module, left)):
        for s, prefix in enumerate(stages):
            k, at = sizes[s], (g, 0 if shared else s)
            code[at][:k] = take(f"{prefix}embed", (1, k, width))[0]
            size[at][:k] = take(f"{prefix}cluster_size", (1, k))[0]
            total[at][:k] = take(f"{prefix}embed_avg", (1, k, width))[0]
            book["ready"][at] = bool(take(f"{prefix}initted", ()))
    if gradient:
        params["codebook"], book["offset"] = code, np.zeros_like(code)
    else:
        book |= {"code": code, "size": size, "total": total}
        book["norm"] = np.asarray(vq_state.norms(jnp.asarray(code)))
    mass = np.maximum(size.sum(-1, keepdims=True), 1e-20)
    book["usage"] = size / mass
    for name in ("project_in", "project_out") if module.config.code_dim is not None else ():
        kernel = params[name]["kernel"]
        params[name] = {
            "kernel": take(f"{name}.weight", kernel.shape[::-1]).T,
            "bias": take(f"{name}.bias", kernel.shape[1:]),
        }
    if left:
        raise CheckpointError(f"state dict: no place for {', '.join(sorted(left))}")
    out = {"codebook": book} | ({"params": params} if params else {})
    return jax.tree.map(jnp.asarray, out)


def export_state(module: ResidualVQ, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state dict for the torch module of the same shape."""
    _no_grouped_projection(module)
    held = jax.tree.map(np.asarray, dict(variables["codebook"]))
    params = variables.get("params", {})
    if module.config.learn == "gradient":
        code = np.asarray(params["codebook"]) + held["offset"]
        live = np.arange(code.shape[2]) < np.asarray(module.sizes[: code.shape[1]])[:, None]
        held |= {"code": code, "total": code, "size": np.broadcast_to(live, code.shape[:3])}
    out: dict[str, np.ndarray] = {}
    for g, stages in enumerate(_prefixes(module, ())):
        for s, prefix in enumerate(stages):
            k, at = module.sizes[s], (g, 0 if module.config.shared else s)
            for theirs, ours in _FIELDS.items():
                out[prefix + theirs] = np.asarray(held[ours][at][None, :k], np.float32)
            out[f"{prefix}initted"] = np.asarray(bool(held["ready"][at]))
    if module.config.code_dim is not None:
        for name in ("project_in", "project_out"):
            out[f"{name}.weight"] = np.asarray(params[name]["kernel"]).T
            out[f"{name}.bias"] = np.asarray(params[name]["bias"])
    return out


def refresh(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables whose cached norms belong to their codes: after codes were put in by hand."""
    book = dict(variables["codebook"])
    if "code" in book:
        book["norm"] = vq_state.norms(book["code"])
    return {**variables, "codebook": book}
