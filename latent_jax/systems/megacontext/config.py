"""Everything a MegaContext run can be told."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from latent_jax.backbones.config import BackboneConfig
from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.base_lora import PART as LORA
from latent_jax.systems.megacontext.base_lora import BaseLoraConfig
from latent_jax.systems.megacontext.label_config import LabelConfig, labelled_blocks
from latent_jax.systems.megacontext.layout import Layout, cover_cost, roomy
from latent_jax.systems.megacontext.policy_names import ENDS, POLICIES
from latent_jax.train.config import RunBase
from latent_jax.train.curriculum import ScheduleConfig


@dataclass(frozen=True)
class GistConfig:
    """How a block, or a group of gists, becomes the gist above it."""

    kind: Literal["reads", "heads", "embeddings"] = field(
        default="reads",
        help="reads: keys and values by a GistNet, trained; heads: the block's own keys and "
        "values, of which every head keeps as many as it needs (calibrated, not trained); "
        "embeddings: inputs of the base by a GistNet, trained",
    )
    reads: int = field(
        default=4, ge=1, help="attention reads per slot and head, each with a map of its own"
    )
    streams: int = field(
        default=2, ge=1, help="embeddings: layers of the base whose streams a slot reads"
    )
    content: float = field(
        default=8.0, ge=0,
        help="embeddings: how much the first read of a slot prefers words that the base did not "
        "expect at first, in logits",
    )  # fmt: skip
    window: int = field(
        default=8, ge=1, help="blocks that the base encodes together; no gist depends on others"
    )
    lead: int = field(
        default=0, ge=0,
        help="blocks before a window that the base reads with it: without them the first blocks of "
        "a window know nothing of what came before",
    )  # fmt: skip
    place: Literal["centre", "start"] = field(
        default="centre", help="rotary position of a slot within its stretch of the span"
    )
    focus: float = field(
        default=4.0, ge=0, help="how much a slot prefers its own stretch at first, in logits"
    )
    queries: int = field(
        default=512, ge=1, help="heads: queries of other texts that a block's entries answer"
    )
    reach: int = field(
        default=448, ge=1, help="heads: tokens behind a block over which those queries stand"
    )
    again: float = field(
        default=0.1, ge=0, help="heads: weight of the block's own tokens, read a second time"
    )
    ridge: float = field(
        default=0.1, gt=0, help="heads: ridge of the fit, in mean squared attention of an entry"
    )
    calibration: int = field(
        default=16, ge=2,
        help="heads: training windows that lend queries and share out the room; embeddings: that "
        "tell which words are unexpected",
    )
    places: int = field(
        default=128, ge=1, help="heads: most entries of one head in a gist of the upper levels"
    )

    def validate(self) -> None:
        """Refuses text before windows whose entries are made anew for every context, and what
        gists of the text's own entries do not look at.
        """
        if self.kind == "heads":
            given = {f.name: f.default for f in dataclasses.fields(self)}
            unread = [n for n in ("reads", "focus", "place") if getattr(self, n) != given[n]]
            if unread:
                raise ConfigError(
                    f"model.gist.{unread[0]}={getattr(self, unread[0])}: kind=heads has no slots "
                    "that read, and its entries stand where their text does: leave it out"
                )
        if self.lead and self.kind == "embeddings":
            raise ConfigError(
                "model.gist.lead: gists that are input embeddings are read together in every "
                "context, and windows have no lead: set it to 0"
            )


@dataclass(frozen=True)
class LensConfig:
    """LensNet: what the newest gists make of every node of the working context."""

    width: int = field(default=64, ge=1, help="residual stream")
    heads: int = field(default=4, ge=1, help="attention heads; they divide the width")
    stacks: int = field(default=2, ge=1, le=3, help="dual cross-attentions")
    causal: bool = field(default=False, help="a node is scored by what starts no later (ablation)")
    layers: int = field(default=4, ge=1, help="layers of the base whose values it looks at")

    def validate(self) -> None:
        """Refuses a width that the heads do not divide."""
        if self.width % self.heads:
            raise ConfigError(f"model.lens: heads={self.heads} do not divide width={self.width}")


@dataclass(frozen=True)
class MatcherConfig:
    """Late interaction between a question and the tokens of a history."""

    layers: tuple[int, ...] = field(
        default=(8, 14, 20), ge=1,
        help="layers of the base whose inputs are matched; those behind the last do not run",
    )  # fmt: skip
    width: int = field(default=64, ge=1, help="numbers of a token's stored vector, a byte each")
    window: int = field(default=8, ge=2, help="blocks that the base reads together")
    question: int = field(default=24, ge=1, help="last tokens of a question that are matched")
    rerank: int = field(
        default=0, ge=0,
        help="best candidates that the base reads again, by how likely the question is behind them",
    )  # fmt: skip
    start: str | None = field(
        default=None, help="packaged matcher whose weights to start from; none: whitened states"
    )

    def validate(self) -> None:
        """Refuses layers that are not given in their order."""
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"model.matcher.layers={list(self.layers)}: give them in order, once")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained beside the frozen base."""

    layout: Layout = field(
        default_factory=lambda: Layout(slots=(4,)), help="blocks, levels and slots of the tree"
    )
    gist: GistConfig = field(default_factory=GistConfig, help="GistNet")
    lens: LensConfig | None = field(
        default=None, help="a learned focus, trained by a phase with data lens; none: no lens"
    )
    matcher: MatcherConfig | None = field(
        default=None, help="what the policy match asks, trained by a phase with data questions"
    )
    lora: BaseLoraConfig | None = field(
        default=None,
        help="deltas of the base where it reads on behind a working context; none: it is frozen",
    )  # fmt: skip
    remat: bool = field(default=False, help="recompute activations in the backward pass")


