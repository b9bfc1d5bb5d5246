"""Every test runs on the CPU with eight virtual devices; set before anything imports jax."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

if os.environ.get("LATENT_JAX_TEST_PLATFORM", "cpu") == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Tiny programs, each run a few times: compiling them well costs more than running them badly.
    _FLAGS = {
        "--xla_force_host_platform_device_count": "8",
        "--xla_backend_optimization_level": "0",
        "--xla_llvm_disable_expensive_passes": "true",
    }
    _GIVEN = os.environ.get("XLA_FLAGS", "")
    _ADDED = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _GIVEN]
    os.environ["XLA_FLAGS"] = " ".join([_GIVEN, *_ADDED]).strip()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest
from hypothesis import settings

# Compiling dominates these tests: programs are kept between runs, outside the checkout.
_COMPILED = Path(
    os.environ.get("LATENT_JAX_TEST_CACHE")
    or Path(tempfile.gettempdir()) / f"latent_jax-tests-{os.getuid() if os.name == 'posix' else 0}"
)
jax.config.update("jax_compilation_cache_dir", str(_COMPILED / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Timing must not decide a test, and a failure must be the same failure next time.
settings.register_profile("latent_jax", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("latent_jax")


def _memory_maps() -> int:
    """Memory maps of this process (0 where the system does not list them)."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_freed() -> Iterator[None]:
    """Frees compiled programs between modules before they use up the process's memory maps.

    Every program compiled for the CPU holds several maps; Linux allows 65,530 of them
    (``vm.max_map_count``), and past that the compiler dies of a segmentation fault.
    """
    yield
    if _memory_maps() > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The eight virtual devices."""
    found = jax.devices()
    if len(found) < 8:
        pytest.skip(f"needs 8 devices, there are {len(found)}")
    return found[:8]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets (``LATENT_JAX_DATA``); the test is skipped without it."""
    root = os.environ.get("LATENT_JAX_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("LATENT_JAX_DATA is not set to a folder")
    return Path(root)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The cached SmolLM2 GGUF; the test is skipped where nobody has fetched it."""
    from latent_jax.core.fetch import cached

    path = cached("smollm2")
    if path is None:
        pytest.skip("smollm2 is not in the cache: latent-jax fetch smollm2")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory for `latent_jax.core.fetch`."""
    monkeypatch.setenv("LATENT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
