"""
Text in and text out: the tokenizer, the chat format, the prompts a row may leave out, and the grammar of
points.

    tokenizer.json (any byte-level BPE) ─► Tokenizer ─► ids;   messages ─► pieces, each to be learned or only read
    points ─► "<point 0.31, 0.62, 0>" ─► points, and the same in the grammar of the released checkpoints

The project's own grammar of points is in data.py: `format_points` and `parse_points`.
"""
import os
import re

import tiktoken

from lib.weights import BadCheckpoint, read_json, write_json
from model import READ_ONLY


HERE = os.path.dirname(os.path.abspath(__file__))
# The small tokenizer shipped with the project: 1,020 byte-level BPE ids, learned from the toy world's
# conversations and some English prose, and four special ones. Its split pattern keeps every digit apart from
# the next: a coordinate is then written from its coarsest digit to its finest, and a wrong last digit is a
# small mistake instead of an unrelated token. What always stands beside a digit goes with it (", 0."): points
# are most of what the toy world says, and a track is a third shorter.
SMALL_TOKENIZER = os.path.join(HERE, "tokenizer.json")
# What the model must also write cannot live in the input-only rows. It takes ids inside the base vocabulary
# that nothing else uses: its own in the small tokenizer, <|extra_id_k|> in OLMo's, the fillers after the last
# token in Qwen's.
WRITABLE = ("<point", "<timestamp>")
CHAT = ("<|im_start|>", "<|im_end|>")


# ---- tokenizer ---------------------------------------------------------------------------------------------

