"""What a model needs on each device, before a byte of it is read; whether that fits, and what would."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh

from glm_jax import dispatch
from glm_jax.cache import cache_bytes
from glm_jax.config import Config
from glm_jax.costs import Cost, step_cost
from glm_jax.errors import NoSpace, UsageError
from glm_jax.kernels import choose, rows_at_once
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
from glm_jax.sharding import PRESETS, Rules, abstract, across, describe, device_kind, mesh_axes
from glm_jax.sharding import mesh as make_mesh
from glm_jax.sharding import rules as make_rules
from glm_jax.targets import GIB, GPUS, chip

# Of a GPU's memory what CUDA, NCCL's buffers and fragments leave, as XLA_PYTHON_CLIENT_MEM_FRACTION=.95 sets it; a
# TPU's is given net of what its runtime keeps.
USABLE = 0.95
FP8 = ("q", "k", "v", "o", "gate_up", "down")  # the matrices that the published FP8 checkpoints store in one byte
FP8_SCALE = 4  # bytes of the float32 scale that they have for each output of a matrix
ON_CHIP = 2**26  # bytes of a slice up to which a TPU keeps it in VMEM
ADAMW = 12  # bytes a weight: its float32 copy and two float32 moments
SLOTS = 256  # a --context that is offered is a multiple of this


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


def needs(config: Config, mesh, rules: Rules, batch: int = 1, context: int = 4096, fp8: bool = False) -> Needs:
    """What each device holds while generating: its weights, its share of a cache of `context` tokens for `batch` rows,
    and working memory: of a prompt's part or of a step, whichever has more."""
    rows = round_up(batch, axes_size(mesh, rules.batch))
    slots = round_up(context, axes_size(mesh, rules.slots))
    working = sum(_temporaries(config, mesh, rules, rows, slots).values())
    cache = cache_on_device(config, mesh, rules, rows, slots)
    return Needs(sum(weight_bytes(config, mesh, rules, fp8).values()), cache, working)


def cache_on_device(config: Config, mesh, rules: Rules, rows: int, slots: int) -> int:
    """Bytes of a device's share of the cache, KV heads that are repeated included."""
    parts = axes_size(mesh, rules.batch, rules.heads, rules.slots)
    return cache_bytes(config, rows, slots, cached_heads(config, mesh, rules)) // parts


@functools.lru_cache(maxsize=4096)
def weight_bytes(config: Config, mesh, rules: Rules, fp8: bool = False) -> dict[str, int]:
    """Bytes of the weights on one device, by kind. With `fp8` the matrices that the published FP8 checkpoints quantise
    take a byte a weight and a float32 scale for each output."""
    kinds = ("experts", "attention", "dense and shared MLPs", "embedding and head", "MTP layer", "norms and routers")
    found: dict[str, int] = {kind: 0 for kind in kinds}
    for path, leaf in jax.tree_util.tree_leaves_with_path(GLM(config, mesh, rules, seed=None)):
        name = weight_path(path)
        found[_kind(name)] += held_bytes(name, leaf, fp8)
    return found


