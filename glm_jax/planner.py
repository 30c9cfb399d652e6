"""What a model needs on each device, before a byte of it is read."""

import dataclasses
import math
import os
import time
from typing import Any

import jax
from jax.sharding import AbstractMesh

from glm_jax import dispatch
from glm_jax.cache import cache_bytes
from glm_jax.config import Config
from glm_jax.errors import NoSpace, UsageError
from glm_jax.hlo import report, sent_bytes
from glm_jax.kernels import rows_at_once
from glm_jax.model import (
    GLM,
    PREFILL_CHUNK,
    attention_blocks,
    axes_size,
    cached_heads,
    check_mesh,
    round_up,
    rules_for,
    weight_path,
)
from glm_jax.sharding import Rules, abstract, describe, device_kind, mesh_axes
from glm_jax.sharding import mesh as make_mesh
from glm_jax.sharding import rules as make_rules
from glm_jax.targets import GIB, GPUS, Chip, chip, platform, topology
from glm_jax.traffic import expected

# Of a GPU's memory what CUDA, NCCL's buffers and fragments leave, as XLA_PYTHON_CLIENT_MEM_FRACTION=.95 sets it; a
# TPU's is given net of what its runtime keeps.
USABLE = 0.95
FP8 = ("q", "k", "v", "o", "gate_up", "down")  # the matrices that the published FP8 checkpoints store in one byte
ON_CHIP = 2**26  # bytes of a slice up to which a TPU keeps it in VMEM
ADAMW = 12  # bytes a weight: its float32 copy and two float32 moments


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


def needs(
    config: Config, mesh, rules: Rules, batch: int = 1, context: int = 4096, fp8: bool = False, tpu=None
) -> Needs:
    """What each device holds while generating: its weights, its share of a cache of `context` tokens for `batch` rows,
    and working memory."""
    rows = round_up(batch, axes_size(mesh, rules.batch))
    slots = round_up(context, axes_size(mesh, rules.slots))
    heads = cached_heads(config, mesh, rules)
    cache = cache_bytes(config, rows, slots, heads) // axes_size(mesh, rules.batch, rules.heads, rules.slots)
    work = lambda tokens: sum(working_bytes(config, mesh, rules, rows, tokens, slots, tpu).values())
    working = max(work(min(context, PREFILL_CHUNK)), work(1))
    return Needs(sum(weight_bytes(config, mesh, rules, fp8).values()), cache, working)


