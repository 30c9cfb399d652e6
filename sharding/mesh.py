"""The only place a mesh is made. Its axes are always `data`, `expert`, `tensor`, Explicit, and may have size 1."""

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from glm_jax.errors import UsageError

AXES = ("data", "expert", "tensor")


def mesh(spec: "str | Mesh | AbstractMesh", devices=None) -> "Mesh | AbstractMesh":
    """`mesh("expert=4,tensor=2")`: axes not named have size 1. A ready mesh is taken with its axes made Explicit.

    `devices` defaults to the first of `jax.devices()`. Raises UsageError if the text does not parse, names an unknown
    axis, or wants more devices than there are."""
    if not isinstance(spec, str):
        if spec.axis_names != AXES:
            raise UsageError(f"a mesh needs the axes {AXES} in this order, this one has {spec.axis_names}")
        explicit = (AxisType.Explicit,) * len(AXES)
        if isinstance(spec, AbstractMesh):
            return AbstractMesh(spec.axis_sizes, AXES, axis_types=explicit)
        return Mesh(spec.devices, AXES, axis_types=explicit)
    sizes = mesh_sizes(spec)
    wanted, devices = math.prod(sizes.values()), jax.devices() if devices is None else devices
    if wanted > len(devices):
        raise UsageError(f"--mesh {spec} needs {wanted} devices, there are {len(devices)} ({devices[0].platform})")
    shape = tuple(sizes.values())
    return Mesh(np.asarray(devices[:wanted]).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def mesh_sizes(spec: str) -> dict[str, int]:
    """The size of every axis in a text as `mesh` takes it; needs no devices."""
    sizes, named = dict.fromkeys(AXES, 1), set()
    for part in filter(None, spec.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise UsageError(
                f"--mesh {spec}: no axis {name!r}, the axes are {', '.join(AXES)} (as in expert=4,tensor=2)"
            )
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--mesh {spec}: {name}={size!r} is not a size, write for instance {name}=2")
        if name in named:
            raise UsageError(f"--mesh {spec}: {name} is named twice")
        named.add(name)
        sizes[name] = int(size)
    return sizes


def auto(mesh: Mesh) -> Mesh:
    """The same devices with axes that XLA shards by itself: for arrays that leave the model for the user's own code."""
    return Mesh(mesh.devices, mesh.axis_names)


def describe(mesh: "Mesh | AbstractMesh") -> str:
    """`expert=4,tensor=2`: the axes above size 1, as `--mesh` takes them; `data=1` for a single device."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "data=1"
