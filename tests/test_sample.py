"""The commands that people type first, on the shipped weights."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def sample(*options: str, said: str = "") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "sample.py", *options], cwd=ROOT, input=said, capture_output=True, text=True)


def test_one_shot_is_greedy_and_repeats_itself_to_the_letter():
    a, b = (sample("--start=Return the ", "--max_new_tokens=12") for _ in range(2))
    assert a.returncode == 0 and a.stdout == b.stdout and a.stdout.startswith("Return the ") and len(a.stdout) > 15, a.stderr


def test_a_seed_fixes_what_is_drawn():
    drawn = {sample("--start=Return the ", "--max_new_tokens=12", "--temperature=1.0", f"--seed={s}").stdout for s in (1, 1, 2)}
    assert len(drawn) == 2


def test_a_conversation_keeps_its_context_across_turns_and_shows_its_ticks():
    run = sample("--chat", "--show", "ticks", said="Marvas keeps a trout.\nWhat pet does Marvas have?\n")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("model:") == 2 and len(re.findall(r"tick +\d+/8  sure [01]\.\d\d", run.stdout)) >= 8
    assert "keeps a trout." in run.stdout.split("  = ")[2]         # what was said a turn before


def test_halting_answers_with_fewer_ticks():
    read = [[int(t) for t in re.findall(r"tick +(\d+)/8", sample("--chat", "--show=ticks", "--start=Marvas keeps a trout. "
             "What pet does Marvas have?", f"--halt={halt}").stdout)] for halt in (0.0, 0.3)]
    assert all(read) and sum(read[1]) / len(read[1]) < sum(read[0]) / len(read[0])


@pytest.mark.parametrize("options, status, said", [
    ([], 1, "expected something to say"), (["--start=" + "word " * 600], 1, "shorten the prompt"),
    (["--start=a", "--memory=on"], 1, "expected --memory=off"), (["--start=a", "--graft=none.safetensors"], 1, "expected weights at"),
    (["--start=a", "--base=no/such/model/at/all"], 1, "expected a Qwen3 folder or a reachable Hugging Face name"),
    (["--start=a", "--temprature=1"], 2, "did you mean 'temperature'?"), (["--start=a", "--tokenizer=tests"], 1, "no tokenizer at"),
    (["--start=a", "--max_new_tokens=0"], 1, "expected max_new_tokens > 0"), (["--start=a", "--show=everything"], 1, "expected --show=ticks")])
def test_bad_input_ends_with_one_line(options, status, said):
    run = sample(*options)
    assert run.returncode == status and said in run.stderr and run.stderr.count("error:") == 1 and "Traceback" not in run.stderr
