"""The known ways in which a compressor fails, and which of them a run shows.

A finding is one line: its name, what is seen with its figures, and what to do. For each,
``configs/latentwire/failures`` holds a run that shows it, and one, ``repaired``, shows none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latent_jax.systems.latentwire import causes, symptoms
from latent_jax.systems.latentwire.diagnose import Evidence


def findings(
    statistics: Mapping[str, float] | None = None,
    results: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    log: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """What is wrong, one line each as ``name: what is seen; what to do``; empty when nothing known
    is.

    Args:
      statistics: of `latent_statistics`.
      results: of ``results.json``.
      samples: of ``samples.jsonl``.
      log: of ``metrics.jsonl``.
    """
    seen = Evidence(statistics or {}, results or {}, samples, log)

    def look(detectors: Mapping[str, Any]) -> list[str]:
        return [f"{name}: {line}" for name, find in detectors.items() for line in find(seen)]

    broken = look(symptoms.OF_EVALUATION)
    found = [*broken, *look(causes.CAUSES), *look(symptoms.SYMPTOMS)]
    if broken:  # answers that nothing could get right say nothing about latents
        return found
    return [*found, *look(causes.OF_ANSWERS), *look(symptoms.OF_ANSWERS)]
