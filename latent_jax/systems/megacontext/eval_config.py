"""What an evaluation of MegaContext measures."""

from __future__ import annotations

from dataclasses import dataclass

from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.policy_names import ENDS, POLICIES

# What may stand for the history; see `recovery.Recovery`.
ARMS = (
    "full", "windowed", "gist", "mean_pool", "kv_stride", "recency", "shuffled", "dropped"
)  # fmt: skip
# What costs gradient steps for every history, and is measured where it is asked for.
MORE_ARMS = ("optimised",)
# Facts hidden in a history; see `tasks`.
TASKS = (
    "passkey", "key_value", "two_hop", "straddling", "late_query", "topic_switch", "paraphrased"
)  # fmt: skip


@dataclass(frozen=True)
class EvalConfig:
    """What is measured at the end."""

    arms: tuple[str, ...] = field(
        default=ARMS, help="what stands for the history: its gists, and baselines and controls; "
        "also optimised: slots moved for each history, which meters their capacity"
    )  # fmt: skip
    optimised_steps: int = field(default=100, ge=1, help="gradient steps of the arm optimised")
    optimised_rate: float = field(
        default=0.05, gt=0, help="its learning rate, in units of each dimension's RMS"
    )

    text: str | None = field(default=None, help="held-out text source; none: data.text")
    rows: int = field(default=64, ge=2, help="held-out histories")
    history: int = field(default=7, ge=2, help="blocks that are replaced by their gists")
    upper_rows: int = field(
        default=0, ge=0,
        help="held-out histories of whole nodes of each upper level, as many as eval.history holds "
        "or one; 0: none",
    )
    horizon: int = field(default=2, ge=1, help="blocks that are predicted (H = 32 tokens each)")
    batch_size: int = field(default=8, ge=2, help="rows at once")
    quick_rows: int = field(default=16, ge=2, help="rows of the evaluation while training")
    budgets: tuple[int, ...] = field(
        default=(), ge=1, help="sizes W at which policies are compared on a long history; (): none"
    )
    policies: tuple[str, ...] = field(
        default=("full", "windowed", "uniform", "recency", "bm25", "random", "dropped"),
        help="what is compared: policies, the whole text (full, windowed), the tail only (dropped)",
    )
    oracle_steps: int = field(
        default=8, ge=1, help="focus iterations of the policy oracle, each measured afresh"
    )
    long: int = field(default=128, ge=4, help="blocks of that history")
    long_rows: int = field(default=1, ge=1, help="such histories")
    places: int = field(default=8, ge=1, help="places of each at which the horizon is predicted")
    stream: int | None = field(
        default=None, ge=8,
        help="blocks of a text that is read while it grows, at the first of eval.budgets, after as "
        "many of history as half of them; none: not measured",
    )
    tasks: tuple[str, ...] = field(
        default=(), help=f"facts that are hidden and asked for: {', '.join(TASKS)}"
    )
    task_blocks: int = field(default=64, ge=4, help="blocks of a task's history; whole windows")
    task_alike: bool = field(
        default=False, help="episodes of tasks share the gists of their filler, which are made "
        "once: what stands around a fact is filled up to whole nodes of the top level",
    )  # fmt: skip
    task_rows: int = field(default=8, ge=1, help="episodes of a task, at evenly spread depths")
    topic: str | None = field(
        default=None,
        help="text source of the other topic of late_query and topic_switch; none: both halves of "
        "the held-out text are a topic each",
    )
    passkey_blocks: tuple[int, ...] = field(
        default=(), ge=4, help="blocks of histories in which a pass key is asked for by its depth; "
        "whole windows; (): none",
    )  # fmt: skip
    passkey_depths: tuple[float, ...] = field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), ge=0, le=1,
        help="those depths, eval.task_rows episodes at each: 0 the start, 1 the end",
    )  # fmt: skip
    documents: str | None = field(
        default=None,
        help="questions on long documents: .jsonl of LongBench or InfiniteBench, or a folder of it",
    )
    document_rows: int = field(default=16, ge=1, help="most of those questions, in their order")
    document_tokens: int | None = field(
        default=None, ge=64, help="tokens of a document; longer ones lose their middle; none: all"
    )
    reach: tuple[int, ...] = field(
        default=(), ge=1,
        help="tokens of histories in which the allocator alone looks for the facts; (): none",
    )  # fmt: skip
    questions: int = field(
        default=0, ge=0, help="held-out questions whose facts a matcher ranks among the blocks of "
        "other held-out text; 0: none",
    )  # fmt: skip
    question_blocks: int = field(default=4096, ge=8, help="blocks of that text; whole windows")
    reach_budget: int = field(default=1024, ge=1, help="entries of its working context, W")
    threshold: float = field(
        default=0.05, ge=0, help="recovery counts histories whose loss costs more, nats"
    )

    def validate(self) -> None:
        """Refuses unknown arms; recovery needs its two ends."""
        allowed = (*ARMS, *MORE_ARMS)
        unknown = [a for a in self.arms if a not in allowed]
        if unknown:
            raise ConfigError(f"eval.arms: unknown {unknown}; allowed: {', '.join(allowed)}")
        if not {"full", "dropped"} <= set(self.arms):
            raise ConfigError("eval.arms: recovery is measured between full and dropped: add both")
        unknown = [t for t in self.tasks if t not in TASKS]
        if unknown:
            raise ConfigError(f"eval.tasks: unknown {unknown}; allowed: {', '.join(TASKS)}")
        if not self.passkey_depths:
            raise ConfigError("eval.passkey_depths is empty: give one depth at least")
        unknown = [p for p in self.policies if p not in (*POLICIES, *ENDS)]
        if unknown:
            raise ConfigError(
                f"eval.policies: unknown {unknown}; allowed: {', '.join((*POLICIES, *ENDS))}"
            )
