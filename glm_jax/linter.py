"""What a mesh and its rules cost that is not written on them: what does not divide, what is replicated, what moves."""

import dataclasses
import math

import jax
import numpy as np

from glm_jax.config import Config
from glm_jax.hlo import crossing_bytes, groups_of, places, sent_bytes
from glm_jax.model import (
    DIMENSIONS,
    GLM,
    PREFILL_CHUNK,
    axes_size,
    cached_heads,
    kv_axes,
    padding_costs,
    round_up,
    rules_for,
    undivided,
    weight_path,
)
from glm_jax.planner import cache_on_device, held_bytes, meshes
from glm_jax.sharding import Rules, describe, mesh_axes
from glm_jax.targets import GIB, chip
from glm_jax.traffic import expected

LANES = 128  # of a TPU: what its tiles are wide


@dataclasses.dataclass(frozen=True)
class Finding:
    """`kind`: "error" (the model cannot be made so), "replicated" (devices hold or do the same), "padded" (some of what
    they hold or do is for nothing), "hosts" (a group of devices talks between hosts or TPU slices), or "moved" (a
    collective)."""

    kind: str
    text: str
    bytes: int = 0  # on each device, those that would not be there otherwise; of what is moved, sent in one step
    total_bytes: int = 0  # and on all devices
    mend: str = ""  # the change that mends it, "" where it is as it should be

    @property
    def severity(self) -> str:
        """ "error", "warning", or "note" for what is no fault."""
        return {"error": "error", "moved": "note"}.get(self.kind, "warning")

    def __str__(self) -> str:
        size = f" [{_size(self.bytes)} a device, {_size(self.total_bytes)} in all]" if self.bytes else ""
        return f"{self.kind}: {self.text}{size}" + (f"; {self.mend}" if self.mend else "")


def lint(
    config: Config,
    mesh,
    rules: Rules,
    batch: int = 1,
    context: int = 4096,
    tokens: int = 1,
    device: str | None = None,
    fp8: bool = False,
) -> list[Finding]:
    """Errors first, each with the nearest meshes that divide; if there are none, every replicated weight and
    activation, padding, groups over several hosts of a `device` as "h100", and every collective of a step of `tokens`
    for each row, with its bytes by `traffic.expected`. Needs no devices."""
    if errors := _errors(config, mesh, rules):
        return errors
    return [
        *_replicated(config, mesh, rules, batch, context, fp8),
        *_padded(config, mesh, rules, batch, context, device),
        *_moved(config, mesh, rules, batch, context, tokens, device),
    ]


def _size(n: float) -> str:
    return f"{n / GIB:,.2f} GiB" if n >= GIB / 100 else f"{n / 2**20:,.2f} MiB"


def axes_table(config: Config, mesh, rules: Rules, fp8: bool = False) -> list[tuple[str, str, int, str, int]]:
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
                held += held_bytes(weight_path(path), leaf, fp8)
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
    for text in undivided(config, mesh, rules):
        found.append(Finding("error", text))
    if found:
        near = nearest_meshes(config, mesh, rules)
        mend = "the nearest meshes that divide: " + ", ".join(f"--mesh {describe(m)} ({m.size} devices)" for m in near)
        found[-1] = dataclasses.replace(found[-1], mend=mend)
    return found


def nearest_meshes(config: Config, mesh, rules: Rules) -> list:
    """Two meshes of as many devices that divide the model, or where none does one of fewer and one of more: those whose
    axes differ from this one's by the least factors."""
    far = lambda m: sum(abs(math.log(m.shape[a] / mesh.shape[a])) for a in m.shape)
    best = lambda n, count: sorted(meshes(config, rules, n), key=far)[:count]
    if same := best(mesh.size, 2):
        return same
    fewer = (best(n, 1) for n in range(mesh.size - 1, 0, -1))
    more = (best(n, 1) for n in range(mesh.size + 1, 2 * mesh.size + 1))
    return next(filter(None, fewer), []) + next(filter(None, more), [])


