"""``minisign inspect`` and ``repair``: verdicts on made checkpoints, every format, and what does not
change."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_checkpoints import HEALTHY, healthy, saturated
from safetensors.torch import load_file, save_file

from minisign.cli import main
from minisign.doctor.bound import Inspection, inspect_matrix
from minisign.doctor.inspection import as_json, embedding_like, inspect_checkpoint, origin, token_texts_of
from minisign.doctor.repair import repair
from minisign.doctor.weights import Stored, stored_tensors
from minisign.lab.config import Config
from minisign.lab.corpus import CorpusConfig
from minisign.lab.tokenizer import token_texts, train_encoding, vocabulary_lines
from minisign.plots import inspections

HELD_OUT = 20_000  # the detector was tuned on numbers below 2,000, of other families


def stored(weight: torch.Tensor, name: str = "wte.weight") -> Stored:
    return Stored(name, Path("here"), weight.dtype, tuple(weight.shape), weight.stride(), None, weight)


def inspected(weight: torch.Tensor, weight_decay: float | None = None) -> Inspection:
    return inspect_matrix(stored(weight), weight_decay)


def blown_up(v: int = 400, d: int = 32, bound: float = 100.0, every: int = 20) -> torch.Tensor:
    """Every twentieth row at ±100, the others N(0, 1)."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(v, d, generator=generator)
    w[::every] = torch.where(w[::every] > 0, bound, -bound) * (
        1 - 0.01 * torch.rand(w[::every].shape, generator=generator)
    )
    return w


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [None, 0.1])
def test_no_false_alarm_in_200_healthy_matrices(weight_decay: float | None) -> None:
    alarms, families, dtypes = [], set(), set()
    for i in range(200):  # one at a time: all of them are nine gigabytes
        made = healthy(HELD_OUT + i)
        families.add(made.family)
        dtypes.add(made.weight.dtype)
        if inspected(made.weight, weight_decay).saturated:
            alarms.append((i, made.family))
    assert families == set(HEALTHY)
    assert dtypes == {torch.float32, torch.bfloat16, torch.float16}
    assert alarms == []


@pytest.mark.parametrize("is_known", [False, True])
def test_none_missed_in_200_saturated_matrices(is_known: bool) -> None:
    found, least = [], 1.0
    for i in range(200):
        made = saturated(HELD_OUT + i)
        least = min(least, float(made.rows.double().mean()))
        got = inspected(made.weight, made.weight_decay if is_known else None)
        rows = torch.from_numpy(got.rows)
        assert made.weight_decay is not None
        if not got.saturated or (made.rows & ~rows).any():
            found.append((i, made.family, "missed"))
        elif (rows & ~made.rows).float().mean() > 0.001:
            found.append((i, made.family, "too many rows"))
        elif got.bound is None or abs(got.bound * made.weight_decay - 1) > 0.05:
            found.append((i, made.family, f"bound {got.bound}"))
    assert found == []
    assert 0.005 <= least < 0.007


def test_what_is_said_of_a_saturated_matrix() -> None:
    w = blown_up()
    got = inspected(w)
    assert got.rows.nonzero()[0].tolist() == list(range(0, 400, 20))
    assert got.bound == pytest.approx(100, rel=0.01)
    assert (got.smallest, got.largest) == (float(w.min()), float(w.max()))
    assert got.plus == (w > 80).double().mean()
    assert got.minus == (w < -80).double().mean()
    assert got.typical == pytest.approx(1, rel=0.05)
    np.testing.assert_allclose(got.row_rms, w.square().mean(1).sqrt(), rtol=1e-5)
    assert (got.row_near == (w.abs() > 80).float().mean(1).numpy()).all()
    assert set(got.worst(5)) <= set(range(0, 400, 20))
    assert got.counts.sum() == w.numel()
    assert got.counts_at_bound.sum() == 20 * 32
    assert got.verdict == (
        f"saturated: 20 rows stand at ±{got.bound:.4g} in wte.weight [400 × 32], 5.0% of them; the others "
        f"have an RMS of {got.typical:.3g}"
    )
    known = inspected(w, 0.01)
    assert (known.bound, known.bound_is, known.note) == (100.0, "1/λ", "")
    assert "at ±1/λ = 100 in" in known.verdict
    assert "at −" in inspected(-w.abs()).verdict
    assert "at +" in inspected(w.abs()).verdict
    assert "1 row stands at" in inspected(blown_up(every=400)).verdict


