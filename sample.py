"""Let the model speak: continue a text, or chat; and watch it think.

    python sample.py --start="The following" --max_new_tokens=40
    python sample.py --chat                                     # a conversation on standard input
    python sample.py --chat --start="Marvas keeps a goat." --show=ticks

Left out so far: a memory beyond the context (--memory on comes with the store).
"""
import sys
from pathlib import Path

import torch

import configurator
import data
from model import Cache, NanoCTM, generate, load_backbone, load_graft

# -----------------------------------------------------------------------------
# settings

base = "weights/backbone"   # a Qwen3 folder or a Hugging Face name
graft = "weights/graft.safetensors"     # what stands in its last layer; "" for the base's own FFN
tokenizer = "weights"       # a folder with ranks.json, or a Hugging Face name
start = ""                  # the text to continue, or with --chat the first thing you say
chat = False                # a conversation; without --start it reads lines from standard input
show = ""                   # "ticks": a line per token with the tick it was read at and how sure the model was
memory = "off"              # only "off" so far
max_new_tokens = 60
temperature = 0.0           # 0: greedy
top_k = 0                   # 0: all
halt = 0.0                  # stop thinking at this certainty; 0: think all K ticks
seed = 1
device = ""                 # "" picks cuda when there is one


def speak(model: NanoCTM, words: data.Tokenizer, tokens: list[int], cache: Cache | None, stop: int,
          chance: torch.Generator) -> tuple[Cache, int]:
    """Print what follows `tokens` as it comes; -> what was read, and the last token, which was only said."""
    where = model.backbone.embed_tokens.weight.device
    said, shown, last = [], "", None
    for last in generate(model, torch.tensor([tokens], device=where), max_new_tokens, temperature, top_k, stop, halt or None,
                         generator=chance, cache=cache):
        said.append(int(last.token))
        if show == "ticks":
            ticks = model.ctm.config.ticks if model.ctm else 1
            sure = float(last.certainty)
            print(f"  tick {int(last.tick) + 1:2d}/{ticks}  sure {sure:4.2f} {'#' * round(20 * max(sure, 0)):20s}  "
                  f"{words.decode(said[-1:])!r}")
        elif said[-1] != stop:
            text = words.decode(said)                               # whole, since a character may span tokens
            if not text.endswith("\ufffd"):
                print(text[len(shown):], end="", flush=True)
                shown = text
    print() if show != "ticks" else print("  =", words.decode([t for t in said if t != stop]).strip())
    return last.cache, said[-1]


def converse(model: NanoCTM, words: data.Tokenizer, chance: torch.Generator) -> None:
    """Turn by turn, in Qwen's chat form; what was said stays in the context until it is full."""
    cache, left_over = None, []
    lines = [start] if start else sys.stdin
    if not start and sys.stdin.isatty():
        print("Say something; an empty line ends the conversation.")
    for line in lines:
        if not line.strip():
            return
        if not sys.stdin.isatty() or start:
            print("user:", line.strip())
        turn = words.encode(data.user_turn(line.strip()))
        print("model:", end="\n" if show == "ticks" else " ", flush=True)
        cache, last = speak(model, words, left_over + turn, cache, words.im_end, chance)
        left_over = ([last] if last == words.im_end else [last, words.im_end]) + words.encode("\n")


def main() -> None:
    configurator.configure(globals())
    if memory != "off":
        raise ValueError(f"expected --memory=off, found {memory!r}: this version has no memory beyond its context")
    if show not in ("", "ticks"):
        raise ValueError(f"expected --show=ticks or nothing, found {show!r}")
    if not start and not chat:
        raise ValueError('expected something to say, found nothing: --start="some text", or --chat')
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    words = data.Tokenizer(tokenizer)
    model = (load_graft(base, Path(graft)) if graft else load_backbone(base)).to(where).eval()
    if words.n_vocab > model.backbone.config.vocab_size:
        raise ValueError(f"expected a tokenizer of at most {model.backbone.config.vocab_size} words, found {words.n_vocab} in "
                         f"{tokenizer}: use the one that belongs to {base}")
    chance = torch.Generator(where).manual_seed(seed)
    if chat:
        return converse(model, words, chance)
    print(start, end="\n" if show == "ticks" else "", flush=True)
    speak(model, words, words.encode(start), None, words.eot, chance)


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        configurator.stop(str(problem))
    except KeyboardInterrupt:
        print()
