"""
Text in and text out: the tokenizer, the chat format, and points as text.

    tokenizer.json (any byte-level BPE) ─► Tokenizer ─► ids
    messages ─► chat_pieces ─► tokens of the chat, questions to read, answers to train on
    points ─► format_points ─► <point 0.25, 0.75, 0>                                this project's grammar
                            or <points coords="1 1 250 750">cups</points>           that of the released checkpoints
    either ─► parse_points ─► points
"""
import functools
import json
import os
import re
import unicodedata

import tiktoken

from lib.errors import BadCheckpoint
from lib.weights import read_json, write_json
from model import READ_ONLY


HERE = os.path.dirname(os.path.abspath(__file__))
# The project's small tokenizer: 1,018 byte-level BPE ids, learned from the toy world's conversations and some English
# prose, and six special ones. Its split pattern keeps every digit apart from the next: a coordinate is written from
# its coarsest digit to its finest, and a wrong last digit is a small mistake, not an unrelated token. What always
# stands beside a digit goes with it (", 0."): most of the toy world's answers are points, and a track gets a third
# shorter.
SMALL_TOKENIZER = os.path.join(HERE, "tokenizer.json")
# What the model must also write cannot live in the input-only rows. It takes ids inside the base vocabulary that
# nothing else uses: its own in the small tokenizer, <|extra_id_k|> in OLMo's, those after the last token in Qwen's.
WRITABLE = ("<point", "<timestamp>")
CHAT = ("<|im_start|>", "<|im_end|>")
# What stands before a question and before its answer. Each is one token of the small tokenizer, for its questions are
# a few words long: the six tokens that other tokenizers need would be a third of all that is read.
TURNS = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
# A little of each kind of character, which has to come back from its ids.
PROBE = "A7 it's\r\n\t_e\u0301\u6f22\u00a0\u200b!?\U0001f642  \u00b2\0"
NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# Ids that OLMo's and Qwen's tokenizers name and do not use.
SPARE = re.compile(r"<\|extra_id_\d+\|>|\|<EXTRA_TOKENS_\d+>\|")


# ---- tokenizer ---------------------------------------------------------------------------------------------