def test_what_is_said_of_a_healthy_matrix() -> None:
    w = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    got = inspected(w, 0.01)
    assert not got.rows.any()
    assert (got.bound, got.bound_is) == (100.0, "1/λ")
    assert inspected(w).bound is None
    assert got.verdict == (
        f"healthy: no rows of wte.weight [300 × 20] stand at a bound; largest |entry| {w.abs().max():.4g}, "
        "1/λ is 100"
    )
    assert got.worst(3).tolist() == w.square().mean(1).argsort(descending=True)[:3].tolist()
    assert not inspected(torch.zeros(9, 4)).saturated
    assert not inspected(torch.full((9, 1), 3.0)).saturated


def test_a_bound_that_does_not_fit_is_said_and_not_believed() -> None:
    got = inspected(blown_up(), 0.1)
    assert "beyond 1/λ = 10: no sign optimizer with this λ leads there" in got.note
    assert got.bound == pytest.approx(100, rel=0.01)
    on_the_way = inspected(blown_up(), 0.001)
    assert on_the_way.saturated
    assert on_the_way.note == "they are on their way: 1/λ = 1000 is not reached yet"


def test_a_stray_beyond_the_spike_does_not_hide_it() -> None:
    w = blown_up()
    w[7, 3] = 300.0
    assert inspected(w).bound == pytest.approx(100, rel=0.02)


def test_huge_and_tiny_entries_do_not_overflow() -> None:
    for size in (1e-30, 1e30):
        got = inspected(blown_up() * size)
        assert got.saturated
        assert got.typical == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4), r"wte\.weight in here is \[4\], no matrix with rows"),
        (torch.zeros(0, 4), r"is \[0, 4\], no matrix with rows"),
        (torch.zeros(2, 3, 4), r"is \[2, 3, 4\], no matrix"),
        (torch.zeros(4, 3).t(), r"stored with strides \(1, 3\), not row after row"),
        (torch.tensor([[1.0, 2.0], [1.0, torch.nan]]), "NaN or infinite, first in row 1"),
        (torch.tensor([[1.0, -torch.inf], [1.0, 2.0]]), "NaN or infinite, first in row 0"),
    ],
)
def test_matrices_that_cannot_be_inspected(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspected(weight)


@pytest.mark.parametrize("weight_decay", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_weight_decay(weight_decay: float) -> None:
    with pytest.raises(ValueError, match=f"weight decay must be positive and finite, got {weight_decay}"):
        inspected(torch.ones(4, 4), weight_decay)


# --- which matrices -------------------------------------------------------------------------------


def named(**shapes: tuple[int, ...]) -> dict[str, Stored]:
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {n: Stored(n, Path("f"), torch.float32, s, (1,) * len(s), 0) for n, s in names.items()}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "transformer.wte.weight",
            "transformer.wpe.weight",
            "model.embed_tokens.weight",
            "lm_head.weight",
        ),
        *("tok_embeddings.weight", "bert.embeddings.word_embeddings.weight", "shared.weight", "embedding"),
        *("gpt_neox.embed_in.weight", "embed_out.weight", "output.weight", "model.model.embedding.weight"),
        *("cls.predictions.decoder.weight", "encoder.embed_positions.weight", "token_emb.weight"),
    ],
)
def test_embeddings_by_name(name: str) -> None:
    tensors = named(**{name: (10, 8), "layer.0.attn.weight": (8, 8), "big.weight": (999, 8)})
    assert [t.name for t in embedding_like(tensors)] == [name]


def test_embeddings_by_shape() -> None:
    tensors = named(a=(50, 8), b=(8, 50), c=(64, 8), cos_cached=(99, 8), d=(1000,), e=(24, 8))
    assert [t.name for t in embedding_like(tensors)] == ["c"]
    assert [t.name for t in embedding_like(tensors, 50)] == ["a"]
    with pytest.raises(ValueError, match=r"give --tensor NAME \(there is e \[24, 8\], b \[8, 50\]\)"):
        embedding_like(named(b=(8, 50), e=(24, 8)))


# --- files ----------------------------------------------------------------------------------------


def model(bound: bool = True) -> dict[str, torch.Tensor]:
    w = blown_up() if bound else torch.randn(400, 32)
    return {"model.embed_tokens.weight": w, "model.norm.weight": torch.ones(32), "n": torch.arange(3)}


def as_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path / "model.safetensors")
    return path / "model.safetensors"


def as_torch(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, path / "weights.pt")
    return path / "weights.pt"


def as_old_torch(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, path / "old.pt", _use_new_zipfile_serialization=False)
    return path / "old.pt"


