"""The focus of who may look ahead: every action measured on the text that is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence

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

    It starts from whichever is best of the tilings that policies start from (the coarsest, and the
    newest text sharp) and those that it is given, what the policies that it is compared with have
    settled on. It stops at the first iteration that does not lower the loss (actions that help one
    by one may not help together). So it is never worse than any of these, and no regret is
    negative; it is no bound for policies that it was not given.

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
        self, cursor: int, live: Int[np.ndarray, " t"], start: int, horizon: int,
        others: Sequence[Tiling] = (),
    ) -> tuple[float, Tiling]:  # fmt: skip
        """The lowest loss it finds at a place, and the context that has it.

        Args:
          cursor: blocks of history.
          live: the protected tail, then the horizon.
          start: position of the first of them.
          horizon: tokens that are predicted.
          others: tilings of that history that it may start from, too.
        """

        def measure(tiling, todo):
            nodes, _ = before_tail(self.layout, tiling)
            return self.counterfactuals.measure(nodes, todo, live, start, horizon)

        starts = [tl.start(self.layout, cursor, self.budget, coarse=c) for c in (False, True)]
        starts += list(others)
        losses = [measure(tiling, []).nll for tiling in starts]
        tiling = starts[int(np.argmin(losses))]
        best = min(losses), tiling
        for step in range(self.steps + 1):
            # The last context is only read, not changed any more.
            todo = actions(self.layout, tiling) if step < self.steps else []
            found = measure(tiling, todo)
            if step and found.nll >= best[0]:
                break
            best = min(best[0], found.nll), tiling
            size = tiling.level.shape[0]
            worth, _ = utilities(self.layout, size, todo, found.delta_nll)
            tiling, trace = refocus(
                self.layout, self.focus, self.budget, tiling,
                self._score(tiling, {"utility": worth}),
            )  # fmt: skip
            if not int(trace.count):
                break
        return best