def byte_alphabet():
    """The printable character that stands for each byte in a tokenizer.json: {character: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = sorted(set(range(256)) - set(plain))
    characters = [*plain, *range(256, 256 + len(unprintable))]
    return {chr(character): b for character, b in zip(characters, [*plain, *unprintable])}


GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A byte-level BPE tokenizer.json as a tiktoken.Encoding, with the ids this project adds for a table of V rows.

    `ids[name]` is the id of an added token, `bos` and `eos` those that open and close a sequence. Text is encoded
    without special tokens unless they are asked for: what a user writes cannot forge an image or a turn. Added tokens
    that are not special, as Qwen3's <think>, are words like any other: text that spells one has its id.
    """

    def __init__(self, path, vocab):
        self.path = path
        self.vocab = vocab
        spec = read_json(path)
        with open(path, "rb") as f:
            self.contents = f.read()  # for `save`: the file may be of a checkpoint that is deleted meanwhile
        try:
            self.read(spec)
        except BadCheckpoint:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise BadCheckpoint(f"{path}: key missing or of the wrong kind ({type(e).__name__}: {e})") from None
        if self.decode(self.encode(PROBE, ())) != self.normalise(PROBE):
            raise BadCheckpoint(f"{path}: its pre_tokenizer's pattern leaves parts of a text out")

    def read(self, spec):
        """Everything that encodes, from the contents of a tokenizer.json."""
        ranks, special = self.read_vocabulary(spec)  # {bytes: id}, {name: id}
        self.forms = self.read_normalizer(spec)

        # What the model must write takes unused ids below V: the spare ones that the file names, then those after its
        # last. A table without any can still write points and times as released checkpoints do.
        spare = [special.pop(name) for name in list(special) if SPARE.fullmatch(name)]
        last = max([*ranks.values(), *special.values(), *spare])
        unused = [*spare, *range(last + 1, self.vocab)]
        missing = [name for name in WRITABLE if name not in special]
        special |= zip(missing, unused)
        for k, name in enumerate(READ_ONLY):
            special[name] = self.vocab + k  # what it only reads: the rows after V

        self.ids = special
        pattern = split_pattern(spec.get("pre_tokenizer"), self.path)
        self.encoding = tiktoken.Encoding(os.path.basename(self.path), pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special)
        bos, eos = self.read_ends()
        known = [name for name in (eos, "<|endoftext|>", "<|im_end|>") if name in special]
        if not known:
            raise BadCheckpoint(f"{self.path}: has neither <|endoftext|> nor <|im_end|> to end a sequence with")
        self.eos_name = known[0]
        self.eos = special[self.eos_name]
        self.bos_name = bos if bos in special else self.eos_name  # Qwen has none: it opens with what ends another
        self.bos = special[self.bos_name]
        self.words = self.read_words(spec)

    def read_vocabulary(self, spec):
        """The ordinary tokens of a tokenizer.json, {bytes: id}, and its special ones, {name: id}."""
        kind = spec["model"].get("type") if isinstance(spec.get("model"), dict) else None
        if kind != "BPE":
            raise BadCheckpoint(f"{self.path}: model.type is {kind!r}, only byte-level BPE is read")
        for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if spec["model"].get(key):
                raise BadCheckpoint(f"{self.path}: model.{key} is {spec['model'][key]!r}, byte-level BPE has none")
        special = {t["content"]: t["id"] for t in spec.get("added_tokens", []) if t["id"] < self.vocab}
        alphabet = byte_alphabet()
        ranks = {}
        for token, i in spec["model"]["vocab"].items():
            if token not in special:
                try:
                    ranks[bytes(alphabet[c] for c in token)] = i
                except KeyError:
                    raise BadCheckpoint(f"{self.path}: token {token!r} is not written in the byte-level "
                                        "alphabet") from None
        if len({*ranks.values()}) < len(ranks) or not all(bytes([b]) in ranks for b in range(256)):
            raise BadCheckpoint(f"{self.path}: model.vocab has an id twice, or no token for some byte")
        merges = spec["model"].get("merges", [])
        merged = [spec["model"]["vocab"][m.replace(" ", "") if isinstance(m, str) else "".join(m)] for m in merges]
        if merged != sorted(merged):
            raise BadCheckpoint(f"{self.path}: model.merges stand in another order than the ids they make; only the "
                                "order of ids is read here")
        largest = max([*ranks.values(), *special.values()])
        if largest >= self.vocab:
            raise BadCheckpoint(f"{self.path}: has ids up to {largest}, but the model's table has {self.vocab} rows: "
                                "not its tokenizer")
        return ranks, special

    def read_ends(self):
        """Names of the tokens that open and close a sequence: those in tokenizer_config.json beside the file, or
        None where it names none."""
        beside = os.path.join(os.path.dirname(self.path), "tokenizer_config.json")
        config = read_json(beside) if os.path.exists(beside) else {}
        names = []
        for token in (config.get("bos_token"), config.get("eos_token")):
            names.append(token.get("content") if isinstance(token, dict) else token)
        return names

    def read_normalizer(self, spec):
        """The Unicode forms that text is brought to before it is encoded: NFC in Qwen3's file, none in OLMo's."""
        normalizer = spec.get("normalizer")
        steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
        for step in steps:
            if step["type"] not in NORMAL_FORMS:
                raise BadCheckpoint(f"{self.path}: normalizer {step['type']!r} is not known here, only "
                                    f"{', '.join(NORMAL_FORMS)}")
        return [step["type"] for step in steps]

    def read_words(self, spec):
        """Added tokens that are not special, {as spelled: id}: those looked for in a text as it was written, and those
        looked for once it is in its normal form. What opens, closes or points is never among them."""
        control = (*WRITABLE, *CHAT, *READ_ONLY, "<|endoftext|>", self.bos_name, self.eos_name)
        as_written, normalised = {}, {}
        for token in spec.get("added_tokens", []):
            name = token["content"]
            if token.get("special", True) or name in control or self.ids.get(name) != token["id"]:
                continue
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise BadCheckpoint(f"{self.path}: added token {name!r} has lstrip, rstrip or single_word, which are "
                                    "not read here")
            if token.get("normalized"):
                normalised[self.normalise(name)] = token["id"]
            else:
                as_written[name] = token["id"]
        return as_written, normalised

    def save(self, folder):
        """Write tokenizer.json, tokenizer_config.json, which names the ends of a sequence, and the chat template.

        Every id up to the last input-only row gets a name there, the published one: other readers number the tokens
        they are given in order, and look the vision tokens up by name.
        """
        spec = json.loads(self.contents)
        vocabulary = spec["model"]["vocab"]
        given = {t["id"] for t in spec.get("added_tokens", [])}
        listed = given.intersection(vocabulary.values())  # OLMo's file has its added tokens in the vocabulary too
        ordinary = {token: i for token, i in vocabulary.items() if i not in given}
        ordinary_ids = set(ordinary.values())
        names = {}
        for name, i in self.ids.items():
            if name in READ_ONLY:
                name = "<im_patch>" if name == "<image>" else name.replace("image_", "im_")
            names[i] = name
        unchanged = {t["id"]: t for t in spec.get("added_tokens", []) if t["content"] == names.get(t["id"])}
        added = []
        for i in range(self.vocab + len(READ_ONLY)):
            if i in unchanged:
                added.append(unchanged[i])
            elif i not in ordinary_ids:
                name = names.get(i, f"|<EXTRA_TOKENS_{i}>|")
                added.append(dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False,
                                  special=name not in WRITABLE))
        spec["added_tokens"] = added
        spec["model"]["vocab"] = ordinary | {t["content"]: t["id"] for t in added if t["id"] in listed}
        write_json(os.path.join(folder, "tokenizer.json"), spec)
        write_json(os.path.join(folder, "tokenizer_config.json"),
                   dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=self.eos_name, bos_token=self.bos_name,
                        chat_template=CHAT_TEMPLATE))
        with open(os.path.join(folder, "chat_template.jinja"), "w") as f:  # where processors expect it
            f.write(CHAT_TEMPLATE)

    def encode(self, text, special=WRITABLE):
        """Ids of a text. special: names of the special tokens that it may contain; others are read as plain text."""
        as_written, normalised = self.words
        named = as_written | {name: self.ids[name] for name in special if name in self.ids}
        ids = []
        for i, piece in enumerate(splitter(frozenset(named)).split(text)):
            if i % 2:
                ids.append(named[piece])
                continue
            for k, part in enumerate(splitter(frozenset(normalised)).split(self.normalise(piece))):
                ids += [normalised[part]] if k % 2 else self.encoding.encode_ordinary(part)
        return ids

    def normalise(self, text):
        for form in self.forms:
            text = unicodedata.normalize(form, text)
        return text

    def decode(self, ids):
        """Text of ids. Bytes that are no UTF-8 become the replacement character; ids of unused rows vanish."""
        special = self.encoding._special_tokens.values()
        known = [i for i in ids if i in special or i < self.vocab and self.is_text(i)]
        return self.encoding.decode(known, errors="replace")

    def is_text(self, i):
        try:
            self.encoding.decode_single_token_bytes(i)
            return True
        except KeyError:
            return False


