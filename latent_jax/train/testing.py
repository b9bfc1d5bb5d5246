"""A toy system for tests of the trainer: an MLP regression with an EMA collection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.core.types import Mean
from latent_jax.train.config import RunBase


class ToyData:
    """Deterministic batches; the position is a counter."""

    def __init__(self, batch_size: int, width: int, seed: int = 0, nan_steps: tuple[int, ...] = (),
                 shift: float = 0.0) -> None:
        self._shape = (batch_size, width)
        self._seed, self._nan, self._shift = seed, nan_steps, shift
        self._at = 0

    def __iter__(self) -> ToyData:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._at))
        x = rng.normal(size=self._shape).astype(np.float32)
        y = np.tanh(x @ np.linspace(-1, 1, self._shape[1], dtype=np.float32)) + self._shift
        mask = rng.random(self._shape[0]) < 0.7
        if self._at in self._nan:
            x = np.full_like(x, np.nan)
        self._at += 1
        return {"x": x, "y": y.astype(np.float32), "mask": mask}

    def get_state(self) -> dict[str, int]:
        return {"at": self._at}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._at = int(state["at"])


@dataclasses.dataclass
class ToySystem:
    """Regression through a frozen input matrix, an MLP and a held bias, with dropout noise.

    Labels: ``body`` (hidden layer), ``head`` (output), ``frozen`` (params/fixed).
    """

    batch_size: int = 16
    width: int = 8
    hidden: int = 16
    noise: float = 0.01
    nan_steps: tuple[int, ...] = ()
    weights: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"mse": 1.0, "l2": {"value": 0.01}}
    )
    logical_rules: Any = (
        (r"hidden/kernel$", ("fsdp", "tensor")),
        (r"reader/mix$", ("fsdp", None)),
    )
    traces: int = 0

    def __post_init__(self) -> None:
        from latent_jax.core.config import parse
        from latent_jax.train.curriculum import ScheduleConfig

        self.weights = {
            k: parse(ScheduleConfig, v) if isinstance(v, Mapping) else v
            for k, v in self.weights.items()
        }
        mix = np.eye(self.width, dtype=np.float32) * 1.5
        self.frozen = {"reader": {"mix": jnp.asarray(mix)}}

    def init(self, rngs: Any, batch: Any) -> dict[str, Any]:
        a, b = jax.random.split(rngs["params"])
        params = {
            "hidden": {
                "kernel": jax.random.normal(a, (self.width, self.hidden)) * 0.3,
                "bias": jnp.zeros(self.hidden),
            },
            "out": {"kernel": jax.random.normal(b, (self.hidden,)) * 0.3},
            "fixed": {"bias": jnp.full((1,), 0.25)},
        }
        return {"params": params, "stats": {"mean": jnp.zeros(self.hidden)}}

    def param_labels(self, params: Any) -> Any:
        return {
            "hidden": {"kernel": "body", "bias": "body"},
            "out": {"kernel": "head"},
            "fixed": {"bias": "frozen"},
        }

    def loss_terms(self, variables: Any, frozen: Any, batch: Any, rngs: Any, train: bool) -> Any:
        self.traces += 1
        p = variables["params"]
        h = jnp.tanh(batch["x"] @ frozen["reader"]["mix"] @ p["hidden"]["kernel"]
                     + p["hidden"]["bias"])
        if train:
            h = h + self.noise * jax.random.normal(rngs["dropout"], h.shape)
        y = h @ p["out"]["kernel"] + p["fixed"]["bias"][0]
        mean = variables["stats"]["mean"] * 0.9 + 0.1 * jax.lax.stop_gradient(h.mean(0))
        terms = {
            "mse": Mean.of((y - batch["y"]) ** 2, batch["mask"]),
            "l2": Mean.of(p["out"]["kernel"] ** 2),
            "watched": Mean.of(jnp.abs(y - batch["y"])),
        }
        return terms, {"stats": {"mean": mean}}, {"accuracy": 1.0 - terms["mse"].value}

    def train_data(self, phase: str, start_state: Any) -> ToyData:
        data = ToyData(self.batch_size, self.width, nan_steps=self.nan_steps,
                       shift=0.0 if phase == "main" else 0.5)
        if start_state is not None:
            data.set_state(start_state)
        return data

    def unit_counts(self, batch: Any) -> dict[str, int]:
        return {"examples": len(batch["x"])}

    def quick_eval(self, variables: Any, frozen: Any) -> dict[str, float]:
        data = ToyData(64, self.width, seed=1)
        terms, _, _ = self.loss_terms(variables, frozen, next(data), {}, False)
        return {"mse": float(terms["mse"].value)}

    def eval_data(self) -> ToyData:
        return ToyData(64, self.width, seed=1)

    def evaluate(self, variables: Any, frozen: Any, progress: Any = None) -> Any:
        return self.quick_eval(variables, frozen), {}


def toy_config(**train: Any) -> RunBase:
    """A run config for the toy; keyword arguments are the ``train`` section's plain data."""
    from latent_jax.core.config import parse

    base = {"steps": 20, "batch_size": 16, "log_every": 5, "log": {"tensorboard": False},
            "optimizer": {"lr": 0.02}}
    return parse(RunBase, {"system": "toy", "train": {**base, **train}})
