"""How long the text and the vocabulary of the main job take to make. The bar is 10 seconds for the text.

Exits with 1 if it is missed.
"""

from __future__ import annotations

import sys

from minisign.lab.config import Config
from minisign.lab.corpus import generate
from minisign.lab.tokenizer import train_encoding
from minisign.probes import take_turns

BAR = 10.0


def main() -> int:
    text = generate()
    size = Config().vocab_size
    anew = generate.__wrapped__  # not what it remembers
    actions = {"text": anew, "vocabulary": lambda: train_encoding(text, size)}
    took = {name: float(seconds.max()) for name, seconds in take_turns(actions, 3).items()}
    print(f"a text of {len(text.split()):,} words: {took['text']:.1f} s at most in three (bar {BAR:.0f} s)")
    print(f"a vocabulary of {size:,} tokens of it: {took['vocabulary']:.1f} s at most in three")
    return int(took["text"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
