"""Errors that a person can cause: one clear line each, exit code 2.

The command line prints ``str(error)`` and exits with ``error.exit_code``; anything that is not a
`UserError` is a defect of the library and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Base of every error caused by input: says what was wrong, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that cannot be resolved: unknown key, wrong type, impossible combination."""


class DataError(UserError):
    """A data source that is missing, unreadable or malformed."""


class BackboneError(UserError):
    """A language model that cannot be loaded: truncated, wrong architecture, missing tensor."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable, or belongs to another configuration."""


class RunError(UserError):
    """A run directory that does not exist, is not writable, or holds another run."""


class MeshError(UserError):
    """A device mesh that the present devices cannot form."""


class PeerLost(UserError):
    """Another process of the job has ended: the same command continues from the last checkpoint."""

    exit_code = 75


class FetchError(UserError):
    """A download that failed, or whose content is not what was pinned."""


class StoreError(UserError):
    """A store of gists that is damaged, locked, full, or made for another model."""


class WireError(UserError):
    """A stored wire that is damaged, foreign, or was made by another encoder."""
