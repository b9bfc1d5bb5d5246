"""Parts of a long measurement, kept on disk until all of it is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_jax.core import files


class Parts:
    """What a measurement that was stopped had finished, so that it goes on from there.

    Args:
      path: JSON file; None keeps nothing.
      key: what the numbers depend on; parts kept under another key are forgotten.

    Example:
      >>> keep = Parts(None, "")
      >>> keep("recovery", lambda: {"recovery": 0.5})
      {'recovery': 0.5}
    """

    def __init__(self, path: Path | None, key: str):
        self.path, self.key, self.found = path, key, {}
        if path is not None and path.is_file():
            try:
                kept = files.parse_json(path.read_text(encoding="utf-8"))
                self.found = dict(kept["parts"]) if kept["key"] == key else {}
            except (OSError, ValueError, KeyError, TypeError):
                self.found = {}  # damaged: measured again

    def __call__(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The numbers of a part: those kept, or measured now and kept."""
        if name not in self.found:
            made = measure()
            if self.path is None:
                return made
            # As they will be read back, so that a run that was stopped reports the same numbers.
            self.found[name] = json.loads(json.dumps(made, default=files.plain))
            files.write_json(self.path, {"key": self.key, "parts": self.found})
        return self.found[name]

    def done(self) -> None:
        """Forgets all parts: the whole is written elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
