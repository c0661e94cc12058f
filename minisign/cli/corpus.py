"""``minisign corpus``: writes the generated text."""

from __future__ import annotations

import argparse
from pathlib import Path

from minisign.lab.corpus import DEFAULT as default, CorpusConfig, generate, sha256
from minisign.lab.files import prepare_out, write_whole

HELP = "write the generated text in two invented languages"
DESCRIPTION = (
    "Writes the generated corpus and prints its SHA-256. The same options give the same text on every "
    "platform."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--words", type=int, default=default.words, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--exponent",
        type=float,
        default=default.exponent,
        metavar="S",
        help="of Zipf's law (default: %(default)s)",
    )
    parser.add_argument(
        "--rare-share",
        type=float,
        default=default.rare_share,
        metavar="X",
        help="share of the documents in the rare language (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, metavar="S", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the text")


def run(args: argparse.Namespace) -> int:
    config = CorpusConfig(args.words, args.exponent, args.rare_share, args.seed)
    prepare_out(args.out.parent)
    text = generate(config)
    write_whole(args.out, lambda path: path.write_bytes(text.encode()))
    print(f"{sha256(text)}  {args.out}")
    return 0
