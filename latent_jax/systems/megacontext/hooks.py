"""What `latent-jax mega` asks of a trained run: gists, answers and labels for a store."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from latent_jax import __version__
from latent_jax.core import config as configs
from latent_jax.core.errors import RunError
from latent_jax.systems.megacontext import base_lora, labels, match_assets, telemetry
from latent_jax.systems.megacontext.label_config import LabelConfig
from latent_jax.systems.megacontext.labelling import label
from latent_jax.systems.megacontext.memory import Memory, digest
from latent_jax.systems.megacontext.runtime import Refocus, Runtime, RuntimeConfig


class StoreHooks:
    """Mixed into the system; needs its ``config`` and ``backbone``."""

    config: Any
    backbone: Any

    def memory(
        self, variables, frozen, store: str, writable: bool = False, append: bool = False
    ) -> Memory:
        """A store as this run's base, GistNet, lens and matcher see it.

        Args:
          writable, append: as of `Memory.open`.

        Raises:
          StoreError: there is none, or it belongs to something else.
        """
        backbone = dataclasses.replace(self.backbone, params=frozen["base"])
        model, params = self.config.model, variables["params"]["gist"]
        return Memory.open(
            store, backbone, model, params, digest(params, model.gist), writable,
            variables["params"].get("lens"), variables["params"].get("matcher"),
            base_lora.deltas(model.lora, backbone.config, variables["params"]), append,
        )  # fmt: skip

    def export(self, variables, frozen, to: str, run: str | None = None) -> dict[str, Any]:
        """Writes the matcher, for ``model.matcher.start``, with the record of how it was trained.

        Raises:
          RunError: this run has none, or there is no such run.
        """
        config = self.config
        if config.model.matcher is None:
            raise RunError("export: only a matcher is exported, and this run has none")
        record: dict[str, Any] = {"config": configs.to_dict(config)}
        results = None if run is None else Path(run) / "results.json"
        if results is not None and results.is_file():
            record["results"] = json.loads(results.read_text(encoding="utf-8"))
        params, out = variables["params"]["matcher"], Path(to)
        match_assets.save(out, params, config.model.matcher, self.backbone, record)
        size = sum(f.stat().st_size for f in out.iterdir())
        return {"written": out, "megabytes": f"{size / 1e6:.2f}"}

    def build_gists(self, variables, frozen, store: str, progress=None) -> str:
        """Makes all gists of a store that are missing or of another version."""
        with self.memory(variables, frozen, store, writable=True) as memory:
            began = time.perf_counter()
            made = memory.build(progress)
            seconds = time.perf_counter() - began
            rate = made.get(1, 0) * self.config.model.layout.block / max(seconds, 1e-9)
        each = ", ".join(f"{n:,} of level {level}" for level, n in sorted(made.items()))
        told = f"{store}: gists made: {each or 'none was missing'} ({rate:,.0f} tokens/s)"
        if memory.damaged:
            told += (
                f"; {len(memory.damaged)} blocks are damaged and have none, the first at token "
                f"{memory.damaged[0] * self.config.model.layout.block:,}: `mega info --verify` "
                "says which"
            )
        return told

    def recall(
        self, variables, frozen, store: str, prompt: str, budget: int = 512,
        policy: str = "bm25", max_new_tokens: int = 32, trace: str | None = None,
        append: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Continues a prompt behind a working context that was focused for it and moves with it.

        Args:
          append: add prompt and answer to the store, with their gists.

        Raises:
          StoreError, ConfigError: what is wrong with the store or the options.
          RunError: the trace could not be written; said before anything is generated.
        """
        if trace is not None and not Path(trace).absolute().parent.is_dir():
            raise RunError(f"--trace {trace}: no such folder; make it first")
        with self.memory(variables, frozen, store, append=append) as memory:
            runtime = Runtime(memory, RuntimeConfig(budget, policy))
            answer = runtime.answer(prompt, max_new_tokens, append)
            if trace is not None:
                telemetry.save(trace, runtime.layout, runtime.history, budget)
            levels = [level for level, _ in answer.nodes]
            counts = {f"level {n}": levels.count(n) for n in sorted(set(levels))}
            raw = " ".join(str(index) for level, index in answer.nodes if level == 0)
            found = {
                "answer": answer.text,
                "history": f"{len(memory.tree):,} tokens",
                "nodes": ", ".join(f"{n} of {name}" for name, n in counts.items()),
                "raw blocks": raw or "none but the tail",
                "seconds": ", ".join(f"{k} {v:.2f}" for k, v in answer.seconds.items()),
            }
            if answer.refocuses:
                found["refocus"] = _by_place(answer.refocuses)
            if memory.tree.damaged:
                which = ", ".join(map(str, sorted(memory.tree.damaged)))
                found["warning"] = (
                    f"damaged blocks are left out: {which}; `mega info --verify` says where"
                )
            return found

    def label(
        self, variables, frozen, store: str, to: str, options: LabelConfig, progress=None,
        run: Path = Path(),
    ) -> dict[str, Any]:  # fmt: skip
        """Writes a table of counterfactual utilities of a store.

        Args:
          to: Parquet file.
          options: which contexts.
          progress: as in `labelling.label`.
          run: directory of this run, for the record.
        """
        with self.memory(variables, frozen, store) as memory:
            began = time.perf_counter()
            table, provenance = label(memory, options, progress)
            seconds = time.perf_counter() - began
        provenance |= {
            "run": str(Path(run).resolve()), "config": configs.to_dict(self.config),
            "version": __version__,
        }  # fmt: skip
        labels.write(to, table, provenance)
        deltas = np.asarray([row["delta_nll"] for row in table if row["kind"] > 0])
        losses = np.asarray([row["delta_nll"] for row in table if row["kind"] < 0])
        count = len(deltas) + len(losses)
        return {
            "table": to,
            "snapshots": options.places,
            "actions": f"{count:,} ({count / seconds:.1f} per second)",
            "expand": _spread(deltas),
            "collapse": _spread(losses),
            "gists": provenance["gists"],
        }


def _by_place(refocuses: list[Refocus]) -> str:
    """Seconds of moving the focus, by where in the context its first edit was."""
    told = []
    for quarter in range(4):
        spent = [r.seconds for r in refocuses if min(int(4 * r.first), 3) == quarter]
        if spent:
            each = f"{np.median(spent):.2f} s" + (f", {len(spent)} times" if spent[1:] else "")
            told.append(f"{25 * quarter} to {25 * quarter + 25} %: {each}")
    entries = np.mean([r.entries for r in refocuses])
    return f"first edit at {'; '.join(told)}; {entries:.0f} entries written each time"


def _spread(deltas: np.ndarray) -> str:
    if not len(deltas):
        return "none"
    low, middle, high = np.quantile(deltas, [0.1, 0.5, 0.9])
    return (
        f"{len(deltas):,}; change of the loss {middle:+.4f} nats per token (median; 10 % below "
        f"{low:+.4f}, 10 % above {high:+.4f})"
    )
