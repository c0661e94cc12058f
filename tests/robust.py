"""Runs every notebook under other numbers of threads, other processors' instructions and another seed.

    make robust
    python tests/robust.py --setting "seed 7" --only 03_embedding_blowup

Writes docs/robustness.md if all were run; exits with 1 if a notebook fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from outside import NBVAL, ROOT, report, run_pytest

TABLE = ROOT / "docs" / "robustness.md"
TEXT = (
    "Seconds of each notebook, or how many of its cells failed. One thread and two files at a time but for "
    "the second column; *default* and *avx2* are `ATEN_CPU_CAPABILITY`, and *oldest* is *default* with "
    "`MKL_CBWR=COMPATIBLE` and `ONEDNN_MAX_CPU_ISA=SSE41`. Outputs are compared but under the other seed, "
    "where only the assertions count."
)
TWO_FILES = ("-n", "2", "--dist", "loadfile")
STRICT, LAX = ("--nbval", *TWO_FILES), ("--nbval-lax", *TWO_FILES)
OLD = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
# By name: the arguments of pytest and the environment. Outputs are compared under all but the other seed.
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "1 thread": (STRICT, {}),
    "2 threads": (("--nbval",), {"OMP_NUM_THREADS": "2"}),
    "avx2": (STRICT, {"ATEN_CPU_CAPABILITY": "avx2"}),
    "default": (STRICT, {"ATEN_CPU_CAPABILITY": "default"}),
    "oldest": (STRICT, OLD),
    "seed 7": (LAX, {"MINISIGN_SEED": "7"}),
}


def run(setting: str, notebooks: list[Path]) -> dict[str, str]:
    """What became of each notebook under a setting: seconds, or how many cells failed."""
    arguments, environment = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        names = [str(path.relative_to(ROOT)) for path in notebooks]
        outcome = run_pytest(ROOT, [*arguments, *NBVAL, f"--junit-xml={junit}", *names], **environment)
        if not junit.is_file():
            raise RuntimeError(f"pytest ended with {outcome.returncode}:\n{outcome.stdout[-2000:]}")
        cells, failed, seconds = Counter[str](), Counter[str](), Counter[str]()
        for case in ET.parse(junit).iter("testcase"):
            name = case.get("classname", "").replace(".", "/").removesuffix("/ipynb")
            cells[name] += 1
            failed[name] += case.find("failure") is not None or case.find("error") is not None
            seconds[name] += float(case.get("time", 0))
    if outcome.returncode:
        print(outcome.stdout[-6000:], file=sys.stderr)
    found = {}
    for name in (str(path.relative_to(ROOT).with_suffix("")) for path in notebooks):
        ran = f"{seconds[name]:.0f} s" if cells[name] else "NOT RUN"
        found[name] = f"{failed[name]} FAILED" if failed[name] else ran
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--setting", choices=SETTINGS, help="one of the settings")
    parser.add_argument("--only", metavar="NAME", help="notebooks with this in their name")
    arguments = parser.parse_args()
    notebooks = sorted((ROOT / "notebooks").glob("**/[0-9]*.ipynb"))
    chosen = [path for path in notebooks if (arguments.only or "") in path.name]
    if not chosen:
        parser.error(f"no notebook has {arguments.only!r} in its name")
    settings = [name for name in SETTINGS if arguments.setting in (None, name)]
    found = {}
    for setting in settings:
        found[setting] = run(setting, chosen)
        bad = [f"{name}: {what}" for name, what in found[setting].items() if not what.endswith(" s")]
        print(f"{setting}: {len(chosen) - len(bad)} of {len(chosen)} pass {bad or ''}", flush=True)
    if len(settings) == len(SETTINGS) and chosen == notebooks:
        rows = [[name, *(found[s][name] for s in settings)] for name in next(iter(found.values()))]
        TABLE.write_text(
            report(
                "Notebooks under other circumstances", "make robust", TEXT, ("notebook", *settings), rows
            )
        )
    return int(any(not what.endswith(" s") for each in found.values() for what in each.values()))


if __name__ == "__main__":
    sys.exit(main())
