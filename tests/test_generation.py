"""Generation: the cache, batches, sampling, stopping, limits, and that nothing is compiled twice."""

import dataclasses
import itertools
import json
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from golden import look
from jax.sharding import AxisType, Mesh
from make_tokenizer import write_tokenizer

from glm_jax import GLM, generate, generate_ids, generation, stream_generate
from glm_jax.config import tiny
from glm_jax.errors import UsageError
from glm_jax.generation import _StopStrings, generate_steps
from glm_jax.model import _say_padding, in_mesh
from glm_jax.parsing import parse_response
from glm_jax.sample import Sampling, sample
from glm_jax.sharding import AXES
from glm_jax.tokenizer import Tokenizer

SMALL = dict(num_hidden_layers=2, num_nextn_predict_layers=0, n_routed_experts=8, num_experts_per_tok=2)
CONFIG = tiny(**SMALL, max_position_embeddings=64)
PROMPTS = [[5, 9, 2], [17], [3, 3, 3, 88, 100, 4, 120]]
SAMPLED = dict(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
CLOSE = 2e-5  # of the logits' standard deviation
MESHES = ["data=1", "expert=2,tensor=2"]
MOSTLY_ON_A_MESH = [pytest.param(MESHES[0], marks=pytest.mark.slow), MESHES[1]]
mostly_on_a_mesh = pytest.mark.parametrize("model", MOSTLY_ON_A_MESH, indirect=True, scope="module")


@pytest.fixture(scope="module", params=MESHES)
def model(request):
    return GLM(CONFIG, request.param)


@pytest.fixture(scope="module")
def single():
    return GLM(CONFIG, "data=1")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {}
    for form in ("glm-4.6", "glm-4.7"):
        found[form] = Tokenizer.read(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), form))
    return found


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["glm-4.6"]


@pytest.fixture(scope="module")
def writer(tokenizer):
    """A model for the tokenizer: its ids end at 356, its vocabulary at 384."""
    stops = tuple(tokenizer.encode("<|endoftext|><|user|><|observation|>"))
    assert len(stops) == 3
    model = GLM(tiny(**SMALL, vocab_size=384, eos_token_id=stops, max_position_embeddings=64), "data=1")
    model.token_limit = tokenizer.size
    return model


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() < CLOSE * b.std()


# ---- the cache


@mostly_on_a_mesh
def test_token_by_token_equals_the_whole(model):
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12))
    whole, none = model(ids)
    assert none is None
    cache = model.cache(2, 32)
    for i in range(ids.shape[1]):
        logits, cache = model(ids[:, i : i + 1], cache)
        assert close(logits[:, 0], whole[:, i]), i
    assert np.array_equal(cache.length, [12, 12])


@mostly_on_a_mesh
@pytest.mark.parametrize("cut", [pytest.param(1, marks=pytest.mark.slow), 20])
def test_a_prompt_in_two_parts_equals_the_whole(model, cut):
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 23))
    cache = model.cache(2, 32)
    first, cache = model(ids[:, :cut], cache)
    second, cache = model(ids[:, cut:], cache)
    assert close(np.concatenate([first, second], 1), model(ids)[0])
    with pytest.raises(UsageError, match="the cache has 32 slots, 23 are used and 10 tokens are to be added"):
        model(ids[:, :10], cache)


