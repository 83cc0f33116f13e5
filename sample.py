"""Let the model speak: continue a text, or chat; watch it think; let it remember.

    python sample.py --start="The following" --max_new_tokens=40
    python sample.py --chat --start="Marvas keeps a goat." --show=ticks
    # one session, written at its end; then another process, days later
    python sample.py --memory on --memory_dir=mem --start="Marvas keeps a goat."
    python sample.py --memory on --memory_dir=mem --start="What does Marvas keep?"
    python sample.py --memory on --memory_dir=mem       # standard input; /help shows its commands
    # also --show_session=ID --forget=ID|all --export_to=F --import_from=F
    python sample.py --memory_dir=mem --sessions

With --memory a session is a chat. What it found worth keeping is written into the weights when it
ends, the louder the more it surprised, be that by an empty line, the end of the input or Ctrl-C.
--memory read-only answers from the memory and never writes a byte.
"""
import json
import sys
import time
from pathlib import Path

import torch

import configurator
import data
from memory import SessionMemory, Store, about, norm_ratio, output_change, why
from model import Cache, NanoCTM, Spoken, choose_device, generate, load_backbone, load_graft

# -----------------------------------------------------------------------------
# settings

base = "weights/backbone"   # a Qwen3 folder or a Hugging Face name
graft = "weights/graft.safetensors"     # what stands in its last layer; "" for the base's own FFN
tokenizer = "weights"       # a folder with ranks.json, or a Hugging Face name
start = ""                  # the text to continue, or in a chat the first thing you say
chat = False                # a conversation; without --start it reads lines from standard input
show = ""                   # "ticks": per token the tick read and how sure the model was; "why":
                            # after each answer a line of JSON: which session gave what of a logit
memory = "off"              # "on" is told and remembers; "read-only" answers and never writes
memory_dir = "memory"       # the store
max_drift = 0.5             # nats a session may cost ordinary text, or it is not written
warm = False                # begin as the nearest session thought; what is written depends on it
sessions = False            # list what is remembered, and stop
show_session = ""           # a session's id: what it told the weights, token by token, and stop
forget = ""                 # a session's id, or "all": forget it, and stop
export_to = ""              # a file: write all sessions into it, and stop
import_from = ""            # a file made by --export_to: add its sessions, and stop
max_new_tokens = 60
temperature = 0.0           # 0: greedy
top_k = 0                   # 0: all
halt = 0.0                  # stop thinking at this certainty; 0: think all K ticks
seed = 1
device = ""                 # "" picks cuda when there is one


# -----------------------------------------------------------------------------
# speaking

class Speaker:
    """A model with its words, its chance and, when it remembers, its session and the memory beside
    its weights."""

    def __init__(self, model: NanoCTM, words: data.Tokenizer, store: Store | None):
        self.model, self.words, self.store = model, words, store
        self.device = model.backbone.embed_tokens.weight.device
        self.chance = torch.Generator(self.device).manual_seed(seed)
        self.session = SessionMemory(model, 1) if store else None
        self.heard: list[int] = []                                  # every token that was read
        self.cache: Cache | None = None
        self.last: list[Spoken] = []                                # the last answer

    def say(self, tokens: list[int], stop: int, own: int = 0, opening: str = "") -> int:
        """Print, after `opening`, what follows `tokens` as it comes; -> the last token, which was
        only said, never read."""
        said, shown, self.last = [], "", []
        self.heard += tokens
        plastic = self.store.plastic() if self.store else None
        for last in generate(self.model, torch.tensor([tokens], device=self.device),
                             max_new_tokens, temperature, top_k, stop, halt or None,
                             plastic, self.chance, self.cache, self.session, own):
            if not said:                                            # or an error stands beside it
                print(opening, end="\n" if show == "ticks" else "", flush=True)
            said.append(int(last.token))
            self.cache, self.last = last.cache, [*self.last, last._replace(cache=None)]
            if show == "ticks":
                ticks, sure = (self.model.ctm.config.ticks if self.model.ctm else 1,
                               float(last.certainty))
                print(f"  tick {int(last.tick) + 1:2d}/{ticks}  sure {sure:4.2f} "
                      f"{'#' * round(20 * max(sure, 0)):20s}  "
                      f"{self.words.decode(said[-1:])!r}")
            elif said[-1] != stop:
                text = self.words.decode(said)  # whole, since a character may span tokens
                if not text.endswith("\ufffd"):
                    print(text[len(shown):], end="", flush=True)
                    shown = text
        if show == "ticks":
            print("  =", self.words.decode([t for t in said if t != stop]).strip())
        else:
            print()
        self.heard += said[:-1]
        if show == "why":
            print(json.dumps(self.why()))
        return said[-1]

    def why(self) -> list[dict]:
        """What of each token of the last answer came from which session, in logits."""
        return [{"token": self.words.decode([int(s.token)]), **split}
                for s, split in zip(self.last, why(self.store, self.last))]

    def remember(self) -> None:
        """End the session: write it into the memory, and say what that did."""
        if self.store is None or self.store.read_only or not self.heard:
            return
        factors = self.session.close()[0]
        snapshot = self.session.snapshot(0, torch.tensor(self.heard, device=self.device))
        entry = self.store.commit(factors, snapshot, len(self.heard))
        before, after = entry["text_nats"]
        print(f"(kept {entry['factors']} of {entry['tokens']} tokens as session {entry['id']}; "
              f"ordinary text {before:.3f} -> {after:.3f} nats)")