def _replicated(config: Config, mesh, rules: Rules, batch: int, context: int, fp8: bool) -> list[Finding]:
    found, groups = [], {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(GLM(config, mesh, rules, seed=None)):
        used = mesh_axes(leaf.sharding.spec)
        same = tuple(a for a in mesh.shape if a not in used and mesh.shape[a] > 1)
        if same:
            name = weight_path(path)
            groups.setdefault((_kind(name), same), []).append(held_bytes(name, leaf, fp8))

    def add(text: str, share: int, mend: str = ""):
        found.append(Finding("replicated", text, share, share * mesh.size, mend))

    for (group, same), sizes in sorted(groups.items(), key=lambda item: -sum(item[1])):
        n = math.prod(mesh.shape[a] for a in same)
        # Norms and routers are never cut: they are small, and every token passes them whole.
        whole = group.endswith(("router", "biases", "projection"))
        mend = "more over tensor, or --rules latency, cuts these" if "expert" in same and not whole else ""
        add(f"{group}: the same weights on all {n} devices along {' and '.join(same)}", sum(sizes) * (n - 1) // n, mend)
    K, devices, heads = config.num_key_value_heads, axes_size(mesh, rules.heads), cached_heads(config, mesh, rules)
    rows = round_up(batch, axes_size(mesh, rules.batch))
    slots = round_up(context, axes_size(mesh, rules.slots))
    on_device = cache_on_device(config, mesh, rules, rows, slots)
    if heads > K:
        cut = axes_size(mesh, *kv_axes(config, mesh, rules))
        held = f"cut {cut} ways" if cut > 1 else "whole on each device"
        text = (
            f"{K} KV heads over {devices} devices: the cache holds {heads} heads, each {heads // K} times, and the k "
        )
        text += f"and v weights are {held}"
        add(text, on_device * (heads - K) // heads, f"{math.gcd(K, devices)} devices over heads repeat none")
    idle = [a for a in mesh.shape if mesh.shape[a] > 1 and a not in mesh_axes([rules.batch, rules.heads, rules.slots])]
    if idle:
        n = axes_size(mesh, *idle)
        text = f"the cache, and attention's work, are the same on all {n} devices along {' and '.join(idle)}"
        add(text, on_device * (n - 1) // n, f"rules that cut batch, heads or slots over {' and '.join(idle)}")
    chunk = min(context, PREFILL_CHUNK)
    cut = rules_for(mesh, rules, chunk)
    wide, B, T = config.dtype.itemsize, rows // axes_size(mesh, rules.batch), chunk // axes_size(mesh, cut.seq)
    for what, held, by in (
        (f"the states between layers, of a prompt's {chunk:,} tokens", B * T * config.hidden_size * wide, cut.seq),
        ("the next token's logits, and which ids a row has seen", B * config.vocab_size * (wide + 1), None),
    ):
        same = [a for a in mesh.shape if mesh.shape[a] > 1 and a not in mesh_axes([rules.batch, by])]
        if n := axes_size(mesh, *same) - 1:
            add(f"{what}: the same on all {n + 1} devices along {' and '.join(same)}", held * n // (n + 1))
    if rules.seq and cut.seq is None:
        size = axes_size(mesh, rules.seq)
        mend = f"a --context of a multiple of {size}" if chunk < PREFILL_CHUNK else ""
        add(f"a prompt's part of {chunk} tokens is no multiple of {rules.seq}={size}: every device has it all", 0, mend)
    return found


def _padded(config: Config, mesh, rules: Rules, batch: int, context: int, device) -> list[Finding]:
    found = []
    rows, slots = round_up(batch, axes_size(mesh, rules.batch)), round_up(context, axes_size(mesh, rules.slots))
    if rows != batch:
        axes = "*".join(mesh_axes([rules.batch]))
        text = f"{batch} row{'s'[: batch > 1]} over {axes}={axes_size(mesh, rules.batch)}: "
        text += f"{rows - batch} of {rows} rows are padding"
        mend = padding_costs(batch, rows, mesh_axes([rules.batch]))
        spare = cache_on_device(config, mesh, rules, rows, slots) * (rows - batch)
        found.append(Finding("padded", text, spare // rows, spare * mesh.size // rows, mend))
    if slots != context:
        text = f"{context:,} tokens over {rules.slots}={axes_size(mesh, rules.slots)}: {slots:,} slots"
        found.append(Finding("padded", text))
    if device and chip(device).platform != "tpu":
        return found
    # Gate and up stand side by side as 2 F columns; `down` has F of them as its last dimension.
    for axis, name in (("expert_ffn", "moe_intermediate_size"), ("ffn", "intermediate_size")):
        local = getattr(config, name) // axes_size(mesh, getattr(rules, axis))
        used = config.moe_layers if axis == "expert_ffn" else config.dense_layers
        if used and local % LANES:
            text = f"{name} {getattr(config, name):,} is {local:,} on a device, no multiple of a TPU's {LANES} lanes"
            found.append(Finding("padded", text))
    return found


def _moved(config: Config, mesh, rules: Rules, batch: int, context: int, tokens: int, device) -> list[Finding]:
    rows = round_up(batch, axes_size(mesh, rules.batch))
    slots = round_up(context, axes_size(mesh, rules.slots))
    crossing: dict[tuple[str, ...], int] = {}
    found, on = [], chip(device) if device else None
    place = places(on, mesh) if on else np.zeros(1)
    for c in expected(config, mesh, rules, rows, tokens, slots, tokens > 1):
        text = f"{c.count} x {c.kind} over {'*'.join(c.axes)}: {c.source}"
        size = int((c.count or 0) * sent_bytes(c, mesh))
        if on:
            crossing[c.axes] = crossing.get(c.axes, 0) + int((c.count or 0) * crossing_bytes(c, mesh, place))
        found.append(Finding("moved", text, size, size * mesh.size))
    hosts = []
    for axes, size in crossing.items() if on else ():
        assert on is not None
        if (n := groups_of(mesh, axes, place)[1]) > 1:
            what, each = ("host", on.host) if on.platform == "cuda" else ("slice", mesh.size // on.slices)
            text = f"groups over {'*'.join(axes)}={axes_size(mesh, *axes)} are on {n} {what}s of {each}"
            mend = f"inside a {what} are groups of up to {each} of the innermost axes"
            hosts.append(Finding("hosts", f"{text}: a step sends over the network", size, size * mesh.size, mend))
    return hosts + found