@mostly_on_a_mesh
def test_rows_of_their_own_length(model):
    """Each row's cache goes on from its own end, whatever padding was computed behind it."""
    rng, lengths = np.random.default_rng(2), np.array([3, 9], np.int32)
    rows = [rng.integers(0, CONFIG.vocab_size, (1, n + 1)) for n in lengths]
    table = rng.integers(0, CONFIG.vocab_size, (2, 10))
    for row, ids in zip(table, rows, strict=True):
        row[: ids.shape[1] - 1] = ids[0, :-1]

    def run(model, ids, cache, advance):
        x, cache, _ = model.trunk(ids, cache, advance)
        return model.logits(x), cache

    graph, state = nnx.split(model)
    run = jax.jit(in_mesh(run), static_argnums=0)
    _, cache = run(graph, state, table.astype(np.int32), model.cache(2, 16), lengths)
    assert np.array_equal(cache.length, lengths)
    last = np.concatenate([ids[:, -1:] for ids in rows]).astype(np.int32)
    logits, cache = run(graph, state, last, cache, np.ones(2, np.int32))
    logits = np.asarray(logits)
    for i, ids in enumerate(rows):
        assert close(logits[i, 0], model(ids)[0][0, -1]), i
    assert np.array_equal(cache.length, lengths + 1)


def test_a_cache_that_does_not_belong(single):
    with pytest.raises(UsageError, match="ids has 1 rows, the cache 2"):
        single([[1]], single.cache(2, 16))
    with pytest.raises(UsageError, match="a cache of 3 rows cannot be cut into 2 parts: take 4"):
        GLM(CONFIG, "expert=2", seed=None).cache(3, 16)


def test_a_cache_is_spent_with_the_call(single):
    cache = single.cache(1, 16)
    _, longer = single([[1, 2]], cache)
    assert all(a.is_deleted() for a in jax.tree.leaves(cache))  # its memory is the new one's
    assert not any(a.is_deleted() for a in jax.tree.leaves(longer))
    with pytest.raises(UsageError, match="this cache is spent: go on with the one"):
        single([[4]], cache)


# ---- batches