def converse(speaker: Speaker) -> None:
    """Turn by turn, in Qwen's chat form; what was said stays in the context until it is full."""
    words, left_over = speaker.words, []
    lines = [start] if start else sys.stdin
    if not start and sys.stdin.isatty():
        print("Say something; an empty line ends the conversation"
              + (", /help lists commands." if speaker.store else "."))
    try:
        for line in lines:
            if not line.strip():
                break
            if not sys.stdin.isatty() or start:
                print("user:", line.strip())
            if line.startswith("/") and speaker.store:
                command(speaker, *line.strip().split(maxsplit=1))
                continue
            turn = words.encode(data.user_turn(line.strip()))
            if speaker.session and not speaker.heard and warm:
                nearest = speaker.store.nearest(
                    about(speaker.model, torch.tensor(turn, device=speaker.device)))
                speaker.session.start(nearest)
            last = speaker.say(left_over + turn, words.im_end, own=min(1, len(left_over)),
                               opening="model:" if show == "ticks" else "model: ")
            left_over = (([last] if last == words.im_end else [last, words.im_end])
                         + words.encode("\n"))
    except KeyboardInterrupt:
        print()
    except (OSError, UnicodeDecodeError) as problem:  # the other end went away
        speaker.remember()                                          # what was said still counts
        if isinstance(problem, UnicodeDecodeError):
            raise ValueError("expected UTF-8 on standard input, found byte "
                             f"{problem.object[problem.start]:#04x}: the conversation ends before "
                             "it") from None
        raise
    speaker.remember()


# -----------------------------------------------------------------------------
# looking after the memory

COMMANDS = """/why             which sessions the last answer came from
/list            what is remembered
/show ID         what a session told the weights
/forget ID|all   forget it: the memory is written anew without it
/export FILE     write all sessions into one file
/import FILE     add the sessions of such a file"""


def command(speaker: Speaker, name: str, argument: str = "") -> None:
    """One line of housekeeping in a conversation; a mistake costs a line, not the conversation."""
    store = speaker.store
    try:
        if name == "/why":
            explain(speaker.why())
        elif name == "/list":
            list_sessions(store)
        elif name == "/show":
            show_one(store, argument)
        elif name == "/forget":
            print(f"forgot {store.forget(argument)} session(s), {len(store.entries)} remain")
        elif name == "/export" and argument:
            print(f"exported {store.export(argument)} session(s) to {argument}")
        elif name == "/import" and argument:
            print(f"imported {store.import_from(argument)} session(s)")
        else:
            print(COMMANDS)
    except (ValueError, OSError) as problem:
        print(f"error: {problem}")


def explain(tokens: list[dict]) -> None:
    """A line per token: its logit, what of it was thought without a memory, and the sessions that
    gave most."""
    for t in tokens:
        most = sorted(t["sessions"].items(), key=lambda s: -abs(s[1]))[:3]
        print(f"  {t['token']!r:14s} logit {t['logit']:6.2f} = by itself {t['by_itself']:6.2f}"
              + "".join(f", {name} {share:+.2f}" for name, share in most))
    if not tokens:
        print("  nothing was said yet")


