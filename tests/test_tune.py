"""Measured tiles: which a kernel takes, and the tuner that writes them."""

import json
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from test_triton import BFLOAT16, E4M3, H100, weights

from glm_jax.kernels import experts, mosaic, tiles, triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import tune  # noqa: E402 # pyright: ignore[reportMissingImports]

SHARED = 232_448
N, K = 3072, 5120
ONE = {
    "kernels": "triton",
    "kernel": "gate_up",
    "axis": 1,
    "weights": "bfloat16",
    "states": "bfloat16",
    "rows": 12,
    "N": N,
    "K": K,
}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Writes entries as what was measured on an H100."""
    monkeypatch.setattr(tiles, "MEASURED", tmp_path)

    def put(*entries):
        tune.write(tmp_path / f"{H100}.json", [ONE | e for e in entries])
        tiles.entries.cache_clear()

    yield put
    tiles.entries.cache_clear()


def by_triton(mean=12, n=N, k=K, wide=BFLOAT16, device=H100):
    return tiles.tile("gate_up", device, SHARED, mean, n, k, BFLOAT16, wide)


def by_mosaic(mean=12, train=False, n=N, k=K):
    """As the experts' plan has it: the device's kind on its way too."""
    plan = experts.Plan(mosaic, H100, 1, 1, train=train)
    return plan.tile("gate_up", mean, n, k, weights(1, k), weights(1, n, k))


def test_the_nearest_measured_tile_is_taken(measured):
    made = {rows: [16, 64, 64, 4, stages] for rows, stages in ((0.4, 5), (3, 2), (50, 3))}
    measured(*({"rows": rows, "tile": tile} for rows, tile in made.items()))
    for mean, rows in ((0.05, 0.4), (2, 3), (8, 3), (60, 50), (200, 50)):
        assert by_triton(mean) == triton.Tile(*made[rows])
    assert by_triton(2, n=N // 2) == triton.Tile(*made[3])  # experts over two devices of the axis tensor
    rule = lambda mean, n, wide: tiles.rule("gate_up", SHARED, mean, n, K, BFLOAT16, wide)
    for mean, n, wide in ((800, N, BFLOAT16), (2, N // 4, BFLOAT16), (2, N, E4M3)):  # nothing near them
        assert by_triton(mean, n, wide=wide) == rule(mean, n, wide)
    assert by_triton(2, device="NVIDIA H200") == rule(2, N, BFLOAT16)
    read = lambda axis: tiles.tile("matmul", H100, SHARED, 12, N, K, BFLOAT16, BFLOAT16, axis)
    measured({"kernel": "matmul", "axis": 0, "tile": [32, 64, 64, 4, 2]})
    assert read(0) == triton.Tile(32, 64, 64, 4, 2) != read(1)  # a matrix that is read the other way is another's


@pytest.mark.parametrize(
    "tile",
    [
        [16, 64, 64, 4],
        [16, 64, 64, 4, 3.0],
        [16, 96, 64, 4, 3],
        [8, 64, 64, 4, 3],
        [16, 1024, 16, 4, 2],  # 1536 of gate, 1536 of up
        [16, 64, 2048, 4, 2],
        [128, 128, 128, 8, 5],  # 500 KB
        [16, 64, 64, 4, 0],
    ],
)
def test_a_measured_tile_that_does_not_fit_is_not_taken(measured, tile):
    measured({"tile": tile}, {"tile": [16, 32, 32, 4, 3], "rows": 3})
    assert by_triton() == triton.Tile(16, 32, 32, 4, 3)  # the next one
    measured({"tile": tile})
    assert by_triton() == tiles.rule("gate_up", SHARED, 12, N, K, BFLOAT16, BFLOAT16)


def test_measured_tiles_of_mosaic_keep_their_height(measured):
    """16 rows where tokens are few; training has 64 at least, for all kernels of a pass."""
    rule = lambda mean, train: mosaic.rule("gate_up", 132, mean, N, K, BFLOAT16, BFLOAT16, train)
    entry = lambda rows, height, *tile: {"kernels": "mosaic", "rows": rows, "height": height, "tile": tile}
    measured(entry(12, 16, 64, 128, 3), entry(50, 64, 64, 64, 2), {"tile": [16, 64, 64, 4, 3]})
    assert by_mosaic() == (16, 64, 128, 3, 132)
    assert by_mosaic(train=True) == by_mosaic(50) == (64, 64, 64, 2, 132)
    assert by_mosaic(200) == rule(200, False)  # 128 rows high, and none of those was measured
    unfit = [(64, 128), (64, 64, 64, 3), (96, 64, 3), (64, 96, 3), (128, 256, 8), (64, 64, 1), (64, 64, 3.0)]
    for tile in unfit:
        measured(entry(12, 16, *tile))
        assert by_mosaic() == rule(12, False), tile
    measured(entry(12, 16, 128, 64, 3))
    assert by_mosaic(n=N // 2 + 128).n == 64  # 832 columns of gate


def test_tuning_goes_on_where_it_stopped(tmp_path, capsys):
    file, asked = tmp_path / "measured" / "here.json", []
    model = tune.Model(16, 2, 32, 64)
    buckets = tune.plan([model], (3, 12), "float8_e4m3fn")[:5]
    keys = lambda: [{name: e[name] for name in b.key} for b in buckets for e in json.loads(file.read_text())]

    def measure(bucket, stop=None):
        asked.append(bucket)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return bucket.key | {"tile": [len(asked)]}

    with pytest.raises(KeyboardInterrupt):
        tune.tuned(file, buckets, lambda b: measure(b, 3), False, time.monotonic() + 60)
    assert len(json.loads(file.read_text())) == 2 and all(b.key in keys() for b in buckets[:2])
    asked.clear()
    assert tune.tuned(file, buckets, measure, False, time.monotonic() - 1) == buckets[2:] and not asked

    def fails(bucket):
        if bucket == buckets[2]:
            raise RuntimeError("no tile\nruns")
        return measure(bucket)

    assert tune.tuned(file, buckets, fails, False, time.monotonic() + 60) == [buckets[2]]
    assert "none: RuntimeError: no tile runs" in capsys.readouterr().out and asked == buckets[3:]
    assert tune.tuned(file, buckets, measure, True, time.monotonic() + 60) == []
    assert asked == buckets[3:] + buckets and len(json.loads(file.read_text())) == 5
    assert [p.name for p in file.parent.iterdir()] == ["here.json"]


def test_candidates_fit(monkeypatch):
    """Every tile that is tried is one that a kernel would take; the rule's stands first."""
    monkeypatch.setattr(tune, "cores", lambda: 132)
    for bucket in tune.plan([tune.model_of("glm-4.6"), tune.model_of("glm-4.5-air")], tiles.ROWS, "float8_e4m3fn"):
        rule, tried = tune.rule(bucket, SHARED), tune.candidates(bucket, SHARED)
        assert 5 <= len(tried) <= 100
        assert tune.made_of(bucket, tried[0], SHARED) == rule
        of = bucket.N, bucket.K, jnp.dtype(bucket.states), jnp.dtype(bucket.weights)
        for sizes in tried:
            if bucket.kernels == "triton":
                assert tiles.fits(bucket.kernel, list(sizes), SHARED, *of), (bucket, sizes)
            else:
                assert mosaic.fits(bucket.kernel, list(sizes), rule.m, *of), (bucket, sizes)


@pytest.mark.slow
def test_the_tuner_runs_dry(monkeypatch, capsys, measured):
    monkeypatch.setattr(triton, "INTERPRET", False)
    assert tune.main(["--dry"]) == 0
    said = capsys.readouterr().out
    assert "buckets, none: Mosaic's kernels need" in said and " 0 are left" in said
    found = json.loads(Path(said.splitlines()[-1].split(": ")[0]).read_text())
    measured(*found)
    for e in found:
        x, w = jnp.dtype(e["states"]), jnp.dtype(e["weights"])
        made = tiles.tile(e["kernel"], H100, SHARED, e["rows"], e["N"], e["K"], x, w, e["axis"])
        assert e["ms"] > 0 and e["out"] == 0 and list(vars(made).values()) == e["tile"]
