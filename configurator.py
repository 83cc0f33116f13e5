"""Config files and command-line overrides over a script's block of globals.

    python train.py config/tiny_phase1.py --max_steps=100 --lr 1e-3 --dry_run

A script writes its settings as plain globals with a trailing comment each, then calls
`configure(globals())`. A config file is a list of assignments of literals; it comes first, options
override it in order. An option is `--key=value`, `--key value` or, for a switch, a bare `--flag`.
The type of a setting is the type of its default; an int will do for a float. Left out on purpose:
nesting, environment variables, running code in config files.
"""
import ast
import difflib
import json
import subprocess
import sys
from pathlib import Path


def stop(message: str, status: int = 1) -> None:
    """End the program with one line: what was expected, what was found, what to do. Status 2 for
    usage."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def commit() -> str:
    """The commit that is running, short, for the log, "-dirty" with changes of its own; "unknown"
    outside a git checkout."""
    here = Path(__file__).parent
    return subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"],
                          capture_output=True, text=True).stdout.strip() or "unknown"


def read_json(path: Path, *needed: str) -> dict:
    """What a JSON file says. ValueError with one line when it is damaged, or lacks a needed key."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:                                         # no JSON, or no UTF-8
        raise ValueError(f"{path}: expected JSON, found a damaged file ({e}): make or download it "
                         "again") from None
    missing = [k for k in needed if not isinstance(found, dict) or k not in found]
    if missing:
        raise ValueError(f"{path}: expected {', '.join(needed)}, found no {missing[0]}: make or "
                         "download it again")
    return found


def configure(settings: dict, argv: list[str] | None = None) -> dict:
    """Override `settings` (a module's globals) in place; -> the final value of every setting, for
    the log.

    Ends the program with status 2 on an unknown key or a value of the wrong type, 0 after --help.
    """
    known = {k: v for k, v in settings.items() if not k.startswith("_")
             and (k.islower() or len(k) == 1)                       # B and T, no constants
             and isinstance(v, (bool, int, float, str))}
    argv, where = list(sys.argv[1:] if argv is None else argv), "the command line"
    while argv:
        arg = argv.pop(0)
        if arg in ("--help", "-h"):
            print(_help(settings, known))
            raise SystemExit(0)
        if not arg.startswith("--"):
            for key, value in _read(arg).items():
                settings[key] = known[key] = _checked(key, value, known, arg)
            continue
        key, given, text = arg[2:].partition("=")
        _known(key, known, where)
        if not given:
            follows = bool(argv) and not argv[0].startswith("--")
            switch = (isinstance(known[key], bool)
                      and not (follows and argv[0] in ("True", "False", "true", "false")))
            if not switch and not follows:
                stop(f"expected a value after --{key}, found none: write --{key}=value", 2)
            text = "True" if switch else argv.pop(0)
        settings[key] = known[key] = _checked(key, _literal(text, known[key]), known, where)
    return known


def _read(path: str) -> dict:
    """The assignments of a config file; only literals, so that reading a config never runs
    anything."""
    if not Path(path).is_file():
        stop(f"expected a config file or --key=value, found {path!r}, which is neither: see "
             "config/", 2)
    values = {}
    try:
        for node in ast.parse(Path(path).read_text()).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue                                            # the docstring
            if (not isinstance(node, ast.Assign) or len(node.targets) > 1
                or not isinstance(node.targets[0], ast.Name)):
                stop(f"{path}:{node.lineno}: expected `key = literal`, found something else: keep "
                     "configs plain", 2)
            values[node.targets[0].id] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError) as e:
        stop(f"{path}: expected `key = literal` lines, found {str(e).splitlines()[0]}: keep "
             "configs plain", 2)
    return values


def _known(key: str, known: dict, where: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        stop(f"unknown key {key!r} in {where} "
             f"({f'did you mean {near[0]!r}?' if near else 'see --help'})", 2)


def _literal(text: str, default: object) -> object:
    """What was typed, as a Python literal where the setting is not itself a string."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _checked(key: str, value: object, known: dict, where: str) -> object:
    _known(key, known, where)
    kind = type(known[key])
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        stop(f"{key} in {where}: expected {kind.__name__} such as {known[key]!r}, found {value!r}",
             2)
    return value


def _help(settings: dict, known: dict) -> str:
    """The script's docstring and its settings, each with the comment that stands beside it in the
    source."""
    source = Path(settings["__file__"]).read_text().splitlines()
    lines = [line for line in source if line.partition(" = ")[0] in known]
    return "\n".join([(settings.get("__doc__") or "").strip(), "",
                      "settings (config file first, then --key=value):", *lines])
