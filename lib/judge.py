"""
The judge of captions: a language model behind an OpenAI-compatible URL. eval.py asks it with --judge_url.

    caption ─► split ─► statements that can each be true or false ─► share_stated: how many does the other one support?

Its key, if it wants one, is in the environment variable JUDGE_API_KEY.
"""
import json
import os
import time

import requests


class JudgeError(Exception):
    """The judge did not answer."""


class Judge:
    """A language model behind an OpenAI-compatible URL that splits captions into statements and checks them."""

    def __init__(self, url, model, tries=5, pause=2.0):
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self.tries = tries
        self.pause = pause  # seconds after the first failure; doubled after each
        key = os.environ.get("JUDGE_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, prompt):
        """The answer as parsed JSON; after `tries` failures with growing pauses JudgeError."""
        body = dict(model=self.model, temperature=0, messages=[dict(role="user", content=prompt)])
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                response = requests.post(self.url, json=body, headers=self.headers, timeout=120)
                response.raise_for_status()
                text = response.json()["choices"][0]["message"]["content"]
                return json.loads(text[text.index("["):text.rindex("]") + 1])
            except (requests.RequestException, ValueError, LookupError, TypeError) as e:
                trouble = f"{type(e).__name__}: {e}"
        raise JudgeError(f"--judge_url {self.url}: no usable answer in {self.tries} tries ({trouble})")

    def split(self, caption):
        """The statements of a caption."""
        return list(map(str, self.ask(
            "Split this description into short statements that can each be true or false by themselves. "
            f"Answer with a JSON list of strings.\n\n{caption}")))

    def share_stated(self, statements, caption):
        """The share of the statements that the caption supports."""
        if not statements:
            return 0.0
        listed = "\n".join(f"{i + 1}. {s}" for i, s in enumerate(statements))
        verdicts = self.ask(f"Description:\n{caption}\n\nStatements:\n{listed}\n\nFor each statement: does the "
                            "description say so? Answer with a JSON list of true and false, in order.")
        if len(verdicts) != len(statements):
            raise JudgeError(f"--judge_url {self.url}: {len(verdicts)} verdicts on {len(statements)} statements")
        return sum(v is True for v in verdicts) / len(statements)

    def score(self, predicted, true, statements=None):
        """(precision, recall): the share of the predicted statements that the true caption supports, and of the true
        statements, given or split off here, that the predicted caption supports."""
        predicted_statements = self.split(predicted)
        true_statements = statements or self.split(true)
        return self.share_stated(predicted_statements, true), self.share_stated(true_statements, predicted)
