"""Reports: one self-contained HTML page per run.

`write_report(run_dir)` needs only the files that a run leaves behind, so a report can be made again
at any time, for any system: its layout follows the names of the results.
"""

from __future__ import annotations

from latent_jax.report.html import render, write_report
from latent_jax.report.load import RunFiles, load_run

__all__ = ["RunFiles", "load_run", "render", "write_report"]
