"""Config files and overrides: what is accepted, and that everything else is refused in one line."""
import re
import subprocess

import pytest

import configurator
from configurator import configure


def settings() -> dict:
    return {"__doc__": "A script.", "__file__": __file__, "learning_rate": 0.1, "steps": 10,
            "name": "a", "dry_run": False, "_hidden": 1, "LIMIT": 1}


def test_a_file_comes_first_and_options_override_it(tmp_path):
    (tmp_path / "c.py").write_text('"""doc"""\nsteps = 3\nname = "x"\n')
    s = settings()
    assert configure(s, [str(tmp_path / "c.py"), "--steps=5"])["steps"] == 5 and s["name"] == "x"


@pytest.mark.parametrize("argv, key, value", [
    (["--name=a=b=c"], "name", "a=b=c"), (["--name", "on"], "name", "on"),
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
    (["--dry_run"], "dry_run", True), (["--dry_run=False"], "dry_run", False),
    (["--dry_run", "--steps=2"], "dry_run", True), (["--dry_run", "False"], "dry_run", False),
    (["--name=12"], "name", "12")])
def test_options_in_every_spelling(argv, key, value):
    s = settings()
    configure(s, argv)
    assert s[key] == value and type(s[key]) is type(value)


@pytest.mark.parametrize("argv, said", [
    (["--lerning_rate=1"],
     "unknown key 'lerning_rate' in the command line (did you mean 'learning_rate'?)"),
    (["--steps=1.5"], "steps in the command line: expected int such as 10, found 1.5"),
    (["--steps=many"], "expected int such as 10, found 'many'"),
    (["--steps"], "expected a value after --steps, found none"),
    (["--_hidden=2"], "unknown key '_hidden'"),
    (["--LIMIT=2"], "unknown key 'LIMIT'"),
    (["nothing.py"], "expected a config file or --key=value, found 'nothing.py'"),
    (["--dry_run=1"], "expected bool such as False, found 1")])
def test_bad_options_end_with_one_line_and_status_2(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        configure(settings(), argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("text, said", [
    ("steps = 1\nstepz = 2\n", "unknown key 'stepz' in"),
    ("import os\n", "expected `key = literal`"),
    ("steps = open('x')\n", "expected `key = literal`"),
    ("steps = = 1\n", "expected `key = literal`"),
    ("steps = name = 1\n", "expected `key = literal`")])
def test_bad_config_files_end_with_one_line_and_status_2(tmp_path, text, said, capsys):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(SystemExit) as end:
        configure(settings(), [str(tmp_path / "c.py")])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_help_prints_the_block_with_its_comments(capsys):
    import train
    with pytest.raises(SystemExit) as end:
        configure({k: v for k, v in vars(train).items()}, ["--help"])
    out = capsys.readouterr().out
    assert (end.value.code == 0 and "accumulation = 1            # micro-batches per step" in out
            and "\nphase = 1" in out)


def test_the_commit_says_when_what_runs_is_not_what_was_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(configurator, "__file__", str(tmp_path / "a.py"))
    assert configurator.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    (tmp_path / "a.py").write_text("1")
    for command in ("init", "add a.py", "commit --message=a"):
        subprocess.run([*git, *command.split()], check=True, capture_output=True)
    clean = configurator.commit()
    (tmp_path / "a.py").write_text("2")
    assert re.fullmatch("[0-9a-f]{7,}", clean) and configurator.commit() == clean + "-dirty"
