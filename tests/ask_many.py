"""
Files asked about in one go against one by one, each a command: seconds, and whether the answers are the same. Then the
run in one go again, with a broken file among the others and killed when half of the files are done.

    python tests/ask_many.py out/small/sft/latest "Track the star." data/toy/clips/eval/video/000[01]*.mp4
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time

SAMPLE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sample.py")


def command(checkpoint, question, files, folder):
    return [sys.executable, SAMPLE, checkpoint, *files, question, "--out", folder]


def ask(*arguments):
    """Seconds of one command, and its output. It fails only where a file was left out."""
    start = time.perf_counter()
    done = subprocess.run(command(*arguments), text=True, capture_output=True)
    assert done.returncode in (0, 1), done.stderr
    return time.perf_counter() - start, done.stdout + done.stderr


def lines(folder):
    path = os.path.join(folder, "results.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        return f.read().splitlines(keepends=True)


def answers(folder):
    return [json.loads(line)["annotations"] for line in lines(folder)]


def killed(checkpoint, question, files, folder):
    """Kill a command as soon as half of the files are done; returns how many lines it left."""
    process = subprocess.Popen(command(checkpoint, question, files, folder), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while len(lines(folder)) < len(files) // 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    return len(lines(folder))


def main():
    checkpoint, question, *files = sys.argv[1:]
    with tempfile.TemporaryDirectory() as parent:
        folder = lambda name: os.path.join(parent, name)
        together, _ = ask(checkpoint, question, files, folder("together"))
        again, _ = ask(checkpoint, question, files, folder("together"))
        alone = sum(ask(checkpoint, question, [file], folder("alone"))[0] for file in files)
        same = answers(folder("together")) == answers(folder("alone"))
        print(f"{len(files)} files: {together:.1f} s in one go, {alone:.1f} s one by one, {again:.1f} s once all are "
              f"done; {'the same answers' if same else 'OTHER ANSWERS'}")

        broken = folder("broken.mp4")
        with open(files[0], "rb") as whole, open(broken, "wb") as half:
            half.write(whole.read()[:os.path.getsize(files[0]) // 2])
        with_broken = [files[0], broken, *files[1:]]
        n_left = killed(checkpoint, question, with_broken, folder("killed"))
        _, told = ask(checkpoint, question, with_broken, folder("killed"))
        summary = re.search(r"\d+ files asked about, \d+ done before", told)
        same = lines(folder("killed")) == lines(folder("together"))
        print(f"killed with {n_left} lines written, then {summary[0] if summary else told}: "
              f"{'the same results.jsonl' if same else 'OTHER RESULTS'}")
        print(*[line for line in told.splitlines() if line.startswith("error:")], sep="\n")


if __name__ == "__main__":
    main()
