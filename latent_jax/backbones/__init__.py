"""Frozen language models as parameter trees: readers, tokenizers, one decoder, generation."""

from latent_jax.backbones.architectures import ARCHITECTURES, skeleton
from latent_jax.backbones.backbone import Backbone
from latent_jax.backbones.config import DecoderConfig, RopeScaling
from latent_jax.backbones.decoder import KV, Decoder, DecoderOutput
from latent_jax.backbones.readers.hf import save_hf
from latent_jax.backbones.registry import Outline, load, locate, outline
from latent_jax.backbones.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "ARCHITECTURES",
    "KV",
    "Backbone",
    "ByteTokenizer",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "Outline",
    "RopeScaling",
    "Tokenizer",
    "load",
    "locate",
    "outline",
    "save_hf",
    "skeleton",
]
