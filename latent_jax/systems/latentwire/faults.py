"""Errors of evaluations, made on purpose: what they look like, for the gallery of failures.

None of them is ever on by itself, and a run in which one is says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_jax.core import trees

Padded = tuple[np.ndarray, np.ndarray]

#: The reader attends to the padding of a batch, as LLMs do that are given embeddings and no mask.
PADDING = "attend_padding"
#: Generated tokens lose a prompt that was never among them.
CUT = "cut_prompt_off"
#: The largest trained part is evaluated as it was before training.
FRESH = "part_not_loaded"
FAULTS = (PADDING, CUT, FRESH)


def attended(padded: Padded) -> Padded:
    """The same ids, all of them real."""
    return padded[0], np.ones_like(padded[1])


def refilled(padded: Padded, real: np.ndarray) -> Padded:
    """The same real ids with others in the padding, which must make no difference.

    Args:
      padded: ids, and the mask that the reader is handed.
      real: which ids are no padding, whatever that mask says.
    """
    return np.where(real, padded[0], padded[0] + 1), padded[1]


def cut_off(
    ids: np.ndarray, lengths: np.ndarray, prompt: int
) -> tuple[np.ndarray, np.ndarray]:
    """Generated ids ``[b, n]`` without their first ``prompt``, and how many are left."""
    return ids[:, prompt:], np.maximum(lengths - prompt, 0)


def with_fresh_part(
    trained: Mapping[str, Any], fresh: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Parameters with the largest part as it was before training, and the name of the part."""
    part = max(trained, key=lambda name: trees.count_params(trained[name]))
    return {**trained, part: fresh[part]}, part