@mostly_on_a_mesh
@pytest.mark.parametrize("options", [{}, pytest.param(SAMPLED, marks=pytest.mark.slow)], ids=["greedy", "filtered"])
def test_a_prompt_in_chunks_is_the_prompt(model, monkeypatch, options):
    """Chunks of 8, 8 and the rest: prompts end in each of them, at their borders too."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (3, 8, 9, 16, 21, 1)]
    whole = list(generate_steps(model, prompts, 5, **options))
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 8)
    for step, want in zip(generate_steps(model, prompts, 5, **options), whole, strict=True):
        assert np.array_equal(step[0], want[0])
        np.testing.assert_allclose(step[1], want[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("cut", MOSTLY_ON_A_MESH)
def test_padding_is_no_experts_work(cut):
    """NaN in every expert that no token chose but padding would: it would be among the values that the next layer
    attends to, where a weight of zero does not take it away."""
    config = tiny(**SMALL | dict(num_hidden_layers=3, n_routed_experts=16))
    ids = [[5, 9, 2]]
    layers = look(GLM(config, "data=1"), np.pad(ids, ((0, 0), (0, 13)))).experts[:, 0]
    chosen = [set(layer[:3].ravel()) for layer in layers]
    assert all(set(layer[3:].ravel()) - own for layer, own in zip(layers, chosen, strict=True))
    model = GLM(config, cut)
    want = np.asarray(model(ids)[0])
    for weight in (model.moe.mlp.gate_up, model.moe.mlp.down):
        array = np.array(weight[...])
        for layer, own in zip(array, chosen, strict=True):
            layer[[e for e in range(16) if e not in own]] = np.nan
        weight.set_value(jax.device_put(array, weight[...].sharding))
    assert close(model(ids)[0], want)
    cached, _ = model(ids * 2, model.cache(2, 16))
    assert close(cached[0], want[0])


@pytest.mark.parametrize("options", [{}, SAMPLED, {"temperature": 1.0}], ids=["greedy", "filtered", "plain"])
def test_a_batch_of_unequal_prompts_is_each_alone(model, options):
    together = generate_ids(model, PROMPTS, max_tokens=9, seed=3, **options)
    assert together == [generate_ids(model, [p], max_tokens=9, seed=3, **options)[0] for p in PROMPTS]
    assert all(len(row) == 9 for row in together)


def test_every_mesh_draws_the_same(model, single):
    for options in ({}, SAMPLED):
        want = generate_ids(single, PROMPTS[:2], max_tokens=6, **options)
        assert generate_ids(model, PROMPTS[:2], max_tokens=6, **options) == want


def test_padding_is_said_once(caplog):
    _say_padding.cache_clear()
    model = GLM(CONFIG, "data=2,expert=2,tensor=2")
    for _ in range(2):
        generate_ids(model, [[1, 2, 3]], max_tokens=1)
    assert [r.getMessage() for r in caplog.records] == [
        "1 row padded to 4 for the mesh axes data and expert; --rules latency has more devices work on one row"
    ]
    generate_ids(model, [[1, 2, 3]] * 4, max_tokens=1)
    assert len(caplog.records) == 1
    model([[1, 2]] * 3)
    assert caplog.records[1].getMessage().startswith("3 rows padded to 4 for")


def test_seeds(model):
    draw = lambda seed, prompts: generate_ids(model, prompts, max_tokens=8, temperature=1.0, seed=seed)
    prompts = [PROMPTS[0]] * 3
    three = draw([1, 2, -3], prompts)
    assert len({tuple(row) for row in three}) == 3
    assert three == [draw(seed, prompts[:1])[0] for seed in (1, 2, -3)]
    assert draw([2, 2, 2], prompts) == [three[1]] * 3 == draw(2, prompts)
    with pytest.raises(UsageError, match="2 seeds for 3 prompts"):
        draw([1, 2], prompts)


def test_greedy_is_the_argmax_of_the_uncached_model(model):
    (row,) = generate_ids(model, [PROMPTS[0]], max_tokens=10)
    ids = PROMPTS[0] + row
    logits, _ = model([ids])
    assert np.argmax(logits[0], -1)[len(PROMPTS[0]) - 1 : -1].tolist() == row


def test_logprobs_are_the_models_own(model):
    """Not those of the sampled distribution: no temperature, no penalty, no filter, no mask."""
    steps = list(generate_steps(model, PROMPTS[:2], 6, seed=1, **SAMPLED | {"temperature": 2.5}))
    for i, prompt in enumerate(PROMPTS[:2]):
        new = [int(tokens[i]) for tokens, _ in steps]
        logits, _ = model([prompt + new])
        want = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1], -1)
        np.testing.assert_allclose([p[i] for _, p in steps], np.asarray(want)[range(6), new], atol=2e-5)


# ---- stopping and limits


def test_a_row_ends_after_a_stop_id_and_the_others_go_on(model):
    free = generate_ids(model, PROMPTS, max_tokens=12)
    stop = free[0][4]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert generate_ids(model, PROMPTS, max_tokens=12, stop_ids=[stop]) == cut != free
    assert generate_ids(model, PROMPTS, max_tokens=12, stop_ids=()) == free


@pytest.mark.parametrize("which", [0, 1, 2])
def test_stop_ids_of_the_config_all_stop_and_can_be_switched_off(writer, monkeypatch, which):
    end = writer.config.eos_token_id[which]
    scripted(monkeypatch, [5, 6, end, 7, 8])
    assert generate_ids(writer, [[1]], max_tokens=5) == [[5, 6, end]]
    assert generate_ids(writer, [[1]], max_tokens=5, stop_ids=()) == [[5, 6, end, 7, 8]]
    assert generate_ids(writer, [[1]], max_tokens=5, stop_ids=[6]) == [[5, 6]]


def test_no_tokens(single, writer, tokenizer):
    assert generate_ids(single, PROMPTS, max_tokens=0) == [[], [], []]
    assert generate(writer, tokenizer, "hello", max_tokens=0) == ""
    assert list(stream_generate(writer, tokenizer, "hello", max_tokens=0)) == []


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("more", [1, 2, 100])
def test_a_prompt_longer_than_the_context(single, max_tokens, more):
    with pytest.raises(UsageError, match=f"the prompt has {64 + more} tokens, this model's context is 64: shorten it"):
        generate_ids(single, [[1], [7] * (64 + more)], max_tokens=max_tokens)
    with pytest.raises(UsageError, match=f"the prompt has {64 + more} tokens"):
        generate_ids(single, [[7] * (64 + more)], max_tokens=max_tokens)


@pytest.mark.slow
def test_near_the_end_of_the_context_there_are_fewer_tokens(single, writer, tokenizer):
    rows = generate_ids(single, [[7] * 62, [7] * 64, [1, 2]], max_tokens=6)
    assert [len(row) for row in rows] == [3, 1, 6]
    assert rows[2] == generate_ids(single, [[1, 2]], max_tokens=6)[0]
    logits, _ = single([[7] * 62 + rows[0][:2]])  # the last place of the context is used
    assert int(np.argmax(logits[0, -1])) == rows[0][2]
    steps = list(stream_generate(writer, tokenizer, [7] * 61, max_tokens=100))
    assert len(steps) == 4
    assert [r.finish_reason for r in steps] == [None, None, None, "length"]


@pytest.mark.parametrize(
    "prompts, said",
    [
        ([[]], "prompt 0 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([], "no prompts"),
        ([[1, 128]], "ids run from 1 to 128, the vocabulary from 0 to 127"),
        ([[-1]], "ids run from -1 to -1"),
        (5, "give a list with a list of ids for each prompt"),
        ([1, 2, 3], "prompt 0 is 1: give a list with a list of ids for each prompt"),
        (["abc"], "prompt 0 is 'abc': give"),
    ],
)
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompts_that_cannot_be(single, prompts, said, max_tokens):
    with pytest.raises(UsageError, match=said):
        generate_ids(single, prompts, max_tokens=max_tokens)


@pytest.mark.parametrize(
    "ids, said",
    [
        ([[1, 2], [3]], "rows of unequal length"),
        ([1, 2], "ids must be a table"),
        ([[]], "at least one token"),
        ([[0.5]], "integers"),
        ([[128]], "ids run from 128 to 128, the vocabulary from 0 to 127"),
        (np.array([[-1]]), "ids run from -1"),
    ],
)
def test_ids_that_cannot_be(single, ids, said):
    with pytest.raises(UsageError, match=said):
        single(ids)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"temperature": -0.1}, "--temperature -0.1: must be 0 or more"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"temperature": "warm"}, "--temperature 'warm': must be a number"),
        ({"max_tokens": 2.5}, "--max-tokens 2.5: must be a whole number, 0 or more"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0: must be above 0, up to 1"),
        ({"top_p": 1.1}, "--top-p 1.1"),
        ({"min_p": 1.0}, "--min-p 1.0: must be from 0, below 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0: must be above 0"),
        ({"repetition_penalty": float("inf")}, "--repetition-penalty inf"),
        ({"max_tokens": -1}, "--max-tokens -1: must be a whole number, 0 or more"),
    ],
)
def test_options_out_of_range(single, options, said):
    with pytest.raises(UsageError, match=said):
        generate_ids(single, PROMPTS, **options)


# ---- the sampler, against plain NumPy


def plain(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, limit=None):
    """The probabilities of one row in transformers' order: penalty, temperature, top-k, top-p, min-p."""
    z = np.array(logits, np.float64)
    z[seen] = np.where(z[seen] > 0, z[seen] / repetition_penalty, z[seen] * repetition_penalty)
    z[len(z) if limit is None else limit :] = -np.inf
    z = z / temperature

    def softmax(z):
        e = np.exp(z - z.max())
        return e / e.sum()

    if top_k:
        z[z < np.sort(z)[-min(top_k, len(z))]] = -np.inf
    if top_p < 1:
        order = np.argsort(z)  # ascending, as transformers: the tail that holds no more than 1 - top_p goes
        tail = np.cumsum(softmax(z)[order]) <= 1 - top_p
        tail[-1] = False
        z[order[tail]] = -np.inf
    if min_p:
        p = softmax(z)
        z[p < min_p * p.max()] = -np.inf
    return softmax(z)


