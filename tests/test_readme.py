"""What README and the pages in docs/ say: figures of committed logs are the logs', links lead somewhere,
and what they import is there.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutants import MUTANTS

import minisign
from minisign.studies.experiment import figures, read_log, saturated
from minisign.studies.search import CONTENDERS, best_rate, losses_by_rate

ROOT = Path(__file__).parent.parent
README, COURSE, RESULTS, COMMANDS, SPEED = (
    (ROOT / name).read_text()
    for name in (
        "README.md",
        "docs/course.md",
        "docs/results.md",
        "docs/command-line.md",
        "docs/speed.md",
    )
)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FIXES = {
    "none (Tiger)": "tiger",
    "lazy rows": "lazy",
    "tied": "tied",
    "half-swap": "half_swap",
    "half-swap, centered head": "half_swap, centered",
    "hybrid": "hybrid",
    "AdamW for all": "adamw",
}


MAIN_JOB, BUSY = (
    json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    for name in ("main-job", "main-job-busy")
)


@pytest.mark.parametrize("run", MAIN_JOB["found"]["new"], ids=lambda run: run["variant"])
def test_table_of_the_main_job(run: dict[str, Any]) -> None:
    def share(name: str) -> str:
        return f"{100 * run[name]:.1f} %" if run[name] else "0"

    ends = f"{run['embedding_max']:.2f}, {run['embedding_min']:.2f}".replace("-", "−")
    cells = [f"{run['val_loss']:.2f}", ends, share("rare_saturated"), share("frequent_saturated")]
    (line,) = (line for line in README.splitlines() if line.startswith(f"| `{run['variant']}` | "))
    assert line.endswith(f" | {' | '.join(cells)} |")


def test_what_is_said_of_the_main_job() -> None:
    text, seconds = " ".join(README.split()), sorted(MAIN_JOB["seconds"]["new"])
    assert f"`make reproduce`, the main job, took {seconds[0]:.0f} to {seconds[-1]:.0f} seconds on" in text
    (old, new) = ({run["variant"]: run for run in MAIN_JOB["found"][which]} for which in ("old", "new"))

    def ends(variant: str) -> str:
        return "{embedding_max:.2f} and {embedding_min:.2f}".format(**old[variant]).replace("-", "−")

    tied = old["tied"]
    varied = (
        f"Lion's loss was {old['lion']['val_loss']:.2f}; lazy rows ended at {ends('lazy')}, the "
        f"half-swap's at {ends('half_swap')}; plain tying had a loss of {tied['val_loss']:.2f}, entries of "
        f"±{-tied['embedding_min']:.2f} and {100 * tied['rare_saturated']:.1f} % of the rare components"
    )
    assert f"In one process with two threads {varied}" in text
    found = " ".join(RESULTS.split())
    assert f"keeps everything at {new['half_swap']['head_max']:.0f} while" in found
    assert f"run to ±{new['tied']['embedding_max']:.0f}." in found
    took = {which: "{:.0f} and {:.0f}".format(*sorted(BUSY["seconds"][which])) for which in ("old", "new")}
    assert BUSY["busy"]
    sentence = f"for {BUSY['steps']} steps took {took['new']} seconds, and {took['old']} before"
    assert sentence in " ".join(COMMANDS.split())


@pytest.mark.parametrize("name", FIXES)
def test_table_of_fixes(name: str) -> None:
    log, label = read_log("fixes"), FIXES[name]

    def runs(size: str, figure: str) -> np.ndarray:
        return figures(log, f"{size}: {label}", figure)

    def near(size: str) -> str:
        share = saturated(log, f"{size}: {label}")
        percent = f"{share.mean():.0%}".replace("%", " %") if share.mean() > 0.001 else "< 0.1 %"
        return percent if share.max() > 0 else "0"

    def loss(size: str) -> str:
        values = runs(size, "val_loss")
        return f"{values.mean():.2f} ({values.min():.2f}–{values.max():.2f})"

    memory = runs("main", "state_bytes")[0] / figures(log, "main: tiger", "state_bytes")[0]
    cells = [name, f"{near('lesson')} / {near('main')}", loss("lesson"), loss("main"), f"{memory:.2f}"]
    assert f"| {' | '.join(cells)} |" in RESULTS.splitlines()


def test_figures_of_fine_tuning_and_repair() -> None:
    log = read_log("fixes")
    after = {
        name: figures(log, f"main: {name}", "second/after/mean").mean()
        for name in ("tiger", "from scratch", "hybrid", "adamw")
    }
    text = " ".join(RESULTS.split())
    assert (
        f"ends at {after['tiger']:.2f}, worse than an untrained one ({after['from scratch']:.2f})" in text
    )
    assert f"with the hybrid it ends at {after['hybrid']:.2f}, with AdamW at {after['adamw']:.2f}" in text


def test_figures_of_the_centered_head() -> None:
    log = read_log("tying")
    share: dict[bool, list[float]] = {True: [], False: []}
    for label in {line["job"]["label"] for line in log}:
        if re.match(r"(tied|half_swap), base", label):
            share["centered" in label] += saturated(log, label).tolist()
    text = " ".join(RESULTS.split())
    assert f"at most {max(share[True]):.0%} come near the bound".replace("%", " %") in text
    assert f"without, at least {min(share[False]):.0%} in the base form".replace("%", " %") in text


@pytest.mark.parametrize("label", CONTENDERS)
def test_table_of_optimizers(label: str) -> None:
    log = read_log("learning_rates")
    rates, losses = losses_by_rate(log, label)
    here = losses[rates == best_rate(log, label)][0]
    common = losses_by_rate(log, label, "head_common")[1][rates == best_rate(log, label)].mean()
    good = int((losses.mean(axis=1) < here.mean() + 0.5).sum())
    loss = f"{here.mean():.2f} ({here.min():.2f}–{here.max():.2f})"
    assert f"| {label} | {loss} | {good} of {len(rates)} | {common:.2f} |" in RESULTS.splitlines()


def test_figures_of_the_norm_placement() -> None:
    log, text = read_log("norm_placement"), " ".join(RESULTS.split())

    def times(layers: int) -> str:
        pre, post = (
            figures(log, f"start, xavier: {norm}, {layers} layers", "ratio") for norm in ("pre", "post")
        )
        return f"{np.exp(np.log(post / pre).mean()):.1f}"

    def slower(label: str, layers: int) -> float:
        pre, post = (best_rate(log, f"{label}: {norm}, {layers} layers") for norm in ("pre", "post"))
        return pre / post

    assert f"is {times(4)} times as large with post-norm as with pre-norm at four layers" in text
    assert f"four layers, {times(8)} times at eight" in text
    assert [slower("SGD", layers) for layers in (4, 8)] == [4, 4]
    assert [slower("Signum", layers) for layers in (4, 8)] == [2, 4]
    assert (
        "a quarter of the rate under SGD, and under Signum a half (four layers) or a quarter (eight)"
        in text
    )


REMEDIES = {
    "nothing": "none",
    "ε = 10⁻¹²": "ε 1e-12",
    "a quarter of the rate": "rate 1e-3",
    "a quarter of the batch": "batch 4",
    "β₂ = 0.95": "β2 0.95",
    "gradients clipped to 1": "clip 1",
    '`on_loss="skip"`': "loss: skip",
    '`on_loss="back"`': "loss: back",
    '`on_ratio="slow"`': "ratio: slow",
    '`on_ratio="skip"`': "ratio: skip",
}


@pytest.mark.parametrize("name", REMEDIES)
def test_table_of_remedies(name: str) -> None:
    log, label = read_log("remedies"), REMEDIES[name]
    after, final = (figures(log, f"{label}, staged", figure) for figure in ("after", "val_loss"))
    calm, plain = (figures(log, f"{what}, undisturbed", "val_loss") for what in (label, "none"))
    cost = f"{(calm - plain).mean():+.2f}".replace("-0.00", "+0.00")
    end = f"{final.mean():.2f} ({final.min():.2f}–{final.max():.2f})"
    assert f"| {name} | {after.mean():.2f} | {end} | {cost} |" in RESULTS.splitlines()


def test_figures_of_the_undisturbed_run_and_of_the_jumps() -> None:
    log, text = read_log("remedies"), " ".join(RESULTS.split())
    after, end = (figures(log, "none, undisturbed", figure).mean() for figure in ("after", "val_loss"))
    assert f"where the undisturbed run has {after:.2f}, and at the end, where it has {end:.2f}" in text
    natural = read_log("instability")
    jumps = {line["job"]["label"]: figures(natural, line["job"]["label"], "jump/size") for line in natural}
    assert f"In {['no', 'one', 'two', 'three'][(jumps['base'] > 0.35).sum()]} seeds of six the loss" in text
    for label in ("2 layers", "4 layers", "rate 0.002", "warm-up 200"):
        assert jumps[label].max() < 0.15


STEPS = json.loads(
    (ROOT / "benchmarks" / "results" / "intel-r-xeon-r-processor-1-thread.json").read_text()
)["results"]


def test_table_of_speed() -> None:
    found = {(line["size"], line["name"]): line for line in STEPS}
    for (size, name), line in found.items():
        if size == "10m":
            share = line["share_of_copy_bandwidth"]
            cells = (
                name,
                f"{line['ratio_to_fused_adamw']:.2f}",
                "" if share is None else f"{share:.2f}",
                f"{found['small', name]['ratio_to_fused_adamw']:.2f}",
            )
            assert f"| {' | '.join(cells)} |" in SPEED.splitlines()


def test_table_of_lazy_steps() -> None:
    for line in STEPS:
        if line["size"] == "lazy":
            figures = (
                line[name] for name in ("ratio_to_dense", "ratio_to_dense_alone", "ratio_to_fused_adamw")
            )
            cells = [line["name"], *(f"{x:.3f}" for x in figures)]
            assert f"| {' | '.join(cells)} |" in SPEED.splitlines()


def test_the_loop_against_the_fastest_published_one() -> None:
    times = {line["name"]: line["milliseconds"] for line in STEPS if line["size"] == "10m"}
    published = (
        "torch-optimi Lion",
        "torch-optimi Lion (loop)",
        "lion-pytorch Lion",
        "pytorch-optimizer Lion",
    )
    slower = times["Lion"] / min(times[name] for name in published) - 1
    assert slower <= 0.05
    assert "as fast as the fastest published one to within 5 %" in " ".join(SPEED.split())


def on_the_gpu(part: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / "nvidia-h200" / f"{part}.json"
    return dict(json.loads(path.read_text()))


def test_the_speed_on_a_gpu() -> None:
    text, speed = " ".join(SPEED.split()), on_the_gpu("speed")
    assert f"({speed['card']}, torch {speed['torch'].partition('+')[0]};" in text
    lines = {(x["size"], x["name"]): x for x in speed["results"]}
    took = {key: x["ratio_to_fused_adamw"] for key, x in lines.items()}
    lion, half = lines["350m", "Lion (fused)"], lines["350m", "Lion (fused), all bf16"]
    published = [took[key] for key in took if key[0] == "350m" and "Lion" in key[1] and "-" in key[1][:13]]
    assert (
        f"the fused Lion takes {took['350m', 'Lion (fused)']:.2f} of the time of torch's fused AdamW, at "
        f"{lion['share_of_copy_bandwidth']:.2f} of the bandwidth of a copy; with its state in bfloat16 "
        f"{took['350m', 'Lion (fused), state bf16']:.2f}, with everything in bfloat16 "
        f"{half['ratio_to_fused_adamw']:.2f} ({half['bar']['found']:.2f} of AdamW in bfloat16). Base Tiger "
        f"takes {took['350m', 'Tiger, base (fused)']:.2f} "
        f"({took['350m', 'Tiger, base (fused, no guard)']:.2f} without its look at the gradients), Tiger's "
        f"RMS form {took['350m', 'Tiger, RMS (fused)']:.2f}, our AdamW "
        f"{took['350m', 'AdamW (fused)']:.2f}; of the published ones the fastest Lion takes "
        f"{min(published):.2f}. On 200 tensors of 1,000 weights, where Python decides, Lion takes "
        f"{took['small', 'Lion (fused)']:.2f}."
    ) in text
    share = {
        x["name"]: x["share_of_copy_bandwidth"]
        for x in on_the_gpu("blocks")["results"]
        if (x["block"], x["warps"]) == (1024, 4)
    }
    lion_now, adamw_now = share["Lion (fused)"], share["AdamW (fused)"]
    assert f"Lion at {lion_now:.2f} of a copy's bandwidth, AdamW at {adamw_now:.2f}" in text


def test_the_tests_and_the_silent_momentum_on_a_gpu() -> None:
    text, tests = " ".join(SPEED.split()), on_the_gpu("kernels")
    assert tests["tests"] - tests["passed"] == len(tests["failures"]) == 3
    assert all("found_inf" in name for name in tests["failures"])
    assert "passed but for three: steps with a `found_inf`" in text
    ends = {
        x["name"].partition(" ")[0].strip(","): x["end_in_smallest"]
        for x in on_the_gpu("subnormal")["results"]
    }
    assert ends == {"Tiger": [14.0], "Lion": [50.0]}
    assert "Tiger's stops at 14 · 2⁻¹⁴⁹, Lion's at 50 · 2⁻¹⁴⁹" in text


def test_the_article_at_the_size_of_gpt2() -> None:
    text, found = " ".join(RESULTS.split()), on_the_gpu("article")
    tiger, lazy = found["runs"]
    assert f"a rate of {found['config']['lr']:.4f} stands at ±{tiger['embedding_max']:.2f}" in text
    assert f"{tiger['parameters'] / 1e6:.0f}M parameters, {found['config']['vocab_size']:,} tokens" in text
    assert f"after {tiger['steps']:,} steps, with {100 * tiger['rare_saturated']:.0f} % of the" in text
    assert found["rare"].partition("less than ")[2].partition(" in ")[0] + " beyond 80" in text
    assert lazy["rare_saturated"] == lazy["other_saturated"] == 0
    assert f"the largest entry is {max(lazy['embedding_max'], -lazy['embedding_min']):.1f} and none" in text
    assert f"is {tiger['val_loss']:.2f} without and {lazy['val_loss']:.2f} with them" in text


def test_number_of_mutants() -> None:
    assert f"`make mutants` plants {len(MUTANTS)} bugs" in COURSE


def test_what_readme_says_of_the_speed() -> None:
    steps = {(x["size"], x["name"]): x for x in (*STEPS, *on_the_gpu("speed")["results"])}
    cpu, gpu = (steps[size, "Lion (fused)"]["ratio_to_fused_adamw"] for size in ("10m", "350m"))
    expected = (
        f"takes {cpu:.2f} of the time of `torch.optim.AdamW(fused=True)` on a CPU, {gpu:.2f} on a GPU"
    )
    assert expected in " ".join(README.split())


# --- that the pages lead somewhere ----------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, heading = target.partition("#")
            there = page.parent / file
            assert there.exists(), target
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for module, names in re.findall(r"^from (minisign\S*) import ([^#\n]+)", text, re.MULTILINE):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name}"
    for path in re.findall(r"`(minisign/[a-z_/.]+)`", text):
        assert (ROOT / path).exists(), path
    for dotted in re.findall(r"`minisign\.([\w.]+)`", text):
        found: Any = minisign
        for part in dotted.split("."):
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


def test_all_pages_are_linked_from_readme() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in README


def test_the_tree_in_contributing_is_the_packages() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text[text.index("    minisign/\n") : text.index("| beside it |")]
    files = {file.name for file in (ROOT / "minisign").glob("*/*") if file.is_file()}
    assert set(re.findall(r"\w+\.(?:py|cpp)\b", tree)) <= {*files, "theory.py"}
    for room in ("lab", "doctor", "studies", "plots"):
        for file in (ROOT / "minisign" / room).glob("[!_]*.py"):
            assert file.name in tree
    for entry in (ROOT / "minisign").glob("[!_]*"):
        assert f"\n      {entry.name}{'/' if entry.is_dir() else ''} " in tree
