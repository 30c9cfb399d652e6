"""What a model needs on each device, before a byte of it is read."""

import dataclasses
import math
import os

import jax

from glm_jax.cache import cache_bytes
from glm_jax.config import Config
from glm_jax.errors import NoSpace, UsageError
from glm_jax.model import GLM, PREFILL_CHUNK, SCORES, axes_size, batch_shards, cached_heads, check_mesh, round_up
from glm_jax.sharding import Rules, abstract, describe, mesh_axes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes on the device that holds most."""

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {getattr(self, f.name) / GIB:.1f}" for f in dataclasses.fields(self))
        return f"{self.total / GIB:.1f} GiB ({parts})"


def needs(config: Config, mesh, rules: Rules, batch: int = 1, context: int = 4096) -> Needs:
    """What each device holds while generating: its weights, its share of a cache of `context` tokens for `batch` rows,
    and working memory (the routed experts' rows and the attention scores of a chunk of prefill, and the logits)."""
    model = GLM(config, mesh, rules, seed=None)
    leaves = jax.tree.leaves(model)
    weights = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    rows = round_up(batch, batch_shards(model)) // batch_shards(model)
    size = lambda axis: math.prod(mesh.shape[a] for a in mesh_axes([getattr(rules, axis)]))
    cache = cache_bytes(config, rows, context, cached_heads(config, mesh, rules)) // (size("heads") * size("slots"))
    # A chunk of prefill. The tokens of an expert group come together, and any device may have to work on all of them.
    tokens = rows * min(context, PREFILL_CHUNK)
    own = [a for a in mesh_axes([rules.experts]) if a in mesh_axes([rules.batch])]
    slots = tokens * math.prod(mesh.shape[a] for a in own) * config.num_experts_per_tok
    narrow, wide = config.hidden_size, config.moe_intermediate_size // size("expert_ffn")
    working = slots * (narrow * (2 * config.dtype.itemsize + 4) + 3 * wide * config.dtype.itemsize)
    working += 2 * 4 * min(SCORES, tokens * config.num_attention_heads * context) + rows * config.vocab_size * 8
    return Needs(weights, cache, working)


def device_bytes(device) -> int:
    """Memory of a device; of a CPU device its share of what the machine has available."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    with open("/proc/meminfo") if os.path.exists("/proc/meminfo") else open(os.devnull) as lines:
        fields = dict(line.split(":") for line in lines)
    if "MemAvailable" not in fields:  # not Linux: what is installed
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return int(fields["MemAvailable"].split()[0]) * 1024 // jax.local_device_count()


def refuse_if_no_room(model: GLM, batch: int, context: int) -> None:
    """Raises NoSpace if a cache of `context` tokens for `batch` rows is more than what its devices have left."""
    rules, heads = model.rules, cached_heads(model.config, model.mesh, model.rules)
    parts = axes_size(model.mesh, rules.batch, rules.heads, rules.slots)
    need, device = cache_bytes(model.config, batch, context, heads) // parts, model.mesh.local_devices[0]
    free = device_bytes(device) - (device.memory_stats() or {}).get("bytes_in_use", 0)
    if need > free:
        raise NoSpace(
            f"the cache for {batch} x {context} tokens needs {need / GIB:.1f} GiB on each of {model.mesh.size} devices,"
            f" {free / GIB:.1f} are free: a smaller --max-tokens, fewer rows, or a --mesh of more devices"
        )


def default_mesh(config: Config, rules: Rules, devices: list) -> str:
    """The mesh for these devices: experts spread as far as they go, more over `tensor` if that is what makes it fit."""
    for count in range(len(devices), 0, -1):  # if no mesh of all devices divides the model, as many as do
        best: dict[int, str] = {}
        for spec, mesh in _meshes(config, rules, count):
            total = needs(config, mesh, rules).total
            if total <= device_bytes(devices[0]):
                return spec
            best.setdefault(total, spec)
        if best:
            return best[min(best)]
    return "data=1"


def _meshes(config: Config, rules: Rules, devices: int):
    """Every expert x tensor mesh of this many devices that divides the model, most expert-parallel first."""
    for tensor in (n for n in range(1, devices + 1) if devices % n == 0):
        mesh = abstract(f"expert={devices // tensor},tensor={tensor}")
        try:
            check_mesh(config, mesh, rules)
        except UsageError:
            continue
        yield describe(mesh), mesh


def refuse_if_too_large(config: Config, mesh, rules: Rules, name: str) -> None:
    """Raises NoSpace, with the parts and the changes that would fit, if the devices of the mesh are too small."""
    have, need = device_bytes(mesh.local_devices[0]), needs(config, mesh, rules)
    if need.total <= have:
        return
    fits = []
    for devices in (2**n for n in range(mesh.size.bit_length(), 13)):
        found = [(s, needs(config, m, rules)) for s, m in _meshes(config, rules, devices)]
        spec, smallest = min(found, key=lambda f: f[1].total, default=("", None))
        if smallest and smallest.total <= have:
            fits.append(f"--mesh {spec} ({smallest.total / GIB:.1f} GiB, {devices} devices)")
            break
    if config.dtype.itemsize == 4:
        half = needs(dataclasses.replace(config, dtype=jax.numpy.dtype("bfloat16")), mesh, rules)
        if half.total <= have:
            fits.append(f"--dtype bfloat16 ({half.total / GIB:.1f} GiB)")
    low, high = 0, config.num_hidden_layers  # low layers fit, high do not
    while high - low > 1:
        middle = (low + high) // 2
        fit = needs(first_layers(config, middle), mesh, rules).total <= have
        low, high = (middle, high) if fit else (low, middle)
    if low:
        fits.append(f"--layers {low} (the first {low} of {config.num_hidden_layers})")
    raise NoSpace(
        f"{name} needs {need} on each of {mesh.size} devices (--mesh {describe(mesh)}), these have {have / GIB:.1f} GiB"
        + ("; what would fit: " + ", or ".join(fits) if fits else "; no mesh, dtype or --layers of it fits")
    )


def first_layers(config: Config, layers: int) -> Config:
    """The config of the model cut off after `layers` layers, without its MTP layer."""
    if not 1 <= layers <= config.num_hidden_layers:
        raise UsageError(f"--layers {layers}: this model has 1 to {config.num_hidden_layers}")
    return dataclasses.replace(config, num_hidden_layers=layers, num_nextn_predict_layers=0)
