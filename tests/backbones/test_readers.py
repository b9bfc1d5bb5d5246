"""Readers: what they build, from files written here, and what they say about bad ones."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from latent_jax import backbones
from latent_jax.backbones import ByteTokenizer, save_hf
from latent_jax.backbones.readers import hf, table
from latent_jax.backbones.readers.gguf_file import GGUFFile
from latent_jax.backbones.testing import random_params, tiny_config
from latent_jax.core.errors import BackboneError

FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3"]


@functools.cache
def make(family: str, **overrides):
    config = tiny_config(family, vocab_size=259, **overrides)
    return config, jax.tree.map(np.asarray, random_params(config, jax.random.key(0)))


@pytest.fixture
def llama_dir(tmp_path) -> Path:
    config, params = make("llama")
    return save_hf(tmp_path / "llama", config, params, ByteTokenizer())


def edit(directory: Path, **changes) -> None:
    """Replaces (or, with None, removes) tensors of a saved model."""
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    safetensors.numpy.save_file(tensors, path)


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Hugging Face directories


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_round_trip(family, tmp_path):
    config, params = make(family)
    save_hf(tmp_path, config, params, ByteTokenizer())
    bb = backbones.load(tmp_path)
    assert bb.config == config
    jax.tree.map(np.testing.assert_array_equal, bb.params, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert bb.tokenizer.encode("é") == list("é".encode())
    assert len(bb.sha256) == 64 and bb.sha256 == backbones.load(tmp_path).sha256


def test_hf_dtype(tmp_path):
    config, params = make("llama")
    save_hf(tmp_path, config, params, ByteTokenizer(), dtype=ml_dtypes.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    bb = backbones.load(tmp_path)
    assert bb.dtype == jnp.float32
    np.testing.assert_array_equal(
        bb.params["embed"], params["embed"].astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert backbones.load(tmp_path, dtype=jnp.bfloat16).params["final_norm"]["scale"].dtype == (
        jnp.bfloat16
    )


def test_tied_head_stored_twice_is_ignored(llama_dir):
    before = backbones.load(llama_dir)
    edit(llama_dir, **{"lm_head.weight": np.asarray(before.params["embed"])})
    after = backbones.load(llama_dir)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.0.extra.weight": np.zeros(2)}, r"unknown tensors.*'model.layers.0.extra"),
        ({"model.layers.7.mlp.up_proj.weight": np.zeros((80, 48))}, "unknown.*layers.7"),
        ({Q0: None}, r"missing tensors.*layers/q/kernel \(layer 0\)"),
        ({"model.norm.weight": None}, "missing tensors.*final_norm/scale"),
        ({Q0: np.zeros((48, 47), np.float32)}, r"q_proj.weight' has shape \(48, 47\).*\(48, 48\)"),
    ],
)
def test_wrong_tensors(llama_dir, changes, message):
    edit(llama_dir, **changes)
    with pytest.raises(BackboneError, match=message) as raised:
        backbones.load(llama_dir)
    assert "\n" not in str(raised.value)


def test_duplicate_tensors(llama_dir):
    part = {"model.norm.weight": np.ones(48, np.float32)}
    safetensors.numpy.save_file(part, llama_dir / "more.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (llama_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match="'model.norm.weight' is stored twice"):
        backbones.load(llama_dir)


def test_two_names_for_one_parameter():
    class Source:
        path = Path("memory")

        def names(self):
            return ["embed", "wte"]

    rules = [table.Rule("embed", "embed"), table.Rule("wte", "embed")]
    with pytest.raises(BackboneError, match="'embed' and 'wte' are duplicates"):
        table.plan(Source(), rules, tiny_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; .*gemma3_text, llama"),
        ({"model_type": "qwen2"}, "missing tensors.*layers/q/bias"),
        ({"hidden_size": "wide"}, "missing or wrong field"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"num_key_value_heads": 4}, "6 query heads do not divide over 4"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"mlp_bias": True}, "biases in the MLP"),
        ({"num_hidden_layers": 4}, r"missing tensors.*layer 3"),
    ],
)
def test_wrong_hf_config(llama_dir, changes, message):
    edit_config(llama_dir, **changes)
    with pytest.raises(BackboneError, match=message):
        backbones.load(llama_dir)


def test_unreadable_hf_files(llama_dir, tmp_path):
    weights = llama_dir / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackboneError, match="cannot read it as safetensors"):
        backbones.load(llama_dir)
    weights.unlink()
    with pytest.raises(BackboneError, match="no safetensors files"):
        backbones.load(llama_dir)
    (llama_dir / "config.json").write_text("{")
    with pytest.raises(BackboneError, match="not valid JSON"):
        backbones.load(llama_dir)
    with pytest.raises(BackboneError, match="no readable config.json"):
        backbones.load(tmp_path)


def test_missing_shard(llama_dir):
    index = {"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}
    (llama_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match="gone.safetensors: missing"):
        backbones.load(llama_dir)


def test_tokenizer_larger_than_the_table(tmp_path):
    config = tiny_config("llama", vocab_size=200)
    params = random_params(config, jax.random.key(0))
    save_hf(tmp_path, config, params, ByteTokenizer())
    with pytest.raises(BackboneError, match="259 tokens, the embedding only 200"):
        backbones.load(tmp_path)


def test_sliding_window_limits_the_context(llama_dir):
    edit_config(llama_dir, model_type="mistral", sliding_window=64)
    assert hf.config_from(llama_dir).max_position == 64
    edit_config(llama_dir, model_type="llama")
    assert hf.config_from(llama_dir).max_position == 512


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "model.gguf", "nosuch"])
def test_no_such_model(name):
    with pytest.raises(BackboneError, match="no such model"):
        backbones.load(name)


def test_hub_id_when_offline():
    with pytest.raises(BackboneError, match="check the id and the network"):
        backbones.load("no-such-owner/no-such-model")


# Sharded reading


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sharded_equals_whole(family, tmp_path, devices):
    config, params = make(family)
    save_hf(tmp_path, config, params, ByteTokenizer())
    mesh = jax.make_mesh(
        (2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices
    )

    def shard(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = [None] * len(shape)
        if path.endswith("kernel"):
            spec[-1], spec[-2] = "tensor", "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    bb = backbones.load(tmp_path, shardings=shard)
    assert bb.params["layers"]["q"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    jax.tree.map(np.testing.assert_array_equal, bb.params, params)


def test_sharded_reads_only_slices(llama_dir, devices, monkeypatch):
    read = []
    original = hf.SafetensorsFiles.read_slice

    def counted(self, name, index):
        part = original(self, name, index)
        read.append(part.size)
        return part

    def whole(self, name):
        raise AssertionError(f"{name} was read whole")

    monkeypatch.setattr(hf.SafetensorsFiles, "read_slice", counted)
    monkeypatch.setattr(hf.SafetensorsFiles, "read", whole)
    mesh = jax.make_mesh(
        (8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
    config = hf.config_from(llama_dir)
    shardings = {
        path: NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "tensor"))
        for path, shape in table.expected_shapes(config).items()
    }
    bb = backbones.load(llama_dir, shardings=table.nest(shardings))
    assert sum(read) == bb.parameter_count()


# GGUF


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The permutation of llama.cpp's converter."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


GGUF_NAMES = {
    "attn_norm/scale": "attn_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "attn_post_norm/scale": "post_attention_norm.weight",
    "mlp_post_norm/scale": "post_ffw_norm.weight",
    "q/kernel": "attn_q.weight",
    "k/kernel": "attn_k.weight",
    "v/kernel": "attn_v.weight",
    "o/kernel": "attn_output.weight",
    "q/bias": "attn_q.bias",
    "k/bias": "attn_k.bias",
    "v/bias": "attn_v.bias",
    "q_norm/scale": "attn_q_norm.weight",
    "k_norm/scale": "attn_k_norm.weight",
    "gate/kernel": "ffn_gate.weight",
    "up/kernel": "ffn_up.weight",
    "down/kernel": "ffn_down.weight",
}


def write_gguf(path: Path, config, params, *, arch=None, quant=None, extra=(), drop=()) -> Path:
    arch = arch or {"mistral": "llama"}.get(config.family, config.family)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.family == "gemma3":
        writer.add_sliding_window(config.max_position)
    byte = ByteTokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*(byte.id_to_token(i) for i in range(256)), "he", "<s>", "</s>"])
    writer.add_token_types([1] * 257 + [3] * 2)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(257)
    tensors = {
        "token_embd.weight": params["embed"] / config.embed_scale,
        "output_norm.weight": params["final_norm"]["scale"],
    }
    if "head" in params:
        tensors["output.weight"] = params["head"].T
    for name, stacked in table.flatten(params["layers"]).items():
        for layer, array in enumerate(stacked):
            array = array.T if name.endswith("kernel") else array
            if arch == "llama" and name[0] in "qk" and "norm" not in name:
                heads = config.num_heads if name[0] == "q" else config.num_kv_heads
                array = interleave(array, heads)
            tensors[f"blk.{layer}.{GGUF_NAMES[name]}"] = array
    tensors = {k: v for k, v in tensors.items() if k not in drop} | dict(extra)
    for name, array in tensors.items():
        array = np.ascontiguousarray(array, np.float32)
        if quant is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            raw = gguf.quantize(array, quant)
            writer.add_tensor(name, raw, raw_dtype=quant)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_round_trip(family, tmp_path):
    config, params = make(family)
    bb = backbones.load(write_gguf(tmp_path / "m.gguf", config, params))
    assert dataclasses.replace(bb.config, norm_eps=0) == dataclasses.replace(config, norm_eps=0)
    assert bb.config.norm_eps == pytest.approx(config.norm_eps)
    jax.tree.map(np.testing.assert_array_equal, bb.params, params)
    assert bb.tokenizer.encode("<s>héhe") == [257, *"hé".encode(), 256]


def test_gemma3_round_trips(tmp_path):
    """Scaled embeddings and norms less 1 in Hugging Face's files, only the former in GGUF's."""
    config, params = make("gemma3", num_layers=6, global_every=6, local_theta=1e4, query_scale=None)
    gguf_file = write_gguf(tmp_path / "m.gguf", config, params)
    save_hf(tmp_path / "hf", config, params, ByteTokenizer())
    stored = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    np.testing.assert_allclose(
        stored["model.layers.3.pre_feedforward_layernorm.weight"],
        params["layers"]["mlp_norm"]["scale"][3] - 1, atol=1e-6,
    )  # fmt: skip
    for bb in (backbones.load(gguf_file), backbones.load(tmp_path / "hf")):
        assert bb.config.norm_eps == pytest.approx(config.norm_eps)
        assert dataclasses.replace(bb.config, norm_eps=1e-6) == config
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), bb.params, params)
    for changes, message in (
        ({"layer_types": ["full_attention", "sliding_attention"] * 3}, "without a period"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
        ({"hidden_activation": "silu"}, "activation 'silu' is not supported"),
    ):
        before = (tmp_path / "hf" / "config.json").read_text()
        edit_config(tmp_path / "hf", **changes)
        with pytest.raises(BackboneError, match=message):
            backbones.load(tmp_path / "hf")
        (tmp_path / "hf" / "config.json").write_text(before)


def test_gguf_rope_freqs(tmp_path):
    config, params = make("llama3")
    scaling = dataclasses.replace(config.rope_scaling, original_max_position=8192, factor=32.0)
    turns = 8192 * 500_000.0 ** (-np.arange(0, 8, 2) / 8) / (2 * np.pi)
    blend = np.clip((turns - 1) / 3, 0, 1)
    freqs = 1 / (blend + (1 - blend) / 32.0)
    path = tmp_path / "m.gguf"
    bb = backbones.load(
        write_gguf(path, config, params, extra={"rope_freqs.weight": freqs}.items())
    )
    assert bb.config.rope_scaling == scaling
    odd = {"rope_freqs.weight": freqs[::-1]}
    with pytest.raises(BackboneError, match="not Llama 3 scaling"):
        backbones.load(write_gguf(path, config, params, extra=odd.items()))


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "F16"])
def test_gguf_quantised(quant, tmp_path):
    config, params = make("llama", hidden_size=64, num_heads=8, intermediate_size=96)
    kind = gguf.GGMLQuantizationType[quant]
    path = write_gguf(tmp_path / "m.gguf", config, params, quant=kind)
    up = GGUFFile(path).read("blk.1.ffn_up.weight")
    raw = gguf.quantize(np.ascontiguousarray(params["layers"]["up"]["kernel"][1].T), kind)
    np.testing.assert_array_equal(up, gguf.dequantize(raw, kind))
    assert backbones.load(path, jnp.bfloat16).dtype == jnp.bfloat16


def test_gguf_reads_as_the_package_does(tmp_path):
    """Header and tensors against the `gguf` package's own reader."""
    path = write_gguf(tmp_path / "m.gguf", *make("qwen2"), quant=gguf.GGMLQuantizationType.Q4_1)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert ours.names() == [t.name for t in theirs.tensors]
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert list(value) == list(expected) if hasattr(value, "__len__") else value == expected
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(
            ours.read(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type)
        )


