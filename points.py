"""
Text in and text out: the tokenizer, the chat format, the prompts a row may leave out, and the grammar of points.

    tokenizer.json (any byte-level BPE) ─► Tokenizer ─► ids;   messages ─► pieces, each to be learned or only read
    points ─► "<point 0.31, 0.62, 0>" ─► points

`data.py` re-exports the two public functions, `format_points` and `parse_points`.
"""
import json
import math
import os
import re

import tiktoken

from model import EXTRA, READ_ONLY

HERE = os.path.dirname(os.path.abspath(__file__))
# The small tokenizer shipped with the project: 1,020 byte-level BPE ids, learned from the toy world's sentences and some
# English prose, and four special ones. Its split pattern keeps every digit by itself: a coordinate is then written from its
# coarsest digit to its finest, and a wrong last digit is a small mistake instead of an unrelated token.
SMALL_TOKENIZER = os.path.join(HERE, "tokenizer.json")
# What the model must also write cannot live in the input-only rows. It takes ids inside the base vocabulary that nothing
# else uses: its own in the small tokenizer, <|extra_id_k|> in OLMo's, the fillers after the last token in Qwen's.
WRITABLE = ("<point", "<timestamp>")
CHAT = ("<|im_start|>", "<|im_end|>")


# ---- tokenizer ------------------------------------------------------------------------------------------------------

def byte_alphabet():
    """The printable character that stands for each byte in a tokenizer.json: {character: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A byte-level BPE tokenizer.json as a tiktoken.Encoding, with the ids this project adds for a table of V rows.

    `ids[name]` is the id of a special token, `bos` and `eos` those that open and close a sequence. Text is encoded without
    special tokens unless they are asked for: what a user writes cannot forge a picture or a turn.
    """

    def __init__(self, path, vocab):
        self.path, self.vocab = path, vocab
        with open(path, encoding="utf-8") as f:
            spec = json.load(f)
        if spec.get("model", {}).get("type") != "BPE":
            raise ValueError(f"{path}: model.type is {spec.get('model', {}).get('type')!r}, only byte-level BPE is read")
        alphabet = byte_alphabet()
        special = {t["content"]: t["id"] for t in spec.get("added_tokens", []) if t["id"] < vocab}
        ranks = {}
        for token, i in spec["model"]["vocab"].items():
            if token not in special:
                try:
                    ranks[bytes(alphabet[c] for c in token)] = i
                except KeyError:
                    raise ValueError(f"{path}: token {token!r} is not written in the byte-level alphabet") from None
        top = max([*ranks.values(), *special.values()])
        if top >= vocab:
            raise ValueError(f"{path}: has ids up to {top}, but the model's table has {vocab} rows: not its tokenizer")
        spare = [t for t in special if re.fullmatch(r"<\|extra_id_\d+\|>|\|<EXTRA_TOKENS_\d+>\|", t)]
        unused = iter([special.pop(t) for t in spare] + list(range(top + 1, vocab)))
        for name in WRITABLE:
            if name not in special:
                special[name] = next(unused, None)
                if special[name] is None:
                    raise ValueError(f"{path}: no unused id below {vocab} for {name}")
        special |= {name: vocab + k for k, name in enumerate(READ_ONLY)}
        self.ids = special
        self.encoding = tiktoken.Encoding(os.path.basename(path), pat_str=split_pattern(spec.get("pre_tokenizer")),
                                          mergeable_ranks=ranks, special_tokens=special)
        self.eos = special.get("<|endoftext|>", special.get("<|im_end|>"))
        if self.eos is None:
            raise ValueError(f"{path}: has neither <|endoftext|> nor <|im_end|> to end a sequence with")
        self.bos = self.eos

    def encode(self, text, special=WRITABLE):
        return self.encoding.encode(text, allowed_special=set(special), disallowed_special=())

    def decode(self, ids):
        """Text of ids; bytes that are no UTF-8 become the replacement character, ids of unused rows vanish."""
        known = self.encoding._special_tokens.values()
        return self.encoding.decode([i for i in ids if i in known or i < self.vocab and self.is_text(i)], errors="replace")

    def is_text(self, i):
        try:
            self.encoding.decode_single_token_bytes(i)
            return True
        except KeyError:
            return False


