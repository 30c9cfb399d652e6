"""Text from a model: one compiled step over a donated cache, for prompts and for single tokens alike."""

import dataclasses
import functools
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax.cache import Cache
from glm_jax.errors import UsageError
from glm_jax.model import GLM, PREFILL_CHUNK, bucket, cached_heads, checked_ids, in_mesh, padded_rows
from glm_jax.parsing import ResponseStream
from glm_jax.planner import refuse_if_no_room
from glm_jax.processes import everywhere, placed
from glm_jax.sample import Sampling, sample
from glm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Response:
    """What one token brought. Joined over the stream, `text` is the answer as written, tags and all; `reasoning`,
    `content` and `tool_calls` are the same split up."""

    text: str
    token: int
    logprob: float  # of the model's own distribution, before temperature
    finish_reason: str | None  # "stop" or "length", in the last one
    reasoning: str
    content: str
    tool_calls: list[dict]  # each {"name", "arguments"}, when it is complete
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float  # tokens a second; compiling is in it the first time a shape is seen
    generation_tps: float
    peak_memory: int  # bytes on the fullest device; on CPU of the process


def generate(model: GLM, tokenizer: Tokenizer | None, prompt, **options) -> str:
    """The whole answer to a prompt as text, with its tags; `parse_response` splits it. Options as stream_generate."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, **options))


def stream_generate(
    model: GLM,
    tokenizer: Tokenizer | None,
    prompt,
    max_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: "str | Sequence[str]" = (),
    seed: int = 0,
    tools: list[dict] | None = None,
    enable_thinking: bool = True,
    raw: bool = False,
) -> Iterator[Response]:
    """The answer to a prompt, token by token.

    `prompt` is text (one user turn if the tokenizer has a chat template and the folder does not ask for plain text,
    unless `raw`), a list of messages, or a list of ids. Ends at a stop id, at one of the strings in `stop` (which is
    not part of the text), or after `max_tokens`. Raises UsageError for an empty prompt, one that is longer than the
    model's context, or an option out of range."""
    if tokenizer is None:
        raise UsageError("this folder has no tokenizer: use generate_ids, which needs none")
    if not hasattr(stop, "__iter__"):
        raise UsageError(f"--stop {stop!r}: must be a text or a list of texts")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stop):
        raise UsageError("--stop: a stop string must not be empty")
    ids, in_thought = _prompt_ids(tokenizer, prompt, tools, enable_thinking, raw)
    begin = time.perf_counter()
    steps = generate_steps(model, [ids], max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed)
    stop_ids = set(model.config.eos_token_id)
    decoder, stops = tokenizer.stream(), _StopStrings(stop)
    parser = ResponseStream(tokenizer.format, tools, in_thought)
    prompt_tps, first = 0.0, begin
    limit = _limit(model, len(ids), max_tokens)
    if not limit:
        _table(model, [ids])  # a wrong prompt is an error also where no token is wanted
        return
    for n, (tokens, logprobs) in enumerate(steps, 1):
        now = time.perf_counter()
        if n == 1:
            prompt_tps, first = len(ids) / (now - begin), now
        token = int(tokens[0])
        ended = token in stop_ids
        text = stops.add("" if ended else decoder.add(token))
        finish = "stop" if ended or stops.found else "length" if n == limit else None
        if finish and not stops.found:
            text += stops.add(decoder.finish()) + stops.finish()
            finish = "stop" if stops.found else finish
        parts = [parser.add(text)] + ([parser.finish()] if finish else [])
        yield Response(
            text=text,
            token=token,
            logprob=float(logprobs[0]),
            finish_reason=finish,
            reasoning="".join(p.reasoning for p in parts),
            content="".join(p.content for p in parts),
            tool_calls=[call for p in parts for call in p.tool_calls],
            prompt_tokens=len(ids),
            generation_tokens=n,
            prompt_tps=prompt_tps,
            generation_tps=(n - 1) / (now - first) if n > 1 else 0.0,
            peak_memory=peak_memory(model),
        )
        if finish:
            return


