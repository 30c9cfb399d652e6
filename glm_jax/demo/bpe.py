"""The demo's tokenizer: a small byte-level BPE of GLM's shape, GLM's 36 special tokens behind the ordinary ones."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SIZE = 2040  # the model has 2048 rows: like the real ones, its last rows belong to no token

# GLM's own pattern. It cuts before a word's space and keeps at most three digits together.
PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPECIAL = """<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|>
<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|begin_of_audio|> <|end_of_audio|>
<|begin_of_transcription|> <|end_of_transcription|> <|code_prefix|> <|code_middle|> <|code_suffix|> <think> </think>
<tool_call> </tool_call> <tool_response> </tool_response> <arg_key> </arg_key> <arg_value> </arg_value> /nothink
<|begin_of_box|> <|end_of_box|> <|image|> <|video|>""".split()  # in GLM's order

STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")  # the end of a text, of an answer, of a tool call

# These are text to a reader of the answer: decoding with skip_special_tokens keeps them.
KEPT = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>"}
KEPT |= {"</arg_key>", "<arg_value>", "</arg_value>", "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>"}


def train(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from the texts and put the special tokens behind them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that any text can be written
    size = SIZE - len(SPECIAL)
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t not in KEPT) for t in SPECIAL])
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as the published repositories have them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config = {
        "added_tokens_decoder": {str(i): {f: getattr(added[i], f) for f in fields} for i in sorted(added)},
        "additional_special_tokens": [t for t in SPECIAL if t not in KEPT],
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "model_max_length": context,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "prompt_form": "text",  # a prompt given as text is continued, not answered
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
