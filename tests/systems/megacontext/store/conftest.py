"""Fixtures of the gist store's tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="package", autouse=True)
def quick():
    """Waiting for the disk is slow, and shows nothing here: what a power loss leaves behind is
    imitated, and processes that are killed sync as usual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(os, "fdatasync", lambda handle: None)
        yield


@pytest.fixture
def where(tmp_path):
    """A new path at every call; hypothesis runs many examples in one test."""
    made = iter(range(10**6))
    return lambda: tmp_path / f"store{next(made)}"
