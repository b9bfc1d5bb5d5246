"""The abstractinator as the shared trainer sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.core import trees
from latent_jax.core.errors import CheckpointError, ConfigError, DataError
from latent_jax.core.types import PyTree
from latent_jax.systems.abstractinator import corrupt, held, losses, progress, recipe, tokenizer
from latent_jax.systems.abstractinator.config import PEERS, AbstractRun, part
from latent_jax.systems.abstractinator.model import Abstractinator
from latent_jax.systems.abstractinator.segment import parse_rule
from latent_jax.train.config import GuardConfig


class AbstractinatorSystem:
    """Bytes to rows and back, and rows to rows; implements `latent_jax.train.protocol.System`.

    What a batch trains is written in it: its field ``level0`` (and so on), ``top``, ``joint``,
    a peer's or ``entropy`` (the name of the phase's data; without any it is ``joint``). The
    levels that are not trained only evaluate: no gradient, no moving average, no loss.
    """

    config_class = AbstractRun
    rng_names = ("codes", "rows")
    guards = (
        GuardConfig(
            metric="overflow", above=0.01, after=20, patience=3,
            message="share of bytes beyond segments.budget, which no row holds: raise it, or "
            "make segments longer",
        ),
    )
    frozen: Mapping[str, Any] = {}
    logical_rules = (
        (r"(qkv|q|kv|up|unfold)/kernel$", ("embed", "mlp")),
        (r"(out|down)/kernel$", ("mlp", "embed")),
        (r".*", ()),
    )

    def __init__(self, config: AbstractRun):
        self.config = config
        self.model = Abstractinator(config)
        weights = config.losses
        self.weights = {
            "reconstruct": weights.reconstruct, "commit": weights.commit,
            "entropy": weights.entropy, "top": weights.top, "top_mse": weights.top_mse,
            "top_mse_post": weights.top_mse_post, "top_vq": weights.top_vq,
            "entropy_model": weights.entropy_model, "ratio": weights.ratio,
            "entropy_gaussian": weights.entropy_gaussian,
            **dict.fromkeys(PEERS, weights.byte_lm),
            **{part("digits", i): weights.digits for i in range(1, len(config.levels))},
            **{part("commit", i): weights.commit for i in range(1, len(config.levels))},
            **{part("entropy", i): weights.entropy for i in range(1, len(config.levels))},
        }  # fmt: skip
        self._windows: dict[str, recipe.Windows] = {}
        self._generator: Any = None
        self._measure: Any = None
        self._checked = False
        self._held: set[str] = set()
        self._quick = jax.jit(self._held_out_terms)

    def windows(self, split: str) -> recipe.Windows:
        """Windows of ``train`` or ``validation``, made once."""
        if split not in self._windows:
            shortest = parse_rule(self.config.segments.rule).size or 1
            self._windows[split] = recipe.load(self.config.data, split, shortest)
        return self._windows[split]

    def init(self, rngs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh parameters and codebooks."""
        ids = jnp.zeros((1, self.config.data.window), jnp.int32)
        found = dict(self.model.init(dict(rngs), ids, jnp.ones(ids.shape, bool)))
        return {**found, "progress": progress.fresh()}

    @functools.cached_property
    def shapes(self) -> dict[str, Any]:
        """Variables without their values."""
        return jax.eval_shape(lambda key: self.init({"params": key}, {}), jax.random.key(0))

    def check(self, variables: Mapping[str, Any]) -> None:
        """Refuses variables of another configuration, once.

        Raises:
          CheckpointError: something is missing, such as a level's quantiser, or has another shape.
        """
        if self._checked:
            return
        found = trees.flatten(variables)
        for path, leaf in trees.flatten(self.shapes).items():
            if path.startswith("progress/"):
                continue
            if path not in found:
                raise CheckpointError(
                    f"the checkpoint lacks {path}, which this configuration has: use the "
                    "configuration that it was trained with"
                )
            if tuple(found[path].shape) != tuple(leaf.shape):
                raise CheckpointError(
                    f"the checkpoint's {path} has the shape {tuple(found[path].shape)}, this "
                    f"configuration {tuple(leaf.shape)}: it belongs to another configuration"
                )
        self._checked = True

    def param_labels(self, params: PyTree) -> PyTree:
        """``compressor`` (with the quantiser's projections) and each other part by its name."""
        def label(path: Any, _: Any) -> str:
            return str(path[0].key).replace("quantiser", "compressor")

        return jax.tree_util.tree_map_with_path(label, params)

    def loss_terms(self, variables, frozen, batch, rngs, train):
        """Terms of what the batch trains, and the codebooks if they moved."""
        kinds = [name for name in self.config.trains if name in batch]
        kind = kinds[0] if kinds else "joint"
        ids, valid = batch["ids"], batch["there"]
        if kind in PEERS:
            return losses.byte_lm(self.model, variables, ids, valid, kind), {}, {}
        if kind == "entropy":
            return losses.entropy_model(self.model, variables, ids, valid), {}, {}
        upto = int(kind.removeprefix("level")) if kind.startswith("level") else None
        every = tuple(range(len(self.config.levels)))
        mine = {"joint": every, "top": ()}.get(kind, (upto,))
        codes = {name: key for name, key in rngs.items() if name == "codes"}
        apply = dict(method="pyramid", rngs=codes)
        if train and mine:
            out, moved = self.model.apply(
                variables, ids, valid, mine, upto, mutable=["codebook"], **apply
            )
            variables = {**variables, **moved}
        else:
            out, moved = self.model.apply(variables, ids, valid, (), upto, **apply), {}
        terms, aux = {}, {}
        key = rngs.get("rows") if train else None
        for i in mine:
            read = corrupt.lookback(self.model, variables, out, i, key)
            if i == 0:
                found, seen = losses.level(self.model, variables, ids, valid, out[0], read)
            else:
                found, seen = losses.level_above(
                    self.model, variables, out[i], out[i - 1], i, read
                )
            terms, aux = terms | found, aux | seen
        if kind in ("top", "joint"):
            found, seen = losses.top(self.model, variables, out[-1])
            terms, aux = terms | found, aux | seen
            if train and "progress" in variables:
                seen = variables["progress"]
                seen = {
                    "positions": progress.add(seen["positions"], out[-1].there.sum()),
                    "bytes": progress.add(seen["bytes"], valid.sum()),
                }
                moved = {**moved, "progress": seen}
                aux["top.effective_positions"] = progress.total(seen["positions"])
        return terms, dict(moved), aux

    def train_data(self, phase: str, start_state: Any):
        """Shuffled windows of the training text; levels that they do not train are proved held."""
        trains = self.config.trains
        if phase != "main" and phase not in trains:
            raise ConfigError(f"no training data {phase!r}; there are: {', '.join(trains)}")
        stream = recipe.train_stream(self.config, self.windows("train"), phase)
        if phase != "main" and phase not in self._held:
            held.prove(self, phase)
            self._held.add(phase)
        if start_state is not None:
            stream.set_state(start_state)
        return stream

    def batch_specs(self, phase: str):
        """See `recipe.batch_specs`."""
        return recipe.batch_specs(self.config, phase)

    def unit_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Bytes that are not padding."""
        return {"bytes": int(np.asarray(batch["there"]).sum())}

    def eval_data(self) -> dict[str, np.ndarray]:
        """Held-out windows of the evaluation while training."""
        windows = self.windows("validation")
        return windows.batch(windows.spread(self.config.eval.quick))

    def _held_out_terms(self, variables, batch):
        rngs = {"codes": jax.random.key(0)}
        terms, _, aux = self.loss_terms(variables, {}, batch, rngs, False)
        named = {**terms, **aux}
        for name in self.config.peers:
            named |= losses.byte_lm(self.model, variables, batch["ids"], batch["there"], name)
        if self.config.entropy is not None:
            named |= losses.entropy_model(self.model, variables, batch["ids"], batch["there"])
        return {k: getattr(v, "value", v) for k, v in named.items()}

    def quick_eval(self, variables, frozen) -> dict[str, float]:
        """Every term on held-out windows."""
        found = self._quick(dict(variables), jax.tree.map(jnp.asarray, self.eval_data()))
        return {k: float(v) for k, v in found.items()}

    def evaluate(self, variables, frozen, progress=None):
        """See `latent_jax.systems.abstractinator.evaluate.evaluate`."""
        from latent_jax.systems.abstractinator.evaluate import evaluate
        from latent_jax.systems.abstractinator.measure import Measure

        self.check(variables)
        if self._measure is None:
            self._measure = Measure(self.model)
        return evaluate(self, variables, self._measure, progress or (lambda *_: None))

    def calibrate_segments(
        self,
        variables,
        frozen,
        bytes_per_segment: float,
        delta: bool = False,
        windows: int = 512,
    ) -> dict[str, Any]:
        """Finds the limit of entropy or learned segments; see `calibrate.calibrate`."""
        from latent_jax.systems.abstractinator.calibrate import calibrate

        if self.config.entropy is not None or self.config.router is not None:
            self.check(variables)
        return calibrate(self, variables, bytes_per_segment, delta, windows)

    def generate(
        self,
        variables,
        frozen,
        prompt: str | list[str],
        max_new_tokens: int | None = None,
        temperature: float | Sequence[float] = 0.0,
        top_p: float | Sequence[float] | None = None,
        seed: int = 0,
        slide: bool = False,
        tell: Callable[[bytes], None] | None = None,
    ) -> Any:
        """Continues a text, or several at once, by rows; see `generate.Generator`.

        Args:
          variables: of the model.
          frozen: nothing.
          prompt: a text, or several.
          max_new_tokens: bytes of the continuation; 64 by default, fewer where the context ends.
          temperature: 0 is greedy; several are those of the stages, the last also that of bytes.
          top_p: nucleus mass, likewise.
          seed: of the sampling.
          slide: let the context move over texts that are longer than it.
          tell: gets the bytes of a single text as they come.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise DataError("generate: there is no prompt")
        count = max_new_tokens
        if count is None:
            room = self.config.data.window - max(len(tokenizer.encode(p)) for p in prompts)
            count = 64 if slide else max(1, min(64, room))
        told = [b""] * len(prompts)
        for parts in self.stream(
            variables, prompts, count, temperature, top_p, seed, slide
        ):
            told = [whole + part for whole, part in zip(told, parts, strict=True)]
            if tell is not None:
                tell(parts[0])
        answers = [
            {"prompt": p, "continuation": raw.decode("utf-8", errors="replace")}
            for p, raw in zip(prompts, told, strict=True)
        ]
        return answers[0] if isinstance(prompt, str) else answers

    def stream(
        self,
        variables: Mapping[str, Any],
        prompts: Sequence[str | bytes],
        count: int,
        temperature: float | Sequence[float] = 0.0,
        top_p: float | Sequence[float] | None = None,
        seed: int = 0,
        slide: bool = True,
    ) -> Iterator[list[bytes]]:
        """The bytes that each further row adds to texts; see `generate`."""
        from latent_jax.systems.abstractinator.generate import Generator
        from latent_jax.systems.abstractinator.sample import Choice

        self.check(variables)
        if self._generator is None:
            self._generator = Generator(self.model)
        choice = Choice.of(max(c.stages for c in self.config.levels), temperature, top_p)
        if not slide:
            self._generator.check(prompts, count)
        return self._generator.stream(variables, prompts, count, choice, seed)
