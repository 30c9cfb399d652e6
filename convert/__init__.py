"""Checkpoints: Hugging Face safetensors in and out, the Hub, and conversion to folders that Orbax restores."""

from glm_jax.convert.checking import verify
from glm_jax.convert.conversion import convert, gc
from glm_jax.convert.exporting import export
from glm_jax.convert.planning import plan

__all__ = ["convert", "export", "gc", "plan", "verify"]
