"""The matmuls of routed experts and of few rows. Arrays in, arrays out: no mesh, no rule and no config comes in here.

Inside a `shard_map` every array is one device's share. Shapes: T tokens, k experts a token, L layers, E experts, G the
matrices of a stack, D model width, F expert width, M rows, N and K the sides of a matmul."""

from glm_jax.kernels.choice import IMPLEMENTATIONS, choose
from glm_jax.kernels.experts import grouped_matmul, routed_experts, rows_at_once
from glm_jax.kernels.few_rows import few_rows, is_few

__all__ = ["IMPLEMENTATIONS", "choose", "few_rows", "grouped_matmul", "is_few", "routed_experts", "rows_at_once"]
