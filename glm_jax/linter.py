"""What a mesh and its rules cost that is not written on them: what does not divide, what is replicated, what moves."""

import dataclasses
import math

import jax

from glm_jax.cache import cache_bytes
from glm_jax.config import Config
from glm_jax.hlo import sent_bytes
from glm_jax.model import DIMENSIONS, GLM, axes_size, cached_heads, kv_axes, round_up, rules_for, undivided, weight_path
from glm_jax.sharding import Rules, describe, mesh_axes
from glm_jax.targets import GIB
from glm_jax.traffic import expected


@dataclasses.dataclass(frozen=True)
class Finding:
    """`kind`: "error" (the model cannot be made so), "replicated", "padded", or "moved". `bytes` on each device, those
    that would not be there otherwise; of what is moved, what a device sends in one step."""

    kind: str
    text: str
    bytes: int = 0

    def __str__(self) -> str:
        size = f" [{self.bytes / GIB:.2f} GiB a device]" if self.bytes >= GIB / 200 else ""
        size = size or (f" [{self.bytes / 2**20:.2f} MiB a device]" if self.bytes else "")
        return f"{self.kind}: {self.text}{size}"


def lint(config: Config, mesh, rules: Rules, batch: int = 1, context: int = 4096, tokens: int = 1) -> list[Finding]:
    """Errors first; if there are none, every replicated weight and activation and every collective of a step of
    `tokens` for each row, with its bytes. Needs no devices."""
    if errors := _errors(config, mesh, rules):
        return errors
    return [*_replicated(config, mesh, rules, batch, context), *_moved(config, mesh, rules, batch, context, tokens)]


def axes_table(config: Config, mesh, rules: Rules) -> list[tuple[str, str, int, str, int]]:
    """(logical axis, mesh axes, their size, what they divide, bytes a device of the weights that they cut)."""
    leaves = jax.tree_util.tree_leaves_with_path(GLM(config, mesh, rules, seed=None))
    rows = []
    for field in dataclasses.fields(rules):
        axes = mesh_axes([getattr(rules, field.name)])
        size = axes_size(mesh, *axes)
        dims = [f"{name} {getattr(config, name):,}" for name in DIMENSIONS.get(field.name, ())]
        dims = [f"{d} / {size} = {getattr(config, d.split()[0]) // size:,}" if size > 1 else d for d in dims]
        what = "; ".join(dims) or {"batch": "rows", "seq": "new tokens", "slots": "the cache's tokens"}.get(
            field.name, ""
        )
        held = 0
        for path, leaf in leaves:
            if field.name in _cut_by(weight_path(path)):
                held += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rows.append((field.name, "*".join(axes) or "-", size, what, held))
    return rows


def _kind(name: str) -> str:
    """What a weight belongs to, for a line that speaks of many."""
    first, last = name.split(".")[0], name.rsplit(".", 1)[-1]
    if last.endswith("norm") or last == "bias":
        return "norms and the router's biases"
    where = {"dense": "the dense layers'", "moe": "the expert layers'", "mtp": "the MTP layer's"}.get(first)
    if not where:
        return "the embedding" if last == "embed" else "the head"
    if ".attn." in name:
        return f"{where} attention"
    return f"{where} router" if last == "router" else f"{where} projection" if last == "eh_proj" else f"{where} MLPs"


def _cut_by(name: str) -> tuple[str, ...]:
    last = name.rsplit(".", 1)[-1]
    if last in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias"):
        return ("heads", "width")
    if last in ("gate_up", "down"):
        routed = "shared" not in name and "dense" not in name
        return ("experts", "expert_ffn", "width") if routed else ("ffn", "width")
    return {"embed": ("vocab", "width"), "head": ("vocab", "width"), "router": ("width",)}.get(last, ())


