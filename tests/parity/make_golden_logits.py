"""Makes golden_<name>.npz: a model's logits by transformers and torch, from the same GGUF file.

transformers' own GGUF loader dequantises, un-permutes and names the weights, so that nothing of
latent_jax takes part. Kept per position: argmax, logsumexp, the 16 largest logits and 512 fixed
columns.

  python tests/parity/make_golden_logits.py smollm2 path/to/SmolLM2-135M-Instruct.Q4_1.gguf
  python tests/parity/make_golden_logits.py gemma3 path/to/gemma-3-270m-q4_k_m.gguf

Needs torch, transformers, gguf and accelerate (without which transformers reads no GGUF).
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

PROMPTS = {
    "fact": "The capital of France is Paris. The capital of Italy is",
    "story": (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
        "age of foolishness, it was the epoch of belief, it was the epoch of incredulity,"
    ),
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "chat": (
        "<|im_start|>user\nHow many days are there in 2024? Why?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "mixed": "Temperature: −12.5 °C at 06:30; naïve café, 東京 🙂\n\n| a | b |\n|---|---|\n",
}
COLUMNS = 512
TOP = 16


def main(name: str, path: str) -> None:
    """Runs the reference and writes the arrays beside this file."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder, file = str(Path(path).parent), Path(path).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    vocab = model.config.vocab_size
    columns = np.sort(np.random.default_rng(0).choice(vocab, COLUMNS, replace=False))
    arrays: dict[str, np.ndarray] = {"columns": columns.astype(np.int32)}
    for key, text in PROMPTS.items():
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0].float().numpy()
        order = np.argsort(-logits, axis=-1)[:, :TOP]
        arrays |= {
            f"{key}/ids": ids[0].numpy().astype(np.int32),
            f"{key}/argmax": logits.argmax(-1).astype(np.int32),
            f"{key}/logsumexp": torch.logsumexp(torch.tensor(logits), -1).numpy(),
            f"{key}/top_ids": order.astype(np.int32),
            f"{key}/top": np.take_along_axis(logits, order, -1),
            f"{key}/logits": logits[:, columns],
        }
        print(key, logits.shape, repr(tokenizer.decode(logits[-1].argmax())))
    arrays["sha256"] = np.array(hashlib.sha256(Path(path).read_bytes()).hexdigest())
    arrays["versions"] = np.array(
        f"transformers {transformers.__version__}, torch {torch.__version__}"
    )
    out = Path(__file__).with_name(f"golden_{name}.npz")
    np.savez_compressed(out, **arrays)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:3])
