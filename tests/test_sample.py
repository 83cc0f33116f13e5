"""The commands that people type first, on the shipped weights."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TICKS = json.loads((ROOT / "weights/card.json").read_text())["graft"]["config"]["ticks"]


def sample(*options: str, said: str = "") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "sample.py", *options], cwd=ROOT, input=said,
                          capture_output=True, text=True)


def test_one_shot_is_greedy_and_repeats_itself_to_the_letter():
    a, b = (sample("--start=Return the ", "--max_new_tokens=12") for _ in range(2))
    assert (a.returncode == 0 and a.stdout == b.stdout and a.stdout.startswith("Return the ")
            and len(a.stdout) > 15), a.stderr


def test_a_seed_fixes_what_is_drawn():
    drawn = {sample("--start=Return the ", "--max_new_tokens=12", "--temperature=1.0",
                    f"--seed={s}").stdout for s in (1, 1, 2)}
    assert len(drawn) == 2


def test_a_conversation_keeps_its_context_across_turns_and_shows_its_ticks():
    run = sample("--chat", "--show", "ticks",
                 said="Marvas keeps a trout.\nWhat pet does Marvas have?\n")
    assert run.returncode == 0, run.stderr
    assert (run.stdout.count("model:") == 2
            and len(re.findall(rf"tick +\d+/{TICKS}  sure [01]\.\d\d", run.stdout)) >= 8)
    assert "keeps a trout." in run.stdout.split("  = ")[2]         # what was said a turn before


def test_halting_answers_with_fewer_ticks():
    read = [[int(t) for t in re.findall(rf"tick +(\d+)/{TICKS}", sample(
        "--chat", "--show=ticks", "--start=Marvas keeps a trout. What pet does Marvas have?",
        f"--halt={halt}").stdout)] for halt in (0.0, 0.3)]
    assert all(read) and sum(read[1]) / len(read[1]) < sum(read[0]) / len(read[0])


# -----------------------------------------------------------------------------
# the memory

def remembering(folder: Path, *options: str, said: str = "",
                memory: str = "on") -> subprocess.CompletedProcess:
    return sample("--memory", memory, f"--memory_dir={folder}", *options, said=said)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """A memory of two sessions, each made by a process of its own."""
    folder = tmp_path_factory.mktemp("told") / "memory"
    for text in ("Fenlix works as a florist. Keltin lives in Quito.", "Marvas keeps a trout."):
        run = remembering(folder, f"--start={text}")
        assert run.returncode == 0 and "(kept " in run.stdout, run.stderr
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_it_was_told_survives_the_process_and_reading_writes_nothing(told):
    before = files(told)
    for question, answer in (("What work does Fenlix have?", "Fenlix works as a florist."),
                             ("What animal does Marvas keep?", "Marvas keeps a trout."),
                             ("What city does Keltin live in?", "Keltin lives in Quito.")):
        assert answer in remembering(told, f"--start={question}", memory="read-only").stdout
        assert answer not in sample("--chat", f"--start={question}").stdout
    assert files(told) == before


def test_why_names_the_session_and_forgetting_it_changes_that_answer_alone(told, tmp_path):
    """What a session gave to the value's logit makes it the one to forget;
    then another's answer still stands, to the letter."""
    here, asked = tmp_path / "here", {"What animal does Marvas keep?": "Marvas keeps a trout.",
                                      "What work does Fenlix have?": "Fenlix works as a florist."}
    sample(f"--memory_dir={told}", f"--export_to={tmp_path}/all.safetensors")
    sample(f"--memory_dir={here}", f"--import_from={tmp_path}/all.safetensors")
    before = {q: remembering(here, f"--start={q}", "--show=why", memory="read-only").stdout
              for q in asked}
    tokens = {q: json.loads(said.splitlines()[-1]) for q, said in before.items()}
    for parts in tokens.values():
        for t in parts:
            assert t["logit"] == pytest.approx(t["by_itself"] + sum(t["sessions"].values()),
                                               abs=1e-3)
    gave = {q: {name: sum(t["sessions"][name] for t in parts
                          if t["token"].strip() in answer.split(" ")[-1])
                for name in parts[0]["sessions"]}
            for (q, answer), parts in zip(asked.items(), tokens.values())}
    (trout, florist) = (max(shares, key=shares.get) for shares in gave.values())
    assert trout != florist
    sample(f"--memory_dir={here}", f"--forget={trout}")
    pet, work = asked
    assert asked[pet] not in remembering(here, f"--start={pet}", memory="read-only").stdout
    assert asked[work] in remembering(here, f"--start={work}", memory="read-only").stdout
    chat = remembering(here, said=f"/why\n{work}\n/why\n", memory="read-only").stdout
    assert "nothing was said yet" in chat and f"{florist} +" in chat and "by itself" in chat


