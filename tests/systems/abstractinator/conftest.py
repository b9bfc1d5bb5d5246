"""A run small enough to train in seconds."""

from __future__ import annotations

import copy
from typing import Any

import pytest

_TINY = {
    "system": "abstractinator", "name": "t",
    "segments": {"rule": "space", "longest": 6, "budget": 8},
    "level": {
        "width": 16, "heads": 2, "ff": 32, "compressor_layers": 1, "reach": 8, "queries": 4,
        "row_width": 16, "expander_layers": 1, "lookback": 1, "codes": 16, "stages": 3,
        "vq": {"reset": {"stale": 5}},
    },
    "top": {"layers": 1, "width": 16, "heads": 2, "ff": 32},
    "byte_lm": {"layers": 1, "width": 16, "heads": 2, "ff": 32},
    "data": {"text": "pydoc", "window": 24},
    "train": {
        "steps": 240, "batch_size": 32, "log_every": 10, "log": {"tensorboard": False},
        "optimizer": {"lr": 0.01, "warmup_steps": 10, "weight_decay": 0.01},
        "phases": [
            {"name": "level0", "steps": 140, "data": "level0", "train": ["compressor", "expander"]},
            {"name": "top", "steps": 50, "data": "top", "train": ["top"]},
            {"name": "peer", "steps": 0, "data": "byte_lm", "train": ["byte_lm"]},
        ],
    },
    "eval": {"windows": 96, "batch_size": 32, "quick": 8},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> Any:
    """Makes the tree of a tiny run's config, with some sections changed."""

    def make(**sections: Any) -> dict[str, Any]:
        tree = copy.deepcopy(_TINY)
        for name, value in sections.items():
            tree[name] = tree[name] | value if isinstance(tree.get(name), dict) else value
        return tree

    return make