def _errors(config: Config, mesh, rules: Rules) -> list[Finding]:
    found = []
    for axis, size, name in undivided(config, mesh, rules):
        value = getattr(config, name)
        fits = [n for n in range(1, 2 * size + 1) if value % n == 0]
        below, above = max(n for n in fits if n < size), [n for n in fits if n > size][:1]
        near = " or ".join(str(n) for n in [below, *above])
        axes = "*".join(mesh_axes([getattr(rules, axis)]))
        found.append(Finding("error", f"{name} {value:,} does not divide over {axes}={size}: make that {near}"))
    return found


def _replicated(config: Config, mesh, rules: Rules, batch: int, context: int) -> list[Finding]:
    found, groups = [], {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(GLM(config, mesh, rules, seed=None)):
        used = mesh_axes(leaf.sharding.spec)
        same = tuple(a for a in mesh.shape if a not in used and mesh.shape[a] > 1)
        held = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if same:
            groups.setdefault((_kind(weight_path(path)), same), []).append(held)
    for (group, same), sizes in sorted(groups.items(), key=lambda item: -sum(item[1])):
        n = math.prod(mesh.shape[a] for a in same)
        text = f"{group}: the same weights on all {n} devices along {' and '.join(same)}"
        found.append(Finding("replicated", text, sum(sizes) * (n - 1) // n))
    K, devices, heads = config.num_key_value_heads, axes_size(mesh, rules.heads), cached_heads(config, mesh, rules)
    rows = round_up(batch, axes_size(mesh, rules.batch))
    slots = round_up(context, axes_size(mesh, rules.slots))
    on_device = cache_bytes(config, rows, slots, heads) // axes_size(mesh, rules.batch, rules.heads, rules.slots)
    if heads > K:
        cut = axes_size(mesh, *kv_axes(config, mesh, rules))
        text = (
            f"{K} KV heads over {devices} devices: groups of {devices // math.gcd(K, devices)} devices share KV heads, "
            f"the cache holds {heads} heads, each {heads // K} times, and the k and v weights are cut {cut} ways"
        )
        found.append(Finding("replicated", text, on_device * (heads - K) // heads))
    idle = [a for a in mesh.shape if mesh.shape[a] > 1 and a not in mesh_axes([rules.batch, rules.heads, rules.slots])]
    if idle:
        n = axes_size(mesh, *idle)
        text = f"the cache, and attention's work, are the same on all {n} devices along {' and '.join(idle)}"
        found.append(Finding("replicated", text, on_device * (n - 1) // n))
    if rows != batch:
        axes = "*".join(mesh_axes([rules.batch]))
        text = f"{batch} rows over {axes}={axes_size(mesh, rules.batch)}: {rows - batch} of {rows} rows are padding"
        text += " (--rules latency uses every device for one row)" if batch == 1 else ""
        found.append(Finding("padded", text, 0))
    for axis, name in (("expert_ffn", "moe_intermediate_size"),):
        local = getattr(config, name) // axes_size(mesh, getattr(rules, axis))
        if config.moe_layers and local % 128:
            text = f"{name} {getattr(config, name):,} is {local} on a device, no multiple of a TPU's 128 lanes"
            found.append(Finding("padded", text, 0))
    return found


def _moved(config: Config, mesh, rules: Rules, batch: int, context: int, tokens: int) -> list[Finding]:
    rows = round_up(batch, axes_size(mesh, rules.batch))
    slots = round_up(context, axes_size(mesh, rules.slots))
    found = []
    if tokens > 1 and rules.seq and rules_for(mesh, rules, tokens).seq is None:
        text = f"{tokens} tokens do not divide over {rules.seq}={axes_size(mesh, rules.seq)}: every device has them all"
        found.append(Finding("replicated", text))
    for c in expected(config, mesh, rules, rows, tokens, slots, tokens > 1):
        text = f"{c.count} x {c.kind} over {'*'.join(c.axes)}: {c.source}"
        found.append(Finding("moved", text, int((c.count or 0) * sent_bytes(c, mesh))))
    return found


def heading(mesh, rules: str) -> str:
    """One line that says which layout the findings are of."""
    return f"--mesh {describe(mesh)} --rules {rules}"