LOGITS = np.array([1.3, -0.4, 0.9, 2.1, -1.7, 0.2, 1.9, -0.6, 0.1, 2.6], np.float32)
draw = jax.jit(sample)


def drawn(rows, logits=LOGITS, seen=(), limit=None, **options):
    """Tokens and log-probabilities of so many rows of one distribution, each with its own key."""
    names = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0) | options
    mask = np.zeros((rows, len(logits)), bool)
    mask[:, list(seen)] = True
    sampling = Sampling.of(**names, token_limit=len(logits) if limit is None else limit)
    keys = jax.random.split(jax.random.key(7), rows)
    tokens, logprobs = draw(np.tile(logits, (rows, 1)), sampling, mask, keys, np.arange(rows, dtype=np.int32))
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 50},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"top_p": 0.9, "temperature": 1.7},
        {"min_p": 0.2},
        {"min_p": 0.99},
        {"repetition_penalty": 1.8, "seen": [9, 1, 7]},
        {"repetition_penalty": 0.5, "seen": [0, 4]},
        {"limit": 9},
        {"limit": 3, "top_k": 2},
        {
            "top_k": 6,
            "top_p": 0.8,
            "min_p": 0.15,
            "temperature": 1.3,
            "repetition_penalty": 1.4,
            "seen": [3],
            "limit": 9,
        },
        {"top_k": 3, "top_p": 0.7},  # of the three: another answer if top-p came first
        {"top_p": 0.75, "min_p": 0.4, "temperature": 2.0},
    ],
    ids=str,
)
def test_frequencies_are_those_of_plain_numpy(options):
    rows = 4096
    tokens, logprobs = drawn(rows, **options)
    p = plain(LOGITS, **{"seen": []} | options)
    count = np.bincount(tokens, minlength=len(p))
    assert (count[p == 0] == 0).all()
    expected = p[p > 0] * rows
    chi2 = ((count[p > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5 + 1e-9  # four standard deviations, and the keys are fixed
    own = np.log(plain(LOGITS, []))
    np.testing.assert_allclose(logprobs, own[tokens], atol=1e-6)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}])
