"""Multi-process start-up, from plain flags, SLURM, a TPU pod, or not at all.

The environment variable ``LATENT_JAX_DISTRIBUTED`` (``off``, ``flags``, ``slurm``, ``tpu``,
``mpi``) overrides the detection; launch scripts set it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from latent_jax.core.errors import MeshError

Mode = Literal["auto", "off", "flags", "slurm", "tpu", "mpi"]
Layout = Literal["auto", "per_gpu", "per_node"]
_MODES = ("auto", "off", "flags", "slurm", "tpu", "mpi")


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    mode: Mode | None = None,
    layout: Layout = "auto",
    local_device_ids: Sequence[int] | None = None,
    timeout: int | None = None,
) -> bool:
    """Joins this process to the others; call it before anything touches a device.

    Args:
      coordinator: ``host:port`` of process 0 (or ``JAX_COORDINATOR_ADDRESS``).
      num_processes: how many (or ``JAX_NUM_PROCESSES``).
      process_id: which one this is (or ``JAX_PROCESS_ID``).
      mode: how to find the others; default ``LATENT_JAX_DISTRIBUTED``, else ``auto``.
      layout: under SLURM, whether a task owns one GPU or all of its node's. ``auto`` counts the
        tasks per node. (Left to itself, JAX gives a lone task a single GPU of its node.)
      local_device_ids: the devices of this process, if not all.
      timeout: seconds to wait for the others (default ``LATENT_JAX_TIMEOUT``, else 300).

    Returns:
      True if several processes were joined; False for an ordinary single process, where nothing
      is started.

    Raises:
      MeshError: contradictory flags, or the others cannot be reached.
    """
    settings = resolve(os.environ, coordinator, num_processes, process_id, mode, layout)
    if settings is None or jax.distributed.is_initialized():
        return settings is not None
    if local_device_ids is not None:
        settings["local_device_ids"] = list(local_device_ids)
    timeout = timeout or _int(os.environ, "LATENT_JAX_TIMEOUT") or 300
    if settings.get("process_id"):
        _await_coordinator(settings["coordinator_address"], timeout)
    try:
        jax.distributed.initialize(initialization_timeout=timeout, **settings)
    except (RuntimeError, ValueError) as error:
        where = settings.get("coordinator_address", "the detected coordinator")
        reason = " ".join(str(error).split())[:200]
        raise MeshError(f"distributed start-up: cannot join {where}: {reason}") from None
    return True


def _await_coordinator(address: str, timeout: float) -> None:
    """Returns when something listens at an address. (JAX aborts the process when nothing does.)

    Raises:
      MeshError: nothing did in time.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise MeshError(
                    f"distributed start-up: cannot join {address} in {timeout:g} s: "
                    f"{error.strerror or error}; is process 0 running, and reachable from here?"
                ) from None
        time.sleep(0.5)


def check_agreement(facts: Mapping[str, str], timeout: int = 300) -> None:
    """Returns when all processes of the job have stated the same facts; at once if there is one.

    It asks the coordination service and touches no device, so that processes which could not even
    compute together are told apart. Once per job.

    Args:
      facts: name -> value, such as the hash of the configuration.
      timeout: seconds to wait for the others.

    Raises:
      MeshError: in every process, where one of them differs; or one did not come in time.
    """
    # Neither jax nor Orbax has a public name for the client.
    from jax._src.distributed import global_state

    client, count = global_state.client, global_state.num_processes
    if client is None or count == 1:
        return
    where, limit = "latent_jax/agreement", 1000 * timeout
    try:
        client.key_value_set(f"{where}/{global_state.process_id}", json.dumps(dict(facts)))
        if global_state.process_id == 0:
            all_ = [client.blocking_key_value_get(f"{where}/{i}", limit) for i in range(count)]
            found = _disagreement([json.loads(text) for text in all_])
            client.key_value_set(f"{where}/found", json.dumps(found))
        found = json.loads(client.blocking_key_value_get(f"{where}/found", limit))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise MeshError(f"comparing the processes of this job: {reason}") from None
    if found:
        raise MeshError(found)


