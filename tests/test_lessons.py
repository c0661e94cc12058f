"""The checkers of the exercises: each accepts a right answer and says what is wrong with others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minisign import Lion, lessons, optimizer, param_groups
from minisign.lessons import (
    RIGHT,
    Verdict,
    adam_instability,
    adam_ratio,
    checker,
    embedding_blowup,
    fix_hybrid,
    fix_lazy,
    fix_tied,
    fixes_compared,
    fused_kernels,
    gradient_heterogeneity,
    norm_placement,
    rare_classes,
    sign_descent,
    skewed_corpus,
    stingy_memory,
    why_one_over_lambda,
    your_own_model,
    your_own_optimizer,
)

# --- the notebooks' first cell, and verdicts ------------------------------------------------------


def test_start_tells_where_it_runs_and_gives_the_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MINISIGN_SEED", raising=False)
    assert lessons.start() == 0
    monkeypatch.setenv("MINISIGN_SEED", "7")
    assert lessons.start() == 7
    first, second = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in first
    assert first.endswith("1 thread, seed 0")
    assert second.endswith("seed 7")
    for bad in ("-1", "1.5", "", "seven", "4294967296"):
        monkeypatch.setenv("MINISIGN_SEED", bad)
        message = f"MINISIGN_SEED must be a natural number below 2³², got '{bad}'"
        with pytest.raises(ValueError, match=message):
            lessons.start()


def test_a_verdict_is_true_if_nothing_is_wrong() -> None:
    assert RIGHT
    assert repr(RIGHT) == "Right."
    assert not Verdict("it is 3")
    assert repr(Verdict("it is 3")) == "Not yet: it is 3."


def test_only_a_bare_not_implemented_error_is_a_missing_answer() -> None:
    @checker
    def check(answer: Callable[[], object]) -> Verdict:
        answer()
        return RIGHT

    def torchs() -> None:
        raise NotImplementedError("no such operation on this device")

    with pytest.raises(NotImplementedError, match="no such operation"):
        check(torchs)
    assert repr(check(empty)) == "Not yet: the function is still empty."


def test_a_kernels_own_part_has_no_files_and_no_line_numbers() -> None:
    for device, first, last in (
        ("cpu", "static void move(", "}"),
        ("cuda", "def move(", "    store(B0, i, m, mask, key, tl.float32, False, MASKED)"),
    ):
        text = Lion.kernel(device)
        own = lessons.own_part(text).splitlines()
        assert own[0].startswith(first)
        assert own[-1] == last
        assert "minisign.optim.lion" in text
        assert "minisign.optim" not in "".join(own)
        assert any(line.endswith(" p.add_(update, alpha=-lr)") for line in own)
        assert any(line.endswith(" m.lerp_(g, 1 - beta2)") for line in own)  # of which lion.py says more
        assert re.search(r"(//|#) \d+: p.add_", text)
        assert not re.search(r"(//|#) \d+: ", "".join(own))


def test_a_refusal_is_its_message() -> None:
    message = lessons.refusal(optimizer, choosing, buffers=("m",), lr=0.1, beta=0.9)
    assert re.fullmatch(r"line \d+, `if g > 0:` depends on a tensor's values; .*", message)
    assert lessons.without_files("line 2 of /a b/c.py, `x`; see d.py") == "line 2, `x`; see d.py"
    with pytest.raises(AssertionError, match="nothing was refused"):
        lessons.refusal(Lion, [torch.zeros(3)])


# --- every checker: right answers, and wrong ones with what is said of them -----------------------


def empty(*arguments: Any) -> Any:
    raise NotImplementedError


def nothing(*arguments: Any) -> Any:
    return None


def lion(w: Any, g: Any, s: Any) -> None:
    c = s.beta1 * s.m + (1 - s.beta1) * g
    w -= s.lr * (torch.sign(c) + s.decay * w)
    s.m = s.beta2 * s.m + (1 - s.beta2) * g


def lion_without_zero(w: Any, g: Any, s: Any) -> None:
    c = s.beta1 * s.m + (1 - s.beta1) * g
    w -= s.lr * (torch.where(c > 0, 1.0, -1.0) + s.decay * w)
    s.m = s.beta2 * s.m + (1 - s.beta2) * g


def lion_with_coupled_decay(w: Any, g: Any, s: Any) -> None:
    g = g + s.decay * w
    c = s.beta1 * s.m + (1 - s.beta1) * g
    w -= s.lr * torch.sign(c)
    s.m = s.beta2 * s.m + (1 - s.beta2) * g


def signum(w: Any, g: Any, s: Any) -> None:
    s.m = s.beta1 * s.m + (1 - s.beta1) * g
    w -= s.lr * (torch.sign(s.m) + s.decay * w)


def tiger(w: Any, g: Any, s: Any) -> None:
    s.m = s.beta * s.m + (1 - s.beta) * g
    w -= s.lr * (torch.sign(s.m) + s.decay * w)


def tiger_that_forgets(w: Any, g: Any, s: Any) -> None:
    m = s.beta * s.m + (1 - s.beta) * g
    w -= s.lr * (torch.sign(m) + s.decay * w)


def rare_share(weight: Any, counts: Any, bound: float) -> Any:
    rare = (counts >= 1) & (counts <= 3)
    return np.mean(np.abs(weight[rare]) > 0.8 * bound)


def lazy_step(w: Any, m: Any, g: Any, rows: Any, lr: float, beta: float, decay: float) -> None:
    m[rows] = beta * m[rows] + (1 - beta) * g[rows]
    w[rows] -= lr * (torch.sign(m[rows]) + decay * w[rows])


def dense_step(w: Any, m: Any, g: Any, rows: Any, lr: float, beta: float, decay: float) -> None:
    m.copy_(beta * m + (1 - beta) * g)
    w -= lr * (torch.sign(m) + decay * w)


def lazy_step_that_decays(w: Any, m: Any, g: Any, rows: Any, lr: float, beta: float, decay: float) -> None:
    m.copy_(beta * m + (1 - beta) * g)
    w[rows] -= lr * (torch.sign(m[rows]) + decay * w[rows])


def sparse_step(w: Any, m: Any, rows: Any, values: Any, lr: float, beta: float) -> None:
    rows, where = rows.unique(return_inverse=True)
    g = torch.zeros(len(rows), values.shape[1], dtype=values.dtype).index_add_(0, where, values)
    m[rows] = beta * m[rows] + (1 - beta) * g
    w[rows] -= lr * torch.sign(m[rows])


def last_one_wins(w: Any, m: Any, rows: Any, values: Any, lr: float, beta: float) -> None:
    m[rows] = beta * m[rows] + (1 - beta) * values
    w[rows] -= lr * torch.sign(m[rows])


def load_tied(model: Any, checkpoint: Any) -> None:
    model.embedding.weight = nn.Parameter(checkpoint["embedding.weight"].clone())
    model.head.weight = model.embedding.weight


def load_untied(model: Any, checkpoint: Any) -> None:
    model.embedding.weight = nn.Parameter(checkpoint["embedding.weight"].clone())
    model.head.weight = nn.Parameter(checkpoint["embedding.weight"].clone())


def load_shared(model: Any, checkpoint: Any) -> None:
    model.embedding.weight = nn.Parameter(checkpoint["embedding.weight"])
    model.head.weight = model.embedding.weight


def split(model: nn.Module) -> Any:
    embeddings = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return list(embeddings.values()), [p for p in model.parameters() if id(p) not in embeddings]


def split_by_name(model: nn.Module) -> Any:
    named = list(model.named_parameters())
    return [p for n, p in named if "emb" in n], [p for n, p in named if "emb" not in n]


def split_with_the_head(model: Any) -> Any:
    embeddings, rest = split(model)
    return embeddings, [*rest, *([model.head.weight] if hasattr(model, "head") else [])]


def decay_groups(model: nn.Module, decay: float) -> Any:
    spared = {"norm": {"weight_decay": 0.0}, "bias": {"weight_decay": 0.0}}
    return [{"weight_decay": decay, **group} for group in param_groups(model, **spared)]


def decay_groups_by_name(model: nn.Module, decay: float) -> Any:
    spared = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
    rest = [p for n, p in model.named_parameters() if not ("norm" in n or "bias" in n)]
    return [{"params": rest, "weight_decay": decay}, {"params": spared, "weight_decay": 0.0}]


def rescale(weight: Any, rows: Any) -> None:
    rms = weight.square().mean(1).sqrt()
    weight[rows] *= (rms[~rows].median() / rms[rows])[:, None]


def rescale_to_the_mean(weight: Any, rows: Any) -> None:
    rms = weight.square().mean(1).sqrt()
    weight[rows] *= (rms[~rows].mean() / rms[rows])[:, None]


def rescale_all(weight: Any, rows: Any) -> None:
    weight /= weight.square().mean(1, keepdim=True).sqrt()


def set_rates(optimizer: Any, lr: float, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def one_rate_for_all(optimizer: Any, lr: float, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def rate_on_rate(optimizer: Any, lr: float, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= factor


def paired(a: Any, b: Any) -> Any:
    return (b - a).mean(), (b - a).std(ddof=1) / math.sqrt(len(a))


def unpaired(a: Any, b: Any) -> Any:
    return (b - a).mean(), math.hypot(a.std(ddof=1), b.std(ddof=1)) / math.sqrt(len(a))


def pack_in_two(ids: Any) -> bytes:
    return np.array(ids).astype(np.uint16).tobytes()


def pack(ids: Any) -> bytes:
    return np.array(ids).astype(np.uint32).tobytes()


def pack_in_eight(ids: Any) -> bytes:
    return np.array(ids).astype(np.uint64).tobytes()


def unpack(data: bytes) -> Any:
    return np.frombuffer(data, dtype=np.uint32)


def absent_gradient(hidden: Any, logits: Any, absent: int) -> Any:
    return (logits.softmax(-1)[:, absent, None] * hidden).mean(0)


def traffic(rows: int, touched: int, width: int) -> Any:
    return 20 * rows * width, 20 * touched * width


# By checker: a right answer, and wrong ones, each with a part of what is said of it.
CASES: dict[Callable[..., Verdict], tuple[tuple[Any, ...], list[tuple[tuple[Any, ...], str]]]] = {
    sign_descent.check_steps: (
        (lambda distance, lr: math.ceil(distance / lr),),
        [
            (
                (lambda distance, lr: distance * lr,),
                "with lr = 0.1 it takes 9 steps",
            ),
            ((lambda distance, lr: distance,), "steps, the answer is 1.0"),
            ((empty,), "still empty"),
            ((nothing,), "returns nothing"),
        ],
    ),
    sign_descent.check_adam_options: (
        ({"betas": (0.0, 0.0), "eps": 1e-30},),
        [
            (({},), "no options are given yet"),
            (({"betas": (0.0, 0.0), "eps": 0.1},), "AdamW is 0."),
            (({"betas": (0.9, 0.999)},), "away from signSGD"),
            (({"betas": (0.0, 1.0)},), "AdamW does not take them: Invalid beta"),
            (({"beta": 0.0},), "AdamW does not take them"),
        ],
    ),
    sign_descent.check_lion_step: (
        (lion,),
        [
            ((lion_without_zero,), "was never anything but 0 has moved by 0.01"),
            ((lion_with_coupled_decay,), "away from Lion"),
            ((signum,), "away from Lion"),
        ],
    ),
    sign_descent.check_signum_betas: (
        (lambda beta: (beta, beta),),
        [
            ((lambda beta: (0.0, beta),), "for β = 0.5, Lion with betas (0.0, 0.5) goes elsewhere"),
            ((lambda beta: (beta, 1 + beta),), "for β = 0.0, Lion does not take (0.0, 1.0)"),
            ((empty,), "still empty"),
            ((nothing,), "returns nothing"),
        ],
    ),
    skewed_corpus.check_gap: (
        (lambda share, draws: 1 / (1 - (1 - share) ** draws),),
        [
            ((lambda share, draws: 1 / (share * draws),), "in one of 1.535 batches of 10 tokens"),
            ((empty,), "still empty"),
        ],
    ),
    skewed_corpus.check_never: (
        (lambda shares, draws: np.sum((1 - shares) ** draws),),
        [
            ((lambda shares, draws: np.sum(shares * draws),), "of 3 tokens"),
            ((lambda shares, draws: np.mean((1 - shares) ** draws),), "of 2 tokens 1 are expected"),
            ((empty,), "still empty"),
        ],
    ),
    skewed_corpus.check_packing: (
        (pack, unpack),
        [
            (
                (pack_in_two, lambda data: np.frombuffer(data, np.uint16)),
                "a vocabulary of 65537 tokens",
            ),
            ((pack_in_eight, lambda data: np.frombuffer(data, np.uint64)), "4 tokens take 32 bytes"),
            ((lambda ids: np.array(ids).astype(">u4").tobytes(), unpack), "256 tokens"),
            ((bytes, list), "with a vocabulary of 50257 tokens"),
            ((empty, unpack), "still empty"),
            ((nothing, unpack), "returns nothing"),
        ],
    ),
    embedding_blowup.check_share: (
        (rare_share,),
        [
            (
                (lambda w, c, b: np.mean(np.abs(w[c <= 3]) > 0.8 * b),),
                "a small matrix, the share is 0.500",
            ),
            ((lambda w, c, b: np.mean(np.abs(w[(c >= 1) & (c <= 3)]) > 80),), "with another bound"),
            ((lambda w, c, b: np.mean(w[(c >= 1) & (c <= 3)] > 0.8 * b),), "of a small matrix"),
            ((lambda w, c, b: 0.5,), "with other counts, the share is 0.667"),
            ((empty,), "still empty"),
        ],
    ),
    embedding_blowup.check_sound: (
        (lambda weight, decay: bool((weight.abs() * decay).max() < 0.8),),
        [
            ((lambda weight, decay: True,), "one row of 500 at ±99 with λ = 0.01: that is not sound"),
            ((lambda weight, decay: weight.max() < 0.8 / decay,), "a single entry of −9.7"),
            ((lambda weight, decay: weight.abs().max() < 50,), "a single entry of −9.7"),
            ((lambda weight, decay: weight.abs().max() < 0.8 / decay,), "it divides by zero"),
            ((lambda weight, decay: False,), "entries around 1 with λ = 0.01: that is sound"),
            ((nothing,), "returns nothing"),
        ],
    ),
    embedding_blowup.check_tiger_step: ((tiger,), [((tiger_that_forgets,), "away from Tiger")]),
    why_one_over_lambda.check_steps: (
        (lambda share, eta, decay: math.log(1 - share) / math.log(1 - eta * decay),),
        [
            ((lambda share, eta, decay: share / eta / decay,), "it takes 69 steps to 50% of the bound"),
            ((lambda share, eta, decay: -math.log(1 - share) / eta,), "steps to 50% of the bound"),
            ((empty,), "still empty"),
        ],
    ),
    why_one_over_lambda.check_decay: (
        (lambda eta, gap: 1 / (2 * eta * gap),),
        [
            ((lambda eta, gap: 1 / (eta * gap),), "make κ = 1, bimodal: too large"),
            ((lambda eta, gap: 1 / (4 * eta * gap),), "make κ = 0.25, not yet at the threshold"),
            ((empty,), "still empty"),
        ],
    ),
    why_one_over_lambda.check_lion_step: (
        (lion,),
        [
            ((lion_with_coupled_decay,), "with λ = 0.5 it is"),
            ((signum,), "without weight decay it is no longer Lion"),
        ],
    ),
    fix_lazy.check_lazy_step: (
        (lazy_step,),
        [
            ((dense_step,), "row 5, whose token never appears, has moved"),
            ((lazy_step_that_decays,), "is not where lazy Tiger has it"),
            ((empty,), "still empty"),
        ],
    ),
    fix_lazy.check_sparse_step: ((sparse_step,), [((last_one_wins,), "with the rows [")]),
    fix_lazy.check_traffic: (
        (traffic,),
        [
            (
                (lambda rows, touched, width: (12 * rows * width, 12 * touched * width),),
                "768,000,000 bytes",
            ),
            ((lambda rows, touched, width: (20 * rows * width, 20 * rows * width),), "or 7,680,000;"),
            ((empty,), "still empty"),
            ((nothing,), "returns nothing"),
        ],
    ),
    fix_tied.check_half_swap: (
        (lambda h: torch.cat(h.chunk(2, dim=-1)[::-1], dim=-1),),
        [
            ((lambda h: h,), "of [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] it makes [0.0, 1.0"),
            ((lambda h: h.flip(-1),), "it makes [5.0, 4.0"),
            ((lambda h: torch.cat(h.chunk(2)[::-1]),), "of [72.0"),
            ((lambda h: h[..., ::2],), "of a tensor [6] it makes one of shape [3]"),
            ((empty,), "still empty"),
        ],
    ),
    fix_tied.check_absent_gradient: (
        (absent_gradient,),
        [
            ((lambda h, z, v: h.mean(0),), "autograd has another gradient for row 3"),
            ((lambda h, z, v: -absent_gradient(h, z, v),), "autograd has another gradient for row 3"),
            ((lambda h, z, v: h,), "the gradient has shape [4], not [7, 4]"),
            ((empty,), "still empty"),
        ],
    ),
    fix_tied.check_load_tied: (
        (load_tied,),
        [
            ((load_untied,), "after one step of training the embedding and the output matrix differ"),
            ((load_shared,), "training the model would change the checkpoint too"),
            ((lambda model, checkpoint: None,), "the embedding is not that of the checkpoint"),
        ],
    ),
    fix_hybrid.check_split: (
        (split,),
        [
            ((split_by_name,), "a GPT: position.weight is with the rest"),
            ((split_with_the_head,), "head.weight is in the answer 2 times"),
            ((lambda model: ([], []),), "a GPT: embedding.weight is in the answer 0 times"),
            (
                (lambda model: split(model)[::-1],),
                "a GPT: embedding.weight is with the rest",
            ),
            ((empty,), "still empty"),
            ((nothing,), "returns nothing"),
        ],
    ),
    fix_hybrid.check_isolated_move: (
        (lambda lr, b1, b2: lr * (1 - b1) / (1 - b2) ** 0.5 / (1 - b1 / b2**0.5),),
        [
            (
                (lambda lr, b1, b2: lr,),
                "β₂ = 0.999 it is 31.77, the answer is 1",
            ),
            ((lambda lr, b1, b2: 31.77 * lr,), "β₂ = 0.95 it is"),
            ((empty,), "still empty"),
        ],
    ),
    fix_hybrid.check_decay_groups: (
        (decay_groups,),
        [
            ((decay_groups_by_name,), "`embed_proj`: ln_f.weight (norm) decays at 0.1"),
            (
                (lambda m, d: [{"params": list(m.parameters())}],),
                "a GPT: embedding.weight (embedding) decays",
            ),
            ((lambda m, d: decay_groups(m, d)[:-1],), "is in no group"),
            ((lambda m, d: decay_groups(m, d) * 2,), "an optimizer does not take these groups"),
        ],
    ),
    fixes_compared.check_paired: (
        (paired,),
        [
            ((unpaired,), "is the error for runs that have nothing to do with each other"),
            ((lambda a, b: (paired(a, b)[0], (b - a).std(ddof=1)),), "of 3 runs the standard error is"),
            ((lambda a, b: paired(b, a),), "the mean of b − a is"),
            ((empty,), "still empty"),
        ],
    ),
    fixes_compared.check_rescale: (
        (rescale,),
        [
            ((rescale_to_the_mean,), "where the healthy rows' median is"),
            ((rescale_all,), "a healthy row has changed"),
            ((lambda w, rows: w[rows].zero_(),), "where the healthy rows' median is"),
            ((lambda w, rows: w.masked_fill_(rows[:, None], 1.0),), "a row has lost its pattern of signs"),
            ((empty,), "still empty"),
        ],
    ),
    fixes_compared.check_set_rates: (
        (set_rates,),
        [
            ((one_rate_for_all,), "at step 0, with a factor of 0.1, AdamW's group has a rate of 0.0016"),
            ((rate_on_rate,), "at step 1, with a factor of 0.5, AdamW's group"),
            ((lambda optimizer, lr, factor: None,), "has a rate of 0.003"),
        ],
    ),
}


def power_iteration(product: Any, v: Any, times: int) -> float:
    for _ in range(times):
        v = product(v / v.norm())
    return float(v.norm())


def unscaled(product: Any, v: Any, times: int) -> float:
    for _ in range(50 * times):
        v = product(v)
    return float(v.norm())


def signed(product: Any, v: Any, times: int) -> float:
    for _ in range(times):
        v = product(v / v.norm())
    return float((v / v.norm()) @ product(v / v.norm()))


def post_norm(x: Any, attention: Any, mlp: Any, norm1: Any, norm2: Any) -> Any:
    x = norm1(x + attention(x))
    return norm2(x + mlp(x))


def pre_norm(x: Any, attention: Any, mlp: Any, norm1: Any, norm2: Any) -> Any:
    x = x + attention(norm1(x))
    return x + mlp(norm2(x))


def steps_to(loss: float, share: float, classes: int, rate: float) -> float:
    z = np.log((classes - 1) / np.expm1(loss))
    return float((np.expm1(z) + (classes - 1) * z) / (classes * share * rate))


def subtract_the_columns_mean(weight: Any) -> None:
    weight -= weight.mean(1, keepdim=True)


def subtract_the_mean_row(weight: Any) -> None:
    weight -= weight.mean(0)


CASES |= {
    gradient_heterogeneity.check_weighted: (
        (lambda norms, sizes, bend: (np.average(bend, weights=norms**2), np.average(bend, weights=sizes)),),
        [
            (
                (lambda n, sizes, bend: (np.average(bend, weights=n), np.average(bend, weights=sizes)),),
                "the squares of the norms, the answer with the norms",
            ),
            ((lambda n, sizes, bend: (np.average(bend, weights=n**2), bend.mean()),), "Λ_P is"),
            ((empty,), "still empty"),
            ((nothing,), "returns nothing"),
        ],
    ),
    gradient_heterogeneity.check_power_iteration: (
        (power_iteration,),
        [
            ((unscaled,), "has to be scaled"),
            ((signed,), "largest magnitude is -3, the answer is -3"),
            ((lambda product, v, times: 3.0,), "never asks for a product"),
            ((lambda product, v, times: power_iteration(product, v, 3),), "largest magnitude is 3, the"),
            ((lambda product, v, times: power_iteration(product, v, 500),), "were asked for, it takes 500"),
        ],
    ),
    gradient_heterogeneity.check_norms: (
        (lambda grads: [g.norm() for g in grads],),
        [
            ((lambda grads: [g.norm() ** 0.5 for g in grads],), "is given as"),
            ((lambda grads: [],), "of 3 gradients it gives 0 norms"),
        ],
    ),
    norm_placement.check_post_norm_block: (
        (post_norm,),
        [
            ((pre_norm,), "this is a pre-norm block"),
            ((lambda x, a, m, n1, n2: n2(n1(x + a(x)) + m(x)),), "the MLP sees what came into the block"),
            ((lambda x, a, m, n1, n2: x,), "after each of the two sums"),
            ((empty,), "still empty"),
        ],
    ),
    norm_placement.check_safe_rates: (
        (lambda losses, margin: int((losses.max(1) <= losses.mean(1).min() + margin).sum()),),
        [
            (
                (lambda losses, margin: int((losses.mean(1) <= 4.1 + margin).sum()),),
                "0 are within 0.05 nats",
            ),
            ((lambda losses, margin: int((losses.min(1) <= 4.1 + margin).sum()),), "of 4.1, the answer is"),
        ],
    ),
    norm_placement.check_pre_norm: (
        (lambda x, attention, norm: x + attention(norm(x)),),
        [
            ((lambda x, attention, norm: norm(x) + attention(norm(x)),), "goes on with 1.0"),
            ((lambda x, attention, norm: x,), "is not x + attention(norm(x))"),
        ],
    ),
    rare_classes.check_steps_to: (
        (steps_to,),
        [
            ((lambda loss, share, classes, rate: 1 / (share * rate * loss),), "nats after"),
            ((lambda *given: -1.0,), "nats after -1 steps"),
            ((empty,), "still empty"),
        ],
    ),
    rare_classes.check_remove_common_mode: (
        (subtract_the_mean_row,),
        [
            ((subtract_the_columns_mean,), "the predictions have changed"),
            ((lambda weight: weight,), "of the squared norm are still in the mean row"),
        ],
    ),
    rare_classes.check_mean_loss: (
        (lambda batches: np.concatenate(batches).mean(),),
        [
            (
                (lambda batches: np.mean([b.mean() for b in batches]),),
                "with 1 and 9 tokens the mean over all",
            ),
            ((nothing,), "returns nothing"),
        ],
    ),
}


def adam_ratio_of(gradients: Any, beta1: float, beta2: float, eps: float) -> Any:
    m = v = torch.zeros_like(gradients[0])
    for g in gradients:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    t = len(gradients)
    return m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)


def uncorrected(gradients: Any, beta1: float, beta2: float, eps: float) -> Any:
    t = len(gradients)
    corrections = (1 - beta1**t) / (1 - beta2**t) ** 0.5
    return adam_ratio_of(gradients, beta1, beta2, eps / (1 - beta2**t) ** 0.5) * corrections


def eps_inside(gradients: Any, beta1: float, beta2: float, eps: float) -> Any:
    m = v = torch.zeros_like(gradients[0])
    for g in gradients:
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    t = len(gradients)
    return m / (1 - beta1**t) / (v / (1 - beta2**t) + eps).sqrt()


def correlation_from_width(std: float, beta1: float) -> float:
    q = std**2 * (1 + beta1) / (1 - beta1)
    return (q - 1) / (q + 1) / beta1


def adam_step(m: Any, v: Any, g: Any, t: int, beta1: float, beta2: float, eps: float) -> Any:
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)


def adam_step_in_place(m: Any, v: Any, g: Any, t: int, beta1: float, beta2: float, eps: float) -> Any:
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    m.div_(1 - beta1**t)
    return m / ((v / (1 - beta2**t)).sqrt() + eps)


def adam_step_without_memory(m: Any, v: Any, g: Any, *rest: Any) -> Any:
    return g.sign()


def jump(losses: Any, window: int) -> float:
    means = np.convolve(losses, np.ones(window) / window, "valid")
    return float((means - np.minimum.accumulate(means)).max())


def is_spike(losses: Any, new: float, limit: float) -> bool:
    median = np.median(losses)
    return bool(new > median + limit * 1.4826 * np.median(np.abs(np.array(losses) - median)))


def go_back(model: Any, optimizer: Any, saved: Any) -> Any:
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return optimizer


def go_back_with_a_new_optimizer(model: Any, optimizer: Any, saved: Any) -> Any:
    model.load_state_dict(saved["model"])
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def go_back_with_the_old_momentum(model: Any, optimizer: Any, saved: Any) -> Any:
    model.load_state_dict(saved["model"])
    return optimizer


def work_of(program: int, sizes: list[int], block: int) -> tuple[int, int, int]:
    for tensor, size in enumerate(sizes):
        blocks = -(-size // block)
        if program < blocks:
            return tensor, program * block, min(size, (program + 1) * block)
        program -= blocks
    raise AssertionError


def tuned_on(copies: bool, momentum_too: bool = True) -> Any:
    def step(update: Any, p: Any, m: Any, configurations: Any, clock: Any) -> Any:
        def seconds(configuration: Any) -> float:
            start = clock()
            update(p.clone() if copies else p, m.clone() if copies else m, configuration)
            return float(clock() - start)

        fastest = min(configurations, key=seconds)
        update(p if momentum_too else p.clone(), m, fastest)
        return fastest

    return step


def accumulated(decays: int, share: bool = True) -> Any:
    def answer(m: Any, gradients: Any, beta: float) -> Any:
        for t, g in enumerate(gradients):
            weight = (1 - beta) / (len(gradients) if share else 1)
            m = (beta if t < decays else 1.0) * m + weight * g
        return m

    return answer


def rounded_at_random(x: Any, u: Any) -> Any:
    bits = x.view(torch.int32) + (u * 2**16).to(torch.int32)
    return (bits & -(2**16)).view(torch.float32).bfloat16()


def rounded_too_far(x: Any, u: Any) -> Any:
    exact = x.bfloat16() == x
    return torch.where(exact, x, 1.1 * x).bfloat16()


def hook(decays_once: bool, moves_once: bool) -> Any:
    def answer(theta: Any, m: Any, g: Any, t: int, k: int, lr: float, beta: float) -> None:
        if t % k == 0 or not decays_once:
            m.mul_(beta)
        m.add_(g / k, alpha=1 - beta)
        if (t + 1) % k == 0 or not moves_once:
            theta.sub_(lr * m.sign())

    return answer


CASES |= {
    fused_kernels.check_bytes: (
        (lambda parameter, gradient, buffer, buffers: 2 * parameter + gradient + 2 * buffer * buffers,),
        [
            (
                (lambda p, g, b, n: 2 * (p + g + b * n),),
                "only reads the gradient: expected 20 bytes, got 24",
            ),
            ((lambda p, g, b, n: p + g + b * n,), "Lion in float32 writes as well: expected 20 bytes"),
            ((lambda p, g, b, n: 20,), "AdamW in float32 moves 28 bytes, got 20"),
            ((lambda p, g, b, n: math.nan,), "moves 20 bytes, got nan"),
            ((lambda p, g, b, n: "20",), "a number is expected, got '20'"),
            ((20,), "a function is expected, got 20"),
            ((empty,), "still empty"),
        ],
    ),
    fused_kernels.check_work: (
        (work_of,),
        [
            (
                (lambda program, sizes, block: (0, program * block, (program + 1) * block),),
                "goes beyond the end",
            ),
            (
                (lambda program, sizes, block: (program, 0, sizes[program]),),
                "expected (0, 0, 4), got (0, 0, 5)",
            ),
            ((lambda program, sizes, block: (0, 0, math.nan),), "expected (0, 0, 4), got (0, 0, nan)"),
            ((lambda program, sizes, block: program,), "3 numbers are expected, got 0"),
            (
                (lambda program, sizes, block: ["a", "b", "c"],),
                "3 numbers are expected, got ['a', 'b', 'c']",
            ),
            ((nothing,), "returns nothing"),
        ],
    ),
    fused_kernels.check_autotune: (
        (tuned_on(copies=True),),
        [
            ((tuned_on(copies=False),), "moves the weights 4 times"),
            (
                (tuned_on(copies=True, momentum_too=False),),
                "the weights did not go with it: expected 0, got 1",
            ),
            ((lambda update, p, m, c, clock: update(p, m, 1) or 1,), "the fastest configuration is 2"),
        ],
    ),
    stingy_memory.check_accumulation: (
        (accumulated(1),),
        [
            ((accumulated(9),), "with 3 micro-batches m decays 3 times"),
            ((accumulated(1, share=False),), "each of 3 gradients has the weight of a whole one"),
            ((lambda m, gradients, beta: m,), "it is not the m of one step on the mean gradient"),
            ((empty,), "still empty"),
        ],
    ),
    stingy_memory.check_rounding: (
        (rounded_at_random,),
        [
            ((lambda x, u: x,), "has the dtype torch.float32"),
            ((lambda x, u: x.bfloat16(),), "1.00234 is always rounded to 1"),
            ((lambda x, u: (x + 0.01).bfloat16(),), "do not stay"),
            ((lambda x, u: rounded_at_random(x, u**2),), "spacings off on average"),
            ((rounded_too_far,), "is rounded further than to its neighbours"),
            ((nothing,), "returns nothing"),
        ],
    ),
    stingy_memory.check_hook: (
        (hook(True, True),),
        [
            ((hook(False, False),), "θ moves at micro-batch 0, which is not the last of 4"),
            ((hook(False, True),), "after 4 micro-batches m is not that of 1 steps on the mean"),
            (
                (lambda theta, m, *rest: hook(True, True)(theta.clone(), m, *rest),),
                "θ has not made 1 steps",
            ),
        ],
    ),
}


def envelope(start: float, rates: Any, decay: float) -> Any:
    found = []
    for eta in rates:
        start = start * (1 - eta * decay) + eta
        found.append(start)
    return found


def steps_of_silence(eta: float, decay: float, share: float) -> int:
    return math.ceil(math.log(1 - share) / math.log(1 - eta * decay))


def groups_by(is_spared: Any) -> Any:
    def answer(model: Any, weight_decay: float) -> Any:
        groups: Any = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                groups[bool(is_spared(module, f"{module_name}.{name}"))]["params"].append(parameter)
        return groups

    return answer


def by_module(module: Any, name: str) -> bool:
    return isinstance(module, torch.nn.LayerNorm) or name.endswith(".bias")


def by_name(module: Any, name: str) -> bool:
    return any(part in name for part in ("bias", "LayerNorm.weight"))


CASES |= {
    your_own_model.check_envelope: (
        (envelope,),
        [
            ((lambda start, rates, decay: envelope(0.0, rates, decay),), "from 0.1 with rates [0.01]"),
            (
                (lambda start, rates, decay: envelope(start, rates, 0.0),),
                "after step 1, the answer is 0.11",
            ),
            (
                (lambda start, rates, decay: envelope(start, rates, decay)[-1:],),
                "40 steps there are 1 values",
            ),
            ((empty,), "still empty"),
            ((nothing,), "returns nothing"),
        ],
    ),
    your_own_model.check_steps_of_silence: (
        (steps_of_silence,),
        [
            (
                (lambda *x: steps_of_silence(*x) - 1,),
                "is at 75% of the bound after 2 steps, the answer is 1",
            ),
            ((lambda eta, decay, share: share / eta,), "after 2 steps, the answer is 1"),
            ((empty,), "still empty"),
        ],
    ),
    your_own_model.check_groups: (
        (groups_by(by_module),),
        [
            ((groups_by(by_name),), "unbiased.weight has a weight decay of 0, not 0.25"),
            (
                (groups_by(lambda m, name: by_name(m, name) and "un" not in name),),
                "mlp.1.weight has a weight decay of 0.25, not 0",
            ),
            ((groups_by(lambda m, name: False),), "LayerNorm.weight has a weight decay of 0.25, not 0"),
            ((lambda model, decay: [],), "wte.weight is in 0 groups"),
            ((nothing,), "returns nothing"),
        ],
    ),
}


def empty_rule(p: Any, g: Any, m: Any, **numbers: float) -> None:
    raise NotImplementedError


def nesterov(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.add_(g.add(m, alpha=beta), alpha=-lr)


def nesterov_in_signs(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    m *= beta
    m += g
    p -= lr * (g + beta * m)


def nesterov_of_finite_numbers(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.add_(g.add(m, alpha=beta).nan_to_num(), alpha=-lr)


def nesterov_in_place_of_g(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.add_(g.add_(m, alpha=beta), alpha=-lr)


def nesterov_of_the_old_momentum(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    p.add_(g.add(m, alpha=beta), alpha=-lr)
    m.mul_(beta).add_(g)


def nesterov_without_a_memory(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    m = beta * m + g
    p.add_(g.add(m, alpha=beta), alpha=-lr)


def heavy_ball(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.add_(m, alpha=-lr)


def nan_in_one_place(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    nesterov(p, g, m, lr=lr, beta=beta)
    p[3] = math.nan


def another_rate(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    nesterov(p, g, m, lr=2 * lr, beta=beta)


def choosing(p: Any, g: Any, m: Any, *, lr: float, beta: float) -> None:
    if g > 0:
        p.add_(g, alpha=-lr)


def without_beta(p: Any, g: Any, m: Any, *, lr: float) -> None:
    m.add_(g)


def bytes_of_lines(lines: Any) -> Any:
    read, written = {x for _, names in lines for x in names}, {out for out, _ in lines}
    memory = set("pgmv")
    return 4 * sum(len(r) + 1 for _, r in lines), 4 * (len(read & memory) + len(written & memory))


def bytes_with_intermediate_ones(lines: Any) -> Any:
    read, written = {x for _, names in lines for x in names}, {out for out, _ in lines}
    return bytes_of_lines(lines)[0], 4 * (len(read) + len(written))


def sgd(p: Any, g: Any, m: Any, *, lr: float, beta: float, weight_decay: float) -> None:
    m.mul_(beta).add_(g).add_(p, alpha=weight_decay)
    p.add_(m, alpha=-lr)


def sgd_with_a_sum(p: Any, g: Any, m: Any, *, lr: float, beta: float, weight_decay: float) -> None:
    g = g + weight_decay * p
    m.mul_(beta).add_(g)
    p.add_(m, alpha=-lr)


def shipped_sgd(p: Any, g: Any, m: Any, *, lr: float, beta: float, weight_decay: float) -> None:
    g.add_(p, alpha=weight_decay)
    m.mul_(beta).add_(g)
    p.add_(m, alpha=-lr)


def decoupled_sgd(p: Any, g: Any, m: Any, *, lr: float, beta: float, weight_decay: float) -> None:
    m.mul_(beta).add_(g)
    p.mul_(1 - lr * weight_decay).add_(m, alpha=-lr)


def undecayed_sgd(p: Any, g: Any, m: Any, *, lr: float, beta: float, weight_decay: float) -> None:
    heavy_ball(p, g, m, lr=lr, beta=beta)


CASES |= {
    your_own_optimizer.check_nesterov: (
        (nesterov,),
        [
            ((heavy_ball,), "this is the heavy ball"),
            ((nesterov_of_the_old_momentum,), "this is the heavy ball, of which the old g + βm"),
            ((nesterov_without_a_memory,), "the buffer m is still the same after the step"),
            ((nesterov_in_place_of_g,), "the step changes the gradient: it was -0.6232 and is"),
            ((nesterov_of_finite_numbers,), "can be made of it: line "),
            ((nan_in_one_place,), "θ is nan after step 1"),
            ((another_rate,), "after step 1 the weight p["),
            ((choosing,), "the step ends with RuntimeError: Boolean value of Tensor"),
            ((without_beta,), "it cannot be called as rule(p, g, m, lr=…, beta=…)"),
            ((lambda p, g, m, *, lr, beta: None,), "the buffer m is still the same"),
            ((None,), "a function is expected, got None"),
            ((math.nan,), "a function is expected, got nan"),
            ((empty_rule,), "still empty"),
        ],
    ),
    your_own_optimizer.check_bytes_of_rule: (
        (bytes_of_lines,),
        [
            ((lambda lines: [x // 4 for x in bytes_of_lines(lines)],), "these are numbers, not bytes"),
            ((lambda lines: bytes_of_lines(lines)[:1] * 2,), "one pass over the heavy ball"),
            ((bytes_with_intermediate_ones,), "what is intermediate in Lion never gets to memory"),
            ((lambda lines: (bytes_of_lines(lines)[0], 0),), "one pass over SGD moves 12 bytes, got 0"),
            ((lambda lines: (12, 12),), "the lines of the heavy ball move 32 bytes, got 12"),
            ((lambda lines: (math.nan, math.nan),), "the lines of SGD move 12 bytes, got nan"),
            ((lambda lines: (12, math.nan),), "one pass over SGD moves 12 bytes, got nan"),
            ((lambda lines: 12,), "2 numbers are expected, got 12"),
            ((lambda lines: ("12", "12"),), "2 numbers are expected, got ('12', '12')"),
            ((nothing,), "returns nothing"),
            ((empty,), "still empty"),
        ],
    ),
    your_own_optimizer.check_sgd: (
        (sgd,),
        [
            ((shipped_sgd,), "the step changes the gradient: it was -0.6232 and is"),
            ((decoupled_sgd,), "the decay goes past the momentum"),
            ((undecayed_sgd,), "the weight decay is gone"),
            ((heavy_ball,), "it cannot be called as rule(p, g, m, lr=…, beta=…, weight_decay=…)"),
            (("sgd",), "a function is expected, got 'sgd'"),
            ((empty_rule,), "still empty"),
        ],
    ),
}

CASES |= {
    adam_ratio.check_update_ratio: (
        (adam_ratio_of,),
        [
            ((uncorrected,), "are not corrected for it"),
            ((eps_inside,), "ε stands inside the root"),
            ((lambda gradients, *rest: adam_ratio_of(gradients.flip(0), *rest),), "in the wrong order"),
            ((lambda gradients, *rest: gradients[-1].sign(),), "after 7 gradients r should be another"),
            ((empty,), "still empty"),
            ((nothing,), "returns nothing"),
        ],
    ),
    adam_ratio.check_correlation: (
        (correlation_from_width,),
        [
            ((lambda std, beta1: 0.0,), "a width of 0.832 with β₁ = 0.5 means ρ = 0.7, the answer is 0"),
            ((empty,), "still empty"),
        ],
    ),
    adam_ratio.check_bias_correction: (
        (adam_step,),
        [
            ((adam_step_in_place,), "after 2 gradients that are all alike r is 5.26 where g is 1"),
            ((adam_step_without_memory,), "the average is 0, not 0.41"),
        ],
    ),
    adam_instability.check_jump: (
        (jump,),
        [
            (
                (lambda losses, window: max(losses) - min(losses),),
                "is no jump: the rise is from an earlier",
            ),
            ((lambda losses, window: jump(losses, 2 * window),), "with a window of 5 the jump is"),
            ((nothing,), "returns nothing"),
        ],
    ),
    adam_instability.check_spike: (
        (is_spike,),
        [
            (
                (lambda losses, new, limit: new > np.median(losses) + limit,),
                "with a limit of 6, is a spike",
            ),
            ((lambda losses, new, limit: new > np.mean(losses) + limit * np.std(losses),), "thirty old"),
            ((lambda losses, new, limit: abs(new - np.median(losses)) > 0.5,), "with a limit of 6, is no"),
        ],
    ),
    adam_instability.check_going_back: (
        (go_back,),
        [
            ((go_back_with_a_new_optimizer,), "100% of the weights have |r| > 0.8"),
            ((go_back_with_the_old_momentum,), "the momentum is not that of the checkpoint"),
            ((lambda model, optimizer, saved: optimizer,), "the weights are not those of the checkpoint"),
        ],
    ),
}


def wrong() -> Iterator[Any]:
    """Each wrong answer with its checker and what is said of it."""
    for check, (_, answers) in CASES.items():
        for i, (answer, said) in enumerate(answers):
            yield pytest.param(check, answer, said, id=f"{check.__module__[17:]}.{check.__name__}-{i}")


@pytest.mark.parametrize("check", CASES, ids=lambda c: f"{c.__module__[17:]}.{c.__name__}")
def test_right_answers_are_accepted(check: Callable[..., Verdict]) -> None:
    verdict = check(*CASES[check][0])
    assert verdict, repr(verdict)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (your_own_optimizer.check_nesterov, nesterov_in_signs),
        (your_own_optimizer.check_sgd, sgd_with_a_sum),
        (your_own_optimizer.check_bytes_of_rule, lambda lines: torch.tensor(bytes_of_lines(lines))),
        (your_own_optimizer.check_bytes_of_rule, lambda lines: [float(x) for x in bytes_of_lines(lines)]),
        (
            fused_kernels.check_bytes,
            lambda *sizes: np.int64(CASES[fused_kernels.check_bytes][0][0](*sizes)),
        ),
        (fused_kernels.check_work, lambda *given: torch.tensor(work_of(*given))),
    ],
)
def test_right_answers_in_another_form(check: Callable[..., Verdict], answer: Callable[..., Any]) -> None:
    verdict = check(answer)
    assert verdict, repr(verdict)


@pytest.mark.parametrize(("check", "answer", "said"), list(wrong()))
def test_wrong_answers_are_turned_down(
    check: Callable[..., Verdict], answer: tuple[Any, ...], said: str
) -> None:
    verdict = check(*answer)
    assert not verdict
    assert said in repr(verdict)


def test_every_checker_is_here() -> None:
    modules = {check.__module__: vars(__import__(check.__module__, fromlist=["x"])) for check in CASES}
    named = {f"{m}.{name}" for m, names in modules.items() for name in names if name.startswith("check_")}
    assert named == {f"{check.__module__}.{check.__name__}" for check in CASES}
