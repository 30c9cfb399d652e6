"""The corpus as tokens, and the windows a training step or an evaluation reads. All of it follows from the text."""

from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from glm_jax.demo import corpus
from glm_jax.demo.corpus import Chat

SEED = 0
BATCH_TOKENS = 2048  # of one step
MIX = {"library": 0.7, "tests": 0.1, "chat": 0.2}  # the share of windows from each part


def tokenize(tokenizer: Tokenizer, render: Callable[[Chat], str]) -> dict[str, np.ndarray]:
    """Every part of the corpus as one row of uint16 ids, documents ended by <|endoftext|>, chats by <|user|> first.

    `library_starts` and `tests_starts` say where lines without indentation begin, `chat_starts` where chats do; `bytes`
    has the UTF-8 length of the held-out library text."""
    files = corpus.sources()
    written = [s for s in files if not s.test]
    seen, held = [s for s in written if not s.held_out], [s for s in written if s.held_out]
    chats = [render(c) for s in seen for c in corpus.chats(s)]
    end = tokenizer.token_to_id("<|endoftext|>")
    row = lambda documents: np.concatenate([np.asarray([*ids, end], np.uint16) for ids in documents])
    encode = lambda texts: [e.ids for e in tokenizer.encode_batch(texts)]
    cut = lambda sources: [[i for ids in encode(corpus.pieces(s)) for i in ids] for s in sources]
    spelled = [str(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    ends = np.asarray([token.endswith(("Ċ", "<|endoftext|>")) for token in spelled])  # Ċ Ġ ĉ: newline, space, tab
    indents = np.asarray([token.startswith(("Ċ", "Ġ", "ĉ")) for token in spelled])
    starts = lambda ids: 1 + np.flatnonzero(ends[ids[:-1]] & ~indents[ids[1:]])
    library, tests = row(cut(seen)), row(cut([s for s in files if s.test and not s.held_out]))
    conversations = encode(chats)
    return {
        "library": library,
        "library_starts": starts(library),
        "tests": tests,
        "tests_starts": starts(tests),
        "chat": row(conversations),
        "chat_starts": np.cumsum([0, *(len(ids) + 1 for ids in conversations[:-1])]),
        "held_out": row(encode([s.text for s in held])),
        "held_out_chat": row(encode([render(c) for s in held for c in corpus.chats(s)])),
        "bytes": np.asarray(sum(len(s.text.encode()) for s in held)),
    }


def size(length: int) -> int:
    """The tokens of one step with windows of this length."""
    return BATCH_TOKENS // length * length


def batch(tokens: dict[str, np.ndarray], step: int, length: int) -> np.ndarray:
    """The windows of one step, [BATCH_TOKENS / length, length] int32.

    A chat window begins where a chat does, every other window of the rest where a line without indentation does: a
    prompt begins like that, and a model that saw only the middle of things at position 0 does not heed what it finds
    there."""
    draw = np.random.default_rng((SEED, step))
    rows = []
    for part in draw.choice(list(MIX), BATCH_TOKENS // length, p=list(MIX.values())):
        ids, starts = tokens[part], tokens[f"{part}_starts"]
        last = len(ids) - length
        if part == "chat" or draw.random() < 0.5:
            start = int(draw.choice(starts[: np.searchsorted(starts, last, side="right")]))
        else:
            start = int(draw.integers(last + 1))
        rows.append(ids[start : start + length])
    return np.stack(rows).astype(np.int32)


def windows(ids: np.ndarray, length: int, most: int | None = None) -> np.ndarray:
    """Consecutive windows of a row of ids, [n, length] int32; with `most`, that many spread evenly over it."""
    whole = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int32)
    return whole if most is None or len(whole) <= most else whole[np.linspace(0, len(whole) - 1, most).astype(int)]
