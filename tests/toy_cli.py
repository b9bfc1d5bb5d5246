"""A system small enough for tests of the command line: the trainer's toy with every hook."""

from __future__ import annotations

import dataclasses
from typing import Any

from latent_jax.core.config import field
from latent_jax.core.errors import DataError
from latent_jax.train.config import RunBase
from latent_jax.train.testing import ToySystem

TOY = {
    "system": "tests.toy_cli:Toy",
    "name": "toy",
    "train": {
        "steps": 6, "batch_size": 8, "log_every": 2, "log": {"tensorboard": False},
        "checkpoint": {"every": 3, "asynchronous": False},
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ToyModel:
    """The toy's shape."""

    width: int = field(default=8, ge=1, help="inputs of the toy")
    kind: str = field(default="mlp", choices=("mlp",), help="which toy")


@dataclasses.dataclass(frozen=True)
class ToyRun(RunBase):
    """A run of the toy."""

    model: ToyModel = field(default_factory=ToyModel, help="the toy")
    error: str = field(default="", help="raised by evaluate: disk, bug or interrupt")


class Toy(ToySystem):
    """The trainer's toy, with the hooks of a full system."""

    config_class = ToyRun

    def __init__(self, config: ToyRun) -> None:
        super().__init__(batch_size=config.train.batch_size, width=config.model.width)
        self.config = config

    def evaluate(self, variables: Any, frozen: Any, progress: Any = None) -> Any:
        if self.config.error == "disk":
            raise OSError(28, "No space left on device", "/somewhere/file")
        if self.config.error == "bug":
            raise ZeroDivisionError("a bug")
        if self.config.error == "interrupt":
            raise KeyboardInterrupt
        for i in range(3):
            if progress is not None:
                progress("toy", i + 1, 3)
        mse = self.quick_eval(variables, frozen)["mse"]
        samples = [{"kind": "answer", "question": "?", "answers": ["a"], "latent": "a"}]
        return {"toy.mse": mse, "toy.mse.ci95": [mse - 0.1, mse + 0.1]}, {
            "samples": samples,
            "demonstration": {"text": "a text", "rebuilt": "a test"},
        }

    def ask(self, variables: Any, frozen: Any, text: str, question: str) -> str:
        if "nothing" in text:
            raise DataError("the text holds nothing")
        return f"{question} {len(text)}"

    def generate(self, variables: Any, frozen: Any, prompt: str) -> dict[str, Any]:
        return {"rebuilt": prompt[::-1], "n": len(prompt)}

    def diagnose(self, variables: Any, frozen: Any) -> dict[str, Any]:
        seed = self.config.seed
        return {
            "finding": "healthy", "telemetry.norm": 1.0 + seed, "telemetry.norm.std": 9.0,
            f"only.{seed}": 1.0, # one finding as text, several as a list
            "findings": f"seed {seed}" if seed else ["seed 0", "none"],
        }  # fmt: skip

    @classmethod
    def compare(cls, found: Any) -> dict[str, Any]:
        return {
            "Norms [nats]": {
                name: {"norm": (own["telemetry.norm"], own["telemetry.norm.std"]),
                       "error": (own["toy.mse"], None)}
                for name, own in found.items()
            }
        }  # fmt: skip


class Mute(Toy):
    """A toy without hooks."""

    generate = None