def weight_bytes(config: Config, mesh, rules: Rules, fp8: bool = False) -> dict[str, int]:
    """Bytes of the weights on one device, by kind. With `fp8` those that the published FP8 checkpoints quantise take a
    byte each, and two for the scale of each row."""
    found: dict[str, int] = dict.fromkeys(
        ("experts", "attention", "dense and shared MLPs", "embedding and head", "the rest"), 0
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(GLM(config, mesh, rules, seed=None)):
        name, shape = weight_path(path), leaf.sharding.shard_shape(leaf.shape)
        last = name.rsplit(".", 1)[-1]
        routed = leaf.ndim >= 4 and last in ("gate_up", "down") and "shared" not in name and "dense" not in name
        kind = "embedding and head" if last in ("embed", "head") else "the rest"
        kind = "attention" if ".attn." in name else kind
        kind = "experts" if routed else "dense and shared MLPs" if last in ("gate_up", "down") else kind
        size = math.prod(shape)
        if fp8 and last in FP8:
            inputs = math.prod(shape[-2:]) if last == "o" else shape[-1]
            found[kind] += size + 2 * (size // inputs)
        else:
            found[kind] += size * leaf.dtype.itemsize
    return found


def working_bytes(
    config: Config, mesh, rules: Rules, rows: int, tokens: int, slots: int, tpu: bool | None = None
) -> dict[str, int]:
    """Bytes of XLA's temporaries on one device in a step of `tokens` for each of `rows`, by what they are, at the point
    where they are most. The terms are buffers of the compiled program, the factors say how many of a kind XLA holds at
    once, on a `tpu`, on a GPU, or (None) on the one that holds more: docs/sharding.md has them beside XLA's account."""
    if tpu is None:
        both = (working_bytes(config, mesh, rules, rows, tokens, slots, tpu) for tpu in (False, True))
        return max(both, key=lambda parts: sum(parts.values()))
    c, wide = config, config.dtype.itemsize
    rules = rules_for(mesh, rules, tokens)
    size = lambda *axes: axes_size(mesh, *axes)
    B, T = rows // size(rules.batch), tokens // size(rules.seq)
    D, k, N = c.hidden_size, c.num_experts_per_tok, c.num_attention_heads // size(rules.heads)
    states = {"states": 3 * B * T * D * wide, "logits": B * c.vocab_size // size(rules.vocab) * (wide + 4)}
    # Attention: queries, their rotation and the result; scores in float32, and what is multiplied by the values.
    _, block = attention_blocks(B, T, N, slots)
    attention = {
        "queries and heads' outputs": 3 * B * T * N * c.head_dim * wide,
        "scores of a block": B * N * block * min(slots, max(tokens, 1)) * (4 + wide),
    }
    # The experts: the tokens of the group, what becomes of them, and the rows that are worked on at once, in and out.
    own = [a for a in mesh_axes([rules.experts]) if a in mesh_axes([rules.batch, rules.seq])]
    group = B * T * size(*own)
    F, at_once = c.moe_intermediate_size // size(rules.expert_ffn), min(group, rows_at_once(k, D)) * k
    if dispatch.sends(size(*own), device_kind(mesh)):
        tokens_in_and_out = group * D * wide * (4 if tpu else 2) + (0 if tpu else B * T * min(k, size(*own)) * D * wide)
    else:
        tokens_in_and_out = int(group * D * (1.5 * (wide + 4) if tpu else wide + 2 * 4))
    experts = {
        "the expert group's tokens": tokens_in_and_out,
        "rows of the experts": at_once * ((2 if tpu else 1) * D + 2 * F) * wide,
    }
    # Slices of stacked weights that XLA takes out of their stack: on a TPU those alone that its on-chip memory is too
    # small for.
    slices = {"attention's": D * N * c.head_dim * wide}
    if c.dense_layers > 1:
        slices["a dense layer's"] = 2 * D * c.intermediate_size // size(rules.ffn) * wide
    held = [n for n in slices.values() if not tpu or n > ON_CHIP]
    weights = {"slices of weights": sum(held) if tpu else max(held)}
    return states | max(
        (attention if T > 1 else {}, experts if c.moe_layers else {}, weights), key=lambda p: sum(p.values())
    )


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model, a mesh and rules need on the device that holds most, and whether that fits. Made by `plan`."""

    name: str
    mesh: str
    devices: int
    rules: str
    batch: int  # rows, as they are padded to the mesh
    context: int  # tokens a row
    dtype: str
    train: bool
    parts: dict[str, int]  # bytes, by what they are
    device: str | None
    memory: int | None  # bytes of one device that a program may use
    changes: tuple[str, ...]  # what would fit, the nearest first, as flags; only where this does not
    cost: "Cost | None"  # of one token for each row with a full cache

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """None where no device was named."""
        return None if self.memory is None else self.total <= self.memory

    def to_json(self) -> dict[str, Any]:
        """For other programs: sizes in GiB and times in milliseconds, as the keys say."""
        gib = lambda n: round(n / GIB, 4)
        keys = ("name", "mesh", "devices", "rules", "batch", "context", "dtype", "train", "device")
        cost = self.cost
        return {key: getattr(self, key) for key in keys} | {
            "parts_gib": {key: gib(n) for key, n in self.parts.items()},
            "total_gib": gib(self.total),
            "device_memory_gib": None if self.memory is None else gib(self.memory),
            "fits": self.fits,
            "changes": list(self.changes),
            "decode_step_ms": None if cost is None else round(1e3 * cost.seconds, 4),
            "decode_step_parts_ms": None if cost is None else {k: round(1e3 * t, 4) for k, t in cost.parts.items()},
        }

    def __str__(self) -> str:
        gib = lambda n: f"{n / GIB:10,.2f}"
        lines = [
            f"{self.name}, {self.dtype}, --mesh {self.mesh} ({self.devices} devices), --rules {self.rules}, "
            f"{self.batch} x {self.context:,} tokens, {'training' if self.train else 'generating'}",
            "",
            "part                             GiB a device",
        ]
        lines += [f"{name:35}{gib(n)}" for name, n in self.parts.items() if n]
        lines += [f"{'total':35}{gib(self.total)}"]
        if self.memory is not None:
            verdict = "fits" if self.fits else "does not fit"
            lines += [f"{f'a {self.device} has':35}{gib(self.memory)}   {verdict}"]
        lines += ["", "what would fit: " + "; ".join(self.changes)] if self.changes else []
        if self.cost:
            parts = ", ".join(f"{key} {1e3 * t:.2f}" for key, t in self.cost.parts.items())
            lines += ["", f"a token for each row takes {1e3 * self.cost.seconds:.2f} ms at the least (ms: {parts})"]
        return "\n".join(lines)

    def plot(self, axes=None):
        """One bar of the parts, and a line where the device's memory ends, on matplotlib's `axes` (default: new ones),
        which are returned."""
        from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

        axes = pyplot.subplots(figsize=(9, 2))[1] if axes is None else axes
        left = 0.0
        for name, n in self.parts.items():
            if n:
                axes.barh(0, n / GIB, left=left, label=f"{name} {n / GIB:.1f}")
                left += n / GIB
        if self.memory is not None:
            axes.axvline(
                self.memory / GIB, color="black", linestyle="--", label=f"{self.device} {self.memory / GIB:.1f}"
            )
        axes.set(yticks=[], xlabel="GiB a device", title=f"{self.name}, {self.dtype}, {self.mesh}, {self.rules}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, fontsize="small")
        return axes


@dataclasses.dataclass(frozen=True)
class Cost:
    """The least time of one step: what the slowest of computing, reading memory and the network takes, in seconds.

    Computing: FLOP a device by the device's rate for the weights' dtype. Memory: the weights that the tokens touch, of
    the routed experts the expected number E (1 - (1 - k/E)^n) for n tokens of evenly spread choices, and the cache.
    Network: for each collective of docs/sharding.md's formula what a device sends round a ring, over its links, or over
    its host's network where the group spans hosts."""

    flops: float
    bytes: float
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return max(self.parts.values())


def step_cost(config, mesh, rules: Rules, rows: int, tokens: int, slots: int, on: Chip, fp8=False, gpu=False) -> Cost:
    """Of a step of `tokens` for each of `rows`, with a cache of `slots` of which all are full, on such devices."""
    c, rules = config, rules_for(mesh, rules, tokens)
    size = lambda *axes: axes_size(mesh, *axes)
    mine = rows * tokens / size(rules.batch, rules.seq)
    D, H, E, k = c.hidden_size, c.head_dim, c.n_routed_experts, c.num_experts_per_tok
    heads = c.num_attention_heads + c.num_key_value_heads
    attention = c.num_hidden_layers * 2 * heads * H * D / size(rules.heads)
    inner = c.dense_layers * c.intermediate_size + c.moe_layers * c.n_shared_experts * c.moe_intermediate_size
    mlps, head = 3 * inner * D / size(rules.ffn), c.vocab_size * D / size(rules.vocab)
    one, layers = 3 * c.moe_intermediate_size * D / size(rules.expert_ffn), c.moe_layers
    routed = (
        rows
        * tokens
        * k
        * one
        * layers
        / size(rules.experts)
        / max(1, size(rules.batch, rules.seq) // _group(mesh, rules))
    )
    routed *= 1 / _group(mesh, rules)
    seen = rows / size(rules.batch) * slots / size(rules.slots)  # slots that are read
    scores = 2 * c.num_hidden_layers * c.num_attention_heads / size(rules.heads) * H * seen * tokens
    flops = 2 * (mine * (attention + mlps) + routed + scores + rows / size(rules.batch) * head)
    choices = rows * tokens / max(1, size(rules.batch, rules.seq) // _group(mesh, rules))
    touched = E / size(rules.experts) * (1 - (1 - k / E) ** choices) * one * layers if E else 0
    wide = 1 if fp8 else c.dtype.itemsize
    kv = 2 * c.num_hidden_layers * cached_heads(c, mesh, rules) / size(rules.heads) * H * c.dtype.itemsize
    read = wide * (attention + mlps + touched) + c.dtype.itemsize * head + kv * seen
    network = 0.0
    for each in expected(c, mesh, rules, rows, tokens, slots, tokens > 1):
        rate = on.network if gpu and _spans_hosts(mesh, each.axes, on.host) else on.link
        network += (each.count or 0) * sent_bytes(each, mesh) / rate
    rate = on.fp8 if fp8 else on.bf16
    return Cost(flops, read, {"computing": flops / rate, "memory": read / on.bandwidth, "network": network})


def _group(mesh, rules: Rules) -> int:
    """Over how many different parts of the tokens one device's experts work."""
    together = mesh_axes([rules.batch, rules.seq])
    return axes_size(mesh, *(a for a in mesh_axes([rules.experts]) if a in together))


def _spans_hosts(mesh, axes, host: int) -> bool:
    """Whether a group along these axes is on several hosts, where devices are in the order of hosts."""
    names, shape = list(mesh.shape), list(mesh.shape.values())
    return any(math.prod(shape[names.index(a) :]) > host for a in axes)


def plan(
    config: Config,
    mesh: Any = "data=1",
    rules: "str | Rules" = "ep",
    batch: int = 1,
    context: int = 4096,
    *,
    device: str | None = None,
    train: bool = False,
    fp8: bool = False,
    name: str = "the model",
) -> Plan:
    """Bytes a device by part, the verdict for a `device` of `targets.CHIPS`, and what would fit if this does not.

    Generating: weights, a cache of `context` tokens for each row, and working memory. Training (`train`): weights,
    gradients in the weights' dtype, AdamW's float32 copy and moments, and the activations that are kept where each
    layer is computed again in the backward pass; no cache. `fp8` counts the matrices as the published FP8 checkpoints
    store them. Needs no devices. Raises UsageError for a mesh or rules that cannot be."""
    by, layout = make_rules(rules), make_mesh(mesh) if not isinstance(mesh, str) else abstract(mesh)
    if device and isinstance(layout, AbstractMesh):
        layout = abstract(describe(layout), chip(device).kind)
    check_mesh(config, layout, by)
    rows = round_up(batch, axes_size(layout, by.batch))
    tpu = None if device is None else not _is_gpu(device)
    parts = _parts(config, layout, by, rows, context, train, fp8, tpu)
    memory = usable(device) if device else None
    changes, cost = (), None
    if memory is not None and sum(parts.values()) > memory:
        changes = tuple(_changes(config, layout, by, batch, context, train, fp8, memory, tpu))
    if device and not train:
        gpu = _is_gpu(device)
        cost = step_cost(
            config, layout, by, rows, 1, round_up(context, axes_size(layout, by.slots)), chip(device), fp8, gpu
        )
    return Plan(
        name,
        describe(layout),
        layout.size,
        rules if isinstance(rules, str) else str(rules),
        rows,
        context,
        "fp8" if fp8 else config.dtype.name,
        train,
        parts,
        device,
        memory,
        changes,
        cost,
    )


def _is_gpu(device: str) -> bool:
    return device.split(":", 1)[0].lower() in GPUS


def usable(device: str) -> int:
    """Bytes of one device that a program may use."""
    return int(chip(device).memory * (USABLE if _is_gpu(device) else 1))


def _parts(config, mesh, rules, rows: int, context: int, train: bool, fp8: bool, tpu) -> dict[str, int]:
    weights = weight_bytes(config, mesh, rules, fp8)
    parts = {f"weights: {kind}": n for kind, n in weights.items()}
    if not train:
        need = needs(config, mesh, rules, rows, context, fp8, tpu)
        return parts | {"cache": need.cache, "working memory": need.working}
    count = sum(weights.values()) // config.dtype.itemsize if not fp8 else 0
    work = working_bytes(config, mesh, rules, rows, context, context, tpu)
    mine = rows * context // axes_size(mesh, rules.batch, rules_for(mesh, rules, context).seq)
    logits = 3 * 4 * mine * config.vocab_size // axes_size(mesh, rules.vocab)  # and their softmax and its gradient
    kept = config.num_hidden_layers * mine * config.hidden_size * config.dtype.itemsize
    layer = 0  # with `width` one layer's weights, and their gradient, are there whole
    if rules.width is not None:
        whole = dataclasses.replace(rules, width=None)
        layer = 2 * max(1, weight_bytes(config, mesh, whole, fp8)["experts"] // max(1, config.moe_layers))
    return parts | {
        "gradients": count * config.dtype.itemsize,
        "optimizer (AdamW)": count * ADAMW,
        "activations kept": kept,
        "working memory": 2 * sum(work.values()) + logits + layer,
    }


def search(config: Config, devices: int, rules: "str | Rules" = "ep", batch: int = 1, context: int = 4096, **options):
    """A `Plan` for every mesh of so many devices that divides the model, the smallest first."""
    by, found = make_rules(rules), []
    for layout in _all_meshes(config, by, devices):
        found.append(plan(config, layout, rules, batch, context, **options))
    return sorted(found, key=lambda p: (p.total, p.mesh))


def _all_meshes(config: Config, rules: Rules, devices: int, kind: str | None = None):
    divisors = lambda n: [d for d in range(1, n + 1) if n % d == 0]
    contexts = divisors(devices) if rules.seq or rules.slots else [1]
    for tensor in divisors(devices):
        for context in (c for c in contexts if devices // tensor % c == 0):
            for expert in divisors(devices // tensor // context):
                data = devices // tensor // context // expert
                layout = abstract(f"data={data},expert={expert},context={context},tensor={tensor}", kind)
                try:
                    check_mesh(config, layout, rules)
                except UsageError:
                    continue
                yield layout


def _changes(config, mesh, rules: Rules, batch: int, context: int, train: bool, fp8: bool, memory: int, tpu):
    """What would fit, as flags: each change alone, and how much it needs."""

    def total(layout, by=rules, rows=batch, tokens=context, small=fp8):
        padded = round_up(rows, axes_size(layout, by.batch))
        return sum(_parts(config, layout, by, padded, tokens, train, small, tpu).values())

    said = lambda layout, n: f"--mesh {describe(layout)} ({n / GIB:.1f} GiB)"

    def first(devices: int):
        """Of the meshes of so many devices that fit one with the least over `tensor`, which talks in every matrix."""
        fits = ((layout, total(layout)) for layout in _all_meshes(config, rules, devices, device_kind(mesh) or None))
        order = lambda found: (found[0].shape["tensor"], found[0].shape["context"], found[0].shape["data"])
        return min((f for f in fits if f[1] <= memory), key=order, default=None)

    if same := first(mesh.size):
        yield said(*same)
    if not train and not fp8 and (n := total(mesh, small=True)) <= memory:
        yield f"--dtype fp8 ({n / GIB:.1f} GiB)"
    low, high = 0, context
    while not train and high - low > 256:
        middle = (low + high) // 2
        low, high = (middle, high) if total(mesh, tokens=middle) <= memory else (low, middle)
    if low >= 1024:
        yield f"--context {low // 256 * 256}"
    for devices in (mesh.size * 2**n for n in range(1, 8)):
        if best := first(devices):
            yield f"{devices} devices: {said(*best)}"
            break


def compiled_steps(
    config: Config, mesh: str, rules: Rules, topology_name: str | None, planned: Plan
) -> list[dict[str, Any]]:
    """Prefill and decode at full size, compiled for a topology that is not there, and XLA's own account of them beside
    the plan's. Raises UsageError without a topology, or where what compiles for it is not installed."""
    from glm_jax.generation import lower_step

    if not topology_name or ":" not in topology_name:
        raise UsageError("--compile needs --topology, as v5p:2x2x4 or h100:16, to compile for")
    model = GLM(
        dataclasses.replace(config, num_nextn_predict_layers=0), make_mesh(mesh, topology(topology_name)), rules, None
    )
    slots, found = round_up(planned.context, axes_size(model.mesh, rules.slots)), []
    for step, tokens in (("prefill", min(planned.context, PREFILL_CHUNK)), ("decode", 1)):
        began = time.perf_counter()
        program = lower_step(model, planned.batch, tokens, slots, platform(topology_name)).compile()
        seconds, got = time.perf_counter() - began, report(program, model.mesh)
        on, gpu = chip(topology_name), _is_gpu(topology_name)
        cost = step_cost(model.config, model.mesh, rules, planned.batch, tokens, slots, on, gpu=gpu)
        expects = sum(working_bytes(model.config, model.mesh, rules, planned.batch, tokens, slots, not gpu).values())
        moved: dict[str, list[int]] = {}
        for c in got.collectives:
            entry = moved.setdefault(f"{c.kind} over {'*'.join(c.axes)}", [0, 0])
            entry[0] += c.count or 0
            entry[1] += (c.count or 0) * c.bytes
        found.append(
            {
                "step": f"{step}, {planned.batch} x {tokens} tokens, {slots} slots",
                "compile_s": round(seconds, 1),
                "argument_gib": round(got.argument_bytes / GIB, 3),
                "output_gib": round((got.output_bytes - got.alias_bytes) / GIB, 3),
                "temporary_gib": round(got.temp_bytes / GIB, 3),
                "planned_temporary_gib": round(expects / GIB, 3),
                "total_gib": round(got.total_bytes / GIB, 3),
                "xla_flops_loops_once": got.flops,
                "flops": cost.flops,
                "memory_bytes": cost.bytes,
                "roofline_ms": round(1e3 * cost.seconds, 3),
                "roofline_parts_ms": {key: round(1e3 * t, 3) for key, t in cost.parts.items()},
                "collectives": [f"{n} x {kind}, {size / 2**20:,.1f} MiB" for kind, (n, size) in sorted(moved.items())],
            }
        )
    return found
