"""What an abstractinator's configuration cannot be, in one line each."""

from __future__ import annotations

from latent_jax.core.errors import ConfigError
from latent_jax.systems.abstractinator.config import PEERS, AbstractRun


def check(config: AbstractRun) -> None:
    """Refuses sections, phases and losses that do not go together.

    Raises:
      ConfigError: names the setting, and what to do.
    """
    _check_router(config)
    for phase in config.train.phases:
        _check_phase(config, phase)
    _check_entropy(config)
    _check_distances(config)
    _check_codes(config)
    trained = {label for phase in config.train.phases for label in phase.train}
    for name in config.peers:
        if name not in trained:
            raise ConfigError(f"{name}: no phase of train.phases has data={name} and trains it")
    entropy = config.losses.entropy
    if entropy != 0.0 and not config.level.vq.entropy.used:
        raise ConfigError("losses.entropy needs level.vq.entropy.value above 0")


def _check_distances(config: AbstractRun) -> None:
    vq = config.highest.vq
    if config.top.head != "discrete" and (vq.code_dim is not None or vq.distance != "euclidean"):
        raise ConfigError(
            f"top.head={config.top.head} measures Euclidean distances of rows to codes: it needs "
            "level.vq.distance=euclidean and level.vq.code_dim=null"
        )
    for i, below in enumerate(config.levels[:-1]):
        if below.vq.code_dim is not None or below.vq.distance != "euclidean":
            raise ConfigError(
                f"above[{i}]: its expander measures Euclidean distances to the codes below: "
                "level.vq there needs distance=euclidean and code_dim=null"
            )


def _check_codes(config: AbstractRun) -> None:
    for i, level in enumerate(config.levels):
        rows = config.train.batch_size * config.rows(i)
        if level.vq.init == "kmeans" and level.codes > rows:
            raise ConfigError(
                f"{f'above[{i - 1}]' if i else 'level'}.codes={level.codes}: k-means of the "
                f"first batch finds them among at most {rows} rows (train.batch_size="
                f"{config.train.batch_size} windows of {config.rows(i)}); fewer codes, a larger "
                "batch, or vq.init=random"
            )


def _check_entropy(config: AbstractRun) -> None:
    kinds = [phase.data for phase in config.train.phases]
    first = kinds.index("entropy") if "entropy" in kinds else None
    rule = config.segments.rule
    used = rule in ("entropy", "information")
    if used and config.entropy is None:
        raise ConfigError(f"segments.rule={rule} needs the section entropy")
    if used and config.entropy.head not in (config.segments.score, "both"):
        raise ConfigError(
            f"segments.score={config.segments.score}: entropy.head={config.entropy.head} has no "
            f"such head; set entropy.head={config.segments.score} or both"
        )
    if config.entropy is not None and first is None and config.train.init_from is None:
        raise ConfigError(
            "entropy: no phase of train.phases has data=entropy and trains it, and there is no "
            "train.init_from to take it from"
        )
    if not used or first is None:
        return
    last = len(kinds) - 1 - kinds[::-1].index("entropy")
    before = any(kind not in ("entropy", *PEERS) for kind in kinds[:last])
    cycle = sum(phase.steps for phase in config.train.phases)
    if before or (config.train.phases[-1].steps and config.train.steps > cycle):
        raise ConfigError(
            f"train.phases: with segments.rule={rule}, data=entropy comes once and before all "
            "levels, whose segments would move"
        )


def _check_router(config: AbstractRun) -> None:
    learned = config.segments.rule == "learned"
    if learned != (config.router is not None):
        raise ConfigError("the section router and segments.rule=learned go together")
    trained = any("router" in phase.train for phase in config.train.phases)
    if learned and config.train.phases and not trained and config.train.init_from is None:
        raise ConfigError(
            "router: no phase of train.phases trains it (data=level0 or joint can), and there is "
            "no train.init_from to take it from"
        )


def _check_phase(config: AbstractRun, phase) -> None:
    where = f"train.phases {phase.name!r}: data={phase.data!r}"
    trains = config.trains
    if phase.data == "main":
        raise ConfigError(f"{where}: a phase here names one of {', '.join(trains)}")
    if phase.data not in trains:
        raise ConfigError(f"{where}: no such data; allowed: {', '.join(trains)}")
    if phase.data in (*PEERS, "entropy") and getattr(config, phase.data) is None:
        raise ConfigError(f"{where} needs the section {phase.data}")
    # Weight decay and moments would move parts that the phase's loss does not reach.
    mine = trains[phase.data]
    moved = set(phase.train or mine) - set(phase.freeze)
    if not phase.train:
        raise ConfigError(f"{where}: name what it trains, train: [{', '.join(mine)}]")
    extra = sorted(moved - set(mine))
    if extra:
        raise ConfigError(
            f"{where} gives {', '.join(extra)} no gradient; it can train {', '.join(mine)}"
        )
    held = [n for n in mine if n.startswith("compressor") and n not in moved]
    if held:
        raise ConfigError(
            f"{where} moves the codebooks under a held {held[0]}: use data=top, or train it"
        )
