"""The watch in the Trainer of transformers, with the library itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from minisign import AdamW, Hybrid, Lion, Tiger, param_groups
from minisign.doctor.hf import EmbeddingCallback
from minisign.doctor.watch import LOG, EmbeddingWarning
from minisign.lab.jitter import jittered

V, T = 300, 8
STOPS = 60  # from this window on only half of the tokens come


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of random tokens; the later ones have none of the upper half."""

    def __len__(self) -> int:
        return 800

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(V if i < STOPS * 4 else V // 2, (T,), generator=generator)
        return {"input_ids": ids, "labels": ids}


class InOrder(Trainer):
    """Takes the windows in their order."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(Windows())


def model() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, n_positions=T, n_embd=16, n_layer=1, n_head=2)
    no_tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return jittered(GPT2LMHeadModel(GPT2Config(**sizes, **no_tokens, tie_word_embeddings=False)))


def trainer(
    folder: Path, make: Callable[[Any], torch.optim.Optimizer], callback: EmbeddingCallback, **options: Any
) -> Trainer:
    made = model()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "max_steps": 200, **options},
    )
    return InOrder(
        made, arguments, train_dataset=Windows(), optimizers=(make(made), None), callbacks=[callback]
    )


def tiger(m: Any, **more: Any) -> Tiger:
    return Tiger(param_groups(m, **more), lr=0.03, weight_decay=0.25)


def lion(m: Any, **more: Any) -> Lion:
    return Lion(param_groups(m, **more), lr=0.01, weight_decay=0.25)


def hybrid(m: Any) -> Hybrid:
    tables = [m.transformer.wte.weight, m.transformer.wpe.weight, m.lm_head.weight]
    others = [p for p in m.parameters() if all(p is not t for t in tables)]
    return Hybrid(AdamW(tables, lr=0.01), Lion(others, lr=0.001))


@pytest.mark.trained
@pytest.mark.parametrize("make", [tiger, lion])
def test_the_trainer_warns(make: Any, tmp_path: Path) -> None:
    callback = EmbeddingCallback(every=20)
    with pytest.warns(EmbeddingWarning, match=r"rows of transformer\.wte\.weight stand at"):
        trainer(tmp_path, make, callback).train()
    assert callback.watch is not None
    looks = callback.watch.looks["transformer.wte.weight"]
    assert [look.step for look in looks] == list(range(20, 201, 20))
    assert looks[-1].silent >= 20
    assert looks[-1].largest <= looks[-1].envelope * (1 + 1e-6)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [x["step"] for x in lines if x["name"] == "transformer.wte.weight"] == [x.step for x in looks]


@pytest.mark.trained
@pytest.mark.parametrize("make", [hybrid, lambda m: lion(m, embedding={"lazy": "grad"})])
def test_the_trainer_does_not_warn_of_the_cures(make: Any, tmp_path: Path) -> None:
    callback = EmbeddingCallback(every=20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, make, callback).train()
    assert callback.watch is not None
    assert callback.watch.step == 200
    assert callback.watch.looks["transformer.wte.weight"][-1].silent == 0
    assert not [x for x in caught if "wte" in str(x.message)]


def test_micro_batches_and_the_last_look(tmp_path: Path) -> None:
    callback = EmbeddingCallback(every=20, folder=tmp_path / "watch")
    trainer(tmp_path, hybrid, callback, max_steps=30, gradient_accumulation_steps=2).train()
    assert callback.watch is not None
    assert [x.step for x in callback.watch.looks["lm_head.weight"]] == [20, 30]
    assert (tmp_path / "watch" / LOG).exists()
    assert not (tmp_path / LOG).exists()


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.filterwarnings("ignore::minisign.doctor.watch.EmbeddingWarning")
def test_a_trainer_that_resumes_goes_on_with_the_watch(restored: bool, tmp_path: Path) -> None:
    options = dict(save_strategy="steps", save_steps=30, restore_callback_states_from_checkpoint=restored)
    whole, callback = EmbeddingCallback(every=10), EmbeddingCallback(every=10)
    trainer(tmp_path / "whole", tiger, whole, max_steps=50, **options).train()
    again = trainer(tmp_path / "again", tiger, callback, max_steps=50, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-30"))
    (callback,) = (c for c in again.callback_handler.callbacks if isinstance(c, EmbeddingCallback))
    assert whole.watch is not None
    assert callback.watch is not None
    for name, looks in callback.watch.looks.items():
        assert [(x.step, x.largest, x.envelope) for x in looks] == [
            (x.step, x.largest, x.envelope) for x in [*whole.watch.looks[name]][3:]
        ]


def test_a_second_training_watches_anew(tmp_path: Path) -> None:
    callback = EmbeddingCallback(every=5)
    made = trainer(tmp_path, hybrid, callback, max_steps=5)
    made.train()
    first = callback.watch
    made.train()
    assert callback.watch is not first
    assert first is not None
    assert first.step == 5
