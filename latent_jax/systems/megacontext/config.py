"""Everything a MegaContext run can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latent_jax.backbones.config import BackboneConfig
from latent_jax.core.config import field
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.base_lora import PART as LORA
from latent_jax.systems.megacontext.eval_config import EvalConfig
from latent_jax.systems.megacontext.label_config import LabelConfig, labelled_blocks
from latent_jax.systems.megacontext.layout import cover_cost, roomy
from latent_jax.systems.megacontext.model_config import ModelConfig
from latent_jax.train.config import RunBase
from latent_jax.train.curriculum import ScheduleConfig


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
    boundary: float = field(
        default=1.0, ge=1,
        help="weight of the first predicted block of a chunk in both of these, which reads gists "
        "with the least raw text between",
    )  # fmt: skip
    rebuild: float | ScheduleConfig = field(
        default=0.0,
        help="cross-entropy of a block that is read again behind its own gist alone, nats a token",
    )
    apart: float | ScheduleConfig = field(
        default=0.0,
        help="squared excess of the cosine between two blocks' gists over that between the blocks",
    )  # fmt: skip
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
        apart = [p.name for p in self.train.phases if p.weights.get("apart")]
        if (self.losses.apart or apart) and self.model.gist.kind != "reads":
            raise ConfigError(
                f"losses.apart compares values that a GistNet makes, and model.gist.kind="
                f"{self.model.gist.kind} has none: leave it 0"
            )
        measured = "oracle" in e.policies and e.budgets
        if self.model.positions.kind == "ordinal" and (measured or d.label is not None):
            raise ConfigError(
                "model.positions.kind=ordinal: the policy oracle and data.label measure actions on "
                "entries that stay where they are: leave them out, or use original"
            )
        least = cover_cost(layout, e.long, layout.levels)
        step = math.lcm(int(layout.widths[-1]), self.model.gist.window)
        for asked, name, blocks in self._asked():
            if not e.budgets or blocks % step:
                raise ConfigError(
                    f"{asked}: they need eval.budgets, and {name}={blocks} must be "
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
        for _, name, blocks in self._asked():
            room = cover_cost(layout, blocks, layout.levels)
            if e.budgets[0] < room:
                raise ConfigError(
                    f"eval.budgets: the first, {e.budgets[0]}, cannot hold {name}="
                    f"{blocks}, which cost {room} entries at their coarsest"
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

    def _asked(self) -> list[tuple[str, str, int]]:
        """Histories with hidden facts: what asks for them, their field and their blocks."""
        e = self.eval
        found = [("eval.passkey_blocks", "eval.passkey_blocks", n) for n in e.passkey_blocks]
        return [("eval.tasks", "eval.task_blocks", e.task_blocks)] * bool(e.tasks) + found

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
            if "match" in d.label.policies and self.model.matcher is None:
                raise ConfigError("data.label.policies: match needs model.matcher")
            labelled_blocks(
                self.model.layout, self.model.gist.window, d.label, d.label_blocks,
                "data.label_blocks", "raise data.label_blocks",
            )  # fmt: skip

    def _reachable(self) -> None:
        """Refuses histories that the allocator could not even hold at their coarsest."""
        e, layout = self.eval, self.model.layout
        if e.reach and not (e.tasks or e.passkey_blocks):
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
