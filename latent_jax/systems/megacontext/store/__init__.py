"""The gist tree on disk. Nothing in here imports JAX: a writer starts in a fraction of a second."""

from latent_jax.systems.megacontext.store.build import Built, GistFn, build
from latent_jax.systems.megacontext.store.history import Document
from latent_jax.systems.megacontext.store.overlay import Overlay
from latent_jax.systems.megacontext.store.spec import TreeSpec
from latent_jax.systems.megacontext.store.stretch import Stretch
from latent_jax.systems.megacontext.store.tokens import DamagedTokens
from latent_jax.systems.megacontext.store.tree import (
    DamagedGists,
    GistTree,
    PendingGists,
    State,
)
from latent_jax.systems.megacontext.store.verify import Verification

__all__ = [
    "Built",
    "DamagedGists",
    "DamagedTokens",
    "Document",
    "GistFn",
    "GistTree",
    "Overlay",
    "PendingGists",
    "State",
    "Stretch",
    "TreeSpec",
    "Verification",
    "build",
]