def test_ids_past_the_tokenizer_are_never_sampled(options):
    """Even when theirs is the largest logit by far, penalised and the only one that top-k would leave."""
    logits = LOGITS.copy()
    logits[9] = 1e4
    tokens, logprobs = drawn(512, logits, limit=9, seen=[9], repetition_penalty=0.5, **options)
    assert tokens.max() < 9
    assert logprobs.max() < -1e3  # and yet the log-probability is the model's own


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 4, "min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-44])
def test_towards_temperature_0_it_is_greedy(temperature, options):
    assert set(drawn(64, temperature=temperature, **options)[0]) == {9}
    assert set(drawn(64, temperature=0.0, **options)[0]) == {9}


def test_a_very_high_temperature_is_the_uniform_distribution():
    tokens, _ = drawn(4096, temperature=1e30, limit=8)
    assert np.abs(np.bincount(tokens, minlength=10)[:8] - 512).max() < 100 and tokens.max() < 8


def test_greedy_heeds_the_penalty():
    assert set(drawn(1, temperature=0.0, seen=[9], repetition_penalty=3.0)[0]) == {3}


def test_a_rows_draw_is_its_own():
    """The same keys and positions in another batch give the same tokens; another position gives another draw."""
    sampling = Sampling.of(1.0, 0, 1.0, 0.0, 1.0, 10)
    keys = jax.random.split(jax.random.key(0), 8)
    logits, seen, at = np.tile(LOGITS, (8, 1)), np.zeros((8, 10), bool), np.arange(8, dtype=np.int32)
    all_rows, _ = draw(logits, sampling, seen, keys, at)
    some, _ = draw(logits[:4], sampling, seen[:4], keys[2:6], at[2:6])
    assert np.array_equal(all_rows[2:6], some)
    assert not np.array_equal(draw(logits, sampling, seen, keys, at + 1)[0], all_rows)


