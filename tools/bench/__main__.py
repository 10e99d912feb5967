"""
Checks that the project computes the right numbers, and measures how fast it is: on a CUDA GPU, else on the CPU.

    python -m tools.bench                                  # at most 15 minutes; figures go to out/bench
    python -m tools.bench --parts env speed --out DIR      # DIR/results.jsonl and DIR/log.txt are appended to
    python -m tools.bench --cpu_rehearsal                  # all parts, tiny sizes, three minutes: does this file work?

On any machine:
    env        versions; matrix product and copy: the two ceilings that later shares refer to, so run it first
    correct    golden outputs; the mask of training against the dense mask; pretrain.py on the CPU and on the card
    transformers   a training step and an answer beside transformers' own Molmo2, if that is installed
    packing    answers trained on in a second: message trees, packed, against a row for each question
    data       ms on one core: JPEG and MP4 to crops, beside Pillow and FFmpeg alone; planning a record
On a card:
    speed      training steps of the 1B model, eager; where the ms go; the kernels that take most of them
    compiled   the same with --compile; whether batches of other images compile again
    decode     tokens a second of an answer, against what the memory bandwidth allows
    files      the 1B model trained from JPEG and MP4: the share of time it waits for data
    long       one sequence of 36,864 tokens that a video fills

Each part is a process with a time limit, so what fails, hangs or runs out of memory costs that part alone. The 1B
model needs a card of 80 GB. A figure is a line of results.jsonl as soon as it is known. How to read them: `ok` must
be true. Errors are relative: fp32 is off by less than 1e-4, bf16 by about as much as on a CPU (bf16_cpu). `of_matmul`
is a step's share of the measured matrix product, `mfu` its share of what the card's maker states: an H200 had 0.31
and 0.24 eager, 0.39 and 0.31 compiled. `forecast_gb` is what --dry_run says, `peak_gb` what was used. `busy_share` is
the share of a step in which the card works: far below 1, the CPU does not launch kernels fast enough. `graphs`,
compiled so far, stops growing after two batches. `floor_ms` is the time to read the decoder's weights and its cache
once. `wait` near 0: the workers keep up. `ratio` is our time as a share of transformers', both of one thread on a CPU;
`gain` is what trees and packing do for our own model, `beside_transformers` is gain / ratio. A line with `error` or
`skipped` has the reason; the exit status is 1 where something failed or is not ok.
"""
import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time

import lib  # noqa: F401: before torch, which reads the environment that it sets

from tools.bench.beside import part_packing, part_transformers
from tools.bench.common import LEAST, MOST, ROOT, Bench, read_lines
from tools.bench.decoding import part_data
from tools.bench.device import part_correct, part_decode, part_env, part_files, part_long, part_speed

PARTS = dict(env=part_env, correct=part_correct, speed=part_speed, compiled=part_speed, decode=part_decode,
             files=part_files, long=part_long, transformers=part_transformers, packing=part_packing, data=part_data)
ON_A_CPU = ("env", "correct", "transformers", "packing", "data")  # the others would take hours there


def run_part(part, until, out, tiny):
    """Run a part in a process and a folder of its own. Returns the exit status."""
    command = [sys.executable, "-m", "tools.bench", "--out", out, "--parts", part, "--until", str(until)]
    command += ["--cpu_rehearsal"] if tiny else []
    # Offline: what transformers reads is in a folder here.
    environment = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONPATH=os.pathsep.join([ROOT, *sys.path]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(f"{out}/log.txt", "a") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
                                   env=environment)
        try:
            return process.wait(until - time.time())
        except subprocess.TimeoutExpired:
            return "none, it was stopped at its time limit"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
                process.wait()


def main(argv=None):
    """Run the parts and print their figures. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join("out", "bench"), help="folder for the figures [out/bench]")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="[all; without a card those for any machine]")
    parser.add_argument("--seconds", type=float, default=900, help="for all parts together [900]")
    parser.add_argument("--cpu_rehearsal", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a part's process: when it will be stopped
    args = parser.parse_args(argv)
    out = os.path.abspath(args.out)
    bench = Bench(out, args.cpu_rehearsal, "", args.until)
    parts = args.parts or list(PARTS if bench.cuda or bench.tiny else ON_A_CPU)
    if args.until:
        bench.part, = parts
        bench.attempt(bench.part, PARTS[bench.part])
        return 0
    os.makedirs(out, exist_ok=True)
    n_lines_before, end = len(read_lines(bench.results)), time.time() + args.seconds
    for bench.part in parts:
        until = min(end, time.time() + (MOST if bench.cuda else 10 * MOST))
        if not (bench.cuda or bench.tiny or bench.part in ON_A_CPU):
            bench.say("part", skipped="no CUDA device found; --cpu_rehearsal tries this part with tiny sizes")
            continue
        if until - time.time() < LEAST:
            bench.say("part", skipped="no time left")
            continue
        status = run_part(bench.part, until, out, bench.tiny)
        if status != 0:
            bench.say("part", error=f"exit status {status}")
    lines = read_lines(bench.results)[n_lines_before:]
    for line in lines:
        figures = [f"{key} {value}" for key, value in line.items() if key not in ("part", "what", "machine")]
        print(f"{line['part']:13}{line['what']}: {'  '.join(figures)}"[:170])
    return int(any("error" in line or line.get("ok") is False for line in lines))


if __name__ == "__main__":
    sys.exit(main())
