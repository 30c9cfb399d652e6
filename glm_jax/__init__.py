"""GLM-4.5, 4.6 and 4.7 in JAX. The names below are the public ones; `import glm_jax` itself imports nothing else, so a
command's --help, or a script that wants `glm_jax.config` alone, does not wait for jax."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {  # public name -> the submodule it lives in, imported when the name is first used (PEP 562)
    "Config": "config",
    "GLM": "model",
    "Response": "generation",
    "Rules": "sharding",
    "generate": "generation",
    "generate_ids": "generation",
    "load": "loading",
    "loss": "losses",
    "parse_response": "parsing",
    "plan": "planner",
    "save": "loading",
    "stream_generate": "generation",
}

__all__ = [
    "Config",
    "GLM",
    "Response",
    "Rules",
    "generate",
    "generate_ids",
    "load",
    "loss",
    "parse_response",
    "plan",
    "save",
    "stream_generate",
]

if TYPE_CHECKING:
    from glm_jax import config as config
    from glm_jax import convert as convert
    from glm_jax import generation as generation
    from glm_jax import inspect as inspect
    from glm_jax import losses as losses
    from glm_jax import model as model
    from glm_jax import sharding as sharding
    from glm_jax.config import Config
    from glm_jax.generation import Response, generate, generate_ids, stream_generate
    from glm_jax.loading import load, save
    from glm_jax.losses import loss
    from glm_jax.model import GLM
    from glm_jax.parsing import parse_response
    from glm_jax.planner import plan
    from glm_jax.sharding import Rules


def __getattr__(name: str):
    if home := _HOMES.get(name):
        globals()[name] = value = getattr(import_module(f"{__name__}.{home}"), name)
        return value
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":  # the submodule is there and lacks a library: say that
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