# ---- text


def scripted(monkeypatch, tokens):
    """Puts tokens in the place of the model's: step by step, with a log-probability of -1."""

    def steps(model, prompts, max_tokens, *args):
        return iter([(np.array([t]), np.array([-1.0])) for t in tokens][:max_tokens])

    monkeypatch.setattr(generation, "generate_steps", steps)


def pieces(tokenizer, text):
    """A text as ids, one for each byte or special token, so that every string has a boundary inside."""
    out = []
    for char in text:
        out += tokenizer.encode(char)
    assert tokenizer.decode(out) == text
    return out


@pytest.mark.parametrize(
    "text, stop, want",
    [
        ("one two three", " tw", "one"),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("four", "o thr"), "one tw"),
        ("one two three", "one", ""),
        ("one two three", "threee", "one two three"),
        ("ababac", "abac", "ab"),
        ("aaaab", "aab", "aa"),
        ("aaa", "aab", "aaa"),
        ("naïve café 🙂🙃!", "🙃", "naïve café 🙂"),
        ("naïve café 🙂🙃!", "é 🙂", "naïve caf"),
        ("北京的天气", ("天",), "北京的"),
        ("one two", ("e t", "one"), ""),
        ("abcd", ("abc", "b"), "a"),
        ("abcd", ("bc", "abc"), ""),
        ("a\nb\n\nc", "\n\n", "a\nb"),
    ],
)
def test_stop_strings(writer, tokenizer, monkeypatch, text, stop, want):
    whole = tokenizer.encode(text)
    for ids in (pieces(tokenizer, text), whole):
        scripted(monkeypatch, ids)
        steps = list(stream_generate(writer, tokenizer, "x", stop=stop, max_tokens=len(ids), raw=True))
        assert "".join(r.text for r in steps) == want
        found = want != text
        assert steps[-1].finish_reason == ("stop" if found else "length")
        assert all(r.finish_reason is None for r in steps[:-1])
        if found and ids is not whole:
            assert len(steps) < len(ids) or text.endswith(stop)


def test_stop_strings_do_not_depend_on_how_the_text_comes():
    """Random texts of three letters, cut at random: the same answer, which is the text before what first completes."""
    rng = np.random.default_rng(0)
    letters = lambda n: "".join(rng.choice(list("abc"), n))
    for _ in range(300):
        text, stop = letters(12), tuple(letters(n) for n in rng.integers(1, 5, rng.integers(1, 4)))
        ends = [(i + len(s), i) for s in stop for i in range(len(text)) if text.startswith(s, i)]
        want = text[: min(ends)[1]] if ends else text
        for _ in range(3):
            cuts = [0, *sorted(rng.integers(0, 13, 4)), 12]
            stops, out = _StopStrings(stop), ""
            for a, b in itertools.pairwise(cuts):
                out += stops.add(text[a:b])
                assert want.startswith(out)
                if stops.found:
                    break
            out += "" if stops.found else stops.finish()
            assert (out, stops.found) == (want, bool(ends)), (text, stop, cuts)


