"""What a MegaContext run measures at its end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from latent_jax.systems.megacontext import recipe, stream, tasks
from latent_jax.systems.megacontext.config import LOOKING, MEASURED, POLICIES
from latent_jax.systems.megacontext.recovery import Recovery
from latent_jax.systems.megacontext.runtime import nll_at_h, policy_table


class Evaluation:
    """Mixed into the system; needs its ``config``, ``backbone``, ``gists`` and ``recovery``."""

    config: Any
    backbone: Any
    recovery: Recovery

    def _measure(self, level: int, nodes: int) -> Recovery:
        return Recovery(self.decoder, self.gists, self.sink, self.config, level, nodes)

    def held_out(self, measure: Recovery, limit: int) -> np.ndarray:
        """Held-out histories with their tail and horizon, ``[n, tokens]``."""
        if measure.length not in self._held_out:
            self._held_out[measure.length] = recipe.histories(
                self.config, self.backbone.tokenizer, "validation", measure.length, limit
            )
        return self._held_out[measure.length]

    def eval_data(self) -> np.ndarray:
        """Held-out histories for gists of level 1."""
        e = self.config.eval
        return self.held_out(self.recovery, max(e.rows, e.quick_rows))

    def evaluate(self, variables, frozen, progress=None):
        """Recovery at every level with its controls, and losses of all arms."""
        e, metrics, artefacts = self.config.eval, {}, {}
        for level in range(1, self.config.model.layout.levels + 1):
            measure = self.recovery
            if level > 1:  # the same histories where whole nodes fill them
                width = int(self.config.model.layout.widths[level])
                measure = self._measure(level, max(e.history // width, 1))
            limit = e.rows if level == 1 else e.upper_rows
            if not limit:
                continue
            rows = self.held_out(measure, limit)[:limit]
            params, base = variables["params"], frozen["base"]
            found = measure.losses(params, base, rows, e.arms, progress)
            metrics |= measure.summary(found)
            artefacts[f"histories.lod{level}"] = found
        if e.budgets:
            found = self._policies(variables, frozen, progress)
            artefacts["places"] = found
            metrics |= policy_table(found, e.budgets)
        if e.stream:
            metrics |= self._stream(variables, frozen, progress)
        if e.tasks:
            metrics |= self._tasks(variables, frozen, progress)
        return metrics, artefacts

    def _tasks(self, variables, frozen, progress) -> dict[str, Any]:
        """Facts hidden in held-out text, asked for."""
        e, c, tokenizer = self.config.eval, self.config, self.backbone.tokenizer
        text = recipe.filler(c)
        ids = np.asarray(tokenizer.encode(text), np.int32)
        movers = [p for p in e.policies if p in POLICIES and p != MEASURED]
        with (
            tempfile.TemporaryDirectory() as folder,
            self.memory(variables, frozen, str(Path(folder) / "store"), writable=True) as memory,
        ):
            found = tasks.measure(
                memory, text, ids, e.tasks, movers, e.budgets[0], e.task_blocks, e.task_rows,
                c.seed, progress,
            )  # fmt: skip
        alone = [p for p in movers if p not in LOOKING]
        return found | tasks.reach(
            tokenizer, self.backbone.config.vocab_size, c.model.layout, text, ids, e.tasks, alone,
            e.reach_budget, e.reach, e.task_rows, c.seed, progress,
        )  # fmt: skip

    def _stream(self, variables, frozen, progress) -> dict[str, Any]:
        """A held-out text read while it grows."""
        e, c, ids = self.config.eval, self.config, self.growing()
        movers = [p for p in e.policies if p in POLICIES and p != MEASURED]
        with (
            tempfile.TemporaryDirectory() as folder,
            self.memory(variables, frozen, str(Path(folder) / "store"), writable=True) as memory,
        ):
            return stream.read(
                memory, ids, movers, e.budgets[0], e.stream // 2, c.seed, progress
            )[0]

    def growing(self) -> np.ndarray:
        """The text that is read while it grows."""
        c = self.config
        tokens = c.eval.stream * c.model.layout.block
        return recipe.histories(c, self.backbone.tokenizer, "validation", tokens, 1)[0]

    def long_histories(self) -> np.ndarray:
        """The texts on which policies are compared, each with its last horizon."""
        e = self.config.eval
        tokens = (e.long + e.horizon) * self.config.model.layout.block
        return recipe.histories(
            self.config, self.backbone.tokenizer, "validation", tokens, e.long_rows
        )

    def _policies(self, variables, frozen, progress) -> dict[str, np.ndarray]:
        """Losses at places of long held-out texts, by policy and size of the context."""
        e, parts = self.config.eval, []
        horizon, rows = e.horizon * self.config.model.layout.block, self.long_histories()
        places = np.linspace(e.long // 2, e.long, e.places).astype(int)
        for number, ids in enumerate(rows):
            with tempfile.TemporaryDirectory() as folder:
                store = str(Path(folder) / "store")
                with self.memory(variables, frozen, store, writable=True) as memory:
                    memory.tree.append(ids)
                    memory.build()
                    parts.append(
                        nll_at_h(
                            memory, e.budgets, e.policies, places.tolist(), horizon,
                            oracle_steps=e.oracle_steps,
                        )
                    )
            if progress is not None:
                progress("nll_at_h", number + 1, len(rows))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
