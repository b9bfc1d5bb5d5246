"""The focus of who may look ahead: every action measured on the text that is to be predicted."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Int

from latent_jax.systems.megacontext import policies
from latent_jax.systems.megacontext import tiling as tl
from latent_jax.systems.megacontext.allocator import FocusConfig, refocus
from latent_jax.systems.megacontext.counterfactual import Counterfactuals, actions
from latent_jax.systems.megacontext.focus import before_tail
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.policy_names import MEASURED
from latent_jax.systems.megacontext.tiling import Tiling
from latent_jax.systems.megacontext.utilities import utilities


class Oracle:
    """Greedy focus by measured utilities, under the same allocator as any other policy.

    It starts from the same tiling as the others and stops at the first iteration that does not
    lower the loss (actions that help one by one may not help together), so it is never worse than
    that start. It is a bound for one-step greedy policies, not for all.

    Args:
      memory: the history with its gists.
      budget: entries of the working context, W.
      focus: how eagerly the focus moves.
      steps: at most so many iterations.
    """

    def __init__(self, memory: Memory, budget: int, focus: FocusConfig, steps: int):
        self.layout, self.budget, self.focus, self.steps = (
            memory.model.layout, budget, focus, steps,
        )  # fmt: skip
        self.counterfactuals = Counterfactuals(memory, budget)
        self._score = jax.jit(policies.make(MEASURED, self.layout, budget))

    def settle(
        self, cursor: int, live: Int[np.ndarray, " t"], start: int, horizon: int
    ) -> tuple[float, Tiling]:
        """The lowest loss it finds at a place, and the context that has it.

        Args:
          cursor: blocks of history.
          live: the protected tail, then the horizon.
          start: position of the first of them.
          horizon: tokens that are predicted.
        """
        tiling, best = tl.start(self.layout, cursor, self.budget), None
        for step in range(self.steps + 1):
            # The last context is only read, not changed any more.
            todo = actions(self.layout, tiling) if step < self.steps else []
            nodes, _ = before_tail(self.layout, tiling)
            found = self.counterfactuals.measure(nodes, todo, live, start, horizon)
            if best is not None and found.nll >= best[0]:
                break
            best = found.nll, tiling
            size = tiling.level.shape[0]
            worth, _ = utilities(self.layout, size, todo, found.delta_nll)
            tiling, trace = refocus(
                self.layout, self.focus, self.budget, tiling,
                self._score(tiling, {"utility": worth}),
            )  # fmt: skip
            if not int(trace.count):
                break
        return best
