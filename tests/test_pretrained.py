"""`minisign probe` on models that were not made here: small checkpoints that transformers writes on the
spot."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.implementations import ByteLevelBPETokenizer

from minisign.cli import main
from minisign.doctor.examine import examine, matrix
from minisign.doctor.pretrained import IGNORED, examples, load_subject
from minisign.lab.build import load_tokens
from minisign.lab.config import Config
from minisign.lab.corpus import CorpusConfig, generate
from minisign.lab.train import Run

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCAB = 400
KINDS = ("gpt2", "roberta")


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = dict(n_positions=24, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=2)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, **shape))
    shape = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    config = transformers.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=26, **shape)
    return transformers.RobertaForMaskedLM(config)


def save(model: Any, folder: Path, **options: Any) -> None:
    """As a user of the library would, without its progress bars."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a checkpoint with its tokenizer for each architecture."""
    root = tmp_path_factory.mktemp("made")
    text = generate(CorpusConfig(words=6000))
    (root / "text.txt").write_text(text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], VOCAB, special_tokens=SPECIAL, show_progress=False)
    for kind in KINDS:
        save(build(kind), root / kind)
        tokenizer.save(str(root / kind / "tokenizer.json"))
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the GPT-2 checkpoint, to be spoiled."""
    return Path(shutil.copytree(made / "gpt2", tmp_path / "gpt2"))


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_the_logits_that_transformers_gives(made: Path, kind: str) -> None:
    subject, original = load_subject(made / kind), build(kind).eval()
    ids = torch.randint(VOCAB, (2, 12))
    assert torch.allclose(subject.logits(ids), original(input_ids=ids).logits, atol=1e-5)
    assert subject.context == 24
    assert subject.embedding is subject.head  # both tie them
    assert not subject.model.training
    assert subject.name == f"{kind}, 3 layers"
    assert subject.encode("a") == subject.encode("a")
    assert 0 not in subject.encode("several words of it")  # no special tokens put in


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_itself_its_shards_and_half_precision_are_read_too(
    made: Path, tmp_path: Path, kind: str
) -> None:
    ids = torch.randint(VOCAB, (1, 8))
    expected = load_subject(made / kind).logits(ids)
    assert torch.equal(load_subject(made / kind / "model.safetensors").logits(ids), expected)
    save(build(kind), tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = load_subject(tmp_path / "shards", tokenizer=made / kind / "tokenizer.json")
    assert torch.equal(shards.logits(ids), expected)
    save(build(kind).to(torch.bfloat16), tmp_path / "half")
    half = load_subject(tmp_path / "half", tokenizer=made / kind)
    assert half.embedding.dtype == torch.float32
    assert torch.allclose(half.logits(ids), expected, atol=0.02)


def test_weights_of_the_body_alone_are_a_gpt2_since_its_head_is_the_embedding(
    made: Path, tmp_path: Path
) -> None:
    save(build("gpt2").transformer, tmp_path)  # as the published checkpoints are: no prefix, no head
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    ids = torch.randint(VOCAB, (1, 8))
    subject = load_subject(tmp_path, tokenizer=made / "gpt2")
    assert torch.equal(subject.logits(ids), load_subject(made / "gpt2").logits(ids))


def test_vocab_and_merges_are_a_tokenizer_too(made: Path, tmp_path: Path) -> None:
    reader = ByteLevelBPETokenizer()
    reader.train_from_iterator([(made / "text.txt").read_text()], VOCAB, show_progress=False)
    reader.save_model(str(tmp_path))
    subject = load_subject(made / "gpt2", tokenizer=tmp_path)
    assert subject.encode("some text") == reader.encode("some text").ids


def test_a_run_of_this_package_is_read_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for tie in ("none", "tied"):
        config = Config(
            corpus=CorpusConfig(words=6000),
            vocab_size=300,
            context=8,
            layers=2,
            heads=2,
            width=16,
            tie=tie,
            steps=1,
        )
        run = Run(config, load_tokens(config))
        run.save(tmp_path / tie)
        subject = load_subject(tmp_path / tie)
        ids = torch.randint(300, (2, 8))
        assert torch.equal(subject.logits(ids), run.model.eval()(ids))
        assert (subject.head is subject.embedding) == (tie == "tied")
        assert subject.weight_decay == 0.01
        assert subject.own_text is not None
        assert len(subject.encode("a few words")) > 2


# --- examples -------------------------------------------------------------------------------------


def test_examples_of_the_next_token(made: Path) -> None:
    subject = load_subject(made / "gpt2")
    text = list(range(5, 105))
    batches = examples(subject, text, batches=2, size=3, length=9)
    assert [tuple(x.shape) for x, _ in batches] == [(3, 9), (3, 9)]
    for inputs, targets in batches:
        assert torch.equal(inputs + 1, targets)
    assert batches[0][0][0, 0] == 5
    assert batches[1][1][-1, -1] == 104  # to the end of the text
    [(inputs, targets)] = examples(subject, text, batches=1, size=1, length=9)
    logits = subject.logits(inputs)
    expected = torch.nn.functional.cross_entropy(logits[0], targets[0])
    assert torch.allclose(subject.loss((inputs, targets)), expected)


def test_examples_of_masked_tokens(made: Path) -> None:
    subject = load_subject(made / "roberta")
    ids = subject.encode((made / "text.txt").read_text())[:2000]
    [(inputs, targets), _] = examples(subject, ids, batches=2, size=40, length=20)
    assert (inputs[:, 0] == 0).all()
    assert (inputs[:, -1] == 2).all()
    hidden = targets != IGNORED
    assert (inputs[hidden] == SPECIAL.index("<mask>")).all()
    assert not hidden[:, [0, -1]].any()
    assert hidden.any(1).all()
    assert 0.1 < float(hidden[:, 1:-1].float().mean()) < 0.2
    whole = torch.where(hidden, targets, inputs)[:, 1:-1]
    assert whole[0].tolist() == ids[:18]
    again = examples(subject, ids, batches=2, size=40, length=20)[0][0]
    other = examples(subject, ids, batches=2, size=40, length=20, seed=1)[0][0]
    assert torch.equal(inputs, again)
    assert not torch.equal(inputs, other)
    each = subject.losses((inputs, targets))
    assert (each[~hidden] == 0).all()
    assert torch.allclose(subject.loss((inputs, targets)), each[hidden].mean())


def test_a_short_text_gives_smaller_batches_and_a_shorter_one_an_error(made: Path) -> None:
    subject = load_subject(made / "gpt2")
    batches = examples(subject, list(range(100)), batches=3, size=8, length=9)
    assert [len(x) for x, _ in batches] == [3, 3, 3]
    for options, message in (
        (dict(length=50), "100 tokens, too few for 3 batches of one window of 51 or more: give more"),
        (dict(length=25), "length must be 2 to 24 tokens here, got 25"),
        (dict(length=1), "length must be 2 to 24 tokens here, got 1"),
        (dict(batches=0), "batches must be 1 or more, got 0"),
        (dict(size=-1), "batch must be 1 or more, got -1"),
    ):
        context = 200 if "too few" in message else 24
        object.__setattr__(subject, "context", context)
        with pytest.raises(ValueError, match=message):
            examples(subject, list(range(100)), **{"batches": 3, "size": 8, "length": 9, **options})
    with pytest.raises(ValueError, match="the tokenizer gives the id 400, the model has 400 tokens"):
        examples(subject, [1, 400] * 50, batches=1, size=1, length=9)


# --- measuring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_examination_is_of_the_model_and_the_text(made: Path, kind: str) -> None:
    subject = load_subject(made / kind)
    ids = subject.encode((made / "text.txt").read_text())
    batches = examples(subject, ids, batches=2, size=4, length=20)
    found = examine(subject, batches, ids, products=5)
    total = sum(subject.losses(batch).sum().item() for batch in batches)
    assert found["loss"] == pytest.approx(total / found["predicted"], rel=1e-5)
    assert found["windows"] == 8
    assert len(found["loss_by_frequency"]) == 10
    unequal = found["heterogeneity"]
    layers = [name for name in unequal["blocks"] if name.split(".")[-1].isdigit()]
    assert len(layers) == 3
    assert sum(b["parameters"] for b in unequal["blocks"].values()) == found["parameters"]
    assert found["parameters"] == sum(p.numel() for p in subject.model.parameters())
    grads = torch.autograd.grad(
        sum(map(subject.loss, batches)) / 2, list(subject.model.parameters()), allow_unused=True
    )
    norm = torch.cat([g.flatten() for g in grads if g is not None]).norm()
    assert unequal["norm"] == pytest.approx(float(norm), rel=1e-4)
    assert unequal["lambda_g"] > 0
    assert all(1 <= b["curvature"]["products"] <= 5 for b in unequal["blocks"].values())
    assert list(found["matrices"]) == ["embedding = head"]
    json.dumps(found, allow_nan=False)


def test_a_matrix_at_its_bound_is_told_from_a_healthy_one() -> None:
    weight = 0.02 * torch.randn(50, 100)
    healthy = matrix(weight)
    assert healthy["bound_is"] == "the largest entry"
    assert healthy["bound"] == healthy["largest"] or healthy["bound"] == -healthy["smallest"]
    assert healthy["near"] < 0.01
    assert healthy["rows"] == 0
    assert healthy["common_mode"] < 0.1
    weight[:5] = 99.0 * weight[:5].sign()
    for blown_up in (matrix(weight), matrix(weight, weight_decay=0.01)):
        assert blown_up["rows"] == 5
        assert blown_up["near"] == pytest.approx(0.1)
    assert matrix(weight, weight_decay=0.01)["bound"] == 100
    assert matrix(weight, weight_decay=0.001)["rows"] == 0
    weight[:] = torch.randn(100)
    assert matrix(weight)["common_mode"] == pytest.approx(1)
    assert matrix(weight)["norm"] == pytest.approx(float(weight.norm()))
    with pytest.raises(ValueError, match=r"entries from 0\.0 to 0\.0 cannot be measured"):
        matrix(torch.zeros(2, 2))


def test_what_cannot_be_examined(made: Path) -> None:
    subject = load_subject(made / "gpt2")
    batches = examples(subject, list(range(100)), batches=1, size=1, length=9)
    for options, message in (
        (dict(blocks="heads"), "unknown blocks 'heads': choose from layers, tensors"),
        (dict(products=-1), "curvature takes 0 products or more, got -1"),
        (dict(weight_decay=0.0), "weight decay must be positive and finite, got 0.0"),
        (dict(weight_decay=float("inf")), "weight decay must be positive and finite, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            examine(subject, batches, list(range(100)), **options)
    with torch.no_grad():
        next(iter(subject.model.parameters())).fill_(float("inf"))
    with pytest.raises(ValueError, match="the model's loss is nan on this text"):
        examine(subject, batches, list(range(100)))


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_probe_leaves_a_table_a_picture_and_json(
    made: Path, tmp_path: Path, capsys: Any, kind: str
) -> None:
    before = {path: path.read_bytes() for path in (made / kind).iterdir()}
    argv = ["probe", "--model", str(made / kind), "--text", str(made / "text.txt"), "--out", str(tmp_path)]
    assert main([*argv, "--length", "20", "--curvature", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads((tmp_path / "probe.json").read_text())
    assert f"{kind}, 3 layers, {found['parameters']:,} parameters" in out
    for name in ("‖g‖", "‖H‖", "Λ_G", "Gini", "embedding = head", "common", "tenths"):
        assert name in out
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["probe.json", "probe.png"]
    assert {path: path.read_bytes() for path in (made / kind).iterdir()} == before


def test_probe_of_a_run_needs_no_text(tmp_path: Path, capsys: Any) -> None:
    config = Config(
        corpus=CorpusConfig(words=6000), vocab_size=300, context=8, layers=2, heads=2, width=16, steps=1
    )
    Run(config, load_tokens(config)).save(tmp_path / "run")
    assert (
        main(["probe", "--model", str(tmp_path / "run"), "--out", str(tmp_path), "--blocks", "tensors"])
        == 0
    )
    out = capsys.readouterr().out
    assert "bound: 1/λ" in out
    assert "attention.qkv.weight" in out
    matrices = json.loads((tmp_path / "probe.json").read_text())["matrices"]
    assert list(matrices) == ["embedding", "head"]
    assert matrices["head"]["bound"] == 100


def probe_fails(capsys: Any, *argv: Any) -> str:
    """`minisign probe` must fail with exit code 2 and one line, which is returned."""
    assert main(["probe", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("minisign probe: error: ")
    return str(err)


def test_a_missing_extra_is_named(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    err = probe_fails(capsys, "--model", made / "gpt2", "--text", made / "text.txt")
    assert "a gpt2 checkpoint is read with transformers: pip install 'minisign[hf]'" in err


def spoil_config(**fields: Any) -> Any:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return spoil


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.attn.c_attn.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lose_a_shard(folder: Path) -> None:
    save(build("gpt2"), folder, max_shard_size="20KB")
    sorted(folder.glob("model-0*.safetensors"))[1].unlink()


def other_kind_of_model(folder: Path) -> None:
    config = transformers.RobertaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    save(transformers.RobertaForSequenceClassification(config), folder)


BROKEN: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json in"),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "holds no object but list"),
    "unknown architecture": (
        spoil_config(model_type="llama"),
        "config.json is 'llama': known are gpt2, roberta",
    ),
    "no architecture": (lambda f: (f / "config.json").write_text("{}"), "is None: known are gpt2, roberta"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "there is no model.safetensors in"),
    "truncated weights": (truncate, "model.safetensors is damaged or not a safetensors file"),
    "empty weights": (empty, "model.safetensors is damaged or not a safetensors file"),
    "a tensor is missing": (
        lose_a_tensor,
        "has no transformer.h.1.attn.c_attn.weight (1 tensors are missing)",
    ),
    "a shard is missing": (lose_a_shard, "there is no model-00002-of-"),
    "no language model": (other_kind_of_model, "it is no whole language model"),
    "other shapes": (
        spoil_config(n_embd=8),
        "transformer.h.0.attn.c_attn.bias is [48], by the configuration [24]",
    ),
    "fewer layers in the config": (spoil_config(n_layer=2), "has 3 layers, 2 by"),
    "more layers in the config": (spoil_config(n_layer=4), "has 3 layers, 4 by"),
    "a field of another kind": (spoil_config(n_layer="three"), "is not one that transformers takes"),
    "unknown activation": (
        spoil_config(activation_function="?"),
        "is not one that transformers takes: '?'",
    ),
    "index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
        "has no weight_map from tensors to files",
    ),
    "broken vocabulary": (
        lambda f: [
            (f / "tokenizer.json").unlink(),
            *((f / x).write_text("{") for x in ("vocab.json", "merges.txt")),
        ],
        "vocab.json is not a tokenizer",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "has no tokenizer.json, nor vocab.json and merges.txt: give one with --tokenizer",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_gets_one_clear_line(
    folder: Path, made: Path, capsys: Any, spoil: Any, message: str
) -> None:
    spoil(folder)
    capsys.readouterr()
    out = folder.parent / "out"
    assert message in probe_fails(capsys, "--model", folder, "--text", made / "text.txt", "--out", out)
    assert not out.exists()


def test_bad_arguments_get_one_clear_line(made: Path, tmp_path: Path, capsys: Any) -> None:
    model = ["--model", made / "gpt2", "--out", tmp_path]
    text = ["--text", made / "text.txt"]
    assert "there is no" in probe_fails(capsys, "--model", tmp_path / "nothing", *text)
    nowhere = tmp_path / "nowhere"
    assert f"there is no {nowhere}" in probe_fails(capsys, *model, *text, "--tokenizer", nowhere)
    assert "brings no text: give one with --text" in probe_fails(capsys, *model)
    assert "length must be 2 to 24" in probe_fails(capsys, *model, *text, "--length", 99)
    assert "unknown blocks 'x'" in probe_fails(capsys, *model, *text, "--blocks", "x")
    assert "weight decay must be positive and finite, got -1.0" in probe_fails(
        capsys, *model, *text, "--weight-decay", -1
    )
    (tmp_path / "short.txt").write_text("a few words")
    assert "too few for 4 batches of one window of 25 or more" in probe_fails(
        capsys, *model, "--text", tmp_path / "short.txt"
    )
    assert not (tmp_path / "probe.json").exists()


@pytest.mark.parametrize("begin", [50256, None])
def test_a_masked_model_needs_tokens_to_put_around_a_window(
    made: Path, tmp_path: Path, capsys: Any, begin: int | None
) -> None:
    shutil.copytree(made / "roberta", tmp_path / "roberta")
    spoil_config(bos_token_id=begin)(tmp_path / "roberta")
    err = probe_fails(capsys, "--model", tmp_path / "roberta", "--text", made / "text.txt")
    assert f"bos_token_id is {begin}, not one of the model's {VOCAB} tokens" in err


def test_what_the_loss_does_not_use_is_told(made: Path, tmp_path: Path, capsys: Any) -> None:
    config = build("roberta").config
    config.tie_word_embeddings = False  # the head then has a bias of its own, and one that is not used
    save(transformers.RobertaForMaskedLM(config), tmp_path / "model")
    argv = [
        "probe",
        "--model",
        str(tmp_path / "model"),
        "--text",
        str(made / "text.txt"),
        "--blocks",
        "tensors",
    ]
    argv += [
        "--tokenizer",
        str(made / "roberta"),
        "--out",
        str(tmp_path),
        "--length",
        "20",
        "--curvature",
        "2",
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    unused = json.loads((tmp_path / "probe.json").read_text())["heterogeneity"]
    still = [name for name, block in unused["blocks"].items() if block["norm"] == 0]
    assert (unused["disparity"]["max over min"] is None) == bool(still)
    assert ("without gradient: not used by the loss" in out) == bool(still)
    assert "not converged: ‖H‖, and Λ, are too small" in out


def test_a_masked_model_needs_a_mask(made: Path, tmp_path: Path, capsys: Any) -> None:
    reader = ByteLevelBPETokenizer()
    reader.train_from_iterator([(made / "text.txt").read_text()], VOCAB, show_progress=False)
    reader.save(str(tmp_path / "tokenizer.json"))
    argv = ["--model", made / "roberta", "--text", made / "text.txt"]
    assert "has no <mask>" in probe_fails(capsys, *argv, "--tokenizer", tmp_path)


def test_a_run_whose_weights_do_not_fit(tmp_path: Path, capsys: Any) -> None:
    config = Config(
        corpus=CorpusConfig(words=6000), vocab_size=300, context=8, layers=1, heads=2, width=16, steps=1
    )
    Run(config, load_tokens(config)).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "head.weight"}, tmp_path / "model.safetensors")
    assert "has no head.weight" in probe_fails(capsys, "--model", tmp_path, "--out", tmp_path)
    save_file({**weights, "head.weight": torch.zeros(7, 16)}, tmp_path / "model.safetensors")
    assert "does not fit its configuration" in probe_fails(capsys, "--model", tmp_path, "--out", tmp_path)
