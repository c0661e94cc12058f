"""Writes what lies in this folder: a sample of the generated text, its vocabulary, and hashes.

Run by ``make data``. The files are small and never read by the package: they are what the tests compare
a newly generated text with, and what a reader can look at.
"""

import hashlib
import json
from pathlib import Path

from minisign.lab.config import Config
from minisign.lab.corpus import DEFAULT, CorpusConfig, generate, is_rare_language, sha256
from minisign.lab.tokenizer import train_encoding, vocabulary_lines

HERE = Path(__file__).parent
CONFIGS = {
    "default": DEFAULT,
    "small": CorpusConfig(words=10_000, seed=1),
    "uniform": CorpusConfig(words=10_000, exponent=0.0, seed=2),
    "half rare": CorpusConfig(words=10_000, rare_share=0.5, seed=3),
}


def main() -> None:
    texts = {name: generate(config) for name, config in CONFIGS.items()}
    documents = texts["default"].split("\n\n")
    rare = [d for d in documents if is_rare_language(d)]
    (HERE / "sample.txt").write_text("\n\n".join([*documents[:12], *rare[:3]]) + "\n", encoding="utf-8")
    vocabulary = vocabulary_lines(train_encoding(texts["default"], Config().vocab_size))
    (HERE / "vocabulary.tiktoken").write_text(vocabulary, encoding="ascii")
    hashes = {
        "texts": {name: sha256(text) for name, text in texts.items()},
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }
    (HERE / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