def test_gguf_sharded(tmp_path, devices):
    config, params = make("llama")
    path = write_gguf(tmp_path / "m.gguf", config, params)
    mesh = jax.make_mesh(
        (2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:2]
    )

    def shard(name, shape):
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "tensor"))

    bb = backbones.load(path, shardings=shard)
    jax.tree.map(np.testing.assert_array_equal, bb.params, params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mamba"}, "architecture 'mamba' is not supported"),
        ({"drop": ["blk.2.ffn_up.weight"]}, r"missing.*layers/up/kernel \(layer 2\)"),
        ({"drop": ["token_embd.weight"]}, "missing tensor 'token_embd.weight'"),
        ({"extra": {"blk.0.ffn_gate_inp.weight": np.zeros((2, 48))}.items()}, "unknown.*gate_inp"),
        (
            {"extra": {"blk.0.attn_v.weight": np.zeros((4, 48))}.items()},
            r"attn_v.weight' has shape",
        ),
    ],
)
def test_wrong_gguf(options, message, tmp_path):
    config, params = make("llama")
    path = write_gguf(tmp_path / "m.gguf", config, params, **options)
    with pytest.raises(BackboneError, match=message) as raised:
        backbones.load(path)
    assert "\n" not in str(raised.value)


def test_truncated_gguf_at_any_length(tmp_path):
    config, params = make("llama")
    whole = write_gguf(tmp_path / "m.gguf", config, params).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 10, 24, 30, 200, 1000, 5000, len(whole) // 2, len(whole) - 200]:
        cut.write_bytes(whole[:size])
        with pytest.raises(BackboneError, match="cut.gguf"):
            backbones.load(cut)