def byte_alphabet():
    """The printable character that stands for each byte in a tokenizer.json: {character: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A byte-level BPE tokenizer.json as a tiktoken.Encoding, with the ids this project adds for a table of V
    rows.

    `ids[name]` is the id of a special token, `bos` and `eos` those that open and close a sequence: as
    tokenizer_config.json beside the file says, else <|endoftext|> or <|im_end|>. Text is encoded without
    special tokens unless they are asked for: what a user writes cannot forge a picture or a turn.
    """

    def __init__(self, path, vocab):
        self.path, self.vocab = path, vocab
        spec, beside = read_json(path), os.path.join(os.path.dirname(path), "tokenizer_config.json")
        names = read_json(beside) if os.path.exists(beside) else {}
        kind = spec["model"].get("type") if isinstance(spec.get("model"), dict) else None
        if kind != "BPE":
            raise BadCheckpoint(f"{path}: model.type is {kind!r}, only byte-level BPE is read")
        alphabet = byte_alphabet()
        special = {t["content"]: t["id"] for t in spec.get("added_tokens", []) if t["id"] < vocab}
        ranks = {}
        for token, i in spec["model"]["vocab"].items():
            if token not in special:
                try:
                    ranks[bytes(alphabet[c] for c in token)] = i
                except KeyError:
                    raise BadCheckpoint(f"{path}: token {token!r} is not written in the byte-level alphabet") from None
        top = max([*ranks.values(), *special.values()])
        if top >= vocab:
            raise BadCheckpoint(f"{path}: has ids up to {top}, but the model's table has {vocab} rows: "
                                "not its tokenizer")
        spare = [t for t in special if re.fullmatch(r"<\|extra_id_\d+\|>|\|<EXTRA_TOKENS_\d+>\|", t)]
        unused = iter([special.pop(t) for t in spare] + list(range(top + 1, vocab)))
        # a table without spare rows can still write points and times as released checkpoints do
        for name in WRITABLE:
            if name not in special and (spare_id := next(unused, None)) is not None:
                special[name] = spare_id
        special |= {name: vocab + k for k, name in enumerate(READ_ONLY)}
        self.ids = special
        self.encoding = tiktoken.Encoding(os.path.basename(path),
                                          pat_str=split_pattern(spec.get("pre_tokenizer")),
                                          mergeable_ranks=ranks, special_tokens=special)
        named = lambda key: names[key].get("content") if isinstance(names.get(key), dict) else names.get(key)
        self.eos_name = next((n for n in (named("eos_token"), "<|endoftext|>", "<|im_end|>") if n in special),
                             None)
        if self.eos_name is None:
            raise BadCheckpoint(f"{path}: has neither <|endoftext|> nor <|im_end|> to end a sequence with")
        self.eos = special[self.eos_name]
        # Qwen has none: there a sequence opens with what ends another
        self.bos = special.get(named("bos_token"), self.eos)

    def save(self, folder):
        """tokenizer.json, tokenizer_config.json, which names the ends of a sequence, and the chat template,
        in `folder`.

        Every id up to the last input-only row gets a name there, the published one: other readers number the
        tokens they are given in order, and look the vision tokens up by name.
        """
        spec = read_json(self.path)
        ordinary = set(spec["model"]["vocab"].values())
        names = {i: name for name, i in self.ids.items() if i < self.vocab}
        names |= {self.vocab + k: "<im_patch>" if name == "<image>" else name.replace("image_", "im_")
                  for k, name in enumerate(READ_ONLY)}
        kept = {t["id"]: t for t in spec.get("added_tokens", []) if t["id"] in names
                and t["content"] == names[t["id"]]}
        spec["added_tokens"] = [
            kept.get(i) or dict(id=i, content=names.get(i, f"|<EXTRA_TOKENS_{i}>|"), single_word=False,
                                lstrip=False, rstrip=False, normalized=False,
                                special=names.get(i) not in WRITABLE)
            for i in range(self.vocab + len(READ_ONLY)) if i in kept or i not in ordinary]
        write_json(os.path.join(folder, "tokenizer.json"), spec)
        bos = next(name for name, i in self.ids.items() if i == self.bos)
        write_json(os.path.join(folder, "tokenizer_config.json"),
                   dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=self.eos_name, bos_token=bos,
                        chat_template=CHAT_TEMPLATE))
        with open(os.path.join(folder, "chat_template.jinja"), "w") as f:  # where processors look for it
            f.write(CHAT_TEMPLATE)

    def encode(self, text, special=WRITABLE):
        return self.encoding.encode(text, allowed_special=set(special), disallowed_special=())

    def decode(self, ids):
        """Text of ids; bytes that are no UTF-8 become the replacement character, ids of unused rows
        vanish."""
        known = self.encoding._special_tokens.values()
        return self.encoding.decode([i for i in ids if i in known or i < self.vocab and self.is_text(i)],
                                    errors="replace")

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


# ---- chat --------------------------------------------------------------------------------------------------

