from __future__ import annotations

import jax
import numpy as np
import pytest

from latent_jax.train.diagnose import term_gradients
from latent_jax.train.testing import ToySystem


def test_term_gradients_by_group_against_hand():
    system = ToySystem(noise=0.0)
    batch = next(system.train_data("main", None))
    variables = system.init({"params": jax.random.key(0)}, batch)
    rows = term_gradients(system, variables, system.frozen, batch)
    kernel = np.asarray(variables["params"]["out"]["kernel"])
    want = 0.01 * 2 * np.linalg.norm(kernel) / kernel.size  # d/dw mean(w²), weighted
    assert rows["l2"]["grad_norm.head"] == pytest.approx(want, rel=1e-4)
    assert rows["l2"]["grad_norm.body"] == 0.0
    assert rows["l2"]["value"] == pytest.approx((kernel**2).mean(), rel=1e-4)
    assert "watched" not in rows and rows["mse"]["cosine"] > 0.9
