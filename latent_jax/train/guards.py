"""Guards: what watches a run from the host and says when it goes wrong.

Warnings go to ``warnings.jsonl`` (one object per line: step, guard, metric, value, message), to
the progress callback, and from there to the report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from latent_jax.core.errors import RunError
from latent_jax.train.config import GuardConfig
from latent_jax.train.writers import truncate_jsonl


class Guards:
    """Counts consecutive bad observations per rule and non-finite steps in a row.

    Attributes:
      stop_reason: set when a rule with ``stop`` fired; the loop ends after the current step.
    """

    def __init__(
        self, rules: Iterable[GuardConfig], max_nonfinite: int, path: Path | None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._rules = tuple(rules)
        self._max_nonfinite = max_nonfinite
        self._path = path
        self._notify = notify
        self._in_a_row = [0] * len(self._rules)
        self._fired = [False] * len(self._rules)
        self._nonfinite = 0
        self.stop_reason: str | None = None

    def observe(self, step: int, row: Mapping[str, Any]) -> None:
        """Looks at one row of metrics.

        Raises:
          RunError: after ``max_nonfinite`` skipped steps in a row, naming the terms.
        """
        self._check_finite(step, row)
        for i, rule in enumerate(self._rules):
            value = row.get(rule.metric)
            if not isinstance(value, int | float) or step <= rule.after:
                continue
            bad = (rule.above is not None and value > rule.above) or (
                rule.below is not None and value < rule.below
            )
            self._in_a_row[i] = self._in_a_row[i] + 1 if bad else 0
            if not bad:
                self._fired[i] = False
            elif self._in_a_row[i] >= rule.patience and not self._fired[i]:
                self._fired[i] = True
                bound = f"above {rule.above}" if rule.above is not None else f"below {rule.below}"
                text = f"{rule.metric} = {value:.4g} is {bound}"
                text += f": {rule.message}" if rule.message else ""
                self.warn(step, "stop" if rule.stop else "guard", rule.metric, value, text)
                if rule.stop:
                    self.stop_reason = text

    def _check_finite(self, step: int, row: Mapping[str, Any]) -> None:
        if not row.get("skipped"):
            self._nonfinite = 0
            return
        self._nonfinite += 1
        bad = [k[5:] for k, v in row.items() if k.startswith("term.") and not math.isfinite(v)]
        bad += [k for k, v in row.items() if k.startswith("grad_norm") and not math.isfinite(v)]
        names = ", ".join(bad) or "loss"
        if self._nonfinite == 1:
            self.warn(step, "nonfinite", "skipped", 1.0, f"step skipped, not finite: {names}")
        if self._nonfinite >= self._max_nonfinite:
            raise RunError(
                f"stopped at step {step}: {self._nonfinite} steps in a row were not finite "
                f"({names}); the state before them is kept. Lower train.optimizer.lr, set "
                "train.optimizer.clip_norm, or look at that loss term's inputs"
            )

    def warn(self, step: int, guard: str, metric: str, value: float, message: str) -> None:
        """Records a warning."""
        value = value if math.isfinite(value) else None  # type: ignore[assignment]
        line = {"step": step, "guard": guard, "metric": metric, "value": value, "message": message}
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        if self._notify is not None:
            self._notify(f"warning at step {step}: {message}")

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the counters."""
        return {
            "in_a_row": list(self._in_a_row), "fired": list(self._fired),
            "nonfinite": self._nonfinite, "stop_reason": self.stop_reason,
        }

    def set_state(self, state: Mapping[str, Any], step: int) -> None:
        """Continues after a restored step; later warnings are dropped from the file."""
        if "in_a_row" in state and len(state["in_a_row"]) == len(self._rules):
            self._in_a_row = list(state["in_a_row"])
            self._fired = list(state["fired"])
        self._nonfinite = int(state.get("nonfinite", 0))
        self.stop_reason = state.get("stop_reason")
        if self._path is not None:
            truncate_jsonl(self._path, step)


def read_warnings(out: Path) -> list[dict[str, Any]]:
    """Returns the warnings of a run directory."""
    path = Path(out) / "warnings.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
