"""The studies: each configuration and each point of the grids in their README resolves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from latent_jax import run as runs
from latent_jax.commands import sweep

STUDIES = Path(runs.find_config("latentwire/studies/base")).parent
NAMES = sorted(p.stem for p in STUDIES.glob("*.yaml") if p.stem != "base")


def _sweeps():
    """Config, grids and settings of every sweep of the README."""
    text = (STUDIES / "README.md").read_text().replace("\\\n", " ")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for command in re.split(r"\n|&&", block):
            words = shlex.split(command)
            if words[:2] == ["latent-jax", "sweep"]:
                pairs = list(zip(words[3:], words[4:], strict=False))
                yield (
                    words[2],
                    [value for flag, value in pairs if flag == "--grid"],
                    [value for flag, value in pairs if flag == "--set"],
                )


def test_every_study_resolves_and_has_its_command():
    found = list(_sweeps())
    assert {config for config, _, _ in found} == {f"latentwire/studies/{n}" for n in NAMES}
    for name in NAMES:
        config = runs.resolve(f"latentwire/studies/{name}")
        assert config.name == f"study_{name}" and config.eval.questions == 100
        assert (STUDIES / f"{name}.yaml").read_text().startswith("# ")


def test_every_point_of_their_grids_resolves(tmp_path):
    points = 0
    for config, grids, settings in _sweeps():
        points += len(sweep.cells(config, sweep.parse_grid(grids), settings, tmp_path))
    assert points >= 60
