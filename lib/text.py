"""
Text in and text out: the tokenizer, the chat format, the prompts a record may leave out, and the released grammar of
points. The project's own grammar is in data.py, which uses all of this.

    tokenizer.json (any byte-level BPE) ─► Tokenizer ─► ids
    messages ─► chat_pieces ─► text, each piece to be trained on or only read
    points ─► <points coords="1 1 250 750">cups</points> ─► points
"""
import functools
import json
import math
import os
import re
import unicodedata

import tiktoken

from lib.errors import BadCheckpoint
from lib.weights import read_json, write_json
from model import READ_ONLY


HERE = os.path.dirname(os.path.abspath(__file__))
# The project's small tokenizer: 1,020 byte-level BPE ids, learned from the toy world's conversations and some English
# prose, and four special ones. Its split pattern keeps every digit apart from the next: a coordinate is written from
# its coarsest digit to its finest, and a wrong last digit is a small mistake, not an unrelated token. What always
# stands beside a digit goes with it (", 0."): most of the toy world's answers are points, and a track gets a third
# shorter.
SMALL_TOKENIZER = os.path.join(HERE, "tokenizer.json")
# What the model must also write cannot live in the input-only rows. It takes ids inside the base vocabulary that
# nothing else uses: its own in the small tokenizer, <|extra_id_k|> in OLMo's, those after the last token in Qwen's.
WRITABLE = ("<point", "<timestamp>")
CHAT = ("<|im_start|>", "<|im_end|>")
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
        spec = read_json(self.path)
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

def chat_pieces(messages):
    """Alternating user and assistant messages -> [(text, whether it is trained on)], the way Molmo2 writes a chat.

    Every answer is followed by the end-of-sequence token, which the caller adds, and which is trained on with it.
    """
    pieces = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            pieces.append((message["content"], True))
        else:
            end_of_answer = "<|im_end|>\n" if i else ""
            question = f"{end_of_answer}<|im_start|>user\n{message['content']}<|im_end|>\n"
            pieces.append((question + "<|im_start|>assistant\n", False))
    return pieces


# The same for readers that expect a Jinja template: images and videos come first, whatever message they are in.
CHAT_TEMPLATE = (
    "{%- for m in messages if m.content is not string %}{%- for c in m.content if c.type in ('image', 'video') %}"
    "{{ '<|' + c.type + '|>' }}{%- endfor %}{%- endfor %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.content is string %}{{ m.content }}"
    "{%- else %}{%- for c in m.content if c.type == 'text' %}{{ c.text }}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}")