def list_sessions(store: Store) -> None:
    for e in store.entries:
        size = sum((store.folder / kind / f"{e['id']}.safetensors").stat().st_size
                   for kind in ("sessions", "snapshots"))
        print(f"{e['id']}  {time.strftime('%Y-%m-%d %H:%M', time.localtime(e['told_at']))}  "
              f"{e['tokens']:5d} tokens, {e['factors']:3d} kept, "
              f"{size / 1024:5.1f} KiB, ordinary text {e['text_nats'][0]:.3f} -> "
              f"{e['text_nats'][1]:.3f} nats")
    plastic = store.plastic()
    print(f"{len(store.entries)} session(s) in {store.folder}", end="")
    if plastic is not None:
        weight, ctm = plastic.cpu(), store.model.ctm
        print(f", {100 * output_change(ctm, weight):.2f} % of the output power on ordinary text, "
              f"{norm_ratio(ctm, weight):.2f} of the weight norm", end="")
    print()


def show_one(store: Store, which: str) -> None:
    entry, factors, anew = store.show(which)
    print(f"session {entry['id']}: {entry['tokens']} tokens, {entry['factors']} kept, "
          f"{int(anew.sum())} of them told anew since")
    for position, tick, surprise, reward, salient, value, again in zip(
            factors.position.tolist(), factors.tick.tolist(), factors.surprise.tolist(),
            factors.dopamine.tolist(), factors.salience.tolist(),
            factors.values.norm(dim=1).tolist(), anew.tolist()):
        print(f"  token {position:4d}  tick {tick + 1:2d}  surprise {surprise:5.2f} nats  dopamine "
              f"{reward:.2f}  salience {salient:.2f}  size {value:.2f}"
              + "  told anew since" * again)


def look_after(model: NanoCTM) -> None:
    """--sessions and its siblings: what is asked of the store, then stop."""
    writing = memory != "read-only" and (forget and Path(memory_dir).exists() or import_from)
    with Store(memory_dir, model, not writing, max_drift=max_drift, forget=forget) as store:
        if forget:
            print(f"forgot {len(store.dropped)} session(s), {len(store.entries)} remain")
        if import_from:
            print(f"imported {store.import_from(import_from)} session(s)")
        if export_to:
            print(f"exported {store.export(export_to)} session(s) to {export_to}")
        if show_session:
            show_one(store, show_session)
        if sessions:
            list_sessions(store)


# -----------------------------------------------------------------------------

def main() -> None:
    configurator.configure(globals())
    if memory not in ("on", "off", "read-only"):
        raise ValueError(f"expected --memory on, off or read-only, found {memory!r}: choose one of "
                         "the three")
    if show not in ("", "ticks", "why") or (show == "why" and memory == "off"):
        raise ValueError("expected --show=ticks, --show=why with --memory on or read-only, or "
                         f"nothing, found {show!r}")
    housekeeping = sessions or show_session or forget or export_to or import_from
    if not start and not chat and memory == "off" and not housekeeping:
        raise ValueError('expected something to say, found nothing: --start="some text", --chat, '
                         'or --memory on')
    where = choose_device(device)
    words = data.Tokenizer(tokenizer)
    model = (load_graft(base, Path(graft)) if graft
             else load_backbone(base)).to(where).eval().requires_grad_(False)
    words.insist_on(model.backbone.config.vocab_size)
    if model.ctm is None and (memory != "off" or housekeeping):
        raise ValueError("expected a graft with a CTM block for --memory, found none: name one "
                         "with --graft")
    if housekeeping:
        return look_after(model)
    if memory != "off":
        with Store(memory_dir, model, memory == "read-only", max_drift=max_drift) as store:
            return converse(Speaker(model, words, store))
    speaker = Speaker(model, words, None)
    if chat:
        return converse(speaker)
    speaker.say(words.encode(start), words.eot, opening=start)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                        # a terminal may lack a letter
    try:
        main()
    except (ValueError, OSError) as problem:
        configurator.stop(str(problem))
    except KeyboardInterrupt:
        print()
