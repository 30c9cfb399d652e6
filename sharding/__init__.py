"""Where arrays live: a mesh with named axes, and rules from what a dimension means to the mesh axes that shard it."""

from glm_jax.sharding.mesh import (
    AXES,
    DEVICES,
    abstract,
    across,
    auto,
    default_sizes,
    describe,
    device_kind,
    mesh,
    mesh_sizes,
)
from glm_jax.sharding.rules import PRESETS, Rules, mesh_axes, rules

__all__ = [
    "AXES",
    "DEVICES",
    "PRESETS",
    "Rules",
    "abstract",
    "across",
    "auto",
    "default_sizes",
    "describe",
    "device_kind",
    "mesh",
    "mesh_axes",
    "mesh_sizes",
    "rules",
]