def as_nested(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save({"step": 3, "model": tensors, "more": [tensors["model.embed_tokens.weight"]]}, path / "n.pt")
    return path / "n.pt"


def as_shards(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    files = {}
    for i, (name, value) in enumerate(tensors.items()):
        files[name] = f"model-{i}.safetensors"
        save_file({name: value}, path / files[name])
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


def as_torch_shards(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    files = {}
    for i, (name, value) in enumerate(tensors.items()):
        files[name] = f"pytorch_model-{i}.bin"
        torch.save({name: value}, path / files[name])
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return path / "pytorch_model.bin.index.json"


FORMATS = [as_safetensors, as_torch, as_old_torch, as_nested, as_shards, as_torch_shards]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("write", FORMATS)
def test_every_format(write: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = model()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(dtype)
    path = write(tmp_path, tensors)
    for place in {path, tmp_path}:
        (got,) = [m for _, m in inspect_checkpoint(place) if m.name.endswith("model.embed_tokens.weight")]
        assert got.dtype == dtype
        assert got.rows.nonzero()[0].tolist() == list(range(0, 400, 20))
        assert got.largest == float(tensors["model.embed_tokens.weight"].max())
    read = stored_tensors(path)
    assert not any(name.endswith(".n") or name == "n" for name in read)  # whole numbers are no weights
    name = next(name for name in read if name.endswith("embed_tokens.weight"))
    assert torch.equal(read[name].rows(3, 9), tensors["model.embed_tokens.weight"][3:9])


def test_views_and_shared_storages(tmp_path: Path) -> None:
    whole = torch.arange(60.0).view(10, 6)
    torch.save({"emb": whole[2:8, 1:4], "lm_head": whole}, tmp_path / "w.pt")
    read = stored_tensors(tmp_path)
    assert torch.equal(read["emb"].rows(1, 6), whole[3:8, 1:4])
    assert torch.equal(torch.cat([rows for _, rows in read["emb"].blocks(6)]), whole[2:8, 1:4])
    assert torch.equal(read["lm_head"].rows(9, 10), whole[9:])


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", pickle.dumps(Evil()), "torch.load refuses it with weights_only"),
        ("a.pt", b"", "damaged or neither"),
        ("a.pt", b"what?", "a.pt holds more than tensors, or is damaged"),
        ("a.safetensors", b"", "is damaged or not a safetensors file"),
        ("a.safetensors", struct.pack("<Q", 2**60) + b"{", "is damaged or not a safetensors file"),
        ("a.index.json", b"{", "is not JSON"),
        ("a.index.json", b"[]", "holds no object but list"),
        ("a.index.json", b'{"weight_map": {"x": 3}}', "has no weight_map from tensors to files"),
        ("a.index.json", b'{"weight_map": {}}', "names no files"),
        ("a.index.json", b'{"weight_map": {"x": "../b"}}', "names '../b', which is no file beside it"),
        ("a.index.json", b'{"weight_map": {"x": "b.bin"}}', "there is no b.bin in"),
    ],
)
def test_foreign_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        stored_tensors(tmp_path / name)


def test_folders_that_do_not_say_what_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no model\.safetensors in"):
        stored_tensors(tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        stored_tensors(tmp_path / "nowhere")
    as_torch(tmp_path, model())
    as_old_torch(tmp_path, model())
    with pytest.raises(ValueError, match=r"holds old\.pt, weights\.pt: give one of them"):
        stored_tensors(tmp_path)
    as_safetensors(tmp_path, model())
    assert len(stored_tensors(tmp_path)) == 2  # the usual name goes first


def test_truncated_while_it_is_read(tmp_path: Path) -> None:
    path = as_safetensors(tmp_path, model())
    (matrix,) = [t for t in stored_tensors(path).values() if len(t.shape) == 2]
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(ValueError, match=r"is truncated: it ends within model\.embed_tokens\.weight"):
        inspect_matrix(matrix)


def test_large_matrices_are_read_in_slices(tmp_path: Path) -> None:
    # A file with holes: more than a gigabyte that takes no space, with every thousandth row at ±10.
    v, d = 36_000, 8_192
    entry = {"dtype": "F32", "shape": [v, d], "data_offsets": [0, v * d * 4]}
    header = json.dumps({"embed.weight": entry}).encode()
    row = np.where(np.random.default_rng(0).random(d) < 0.5, -10, 10).astype(np.float32).tobytes()
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        start = file.tell()
        for i in range(0, v, 1000):
            file.seek(start + i * d * 4)
            file.write(row)
        file.truncate(start + v * d * 4)
    # Not ru_maxrss, which a new process takes over from the one that started it.
    code = "import sys; from minisign.cli import main; rc = main(sys.argv[1:]);"
    code += "status = dict(line.split(':', 1) for line in open('/proc/self/status'));"
    code += "print(rc, status['VmHWM'].split()[0])"
    out = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path / "m.safetensors"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rc, peak = map(int, out.splitlines()[-1].split())
    assert rc == 1
    assert 5e7 < peak * 1024 <= 1e9 < v * d * 4


# --- at the shell ---------------------------------------------------------------------------------


def test_inspect_at_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_safetensors(tmp_path, model())
    text = "a few words of a text, and a few more of the same " * 20
    encoding = train_encoding(text, 300)
    (tmp_path / "v.tiktoken").write_text(vocabulary_lines(encoding))
    arguments = ["inspect", str(path), "--out", str(tmp_path / "out"), "--rows", "3"]
    assert main([*arguments, "--tokenizer", str(tmp_path / "v.tiktoken")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("saturated: 20 rows stand at ±")
    assert "Worst rows of model.embed_tokens.weight" in out
    (found,) = json.loads((tmp_path / "out/inspect.json").read_text())
    assert (found["saturated"], found["rows_at_bound"], found["shape"]) == (True, 20, [400, 32])
    assert len(found["worst_rows"]) == 3
    for row in found["worst_rows"]:
        known = row["id"] < encoding.n_vocab
        assert row["text"] == (encoding.decode([row["id"]]) if known else None)
        assert row["at_bound"]
    assert (tmp_path / "out/inspect.png").stat().st_size > 10_000
    as_safetensors(tmp_path, model(bound=False))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("healthy: no rows of model.embed_tokens.weight")
    assert "Worst" not in out
    assert main([*arguments, "--tensor", "model.norm.weight"]) == 2
    assert "is [32], no matrix with rows" in capsys.readouterr().err
    assert main([*arguments, "--tensor", "model.embed.weight"]) == 2
    assert "there is no tensor 'model.embed.weight' in" in capsys.readouterr().err
    assert main([*arguments, "--rows", "-1"]) == 2
    assert "--rows must be 0 or more, got -1" in capsys.readouterr().err
    assert main([*arguments, "--tokenizer", "no such"]) == 2
    assert "there is no file no such, nor an encoding of that name in tiktoken (" in capsys.readouterr().err


def test_rows_that_are_no_tokens_have_no_text() -> None:
    found = inspected(blown_up(16))  # of positions, where there are 1,000 tokens
    rows = as_json(found, 3, lambda i: "word" if i < 1000 else None)["worst_rows"]
    assert [row["text"] for row in rows] == [None] * 3
    rows = as_json(found, 3, lambda i: "word" if i < 16 else None)["worst_rows"]
    assert [row["text"] for row in rows] == ["word"] * 3


def test_no_text_is_made_again_that_takes_minutes(tmp_path: Path) -> None:
    for words, expected in ((3000, "a"), (90_000_000, None)):
        config = Config(corpus=CorpusConfig(words=words), vocab_size=300)
        (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
        assert token_texts_of(tmp_path)(ord("a")) == expected


def test_token_texts(tmp_path: Path) -> None:
    (tmp_path / "bad.tiktoken").write_text("YQ== 0\n!! 1\n")
    with pytest.raises(ValueError, match=r"bad\.tiktoken is not in tiktoken's format: line 2 is not"):
        token_texts(str(tmp_path / "bad.tiktoken"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        token_texts(str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json in"):
        token_texts(str(tmp_path / "nowhere" / "tokenizer.json"))
    from tokenizers import Tokenizer, models

    words = {"one": 0, "two": 1, "[UNK]": 2}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    text = token_texts(str(tmp_path))
    assert [text(i) for i in range(4)] == ["one", "two", "[UNK]", None]


def test_what_a_config_says(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    assert origin(tmp_path).vocab_size is None
    for content, size in (({"vocab_size": 400}, 400), ({"text_config": {"vocab_size": 7}}, 7), ({}, None)):
        config.write_text(json.dumps(content))
        assert origin(tmp_path / "model.safetensors").vocab_size == size
    config.write_text('{"corpus": {}, "optimizer": "lion", "nonsense": 1}')
    with pytest.raises(ValueError, match=r"config\.json is not one of a run"):
        origin(tmp_path)


def test_a_run_of_this_package_says_its_weight_decay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    options = ["--layers", "1", "--width", "16", "--vocab-size", "300", "--steps", "2", "--lr", "1e-9"]
    assert main(["train", "--optimizer", "lion", "--weight-decay", "0.5", "--out", run, *options]) == 0
    capsys.readouterr()
    assert main(["inspect", run, "--out", out, "--rows", "1"]) == 0
    found = json.loads(Path(out, "inspect.json").read_text())
    assert {m["tensor"]: m["bound"] for m in found} == dict.fromkeys(
        ["embedding.weight", "position.weight", "head.weight"], 2.0
    )
    assert found[0]["worst_rows"][0]["text"]  # its own vocabulary
    assert main(["inspect", run, "--out", out, "--weight-decay", "0.25"]) == 0
    assert json.loads(Path(out, "inspect.json").read_text())[0]["bound"] == 4.0


def test_figure() -> None:
    figure = inspections([inspected(blown_up()), inspected(torch.randn(50, 8), 0.1)], "what it is")
    left, right = figure.axes[:2]
    assert left.get_yscale() == "log"
    assert len(left.patches) == 2
    assert right.get_title() == "saturated"
    assert len(right.lines[0].get_xdata()) == 380
    assert len(right.lines[1].get_xdata()) == 20
    assert figure.axes[3].get_title() == "healthy"
    assert figure.get_suptitle() == "what it is"


# --- repair ---------------------------------------------------------------------------------------


def differing(a: Path, b: Path) -> np.ndarray:
    one, other = (np.frombuffer(p.read_bytes(), np.uint8) for p in (a, b))
    assert len(one) == len(other)
    return np.flatnonzero(one != other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", [as_safetensors, as_torch, as_nested])
def test_repair_changes_those_rows_and_no_other_byte(
    write: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = model()
    name = "model.embed_tokens.weight"
    before = tensors[name] = tensors[name].to(dtype)
    path = write(tmp_path, tensors)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    new = tmp_path / f"new{path.suffix}"
    bad = inspect_checkpoint(path)
    repair(path, new, [b for b in bad if b[1].saturated])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    (matrix,) = {m.offset: m for m, _ in bad}.values()
    assert matrix.offset is not None
    changed = differing(path, new)
    inside = (changed >= matrix.offset) & (changed < matrix.offset + before.nbytes)
    row = (changed[inside] - matrix.offset) // matrix.row_bytes
    assert set(row) == set(range(0, 400, 20))
    assert (~inside).sum() <= (0 if write is as_safetensors else 8)  # a check sum in two places
    if write is not as_safetensors:
        assert zipfile.ZipFile(new).testzip() is None
    content = load_file(new) if write is as_safetensors else torch.load(new, weights_only=True)
    after = (content["model"] if write is as_nested else content)[name]
    rows = torch.zeros(400, dtype=torch.bool)
    rows[::20] = True
    assert torch.equal(after[~rows], before[~rows])
    typical = before[~rows].float().square().mean(1).sqrt().median()
    expected = before[rows].float()
    expected *= typical / expected.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(after[rows].float(), expected, rtol=0.01, atol=0)
    assert not any(m.saturated for _, m in inspect_checkpoint(new))


def test_repair_of_a_folder_at_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, new = tmp_path / "m", tmp_path / "new"
    (folder / "sub").mkdir(parents=True)
    as_shards(folder, model())
    (folder / "sub" / "more.txt").write_text("kept")
    arguments = ["repair", str(folder), "--out", str(new)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("model.embed_tokens.weight: 20 rows scaled to an RMS of ")
    assert (new / "sub" / "more.txt").read_text() == "kept"
    same = [f.name for f in folder.glob("*.*") if f.read_bytes() == (new / f.name).read_bytes()]
    assert sorted(same) == ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m", "new"]
    assert main(arguments) == 2
    assert "new is there already, and is not overwritten" in capsys.readouterr().err
    assert main(["repair", str(new), "--out", str(tmp_path / "third")]) == 0
    assert "healthy: no rows stand at a bound" in capsys.readouterr().out
    assert not (tmp_path / "third").exists()
    (tmp_path / "file").write_text("")
    assert main(["repair", str(folder), "--out", str(tmp_path / "file" / "x")]) == 2
    (folder / "checkpoints").mkdir()
    capsys.readouterr()
    assert main(["repair", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert "its checkpoints are as they were" in capsys.readouterr().out


def test_repairs_that_cannot_be_made(tmp_path: Path) -> None:
    for weight, message in (
        (blown_up(every=1), "all rows of .* stand at a bound: no healthy row is left to go by"),
        (blown_up() * (blown_up().abs() > 50), "the healthy rows of .* are zero"),
    ):
        path = as_safetensors(tmp_path, {"embed.weight": weight})
        with pytest.raises(ValueError, match=message):
            repair(path, tmp_path / "new", inspect_checkpoint(path))
    path = as_old_torch(tmp_path, model())
    with pytest.raises(ValueError, match="in torch's oldest format, in which nothing can be replaced"):
        repair(path, tmp_path / "new", inspect_checkpoint(path))
    assert not (tmp_path / "new").exists()