# Prompt templates for annotations without a prompt, by style; a task is the style of its plain form.
PROMPTS = {
    "image_caption": ("Describe the image.", "What is in this picture?", "Write a detailed caption.",
                      "What do you see?"),
    "short_caption": ("Describe the image in a sentence.", "Write a short caption."),
    "image_pointing": ("Point to the {label}.", "Where is the {label}?", "Find the {label}.",
                       "Show me every {label}."),
    "point_count": ("Count the {label} by pointing.", "Point to the {label} and say how many there are."),
    "counting": ("How many {label} are there?", "Count the {label}.", "What is the number of {label}?"),
    "multi_image_pointing": ("Point to the {label} in {selected_images}.", "Find {selected_label}."),
    "multi_image_counting": ("How many {label} are there in {selected_images}?", "Count {selected_label}."),
    "multi_image_point_then_count": ("Point to {selected_label}, then say how many there are.",),
    "multi_image_count_then_point": ("How many {label} are there in {selected_images}? Then point to each.",),
    "video_caption": ("Describe the video.", "What happens in this video?",
                      "Write a detailed caption of the clip."),
    "video_short_caption": ("Describe the video in a sentence.", "Write a short caption of the clip."),
    "video_short_answer": ("{question}", "{question} Answer briefly.", "Give a short answer: {question}"),
    "video_clip_caption_start_end": ("What happens between {start_time} and {end_time}?",
                                     "Describe the video from {start_time} to {end_time}."),
    "video_clip_transcript_start_end": ("What is said between {start_time} and {end_time}?",),
    "video_frame_caption_timestamp": ("What can be seen at {timestamp}?",
                                      "Describe the frame at {timestamp}."),
    "video_transcript": ("What is said in this video?", "Write down what is said."),
    "video_pointing": ("Point to the {label} in the video.", "When and where does the {label} appear?"),
    "video_point_count": ("Point to the {label} in the video, then say how many there are.",),
    "video_count": ("How many {label} are there in the video?", "Count the {label} in the clip."),
    "video_count_point": ("How many {label} are there in the video? Then point to each.",),
    "video_tracking": ("Track the {label}.", "Follow the {label} through the video.",
                       "Where does the {label} go?"),
    "video_point_track_per_frame": ("Track the {label} at {fps} frames per second.",
                                    "Follow the {label}, {fps} times a second."),
    "video_point_ground_start_end": ("Where does the {label} first and last appear?",
                                     "Point to the {label} when it comes and when it goes."),
    "video_single_point_track_per_frame": ("Track the {label} from {input_points}.",
                                           "Where does {input_points} go from here?"),
}
PROMPTS |= {  # the released names of the same
    "long_caption": PROMPTS["image_caption"], "pointing": PROMPTS["image_pointing"],
    "cosyn_point": PROMPTS["image_pointing"], "video_long_caption": PROMPTS["video_caption"],
    "video_point": PROMPTS["video_pointing"],
    "video_single_point_track_start_end": PROMPTS["video_single_point_track_per_frame"]}
# Styles whose answer has a number: the mode of `format_points`.
ANSWER_MODES = {"counting": "count", "video_count": "count", "multi_image_counting": "count",
                "point_count": "point_count", "video_point_count": "point_count",
                "multi_image_point_then_count": "point_count", "video_count_point": "count_point",
                "multi_image_count_then_point": "count_point"}
# Templates of multiple choice: the first for evaluation, the others for training.
OPTIONS = ("{question}\nOnly return the correct answer option.\n{options}",
           "{question}\n{options}", "{question} Choose from:\n{options}", "{options}\n\n{question}",
           "{question}\nWhich of these is right?\n{options}")


def multiple_choice(question, options, correct, rng=None):
    """(prompt, answer) of a question whose `correct`-th option is right. Without an rng the one template of
    evaluation; with it template and order are drawn, and one list in five has no letters."""
    order = list(range(len(options)))
    template = OPTIONS[0]
    lettered = True
    if rng:
        rng.shuffle(order)
        if rng.random() > 0.1:
            template = rng.choice(OPTIONS[1:])
            lettered = rng.random() < 0.8 or not options[correct].strip()
    lines = []
    for k, i in enumerate(order):
        letter = f"{chr(ord('A') + k)}. " if lettered else ""
        lines.append(letter + options[i])
    return template.format(question=question, options="\n".join(lines)), lines[order.index(correct)]


def write_prompt(a, rng, grammar="spec", input_points=""):
    """A prompt for an annotation: a template of its style or task, drawn with `rng` and filled from its fields.
    input_points: those of the annotation, as text."""
    def clock(seconds):  # half of the times as people would type a clock
        if rng.random() < 0.5:
            return f"{seconds:.1f}"
        return f"{int(seconds // 3600):02d}:{int(seconds // 60 % 60):02d}:{seconds % 60:04.1f}"

    label = a.get("label", "objects")
    images = "all images"
    if "images" in a:
        images = " and ".join(f"image_{i + 1}" if grammar == "released" else f"image {i}" for i in a["images"])
    template = rng.choice(PROMPTS.get(a.get("style")) or PROMPTS[a["task"]])
    return template.format(
        label=label, fps=number(a.get("fps", 2), 2), question=a.get("question", ""), input_points=input_points,
        selected_images=images, selected_label=f"the {label} in {images}", start_time=clock(a.get("start_time", 0)),
        end_time=clock(a.get("end_time", 0)), timestamp=clock(a.get("timestamp", 0)))