def test_stops_that_cannot_be(writer, tokenizer):
    with pytest.raises(UsageError, match="--stop: a stop string must not be empty"):
        generate(writer, tokenizer, "x", stop=("a", ""))
    with pytest.raises(UsageError, match="--stop 5: must be a text or a list of texts"):
        generate(writer, tokenizer, "x", stop=5)
    with pytest.raises(UsageError, match="stop_ids is 5: must be a list of ids"):
        generate_ids(writer, [[1]], stop_ids=5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_stop_id_ends_the_text_and_is_not_in_it(writer, tokenizer, monkeypatch, which):
    end = writer.config.eos_token_id[which]
    scripted(monkeypatch, [*tokenizer.encode("the end"), end, *tokenizer.encode(" no more")])
    steps = list(stream_generate(writer, tokenizer, "x"))
    assert "".join(r.text for r in steps) == "the end"
    assert (steps[-1].token, steps[-1].finish_reason) == (end, "stop")


def test_half_a_character_is_held_back_and_given_at_the_end(writer, tokenizer, monkeypatch):
    ids = tokenizer.encode("a🙃")
    scripted(monkeypatch, ids[:-1])
    steps = list(stream_generate(writer, tokenizer, "x", max_tokens=len(ids) - 1))
    assert [r.text for r in steps[:-1]] == ["a"] + [""] * (len(steps) - 2)
    assert steps[-1].text == "\ufffd"


@pytest.mark.parametrize("form", ["glm-4.6", "glm-4.7"])
def test_the_parts_of_a_stream_are_those_of_the_whole(writer, tokenizers, monkeypatch, form):
    tokenizer = tokenizers[form]
    call = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    text = f"think é</think>\nsay\n{call}" if form == "glm-4.7" else f"\n<think>think é</think>\nsay\n{call}"
    ids = [*tokenizer.encode(text), writer.config.eos_token_id[2]]
    scripted(monkeypatch, ids)
    steps = list(stream_generate(writer, tokenizer, [{"role": "user", "content": "hi"}]))
    assert "".join(r.text for r in steps) == text
    assert "".join(r.reasoning for r in steps) == "think é"
    assert "".join(r.content for r in steps) == "say"
    assert [c for r in steps for c in r.tool_calls] == [{"name": "add", "arguments": {"a": 1}}]
    assert parse_response(text, tokenizer.format).content == "say"
    assert not any("<" in r.reasoning + r.content for r in steps)


def test_what_a_response_says(writer, tokenizer):
    steps = list(stream_generate(writer, tokenizer, "the model", max_tokens=12, raw=True))
    prompt = tokenizer.encode("the model")
    assert [r.token for r in steps] == generate_ids(writer, [prompt], max_tokens=12)[0]
    assert generate(writer, tokenizer, prompt, max_tokens=12) == "".join(r.text for r in steps)
    for n, r in enumerate(steps, 1):
        assert (r.prompt_tokens, r.generation_tokens) == (len(prompt), n)
        assert r.prompt_tps > 0 and (r.generation_tps > 0) == (n > 1) and r.peak_memory > 1 << 20
        assert -30 < r.logprob < 0 and r.tool_calls == []
    assert [r.finish_reason for r in steps] == [None] * 11 + ["length"]
    json.dumps([dataclasses.asdict(r) for r in steps])  # plain Python values


def test_every_form_of_prompt(writer, tokenizer):
    text = "the tool"
    chat = [{"role": "user", "content": text}]
    count = lambda prompt, **options: next(iter(stream_generate(writer, tokenizer, prompt, **options))).prompt_tokens
    assert count(text) == count(chat) == count(tokenizer.chat(chat)) == len(tokenizer.chat(chat))
    assert count(text, raw=True) == len(tokenizer.encode(text)) < count(text)
    assert count(chat, enable_thinking=False) > count(chat)
    assert count(np.array([1, 2, 3])) == 3
    for empty in ("", [], ()):
        with pytest.raises(UsageError, match="empty"):
            generate(writer, tokenizer, empty)
    with pytest.raises(UsageError, match="no tokenizer: use generate_ids"):
        generate(writer, None, "x")


def test_a_generated_text_has_only_ids_of_the_tokenizer(writer, tokenizer):
    """The head is made so that padding would always win."""
    model = GLM(writer.config, "data=1")
    head = np.array(model.head[...])
    head[360] = 0
    x = np.asarray(model([[1, 2, 3]])[0][0, -1])
    head[360] = 50 * head[int(x.argmax())]
    model.head.set_value(jax.device_put(head, model.head[...].sharding))
    assert 360 in generate_ids(model, [[1, 2, 3]], max_tokens=1)[0]
    model.token_limit = tokenizer.size
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}):
        assert max(generate_ids(model, [[1, 2, 3]], max_tokens=8, **options)[0]) < tokenizer.size


