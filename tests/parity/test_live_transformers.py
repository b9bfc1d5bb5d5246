"""Random tiny models of every family, written by transformers, read by us: equal logits."""

from __future__ import annotations

import numpy as np
import pytest

from latent_jax import backbones
from latent_jax.backbones import ByteTokenizer, save_hf
from latent_jax.backbones.testing import random_params, tiny_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = dict(
    vocab_size=259,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=80,
    max_position_embeddings=256,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
GEMMA3 = dict(
    head_dim=16, query_pre_attn_scalar=12, sliding_window=128, num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
)  # fmt: skip
CASES = {
    "llama": ("Llama", dict(tie_word_embeddings=True)),
    "llama_untied_mha": ("Llama", dict(num_key_value_heads=6, rms_norm_eps=1e-5)),
    "llama3_scaling": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama_wide_heads": ("Llama", dict(head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "gemma3": ("Gemma3", GEMMA3),
}


def reference(kind: str, options: dict, seed: int = 0):
    torch.manual_seed(seed)
    name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, name)(**(SHAPE | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, where mistakes do not show
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * (0.3 if "bias" in name else 0.15))
    return model


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


@pytest.mark.parametrize("case", CASES)
def test_reads_what_transformers_writes(case, tmp_path):
    model = reference(*CASES[case])
    model.save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    ids = np.random.default_rng(1).integers(0, 259, (2, 100))
    ours = np.asarray(backbones.load(tmp_path).logits(ids))
    theirs = torch_logits(model, ids)
    print(case, "max abs diff", np.abs(ours - theirs).max(), "of", np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_sharded_safetensors_and_bf16(tmp_path):
    model = reference("Qwen2", dict(tie_word_embeddings=False)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ByteTokenizer().save(tmp_path)
    ids = np.random.default_rng(1).integers(0, 259, (1, 20))
    # Reloaded, since rounding the live model also rounded its rotary table.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = backbones.load(tmp_path).logits(ids)
    np.testing.assert_allclose(ours, torch_logits(model, ids), atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_what_we_write(family, tmp_path):
    import jax

    config = tiny_config(family, vocab_size=259)
    params = random_params(config, jax.random.key(3))
    save_hf(tmp_path, config, params, ByteTokenizer())
    ids = np.random.default_rng(1).integers(0, 259, (2, 30))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = np.asarray(backbones.load(tmp_path).logits(ids))
    np.testing.assert_allclose(ours, torch_logits(model, ids), atol=2e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("héllo", add_special_tokens=False).input_ids == list("héllo".encode())
