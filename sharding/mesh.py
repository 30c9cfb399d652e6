"""The only place a mesh is made. Its axes are always the same four, Explicit, and may have size 1."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from glm_jax.errors import UsageError

# From the outermost, which talks least and may cross slices and hosts, to the innermost, which talks in every matrix.
AXES = ("data", "expert", "context", "tensor")
DEVICES = 2**16  # of a mesh, at the most: more than any machine has
EXPERTS = 32  # what every published GLM's number of experts divides by: 160 and 128


def mesh(
    spec: "str | Mesh | AbstractMesh | None" = None, devices: Sequence[Any] | None = None
) -> "Mesh | AbstractMesh":
    """`mesh("expert=4,tensor=2")`: axes not named have size 1. Without a text all devices, as `default_sizes` spreads
    them. A ready mesh is taken with its axes made Explicit, and those it lacks added with size 1.

    `devices` defaults to the first of `jax.devices()`. They are put in the order in which inner axes are close
    together: on a TPU slice along its torus, of several slices or hosts the outer axes between and the inner within.
    Raises UsageError if the text does not parse, names an unknown axis, or wants more devices than there are."""
    if spec is not None and not isinstance(spec, str):
        return _adopt(spec)
    devices = jax.devices() if devices is None else devices
    sizes = default_sizes(len(devices)) if spec is None else mesh_sizes(spec)
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        raise UsageError(f"--mesh {spec} needs {wanted} devices, there are {len(devices)} ({devices[0].platform})")
    return Mesh(_ordered(devices, sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def abstract(spec: str, kind: str | None = None) -> AbstractMesh:
    """`abstract("expert=64")`: a mesh of any size and no devices, to plan and to type on. `kind` is what such a device
    calls itself (`device_kind`), where that makes a difference."""
    device = None
    if kind is not None:
        fields: dict[str, Any] = {"device_kind": kind, "num_cores": None}
        if "platform" in inspect.signature(AbstractDevice).parameters:  # jax 0.11 and newer
            fields["platform"] = "tpu" if kind.startswith("TPU") else "gpu"
        device = AbstractDevice(**fields)
    explicit = (AxisType.Explicit,) * len(AXES)
    return AbstractMesh(tuple(mesh_sizes(spec).values()), AXES, axis_types=explicit, abstract_device=device)


def device_kind(mesh: "Mesh | AbstractMesh") -> str:
    """What the devices of a mesh call themselves; nothing where it has none and says of none."""
    if isinstance(mesh, AbstractMesh):
        return getattr(mesh.abstract_device, "device_kind", "")
    return mesh.devices.flat[0].device_kind


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
    if (count := math.prod(sizes.values())) > DEVICES:
        raise UsageError(f"--mesh {spec}: {count:,} devices, {DEVICES:,} at the most")
    return sizes


def default_sizes(devices: int) -> dict[str, int]:
    """A mesh for so many devices where no model is known: as many over `expert` as divide every published GLM's
    experts, the rest over `data`. `planner.default_mesh` knows the model and its memory."""
    expert = math.gcd(devices, EXPERTS)
    return dict.fromkeys(AXES, 1) | {"data": devices // expert, "expert": expert}


def auto(mesh: Mesh) -> Mesh:
    """The same devices with axes that XLA shards by itself: for arrays that leave the model for the user's own code."""
    return Mesh(mesh.devices, mesh.axis_names)


def describe(mesh: "Mesh | AbstractMesh") -> str:
    """`expert=4,tensor=2`: the axes above size 1, as `--mesh` takes them; `data=1` for a single device."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "data=1"


def _adopt(mesh: "Mesh | AbstractMesh") -> "Mesh | AbstractMesh":
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise UsageError(f"a mesh's axes are {', '.join(AXES)}, or some of them; this one has {unknown[0]!r}")
    explicit, shape = (AxisType.Explicit,) * len(AXES), tuple(mesh.shape.get(name, 1) for name in AXES)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, AXES, axis_types=explicit, abstract_device=mesh.abstract_device)
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    return Mesh(mesh.devices.transpose(order).reshape(shape), AXES, axis_types=explicit)


def _ordered(devices: Sequence[Any], sizes: dict[str, int]) -> np.ndarray:
    """The devices as an array of the mesh's shape."""
    shape, wanted = tuple(sizes.values()), math.prod(sizes.values())
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if devices[0].platform == "tpu" and wanted == len(devices):
        if len(slices) == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        between = across(sizes, len(slices))
        within = [n // m for n, m in zip(shape, between, strict=True)]
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    # Hosts one after the other: the last axes, which vary fastest, stay inside one while they are no larger than it.
    place = lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id)
    return np.asarray(sorted(devices, key=place)[:wanted]).reshape(shape)


def across(sizes: dict[str, int], slices: int) -> tuple[int, ...]:
    """Into how many parts each axis is cut between slices: the outermost as far as it goes, then the next."""
    parts, left = [], slices
    for size in sizes.values():
        parts.append(math.gcd(size, left))
        left //= parts[-1]
    if left > 1:
        text = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise UsageError(
            f"--mesh {text} cannot be laid over {slices} slices: make one of its axes a multiple of {left}"
        )
    return tuple(parts)
