"""
Files asked about in one go against one by one, each a command: seconds, and whether the answers are the same.

    python tests/ask_many.py out/small/sft/latest "Track the star." data/toy/clips/eval/video/000[01]*.mp4
"""
import json
import os
import subprocess
import sys
import tempfile
import time

SAMPLE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sample.py")


def ask(checkpoint, question, files, folder):
    """Seconds of one command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, SAMPLE, checkpoint, *files, question, "--out", folder], check=True,
                   stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def answers(folder):
    with open(os.path.join(folder, "results.jsonl")) as f:
        return [json.loads(line)["annotations"] for line in f]


if __name__ == "__main__":
    checkpoint, question, *files = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        together = ask(checkpoint, question, files, os.path.join(folder, "together"))
        again = ask(checkpoint, question, files, os.path.join(folder, "together"))
        alone = sum(ask(checkpoint, question, [file], os.path.join(folder, "alone")) for file in files)
        same = answers(os.path.join(folder, "together")) == answers(os.path.join(folder, "alone"))
    print(f"{len(files)} files: {together:.1f} s in one go, {alone:.1f} s one by one, {again:.1f} s once all are done; "
          f"{'the same answers' if same else 'OTHER ANSWERS'}")