def split_pattern(pre, path):
    """The regular expression by which a tokenizer.json splits text before merging: that of its Split, or of ByteLevel,
    which comes last. Other steps would give other ids than they are meant to, and are refused."""
    steps = pre.get("pretokenizers", [pre]) if pre else []
    pattern = r"(?s:.+)"
    for i, step in enumerate(steps):
        kind = step["type"]
        pieces = step.get("behavior"), step.get("invert")  # both: matches are pieces, and all of the text matches
        if kind == "Split" and i == 0 and pieces in (("Isolated", False), ("Removed", True)):
            pattern = step["pattern"]["Regex"]
        elif kind == "ByteLevel" and i == len(steps) - 1 and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                if i:
                    raise BadCheckpoint(f"{path}: pre_tokenizer splits twice, by Split and by ByteLevel's use_regex; "
                                        "only one of them is read here")
                pattern = GPT2_SPLIT
        else:
            raise BadCheckpoint(f"{path}: pre_tokenizer step {i} is {json.dumps(step)[:200]}; only a Split by Regex "
                                "and a ByteLevel without add_prefix_space are read here")
    return pattern


@functools.cache
def splitter(names):
    """A pattern whose split() cuts a text at each of the names, the longest where several begin: every second part is
    one of them."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


# ---- chat --------------------------------------------------------------------------------------------------

def chat_pieces(messages, tokens=()):
    """Alternating user and assistant messages -> [(text, "control" | "question" | "answer")], the way Molmo2 writes a
    chat. A control piece is the name of a token; what somebody wrote is never part of one. tokens: names of those that
    the tokenizer has.

    Every answer is followed by the end-of-sequence token, which the caller adds, and which is trained on with it.
    """
    start, end = CHAT
    ask, reply = TURNS
    pieces = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            pieces.append((message["content"], "answer"))
            continue
        if i:  # after an answer
            pieces += [(end, "control"), ("\n", "question")]
        if ask in tokens and reply in tokens:
            pieces += [(ask, "control"), (message["content"], "question"), (reply, "control")]
            continue
        pieces += [(start, "control"), (f"user\n{message['content']}", "question"), (end, "control"),
                   ("\n", "question"), (start, "control"), ("assistant\n", "question")]
    return pieces


# The same for readers that expect a Jinja template: images and videos come first, whatever message they are in.
CHAT_TEMPLATE = (
    "{%- for m in messages if m.content is not string %}{%- for c in m.content if c.type in ('image', 'video') %}"
    "{{ '<|' + c.type + '|>' }}{%- endfor %}{%- endfor %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.content is string %}{{ m.content }}"
    "{%- else %}{%- for c in m.content if c.type == 'text' %}{{ c.text }}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}")

def subtitle_text(subtitles, start, times):
    """What the model reads of [{start, end, text}]: those at most a second from a frame. `start` is that of the clip;
    the `times` of its frames, and those that the model reads, count from there."""
    lines = []
    for s in subtitles:
        if any(s["start"] - 1 <= t + start <= s["end"] + 1 for t in times):
            lines.append(f"{s['start'] - start:.1f} - {s['end'] - start:.1f} {s['text']}\n")
    return "subtitle\n" + "".join(lines) if lines else ""


# ---- points ------------------------------------------------------------------------------------------------

NOTHING = "There are none."

# The field that comes first in a point, by the kind of media: its points are ordered by it.
FIRST_FIELD = {"image": None, "images": "image", "video": "t"}


def number(x, digits):
    """`x` with at most `digits` decimals and no trailing zeros."""
    text = f"{x:.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def format_points(points, kind, grammar="spec", label="", tracks=False, mode="point"):
    """[{x, y, id, t | image}] -> "<point x, y, id> <point ...>", ordered by (t or image, id).

    kind: "image" (x, y, id), "images" (image, x, y, id; images from 0) or "video" (t in seconds, x, y, id). x and y
    in [0, 1] get at most 3 decimals, t at most 2. mode: point, count (their number alone), point_count, count_point.
    grammar: "released" is that of the published checkpoints, which alone uses label and tracks.
    """
    if not points:
        return NOTHING
    if grammar == "released":
        return format_released(points, kind, label, tracks, mode)
    order = FIRST_FIELD[kind]  # the name of the first field, "t" or "image"; None for an image
    written = []
    for p in sorted(points, key=lambda p: (p[order] if order else 0, p["id"])):
        fields = [number(p["x"], 3), number(p["y"], 3), str(p["id"])]
        if kind == "video":
            fields.insert(0, number(p["t"], 2))
        elif kind == "images":
            fields.insert(0, str(p["image"]))
        written.append(f"<point {', '.join(fields)}>")
    text = " ".join(written)
    return {"point": text, "count": str(len(points)), "point_count": f"{text} A total of {len(points)}.",
            "count_point": f"There are {len(points)}: {text}"}[mode]


NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
POINT = re.compile(rf"<point (?:({NUMBER}), )?(-?{NUMBER}), (-?{NUMBER}), (\d{{1,9}})>")  # t or image, x, y, id


def parse_points(text, kind="video", lenient=True):
    """The points in `text`, in either grammar: [{x, y, id}], with `t` or, of kind "images", `image` where one is
    given. Kind "image" ignores it. lenient: in any form that published checkpoints, of Molmo 1 too, and programs
    around them write; else of the released grammar what the published evaluation reads.

    Never raises: malformed points are dropped, x and y are clipped to [0, 1]. Ids and images count from 0.
    """
    found = []  # (t or image or None, x, y, id)
    for prefix, x, y, i in POINT.findall(text):
        if kind == "images" and "." in prefix:
            continue  # there is no image 0.5
        found.append((float(prefix) if prefix else None, float(x), float(y), int(i)))
    for prefix, i, x, y in parse_released(text, lenient):  # thousandths; ids and images count from 1
        if prefix is not None and kind == "images":
            prefix -= 1
        found.append((prefix, x / 1000, y / 1000, max(i - 1, 0)))
    points = []
    for prefix, x, y, i in found:
        point = dict(x=min(max(x, 0.0), 1.0), y=min(max(y, 0.0), 1.0), id=i)
        if prefix is not None and kind == "images":
            point["image"] = int(prefix)
        elif prefix is not None and kind == "video":
            point["t"] = prefix
        points.append(point)
    return points


# The grammar of the released checkpoints ("html-v2"):  <points coords="1 1 250 750 2 500 500">cups</points>
# A group for each image (from 1) or frame (seconds), ";" in between. A point is its id and thousandths of the sides.

def thousandths(x, y):
    """(x, y) of [0, 1] as the released formatter rounds it: half to even.

    It clips x only if y needs no clipping. That is a slip there, kept so that its output can be reproduced; no record
    with such a point is accepted here.
    """
    if 0 <= y <= 1:
        x = min(max(x, 0), 1)
    return round(1000 * x), round(1000 * y)


def released_tag(name, groups, label, alt):
    """groups: [(prefix, [(id, (x, y) in thousandths)])]."""
    written = []
    for prefix, items in groups:
        written.append(f"{prefix} " + " ".join(f"{i} {x:03d} {y:03d}" for i, (x, y) in items))
    alt = "" if alt is None else f' alt="{alt}"'
    return f'<{name}{alt} coords="{";".join(written)}">{label}</{name}>'


def released_points(groups, label, mode="point", alt=None):
    """[(prefix, [(x, y), ...])] -> the released text. Ids count through the answer, in each group by x, then y.

    mode: point, point_count ("Counting the ... shows a total of 2."), count_point ("There are 2 ...") or count ("2").
    """
    total = 0
    numbered = []
    for prefix, places in groups:
        places = sorted(thousandths(x, y) for x, y in places)
        numbered.append((prefix, list(enumerate(places, total + 1))))
        total += len(places)
    if not total:
        return NOTHING
    tag = released_tag("points", numbered, label, alt)
    return {"point": tag, "count": str(total), "point_count": f"Counting the {tag} shows a total of {total}.",
            "count_point": f"There are {total} {tag}."}[mode]


def released_tracks(frames, label, alt=None, ends_only=False, after=None):
    """[(t, {object: (x, y)})], visible objects only -> the released text. An object keeps the number of its first
    appearance.

    ends_only: only its first and last appearance. after: only frames later than this time, if the start is given.
    """
    if not frames:
        return "No tracks available."
    ids = {}
    times = {}  # object -> times at which it is seen
    rounded = []  # (t, {object: (x, y) in thousandths})
    for t, seen in sorted(frames, key=lambda frame: frame[0]):
        places = {}
        for k, (x, y) in seen.items():
            places[k] = thousandths(x, y)
            times.setdefault(k, []).append(t)
        for k in sorted(places, key=places.get):
            ids.setdefault(k, len(ids) + 1)
        rounded.append((t, places))
    groups = []
    for t, places in rounded:
        written = []
        for k, place in places.items():
            if not ends_only or t in (times[k][0], times[k][-1]):
                written.append((ids[k], place))
        if written and (after is None or t > after):
            groups.append((f"{t:.1f}", sorted(written)))
    return released_tag("tracks", groups, label, alt) if groups else ""


def format_released(points, kind, label, tracks=False, mode="point"):
    """`format_points` in the released grammar: points are grouped by image or frame."""
    field = FIRST_FIELD[kind]
    groups = {}  # of tracks: {t: {object: place}}, else {prefix: [place]}
    for p in sorted(points, key=lambda p: p[field] if field else 0):
        prefix = "1"
        if kind == "images":
            prefix = str(p["image"] + 1)
        elif kind == "video":
            prefix = f"{p['t']:.1f}"
        place = (p["x"], p["y"])
        if tracks:
            groups.setdefault(float(prefix), {})[p["id"]] = place
        else:
            groups.setdefault(prefix, []).append(place)
    groups = list(groups.items())
    return released_tracks(groups, label) if tracks else released_points(groups, label, mode)


# What evaluations read, by the published expression; and what people and other programs make of it: attributes in any
# order and quotes, a ">" inside one, blanks after a separator, an answer that was cut off. Group 1 is the coordinates.
PUBLISHED = re.compile(r'<(?:points|tracks)\b[^<>]*coords="([0-9\t:;, .]+)"/?>')
ANY_COORDS = re.compile(r"""<(?:points|tracks)\b[^<]*?\bcoords\s*=\s*["']([0-9\t:;, .]*)(?:["']|$)""")
# <points x1="21.0" y1="30.0" ...>, in per cent, of Molmo 1
MOLMO_1 = re.compile(r"""\b([xy])(\d*)\s*=\s*["']\s*(\d{1,3}(?:\.\d{1,9})?)\s*["']""")


def parse_released(text, lenient=True):
    """[(prefix or None, id, x, y)] in the released grammar, x and y in thousandths. What is malformed is left out."""
    found = []
    for tag in (ANY_COORDS if lenient else PUBLISHED).finditer(text):
        coords = tag[1]
        if tag.end() == len(text) and coords.endswith("100"):  # cut off: it may have been 1000
            coords = coords[:-3]
        if lenient:
            coords = re.sub(r"(?<=[\t:,;]) +", "", coords)
        for prefix, items in re.findall(r"(?:^|[\t:,;])(\d{1,9}(?:\.\d{1,9})?) ([0-9. ]+)", coords):
            for i, x, y in re.findall(r"(\d{1,9}) (\d{3,4}) (\d{3,4})", items):
                if int(x) <= 1000 and int(y) <= 1000:
                    found.append((float(prefix), int(i), int(x), int(y)))
    for tag in re.findall(r"<points?\b([^<]*)", text) if lenient else ():
        sides = {(axis, i or "1"): float(value) for axis, i, value in MOLMO_1.findall(tag)}
        for (axis, i), x in sides.items():
            y = sides.get(("y", i))
            if axis == "x" and y is not None and max(x, y) <= 100:
                found.append((None, int(i), 10 * x, 10 * y))
    return found