def split_pattern(pre):
    """The regular expression by which a tokenizer.json splits text before merging."""
    steps = pre.get("pretokenizers", [pre]) if pre else []
    for step in steps:
        if step["type"] == "Split":
            return step["pattern"]["Regex"]
        if step["type"] == "ByteLevel" and step.get("use_regex", True):
            return GPT2_SPLIT
    return r"(?s:.+)"


# ---- chat -----------------------------------------------------------------------------------------------------------

def chat_pieces(messages):
    """Alternating user and assistant messages -> [(text, whether it is learned)], the way Molmo2 writes a chat.

    Every answer is followed by the end-of-sequence token, which the caller adds and which is learned with it.
    """
    pieces = []
    for i, m in enumerate(messages):
        if m["role"] == "user":
            pieces.append((("<|im_end|>\n" if i else "") + f"<|im_start|>user\n{m['content']}<|im_end|>\n"
                           "<|im_start|>assistant\n", False))
        else:
            pieces.append((m["content"], True))
    return pieces


PROMPTS = {  # for annotations without one; {label} is what the annotation is about
    "image_caption": ("Describe the image.", "What is in this picture?", "Write a detailed caption.", "What do you see?"),
    "image_pointing": ("Point to the {label}.", "Where is the {label}?", "Find the {label}.", "Show me every {label}."),
    "counting": ("How many {label} are there?", "Count the {label}.", "What is the number of {label}?"),
    "multi_image_pointing": ("Point to the {label} in all images.", "Find the {label} in these images."),
    "video_caption": ("Describe the video.", "What happens in this video?", "Write a detailed caption of the clip."),
    "video_pointing": ("Point to the {label} in the video.", "When and where does the {label} appear?"),
    "video_tracking": ("Track the {label}.", "Follow the {label} through the video.", "Where does the {label} go?"),
}


# ---- points ---------------------------------------------------------------------------------------------------------

NOTHING = "There are none."


def number(x, digits):
    """`x` with at most `digits` decimals and no trailing zeros."""
    text = f"{x:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def format_points(points, kind):
    """[{x, y, id, t | image}] -> "<point x, y, id> <point ...>", ordered by (t or image, id); no point: "There are none."

    kind: "image" (x, y, id), "images" (image, x, y, id, images from 0) or "video" (t in seconds, x, y, id).
    x, y in [0, 1] with at most 3 decimals, t with at most 2.
    """
    first = {"image": None, "images": "image", "video": "t"}[kind]
    out = []
    for p in sorted(points, key=lambda p: (p[first] if first else 0, p["id"])):
        where = [number(p["t"], 2)] if kind == "video" else [str(p["image"])] if kind == "images" else []
        out.append("<point " + ", ".join([*where, number(p["x"], 3), number(p["y"], 3), str(p["id"])]) + ">")
    return " ".join(out) or NOTHING


def parse_points(text, kind="video"):
    """The points written in `text`: [{x, y, id}], with `t` (or, of kind "images", `image`) where four numbers are given.

    Never raises: what is malformed is dropped, x and y are clipped to [0, 1].
    """
    points = []
    for body in re.findall(r"<point ([^<>]{1,80})>", text):
        fields = body.split(", ")
        if len(fields) not in (3, 4) or not all(re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", f) for f in fields):
            continue
        *first, x, y, i = fields
        if "." in i or i.startswith("-") or first and first[0].startswith("-"):
            continue
        p = dict(x=min(max(float(x), 0.0), 1.0), y=min(max(float(y), 0.0), 1.0), id=int(i))
        if first and kind == "images":
            if "." in first[0]:
                continue
            p["image"] = int(first[0])
        elif first:
            p["t"] = float(first[0])
        points.append(p)
    return points


def is_unit(value):
    """Whether a JSON value is a finite number in [0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1