def held_bytes(name: str, leaf, fp8: bool = False) -> int:
    """Bytes of one abstract weight on one device."""
    shape, last = leaf.sharding.shard_shape(leaf.shape), name.rsplit(".", 1)[-1]
    size = math.prod(shape)
    if fp8 and last in FP8:
        inputs = math.prod(shape[-2:]) if last == "o" else shape[-1]
        return size + FP8_SCALE * (size // inputs)
    return size * leaf.dtype.itemsize


def _kind(name: str) -> str:
    last = name.rsplit(".", 1)[-1]
    if name.startswith("mtp."):
        return "MTP layer"
    if last in ("embed", "head"):
        return "embedding and head"
    if last in ("gate_up", "down"):
        return "experts" if name.startswith("moe.") and ".shared." not in name else "dense and shared MLPs"
    return "attention" if ".attn." in name else "norms and routers"


def working_bytes(
    config: Config,
    mesh,
    rules: Rules,
    rows: int,
    tokens: int,
    slots: int,
    fresh: bool = True,
    kernels: str = "auto",
) -> dict[str, int]:
    """Bytes of XLA's temporaries on one device in a step of `tokens` for each of `rows`, by what they are, at the point
    where they are most; of several tokens a prompt's first part, or a later one if not `fresh`. The terms are buffers
    of the compiled program, and how many of a kind XLA holds at once differs between TPU and GPU; where the mesh does
    not say what its devices are, it is the one that holds more. docs/plan.md has the formula, and
    benchmarks/compile_table.py sets it beside XLA's account."""
    kind = device_kind(mesh)
    tpu = kind.startswith("TPU")
    if kind in ("", "cpu"):
        both = (_working_bytes(config, mesh, rules, rows, tokens, slots, fresh, kernels, tpu) for tpu in (False, True))
        return max(both, key=lambda terms: sum(terms.values()))
    return _working_bytes(config, mesh, rules, rows, tokens, slots, fresh, kernels, tpu)


def _working_bytes(
    config: Config, mesh, rules: Rules, rows: int, tokens: int, slots: int, fresh: bool, kernels: str, tpu: bool
) -> dict[str, int]:
    c, wide = config, config.dtype.itemsize
    rules = rules_for(mesh, rules, tokens)
    size = lambda *axes: axes_size(mesh, *axes)
    B, T = rows // size(rules.batch), tokens // size(rules.seq)
    D, k, N = c.hidden_size, c.num_experts_per_tok, c.num_attention_heads // size(rules.heads)
    always = {"states": 3 * B * T * D * wide, "logits": B * c.vocab_size // size(rules.vocab) * (wide + 4)}
    held = lambda *slices: sum(n for n in slices if not tpu or n > ON_CHIP)
    one = D * N * c.head_dim * wide  # a layer's q, or its o, out of their stack
    # Attention. Of a prompt, queries, their rotation and the result, and scores in float32 and as they are multiplied
    # by the values: of its first part with its own keys, of a later one with all slots. Of one token, the layer's keys
    # or its values out of the cache, one after the other, and its scores.
    if T > 1:
        asked, keys = T, tokens
        if not fresh:  # where sequences and slots are cut alike, each device answers the queries of all
            asked, keys = T * size(rules.seq), slots // size(rules.slots)
        _, block = attention_blocks(B, asked, N, keys)
        scores = B * N * block * keys * (4 + wide)
        attention = {"queries and heads' outputs": 3 * B * T * N * c.head_dim * wide, "scores of a block": scores}
    else:
        own_slots, kv = slots // size(rules.slots), cached_heads(c, mesh, rules) // size(rules.heads)
        layer = B * kv * own_slots * c.head_dim * wide
        attention = {"a layer's keys, or its values": held(layer), "scores": held(B * N * own_slots * (4 + wide))}
        attention["slices of weights"] = held(one)
    # The experts: the tokens of the group as they come and what becomes of them, and the rows that are worked on at
    # once. A GPU's kernels write what is between gate and down, and the answers; a TPU's beside these the rows that are
    # looked up, or the answers in their order. Where there is no kernel, they are looked up, padded and multiplied.
    own = [a for a in mesh_axes([rules.experts]) if a in mesh_axes([rules.batch, rules.seq])]
    group, F = B * T * size(*own), c.moe_intermediate_size // size(rules.expert_ffn)
    at_once = min(group, rows_at_once(k, D)) * k
    stacks = [jax.ShapeDtypeStruct((max(1, c.moe_layers), 1, *sides), c.dtype) for sides in ((2, F, D), (D, F))]
    chosen = choose(kernels, device_kind(mesh), jax.ShapeDtypeStruct((1, D), c.dtype), stacks)
    by_kernels = chosen != "xla"
    if dispatch.sends(size(*own), device_kind(mesh)):
        in_and_out = held(group * D * wide) * ((3 if by_kernels else 4) if tpu else 2)
    else:
        in_and_out = held(group * D * 4) // 4 * (wide + 4) * (3 if tpu else 2) // 2
    if tpu:
        per_row = (2 * D + F) / D if by_kernels else (2 * D + 2 * F) / D
    else:
        per_row = (D + F) / D if by_kernels else (D + 3 * F) / D
        if chosen == "mosaic":  # rows are looked up, and each expert's last tile of up to 128 is half empty
            per_row, at_once = per_row + 1, at_once + 64 * min(at_once, c.n_routed_experts // size(rules.experts))
    experts = {"the expert group's tokens": in_and_out, "rows of the experts": int(held(at_once * D * wide) * per_row)}
    # A layer's slices of stacked weights.
    dense = 2 * D * c.intermediate_size // size(rules.ffn) * wide if c.dense_layers > 1 else 0
    weights = {"slices of weights": held(max(one, dense))}
    phases = (attention, experts if c.moe_layers else {}, weights)
    return always | max(phases, key=lambda terms: sum(terms.values()))


def _temporaries(config: Config, mesh, rules: Rules, rows: int, slots: int, kernels: str = "auto") -> dict[str, int]:
    """Of the step of generation that needs most: a prompt's first part, its last, or one token with a full cache."""
    steps = [(min(slots, PREFILL_CHUNK), True), (1, False)] + [(PREFILL_CHUNK, False)] * (slots > PREFILL_CHUNK)
    needed = (working_bytes(config, mesh, rules, rows, tokens, slots, fresh, kernels) for tokens, fresh in steps)
    return max(needed, key=lambda terms: sum(terms.values()))


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


def free_bytes(device) -> int:
    """Memory of a device that nothing has taken yet."""
    return device_bytes(device) - (device.memory_stats() or {}).get("bytes_in_use", 0)


def is_gpu(device: str) -> bool:
    return device.split(":", 1)[0].lower() in GPUS


def usable(device: str) -> int:
    """Bytes of one device, named as "h100" or "v5p:2x2x4", that a program may use: see USABLE."""
    return int(chip(device).memory * (USABLE if is_gpu(device) else 1))


def refuse_if_no_room(model: GLM, batch: int, context: int) -> None:
    """Raises NoSpace if a cache of `context` tokens for `batch` rows, and the work on them, are more than what its
    devices have left."""
    cache = cache_on_device(model.config, model.mesh, model.rules, batch, context)
    terms = _temporaries(model.config, model.mesh, model.rules, batch, context, model.kernels)
    work = sum(terms.values())
    if cache + work > (free := free_bytes(model.mesh.local_devices[0])):
        raise NoSpace(
            f"{batch} x {context} tokens need {(cache + work) / GIB:.1f} GiB on each of {model.mesh.size} devices, "
            f"{cache / GIB:.1f} of them for the cache, {free / GIB:.1f} are free: a smaller --max-tokens, fewer rows, "
            "or a --mesh of more devices"
        )


# ------------------------------------------------------------------------------------------------------------- meshes

Total = Callable[[Any], int]  # a mesh -> bytes on its fullest device


def meshes(config: Config, rules: Rules, devices: int, kind: str | None = None) -> Iterator[AbstractMesh]:
    """Every mesh of so many devices that divides the model. Axes that the rules do not use have size 1: devices along
    them would all do the same."""
    used = mesh_axes([getattr(rules, f.name) for f in dataclasses.fields(rules)])
    sizes = lambda axis, n: [d for d in range(1, n + 1) if n % d == 0] if axis in used else [1]
    for tensor in sizes("tensor", devices):
        for context in sizes("context", devices // tensor):
            for expert in sizes("expert", devices // tensor // context):
                data = devices // tensor // context // expert
                if data > 1 and "data" not in used:
                    continue
                layout = abstract(f"data={data},expert={expert},context={context},tensor={tensor}", kind)
                try:
                    check_mesh(config, layout, rules)
                except UsageError:
                    continue
                yield layout


def best_mesh(config: Config, rules: Rules, devices: int, memory: int | None, total: Total, kind: str | None = None):
    """(mesh, its bytes) of so many devices, or None if none divides the model. Of those that fit `memory` (None: all),
    if there are any with a tenth of it to spare of these, the one with most over `expert`, then least over `data` and
    `context`; if none fits, the one that needs least."""
    found = [(layout, total(layout)) for layout in meshes(config, rules, devices, kind)]
    for room in (0.9, 1.0):  # more rows or a longer context should not be the end
        fits = [f for f in found if memory is None or f[1] <= room * memory]
        if fits:
            return min(fits, key=lambda f: (-f[0].shape["expert"], f[0].shape["data"], f[0].shape["context"]))
    return min(found, key=lambda f: f[1], default=None)


def default_mesh(config: Config, rules: Rules, devices: list) -> str:
    """The mesh for these devices, as `best_mesh` has it for one row of 4,096 tokens; if no mesh of all of them divides
    the model, of as many as do."""
    total = lambda layout: needs(config, layout, rules).total
    memory, kind = free_bytes(devices[0]), devices[0].device_kind
    for count in range(len(devices), 0, -1):
        if best := best_mesh(config, rules, count, memory, total, kind):
            return describe(best[0])
    return "data=1"


def refuse_if_too_large(config: Config, mesh, rules: Rules, name: str) -> None:
    """Raises NoSpace, with the parts and the changes that would fit, if the mesh's devices have too little room."""
    device = mesh.local_devices[0]
    have, all_of_it, need = free_bytes(device), device_bytes(device), needs(config, mesh, rules)
    if need.total <= have:
        return
    total = lambda layout: needs(config, layout, rules).total
    fits = [*_other_meshes(config, mesh, rules, have, total)]
    if config.dtype.itemsize == 4:
        half = needs(dataclasses.replace(config, dtype=jax.numpy.dtype("bfloat16")), mesh, rules)
        fits += [f"--dtype bfloat16 ({half.total / GIB:.1f} GiB)"] if half.total <= have else []
    fewer = lambda layers: needs(first_layers(config, layers), mesh, rules).total <= have
    if layers := _most(fewer, config.num_hidden_layers):
        fits.append(f"--layers {layers} (the first {layers} of {config.num_hidden_layers})")
    raise NoSpace(
        f"{name} needs {need} on each of {mesh.size} devices (--mesh {describe(mesh)}), these have {have / GIB:.1f} GiB"
        + (f" free of {all_of_it / GIB:.1f}" if all_of_it > have else "")
        + ("; what would fit: " + ", or ".join(fits) if fits else "; no mesh, dtype or --layers of it fits")
    )


def first_layers(config: Config, layers: int) -> Config:
    """The config of the model cut off after `layers` layers, without its MTP layer."""
    if not 1 <= layers <= config.num_hidden_layers:
        raise UsageError(f"--layers {layers}: this model has 1 to {config.num_hidden_layers}")
    return dataclasses.replace(config, num_hidden_layers=layers, num_nextn_predict_layers=0)


def _other_meshes(config: Config, mesh, rules: Rules, memory: int, total: Total) -> Iterator[str]:
    """A mesh of as many devices that fits, and one of more: of the fewest, in powers of two or such times as many."""
    kind = device_kind(mesh) or None
    more = {2**n for n in range(13)} | {mesh.size * 2**n for n in range(13)}
    for devices in sorted(n for n in more if mesh.size <= n <= max(mesh.size, 4096)):
        best = best_mesh(config, rules, devices, memory, total, kind)
        if best and best[1] <= memory:
            yield f"--mesh {describe(best[0])} ({best[1] / GIB:.1f} GiB, {devices} devices)"
            if devices > mesh.size:
                return


def _most(fits: Callable[[int], bool], high: int, step: int = 1) -> int:
    """The largest multiple of `step` below `high` that fits, where all smaller ones do; 0 for none."""
    low, high = 0, -(-high // step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


# --------------------------------------------------------------------------------------------------------------- plans


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model, a mesh and rules need on the device that holds most, and whether that fits. Made by `plan`."""

    name: str
    mesh: str
    devices: int
    rules: str
    batch: int  # rows that were asked for
    rows: int  # and as they are padded to the mesh
    context: int  # tokens a row
    dtype: str
    train: bool
    parts: dict[str, int]  # bytes, as "weights: experts"; what stands before the colon is the part
    device: str | None
    memory: int | None  # bytes of one device that a program may use
    changes: tuple[str, ...]  # what would fit, the nearest first, as flags; only where this does not
    cost: Cost | None  # of one token for each row with a full cache

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """None where no device was named."""
        return None if self.memory is None else self.total <= self.memory

    def part(self, name: str) -> int:
        """Bytes of "weights", "KV cache", "activations", "gradients" or "optimizer"."""
        return sum(n for key, n in self.parts.items() if key.split(":")[0] == name)

    def to_json(self) -> dict[str, Any]:
        """For other programs: sizes in GiB and times in milliseconds, as the keys say."""
        gib = lambda n: round(n / GIB, 4)
        keys = ("name", "mesh", "devices", "rules", "batch", "rows", "context", "dtype", "train", "device")
        times = None if self.cost is None else dataclasses.asdict(self.cost.roofline)
        return {key: getattr(self, key) for key in keys} | {
            "weights_gib": gib(self.part("weights")),
            "cache_gib": gib(self.part("KV cache")),
            "activations_gib": gib(self.part("activations")),
            "gradients_gib": gib(self.part("gradients")),
            "optimizer_gib": gib(self.part("optimizer")),
            "parts_gib": {key: gib(n) for key, n in self.parts.items()},
            "total_gib": gib(self.total),
            "device_memory_gib": None if self.device is None else gib(chip(self.device).memory),
            "usable_gib": None if self.memory is None else gib(self.memory),
            "fits": self.fits,
            "changes": list(self.changes),
            "step_ms": None if self.cost is None else round(1e3 * self.cost.seconds, 4),
            "step_parts_ms": times and {key: round(1e3 * t, 4) for key, t in times.items()},
        }

    def __str__(self) -> str:
        line = lambda name, n: f"{name:42}{n / GIB:10,.2f}"
        doing = "training" if self.train else "generating"
        lines = [
            f"{self.name}, {self.dtype}, --mesh {self.mesh} ({self.devices} devices), --rules {self.rules}, "
            f"{_rows(self.batch, self.rows)} x {self.context:,} tokens, {doing}",
            "",
            f"{'part':42}GiB a device",
        ]
        lines += [line(name, n) for name, n in self.parts.items() if n]
        lines += [line("total", self.total)]
        if self.device is not None and self.memory is not None:
            kept = (
                f" of {chip(self.device).memory / GIB:.2f}, 5% being CUDA's and NCCL's" if is_gpu(self.device) else ""
            )
            name = f"a program may use of one {self.device.split(':')[0]}"
            lines += [line(name, self.memory) + f"{kept}: {'it fits' if self.fits else 'IT DOES NOT FIT'}"]
        if self.fits is False:
            lines += ["", "what would fit: " + ("; ".join(self.changes) or "nothing that was tried")]
        if self.cost:
            times = dataclasses.asdict(self.cost.roofline).items()
            parts = ", ".join(f"{key} {1e3 * t:.2f}" for key, t in times)
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
            label = f"{self.device} {self.memory / GIB:.1f}"
            axes.axvline(self.memory / GIB, color="black", linestyle="--", label=label)
        axes.set(yticks=[], xlabel="GiB a device", title=f"{self.name}, {self.dtype}, {self.mesh}, {self.rules}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, fontsize="small")
        return axes


def _rows(batch: int, rows: int) -> str:
    return f"{batch}" if rows == batch else f"{batch} (padded to {rows})"


def plan(
    config: Config,
    mesh="data=1",
    rules: "str | Rules" = "ep",
    batch: int = 1,
    context: int | None = None,
    *,
    device: str | None = None,
    train: bool = False,
    fp8: bool = False,
    name: str = "the model",
) -> Plan:
    """Bytes a device by part, the verdict for a `device` of `targets.CHIPS`, and what would fit if this does not.

    `mesh` as in "expert=8,tensor=2", or a number of devices: the one that `best_mesh` finds for them. Generating:
    weights, a cache of `context` tokens for each row (default: 4096, or the model's most if that is less), and XLA's
    temporaries. Training (`train`): weights, gradients in the weights' dtype, AdamW's float32 copy and moments, and the
    activations that are kept where each layer is computed again in the backward pass; no cache. `fp8` counts the
    matrices as the published FP8 checkpoints store them. Needs no devices. Raises UsageError for a mesh, rules, a batch
    or a context that cannot be."""
    return _plan(config, mesh, rules, batch, context, device, train, fp8, name, offer=True)


def _plan(config, mesh, rules, batch, context, device, train, fp8, name, offer: bool) -> Plan:
    """`plan`; what would fit is worked out if `offer`."""
    most = config.max_position_embeddings
    context = min(4096, most) if context is None else context
    if context > most:
        raise UsageError(f"--context {context}: {name} has {most} tokens at the most")
    if batch < 1 or context < 1:
        raise UsageError(f"--batch {batch} --context {context}: both must be at least 1")
    if fp8 and train:
        raise UsageError("weights in FP8 are for generating; training is in --dtype bfloat16 or float32")
    by, on = make_rules(rules), chip(device) if device else None
    kind = on.kind if on else None
    memory = usable(device) if device else None

    def parts(layout, by=by, batch=batch, context=context, fp8=fp8):
        return _parts(config, layout, by, round_up(batch, axes_size(layout, by.batch)), context, train, fp8)

    total = lambda layout, **changed: sum(parts(layout, **changed).values())
    if isinstance(mesh, int):
        if not (best := best_mesh(config, by, mesh, memory, total, kind)):
            raise UsageError(f"no mesh of {mesh} devices divides {name} under --rules {rules}")
        layout = best[0]
    else:
        layout = abstract(mesh, kind) if isinstance(mesh, str) else make_mesh(mesh)
    check_mesh(config, layout, by)
    across(dict(layout.shape), on.slices if on else 1)
    if by.width is not None and not train:
        raise UsageError(f"--rules {rules} cut the width of weights, which is for training: --train, or other rules")
    rows, cost, changes = round_up(batch, axes_size(layout, by.batch)), None, ()
    held = parts(layout)
    if offer and memory is not None and sum(held.values()) > memory:
        changes = tuple(_changes(config, layout, by, batch, context, train, fp8, memory, total))
    if on and not train:
        slots = round_up(context, axes_size(layout, by.slots))
        cost = step_cost(config, layout, by, rows, 1, slots, on, fp8, batch)
    return Plan(
        name,
        describe(layout),
        layout.size,
        rules if isinstance(rules, str) else str(rules),
        batch,
        rows,
        context,
        "fp8" if fp8 else config.dtype.name,
        train,
        held,
        device,
        memory,
        changes,
        cost,
    )


def search(
    config: Config,
    devices: int,
    rules: "str | Rules" = "ep",
    batch: int = 1,
    context: int | None = None,
    *,
    device: str | None = None,
    train: bool = False,
    fp8: bool = False,
    name: str = "the model",
) -> list[Plan]:
    """A `Plan` for every mesh of so many devices that divides the model: those that fit first, and then the fastest
    step first, or where no device is named the smallest. Options as `plan`."""
    found = []
    for layout in meshes(config, make_rules(rules), devices):
        options = (batch, context, device, train, fp8, name)
        found.append(_plan(config, describe(layout), rules, *options, offer=False))
    order = lambda p: (p.fits is False, p.cost.seconds if p.cost and p.fits else 0, p.total, p.mesh)
    return sorted(found, key=order)


def _parts(config, mesh, rules, rows: int, context: int, train: bool, fp8: bool) -> dict[str, int]:
    weights = weight_bytes(config, mesh, rules, fp8)
    parts = {f"weights: {kind}": n for kind, n in weights.items()}
    if not train:
        slots = round_up(context, axes_size(mesh, rules.slots))
        temporaries = _temporaries(config, mesh, rules, rows, slots)
        cache = {"KV cache": cache_on_device(config, mesh, rules, rows, slots)}
        return parts | cache | {f"activations: {term}": n for term, n in temporaries.items()}
    count, wide = sum(weights.values()) // config.dtype.itemsize, config.dtype.itemsize
    work = sum(working_bytes(config, mesh, rules, rows, context, context).values())
    mine = rows * context // axes_size(mesh, rules.batch, rules_for(mesh, rules, context).seq)
    whole = 0  # with `width` one layer's experts, and their gradient, are there whole
    if rules.width is not None:
        unwidened = weight_bytes(config, mesh, dataclasses.replace(rules, width=None))
        whole = 2 * unwidened["experts"] // max(1, config.moe_layers)
    return parts | {
        "gradients": count * wide,
        "optimizer: AdamW": count * ADAMW,
        "activations: each layer's input, kept": config.num_hidden_layers * mine * config.hidden_size * wide,
        "activations: a layer, and its gradient": 2 * work,
        "activations: logits, softmax, gradient": 3 * 4 * mine * config.vocab_size // axes_size(mesh, rules.vocab),
        "activations: a layer's weights, whole": whole,
    }


def _changes(config, mesh, rules: Rules, batch, context, train, fp8, memory: int, total) -> Iterator[str]:
    """What would fit, as flags: each change alone, and how much it needs."""
    yield from _other_meshes(config, mesh, rules, memory, total)
    if not train and not fp8 and (n := total(mesh, fp8=True)) <= memory:
        yield f"--dtype fp8 ({n / GIB:.1f} GiB)"
    if n := _most(lambda tokens: total(mesh, context=tokens) <= memory, context, SLOTS):
        yield f"--context {n}"
    step = axes_size(mesh, rules.batch)
    if n := _most(lambda rows: total(mesh, batch=rows) <= memory, batch, step):
        yield f"--batch {n}"
    for name, other in PRESETS.items():
        if other != rules and (train or other.width is None):
            spread = lambda layout, by=other: total(layout, by=by)
            best = best_mesh(config, other, mesh.size, memory, spread, device_kind(mesh) or None)
            if best and best[1] <= memory:
                yield f"--rules {name} --mesh {describe(best[0])} ({best[1] / GIB:.1f} GiB)"
