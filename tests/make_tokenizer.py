"""A small tokenizer in the published layout, for tests: byte-level BPE, GLM's 36 special tokens, a template of ours."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATES = Path(__file__).parent.parent / "glm_jax" / "templates"
TAGS = ("think", "tool_call", "tool_response", "arg_key", "arg_value")
# in the published order, with whether each is special: what is not survives decoding
SPECIAL_TOKENS = {
    **dict.fromkeys(["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"], True),
    **dict.fromkeys(["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"], True),
    **{
        f"<|{end}_of_{kind}|>": True
        for kind in ("image", "video", "audio", "transcription")
        for end in ("begin", "end")
    },
    **dict.fromkeys(["<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"], True),
    **{f"<{slash}{tag}>": False for tag in TAGS for slash in ("", "/")},
    "/nothink": True,
    **dict.fromkeys(["<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>"], False),
}
WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = [
    "the model thinks and then it calls the tool",
    "def add(a, b): return a + b",
    "北京的天气今天很好",
    "naïve café 🙂🙃",
]


def write_tokenizer(folder: str | Path, template: str | None = "glm-4.6") -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, and return the folder.

    template: a file of glm_jax/templates; None writes none. 320 ids are byte-level BPE, then come the 36."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    added = [AddedToken(text, special=special, normalized=False) for text, special in SPECIAL_TOKENS.items()]
    tokenizer.add_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
    config = {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {"content": text, **flags, "special": special}
            for text, special in SPECIAL_TOKENS.items()
        },
        "additional_special_tokens": [text for text, special in SPECIAL_TOKENS.items() if special],
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "model_max_length": 128000,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if template:
        text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return folder
