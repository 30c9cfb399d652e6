"""From logits to the next token, on the device: temperature, top-k, top-p, min-p, repetition penalty."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from glm_jax.errors import UsageError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose, as scalars on the device: another value is not another compilation.

    The fields hold arrays, and, as those of any pytree, whatever jax puts in their place (specs, say)."""

    temperature: Any  # 0: the likeliest token
    top_k: Any  # 0: all
    top_p: Any  # 1: all
    min_p: Any  # 0: all
    repetition_penalty: Any  # 1: none
    token_limit: Any  # ids from here on are never chosen

    @classmethod
    def of(cls, temperature, top_k, top_p, min_p, repetition_penalty, token_limit) -> "Sampling":
        """Checked: raises UsageError naming the flag, the value and the range."""
        values = {
            "temperature": temperature,
            "top-k": top_k,
            "top-p": top_p,
            "min-p": min_p,
            "repetition-penalty": repetition_penalty,
        }
        for flag, value in values.items():
            if not isinstance(value, int | float | np.number):
                raise UsageError(f"--{flag} {value!r}: must be a number")
        for flag, value, good, span in (
            ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
            ("top-k", top_k, 0 <= top_k < 2**31 and top_k == int(top_k), "a whole number, 0 for all"),
            ("top-p", top_p, 0 < top_p <= 1, "above 0, up to 1"),
            ("min-p", min_p, 0 <= min_p < 1, "from 0, below 1"),
            ("repetition-penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "above 0"),
        ):
            if not good:
                raise UsageError(f"--{flag} {value}: must be {span}")
        floats = (np.float32(v) for v in (temperature, top_p, min_p, repetition_penalty))
        temperature, top_p, min_p, repetition_penalty = floats
        return cls(temperature, np.int32(top_k), top_p, min_p, repetition_penalty, np.int32(token_limit))


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, seen: Bool[Array, "B V"], keys, positions: Int[Array, "B"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The next token of each row, and its log-probability under the model's own distribution.

    A row's randomness is its own key [B] and its position: it does not depend on the other rows. The filters come in
    transformers' order, each on what the one before left: penalty, temperature, top-k, top-p, min-p."""
    s, logits = sampling, logits.astype(jnp.float32)
    penalised = jnp.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
    scores = jnp.where(seen, penalised, logits)
    scores = jnp.where(jnp.arange(logits.shape[-1]) < s.token_limit, scores, -jnp.inf)
    # From the largest down: divided by a temperature near 0 anything above 0 would be infinite.
    cooled = lambda scores: (scores - scores.max(-1, keepdims=True)) / s.temperature
    draw = jax.vmap(lambda key, position, row: jax.random.categorical(jax.random.fold_in(key, position), row))

    def greedy(scores):
        return jnp.argmax(scores, -1)

    def plain(scores):
        return draw(keys, positions, cooled(scores))

    def filtered(scores):
        order = jnp.argsort(-scores, -1, stable=True)
        scores = jnp.take_along_axis(cooled(scores), order, -1)
        rank = jnp.arange(scores.shape[-1])
        scores = jnp.where((rank < s.top_k) | (s.top_k == 0), scores, -jnp.inf)
        p = jax.nn.softmax(scores, -1)
        before = jnp.cumsum(p, -1) - p
        scores = jnp.where((before < s.top_p) | (s.top_p >= 1) | (rank == 0), scores, -jnp.inf)
        p = jax.nn.softmax(scores, -1)
        scores = jnp.where(p >= s.min_p * p[:, :1], scores, -jnp.inf)
        return jnp.take_along_axis(order, draw(keys, positions, scores)[:, None], -1)[:, 0]

    filters = (s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)  # sorting a vocabulary costs more than the rest together
    how = jnp.where(s.temperature == 0, 0, jnp.where(filters, 2, 1))
    token = jax.lax.switch(how, (greedy, plain, filtered), scores).astype(jnp.int32)
    logprob = jnp.take_along_axis(logits, token[:, None], -1)[:, 0] - jax.nn.logsumexp(logits, -1)
    return token, logprob
