"""What a working context costs beside the frozen base that reads it, and what a store costs as it
grows.

Ingest, focus, refocus by the place of the edit, and decoding behind W entries of a working context
beside decoding behind W entries of the base's own prefill; then time and bytes per token of a store
that grows, with made-up gists and no model. GistNet and lens hold fresh weights: times do not
depend on their values.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_jax.bench import timing
from latent_jax.core.errors import ConfigError
from latent_jax.systems.megacontext.allocator import refocus
from latent_jax.systems.megacontext.gist import GistNet, Gists
from latent_jax.systems.megacontext.layout import Layout, cover_cost
from latent_jax.systems.megacontext.lens import nothing_seen
from latent_jax.systems.megacontext.memory import Memory
from latent_jax.systems.megacontext.model_config import GistConfig, LensConfig, ModelConfig
from latent_jax.systems.megacontext.runtime import Runtime, RuntimeConfig
from latent_jax.systems.megacontext.sight import lens_net, sight_width
from latent_jax.systems.megacontext.store import GistTree, TreeSpec, build

_GROWTH_STEP = 10_240  # tokens that a point of the growth curve is measured on


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `latent-jax bench mega`."""

    backbone: str = dataclasses.field(default="smollm2", metadata={"help": "frozen base"})
    budget: int = dataclasses.field(default=512, metadata={"help": "entries of the context, W"})
    blocks: int = dataclasses.field(default=64, metadata={"help": "blocks of history"})
    slots: int = dataclasses.field(default=4, metadata={"help": "slots of a gist"})
    block: int = dataclasses.field(default=32, metadata={"help": "tokens of a block"})
    new_tokens: int = dataclasses.field(default=16, metadata={"help": "tokens decoded"})
    pairs: int = dataclasses.field(default=3, metadata={"help": "timed repetitions"})
    grow_to: int = dataclasses.field(
        default=1_024_000, metadata={"help": "tokens of the growing store; 0: leave it out"}
    )
    width: int = dataclasses.field(
        default=64, metadata={"help": "numbers per made-up gist of the growing store"}
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            low = 2 if f.name == "new_tokens" else 0 if f.name == "grow_to" else 1
            value = getattr(self, f.name)
            if isinstance(value, int) and value < low:
                flag = f.name.replace("_", "-")
                raise ConfigError(f"bench mega --{flag}: use at least {low}")
        layout = Layout(block=self.block, slots=(self.slots,), protected=1)
        least = int(cover_cost(layout, self.blocks, 1))
        if self.budget < least + self.block:
            raise ConfigError(
                f"bench mega --budget: {self.blocks} blocks take {least} entries at their coarsest "
                f"and one is opened; use at least {least + self.block}"
            )


def main(options: Options) -> dict[str, Any]:
    """Run the benchmark, print what a person reads, return flat results."""
    from rich.console import Console

    console, found = Console(), {}
    with tempfile.TemporaryDirectory() as folder:
        found |= _model(options, Path(folder) / "model")
        console.print(_spelled(found, options))
        if options.grow_to:
            grown = _growth(options, Path(folder) / "growing")
            for name, value in grown.items():
                console.print(f"{name}: {value:.3g}")
            found |= grown
    return found


def _model(options: Options, path: Path) -> dict[str, float]:
    """Everything that needs the base."""
    from latent_jax import backbones

    base = backbones.load(options.backbone, dtype=jnp.float32)
    c, layout = base.config, Layout(block=options.block, slots=(options.slots,), protected=1)
    model = ModelConfig(layout=layout, gist=GistConfig(window=8), lens=LensConfig())
    shape = (c.num_layers, 1, layout.block, c.num_kv_heads, c.head_dim)
    some = Gists(jnp.zeros(shape), jnp.zeros(shape))
    key = jax.random.key(0)
    gist = jax.jit(lambda: GistNet(model, c).init(key, some, method="touch")["params"])()
    lens = lens_net(model.lens, layout).init(key, *nothing_seen(sight_width(c, model.lens)))
    ids = np.random.default_rng(0).integers(10, c.vocab_size, options.blocks * options.block)
    window, found = model.gist.window * options.block, {}
    with Memory.open(path, base, model, gist, "bench", True, lens["params"]) as memory:
        memory.tree.append(ids[:window])
        memory.build()  # compiles
        began = time.perf_counter()
        memory.tree.append(ids[window:])
        memory.build()
        rest = max(len(ids) - window, 1)
        found["ingest.tokens_per_second"] = rest / (time.perf_counter() - began)
        found["ingest.bytes_per_token"] = sum(memory.tree.sizes().values()) / len(ids)
        for policy in ("lens", "bm25", "recency"):
            runtime = Runtime(memory, RuntimeConfig(options.budget, policy))
            query, blocks = ids[-options.block :], len(ids) // options.block
            here = runtime.settle(query)

            def step(runtime=runtime, here=here, query=query, blocks=blocks):
                scores = runtime.scores(here, query, blocks, key)
                return refocus(layout, runtime.config.focus, options.budget, here, scores)[0].level

            spent = _median(step, options.pairs)
            found[f"focus.{policy}.milliseconds_per_iteration"] = 1e3 * spent
        found |= _refocus(memory, options)
        found |= _decode(memory, options, found["focus.lens.milliseconds_per_iteration"])
    return found


def _refocus(memory: Memory, options: Options) -> dict[str, float]:
    """Time until the context stands again after one gist, at some place of it, was opened."""
    found, blocks = {}, options.blocks - 1
    start = blocks * options.block
    runtime = Runtime(memory, RuntimeConfig(options.budget, "recency"))
    for percent in (0, 25, 50, 75, 100):
        at = round(percent / 100 * (blocks - 1))
        nodes = [(int(i != at), i) for i in range(blocks)]

        def again(nodes: Any = nodes) -> Any:
            memory.forget()  # the opened block is encoded anew
            return runtime.placed(memory.gather(nodes, start))

        found[f"refocus.p{percent}.milliseconds"] = 1e3 * _median(again, options.pairs)
    return found


def _decode(memory: Memory, options: Options, focus: float) -> dict[str, float]:
    """Decoding behind W entries of a context beside W entries of a plain prefill."""
    from latent_jax.backbones.generate import generate_ids

    blocks, w = options.blocks - 1, options.budget
    start = blocks * options.block
    runtime = Runtime(memory, RuntimeConfig(w, "recency"))
    ours = runtime.placed(memory.gather([(1, i) for i in range(blocks)], start))
    decoder, base = memory.decoder, memory.base
    ids = np.resize(memory.tree.tokens(0, len(memory.tree)), w)[None]
    theirs = jax.jit(
        lambda p, x: decoder.apply({"params": p}, decoder.apply({"params": p}, x, method="embed"))
    )(base, ids).kv
    prompt = memory.backbone.embed(memory.tree.tokens(start, len(memory.tree))[None])
    mask = np.ones(prompt.shape[:2], bool)

    def behind(prefix: Any) -> Any:
        return generate_ids(
            decoder, base, prompt, mask, max_new_tokens=options.new_tokens, prefix=prefix, start=w
        ).tokens

    pair = timing.alternate(lambda: behind(ours), lambda: behind(theirs), pairs=options.pairs)
    seconds = statistics.median(pair.ours)
    block = seconds / options.new_tokens * options.block
    return {
        "decode.tokens_per_second": options.new_tokens / seconds,
        "decode.overhead": 1 / pair.ratio - 1,
        "focus.lens.share_of_decoding_a_block": focus / 1e3 / block,
    }


def _growth(options: Options, path: Path) -> dict[str, float]:
    """Microseconds and bytes per token at 10 k, 100 k, … tokens, on the last step before each."""
    spec = TreeSpec(vocab_size=49152, width=options.width, slots=(options.slots, options.slots))
    rows = {
        level: np.full((32, spec.slots_at(level), options.width), level, np.float32)
        for level in range(1, 8)
    }
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, _GROWTH_STEP)
    points, found = {_GROWTH_STEP * 10**i for i in range(6)}, {}
    with GistTree.create(path, spec) as tree:
        tree.set_version("bench")
        size = sum(tree.sizes().values())
        while len(tree) < options.grow_to:
            began = time.perf_counter()
            tree.append(ids)
            build(tree, lambda level, _: rows[level])
            tree.flush()
            seconds, before = time.perf_counter() - began, size
            size = sum(tree.sizes().values())
            if len(tree) in points:
                name = f"growth.t{len(tree)}"
                found[f"{name}.microseconds_per_token"] = 1e6 * seconds / _GROWTH_STEP
                found[f"{name}.bytes_per_token"] = (size - before) / _GROWTH_STEP
    return found


def _median(call: Any, repetitions: int) -> float:
    """Seconds of a call, the first left out."""
    timing.once(call)
    return statistics.median(timing.once(call) for _ in range(repetitions))


def _spelled(found: dict[str, float], options: Options) -> str:
    edits = ", ".join(
        f"{value:.0f}" for name, value in found.items() if name.startswith("refocus")
    )
    return (
        f"{timing.machine()['processor']}, {options.backbone}, W={options.budget}, "
        f"{options.blocks} blocks of {options.block}\n"
        f"ingest {found['ingest.tokens_per_second']:,.0f} tokens/s, "
        f"{found['ingest.bytes_per_token']:,.0f} bytes per token\n"
        f"lens and allocator {found['focus.lens.milliseconds_per_iteration']:.1f} ms per block, "
        f"{100 * found['focus.lens.share_of_decoding_a_block']:.1f} % of decoding it\n"
        f"refocus with an edit at 0, 25, 50, 75, 100 % of the context: {edits} ms\n"
        f"decode {found['decode.tokens_per_second']:.1f} tokens/s, "
        f"{100 * found['decode.overhead']:+.1f} % time beside {options.budget} raw entries"
    )
