"""The sharding rules: one frozen dataclass from logical axis to mesh axis. No model code names a mesh axis."""

import dataclasses
from collections.abc import Iterable

from jax.sharding import PartitionSpec as P

from glm_jax.errors import UsageError

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axis, or axes, shard each logical axis. Change a field, change the layout; no model code changes.

    A field is the name of a mesh axis, a tuple of names (the first is the outermost), or None for not sharded."""

    batch: Axis = ("data", "expert")  # attention runs data-parallel over `expert` too, or every group repeats it
    seq: Axis = None
    heads: Axis = "tensor"  # query and key/value heads alike: a query head must sit with the KV head it reads
    experts: Axis = "expert"
    ffn: Axis = "tensor"  # the inner width of every MLP and expert
    vocab: Axis = "tensor"

    def __call__(self, *names: str | None) -> P:
        """`rules("batch", "seq", None)` is `P(("data", "expert"), None, None)`."""
        spec = [None if name is None else getattr(self, name) for name in names]
        used = mesh_axes(spec)
        if len(set(used)) != len(used):
            raise UsageError(f"these rules put one mesh axis on two dimensions of {names}: {spec}")
        return P(*spec)


def mesh_axes(spec: Iterable[Axis]) -> tuple[str, ...]:
    """The mesh axes a spec uses, flat, in order."""
    return tuple(a for axis in spec if axis for a in ((axis,) if isinstance(axis, str) else axis))


PRESETS = {
    # Throughput: each device holds some experts whole and its share of the batch; heads over `tensor`.
    "ep": Rules(),
    # Tensor parallelism only: every matrix is cut, `expert` cuts nothing. For dense comparisons and small meshes.
    "tp": Rules(batch="data", experts=None),
}


def rules(name: "str | Rules") -> Rules:
    """A preset by name; a `Rules` passes through. Raises UsageError for an unknown name."""
    if isinstance(name, Rules):
        return name
    if name not in PRESETS:
        raise UsageError(f"--rules {name}: unknown, the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
