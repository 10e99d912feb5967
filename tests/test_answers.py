"""Questions to a model in batches, alone and shared by ranks: every one answered, in order, and nothing but the
answer."""
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import picture, tiny_model

from lib.errors import BadMedia
from sample import Prompt, answer, answers


# what these tests use of the product, named here alone


class Parrot:
    """A model that answers by rule: reply(the prompt's text) -> ids. As `Molmo2.generate` does it, all answers of a
    batch grow together and what has ended repeats its last token."""

    def __init__(self, planner, reply):
        self.tok, self.reply, self.seen, self.limits = planner.tokenizer, reply, [], []
        self.lm_head = SimpleNamespace(weight=torch.zeros(1))

    def generate(self, tokens, crops, pool, pos, example, branch, max_new_tokens, stop):
        prompts = [self.tok.decode(row[e > 0].tolist()) for row, e in zip(tokens, example)]
        assert stop == (self.tok.eos,) and all(p.endswith("<|im_start|>assistant\n") for p in prompts)
        questions = [p.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0] for p in prompts]
        self.seen.append(questions)
        self.limits.append(max_new_tokens)
        replies, done = [self.reply(q) for q in questions], [False] * len(prompts)
        for step in range(max_new_tokens):
            out = [r[step] if step < len(r) else self.tok.eos for r in replies]
            for i, r in enumerate(replies):
                out[i] = self.tok.eos if done[i] else out[i]
                done[i] |= out[i] == self.tok.eos
            yield torch.tensor(out)
            if all(done):
                return


def ask(planner, *questions):
    return [planner.question({}, "", [dict(role="user", content=q)]) for q in questions]


@pytest.mark.parametrize("limit", [3, 4, 5, 30])
def test_an_answer_ends_before_its_end_token(planner, limit):
    """Answers of 0, 3 and 4 tokens that end, and one that goes on to the limit, in one batch."""
    tok = planner.tokenizer
    a, b, c = (tok.encode(x)[0] for x in "abc")
    said = {"none": [], "three": [a, b, c], "four": [a, b, c, a], "all": [a] * 100}
    model = Parrot(planner, lambda q: said[q] + [tok.eos] * (q != "all") + [b] * 9)
    texts, failed = answer(model, planner, ask(planner, *said), limit)
    assert texts == ["", "abc", "abca"[:limit], "a" * limit] and not failed
    assert answer(model, planner, ask(planner, "three"), limit)[0] == ["abc"]


def test_an_answer_of_the_real_model_ends_before_its_end_token(planner):
    """Which token ends it is set to the one that the model says third."""
    model, tok = tiny_model(), planner.tokenizer
    free, _ = answer(model, planner, ask(planner, "What?"), 8)
    plan = ask(planner, "What?")[0]
    batch = dict(tokens=torch.from_numpy(plan.tokens)[None], pos=torch.from_numpy(plan.pos)[None],
                 branch=torch.from_numpy(plan.branch)[None], example=torch.ones(1, plan.n_tokens, dtype=torch.long))
    ids = [int(i) for i in model.generate(**batch, max_new_tokens=8)]
    assert free == [tok.decode(ids)] and tok.eos not in ids
    plans, tok.eos = ask(planner, "What?"), ids[2]
    assert answer(model, planner, plans, 8)[0] == [tok.decode(ids[:ids.index(ids[2])])]


class Ranks:
    """`all_gather` as distributed.World has it, between threads."""

    def __init__(self, size):
        self.size, self.values, self.meet = size, [None] * size, threading.Barrier(size, timeout=60)

    def run(self, of_rank):
        """[of_rank(world)] of all ranks; what one raises is raised here."""
        out, wrong = [None] * self.size, []

        def start(rank):
            try:
                gather = lambda value: self.gather(rank, value)
                out[rank] = of_rank(SimpleNamespace(rank=rank, is_main=rank == 0, size=self.size, all_gather=gather))
            except BaseException as e:
                wrong.append(e)
                self.meet.abort()
        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(self.size)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if wrong:
            raise wrong[0]
        return out

    def gather(self, rank, value):
        self.values[rank] = value
        self.meet.wait()
        values = list(self.values)
        self.meet.wait()
        return values


TASKS = ("image_qa", "counting", "text", "counting", "video_qa")


def test_thirteen_questions_of_four_tasks(planner):
    """Without ranks: tasks are not mixed in a batch, each with its own limit, none larger than asked for."""
    asked = [Prompt(TASKS[i % 5], f"f:{i}", {}, "", f"Number {i}?") for i in range(13)]
    limits = {"image_qa": 3, "counting": 2, "text": 5, "video_qa": 10 ** 6}
    model = Parrot(planner, lambda q: planner.tokenizer.encode(f"<{q}>"))
    texts = answers(model, planner, asked, limits.get, batch=2)
    for (task, *_, q), text in zip(asked, texts):
        assert text == planner.tokenizer.decode(planner.tokenizer.encode(f"<{q}>")[:limits[task]])
    task = {q: t for t, *_, q in asked}
    assert sorted(map(len, model.seen)) == [1, 1, 1, 2, 2, 2, 2, 2]
    for questions, limit in zip(model.seen, model.limits):
        assert len({task[q] for q in questions}) == 1
        longest = max(p.n_tokens for p in ask(planner, *questions))
        assert limit == min(limits[task[questions[0]]], planner.seq_len - longest)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 13])
def test_ranks_answer_every_question_once_and_all_know_all_answers_in_order(planner, ranks, n):
    asked = [Prompt(TASKS[i % 5], f"f:{i}", {}, "", f"Number {i}?") for i in range(n)]
    models = [Parrot(planner, lambda q: planner.tokenizer.encode(f"{q} Yes.") if "3" not in q else [])
              for _ in range(ranks)]
    told = Ranks(ranks).run(lambda world: answers(models[world.rank], planner, asked, lambda task: 30, 2, world))
    expected = [f"Number {i}? Yes." if "3" not in str(i) else "" for i in range(n)]
    assert told == [expected] * ranks
    assert Counter(q for m in models for batch in m.seen for q in batch) == Counter(q for *_, q in asked)
    batches = [len(m.seen) for m in models]
    assert max(batches) - min(batches) <= 1  # shared evenly


@pytest.mark.parametrize("ranks, batch", [(1, 1), (1, 2), (2, 1)])
def test_the_question_whose_image_cannot_be_read_is_named(planner, tmp_path, ranks, batch):
    picture(tmp_path / "0.png", "red", (300, 300))
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:len(whole) // 2])
    asked = [Prompt("image_qa", f"f:{i}", dict(image=f"{i}.png"), str(tmp_path), "What?") for i in (0, 1)]
    model = Parrot(planner, lambda q: [5])
    with pytest.raises(BadMedia, match="f:1: .*1.png"):
        Ranks(ranks).run(lambda world: answers(model, planner, asked, lambda task: 3, batch, world))
