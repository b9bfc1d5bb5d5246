"""Names of focus policies, and what they have in common."""

from __future__ import annotations

# The last is told what every action would be worth, which no runtime knows.
MEASURED = "oracle"
POLICIES = (
    "recency", "sink_recency", "uniform", "random", "bm25", "match", "attention", "lens",
    MEASURED,
)  # fmt: skip
# Those that look at what the context holds, and so need its gists.
LOOKING = ("attention", "lens", MEASURED)
# Those that look for something: for a question they start from the coarsest tiling and open one
# node after another, where the others start from the newest text sharp.
SEARCHING = ("random", "bm25", "match", "attention", "lens")
# What else a long history is read through.
ENDS = ("full", "windowed", "dropped")
