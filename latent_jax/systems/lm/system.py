"""A language model as the shared trainer sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_jax import data
from latent_jax.backbones import Backbone
from latent_jax.backbones.decoder import Decoder
from latent_jax.backbones.sharding import DECODER_RULES
from latent_jax.core.types import Mean
from latent_jax.systems.lm import asset, recipe, start
from latent_jax.systems.lm.config import KINDS, LMRun


class LMSystem:
    """Next-token prediction over packed rows; implements `latent_jax.train.protocol.System`."""

    config_class = LMRun
    rng_names = ()
    logical_rules = DECODER_RULES
    frozen: Mapping[str, Any] = {}

    def __init__(self, config: LMRun):
        self.config = config
        self.tokenizer = recipe.make_tokenizer(config.tokenizer, config.data)
        self.decoder = Decoder(config.model.decoder(self.tokenizer.vocab_size))
        losses = config.losses
        self.weights = {"text": losses.text, "lookup": losses.lookup, "copy": losses.copy}
        self._rows: dict[Any, dict[str, np.ndarray]] = {}
        self._terms = jax.jit(self._loss_terms)

    def init(self, rngs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh parameters, arranged as ``model.start`` says."""
        model = self.config.model
        params = self.decoder.init(rngs["params"], jnp.zeros((1, 4, model.hidden_size)))["params"]
        if model.start == "plain":
            return {"params": start.plain(params, self.decoder.config)}
        return {"params": start.induction(params, self.decoder.config, rngs["params"])}

    def param_labels(self, params: Any) -> Any:
        """One group."""
        return jax.tree.map(lambda _: "decoder", params)

    def _loss_terms(self, params, batch):
        tokens, segment = batch["tokens"], batch["segment_ids"]
        apply = lambda *a, **k: self.decoder.apply({"params": params}, *a, **k)  # noqa: E731
        mask = segment > 0
        t = tokens.shape[1]
        causal = jnp.tril(jnp.ones((t, t), bool))[None]
        own = causal & (segment[:, :, None] == segment[:, None, :])
        embeds = apply(tokens, method="embed")
        hidden = apply(embeds, batch["positions"], mask, own).hidden
        logits = apply(hidden[:, :-1], method="unembed")
        targets, kinds = tokens[:, 1:], batch["kinds"][:, 1:]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hit = jnp.argmax(logits, -1) == targets
        terms = {n: Mean.of(nll, kinds == i + 1) for i, n in enumerate(KINDS)}
        aux = {f"{n}_accuracy": Mean.of(hit, kinds == i + 1) for i, n in enumerate(KINDS)}
        return terms, aux

    def loss_terms(self, variables, frozen, batch, rngs, train):
        """Cross-entropy of the supervised tokens, by kind of document."""
        terms, aux = self._loss_terms(variables["params"], batch)
        return terms, {}, aux

    def rows(self, stage: str, split: str = "train", limit: int | None = None):
        """Packed rows of a stage, made once."""
        key = (stage, split, limit)
        if key not in self._rows:
            c = self.config
            self._rows[key] = recipe.rows(
                self.tokenizer, c.data, c.data.stages[stage], c.seed, split, limit
            )
        return self._rows[key]

    def train_data(self, phase: str, start_state: Any):
        """Endless shuffled batches of a stage's rows."""
        table = self.rows(phase)
        size = len(table["tokens"])
        stream = data.pipeline(
            lambda i: {name: values[i] for name, values in table.items()},
            self.config.train.batch_size,
            size=size,
            seed=self.config.seed,
            remainder="drop" if size >= self.config.train.batch_size else "wrap",
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if start_state is not None:
            stream.set_state(start_state)
        return stream

    def unit_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Tokens that are not padding."""
        return {"tokens": int((batch["segment_ids"] > 0).sum())}

    def eval_data(self) -> dict[str, np.ndarray]:
        """Held-out packed rows of the last stage."""
        last = self.config.train.phases[-1].data if self.config.train.phases else "main"
        return self.rows(last, "validation", self.config.eval.quick)

    def quick_eval(self, variables, frozen) -> dict[str, float]:
        """Teacher-forced loss and accuracy per kind on held-out rows."""
        terms, aux = self._terms(variables["params"], jax.tree.map(jnp.asarray, self.eval_data()))
        values = {**terms, **aux}
        return {name: float(m.value) for name, m in values.items() if float(m.count) > 0}

    def backbone(self, variables) -> Backbone:
        """The trained model behind the interface of every frozen one."""
        return Backbone(
            name=self.config.name,
            config=self.decoder.config,
            params=variables["params"],
            tokenizer=self.tokenizer,
            sha256="",
            decoder=self.decoder,
        )

    def evaluate(self, variables, frozen, progress=None):
        """Held-out text, lookups from full text and without it, and copies.

        Returns:
          metrics: ``text.nats_per_token, text.bits_per_byte, lookup.full_text.{f1,em},
          lookup.no_context.{f1,em},
            copy.token_accuracy, copy.exact, parameters``.
          artefacts: ``samples``.
        """
        report = progress or (lambda *_: None)
        model = self.backbone(variables)
        metrics: dict[str, float] = {"parameters": model.parameter_count()}
        metrics |= self._text(model)
        report("text", 1, 3)
        found, samples = self._lookup(model)
        metrics |= found
        report("lookup", 2, 3)
        metrics |= self._copy(model)
        report("copy", 3, 3)
        return metrics, {"samples": samples}

    def generate(
        self, variables, frozen, prompt: str, max_new_tokens: int = 64
    ) -> dict[str, str]:
        """Continues a text, greedily."""
        (text,) = self.backbone(variables).generate([prompt], max_new_tokens=max_new_tokens)
        return {"prompt": prompt, "continuation": text}

    def export(self, variables, frozen, to: str, run: str | None = None) -> dict[str, Any]:
        """Writes a directory that `backbones.load` reads, with the record of the run."""
        record = asset.training_record(run) if run is not None else {}
        out = asset.save(self.backbone(variables), to, record)
        size = sum(f.stat().st_size for f in out.iterdir())
        return {"written": out, "megabytes": f"{size / 1e6:.1f}"}

    def _text(self, model: Backbone) -> dict[str, float]:
        c = self.config
        texts = data.load_texts(c.data.text, "validation", c.data.root)
        length = self.rows(next(iter(c.data.stages)))["tokens"].shape[1]
        windows = data.segments(self.tokenizer, texts, length, c.eval.rows, seed=c.seed)
        nats = tokens = size = 0
        for at in range(0, len(windows), c.eval.batch_size):
            ids = windows[at : at + c.eval.batch_size]
            logits = model.logits(ids)[:, :-1]
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(ids[:, 1:]))
            nats, tokens = nats + float(nll.sum()), tokens + nll.size
            # By offsets and not by decoding, so that a character cut in two counts once.
            size += sum(
                len(self.tokenizer.decode(r).encode()) - len(self.tokenizer.decode(r[:1]).encode())
                for r in ids
            )
        return {
            "text.nats_per_token": nats / tokens,
            "text.bits_per_byte": nats / math.log(2) / max(size, 1),
        }

    def _lookup(self, model: Backbone) -> tuple[dict[str, float], list[dict[str, Any]]]:
        c = self.config
        examples = data.lookup_examples(
            c.eval.questions, c.seed, "validation", c.eval.pairs, c.data.values
        )
        layout = c.data.template.rpartition("{answer}")[0].rstrip(" ")
        metrics, samples = {}, []
        for arm in ("full_text", "no_context"):
            prompts = [
                layout.replace("{context}", e.context if arm == "full_text" else "")
                .replace("{question}", e.question)
                for e in examples
            ]
            said = model.generate(
                prompts, max_new_tokens=6, stop="\n", batch_size=c.eval.batch_size
            )
            said = [s.strip() for s in said]
            f1 = [_f1(s, e.answers[0]) for s, e in zip(said, examples, strict=True)]
            exact = [float(s == e.answers[0]) for s, e in zip(said, examples, strict=True)]
            metrics[f"lookup.{arm}.f1"] = float(np.mean(f1))
            metrics[f"lookup.{arm}.em"] = float(np.mean(exact))
            if arm == "full_text":
                samples = [
                    {"kind": "answer", "id": e.id, "text": e.context, "question": e.question,
                     "gold": list(e.answers), "answers": {arm: s}}
                    for s, e in zip(said[:12], examples, strict=False)
                ]  # fmt: skip
        return metrics, samples

    def _copy(self, model: Backbone) -> dict[str, float]:
        c = self.config
        texts = data.load_texts(c.data.text, "validation", c.data.root)
        n = c.eval.copy_length
        lines = [" ".join(text.split()) for text in texts]
        windows = data.segments(self.tokenizer, lines, n, c.eval.copies, seed=c.seed)
        newline = self.tokenizer.encode("\n")
        said = model.generate(
            [[*w, *newline] for w in windows.tolist()], max_new_tokens=n,
            batch_size=c.eval.batch_size, return_ids=True,
        )  # fmt: skip
        guess = np.full(windows.shape, -1)
        for row, ids in zip(guess, said, strict=True):
            row[: len(ids)] = ids[:n]
        right = guess == windows
        return {
            "copy.token_accuracy": float(right.mean()),
            "copy.exact": float(right.all(1).mean()),
        }


def _f1(guess: str, gold: str) -> float:
    """Bag-of-words F1 of two short answers."""
    a, b = guess.split(), gold.split()
    same = sum(min(a.count(w), b.count(w)) for w in set(a))
    return 2 * same / (len(a) + len(b)) if same else 0.0
