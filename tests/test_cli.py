"""The command line, as a user meets it: in processes of its own where that matters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import HANG, wait_until
from safetensors.torch import load_file

from minisign.cli import main
from minisign.kernels import cpu
from minisign.lab.checkpoint import steps_of
from minisign.lab.corpus import CorpusConfig, generate
from minisign.lab.tokenizer import Tokens
from minisign.studies import reproduce as reproduce_module
from minisign.studies.variants import VARIANTS, variant_config

MINISIGN = [sys.executable, "-m", "minisign.cli"]
SMALL = "--batch 4 --context 8 --layers 1 --width 16 --heads 2 --vocab-size 300 --warmup 2".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(generate(CorpusConfig(words=6000)))
    return str(path)


def fails(capsys: Any, *argv: str) -> str:
    """Runs a command that must fail, with exit code 2 and one line on stderr, which is returned."""
    try:
        code = main(list(argv))
    except SystemExit as exit_:
        code = exit_.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("minisign")
    return err


def start(command: list[Any]) -> subprocess.Popen[str]:
    """Starts a command and waits for its progress bar: from then on it trains."""
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    process.stderr.read(5)
    return process


def interrupt(process: subprocess.Popen[str]) -> str:
    """Ctrl-C, which a terminal sends to a command and all that it has started; what is then said on stderr.
    All of them must end by themselves, the command with exit code 130."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, err = process.communicate(timeout=HANG)  # until nobody can write to it any more
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return err


# --- reproduce ------------------------------------------------------------------------------------


def test_reproduce_writes_what_it_promises(tmp_path: Path, text: str) -> None:
    out = tmp_path / "deep" / "folder"
    command = [*MINISIGN, "reproduce", "--text", text, "--variants", "lazy, hybrid,lazy", "--steps", "12"]
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=True)
    results = json.loads((out / "results.json").read_text())
    assert [r["variant"] for r in results["runs"]] == ["lazy", "hybrid"]
    assert {
        "variant",
        "steps",
        "train_loss",
        "val_loss",
        "bound",
        "embedding_max",
        "embedding_min",
        "rare_saturated",
        "frequent_saturated",
        "seconds",
    } <= set(results["runs"][0])
    assert results["runs"][0]["steps"] == 12
    assert results["runs"][0]["bound"] == 100.0
    assert results["config"]["text"] == [text]
    assert results["config"]["form"] == "rms"
    assert results["config"]["variants"]["lazy"]["lazy"] == "ids"
    for name in ("growth.png", "distribution.png", "rows.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == [
        "distribution.png",
        "growth.png",
        "results.json",
        "rows.png",
    ]
    assert "lazy" in done.stdout
    assert "largest" in done.stdout
    assert "largest=" in done.stderr  # the progress bar
    assert "loss=" in done.stderr


def test_reproduce_takes_tiny_packed_and_several_texts(tmp_path: Path, text: str) -> None:
    import gzip

    packed = tmp_path / "more.txt.gz"
    packed.write_bytes(gzip.compress(b"a few words more than there were before " * 200))
    argv = ["reproduce", "--text", text, str(packed), "--variants", "adamw", "--steps", "2"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())  # strict JSON, whatever the counts
    assert results["config"]["text"] == [text, str(packed)]
    assert results["runs"][0]["frequent_saturated"] in (None, 0.0)


