"""A few rows times a matrix of a stack, read from where it lies.

Decoding reads every weight once for a few rows, so what counts is how fast they are read. XLA on CPU copies a matrix
out of its stack before it multiplies it. A sum of products of 16 columns each is a fusion into which it takes the
slicing, and which it vectorises. Measured on two cores of a CPU with AVX-512, float32, one [768, 1024] after the other
out of 800 MB, in ms (a matmul: 0.20 for one row, 0.31 for eight):

    rows    1     2     4     8
    ms      0.12  0.13  0.19  0.26"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FEW = 8  # rows up to which this is faster than a copy and a matmul
CHAINS = 4  # partial sums: one would wait for its own last addition
SUMS = 2**25  # numbers that may wait for their last sum, 128 MiB: a large vocabulary's head has more


def is_few(rows: int, dtype) -> bool:
    """Whether so many rows multiply with `few_rows` on a CPU."""
    return rows <= FEW and dtype == jnp.float32


@jax.custom_vjp  # strip by strip, a gradient takes ten times as long to compile and more memory
def few_rows(x: Float[Array, "M K"], w: Float[Array, "G N K"], i: "int | Int[Array, '']") -> Float[Array, "M N"]:
    """`x @ w[i].T` in float32. A plain matmul where K does not divide into strips."""
    (h, K), N, width = x.shape, w.shape[1], _width(x.shape[1])
    if not width or N * h * width > SUMS:
        return x @ w[i].T
    columns = lambda k: jax.lax.dynamic_slice(w, (i, 0 * i, 0 * i + k), (1, N, width))[0]
    terms = [columns(k)[:, None] * x[None, :, k : k + width] for k in range(0, K, width)]
    add = functools.partial(functools.reduce, jnp.add)
    y = add(add(terms[c::CHAINS]) for c in range(min(CHAINS, len(terms))))
    y = jax.lax.dot_general(y.reshape(N * h, width), jnp.ones(width, jnp.float32), (((1,), (0,)), ((), ())))
    return y.reshape(N, h).T


def _backward(saved, dy):
    x, w, i = saved
    return dy @ w[i], jnp.zeros_like(w).at[i].set(dy.T @ x), None


few_rows.defvjp(lambda x, w, i: (few_rows(x, w, i), (x, w, i)), _backward)


def _width(K):  # of the strips, 0 for none: 64 terms at most, since each is a part of the program
    return next((n for n in (16, 32, 64, 128, 256, 8) if K % n == 0 and K <= 64 * n), 0)
