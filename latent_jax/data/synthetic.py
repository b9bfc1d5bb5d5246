"""Generated spacing sequences: random matrices, and processes whose best possible score is known.

Source strings: ``cue:n=512,count=100000,seed=0`` and ``gue:…`` (`latent_jax.data.random_matrix`),
``poisson:count=…,seed=…``, ``picket:sigma=0.05,…`` (a picket fence with independent Gaussian
jitter of the gaps), ``ar:phi=0.5/-0.3,sigma=0.2,…`` (a Gaussian autoregression around 1).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64
from scipy.signal import lfilter

from latent_jax.core.errors import DataError
from latent_jax.data import random_matrix


def poisson(count: int = 100_000, seed: int = 0) -> tuple[Float64[np.ndarray, " n"], int]:
    """Gaps of a Poisson process: independent, exponential with mean 1."""
    return np.random.default_rng(seed).exponential(size=count), count


def picket(
    count: int = 100_000, seed: int = 0, sigma: float = 0.05
) -> tuple[Float64[np.ndarray, " n"], int]:
    """Gaps of 1 with independent Gaussian jitter ``sigma``; none with ``sigma=0``."""
    return 1 + sigma * np.random.default_rng(seed).standard_normal(count), count


def autoregression(
    count: int = 100_000, seed: int = 0, phi: Sequence[float] = (0.5, -0.3), sigma: float = 0.2
) -> tuple[Float64[np.ndarray, " n"], int]:
    """Gaussian autoregression ``s_n - 1 = sum_j phi_j (s_{n-j} - 1) + sigma e_n``, stationary.

    Raises:
      DataError: coefficients without a stationary solution.
    """
    roots = np.roots([1.0, *(-np.asarray(phi))])
    radius = float(np.abs(roots).max(initial=0.0))
    if radius >= 0.999:
        raise DataError(f"ar: phi={tuple(phi)} is not stationary (largest root {radius:.3f})")
    # Started from rest, the sequence has forgotten it to 1e-9 after this many steps.
    settle = int(np.ceil(np.log(1e-9) / np.log(max(radius, 0.1))))
    noise = sigma * np.random.default_rng(seed).standard_normal(count + settle)
    return 1 + lfilter([1.0], [1.0, *(-np.asarray(phi))], noise)[settle:], count


KINDS: dict[str, Callable[..., tuple[Float64[np.ndarray, " n"], int]]] = {
    "cue": random_matrix.cue,
    "gue": random_matrix.gue,
    "poisson": poisson,
    "picket": picket,
    "ar": autoregression,
}


def is_synthetic(source: str) -> bool:
    """Whether a source string names a generated sequence."""
    return source.partition(":")[0] in KINDS


def generate(source: str) -> tuple[Float64[np.ndarray, " n"], int]:
    """Gaps of a source string, and how many of them are an unbroken run.

    Raises:
      DataError: an option that the kind does not have, or a value that it cannot take.
    """
    kind, options = _parse(source)
    return KINDS[kind](**options)


def optimum(source: str) -> float | None:
    """The lowest possible negative log-likelihood (nats a gap, whole past known), if it is closed.

    Exponential: 1. Gaussian of standard deviation sigma: ``ln(2 pi e sigma^2) / 2``. None for
    random matrices: see `latent_jax.systems.spacing.limits`.
    """
    kind, options = _parse(source)
    if kind == "poisson":
        return 1.0
    if kind in ("picket", "ar"):
        default = inspect.signature(KINDS[kind]).parameters["sigma"].default
        sigma = options.get("sigma", default)
        return float(0.5 * np.log(2 * np.pi * np.e * sigma**2)) if sigma else -np.inf
    return None


def _parse(source: str) -> tuple[str, dict]:
    """Splits ``kind:name=value,…`` and converts each value like the generator's default."""
    kind, _, rest = source.partition(":")
    known = {n: p.default for n, p in inspect.signature(KINDS[kind]).parameters.items()}
    options = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        name, _, text = (part.strip() for part in item.partition("="))
        try:
            value = _value(text, known[name])
        except (KeyError, ValueError):
            allowed = ", ".join(f"{n}={_show(d)}" for n, d in known.items())
            raise DataError(f"source '{source}': '{item}' is not one of {allowed}") from None
        low = {"count": 1, "n": 2}.get(name, 0)
        if name != "phi" and not low <= value < np.inf:
            raise DataError(f"source '{source}': {name}={text} must be at least {low}")
        options[name] = value
    return kind, options


def _value(text: str, default: object) -> object:
    if isinstance(default, tuple):
        return tuple(float(part) for part in text.split("/"))
    return type(default)(text)


def _show(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
