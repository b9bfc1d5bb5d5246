"""Learned latent interfaces to language and sequence models, in JAX.

The public names are loaded on first use, so that ``import latent_jax`` and ``latent-jax --help``
stay fast and never touch a device.

Example:
  >>> import latent_jax
  >>> isinstance(latent_jax.__version__, str)
  True
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it. These names are stable; add to them freely.
_PUBLIC = {
    "load": "latent_jax.backbones",
    "LatentWire": "latent_jax.systems.latentwire",
    "SpacingModel": "latent_jax.systems.spacing",
    "ResidualVQ": "latent_jax.nn.residual_vq",
    "GistTree": "latent_jax.systems.megacontext.store",
}
# Modules that are called like the function of the same name that they define.
_CALLABLE = ("run",)

__all__ = ["GistTree", "LatentWire", "ResidualVQ", "SpacingModel", "__version__", "load", "run"]


class _CallableModule(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(types.ModuleType):
    # `latent_jax.run` names a function and a module. The import system binds the module here, in
    # whichever order people import, so it is made callable at that moment and serves as both.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and type(value) is types.ModuleType:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_CALLABLE})
