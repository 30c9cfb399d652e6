"""What XLA made of a program: small ones on eight CPU devices, and pieces of text that TPUs and GPUs print."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from glm_jax import hlo
from glm_jax.hlo import Collective
from glm_jax.sharding import abstract, mesh
from glm_jax.targets import Chip, chip, platform, topology

CUBE = "data=2,expert=2,tensor=2"


def nested(x):
    """Every kind of collective, in loops of 3, 3 x 5, and of a length that depends on the data."""

    def inner(c, _):
        return jnp.tanh(lax.psum_scatter(lax.all_gather(c, "tensor", tiled=True), "tensor", tiled=True)), None

    def outer(c, _):
        c = lax.psum(lax.scan(inner, c, None, length=5)[0], ("data", "expert")) * 0.1
        return lax.all_to_all(c.reshape(2, -1, c.shape[-1]), "expert", 0, 0).reshape(c.shape), None

    x = lax.ppermute(lax.scan(outer, x, None, length=3)[0], "data", [(0, 1), (1, 0)])
    often = lax.pmax(jnp.int32(x[0, 0]) % 7, ("data", "expert", "tensor"))
    return lax.while_loop(lambda s: s[0] < often, lambda s: (s[0] + 1, lax.psum(s[1], "data") * 0.5), (0, x))[1]


NESTED = [  # for 64 x 128 numbers over data and expert
    Collective("all-gather", ("tensor",), 32 * 128 * 4, 15, "all_gather", "f32", (32, 128)),
    Collective("reduce-scatter", ("tensor",), 32 * 128 * 4, 15, "reduce_scatter", "f32", (32, 128)),
    Collective("all-reduce", ("data", "expert"), 16 * 128 * 4, 3, "psum", "f32", (16, 128)),
    Collective("all-to-all", ("expert",), 16 * 128 * 4, 3, "all_to_all", "f32", (2, 8, 128)),
    Collective("collective-permute", ("data",), 16 * 128 * 4, 1, "ppermute", "f32", (16, 128)),
    Collective("all-reduce", ("data", "expert", "tensor"), 4, 1, "pmax", "s32", ()),
    Collective("all-reduce", ("data",), 16 * 128 * 4, None, "psum", "f32", (16, 128)),
]


def compiled(f, m, shape, name="cpu"):
    spec = P(("data", "expert"))
    step = jax.jit(jax.shard_map(f, mesh=m, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(m, spec))
    return step.trace(x).lower(lowering_platforms=(name if name == "cpu" else platform(name),)).compile()


def bare(found):
    """Without the shape of an all-to-all, which backends cut differently."""
    return [c.__class__(**{**vars(c), "shape": () if c.kind == "all-to-all" else c.shape}) for c in found]


def same(found, expected):
    assert sorted(map(repr, bare(found))) == sorted(map(repr, bare(expected)))


def text(*entry: str, **others: list[str]) -> str:
    body = lambda lines: "".join(f"  {line}\n" for line in lines)
    rest = "".join(f"%{name} (p: f32[]) -> f32[] {{\n{body(lines)}}}\n\n" for name, lines in others.items())
    return f"HloModule jit_f\n\n{rest}ENTRY %main (p: f32[]) -> f32[] {{\n{body(entry)}}}\n"


def test_collectives_in_nested_loops():
    m = mesh(CUBE)
    same(hlo.collectives(compiled(nested, m, (64, 128)), m), NESTED)


def test_axes_are_the_meshs_whatever_the_order_of_its_devices():
    devices = np.asarray(jax.devices())[[0, 3, 5, 6, 1, 2, 4, 7]].reshape(2, 2, 2)
    m = mesh(Mesh(devices, ("expert", "tensor", "data")))  # taken with its axes in another order
    gather = lambda x: lax.psum_scatter(lax.all_gather(x, "expert", tiled=True), ("tensor", "data"), tiled=True)
    found = hlo.collectives(compiled(gather, m, (64, 128)), m)
    assert [(c.kind, c.axes) for c in found] == [("all-gather", ("expert",)), ("reduce-scatter", ("data", "tensor"))]


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{4,0},{5,1},{6,2},{7,3}}", ("data",)),
        ("{{0,1,4,5},{2,3,6,7}}", ("data", "tensor")),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "expert", "tensor")),
        ("{}", ("data", "expert", "tensor")),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("?",)),  # differ along two axes of which they hold half
        ("{{0,1},{2,3},{4,6},{5,7}}", ("?",)),  # not all along the same
        ("{{0,1,2},{3,4,5},{6,7}}", ("?",)),
        ("{{0,8}}", ("?",)),  # of another mesh
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("expert",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[2,4]<=[2,4]T(1,0)", ("data", "tensor")),
        ("mesh['data'=2,'expert'=2,'context'=1,'tensor'=2] {'data','tensor'}", ("data", "tensor")),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", ("tensor",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "expert")),
    ],
)
def test_groups_are_read_as_axes(groups, axes):
    line = f"ROOT %a = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    assert [c.axes for c in hlo.collectives(text(line), abstract(CUBE))] == [axes]


@pytest.mark.parametrize(
    "pairs, axes",
    [
        ("{{0,1},{1,0},{2,3},{3,2}}", [("tensor",)]),
        ("{{0,5},{5,0}}", [("data", "tensor")]),
        ("{{0,0},{1,1}}", []),  # every device keeps its own
        ("{{0,8},{8,0}}", [("?",)]),  # of another mesh
    ],
)
def test_pairs_are_read_as_axes(pairs, axes):
    line = f"ROOT %a = f32[8]{{0}} collective-permute(%p), channel_id=1, source_target_pairs={pairs}"
    assert [c.axes for c in hlo.collectives(text(line), abstract(CUBE))] == axes


def test_what_spans_axes_of_size_1_moves_nothing():
    line = "ROOT %a = f32[8]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"
    assert hlo.collectives(text(line), abstract(CUBE)) == []


# Lines as compiled for h100:8 and h100:16, cut after what is read. Groups are of data=2,expert=4,tensor=2.
BY_FOUR = "channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}, dimensions={0}"
ALONG_DATA = "replica_groups=mesh['data'=2,'expert'=4,'context'=1,'tensor'=2] {'data'}"


@pytest.mark.parametrize(
    "line, expected",
    [
        (  # three combined
            "%s = ((bf16[64,512]{1,0}, f32[64,512]{1,0}, bf16[64,128]{1,0}), (bf16[256,512]{1,0}, f32[256,512]{1,0}, "
            f"bf16[256,128]{{1,0}})) all-gather-start(%a, %b, %c), {BY_FOUR}",
            [("all-gather", 262144, "bf16"), ("all-gather", 524288, "f32"), ("all-gather", 65536, "bf16")],
        ),
        (
            "%s = ((bf16[256,512]{1,0}, bf16[256,128]{1,0}), (bf16[64,512]{1,0}, bf16[64,128]{1,0})) "
            f"reduce-scatter-start(%a, %b), {BY_FOUR}, to_apply=%region_1.0",
            [("reduce-scatter", 262144, "bf16"), ("reduce-scatter", 65536, "bf16")],
        ),
        (  # jax 0.12: combined, and not asynchronous
            f"%s = (bf16[64,512]{{1,0}}, bf16[64,128]{{1,0}}) reduce-scatter(%a, %b), {BY_FOUR}, to_apply=%region_1.0",
            [("reduce-scatter", 262144, "bf16"), ("reduce-scatter", 65536, "bf16")],
        ),
        (f"%s = f32[16,128]{{1,0}} all-reduce-start(%a), {BY_FOUR}", [("all-reduce", 8192, "f32")]),
        (
            f"%s = (bf16[256,512]{{1,0}}, bf16[256,128]{{1,0}}) all-reduce-start(%a, %b), {BY_FOUR}",
            [("all-reduce", 262144, "bf16"), ("all-reduce", 65536, "bf16")],
        ),
        (  # jax 0.12
            f"%s = ((f32[16,128]{{1,0}}), f32[16,128]{{1,0}}) all-reduce-start(%a), channel_id=1, {ALONG_DATA}",
            [("all-reduce", 8192, "f32")],
        ),
        (
            f"%s = ((f32[4,8,128]{{2,1,0}}), f32[4,8,128]{{2,1,0}}) all-to-all-start(%a), {BY_FOUR}",
            [("all-to-all", 16384, "f32")],
        ),
        (
            "%s = ((bf16[8,5120]{1,0}, bf16[16,5120]{1,0}, s64[16]{0}, s64[16]{0}, s64[16]{0}, /*index=5*/s64[16]{0}), "
            f"bf16[16,5120]{{1,0}}) ragged-all-to-all-start(%a, %b, %c, %d, %e, /*index=5*/%f), {BY_FOUR}",
            [("ragged-all-to-all", 163840, "bf16")],
        ),
    ],
)
def test_gpu_forms(line, expected):
    program = text(line, "ROOT %d = f32[16,128]{1,0} all-reduce-done(%s)")
    found = hlo.collectives(program, abstract("data=2,expert=4,tensor=2"))
    assert [(c.kind, c.bytes, c.dtype) for c in found] == expected
    assert {c.axes for c in found} == {("data",) if "mesh" in line else ("expert",)}


def test_a_wrapped_collective_counts_once():
    inner = ["ROOT %g = f32[32]{0} all-gather(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}"]
    program = text(
        "%s = ((f32[16]{0}), f32[32]{0}, u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[16]{0}), f32[32]{0}, u32[]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[32]{0} async-done(%u), calls=%wrapped",
        wrapped=inner,
    )
    same(hlo.collectives(program, abstract(CUBE)), [Collective("all-gather", ("tensor",), 128, 1, "", "f32", (32,))])


# Lines as compiled for v5e:2x4 and 7x:2x2x1, cut after what is read.
PAIRS = "channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}"


def test_a_tpus_large_reduce_scatter():
    program = text(
        "%fusion.2 = f32[4144,2048]{1,0:T(8,128)S(1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.clone.1",
        "%collective-permute-start = (f32[48,2048]{1,0:T(8,128)S(1)}, f32[48,2048]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, "
        "u32[]{:S(2)}) collective-permute-start(%s), channel_id=1, source_target_pairs={{0,1},{2,3},{4,5},{6,7}}",
        "ROOT %d = f32[48,2048]{1,0:T(8,128)S(1)} collective-permute-done(%collective-permute-start)",
        **{
            "all-reduce-scatter.clone.1": [
                f"%r = f32[8288,2048]{{1,0:T(8,128)}} all-reduce(%pad.5), {PAIRS}, to_apply=%region_2.2.clone",
                "ROOT %s = f32[4144,2048]{1,0:T(8,128)} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={4144,2048}",
            ]
        },
    )
    expected = [
        Collective("reduce-scatter", ("tensor",), 8288 * 2048 * 4, 1, "", "f32", (8288, 2048)),
        Collective("collective-permute", ("tensor",), 48 * 2048 * 4, 1, "", "f32", (48, 2048)),
    ]
    same(hlo.collectives(program, abstract(CUBE)), expected)


def test_a_tpus_collective_in_pieces_counts_once():
    whole = "bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.1)"
    piece = lambda chain: [f'%g = {whole}, {PAIRS}, dimensions={{1}}, frontend_attributes={{chain_id="{chain}"}}']
    program = text(
        "%async-collective-start = (bf16[1,1024,2048]{2,1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%one.1",
        "%fusion.55 = (bf16[512,2048]{1,0}, u32[]{:S(2)}) fusion(%b), kind=kOutput, calls=%one.2",
        "%fusion.60 = (bf16[512,2048]{1,0}, u32[]{:S(2)}) fusion(%c), kind=kOutput, calls=%two.1",  # of the same size
        "%async-collective-done = bf16[1,2048,2048]{2,1,0} fusion(%d), kind=kCustom, calls=%one.3",
        "ROOT %async-collective-done.1 = bf16[1,2048,2048]{2,1,0} fusion(%e), kind=kCustom, calls=%two.2",
        **{"one.1": piece(0), "one.2": piece(0), "one.3": piece(0), "two.1": piece(1), "two.2": piece(1)},
    )
    one = Collective("all-gather", ("tensor",), 2048 * 2048 * 2, 1, "", "bf16", (1, 2048, 2048))
    same(hlo.collectives(program, abstract(CUBE)), [one, one])


def test_a_collective_of_a_tpus_sparse_core():
    program = text(
        "%c = ((f32[16,128]{1,0:T(8,128)}, token[]), f32[32,128]{1,0:T(8,128)}) call-start(%p, %t), "
        'async_execution_thread="sparsecore", to_apply=%called_computation',
        "ROOT %d = f32[32,128]{1,0:T(8,128)} call-done(%c)",
        called_computation=[f"ROOT %g = f32[32,128]{{1,0:T(8,128)}} all-gather(%p), {PAIRS}, dimensions={{0}}"],
    )
    assert [c.bytes for c in hlo.collectives(program, abstract(CUBE))] == [16384]


def test_an_exchange_between_slices_of_tpus():
    """As compiled for two slices of v5e:2x2: a send and a recv, of which one has the whole array."""
    host = lambda kind: (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_host_transfer_rendezvous="all_gather.3_0",_xla_megascale_transfer_type="{kind}"}}'
    )
    part, whole = (f"(f32[{n},512]{{1,0:T(8,128)}}, u32[], token[])" for n in (128, 256))
    program = lambda kind, sent, received: text(
        f"%send = {sent} send(%p, %after-all), channel_id=2, {host(kind)}",
        f"%recv = {received} recv(%after-all), channel_id=1, {host(kind)}",
        "%send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true",
        "ROOT %recv-done = (f32[256,512]{1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true",
    )
    for kind, sent, received, expected in (
        ("ALL_GATHER", part, whole, ("all-gather", 256)),
        ("REDUCE_SCATTER", whole, part, ("reduce-scatter", 256)),
        ("ALL_REDUCE", part, part, ("all-reduce", 128)),
        ("ONE_TO_ONE", part, part, ("collective-permute", 128)),
    ):
        (c,) = hlo.collectives(program(kind, sent, received), abstract(CUBE))
        assert (c.kind, c.bytes) == (expected[0], expected[1] * 512 * 4)
        assert (c.axes, c.count, c.source, c.dtype) == (("?",), 1, "", "f32")


def test_what_a_reduction_does_to_two_numbers_is_no_collective_of_its_own():
    inner = ["ROOT %r = f32[] all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}"]  # cannot be, and not looked at
    program = text("ROOT %a = f32[8]{0} all-reduce(%p), replica_groups={}, to_apply=%add", add=inner)
    assert [c.bytes for c in hlo.collectives(program, abstract(CUBE))] == [32]


def loop(condition, body="add(%i, %one)", start="constant(2)", extra="") -> int | None:
    """How often hlo takes a loop to run that a TPU prints: a number, a limit, and an array that is reduced."""
    program = text(
        f"%begin = s32[]{{:T(128)}} {start}",
        "%copy.1 = s32[]{:T(128)} copy(%begin)",
        "%end = s32[]{:T(128)} constant(14)",
        "%tuple = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0}) tuple(%copy.1, %end, %x)",
        "ROOT %while.3 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0}) while(%tuple), condition=%lt, body=%body" + extra,
        lt=[
            "%p = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0}) parameter(0)",
            "%i = s32[]{:T(128)} get-tuple-element(%p), index=0",
            "%n = s32[]{:T(128)} get-tuple-element(%p), index=1",
            "%seven = s32[]{:T(128)} constant(7)",
            f"ROOT %lt.1 = pred[]{{:T(512)}} {condition}",
        ],
        body=[
            "%q = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0}) parameter(0)",
            "%i = s32[]{:T(128)} get-tuple-element(%q), index=0",
            "%n = s32[]{:T(128)} get-tuple-element(%q), index=1",
            "%y = f32[8]{0} get-tuple-element(%q), index=2",
            "%one = s32[]{:T(128)} constant(1)",
            "%three = s32[]{:T(128)} constant(3)",
            f"%j = s32[]{{:T(128)}} {body}",
            "%r = f32[8]{0} all-reduce(%y), replica_groups={{0,1},{2,3},{4,5},{6,7}}",
            "ROOT %t = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8]{0}) tuple(%j, %n, %r)",
        ],
    )
    (found,) = hlo.collectives(program, abstract(CUBE))
    return found.count


@pytest.mark.parametrize(
    "settings, times",
    [
        (dict(condition="compare(%i, %seven), direction=LT"), 5),
        (dict(condition="compare(%seven, %i), direction=GT"), 5),
        (dict(condition="compare(%i, %n), direction=LT"), 12),  # a limit that is handed round
        (dict(condition="compare(%i, %n), direction=LT", body="add(%three, %i)"), 4),
        (dict(condition="compare(%i, %seven), direction=LT", start="constant(9)"), 0),
        (dict(condition="compare(%i, %seven), direction=LT", start="add(%a, %b)"), None),
        (dict(condition="compare(%i, %seven), direction=LT", body="multiply(%i, %three)"), None),
        (dict(condition="compare(%i, %seven), direction=NE"), None),
        (dict(condition="fusion(%p), kind=kLoop, calls=%c"), None),
        (
            dict(
                condition="fusion(%p), kind=kLoop, calls=%c",
                extra=', backend_config={"known_trip_count":{"n":"89"},"known_init_step":{"init":"0","step":"1"}}',
            ),
            89,
        ),
    ],
)
def test_how_often_a_loop_runs(settings, times):
    assert loop(**settings) == times


def test_a_branch_may_not_be_taken():
    branch = ["ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}"]
    line = "ROOT %c = f32[8]{0} conditional(%p, %a, %b), branch_computations={%left, %right}"
    found = hlo.collectives(text(line, left=branch, right=["ROOT %n = f32[8]{0} negate(%p)"]), abstract(CUBE))
    assert [c.count for c in found] == [None]


@pytest.mark.parametrize(
    "kind, axes, sent",
    [
        ("all-gather", ("expert",), 750),
        ("reduce-scatter", ("expert", "tensor"), 875),
        ("all-reduce", ("expert",), 1500),
        ("all-to-all", ("tensor",), 500),
        ("ragged-all-to-all", ("expert",), 750),
        ("collective-permute", ("tensor",), 1000),
        ("all-gather", ("?",), 1000),
        ("all-reduce", ("?",), 2000),
    ],
)
def test_bytes_that_a_device_sends(kind, axes, sent):
    assert hlo.sent_bytes(Collective(kind, axes, 1000), abstract("expert=4,tensor=2")) == sent


def test_report_of_a_step():
    m, half, spec = mesh(CUBE), 32 * 64 * 4, P("data", None)
    step = lambda x, y: (x + 1, y @ lax.all_gather(y, "data", tiled=True))
    step = jax.shard_map(step, mesh=m, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(m, spec))
    r = hlo.report(jax.jit(step, donate_argnums=0).lower(x, x).compile(), m)
    assert (r.argument_bytes, r.alias_bytes) == (2 * half, half)
    assert 0 <= r.output_bytes - 2 * half < 64  # and the pointers of the two
    assert 2 * half <= r.temp_bytes < 3 * half  # the whole of y
    assert r.total_bytes == r.output_bytes + half + r.temp_bytes
    assert r.flops is not None and 2 * 32 * 64 * 64 <= r.flops < 2.1 * 32 * 64 * 64
    assert r.accessed_bytes is not None and r.accessed_bytes >= 6 * half
    same(r.collectives, [Collective("all-gather", ("data",), 2 * half, 1, "all_gather", "f32", (64, 64))])


def test_xla_counts_the_body_of_a_loop_once():  # if this fails, Report's docstring is no longer true
    step = lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    place = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    m = mesh("data=1")
    few, many = (hlo.report(jax.jit(step).lower(place(64, 64), place(n, 64, 64)).compile(), m).flops for n in (2, 10))
    assert few is not None and few == many and 2 * 64**3 <= few < 2.1 * 64**3


def test_big_buffers():
    program = text(
        "%p = bf16[4096,1024]{1,0} parameter(0)",
        "%bitcast.1 = bf16[1024,4096]{1,0} bitcast(%p)",
        "%copy.1 = bf16[4096,1024]{0,1:T(8,128)(2,1)} copy(%p)",
        "%copy.2 = bf16[4096,1024]{0,1:T(8,128)(2,1)} copy(%p)",
        "%fusion.1 = f32[512,1024]{1,0} fusion(%copy.1), kind=kLoop, calls=%inside",
        "%fusion.2 = bf16[4096,1024]{1,0} fusion(%p, %u), kind=kLoop, calls=%update",
        "%small = f8e4m3fn[1024,1023]{1,0} convert(%p)",
        "ROOT %t = (f32[512,1024]{1,0}) tuple(%fusion.1)",
        inside=["ROOT %wide = f32[4096,4096]{1,0} convert(%copy)"],
        update=["ROOT %put = bf16[4096,1024]{1,0} dynamic-update-slice(%p, %u, %i, %j)"],
    )
    assert hlo.big_buffers(program, 1 << 20) == [
        hlo.Buffer(8 << 20, "bf16[4096,1024]", "copy"),
        hlo.Buffer(2 << 20, "f32[512,1024]", "fusion"),
    ]


def test_roofline_of_gpus_on_two_hosts():
    slow = Chip("a GPU", "cuda", 80 * 10**9, 2e12, 1e15, 2e15, link=400e9, network=50e9, host=8)
    m = abstract("data=2,expert=4,tensor=2")
    found = [
        Collective("all-gather", ("expert",), 4_000_000, 10),  # 3 MB in a host
        Collective("all-reduce", ("data",), 1_000_000, 2),  # 1 MB between them
        Collective("collective-permute", ("tensor",), 400_000, None),
    ]
    r = hlo.roofline(3e12, 8e9, found, slow, m)
    assert (r.compute, r.memory) == (3e-3, 4e-3)
    assert r.network == pytest.approx(10 * 3e6 / 400e9 + 2 * 1e6 / 50e9 + 0.4e6 / 400e9, rel=1e-9)
    assert r.seconds == 4e-3
    assert hlo.roofline(0, 0, [Collective("all-gather", ("?",), 50_000)], slow, m).network == pytest.approx(1e-6)


def test_roofline_of_tpus_in_one_slice():
    fast = Chip("a TPU", "tpu", 80 * 10**9, 2e12, 1e15, 2e15, link=400e9, network=1, host=4)
    for m in (mesh("expert=8"), abstract("expert=8")):
        r = hlo.roofline(0, 0, [Collective("all-gather", ("expert",), 800_000)], fast, m)
        assert r.seconds == r.network == pytest.approx(700_000 / 400e9)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "7x:2x2x1", "h100:8"])
def test_collectives_in_nested_loops_elsewhere(name):
    m = mesh(CUBE, topology(name))
    same(hlo.collectives(compiled(nested, m, (64, 128), name), m), NESTED)


def between_slices(x):
    """Every kind of exchange between two slices, the first in a loop of 3."""
    x = lax.scan(lambda c, _: (lax.psum(c, "data") * 0.5, None), x, None, length=3)[0]
    x = lax.psum_scatter(jnp.tanh(lax.all_gather(x, "data", tiled=True)), "data", tiled=True)
    return lax.ppermute(lax.all_to_all(jnp.tanh(x), "data", 0, 0, tiled=True), "data", [(0, 1), (1, 0)])


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v5e:2x2:2", "v5p:2x2x1:2"])
def test_what_goes_between_slices_is_counted(name):
    m = mesh("data=2,expert=4", topology(name))
    found = hlo.collectives(compiled(between_slices, m, (1024, 512), name), m)
    one = 128 * 512 * 4
    assert sorted((c.kind, c.axes, c.bytes, c.count) for c in found) == [
        ("all-gather", ("?",), 2 * one, 1),
        ("all-reduce", ("?",), one, 3),
        ("all-to-all", ("?",), one, 1),
        ("collective-permute", ("?",), one, 1),
        ("reduce-scatter", ("?",), 2 * one, 1),
    ]
    facts = chip(name)
    sent = sum((c.count or 0) * hlo.sent_bytes(c, m) for c in found)
    assert hlo.roofline(0, 0, found, facts, m).network == pytest.approx(sent / facts.network)


@pytest.mark.aot
def test_two_hosts_of_gpus():
    m = mesh("data=2,expert=4,tensor=2", topology("h100:16"))
    step = lambda x: (
        lax.psum_scatter(lax.all_gather(x, "expert", tiled=True), "expert", tiled=True) + lax.psum(x, "data")
    )
    r = hlo.report(compiled(step, m, (64, 128), "h100:16"), m)
    assert sorted((c.kind, c.axes, c.bytes) for c in r.collectives) == [
        ("all-gather", ("expert",), 32 * 128 * 4),
        ("all-reduce", ("data",), 8 * 128 * 4),
        ("reduce-scatter", ("expert",), 32 * 128 * 4),
    ]
    assert r.argument_bytes == r.output_bytes == 8 * 128 * 4 and r.temp_bytes > 0 and r.flops is None