# ---- compiling, and where a model may be called


def test_a_mesh_of_the_callers_own(model):
    """As jax makes one, its axes not Explicit but Auto."""
    sizes = [model.mesh.shape[axis] for axis in AXES]
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    own = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    assert generate_ids(GLM(CONFIG, mesh=own), PROMPTS, max_tokens=4) == generate_ids(model, PROMPTS, max_tokens=4)


def test_a_prompt_and_its_steps_are_compiled_once():
    cut = "expert=2,tensor=2"
    model = GLM(dataclasses.replace(CONFIG, rms_norm_eps=1.25e-5), cut)  # nobody else's
    before = generation._step._cache_size()
    generate_ids(model, [[1, 2, 3], [4] * 12], max_tokens=30)
    assert generation._step._cache_size() == before + 2  # the prompt's bucket, and one token
    generate_ids(model, [[9] * 11, [8] * 2], max_tokens=30)
    generate_ids(model, [[9] * 16, [8] * 2], max_tokens=30, seed=5, **SAMPLED)
    assert generation._step._cache_size() == before + 2
    other = GLM(model.config, cut, seed=1)  # other weights are not another program
    generate_ids(other, [[9] * 11, [8] * 2], max_tokens=30)
    assert generation._step._cache_size() == before + 2


@pytest.mark.slow
def test_models_on_different_meshes_in_different_threads(single):
    models = [single, GLM(CONFIG, "expert=2,tensor=2"), single]
    want, got = generate_ids(single, PROMPTS[:2], max_tokens=6), {}
    ids = [[1, 2, 3, 4]]
    logits = np.asarray(single(ids)[0])

    def work(i):
        got[i] = generate_ids(models[i], PROMPTS[:2], max_tokens=6), np.asarray(models[i](ids)[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 3
    for rows, found in got.values():
        assert rows == want and close(found, logits)


@pytest.mark.slow
def test_two_streams_taken_by_turns(single):
    a, b = (generate_steps(single, [p], 5) for p in PROMPTS[:2])
    turns = [(int(x[0][0]), int(y[0][0])) for x, y in zip(a, b, strict=True)]
    assert [list(row) for row in zip(*turns, strict=True)] == generate_ids(single, PROMPTS[:2], max_tokens=5)


def test_a_model_inside_jit(model):
    ids = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, ids):
        return jax.nn.log_softmax(nnx.merge(graph, state)(ids)[0])

    assert close(run(state, ids), jax.nn.log_softmax(model(ids)[0]))


@pytest.mark.slow
def test_a_model_inside_grad():
    """Outside of jit on a mesh, and in jit alone."""
    ids = np.array([[1, 2, 3, 4], [4, 5, 6, 7]], np.int32)
    found = []
    for cut, wrap in (("expert=2,tensor=2", lambda f: f), ("data=1", jax.jit)):
        graph, state = nnx.split(GLM(tiny(**SMALL | dict(num_hidden_layers=1, first_k_dense_replace=0)), cut))
        score = lambda state, graph=graph: jax.nn.log_softmax(nnx.merge(graph, state)(ids)[0])[:, :, 9].sum()
        found.append(jax.tree.leaves(wrap(jax.grad(score))(state)))
    size = lambda a: float(np.abs(a).max())
    for a, b in zip(*(map(np.asarray, leaves) for leaves in found), strict=True):
        assert size(a - b) <= 1e-4 * size(a) + 1e-6
    assert size(found[0][0]) > 0
