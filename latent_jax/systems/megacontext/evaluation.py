"""What a MegaContext run measures at its end."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_jax.core.errors import DataError
from latent_jax.core.parts import Parts
from latent_jax.data import LongQuestion, load_long_questions
from latent_jax.ops import bootstrap
from latent_jax.systems.megacontext import base_lora, documents, match_data, recipe, stream, tasks
from latent_jax.systems.megacontext.comparison import nll_at_h, policy_table
from latent_jax.systems.megacontext.consistency import Checked
from latent_jax.systems.megacontext.episodes import SWITCHING, Filler, evenly
from latent_jax.systems.megacontext.matcher import Finder
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.policy_names import LOOKING, MEASURED, POLICIES
from latent_jax.systems.megacontext.recovery import Recovery


class Evaluation:
    """Mixed into the system; needs its ``config``, ``backbone``, ``gists`` and ``recovery``.

    Attributes:
      checked: entries that the part of the evaluation that runs has read (`consistency`).
    """

    config: Any
    backbone: Any
    recovery: Recovery
    checked = Checked()
    evaluates_in_parts = True

    def _measure(self, level: int) -> Recovery:
        """Of the histories of level 1, or where whole nodes of a level above fill them."""
        nodes = max(self.config.eval.history // int(self.config.model.layout.widths[level]), 1)
        return Recovery(self.decoder, self.gists, self.sink, self.config, level, nodes)

    def _measures(self) -> dict[int, Recovery]:
        """What measures each level that is asked for."""
        e, levels = self.config.eval, self.config.model.layout.levels
        upper = range(2, levels + 1) if e.upper_rows else ()
        return {1: self.recovery} | {level: self._measure(level) for level in upper}

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

    def evaluate(self, variables, frozen, progress=None, parts=None):
        """Recovery at every level with its controls, losses of policies, and what else is asked.

        Args:
          parts: keeps what is finished (`core.parts.Parts`); artefacts of kept parts are left out.

        ``positions.inconsistent`` counts entries of contexts, of ``positions.entries``, that did
        not stand where their text did, also by part: it must be 0.
        """
        e, artefacts = self.config.eval, {}
        todo = {}
        for level, measure in self._measures().items():
            limit = e.rows if level == 1 else e.upper_rows
            todo[f"recovery.lod{level}"] = functools.partial(self._recovery, measure, limit)
        todo |= {
            name: part for name, part, wanted in (
                ("policies", self._policies, e.budgets), ("stream", self._stream, e.stream),
                ("tasks", self._tasks, e.tasks), ("reach", self._reach, e.tasks),
                ("passkey", self._passkey, e.passkey_blocks),
                ("questions", self._questions, e.questions),
                ("documents", self._documents, e.documents),
            ) if wanted
        }  # fmt: skip
        keep, metrics = Parts(None, "") if parts is None else parts, {}
        for name, part in todo.items():
            def checked(name=name, part=part):
                self.checked = Checked()
                found = part(variables, frozen, artefacts, progress)
                seen = dataclasses.asdict(self.checked)
                return found | {f"positions.{name}.{k}": n for k, n in seen.items() if n}

            metrics |= keep(name, checked)
        for what in ("entries", "inconsistent"):
            told = [n for name, n in metrics.items()
                    if name.startswith("positions.") and name.endswith(f".{what}")]  # fmt: skip
            metrics[f"positions.{what}"] = sum(told)
        return metrics, artefacts

    def _store(self, variables, frozen, path: str) -> Memory:
        """An empty store, whose entries are counted with this evaluation's."""
        memory = self.memory(variables, frozen, path, writable=True)
        memory.checked = self.checked
        return memory

    def _recovery(self, measure, limit, variables, frozen, artefacts, progress) -> dict[str, Any]:
        """Losses of all arms at one level."""
        e, level = self.config.eval, measure.level
        rows = self.held_out(measure, limit)[:limit]
        params, base = variables["params"], frozen["base"]
        measure.checked = self.checked
        found = measure.losses(params, base, rows, e.arms, progress)
        artefacts[f"histories.lod{level}"] = found
        metrics = measure.summary(found)
        if self.config.model.lora is None:
            return metrics
        # What the base as it is makes of the same, and how far from that the deltas are.
        alone = measure.losses(base_lora.frozen(params), base, rows, e.arms, progress)
        metrics |= {f"frozen.{name}": x for name, x in measure.summary(alone).items()}
        for arm, losses in found.items():
            name = f"nll_at_h.lod{level}.{arm}.minus_frozen_full"
            metrics[name] = float((losses - alone["full"]).mean())
            metrics[f"{name}.ci95"] = list(bootstrap.difference_interval(losses, alone["full"]))
        return metrics

    def _movers(self) -> list[str]:
        """Policies that a runtime can use."""
        return [p for p in self.config.eval.policies if p in POLICIES and p != MEASURED]

    def _encoded(self, text: str) -> Filler:
        """A text and its tokens."""
        return Filler(text, np.asarray(self.backbone.tokenizer.encode(text), np.int32))

    @functools.cached_property
    def _filler(self) -> Filler:
        """Held-out text around hidden facts."""
        return self._encoded(recipe.filler(self.config))

    def _fillers(self, kinds: Sequence[str]) -> tuple[Filler, list[Filler]]:
        """The same, and the two topics if one of the tasks switches between them."""
        both = recipe.topics(self.config) if {*kinds} & {*SWITCHING} else ()
        return self._filler, [self._encoded(text) for text in both]

    def _tasks(self, variables, frozen, artefacts, progress) -> dict[str, Any]:
        """Facts hidden in held-out text, asked for."""
        e = self.config.eval
        depths = evenly(e.task_rows)
        return self._hidden(variables, frozen, progress, e.tasks, e.task_blocks, depths)

    def _passkey(self, variables, frozen, artefacts, progress) -> dict[str, Any]:
        """Pass keys by depth and length, asked for; the lengths of ``eval.reach`` are looked
        through alone.
        """
        e, found = self.config.eval, {}
        depths, kinds = np.repeat(e.passkey_depths, e.task_rows).tolist(), ("passkey",)
        for blocks in e.passkey_blocks:
            found |= self._hidden(variables, frozen, progress, kinds, blocks, depths, True)
        return found | self._looked_for(variables, frozen, progress, kinds, depths, True)

    def _hidden(self, variables, frozen, progress, kinds, blocks, depths, by_depth=False):
        e = self.config.eval
        with (
            tempfile.TemporaryDirectory() as folder,
            self._store(variables, frozen, str(Path(folder) / "store")) as memory,
        ):
            return tasks.measure(
                memory, *self._fillers(kinds), kinds, self._movers(), e.budgets[0], blocks,
                depths, self.config.seed, progress, by_depth, e.task_alike,
            )  # fmt: skip

    def _reach(self, variables, frozen, artefacts, progress) -> dict[str, Any]:
        """How far the allocator alone finds the facts."""
        e = self.config.eval
        return self._looked_for(variables, frozen, progress, e.tasks, evenly(e.task_rows))

    def _looked_for(self, variables, frozen, progress, kinds, depths, by_depth=False):
        c, e = self.config, self.config.eval
        return tasks.reach(
            self.backbone.tokenizer, self.backbone.config.vocab_size, c.model.layout,
            *self._fillers(kinds), kinds, [p for p in self._movers() if p not in LOOKING],
            e.reach_budget, e.reach, depths, c.seed, progress, self.finder(variables, frozen),
            by_depth,
        )  # fmt: skip

    def finder(self, variables, frozen) -> Finder | None:
        """What finds the blocks that answer a question, if this run has it."""
        c = self.config.model
        if c.matcher is None:
            return None
        backbone = dataclasses.replace(self.backbone, params=frozen["base"])
        return Finder(backbone, c.matcher, c.layout.block, variables["params"]["matcher"])

    def _questions(
        self, variables, frozen, artefacts, progress, count: int | None = None,
        most: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Held-out facts among the blocks of other held-out text, at most so many."""
        e, c = self.config.eval, self.config.model
        window = c.matcher.window * c.layout.block
        ids = self._filler.ids[: (most or e.question_blocks) * c.layout.block]
        return match_data.measure(
            self.finder(variables, frozen), self.config, self.backbone.tokenizer,
            ids[: len(ids) // window * window], count or e.questions, progress,
        )  # fmt: skip

    def _stream(self, variables, frozen, artefacts, progress) -> dict[str, Any]:
        """A held-out text read while it grows."""
        e, c, ids = self.config.eval, self.config, self.growing()
        with (
            tempfile.TemporaryDirectory() as folder,
            self._store(variables, frozen, str(Path(folder) / "store")) as memory,
        ):
            return stream.read(
                memory, ids, self._movers(), e.budgets[0], e.stream // 2, c.seed, progress
            )[0]

    def questions(self) -> list[LongQuestion]:
        """Questions on long documents, the English ones: others need other scores.

        Raises:
          DataError: there are none.
          ConfigError: a document that the working context cannot hold.
        """
        e = self.config.eval
        found = [q for q in load_long_questions(e.documents) if q.language == "en"]
        if not found:
            raise DataError(f"eval.documents: {e.documents} has no question of language 'en'")
        found = found[: e.document_rows]
        documents.check(
            found, self.backbone.tokenizer, self.config.model.layout, e.budgets[0],
            e.document_tokens,
        )  # fmt: skip
        return found

    def _documents(self, variables, frozen, artefacts, progress) -> dict[str, Any]:
        """Questions on long documents, answered from a store of each."""
        e = self.config.eval

        def make(path: str):
            return self._store(variables, frozen, path)

        found, artefacts["samples"] = documents.measure(
            make, self.questions(), self._movers(), e.budgets[0], e.document_tokens,
            progress=progress,
        )  # fmt: skip
        return found

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

    def _policies(self, variables, frozen, artefacts, progress) -> dict[str, Any]:
        """Losses at places of long held-out texts, by policy and size of the context."""
        e, parts = self.config.eval, []
        horizon, rows = e.horizon * self.config.model.layout.block, self.long_histories()
        places = np.linspace(e.long // 2, e.long, e.places).astype(int)
        for number, ids in enumerate(rows):
            with tempfile.TemporaryDirectory() as folder:
                store = str(Path(folder) / "store")
                with self._store(variables, frozen, store) as memory:
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
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        artefacts["places"] = found
        texts = np.repeat(np.arange(len(parts)), len(places))
        return policy_table(found, e.budgets, texts)