def _disagreement(facts: Sequence[Mapping[str, str]]) -> str:
    """One line on the first process that differs from process 0; empty if none does."""
    for index, other in enumerate(facts):
        wrong = [name for name in facts[0] if facts[0][name] != other.get(name)]
        if wrong:
            shown = ", ".join(f"{n} ({facts[0][n]} and {other.get(n)})" for n in wrong)
            return (
                f"processes 0 and {index} differ in {shown}: start all of them with the same "
                "command and the same installed code"
            )
    return ""


def await_processes(name: str, timeout: int = 3600) -> None:
    """Returns when every process has come to the place ``name``; at once if there is only one.

    It asks the coordination service. A collective would not do: gloo gives up 30 s after its first
    caller, and processes that compile on shared cores may be further apart than that.

    Args:
      name: of the place; each can be met once.
      timeout: seconds to wait for the others.

    Raises:
      MeshError: some process did not come in time, or has ended.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * timeout)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise MeshError(f"waiting for the other processes at {name!r}: {reason}") from None


def resolve(
    env: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    mode: str | None = None,
    layout: Layout = "auto",
) -> dict[str, Any] | None:
    """Decides the arguments of `jax.distributed.initialize`; None means a single process."""
    mode = mode or env.get("LATENT_JAX_DISTRIBUTED") or "auto"
    if mode not in _MODES:
        raise MeshError(f"LATENT_JAX_DISTRIBUTED = {mode!r}: allowed: {', '.join(_MODES)}")
    if mode == "off":
        return None
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _int(env, "JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _int(env, "JAX_PROCESS_ID") if process_id is None else process_id
    if mode == "flags" or (mode == "auto" and (coordinator or num_processes or process_id)):
        return _flags(coordinator, num_processes, process_id)
    if mode == "slurm" or (mode == "auto" and (_int(env, "SLURM_NTASKS") or 1) > 1):
        return _slurm(env, layout)
    if mode == "mpi" or (mode == "auto" and (_int(env, "OMPI_COMM_WORLD_SIZE") or 1) > 1):
        return {}
    # A pod slice lists all its workers; a single TPU VM lists one or none.
    workers = [w for w in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if w]
    if mode == "tpu" or len(workers) > 1 or env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return {}
    return None


def _flags(coordinator: str | None, count: int | None, index: int | None) -> dict[str, Any] | None:
    if count == 1:
        return None
    given = {"coordinator": coordinator, "num_processes": count, "process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise MeshError(
            f"distributed start-up: {', '.join(missing)} missing; give coordinator (host:port), "
            "num_processes and process_id together"
        )
    assert coordinator is not None and count is not None and index is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise MeshError(f"distributed start-up: coordinator {coordinator!r}: write it as host:port")
    if count < 1 or not 0 <= index < count:
        raise MeshError(
            f"distributed start-up: process_id = {index}: allowed: 0 to {count - 1} "
            "(num_processes - 1)"
        )
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}


def _slurm(env: Mapping[str, str], layout: Layout) -> dict[str, Any] | None:
    tasks = _int(env, "SLURM_NTASKS") or 1
    if tasks == 1:
        return None
    nodes = _int(env, "SLURM_STEP_NUM_NODES") or _int(env, "SLURM_NNODES") or 1
    if layout == "auto":
        layout = "per_node" if tasks <= nodes else "per_gpu"
    if layout == "per_gpu":
        return {"local_device_ids": [_int(env, "SLURM_LOCALID") or 0]}
    visible = [v for v in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    gpus = len(visible) or _int(env, "SLURM_GPUS_ON_NODE") or 0
    return {"local_device_ids": list(range(gpus))} if gpus else {}


def _int(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise MeshError(f"{name} = {text!r}: is not a whole number") from None
