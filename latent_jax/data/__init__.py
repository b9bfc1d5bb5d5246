"""Data sources and resumable input pipelines."""

from __future__ import annotations

from latent_jax.data.long_documents import LongQuestion, load_long_questions
from latent_jax.data.lookup import lookup_examples, lookup_texts
from latent_jax.data.mixture import Mixture, mix
from latent_jax.data.packing import pack
from latent_jax.data.pipeline import BatchIterator, collate, pipeline
from latent_jax.data.squad import QAExample, load_squad
from latent_jax.data.text import load_segments, load_texts, segments
from latent_jax.data.zeros import Spacings, load_spacings

__all__ = [
    "BatchIterator",
    "LongQuestion",
    "Mixture",
    "QAExample",
    "Spacings",
    "collate",
    "load_long_questions",
    "load_segments",
    "load_spacings",
    "load_squad",
    "load_texts",
    "lookup_examples",
    "lookup_texts",
    "mix",
    "pack",
    "pipeline",
    "segments",
]
