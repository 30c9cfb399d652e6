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

    # Activations and cache.
    batch: Axis = ("data", "expert")  # attention runs data-parallel over `expert` too, or every group repeats it
    seq: Axis = None  # the tokens of a sequence, where there are enough of them to cut
    slots: Axis = None  # the cache's slots for tokens
    # Weights, and the activations that they make.
    heads: Axis = "tensor"  # query and key/value heads alike: a query head must sit with the KV head it reads
    experts: Axis = "expert"
    expert_ffn: Axis = "tensor"  # the inner width of a routed expert
    ffn: Axis = "tensor"  # the inner width of a dense layer and of the shared expert
    vocab: Axis = "tensor"
    # The model's width in weights only, which are brought together again layer by layer where they are used. Of these
    # axes a weight is cut over those that cut nothing else of it.
    width: Axis = None

    def __post_init__(self):
        for name, axis in vars(self).items():
            if isinstance(axis, list):  # as JSON and YAML have it
                object.__setattr__(self, name, tuple(axis))

    def __call__(self, *names: str | None) -> P:
        """`rules("batch", "seq", None)` is `P(("data", "expert"), None, None)`."""
        spec: list[Axis] = [None if name in (None, "width") else getattr(self, str(name)) for name in names]
        used = mesh_axes(spec)
        if len(set(used)) != len(used):
            raise UsageError(f"these rules put one mesh axis on two dimensions of {names}: {spec}")
        if "width" in names:
            spec[names.index("width")] = tuple(a for a in mesh_axes([self.width]) if a not in used) or None
        return P(*spec)


def mesh_axes(spec: Iterable[Axis]) -> tuple[str, ...]:
    """The mesh axes a spec uses, flat, in order."""
    return tuple(a for axis in spec if axis for a in ((axis,) if isinstance(axis, str) else axis))


PRESETS = {
    # Throughput. Each device holds some experts whole and its share of the batch; heads over `tensor`. Weights other
    # than the experts' are the same on every `expert`: the price of attending to different rows there.
    "ep": Rules(),
    # Latency, a batch of 1. There are no rows to spread over `expert`, so everything that a token passes is cut over
    # all devices: no weight is replicated, and each device reads its share of every matrix.
    "latency": Rules(batch="data", heads=("expert", "tensor"), ffn=("expert", "tensor"), vocab=("expert", "tensor")),
    # Tensor parallelism only: every matrix is cut over `tensor`, `expert` cuts nothing. For comparisons, and for a few
    # devices close together.
    "tp": Rules(batch="data", experts=None),
    # Training. As "ep", and weights, gradients and optimizer state are cut over `data` as well, and over `expert` where
    # that cuts nothing else: nothing is replicated, and a layer's weights come together while it runs.
    "fsdp": Rules(width=("data", "expert")),
    # Long prompts. The tokens of a sequence and the cache's slots over `context`, and experts over it too, or every
    # part of a sequence would hold them all.
    "long": Rules(seq="context", slots="context", experts=("expert", "context")),
}


def rules(name: "str | Rules") -> Rules:
    """A preset by name; a `Rules` passes through. Raises UsageError for an unknown name."""
    if isinstance(name, Rules):
        return name
    if name not in PRESETS:
        raise UsageError(f"--rules {name}: unknown, the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
