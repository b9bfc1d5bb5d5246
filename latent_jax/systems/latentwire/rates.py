"""Rates of a training step, which may be schedules of it: latents kept, inputs corrupted or
replaced by the reader's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from latent_jax.core.errors import ConfigError
from latent_jax.train.curriculum import ScheduleConfig, extremes, make_schedule

#: Fields of `LossConfig` that are rates.
RATES = ("keep", "corrupt", "sampled")


def check_rate(
    name: str, rate: float | ScheduleConfig, above: float | None = None, below: float | None = None
) -> None:
    """Refuses a scheduled rate that leaves 0 to 1, or follows a metric.

    Args:
      name: of the rate.
      rate: a number, whose range its field has, or a schedule.
      above: what it must be larger than.
      below: what it must be smaller than.

    Raises:
      ConfigError: naming the value.
    """
    if not isinstance(rate, ScheduleConfig):
        return
    if rate.gate is not None or rate.auto_scale is not None:
        raise ConfigError(f"{name} is a rate: a gate or auto_scale is of weights")
    low, high = extremes(rate)
    wrong = (low <= above if above is not None else low < 0) or (
        high >= below if below is not None else high > 1
    )
    if wrong:
        ends = f"{'> ' if above is not None else ''}0 to {'< ' if below is not None else ''}1"
        raise ConfigError(f"{name} goes from {low:g} to {high:g} over the steps; allowed: {ends}")


class Rates(NamedTuple):
    """What the rates of a step are.

    Attributes:
      keep: share of the latents that the reader is shown, a number or a traced scalar.
      corrupt: share of teacher-forced inputs that are random tokens.
      sampled: share of them that are what the reader says itself.
      drops: whether any latent is ever hidden.
      corrupts: whether any input is ever random.
      samples: whether any input is ever the reader's own.
    """

    keep: Any
    corrupt: Any
    sampled: Any
    drops: bool
    corrupts: bool
    samples: bool

    @staticmethod
    def of(losses: Any, now: Mapping[str, Any] | None = None) -> Rates:
        """Those of a `LossConfig`.

        Args:
          now: what its schedules are at this step; what they are at step 0 if none.
        """
        scheduled = losses.scheduled
        if now is None:
            now = {name: make_schedule(rate)(0) for name, rate in scheduled.items()}
        rates = (now.get(name, getattr(losses, name)) for name in RATES)
        return Rates(*rates, losses.keep != 1, losses.corrupt != 0, losses.sampled != 0)