@dataclass(frozen=True)
class DataConfig:
    """Histories."""

    root: str | None = field(default=None, help="data folder; default: env LATENT_JAX_DATA")
    text: str = field(default="auto", help="a text source or a path")
    blocks: int = field(default=8, ge=3, help="blocks of a training row")
    chunk: int = field(
        default=4, ge=2,
        help="blocks that are read raw together in training, behind the gists of all before them; "
        "the first ones of a chunk (model.layout.protected) are not predicted, like a tail",
    )  # fmt: skip
    beyond: int = field(
        default=8, ge=2, help="blocks after the node of a training row of the upper levels"
    )
    rows: int = field(default=20_000, ge=1, help="most training rows to draw")
    qa: tuple[str, ...] = field(
        default=("auto",), help="questions on passages, for a phase with data questions"
    )
    passages: int = field(default=2400, ge=2, help="most of those passages")
    asked: int = field(default=4, ge=1, help="most questions on one of them")
    others: int = field(default=400, ge=1, help="windows of data.text that answer none of them")
    labels: tuple[str, ...] = field(
        default=(), help="tables of `mega label` that a phase with data lens reads"
    )
    label: LabelConfig | None = field(
        default=None,
        help="measure labels in the run, with the gists and the base as they are where a phase "
        "with data lens begins; none: data.labels",
    )  # fmt: skip
    label_blocks: int = field(
        default=1024, ge=8, help="blocks of training text that those labels are measured on"
    )
    store: str | None = field(
        default=None, help="store that the tables were measured on; none: where it was then"
    )
    raw: float = field(
        default=0.3, ge=0, le=1,
        help="share of rows in which some blocks beyond the tail stay raw, at a random rate",
    )  # fmt: skip


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms, each a number or a schedule of the step."""

    substitute: float | ScheduleConfig = field(
        default=1.0, help="KL(base on the raw text || base on gists), nats per token"
    )
    upper: float | ScheduleConfig = field(
        default=1.0, help="the same KL behind one gist of level 2 or more (data upper)"
    )
    next_token: float | ScheduleConfig = field(
        default=0.0, help="cross-entropy of the text behind gists, nats per token"
    )
    regression: float | ScheduleConfig = field(
        default=1.0, help="squared error of a lens's signed scores (data lens)"
    )
    ranking: float | ScheduleConfig = field(
        default=0.5, help="softplus of score differences in the wrong order"
    )
    matching: float | ScheduleConfig = field(
        default=1.0, help="contrast of a question's blocks, nats (data questions)"
    )
    budget: float | ScheduleConfig = field(
        default=0.1, help="imbalance of the entries that a lens asks for and offers"
    )
    legality: float | ScheduleConfig = field(
        default=0.1, help="squared scores that ask for what cannot be done"
    )
    chunk: int | None = field(
        default=None, ge=1, help="tokens whose logits exist at once; none: all"
    )


# What may stand for the history; see `recovery.Recovery`.
ARMS = (
    "full", "windowed", "gist", "mean_pool", "kv_stride", "recency", "shuffled", "dropped"
)  # fmt: skip
# Facts hidden in a history; see `tasks`.
TASKS = ("passkey", "key_value", "straddling", "paraphrased")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured at the end."""

    arms: tuple[str, ...] = field(
        default=ARMS, help="what stands for the history: its gists, and baselines and controls"
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
    task_rows: int = field(default=8, ge=1, help="episodes of a task, at evenly spread depths")
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
        unknown = [a for a in self.arms if a not in ARMS]
        if unknown:
            raise ConfigError(f"eval.arms: unknown {unknown}; allowed: {', '.join(ARMS)}")
        if not {"full", "dropped"} <= set(self.arms):
            raise ConfigError("eval.arms: recovery is measured between full and dropped: add both")
        unknown = [t for t in self.tasks if t not in TASKS]
        if unknown:
            raise ConfigError(f"eval.tasks: unknown {unknown}; allowed: {', '.join(TASKS)}")
        unknown = [p for p in self.policies if p not in (*POLICIES, *ENDS)]
        if unknown:
            raise ConfigError(
                f"eval.policies: unknown {unknown}; allowed: {', '.join((*POLICIES, *ENDS))}"
            )


@dataclass(frozen=True)
class MegaRun(RunBase):
    """A MegaContext run."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig, help="frozen base")
    model: ModelConfig = field(default_factory=ModelConfig, help="what is trained")
    data: DataConfig = field(default_factory=DataConfig, help="training and held-out data")
    losses: LossConfig = field(default_factory=LossConfig, help="loss weights")
    eval: EvalConfig = field(default_factory=EvalConfig, help="final evaluation")

    def validate(self) -> None:
        """Refuses rows without a block to replace."""
        d, protected = self.data, self.model.layout.protected
        if d.blocks % d.chunk or d.blocks < 2 * d.chunk or d.chunk <= protected:
            raise ConfigError(
                f"data.blocks={d.blocks}, data.chunk={d.chunk}: a row is at least two whole "
                f"chunks, and a chunk longer than model.layout.protected={protected}"
            )
        if d.beyond <= protected:
            raise ConfigError(
                f"data.beyond={d.beyond} leaves nothing to predict behind the protected tail "
                f"(model.layout.protected={protected})"
            )
        phases = [p for p in self.train.phases if not p.skip]
        self._check_lens()
        if any(p.data == "questions" for p in phases):
            if self.model.matcher is None:
                raise ConfigError("train.phases: data questions trains model.matcher; set it")
            if any(p.data != "questions" or p.train != ("matcher",) for p in phases):
                raise ConfigError(
                    "train.phases: a run that trains a matcher trains nothing else: every phase "
                    "needs data: questions and train: [matcher]"
                )
        layout, e = self.model.layout, self.eval
        if self.model.matcher is None and (e.questions or (e.budgets and "match" in e.policies)):
            raise ConfigError(
                "eval.questions and the policy match ask a matcher: set model.matcher, or leave "
                "them out"
            )
        if self.model.gist.kind == "heads":
            self._only_what_heads_can()
        if self.model.lora is None and any(LORA in p.train for p in phases):
            raise ConfigError("train.phases: lora is trained by no one without it: set model.lora")
        if self.model.gist.kind == "embeddings" and self.model.lens is not None:
            raise ConfigError(
                "model.lens looks at the values of gists, and model.gist.kind=embeddings has none "
                "stored: leave model.lens out"
            )
        if e.budgets and "lens" in e.policies and self.model.lens is None:
            raise ConfigError("eval.policies: lens needs model.lens; set it or leave lens out")
        least = cover_cost(layout, e.long, layout.levels)
        step = math.lcm(int(layout.widths[-1]), self.model.gist.window)
        if e.tasks and (not e.budgets or e.task_blocks % step):
            raise ConfigError(
                f"eval.tasks: they need eval.budgets, and eval.task_blocks={e.task_blocks} must be "
                f"a multiple of {step} (nodes of the top level, windows of the encoder)"
            )
        self._reachable()
        if e.documents and not e.budgets:
            raise ConfigError("eval.documents: give eval.budgets, the size of the working context")
        if e.documents and e.document_tokens is not None:
            blocks = e.document_tokens // layout.block
            room = int(cover_cost(layout, blocks, layout.levels))
            if e.budgets[0] < room:
                raise ConfigError(
                    f"eval.budgets: the first, {e.budgets[0]}, cannot hold eval.document_tokens="
                    f"{e.document_tokens}, which cost {room} entries at their coarsest"
                )
        if e.stream and not e.budgets:
            raise ConfigError("eval.stream: give eval.budgets, the size of its working context")
        if e.stream:
            least = max(least, cover_cost(layout, e.stream, layout.levels))
        if e.tasks:
            room = cover_cost(layout, e.task_blocks, layout.levels)
            if e.budgets[0] < room:
                raise ConfigError(
                    f"eval.budgets: the first, {e.budgets[0]}, cannot hold eval.task_blocks="
                    f"{e.task_blocks}, which cost {room} entries at their coarsest"
                )
        if e.questions and e.question_blocks < self.model.matcher.window:
            raise ConfigError(
                f"eval.question_blocks={e.question_blocks} is below model.matcher.window="
                f"{self.model.matcher.window}: not one window of filler"
            )
        small = [w for w in e.budgets if w < least]
        if small:
            raise ConfigError(
                f"eval.budgets: {small} cannot hold the blocks of eval.long={e.long} or "
                f"eval.stream={e.stream}, which cost {least} entries at their coarsest: raise W, "
                "or add a level to model.layout.slots"
            )

    def _check_lens(self) -> None:
        """Refuses labels that would not be of the gists and the base that a lens is for."""
        d, phases = self.data, [p for p in self.train.phases if not p.skip]
        lens = [p for p in phases if p.data == "lens"]
        if d.label is not None and (d.labels or not lens):
            raise ConfigError(
                "data.label measures labels for a phase with data lens: "
                + ("leave data.labels out" if d.labels else "train.phases has none")
            )
        if not lens:
            return
        if self.model.lens is None:
            raise ConfigError("train.phases: data lens trains model.lens; set it")
        for phase in phases:
            if phase.data == "lens" and phase.train != ("lens",):
                raise ConfigError(
                    f"train.phases {phase.name!r}: data lens has a loss of the lens alone: set "
                    "train: [lens]"
                )
            if phase.data != "lens" and (not phase.train or "lens" in phase.train):
                raise ConfigError(
                    f"train.phases {phase.name!r}: data {phase.data} has no loss of the lens: "
                    "name in train what it trains"
                )
        if len(lens) < len(phases) and d.label is None:
            raise ConfigError(
                "train.phases: labels are of the gists and the base as they are, and phases beside "
                "that of the lens change them: set data.label, so that they are measured anew "
                "where it begins, or train nothing else"
            )
        if d.label is not None:
            if phases[0].data == "lens":
                raise ConfigError(
                    f"train.phases {phases[0].name!r}: with data.label another phase comes first; "
                    "for a lens alone, `latent-jax mega label` makes a table (data.labels)"
                )
            if "match" in d.label.policies and self.model.matcher is None:
                raise ConfigError("data.label.policies: match needs model.matcher")
            labelled_blocks(
                self.model.layout, self.model.gist.window, d.label, d.label_blocks,
                "data.label_blocks", "raise data.label_blocks",
            )  # fmt: skip
    def _reachable(self) -> None:
        """Refuses histories that the allocator could not even hold at their coarsest."""
        e, layout = self.eval, self.model.layout
        if e.reach and not e.tasks:
            raise ConfigError("eval.reach: give eval.tasks, the facts that are looked for")
        for tokens in e.reach:
            blocks = tokens // layout.block
            if blocks <= layout.protected:
                raise ConfigError(
                    f"eval.reach: {tokens} tokens are no more than the protected tail of "
                    f"{layout.protected} blocks: nothing has to be looked for"
                )
            wide = roomy(layout, blocks, e.reach_budget)
            room = int(cover_cost(wide, blocks, wide.levels))
            if e.reach_budget < room:
                raise ConfigError(
                    f"eval.reach_budget={e.reach_budget} cannot hold the {tokens} tokens of "
                    f"eval.reach, which cost {room} entries at their coarsest: raise it"
                )

    def _only_what_heads_can(self) -> None:
        """Refuses what gists of the text's own entries do not have."""
        phases = [p for p in self.train.phases if not p.skip]
        beside = {"lens", "matcher", LORA}
        trained = self.train.steps or phases
        if trained and not (phases and all(p.train and beside >= {*p.train} for p in phases)):
            raise ConfigError(
                "model.gist.kind=heads is calibrated, not trained: set train.steps=0 and no phases "
                "(or phases that train the lens, the matcher or lora, and name them in train)"
            )
