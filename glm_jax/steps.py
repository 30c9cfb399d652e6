"""The steps of generation at full size, compiled for devices that are not there, beside what the plan says of them."""

import dataclasses
import time
from typing import Any

from glm_jax.config import Config
from glm_jax.costs import step_cost
from glm_jax.errors import UsageError
from glm_jax.generation import lower_step
from glm_jax.hlo import Buffer, Collective, big_buffers, report
from glm_jax.model import GLM, PREFILL_CHUNK, axes_size, round_up
from glm_jax.planner import GIB, cache_on_device, weight_bytes, working_bytes
from glm_jax.sharding import Rules
from glm_jax.sharding import mesh as make_mesh
from glm_jax.targets import chip, platform, topology


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One step as XLA compiled it and as the plan has it: bytes on one device."""

    step: str  # "prefill", "prefill, later part" or "decode"
    rows: int
    tokens: int  # new ones of each row
    slots: int
    compile_s: float
    argument_bytes: int
    planned_argument_bytes: int
    temporary_bytes: int
    planned_temporary_bytes: int
    output_bytes: int  # those that lie in no argument
    total_bytes: int
    planned_total_bytes: int
    xla_flops: float | None  # XLA's count, which takes the body of a loop once
    flops: float  # by `costs.step_cost`, and so are the rest
    memory_bytes: float
    roofline_ms: dict[str, float]
    formula: str  # of these milliseconds
    collectives: tuple[Collective, ...]
    buffers: tuple[Buffer, ...]  # that the program makes, as large as an expert's `down` and larger; no arguments

    def to_json(self) -> dict[str, Any]:
        """Keys carry units; collectives as kind, axes, times and bytes of all times."""
        lists = ("collectives", "buffers")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in lists}
        named = ("kind", "axes", "count", "bytes")
        sums = [dict(zip(named, (*key, *value), strict=True)) for key, value in self.moved().items()]
        return fields | {"collectives": sums, "buffers": [dataclasses.asdict(b) for b in self.buffers]}

    def moved(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(kind, axes) -> how often, and bytes of all times."""
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for c in self.collectives:
            n, size = found.get((c.kind, "*".join(c.axes)), (0, 0))
            times = 1 if c.count is None else c.count  # of an unknown number of times, one
            found[c.kind, "*".join(c.axes)] = n + times, size + times * c.bytes
        return dict(sorted(found.items()))

    def __str__(self) -> str:
        gib = lambda n: f"{n / GIB:9,.3f}"
        off = lambda got, planned: f"{planned / got - 1:+9.1%}" if got else ""
        head = f"{self.step}, {self.rows} x {self.tokens:,} tokens, {self.slots:,} slots"
        lines = [f"{head:44}{'XLA':>9}{'plan':>10}   GiB a device; compiled in {self.compile_s:.0f} s"]
        for name in ("argument", "temporary", "total"):
            got, planned = getattr(self, f"{name}_bytes"), getattr(self, f"planned_{name}_bytes")
            lines.append(f"  {name:42}{gib(got)} {gib(planned)}{off(got, planned)}")
        lines.append(f"  {'output in no argument':42}{gib(self.output_bytes)}")
        times = ", ".join(f"{name} {ms:.3f}" for name, ms in self.roofline_ms.items())
        counted = "none" if self.xla_flops is None else f"{self.xla_flops:.3g}"
        lines.append(
            f"  {self.flops:.3g} FLOP, {self.memory_bytes / GIB:.2f} GiB read (XLA, loops once: {counted} FLOP)"
        )
        lines.append(f"  at least {max(self.roofline_ms.values()):.3f} ms ({times}): {self.formula}")
        lines += [
            f"  {n:5} x {kind} over {axes}, {size / 2**20:,.1f} MiB" for (kind, axes), (n, size) in self.moved().items()
        ]
        return "\n".join(lines)


def compile_step(
    config: Config, mesh: str, rules: Rules, target: str, rows: int, tokens: int, context: int, fresh: bool = True
) -> Compiled:
    """The step of `tokens` for each of `rows` (made a multiple of the mesh's), with a cache of `context`, for a
    `target` as "v5p:2x2x4" or "h100:16"; of several tokens a prompt's first part, or a later one if not `fresh`.
    Without the MTP layer, which generation does not run.

    Raises UsageError without a target's size, or where what compiles for it is not installed."""
    if ":" not in target:
        raise UsageError("--compile needs --topology, as v5p:2x2x4 or h100:16, to compile for")
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    model = GLM(config, make_mesh(mesh, topology(target)), rules, None)
    rows = round_up(rows, axes_size(model.mesh, model.rules.batch))
    slots = round_up(context, axes_size(model.mesh, model.rules.slots))
    began = time.perf_counter()
    program = lower_step(model, rows, tokens, slots, platform(target), fresh).compile()
    seconds, got = time.perf_counter() - began, report(program, model.mesh)
    on, count = chip(target), max(1, config.moe_layers)
    cost = step_cost(config, model.mesh, model.rules, rows, tokens, slots, on, fresh=fresh)
    formula = f"FLOP / {on.bf16 / 1e12:,.0f} T/s, bytes read / {on.bandwidth / 1e9:,.0f} GB/s, bytes sent by the "
    formula += f"formula / {on.link / 1e9:,.0f} GB/s, between hosts or slices {on.network / 1e9:,.4g} GB/s"
    arguments = sum(weight_bytes(config, model.mesh, model.rules).values())
    arguments += cache_on_device(config, model.mesh, model.rules, rows, slots)
    temporaries = sum(working_bytes(config, model.mesh, model.rules, rows, tokens, slots, fresh).values())
    return Compiled(
        "decode" if tokens == 1 else "prefill" if fresh else "prefill, later part",
        rows,
        tokens,
        slots,
        round(seconds, 1),
        got.argument_bytes,
        arguments,
        got.temp_bytes,
        temporaries,
        got.output_bytes - got.alias_bytes,
        got.total_bytes,
        arguments + temporaries,
        got.flops,
        cost.flops,
        cost.bytes,
        {f.name: round(1e3 * getattr(cost.roofline, f.name), 4) for f in dataclasses.fields(cost.roofline)},
        formula,
        tuple(got.collectives),
        tuple(big_buffers(program, weight_bytes(config, model.mesh, model.rules)["experts"] // count // 3)),
    )


def compile_steps(config: Config, mesh: str, rules: Rules, target: str, rows: int, context: int) -> list[Compiled]:
    """The first part of a prompt, a later part if `context` has room for one, and one token."""
    steps = [(min(context, PREFILL_CHUNK), True), (PREFILL_CHUNK, False), (1, True)]
    if context <= PREFILL_CHUNK:
        del steps[1]
    return [compile_step(config, mesh, rules, target, rows, tokens, context, fresh) for tokens, fresh in steps]