def stop_at_lion(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variants before it are trained; then there is an error."""
    real = reproduce_module.train_variant

    def train_or_stop(variant: str, *args: Any) -> Any:
        if variant == "lion":
            raise error
        return real(variant, *args)

    monkeypatch.setattr(reproduce_module, "train_variant", train_or_stop)


def test_interrupted_reproduce_keeps_what_is_finished(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stop_at_lion(KeyboardInterrupt(), monkeypatch)
    argv = ["reproduce", "--text", text, "--variants", "tiger,lion,adamw", "--steps", "3", "--jobs", "1"]
    assert main([*argv, "--out", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["variant"] for r in results["runs"]] == ["tiger"]
    assert (tmp_path / "growth.png").exists()
    assert "interrupted: 1 of 3 variants finished" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ChildProcessError("a process died"), OSError("cannot write results")])
def test_reproduce_that_fails_says_why_and_keeps_what_is_finished(
    error: OSError, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stop_at_lion(error, monkeypatch)
    monkeypatch.setenv("MINISIGN_JITTER", "5")
    argv = ["reproduce", "--text", text, "--variants", "tiger,lion", "--steps", "3", "--jobs", "1"]
    assert main([*argv, "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "tiger" in printed.out
    assert "interrupted: 1 of 2 variants finished" in printed.err
    assert printed.err.endswith(f"minisign reproduce: error: {error}\n")
    # Where results could not be written, pictures are not tried: their error would hide the first one.
    assert (tmp_path / "growth.png").exists() == isinstance(error, ChildProcessError)
    assert "MINISIGN_JITTER is 5: initial weights are changed by a few units" in printed.err
    assert json.loads((tmp_path / "results.json").read_text())["config"]["jitter"] == 5


def test_ctrl_c_for_real(tmp_path: Path, text: str) -> None:
    command = [*MINISIGN, "reproduce", "--text", text, "--variants", "adamw", "--steps", "10000"]
    assert "interrupted: nothing to keep" in interrupt(start([*command, "--jobs", "1", "--out", tmp_path]))


def test_ctrl_c_with_two_jobs_keeps_what_is_finished_and_ends_all_processes(
    tmp_path: Path, text: str
) -> None:
    command = [*MINISIGN, "reproduce", "--text", text, "--variants", "tiger,lion,adamw", "--steps", "100"]
    process = start([*command, "--jobs", "2", "--out", tmp_path])
    wait_until((tmp_path / "results.json").exists, lambda: process.poll() is None)
    err = interrupt(process)
    kept = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert 1 <= len(kept) <= 2
    assert f"interrupted: {len(kept)} of 3 variants finished" in err
    assert (tmp_path / "growth.png").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_loss_that_is_not_finite(
    jobs: str, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(VARIANTS["lion"], "lr", 1e38)
    argv = ["reproduce", "--text", text, "--variants", "lion", "--steps", "20", "--jobs", jobs]
    assert main([*argv, "--out", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "minisign reproduce: error: the loss is nan at step 10"


def test_as_many_jobs_as_cores_by_default_and_one_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(reproduce_module, "reproduce", lambda *_, jobs, **__: asked.append(jobs))
    monkeypatch.setattr("minisign.studies.processes.default_jobs", lambda: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for argv in ([], ["--jobs", "3"], ["--device", "cuda"], ["--device", "cuda", "--jobs", "2"]):
        assert main(["reproduce", "--out", str(tmp_path), *argv]) == 0
    assert asked == [7, 3, 1, 2]


@pytest.mark.parametrize("form", ["rms", "base"])
def test_variants_differ_from_tiger_in_what_they_name(form: str) -> None:
    base = reproduce_module.base_config()
    configs = {v: variant_config(base, v, form) for v in VARIANTS}
    tiger = configs["tiger"].to_json()
    changed = {v: {k for k, x in c.to_json().items() if x != tiger[k]} for v, c in configs.items()}
    assert changed["lazy"] == {"lazy"}
    assert changed["tied"] <= {"tie", "embedding_std"}
    assert changed["half_swap"] <= {"tie", "embedding_std"}
    assert changed["hybrid"] == {"embedding_optimizer"}
    assert {c.seed for c in configs.values()} == {0}
    assert configs["tiger"].scale == ("rms" if form == "rms" else 1.0)


# --- train ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "tiger", "--lazy", "ids"],
        ["--optimizer", "lion", "--lr", "0.01", "--betas", "0.8", "0.9", "--weight-decay", "1"],
        ["--optimizer", "tiger", "--scale", "1.0", "--lr", "0.001", "--embedding-optimizer", "adamw"],
        ["--head", "centered", "--embedding-scale", "0.5"],
    ],
    ids=["lazy tiger", "lion", "hybrid", "centered"],
)
def test_resume_is_an_unbroken_run(tmp_path: Path, text: str, options: list[str]) -> None:
    shared = ["train", "--text", text, *SMALL, *options, "--seed", "3"]
    whole, part, rest = (str(tmp_path / name) for name in ("whole", "part", "rest"))
    assert main([*shared, "--steps", "15", "--out", whole]) == 0
    assert main([*shared, "--steps", "6", "--out", part]) == 0
    assert main(["train", "--resume", part, "--steps", "15", "--out", rest]) == 0
    assert main([*shared, "--resume", part, "--steps", "15"]) == 0  # in place, with the options repeated
    expected = load_file(f"{whole}/model.safetensors")
    for folder in (rest, part):
        found = load_file(f"{folder}/model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_options_reach_the_configuration(tmp_path: Path) -> None:
    given = {"--head": "bias", "--embedding-scale": "0.5", "--vocab-rare-share": "0.5"}
    argv = [x for pair in given.items() for x in pair]
    assert main(["train", *SMALL, *argv, "--steps", "1", "--out", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config["head"], config["embedding_scale"], config["vocab_rare_share"]] == ["bias", 0.5, 0.5]


def test_ctrl_c_saves_a_run_that_goes_on_to_the_same_weights(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shared = ["train", "--text", text, *SMALL, "--steps", "60", "--decay", "0.5"]
    broken, whole = str(tmp_path / "broken"), str(tmp_path / "whole")
    real = Tokens.batch

    def interrupting(tokens: Tokens, seed: int, step: int, *sizes: int) -> Any:
        if step == 41:
            signal.raise_signal(signal.SIGINT)
        return real(tokens, seed, step, *sizes)

    with monkeypatch.context() as patch:
        patch.setattr(Tokens, "batch", interrupting)
        assert main([*shared, "--out", broken]) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # for whoever called it
    assert "go on with minisign train --resume" in capsys.readouterr().err
    assert steps_of(Path(broken)) == [42]
    assert main(["train", "--resume", broken]) == 0
    assert main([*shared, "--out", whole]) == 0
    a, b = (load_file(f"{d}/model.safetensors") for d in (broken, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_save_every(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisign.lab.train import Run

    saved: list[int] = []
    real = Run.save
    monkeypatch.setattr(Run, "save", lambda run, out: (saved.append(run.step), real(run, out)))
    argv = ["train", "--text", text, *SMALL, "--steps", "10", "--save-every", "4"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert saved == [4, 8, 10]


# --- corpus ---------------------------------------------------------------------------------------


def test_corpus(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "text.txt"
    assert main(["corpus", "--words", "500", "--seed", "5", "--out", str(out)]) == 0
    assert out.read_bytes().decode() == generate(CorpusConfig(words=500, seed=5))
    import hashlib

    assert capsys.readouterr().out == f"{hashlib.sha256(out.read_bytes()).hexdigest()}  {out}\n"


# --- bad input ------------------------------------------------------------------------------------


def test_bad_reproduce(tmp_path: Path, text: str, capsys: Any) -> None:
    new = tmp_path / "new"
    to_new = ("--out", str(new), "--steps", "2")
    empty, binary, short = (tmp_path / n for n in ("empty.txt", "binary.txt", "short.txt"))
    empty.write_bytes(b"")
    binary.write_bytes(bytes(range(256)) * 20)
    short.write_text("Too short by far.")
    cases = [
        (["--variants", "tiger,foo"], "unknown variant 'foo': choose from tiger, lion, lazy, tied"),
        (["--variants", ","], "no variants: choose from tiger"),
        (["--form", "fast"], "unknown form 'fast'"),
        (["--steps", "0"], "steps must be 1 or more, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--seed", "-1"], "seed must be 0 or more, got -1"),
        (["--jobs", "0"], "jobs must be 1 or more, got 0"),
        (["--jobs", "x"], "argument --jobs: invalid int value: 'x'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--text", str(tmp_path / "missing.txt")], "missing.txt: No such file"),
        (["--text", str(empty)], "empty.txt is empty"),
        (["--text", str(binary)], "binary.txt is not UTF-8 text"),
        (["--text", str(short)], "the text is too short"),
        (["--text", str(tmp_path)], "Is a directory"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda"], "'cuda' was asked for, but torch finds no CUDA GPU"))
    for argv, message in cases:
        assert message in fails(capsys, "reproduce", *to_new, *argv)
        assert not new.exists()
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for out in (blocked, blocked / "below"):
        message = fails(capsys, "reproduce", "--text", text, "--steps", "2", "--out", str(out))
        assert f"cannot write to {out}" in message
    assert blocked.read_text() == "not a folder"


def test_bad_train(tmp_path: Path, text: str, capsys: Any) -> None:
    new, run = str(tmp_path / "new"), str(tmp_path / "run")
    shared = ["train", "--text", text, *SMALL, "--steps", "4"]
    cases = [
        (["--optimizer", "sdg"], "unknown optimizer 'sdg': choose from sgd, signum, lion, tiger, adamw"),
        (
            ["--optimizer", "sgd", "--lazy", "ids"],
            "lazy 'ids' is not for sgd: torch.optim.SGD has no lazy rows",
        ),
        (["--optimizer", "sgd", "--betas", "1.5"], "Invalid beta: 1.5"),
        (["--init", "zero"], "unknown init 'zero': choose from gpt2, xavier"),
        (["--lr", "-1"], "Invalid learning rate: -1.0"),
        (["--lr", "nan"], "Invalid learning rate: nan"),
        (["--weight-decay", "-1"], "Invalid weight_decay value: -1.0"),
        (["--betas", "1.5"], "Invalid beta: 1.5"),
        (["--betas", "0.9", "0.9"], "tiger takes 1 beta(s)"),
        (["--scale", "big"], "--scale must be rms, row_rms or a number, got big"),
        (["--embedding-scale", "big"], "--embedding-scale must be rms, row_rms or a number, got big"),
        (["--embedding-scale", "1", "--optimizer", "lion"], "embedding_scale 1.0 is for embeddings under"),
        (["--head", "tail"], "unknown head 'tail': choose from plain, bias, centered"),
        (["--vocab-rare-share", "0.5"], "vocab_rare_share 0.5 is for the generated text only"),
        (["--lazy", "rows"], "unknown lazy 'rows'"),
        (["--accumulate", "0"], "Invalid accumulate: 0"),
        (["--tie", "knot"], "unknown tie 'knot'"),
        (["--save-every", "0"], "--save-every must be 1 or more, got 0"),
        (["--vocab-size", "10"], "vocab_size must be at least 256, got 10"),
        (["--heads", "3"], "width 16 is not divisible by heads 3"),
    ]
    for argv, message in cases:
        assert message in fails(capsys, *shared, "--out", new, *argv)
        assert not Path(new).exists()
    assert "train needs --out DIR" in fails(capsys, *shared)
    assert "there is no checkpoint in" in fails(capsys, "train", "--resume", new)
    assert main([*shared, "--out", run]) == 0
    capsys.readouterr()
    assert "at step 4, its last: give more --steps" in fails(capsys, "train", "--resume", run)
    assert "at step 4 already, past 2" in fails(capsys, "train", "--resume", run, "--steps", "2")
    message = fails(capsys, "train", "--resume", run, "--steps", "9", "--lr", "0.5")
    assert "--lr 0.5 is not what the run to resume has" in message
    (checkpoint,) = Path(run).glob("checkpoints/*/*.distcp")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "is damaged: it is not what was written" in fails(
        capsys, "train", "--resume", run, "--steps", "9"
    )


def test_help_reads_well(capsys: Any) -> None:
    for argv in (["--help"], ["reproduce", "--help"], ["train", "--help"], ["corpus", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 0
        text = capsys.readouterr().out
        assert "None" not in text
        assert "default" in text or argv == ["--help"]
    assert "unrecognized arguments" in fails(capsys, "corpus", "--out", "x", "--foo")
    assert "COMMAND" in fails(capsys)


def test_fused_without_a_compiler_and_released_gradients_with_clipping(
    capsys: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", str(tmp_path / "run"), "--text", text)
    assert "release_grads and clip 1.0 exclude each other" in fails(
        capsys, "train", "--release-grads", "--clip", "1", *out
    )
    cpu.made.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "needs a C++ compiler" in fails(capsys, "train", "--fused", *out)
    cpu.made.cache_clear()


MINE = """\
import torch
from minisign import optimizer


def halved(p, g, *, lr):
    p.sub_(g * 0.5, alpha=lr)


def soft(p, g, *, lr):
    p.sub_(g.erf(), alpha=lr)


Halved, Soft = optimizer(halved, lr=0.1), optimizer(soft, lr=0.1)
"""


def test_the_kernel_of_an_optimizer_is_shown(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shown = {}
    for name in ("mine.py:Halved", "mine:Halved", f"{tmp_path}/mine.py:Halved"):
        assert main(["kernel", name]) == 0
        shown[name] = capsys.readouterr().out
    assert len(set(shown.values())) == 1
    assert "// 6: p.sub_(g * 0.5, alpha=lr)" in shown["mine:Halved"]
    for rule in ("lion", "Lion", "adamw"):
        assert main(["kernel", rule, "--for", "cuda", "--lazy"]) == 0
        assert "# Row by row, where one has a gradient" in capsys.readouterr().out
    assert "/mine.py, `p.sub_(g.erf(), alpha=lr)` uses erf" in fails(capsys, "kernel", "mine.py:Soft")
    assert "mine.py has no Hard" in fails(capsys, "kernel", "mine.py:Hard")
    assert "mine.py:halved is no optimizer" in fails(capsys, "kernel", "mine.py:halved")
    assert "unknown rule 'lino': choose from sgd" in fails(capsys, "kernel", "lino")
    assert "broken.py cannot be loaded: ZeroDivisionError" in fails(capsys, "kernel", "broken.py:X")
    assert "none.py cannot be loaded: FileNotFoundError" in fails(capsys, "kernel", "none.py:X")