def chat_pieces(messages):
    """Alternating user and assistant messages -> [(text, whether it is learned)], the way Molmo2 writes a
    chat.

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


# The same for readers that expect a Jinja template: pictures and videos come first, whatever the message they
# are in.
CHAT_TEMPLATE = (
    "{%- for m in messages if m.content is not string %}{%- for c in m.content if c.type in ('image', 'video') %}"
    "{{ '<|' + c.type + '|>' }}{%- endfor %}{%- endfor %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.content is string %}{{ m.content }}"
    "{%- else %}{%- for c in m.content if c.type == 'text' %}{{ c.text }}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}")

# Wordings for annotations without a prompt, by style; a task is the style of its plain form.
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
PROMPTS |= {alias: PROMPTS[style] for alias, style in (  # the released names of the same
    ("long_caption", "image_caption"), ("pointing", "image_pointing"), ("cosyn_point", "image_pointing"),
    ("video_long_caption", "video_caption"), ("video_point", "video_pointing"),
    ("video_single_point_track_start_end", "video_single_point_track_per_frame"))}
# Styles whose answer holds a number: how `released_points` words it.
ANSWER_MODES = {"counting": "count", "video_count": "count", "multi_image_counting": "count",
                "point_count": "point_count", "video_point_count": "point_count",
                "multi_image_point_then_count": "point_count", "video_count_point": "count_point",
                "multi_image_count_then_point": "count_point"}
# the wording of evaluations; the others are varied
OPTIONS = ("{question}\nOnly return the correct answer option.\n{options}",
           "{question}\n{options}", "{question} Choose from:\n{options}", "{options}\n\n{question}",
           "{question}\nWhich of these is right?\n{options}")


def multiple_choice(question, options, correct, rng=None):
    """(prompt, answer) of a question whose `correct`-th option is right. rng None gives the one wording of
    evaluations; else wording and order are drawn, and one in five lists has no letters."""
    order, template, lettered = list(range(len(options))), OPTIONS[0], True
    if rng:
        rng.shuffle(order)
        if rng.random() > 0.1:
            template, lettered = rng.choice(OPTIONS[1:]), rng.random() < 0.8 or not options[correct].strip()
    lines = [f"{chr(65 + k)}. {options[i]}" if lettered else options[i] for k, i in enumerate(order)]
    return template.format(question=question, options="\n".join(lines)), lines[order.index(correct)]


def write_prompt(a, rng, grammar="spec", input_points=""):
    """The prompt of an annotation that has none: a wording of its style or task, its placeholders filled from
    its fields. input_points: those of the annotation, as text."""
    def clock(seconds):  # half of the times people would type a clock
        if rng.random() < 0.5:
            return f"{seconds:.1f}"
        return f"{int(seconds // 3600):02d}:{int(seconds // 60 % 60):02d}:{seconds % 60:04.1f}"

    images = "all images" if "images" not in a else " and ".join(
        f"image_{i + 1}" if grammar == "released" else f"image {i}" for i in a["images"])
    label = a.get("label", "objects")
    return rng.choice(PROMPTS.get(a.get("style")) or PROMPTS[a["task"]]).format(
        label=label, fps=number(a.get("fps", 2), 2), question=a.get("question", ""), selected_images=images,
        selected_label=f"the {label} in {images}", start_time=clock(a.get("start_time", 0)),
        end_time=clock(a.get("end_time", 0)), timestamp=clock(a.get("timestamp", 0)),
        input_points=input_points)


def points_of_answer(a, kind):
    """Which points the answer of an annotation has, as its style asks (all, the ends of each track, or what follows
    the given point), and its mode: ([point], "point", "count", "point_count" or "count_point")."""
    points, style = a["points"], a.get("style") or a["task"]
    if kind == "video" and "ground_start_end" in style:
        times = lambda i: [p["t"] for p in points if p["id"] == i]
        points = [p for p in points if p["t"] in (min(times(p["id"])), max(times(p["id"])))]
    if kind == "video" and a.get("input_points"):
        points = [p for p in points if p["t"] > max(q["t"] for q in a["input_points"])]
    return points, ANSWER_MODES.get(style) or ANSWER_MODES.get(a["task"], "point")


# The released models were told the set an academic question came from ("vqa2: What is ..."), which steers
# them to its short answers. Styles people talk in carry no such prefix, and neither does multiple choice.
NO_PREFIX = frozenset("""
    point_count pointing cosyn_point user_qa long_caption short_caption video_long_caption video_short_caption text_sft
    video_point_track_per_frame video_point_track_start_end video_single_point_track_start_end video_transcript
    video_clip_caption_start_end video_clip_caption_start_end_in_seconds video_clip_transcript_start_end
    video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp video_frame_caption_timestamp_in_seconds
    correction_qa video_point video_point_count video_count video_count_point multi_image_pointing multi_image_counting
    multi_image_point_then_count multi_image_count_then_point video_multiple_choice a_okvqa_mc ai2_diagram
    ai2_diagram_no_letter science_qa eval_multiple_choice multi_image_mc multi_image_mc_exp mantis_instruct_mc
    eval_multi_image_mc""".split())


def styled(prompt, style):
    """A prompt as the released models saw it: "style: prompt", or as it is for the styles without a
    prefix."""
    return prompt if not style or style in NO_PREFIX else f"{style}: {prompt}".rstrip()


# ---- points ------------------------------------------------------------------------------------------------

NOTHING = "There are none."


def number(x, digits):
    """`x` with at most `digits` decimals and no trailing zeros."""
    text = f"{x:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


# The grammar of the released checkpoints ("html-v2"):  <points coords="1 1 250 750 2 500 500">cups</points>
# Groups, one per picture (from 1) or frame (seconds), are parted by ";"; an item is an id and thousandths of
# the sides.

def thousandths(x, y):
    """(x, y) of [0, 1] as the released formatter rounds it: half to even. What lies outside is clipped only
    if y does not: a slip there, kept so that its output can be reproduced; rows with such points never get
    this far."""
    if 0 <= y <= 1:
        x = min(max(x, 0), 1)
    return round(1000 * x), round(1000 * y)


def released_tag(name, groups, label, alt):
    coords = ";".join(f"{prefix} " + " ".join(f"{i} {x:03d} {y:03d}" for i, (x, y) in items)
                      for prefix, items in groups)
    return f"<{name}{'' if alt is None else f' alt={chr(34)}{alt}{chr(34)}'} coords=\"{coords}\">{label}</{name}>"


def released_points(groups, label, mode="point", alt=None):
    """[(prefix, [(x, y), ...])] -> the released text. Ids count through the answer, in each group by x, then
    y.

    mode: point, point_count ("Counting the ... shows a total of 2."), count_point ("There are 2 ...") or
    count ("2").
    """
    total, numbered = 0, []
    for prefix, places in groups:
        places = sorted(thousandths(*p) for p in places)
        numbered.append((prefix, list(enumerate(places, total + 1))))
        total += len(places)
    tag = released_tag("points", numbered, label, alt)
    texts = {"point": tag, "count": str(total),
             "point_count": f"Counting the {tag} shows a total of {total}.",
             "count_point": f"There are {total} {tag}."}
    return texts[mode] if total else NOTHING


def released_tracks(frames, label, alt=None, ends_only=False, after=None):
    """[(t, {object: (x, y)})], visible objects only -> the released text. An object keeps the number of its
    first appearance.

    ends_only: first and last appearances alone. after: frames later than this time alone, as when the start
    is given.
    """
    if not frames:
        return "No tracks available."
    frames = sorted(((t, {k: thousandths(*p) for k, p in seen.items()}) for t, seen in frames),
                    key=lambda f: f[0])
    ids, times = {}, {}
    for t, seen in frames:
        for k in sorted(seen, key=lambda k: seen[k]):
            ids.setdefault(k, len(ids) + 1)
            times.setdefault(k, []).append(t)
    groups = []
    for t, seen in frames:
        items = sorted((ids[k], p) for k, p in seen.items() if not ends_only
                       or t in (times[k][0], times[k][-1]))
        if items and (after is None or t > after):
            groups.append((f"{t:.1f}", items))
    return released_tag("tracks", groups, label, alt) if groups else ""


def parse_released(text):
    """[(prefix, id, x, y)] in the released grammar, in order, x and y in thousandths; what is malformed is
    left out."""
    found = []
    for coords in re.findall(r'<(?:points|tracks)\b[^<>]*coords="([0-9\t:;, .]+)"/?>', text):
        for prefix, items in re.findall(r"(?:^|[\t:,;])(\d{1,9}(?:\.\d{1,9})?) ([0-9. ]+)", coords):
            for i, x, y in re.findall(r"(\d{1,9}) (\d{3,4}) (\d{3,4})", items):
                if int(x) <= 1000 and int(y) <= 1000:
                    found.append((float(prefix), int(i), int(x), int(y)))
    return found