def points_of_answer(a, kind):
    """(points, mode) of the answer to an annotation, as its style wants them: all points, the ends of each track, or
    what follows the given points. The mode is that of `format_points`."""
    points = a["points"]
    style = a.get("style") or a["task"]
    if kind == "video" and "ground_start_end" in style:
        times = {}  # id -> times at which the object is seen
        for p in points:
            times.setdefault(p["id"], []).append(p["t"])
        points = [p for p in points if p["t"] in (min(times[p["id"]]), max(times[p["id"]]))]
    if kind == "video" and a.get("input_points"):
        last_given = max(p["t"] for p in a["input_points"])
        points = [p for p in points if p["t"] > last_given]
    return points, ANSWER_MODES.get(style) or ANSWER_MODES.get(a["task"], "point")


def subtitle_text(subtitles, start, times):
    """What the model reads of [{start, end, text}]: those at most a second from a frame. `start` is that of the clip;
    the `times` of its frames, and those that the model reads, count from there."""
    lines = []
    for s in subtitles:
        if any(s["start"] - 1 <= t + start <= s["end"] + 1 for t in times):
            lines.append(f"{s['start'] - start:.1f} - {s['end'] - start:.1f} {s['text']}\n")
    return "subtitle\n" + "".join(lines) if lines else ""


# The released models were given the set that an academic question comes from ("vqa2: What is ..."), which makes their
# answers as short as that set's. The styles in which people talk have no such prefix, nor has multiple choice.
NO_PREFIX = frozenset("""
    point_count pointing cosyn_point user_qa long_caption short_caption video_long_caption video_short_caption
    text_sft video_point_track_per_frame video_point_track_start_end video_single_point_track_start_end
    video_transcript video_clip_caption_start_end video_clip_caption_start_end_in_seconds
    video_clip_transcript_start_end video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp
    video_frame_caption_timestamp_in_seconds correction_qa video_point video_point_count video_count
    video_count_point multi_image_pointing multi_image_counting multi_image_point_then_count
    multi_image_count_then_point video_multiple_choice a_okvqa_mc ai2_diagram ai2_diagram_no_letter science_qa
    eval_multiple_choice multi_image_mc multi_image_mc_exp mantis_instruct_mc eval_multi_image_mc""".split())


def styled(prompt, style):
    """A prompt as the released models saw it: "style: prompt", or as it is for a style without a prefix."""
    return prompt if not style or style in NO_PREFIX else f"{style}: {prompt}".rstrip()


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


def released_weight(task, n_trained, n_branches):
    """Loss weight of an answer token, as published: less in a long answer and in a tree of many branches. n_trained:
    tokens of the answer and its EOS."""
    if "pointing" in task or "tracking" in task:
        return 0.2
    if task == "video_caption":
        return 0.1
    if n_branches > 1:
        n_trained -= 1  # the published code counts EOS in a single chat, but not in a tree
    return 2 / math.sqrt(max(n_trained, 1)) / math.sqrt(n_branches)


def format_released(points, kind, label, tracks=False, mode="point"):
    """`data.format_points` in the released grammar: points are grouped by image or frame."""
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


def parse_released(text):
    """[(prefix, id, x, y)] in the released grammar, x and y in thousandths. What is malformed is left out."""
    found = []
    for coords in re.findall(r'<(?:points|tracks)\b[^<>]*coords="([0-9\t:;, .]+)"/?>', text):
        for prefix, items in re.findall(r"(?:^|[\t:,;])(\d{1,9}(?:\.\d{1,9})?) ([0-9. ]+)", coords):
            for i, x, y in re.findall(r"(\d{1,9}) (\d{3,4}) (\d{3,4})", items):
                if int(x) <= 1000 and int(y) <= 1000:
                    found.append((float(prefix), int(i), int(x), int(y)))
    return found
