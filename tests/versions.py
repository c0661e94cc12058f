"""Quick tests, those of optimizers and kernels, and notebook 00 under other versions of torch and Python.

    make versions
    python tests/versions.py --only 3.13

Each pair has an environment of its own in runs/versions, with the newest of everything else that pip finds
for it: an hour, and some 5 GB each where torch comes with CUDA. One that is there is used again. Writes
docs/versions.md; exits with 1 if a test fails, or a pair was not run: where its Python is not on PATH as
python3.x, or something could not be installed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from outside import NBVAL, ROOT, report, run_pytest

PAGE, ENVIRONMENTS = ROOT / "docs" / "versions.md", ROOT / "runs" / "versions"
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]  # type: ignore[index]
NEWEST = ""  # whatever pip gives
PAIRS = (("3.10", OLDEST), ("3.11", OLDEST), ("3.11", NEWEST), ("3.13", NEWEST))  # Python and torch
# The interpreter of its Triton stops at loops under NumPy 2.4 (findings/triton-interpreter-numpy.sh).
BESIDE_OLDEST = ("numpy<2.4",)
OPTIMIZERS = ("optim", "oracle", "torch_expectations", "fused", "release")
CHECKS = {
    "quick tests": ("-m", "not slow", "tests"),
    "optimizers and kernels": tuple(f"tests/test_{name}.py" for name in OPTIMIZERS),
    "notebook 00": ("--nbval-lax", *NBVAL, "notebooks/00_start_here.ipynb"),
}
VERSIONS = """
import importlib.metadata as m, platform, torch
print(platform.python_version(), torch.__version__, *map(m.version, ("triton", "numpy", "transformers")))
"""
TEXT = (
    "What pytest says of each, in an environment of its own with the newest of everything else that pip "
    f"found, beside the oldest torch with {', '.join(BESIDE_OLDEST)}: Triton before 3.7 cannot interpret "
    "loops under NumPy 2.4, which the tests and notebook 14 need (nothing else does). `make test` runs "
    "with the versions of constraints.txt."
)


def environment(python: str, torch: str) -> Path:
    """The interpreter of an environment, which is made unless it is there.

    Raises:
        FileNotFoundError: there is no such Python.
        subprocess.CalledProcessError: something could not be installed.
    """
    command = f"python{python}"
    if (found := shutil.which(command)) is None:
        raise FileNotFoundError(f"there is no {command} on PATH")
    if (tried := subprocess.run([found, "-c", ""], capture_output=True, text=True)).returncode:
        raise FileNotFoundError(f"{found} does not run: {' '.join(tried.stderr.split())}")
    folder = ENVIRONMENTS / f"{python}-{torch or 'newest'}"
    interpreter, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return interpreter
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([command, "-m", "venv", "--clear", str(folder)], check=True)
    subprocess.run([*pip, f"torch=={torch}.0" if torch.count(".") == 1 else "torch"], check=True)
    beside = BESIDE_OLDEST if torch == OLDEST else ()
    subprocess.run([*pip, "-e", f"{ROOT}[notebooks,dev,hf]", *beside], check=True)
    ready.touch()
    return interpreter


def row(interpreter: Path) -> tuple[list[str], list[str]]:
    """Versions and the outcome of each check; and the names of the tests that failed."""
    asked = subprocess.run([str(interpreter), "-c", VERSIONS], capture_output=True, text=True, check=True)
    cells, failed = asked.stdout.split(), []
    for arguments in CHECKS.values():
        ended = run_pytest(ROOT, ("-n", "auto", *arguments), python=str(interpreter))
        print(ended.stdout[-3000:], flush=True)
        cells.append(ended.stdout.strip().splitlines()[-1].partition(" in ")[0].strip("= "))
        named = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", ended.stdout, re.MULTILINE)
        if ended.returncode and not named:
            named = [f"pytest {' '.join(arguments)}: ended with {ended.returncode}"]
        failed += named
    return cells, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="PYTHON", help="under this Python alone; writes no page")
    arguments = parser.parse_args()
    chosen = [pair for pair in PAIRS if arguments.only in (None, pair[0])]
    if not chosen:
        parser.error(f"no Python {arguments.only} here: choose from {', '.join({p: 0 for p, _ in PAIRS})}")
    rows, notes, wrong = [], [], False
    for python, torch in chosen:
        try:
            cells, failed = row(environment(python, torch))
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            notes.append(f"- Python {python} with torch {torch or 'of today'}: not run, {error}.")
            print(notes[-1], flush=True)
            wrong = True
            continue
        rows.append(cells)
        wrong |= bool(failed)
        notes += [f"- {' and '.join(cells[:2])}: {name}" for name in failed]
        print(cells, *failed, sep="\n", flush=True)
    columns = ("Python", "torch", "triton", "numpy", "transformers", *CHECKS)
    if arguments.only is None:
        text = report("Other versions", "make versions", TEXT, columns, rows)
        PAGE.write_text(
            text + "".join(["\nFailed, or not run:\n\n", *(f"{x}\n" for x in notes)] if notes else [])
        )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
