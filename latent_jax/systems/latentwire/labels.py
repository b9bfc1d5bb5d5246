"""Names of parameters and terms: groups that are trained, how arrays are sharded."""

from __future__ import annotations

from latent_jax.backbones.sharding import DECODER_RULES

#: Path of a parameter -> the group that it is trained in.
LABELS = (
    (r"^lora/.*_a$", "lora_a"),
    (r"^lora/.*_b$", "lora_b"),
    (r"^reader_lora/", "reader_lora"),
    (r"^encoder/", "encoder"),
    (r"^pool/", "pool"),
    (r"^bytes/", "bytes"),
    (r"^refiner/", "refiner"),
    (r"^(adapter|task_adapter|cross|coprocessor)/", "adapter"),
    (r"^(gate|onto)$", "gate"),
    (r"^gist/", "gist"),
    (r"^(memory|private|tasks|asking)$", "memory"),
    (r"^prompt$", "prompt"),
    (r"^factor$", "heads"),
    (r"^(profile|centre|spread|spelling|level_scale)$", "frozen"),
    (r"^(readers/\w+/)?(in_mean|in_scale|stretch)$", "frozen"),
    (r"^(down|up|soft|soft_mean|out_mean|out_scale)$", "bottleneck"),
)
#: Loss terms that only the main reader has.
OF_MAIN = (
    "distil_logits", "distil_states", "embeddings", "contrast", "magnitude", "first_entropy",
    "commitment", "gist", "anchor",
)  # fmt: skip
#: Path of a parameter -> its logical axes.
RULES = (
    *DECODER_RULES,
    (r"lora/(o|down)_a$", ("layers", "heads", "rank")),
    (r"lora/(q|k|v|gate|up)_a$", ("layers", "embed", "rank")),
    (r"lora/(q|k|v|gate|up)_b$", ("layers", "rank", "heads")),
    (r"lora/(o|down)_b$", ("layers", "rank", "embed")),
    (r"pool/[kv]$", ("layers", None, "embed", "heads")),
)
