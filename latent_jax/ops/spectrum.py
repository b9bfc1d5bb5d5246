"""What a spectrum says of the dimensions that are in use."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def effective_rank(eigenvalues: Float[np.ndarray, " n"]) -> float:
    """Exponential of the entropy of the eigenvalues' shares (Roy & Vetterli 2007).

    Args:
      eigenvalues: of a covariance or Gram matrix, in any order; negative ones, which only rounding
        makes, count as zero.

    Returns:
      Between 1 (one eigenvalue; also none above zero) and the number of eigenvalues (all equal).

    Example:
      >>> effective_rank(np.asarray([2.0, 2.0, 0.0]))
      2.0
    """
    energy = np.maximum(np.asarray(eigenvalues, np.float64), 0)
    share = energy / max(energy.sum(), 1e-300)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))
