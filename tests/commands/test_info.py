"""The doctor: what is wrong is said once, with what mends it."""

from __future__ import annotations

import importlib.metadata

import pytest

from latent_jax.commands import info_checks as checks
from latent_jax.core.pins import PINS


def test_versions_out_of_range_and_missing_packages():
    installed = {"jax": "0.9.1", "numpy": "2.1"}

    def version(name: str) -> str:
        try:
            return installed[name]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    asked = ["jax>=0.10,<0.13", "numpy>=2.0", "grain>=0.2.14", 'torch>=2.6; extra == "peers"']
    found = list(checks.packages(asked, version))
    mends = ["pip install 'jax<0.13,>=0.10'", "pip install 'grain>=0.2.14'"]
    assert [p.mend for p in found] == mends
    assert "jax 0.9.1 is installed" in found[0].what and all(p.needed for p in found)


@pytest.mark.parametrize(
    ("platforms", "files", "environment", "mends"),
    [
        (["cpu"], set(), {}, []),
        (["gpu"], {"/dev/nvidia0"}, {}, []),
        (["cpu"], {"/dev/nvidia0"}, {}, ["pip install 'latent-jax[cuda]'"]),
        (["cpu"], {"/dev/nvidia0"}, {"JAX_PLATFORMS": "cpu"}, ["unset JAX_PLATFORMS (it is cpu)"]),
        (["cpu"], {"/dev/accel0"}, {}, ["pip install 'latent-jax[tpu]'"]),
        ([], set(), {"JAX_PLATFORMS": "cuda"}, ["unset JAX_PLATFORMS"]),
    ],
)
def test_devices_that_jax_does_not_use(platforms, files, environment, mends):
    found = checks.devices(platforms, "no backend", environment, files.__contains__)
    assert [p.mend for p in found] == mends


def test_what_can_be_fetched_is_named_with_its_command(cache):
    assert [p.mend for p in checks.cache()] == [f"latent-jax fetch {name}" for name in PINS]
    item = PINS["zeros"]
    cache.mkdir()
    (cache / item.filename).write_bytes(b"\0" * item.size)
    assert "latent-jax fetch zeros" not in [p.mend for p in checks.cache()]


def test_a_full_disk_is_told_instead(cache, monkeypatch):
    usage = checks.shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    found = list(checks.cache())
    assert len(found) == len(PINS) and all("1 MB left" in p.what for p in found)


def test_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LATENT_JAX_DATA", raising=False)
    (none,) = checks.data({"squad": False, "novels": False})
    assert "squad, novels" in none.what and not none.needed
    monkeypatch.setenv("LATENT_JAX_DATA", str(tmp_path))
    assert list(checks.data({"squad": True})) == []
    monkeypatch.setenv("LATENT_JAX_DATA", str(tmp_path / "gone"))
    (gone,) = checks.data({"squad": False})
    assert gone.needed and "no such folder" in gone.what


def test_little_memory_and_missing_peers():
    assert not list(checks.memory(None)) and not list(checks.memory(32_000_000_000))
    (few,) = checks.memory(2_000_000_000)
    assert "2 GB" in few.what
    (peers,) = checks.peers(lambda name: None if name == "torch" else True)
    assert "torch" in peers.what and "vector" not in peers.what
