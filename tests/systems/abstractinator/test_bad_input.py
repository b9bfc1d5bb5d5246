"""What a person can get wrong: one line on the command line, exit code 2, nothing compiled.

A budget of segments that overflows is no mistake but a figure: see `test_segment` (counted) and
`test_system` (charged, and warned of). Digits that cannot be composed: `tests/ops/test_rvq`.
"""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import pytest

from latent_jax import cli
from latent_jax import run as runs
from latent_jax.core.config import dump_yaml
from latent_jax.core.errors import CheckpointError


@pytest.fixture
def compiled():
    """Programs compiled since the test began."""
    found = []

    def hear(name, *_, **__):
        if "backend_compile" in name:
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    return found


def test_the_check_sees_a_program(compiled):
    jax.jit(lambda x: x + 3.25)(jnp.float32(1))
    assert compiled


@pytest.mark.parametrize(
    "raw, change, message",
    [
        (b" \n", None, "the file is empty"),
        (b"", None, "the file is empty"),
        (b"ab cd\xff\xfe ef", None, "not UTF-8 text"),
        (b"to be or not", {"segments": {"rule": "fixed:30"}}, "a segment has 30"),
        (None, {"data": {"text": "no/such/file.txt"}}, "no such file"),
        (None, {"level": {"codes": 4096}}, "k-means of the first batch finds them among"),
        (None, {"level": {"stages": 0}}, "level.stages"),
        (None, {"level": {"codes": 1}}, "level.codes"),
        (None, {"segments": {"rule": "wurds"}}, "no such rule"),
        (None, {"segments": {"budget": 0}}, "segments.budget"),
        (None, {"level": {"widht": 3}}, "width"),
        (None, {"byte_lm_flops": {"layers": 1}}, "byte_lm_flops: no phase"),
    ],
)
def test_one_line_and_nothing_compiled(tiny, tmp_path, capsys, compiled, raw, change, message):
    tree = tiny()
    if raw is not None:
        path = tmp_path / "text.txt"
        path.write_bytes(raw)
        tree["data"]["text"] = str(path)
    for name, value in (change or {}).items():
        tree[name] = tree[name] | value if isinstance(tree.get(name), dict) else value
    if change == {"segments": {"rule": "fixed:30"}}:
        del tree["segments"]["longest"], tree["segments"]["budget"]
        tree["data"]["window"] = 60
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(tree))
    code = cli.main(["run", str(config), "--dry-run"])
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("latent-jax: ") and err.count("\n") == 1 and message in err
    assert not compiled


def test_variables_of_another_configuration(made):
    system, variables, _ = made

    def fresh():
        return runs.system_class("abstractinator")(system.config)

    fresh().check(variables)
    lacking = copy.copy(variables)
    lacking["codebook"] = {}
    with pytest.raises(CheckpointError, match="lacks codebook/quantiser/code"):
        fresh().check(lacking)
    other = runs.resolve(system.config, {"level.codes": 32})
    with pytest.raises(CheckpointError, match="codebook/quantiser/code has the shape.*another"):
        runs.system_class("abstractinator")(other).check(variables)