def generate_ids(
    model: GLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 24,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: "int | Sequence[int]" = 0,
    stop_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new ids of each row of prompts, which may be of unequal length.

    A row ends after a stop id, which is included (default: the model's; () switches them off), or after `max_tokens`.
    What a row gets depends on its prompt and its seed alone: rows of one prompt and one seed get the same answer, so
    give a list of seeds, one a row, to draw several."""
    if stop_ids is not None and not hasattr(stop_ids, "__iter__"):
        raise UsageError(f"stop_ids is {stop_ids!r}: must be a list of ids")
    stop = set(model.config.eos_token_id if stop_ids is None else stop_ids)
    _table(model, prompts)  # wrong prompts are errors also where no token is wanted
    rows: list[list[int]] = [[] for _ in prompts]
    limits = [_limit(model, len(prompt), max_tokens) for prompt in prompts]
    open_rows = {i for i, limit in enumerate(limits) if limit}
    if not open_rows:
        return rows
    options = (temperature, top_p, top_k, min_p, repetition_penalty, seed)
    for tokens, _ in generate_steps(model, prompts, max_tokens, *options):
        for i in list(open_rows):
            rows[i].append(int(tokens[i]))
            if rows[i][-1] in stop or len(rows[i]) == limits[i]:
                open_rows.remove(i)
        if not open_rows:
            break
    return rows


def generate_steps(
    model: GLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: "int | Sequence[int]" = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The next token and its log-probability for every row, step by step, `max_tokens` times: (ids [B], logprobs [B]).

    The device works on the next step while the caller looks at this one."""
    sampling = Sampling.of(temperature, top_k, top_p, min_p, repetition_penalty, model.token_limit)
    table, lengths = _table(model, prompts)
    longest, chunks = int(lengths.max()), -(-table.shape[1] // PREFILL_CHUNK)
    steps = max(_limit(model, len(p), max_tokens) for p in prompts)
    rows = table.shape[0]
    seeds = [int(s) for s in seed] if np.ndim(seed) else [int(seed)] * len(prompts)  # type: ignore[union-attr, arg-type]
    if len(seeds) != len(prompts):
        raise UsageError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed, or one a prompt")
    keys = jnp.stack([jax.random.key(s % 2**32) for s in seeds + [0] * (rows - len(seeds))])
    seen = np.zeros((rows, model.config.vocab_size), bool)
    for row, prompt in zip(seen, prompts, strict=False):
        row[np.asarray(prompt)] = True
    graph, state = nnx.split(model)
    size = min(bucket(longest + steps, 64), model.config.max_position_embeddings)
    refuse_if_no_room(model, rows, size)
    cache = model.cache(rows, size)
    # The arguments of every step have one sharding from the first on, or the second would be compiled again.
    place = lambda a, *axes: placed(a, jax.NamedSharding(model.mesh, model.rules(*axes)))
    keys, seen = place(keys, "batch"), place(seen, "batch", None)
    sampling = placed(sampling, jax.NamedSharding(model.mesh, jax.P()))
    real = np.arange(rows) < len(prompts)  # the rest only fills the mesh: no token of it is worked on
    token, logprob = place(np.zeros((rows, 1), np.int32), "batch", None), place(np.zeros(rows, np.float32), "batch")
    for chunk in range(chunks):
        start = chunk * PREFILL_CHUNK
        ids = table[:, start : start + PREFILL_CHUNK]
        advance = np.where(real, np.clip(lengths - start, 0, ids.shape[1]), 0).astype(np.int32)
        ends = real & (lengths > start) & (lengths <= start + ids.shape[1])  # prompts whose last token is in this chunk
        ids, advance, ends = place(ids, "batch", None), place(advance, "batch"), place(ends, "batch")
        token, logprob, cache, seen = _step(
            graph,
            state,
            cache,
            seen,
            ids,
            advance,
            ends,
            token,
            logprob,
            sampling,
            keys,
            chunk == 0 and ids.shape[1] > 1,
        )
    one, real = place(real.astype(np.int32), "batch"), place(real, "batch")
    # A copy is asked for before the next step is under way, or it would come after it.
    readable = everywhere if model.mesh.is_multi_process else lambda step: step
    ahead = readable((token, logprob))
    for n in range(steps):
        if n:
            token, logprob, cache, seen = _step(
                graph, state, cache, seen, token, one, real, token, logprob, sampling, keys, False
            )
            after = readable((token, logprob))
            yield _on_host(ahead, len(prompts))
            ahead = after
    if steps:
        yield _on_host(ahead, len(prompts))


def _on_host(step, rows):
    tokens, logprobs = step
    return np.asarray(tokens)[:rows, 0], np.asarray(logprobs)[:rows]


def _next_logits(model: GLM, cache: Cache, ids, advance, fresh: bool) -> tuple[Any, Any]:
    """The logits [B, V] that follow each row's last new token, and the longer cache."""
    x, longer, _ = model.trunk(ids, cache, advance, fresh)
    if ids.shape[1] > 1:  # each row's last state, by a masked sum: a look-up across shards would need collectives
        last = jnp.arange(ids.shape[1]) == advance[:, None] - 1
        x = jnp.where(last[..., None], x, 0).sum(1, keepdims=True)
    return jax.reshard(model.logits(x)[:, 0], model.rules("batch", None)), longer


@functools.partial(jax.jit, static_argnums=(0, 11), donate_argnums=(2, 3))
@in_mesh
def _step(model: GLM, cache: Cache, seen, ids, advance, ends, token, logprob, sampling: Sampling, keys, fresh: bool):
    """ids [B, T], of which row b has `advance[b]` -> the next ids [B, 1] and their log-probabilities [B] in the rows
    whose prompt `ends` [B] with them, elsewhere `token` and `logprob` as they were; the cache, which is empty if
    `fresh`; `seen` ids [B, V]."""
    rules = model.rules
    logits, longer = _next_logits(model, cache, ids, advance, fresh)
    specs = rules("batch", None), rules("batch"), rules("batch", None)

    @functools.partial(jax.sharding.auto_axes, out_sharding=specs)  # sorting and drawing name no shardings
    def choose(logits, seen, keys, positions, ends, token, logprob, sampling):
        new, new_logprob = sample(logits, sampling, seen, keys, positions)
        seen = seen | ((jnp.arange(seen.shape[1]) == new[:, None]) & ends[:, None])  # a scatter would move rows about
        return jnp.where(ends[:, None], new[:, None], token), jnp.where(ends, new_logprob, logprob), seen

    chosen = choose(logits, seen, keys, longer.length, ends, token, logprob, sampling)  # pyright: ignore[reportCallIssue]
    token, logprob, seen = chosen
    return token, logprob, longer, seen


def lower_step(model: GLM, rows: int, tokens: int, slots: int, platform: str | None = None, fresh: bool = True):
    """The step for `rows` rows of `tokens` new tokens each and a cache of `slots`, lowered and not run: for what XLA
    makes of it. The model may be abstract and its devices a description. More than one token is a prompt's first part,
    or if not `fresh` a later one. Without the choice of the token, whose sort of the vocabulary takes a TPU's compiler
    longer than all the rest."""

    def place(dtype, shape, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(model.mesh, model.rules(*axes)))

    c, heads = model.config, cached_heads(model.config, model.mesh, model.rules)
    kv: Any = place(
        c.dtype, (c.num_hidden_layers, rows, heads, slots, c.head_dim), None, "batch", "heads", "slots", None
    )
    row: Any = place(np.int32, (rows,), "batch")
    graph, state = nnx.split(model)
    step = jax.jit(in_mesh(_next_logits), static_argnums=(0, 5), donate_argnums=2)
    traced = step.trace(
        graph, state, Cache(kv, kv, row), place(np.int32, (rows, tokens), "batch", None), row, fresh and tokens > 1
    )
    return traced.lower(lowering_platforms=(platform,) if platform else None)


class _StopStrings:
    """Passes text on until a stop string, and holds back what may be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop, self.held, self.found = stop, "", False

    def add(self, text: str) -> str:
        self.held += text
        # The one complete first, and of several the longest: so it does not matter in which pieces the text came.
        found = [(i + len(s), i) for s in self.stop if (i := self.held.find(s)) >= 0]
        if found:
            text, self.held, self.found = self.held[: min(found)[1]], "", True
            return text
        starts = (n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n]))
        keep = len(self.held) - max(starts, default=0)
        text, self.held = self.held[:keep], self.held[keep:]
        return text

    def finish(self) -> str:
        text, self.held = self.held, ""
        return text


def _prompt_ids(tokenizer: Tokenizer, prompt: Any, tools, enable_thinking: bool, raw: bool) -> tuple[list[int], bool]:
    """The ids of any form of prompt, and whether the answer begins inside a thought."""
    if prompt is None or isinstance(prompt, dict):
        raise UsageError("a prompt is text, a list of messages (dicts with role and content), or a list of ids")
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError("--prompt is empty: there is nothing to go on from")
        if raw or not tokenizer.has_chat_template or (tokenizer.continues_text and not tools):
            return _opened(tokenizer, tokenizer.encode(prompt))
        prompt = [{"role": "user", "content": prompt}]
    if not hasattr(prompt, "__len__"):
        raise UsageError(f"a prompt is text, a list of messages or a list of ids, this is {prompt!r}")
    if len(prompt) and isinstance(prompt[0], dict):
        prompt = tokenizer.chat(prompt, tools=tools, enable_thinking=enable_thinking)
    if not all(isinstance(i, int | np.integer) for i in prompt):
        raise UsageError("a prompt is text, a list of messages (dicts with role and content), or a list of ids")
    return _opened(tokenizer, [int(i) for i in prompt])


def _opened(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], bool]:
    """The ids, and whether they end with an open thought, as a GLM-4.7 prompt does."""
    return ids, bool(ids) and tokenizer.decode(ids[-1:]) == "<think>"


def _table(model: GLM, prompts) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as a table padded to a bucket [rows, T], and their lengths [rows]."""
    if not hasattr(prompts, "__len__") or not len(prompts):
        raise UsageError("no prompts: give a list with a list of ids for each prompt")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not hasattr(prompt, "__len__"):
            raise UsageError(f"prompt {i} is {prompt!r}: give a list with a list of ids for each prompt")
        if not len(prompt):
            raise UsageError(f"prompt {i} is empty: there is nothing to go on from")
        checked_ids([prompt], model.config.vocab_size)
    longest, limit = max(map(len, prompts)), model.config.max_position_embeddings
    if longest > limit:
        raise UsageError(f"the prompt has {longest} tokens, this model's context is {limit}: shorten it")
    rows = padded_rows(model, len(prompts))
    chunks = (longest - 1) // PREFILL_CHUNK  # whole ones, and a bucket for the rest
    table = np.zeros((rows, chunks * PREFILL_CHUNK + bucket(longest - chunks * PREFILL_CHUNK)), np.int32)
    for row, prompt in zip(table, prompts, strict=False):
        row[: len(prompt)] = prompt
    lengths = [len(p) for p in prompts] + [1] * (rows - len(prompts))
    return table, np.asarray(lengths, np.int32)


def _limit(model: GLM, prompt_tokens: int, max_tokens: int) -> int:
    """How many tokens can follow: what was asked for, or what is left of the context."""
    if not isinstance(max_tokens, int | np.integer) or max_tokens < 0:
        raise UsageError(f"--max-tokens {max_tokens}: must be a whole number, 0 or more")
    # The last token is answered, not read, so it needs no place.
    return max(0, min(max_tokens, model.config.max_position_embeddings - prompt_tokens + 1))


def peak_memory(model: GLM) -> int:
    """The most bytes that were in use on any device of the model; on CPU, by the process."""
    devices = [d for d in model.mesh.devices.flat if d.process_index == jax.process_index()]
    stats = [d.memory_stats() or {} for d in devices]
    if all("peak_bytes_in_use" in s for s in stats):
        return max(s["peak_bytes_in_use"] for s in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