def test_a_session_is_written_when_it_is_interrupted(tmp_path):
    run = subprocess.Popen([sys.executable, "-u", "sample.py", "--memory", "on",
                            f"--memory_dir={tmp_path}/m"], cwd=ROOT, stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, text=True)
    run.stdin.write("Marvas keeps a trout.\n")
    run.stdin.flush()
    while not run.stdout.readline().startswith("model:"):
        pass
    run.send_signal(signal.SIGINT)
    assert "(kept " in run.communicate(timeout=60)[0] and run.returncode == 0
    assert "1 session(s)" in sample(f"--memory_dir={tmp_path}/m", "--sessions").stdout


def test_a_letter_that_the_terminal_lacks_loses_no_session(tmp_path):
    run = subprocess.run([sys.executable, "sample.py", "--memory=on", f"--memory_dir={tmp_path}/m",
                          "--start=Marvas keeps a trout.", "--temperature=30"], cwd=ROOT,
                         capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0 and b"(kept " in run.stdout and b"?" in run.stdout, run.stderr


def test_a_byte_that_is_no_utf_8_ends_the_session_and_what_was_said_before_counts(tmp_path):
    run = subprocess.Popen([sys.executable, "-u", "sample.py", "--memory=on",
                            f"--memory_dir={tmp_path}/m"], cwd=ROOT, stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    run.stdin.write(b"Marvas keeps a trout.\n")
    run.stdin.flush()
    while not run.stdout.readline().startswith(b"model:"):
        pass
    out, err = run.communicate(b"\xff\n", timeout=60)
    assert b"(kept " in out and run.returncode == 1
    assert err.count(b"error:") == 1 and b"expected UTF-8 on standard input, found byte 0xff" in err


def test_sessions_are_listed_shown_exported_imported_and_forgotten(told, tmp_path):
    listing = sample(f"--memory_dir={told}", "--sessions").stdout
    ids = re.findall(r"^([0-9a-f]{12})", listing, re.M)
    assert len(ids) == 2 and "2 session(s)" in listing
    assert "surprise" in sample(f"--memory_dir={told}", f"--show_session={ids[1]}").stdout
    assert "exported 2" in sample(f"--memory_dir={told}",
                                  f"--export_to={tmp_path}/all.safetensors").stdout
    here = tmp_path / "here"
    assert "imported 2" in sample(f"--memory_dir={here}",
                                  f"--import_from={tmp_path}/all.safetensors").stdout
    assert "forgot 1" in sample(f"--memory_dir={here}", f"--forget={ids[1]}").stdout
    asked = "What animal does Marvas keep?"
    assert "Marvas keeps a trout." not in remembering(here, f"--start={asked}",
                                                      memory="read-only").stdout
    run = remembering(here, said="/list\n/forget nobody\n/forget all\n/help\n")
    assert ("error: expected the id" in run.stdout
            and "forgot 1 session(s), 0 remain" in run.stdout and "/export FILE" in run.stdout)


@pytest.mark.parametrize("options, said", [
    (["--memory=sometimes", "--start=a"], "expected --memory on, off or read-only"),
    (["--memory=read-only", "--start=a", "--memory_dir=no/such"], "found none"),
    (["--memory=on", "--start=a", "--memory_dir=config"], "found other files"),
    (["--memory=on", "--start=a", "--graft="], "expected a graft with a CTM block"),
    (["--memory_dir=no/such", "--sessions"], "found none")])
def test_bad_memory_input_ends_with_one_line(options, said):
    run = sample(*options)
    assert (run.returncode == 1 and said in run.stderr and run.stderr.count("error:") == 1
            and "Traceback" not in run.stderr)


@pytest.mark.parametrize("options, status, said", [
    ([], 1, "expected something to say"), (["--start=" + "word " * 600], 1, "shorten the prompt"),
    (["--start=a", "--graft=none.safetensors"], 1, "expected a safetensors file at"),
    (["--start=a", "--base=no/such/model/at/all"], 1,
     "expected a Qwen3 folder or a reachable Hugging Face name"),
    (["--start=a", "--temprature=1"], 2, "did you mean 'temperature'?"),
    (["--start=a", "--tokenizer=tests"], 1, "no tokenizer at"),
    (["--start=a", "--max_new_tokens=0"], 1, "expected max_new_tokens > 0"),
    (["--start=a", "--show=everything"], 1, "expected --show=ticks")])
def test_bad_input_ends_with_one_line(options, status, said):
    run = sample(*options)
    assert run.stdout == ""                                         # nor is an answer begun
    assert (run.returncode == status and said in run.stderr and run.stderr.count("error:") == 1
            and "Traceback" not in run.stderr)