def test_damaged_gguf_headers(tmp_path):
    """Flipped bytes in the header give one clear line or a model, never a traceback."""
    config, params = make("llama")
    whole = bytearray(write_gguf(tmp_path / "m.gguf", config, params).read_bytes())
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    for at in rng.integers(0, 1200, 60):
        data = bytearray(whole)
        data[at] ^= int(rng.integers(1, 256))
        damaged.write_bytes(data)
        try:
            GGUFFile(damaged)
        except BackboneError as error:
            assert "damaged.gguf" in str(error)


def test_not_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + b"x" * 100)
    with pytest.raises(BackboneError, match="not a GGUF file"):
        backbones.load(path)


# llama2.c


@pytest.fixture
def stories() -> Path:
    path = Path(os.environ.get("LATENT_JAX_DATA", "")) / "models" / "stories260K.bin"
    if not path.is_file():
        pytest.skip("needs LATENT_JAX_DATA with models/stories260K.bin")
    return path


def test_llama2c_tells_a_story(stories):
    bb = backbones.load(stories)
    assert bb.config.num_params() == bb.parameter_count() == 260_032
    ids = [bb.tokenizer.bos_id, *bb.tokenizer.encode("Once upon a time")]
    (story,) = bb.generate([ids], max_new_tokens=48)
    assert story.startswith(", there was a little girl named Lily. She loved to play outside")


def test_llama2c_bad_files(stories, tmp_path):
    path = tmp_path / "m.bin"
    whole = stories.read_bytes()
    for data, message in [
        (whole[:-4], "truncated or damaged"),
        (whole[:10], "truncated"),
        (b"24ka" + whole[4:], "version"),
        (b"\xff" * 400, "not a llama2.c checkpoint"),
        (whole, "no vocabulary beside it"),
    ]:
        path.write_bytes(data)
        with pytest.raises(BackboneError, match=message):
            backbones.load(path)


def test_unknown_format(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    with pytest.raises(BackboneError, match="unknown model format"):
        backbones.load(path)
