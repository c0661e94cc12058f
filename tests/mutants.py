"""Plants bugs in a copy of the package, one at a time: the named tests and notebooks must turn red.

    make mutants
    python tests/mutants.py --only "wrong envelope"

Writes docs/mutants.md if all bugs were planted; exits with 1 if one survives.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from outside import NBVAL, ROOT, report, run_pytest

TABLE = ROOT / "docs" / "mutants.md"
TEXT = "Each bug is planted alone in a copy of the tree, in which the tests passed before."
PARTS = (
    "minisign",
    "tests",
    "notebooks",
    "experiments",
    "data",
    "conftest.py",
    "pyproject.toml",
    "README.md",
)
OPTIM, THEORY, GPT = "tests/test_optim.py::", "tests/test_theory_and_probes.py::", "tests/test_gpt.py::"
BLOCKS = "tests/test_heterogeneity.py::"
FUSED, RELEASE = "tests/test_fused.py::", "tests/test_release.py::"
INSPECT, WATCH = "tests/test_inspect.py::", "tests/test_watch.py::"
RELIABILITY, PARALLEL = "tests/test_reliability.py::", "tests/test_parallel.py::"
UPDATES, GUARD = "tests/test_updates.py::", "tests/test_guard.py::"
JITTER, PROCESSES = "tests/test_jitter.py::", "tests/test_processes.py::"
ROWS = "tests/test_rows.py::"
POINTERS = "tests/test_pointers.py::"
RECORDER = "tests/test_claims_recorder.py::"


@dataclass(frozen=True)
class Mutant:
    """A bug: in ``file``, ``old`` (which is there once) becomes ``new``.

    ``test`` must notice it, and so must ``notebook`` where one is named.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    notebook: str = ""


MUTANTS = (
    Mutant(
        "sign(0) = 1",
        "minisign/optim/lion.py",
        "    update = m.lerp(g, 1 - beta1).sign_()\n",
        "    update = m.lerp(g, 1 - beta1).ge(0).to(m.dtype).mul_(2).sub_(1)\n",
        OPTIM + "test_sign_of_zero_is_zero",
        "03_embedding_blowup",
    ),
    Mutant(
        "momentum not stored",
        "minisign/optim/lion.py",
        "    m.lerp_(g, 1 - beta2)  # before",
        "    m.lerp(g, 1 - beta2)  # before",
        OPTIM + "test_momentum_is_written_back",
        "01_sign_descent",
    ),
    Mutant(
        "β₁ and β₂ swapped",
        "minisign/optim/lion.py",
        "    update = m.lerp(g, 1 - beta1).sign_()\n    m.lerp_(g, 1 - beta2)",
        "    update = m.lerp(g, 1 - beta2).sign_()\n    m.lerp_(g, 1 - beta1)",
        OPTIM + "test_lion_is_a_published_lion",
        "01_sign_descent",
    ),
    Mutant(
        "decay coupled to the gradient",
        "minisign/optim/lion.py",
        "    update = m.lerp(g, 1 - beta1).sign_()\n",
        "    g, weight_decay = g + weight_decay * p, 0.0\n    update = m.lerp(g, 1 - beta1).sign_()\n",
        OPTIM + "test_decay_is_decoupled",
        "03_embedding_blowup",
    ),
    Mutant(
        "lazy that updates all rows",
        "minisign/engine/lazy.py",
        "    found = g.ne(0)\n",
        "    found = torch.ones_like(g, dtype=torch.bool)\n",
        OPTIM + "test_absent_rows_keep_every_bit",
        "05_fix_lazy",
    ),
    Mutant(
        "lazy momentum never decays",
        "minisign/engine/lazy.py",
        'group["lazy_momentum"] == "decay"',
        'group["lazy_momentum"] == "never"',
        OPTIM + "test_two_meanings_of_lazy_differ_in_the_momentum_only",
        "05_fix_lazy",
    ),
    Mutant(
        "rows that stand twice in a sparse gradient",
        "minisign/engine/lazy.py",
        "    g = g.coalesce()\n    return g.indices()[0].contiguous(), g.values()\n",
        "    return g._indices()[0].contiguous(), g._values()\n",
        OPTIM + "test_sparse_duplicates_are_added_before_the_sign",
        "05_fix_lazy",
    ),
    Mutant(
        "a gradient from elsewhere thrown away",
        "minisign/engine/rows.py",
        "        if len(lost):\n",
        "        if False:\n",
        ROWS + "test_a_gradient_from_elsewhere_is_not_thrown_away",
    ),
    Mutant(
        "a token's parts added up in bfloat16",
        "minisign/engine/lazy.py",
        "        g = g.float()\n",
        "        pass\n",
        ROWS + "test_duplicates_of_a_narrow_type_are_added_up_before_they_are_rounded",
    ),
    Mutant(
        "rows of one replica only",
        "minisign/engine/rows.py",
        "        record.groups = [parallel.process_group]\n",
        "        pass\n",
        ROWS + "test_replicas_stay_one_though_the_bare_model_was_tracked",
    ),
    Mutant(
        "another group's numbers for a gradient",
        "minisign/engine/contract.py",
        'if cache.get("groups") != groups or not place[0] or place[0]["params"][place[1]] is not p:',
        "if not place[0]:",
        RELEASE + "test_gradients_follow_their_group",
    ),
    Mutant(
        "hooks of all optimizers called again",
        "minisign/optim/hybrid.py",
        "    for x in hooks:\n        x.clear()\n",
        "",
        "tests/test_hybrid.py::test_hooks_of_all_optimizers_are_called_once",
    ),
    Mutant(
        "rows recorded in evaluation too",
        "minisign/engine/rows.py",
        "    if not output.requires_grad:\n        return\n",
        "",
        OPTIM + "test_tracked_rows",
    ),
    Mutant(
        "RMS over the wrong axis",
        "minisign/engine/words.py",
        "dims = tuple(range(int(by_row), p.dim()))",
        "dims = (0,) if by_row else tuple(range(p.dim()))",
        "tests/test_oracle.py::test_all_shapes",
        "04_why_one_over_lambda",
    ),
    Mutant(
        "momentum decays with every micro-batch",
        "minisign/engine/halves.py",
        "keep, taken = 1.0 if before else keep, 0",
        "keep, taken = keep, 0",
        OPTIM + "test_accumulation_is_one_step_on_the_mean",
    ),
    Mutant(
        "micro-batches added up, not averaged",
        "minisign/engine/halves.py",
        '"weight": weight / group["accumulate"]}',
        '"weight": weight}',
        OPTIM + "test_accumulation_is_one_step_on_the_mean",
    ),
    Mutant(
        "the constructor's rate instead of the group's",
        "minisign/engine/work.py",
        'found = {name: group[name] for name in optimizer.bounds if name != "betas"}',
        'found = {name: optimizer.defaults[name] for name in optimizer.bounds if name != "betas"}',
        OPTIM + "test_the_group_has_the_last_word",
        "03_embedding_blowup",
    ),
    Mutant(
        "no bias correction",
        "minisign/optim/adamw.py",
        "    step_size = lr / (1 - beta1**step)\n",
        "    step_size = lr\n",
        OPTIM + "test_adamw_is_torch_adamw_bit_for_bit",
        "01_sign_descent",
    ),
    Mutant(
        "a tied matrix in two groups",
        "minisign/optim/groups.py",
        "if id(parameter) not in seen and parameter.requires_grad:",
        "if parameter.requires_grad:",
        OPTIM + "test_a_tied_matrix_goes_once_and_is_an_embedding",
    ),
    Mutant(
        "embeddings with the rest",
        "minisign/optim/groups.py",
        '    if isinstance(module, EMBEDDINGS):\n        return "embedding"\n',
        "",
        OPTIM + "test_routing_by_module",
        "07_fix_hybrid",
    ),
    Mutant(
        "half-swap that swaps nothing",
        "minisign/lab/gpt.py",
        "x = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)",
        "x = torch.cat(x.chunk(2, dim=-1), dim=-1)",
        GPT + "test_tying",
        "06_fix_tied",
    ),
    Mutant(
        "centring that leaves the mean",
        "minisign/lab/gpt.py",
        "        return x - mean\n",
        "        return x\n",
        GPT + "test_the_centered_head_sees_no_direction_that_all_tokens_share",
        "06_fix_tied",
    ),
    Mutant(
        "wrong envelope",
        "minisign/theory.py",
        "return np.asarray(limit - (limit - start) * np.cumprod(1 - steps * weight_decay))",
        "return np.asarray(limit - limit * np.cumprod(1 - steps * weight_decay))",
        THEORY + "test_envelope_is_attained_by_a_constant_sign",
        "03_embedding_blowup",
    ),
    Mutant(
        "logistic growth at half the rate",
        "minisign/theory.py",
        "grown = np.exp(-np.cumsum(np.asarray(alphas, dtype=np.float64)))",
        "grown = np.exp(-np.cumsum(np.asarray(alphas, dtype=np.float64)) / 2)",
        THEORY + "test_logistic_growth_of_a_row_under_tigers_step",
        "04_why_one_over_lambda",
    ),
    Mutant(
        "the law for κ without its root",
        "minisign/theory.py",
        "return math.sqrt(kappa / (1 + kappa))",
        "return kappa / (1 + kappa)",
        THEORY + "test_the_stationary_law_where_it_is_a_well_known_one",
        "04_why_one_over_lambda",
    ),
    Mutant(
        "tokens never seen counted as rare",
        "minisign/probes/frequency.py",
        "RARE = (1, 3)",
        "RARE = (0, 3)",
        THEORY + "test_saturation_on_a_known_matrix",
        "00_start_here",
    ),
    Mutant(
        "a repair that loses the signs",
        "minisign/doctor/repair.py",
        "return rows * (size /",
        "return rows.abs() * (size /",
        "tests/test_repair_and_finetune.py::test_reset_rows_by_hand",
    ),
    Mutant(
        "fine-tuning from scratch",
        "minisign/studies/finetune.py",
        "    tuned.model.load_state_dict(run.model.state_dict())\n",
        "",
        "tests/test_repair_and_finetune.py::test_fine_tuning_learns_the_second_language_and_forgets_the_first",
        "08_fixes_compared",
    ),
    Mutant(
        "Λ_G weighed with the norms, not their squares",
        "minisign/probes/curvature.py",
        "_weighted({name: norm**2 for name, norm in norms.items()}, curvature)",
        "_weighted({name: norm for name, norm in norms.items()}, curvature)",
        BLOCKS + "test_the_two_means_of_the_curvature",
        "09_gradient_heterogeneity",
    ),
    Mutant(
        "a bound without its half",
        "minisign/theory.py",
        "return -lr * gradient_l1 + lr**2 * parameters * curvature / 2",
        "return -lr * gradient_l1 + lr**2 * parameters * curvature",
        BLOCKS + "test_the_bounds_are_met_where_a_blocks_curvature_is_the_same_all_round",
        "09_gradient_heterogeneity",
    ),
    Mutant(
        "power iteration that stops at once",
        "minisign/probes/curvature.py",
        "converged = abs(norm - before) < tolerance * norm",
        "converged = True",
        BLOCKS + "test_curvature_of_a_quadratic_with_chosen_eigenvalues",
    ),
    Mutant(
        "a sum of gradients for their mean",
        "minisign/probes/gradients.py",
        "    torch._foreach_div_(total, count)\n",
        "",
        BLOCKS + "test_norms_of_the_mean_gradient_and_of_each_batch",
    ),
    Mutant(
        "a layer's norm as the sum of its tensors'",
        "minisign/probes/gradients.py",
        "norms[name] = float(np.linalg.norm(each[at : at + len(block)], order))",
        "norms[name] = float(np.sum(each[at : at + len(block)]))",
        BLOCKS + "test_a_block_of_several_tensors_has_the_norm_of_all_its_entries",
    ),
    Mutant(
        "groups with as many tokens, not as much text",
        "minisign/probes/frequency.py",
        "middle = (np.cumsum(shares[order]) - shares[order] / 2) / total",
        "middle = (np.arange(len(shares)) + 0.5) / len(shares)",
        BLOCKS + "test_groups_of_equal_shares_by_frequency",
    ),
    Mutant(
        "pre-norm whatever is asked for",
        "minisign/lab/gpt.py",
        "        if self.pre:\n",
        "        if True:\n",
        GPT + "test_norm_placement",
        "10_norm_placement",
    ),
    Mutant(
        "the rare-class law of two classes for all",
        "minisign/theory.py",
        "step = (np.expm1(z) + (classes - 1) * z - target) / (np.exp(z) + classes - 1)",
        "step = (np.expm1(z) + z - target) / (np.exp(z) + 1)",
        BLOCKS + "test_the_rare_class_law_is_what_gradient_descent_does",
        "11_rare_classes",
    ),
    Mutant(
        "the common mode of the columns",
        "minisign/probes/saturation.py",
        "return float(rows.mean(0).square().sum() / rows.square().sum(1).mean())",
        "return float(rows.mean(1).square().sum() / rows.square().sum(1).mean())",
        THEORY + "test_common_mode_is_what_all_vectors_share",
        "11_rare_classes",
    ),
    Mutant(
        "a masked model asked about all tokens",
        "minisign/doctor/pretrained.py",
        "targets = F.pad(windows.where(hidden, IGNORED), (1, 1), value=IGNORED)",
        "targets = F.pad(windows, (1, 1), value=IGNORED)",
        "tests/test_pretrained.py::test_examples_of_masked_tokens",
    ),
    Mutant(
        "ratio without its bias correction",
        "minisign/probes/updates.py",
        "beta1).div_(1 - beta1 ** (t + 1)).div_(",
        "beta1).div_(",
        UPDATES + "test_the_coming_update_is_the_one_that_comes",
        "12_adam_ratio",
    ),
    Mutant(
        "gradient compared with itself",
        "minisign/probes/update_watch.py",
        "self._before.get(name))",
        "u.gradient)",
        UPDATES + "test_a_watch_looks_at_its_interval_and_compares_with_the_step_before",
        "12_adam_ratio",
    ),
    Mutant(
        "kurtosis left out of the bimodality",
        "minisign/probes/update_watch.py",
        "((z2 * z).mean().square() + 1) / z2.square().mean(),",
        "((z2 * z).mean().square() + 1) / z2.mean(),",
        UPDATES + "test_figures_of_a_bell_and_of_two_modes",
        "12_adam_ratio",
    ),
    Mutant(
        "correlation narrows the ratio",
        "minisign/theory.py",
        "(1 + beta1 * rho) / (1 - beta1 * rho)))",
        "(1 - beta1 * rho) / (1 + beta1 * rho)))",
        UPDATES + "test_std_of_r_for_correlated_gradients",
        "12_adam_ratio",
    ),
    Mutant(
        "largest ratio without the square root",
        "minisign/theory.py",
        "return (1 - beta1) / math.sqrt((1 - beta2) * (1 - q))",
        "return (1 - beta1) / ((1 - beta2) * (1 - q))",
        UPDATES + "test_the_largest_ratio_needs_a_longer_memory_of_squares",
        "12_adam_ratio",
    ),
    Mutant(
        "a jump from the first loss",
        "minisign/studies/instability.py",
        "rise = means - np.minimum.accumulate(means)",
        "rise = means - means[0]",
        "tests/test_instability.py::test_a_jump_is_the_largest_rise_above_an_earlier_mean",
        "13_adam_instability",
    ),
    Mutant(
        "a quiet stage",
        "minisign/studies/instability.py",
        "held.setdefault(p, self.loud * p.grad).clone()",
        "held.setdefault(p, p.grad).clone()",
        "tests/test_instability.py::test_the_stage_is_quiet_then_loud_in_the_first_layer_only",
        "13_adam_instability",
    ),
    Mutant(
        "a guard that skips in words only",
        "minisign/doctor/guard.py",
        'return event.action != "skip"',
        "return True",
        GUARD + "test_a_burst_is_seen_before_it_moves_a_weight",
        "13_adam_instability",
    ),
    Mutant(
        "going back to a doubtful checkpoint",
        "minisign/doctor/saves.py",
        "return [path for path in saved if step_of(path) <= step - self.margin] or saved[:1]",
        "return saved",
        GUARD + "test_back_restores_weights_and_state_of_a_good_checkpoint",
    ),
    Mutant(
        "doubtful checkpoints kept",
        "minisign/doctor/saves.py",
        "for later in saved[saved.index(path) + 1 :]:",
        "for later in saved[len(saved) :]:",
        GUARD + "test_a_run_killed_while_it_goes_back_resumes_from_an_intact_checkpoint",
    ),
    Mutant(
        "spikes count as usual losses",
        "minisign/doctor/guard.py",
        'if math.isfinite(value) and (update or (event is not None and event.cause == "ratio")):',
        "if math.isfinite(value):",
        GUARD + "test_skipped_losses_do_not_become_the_usual_ones",
    ),
    Mutant(
        "clipping to infinity",
        "minisign/lab/train.py",
        "torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)",
        "torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)",
        "tests/test_train.py::test_gradients_are_clipped_before_the_update",
    ),
    Mutant(
        "sign(0) = 1 in a kernel",
        "minisign/kernels/step.h",
        "return float(x > 0) - float(x < 0);",
        "return x >= 0 ? 1.0f : -1.0f;",
        FUSED + "test_the_same_step",
        "14_fused_kernels",
    ),
    Mutant(
        "a kernel that moves the weights only",
        "minisign/kernels/triton.py",
        "    written = [v for v in used if program.writes(v)]\n",
        "    written = [v for v in used if program.writes(v) and v is p]\n",
        FUSED + "test_interpreted_is_compiled",
        "14_fused_kernels",
    ),
    Mutant(
        "32-bit offsets",
        "minisign/kernels/step.h",
        "const int64_t start = row(rows[k]) * t.width;",
        "const int64_t start = (row(rows[k]) * t.width) & 0x7fffffff;",
        FUSED + "test_beyond_two_to_the_31",
    ),
    Mutant(
        "rows that were not looked up move in a kernel",
        "minisign/kernels/step.h",
        "Rule::rows != MASKED || mask[i]",
        "true",
        FUSED + "test_a_plan_of_lazy_rows_follows_them",
    ),
    Mutant(
        "rows without a gradient move in a kernel",
        "minisign/kernels/step.h",
        "      if (found[k]) rows[moved++]",
        "      rows[moved++]",
        FUSED + "test_a_plan_of_lazy_rows_follows_them",
        "17_your_own_optimizer",
    ),
    Mutant(
        "rows that take part never forgotten",
        "minisign/engine/fused.py",
        "                forget_rows(p, unless=found_inf)\n",
        "                pass\n",
        FUSED + "test_a_plan_of_lazy_rows_follows_them",
    ),
    Mutant(
        "noise that is always zero",
        "minisign/kernels/step.h",
        "uint16_t((bits + noise) >> 16)",
        "uint16_t(bits >> 16)",
        FUSED + "test_rounding_at_random_is_unbiased",
    ),
    Mutant(
        "a number that is traced as it is today",
        "minisign/kernels/trace.py",
        "    given = {\n        name: Value(Number(x, name), made) if isinstance(x, float)",
        "    given = {\n        name: Value(Number(x, repr(x)), made) if isinstance(x, float)",
        FUSED + "test_a_plan_is_remade_when_anything_moves",
        "17_your_own_optimizer",
    ),
    Mutant(
        "an update in place that goes nowhere",
        "minisign/kernels/trace.py",
        "        if isinstance(target, Variable):\n",
        "        if target is self.inputs[0]:\n",
        "tests/test_own.py::test_every_road[torch.float32-cpu-HeavyBall]",
    ),
    Mutant(
        "a branch that is taken for ever",
        "minisign/engine/fused.py",
        "        if made.is_for(floats):\n",
        "        if True:\n",
        "tests/test_own.py::test_a_rule_that_asks_its_numbers_is_asked_anew",
    ),
    Mutant(
        "shapes looked at too late",
        "minisign/engine/work.py",
        "            if x.shape != shape:\n",
        "            if False:\n",
        "tests/test_own.py::test_shapes_are_checked_before_anything_moves",
    ),
    Mutant(
        "a sparse row one beyond the last",
        "minisign/engine/work.py",
        "        if least < 0 or most >= len(p):\n",
        "        if least < 0 or most > len(p):\n",
        POINTERS + "test_a_sparse_row_that_is_not_there",
    ),
    Mutant(
        "a record of rows that are gone",
        "minisign/engine/rows.py",
        "        return len(self.mask) == len(weight) and self.mask.device == weight.device\n",
        "        return self.mask.device == weight.device\n",
        POINTERS + "test_a_record_of_another_number_of_rows[plain]",
    ),
    Mutant(
        "signs that are put off not seen",
        "minisign/engine/fused.py",
        "    if any(_KEYS(x) != usual for x in (p, g, *buffers)):\n",
        "    if _KEYS(g) != usual:\n",
        POINTERS + "test_a_negative_bit",
    ),
    Mutant(
        "autograd not told of new weights",
        "minisign/engine/fused.py",
        "        if made.writes(made.p):\n",
        "        if False:\n",
        POINTERS + "test_autograd_sees_that_its_tensors_were_written",
    ),
    Mutant(
        "autograd told of weights that are the old ones",
        "minisign/engine/fused.py",
        "        if made.writes(made.p):\n",
        "        if True:\n",
        POINTERS + "test_autograd_may_go_on_where_no_weight_was_written",
    ),
    Mutant(
        "a later tensor of shared memory steps first",
        "minisign/engine/fused.py",
        "            spans[i:j] = [(start, end)]\n",
        "            spans[i:j] = spans[i:j] or [(start, end)]\n",
        POINTERS + "test_tensors_that_share_memory_step_in_their_order",
    ),
    Mutant(
        "plans of a state that is gone",
        "minisign/engine/optimizer.py",
        '        self.cache("fused").clear()  # plans hold',
        "        # plans hold",
        POINTERS + "test_a_state_that_was_replaced_is_let_go",
    ),
    Mutant(
        "a broken library loaded",
        "minisign/kernels/cpu.py",
        "    return content[-32:] == hashlib.sha256(content[:-32]).digest()\n",
        "    return len(content) > 0\n",
        FUSED + "test_the_library_is_compiled_once",
    ),
    Mutant(
        "rows that depend on others and move alone",
        "minisign/engine/work.py",
        "    if not goes_by_rows(optimizer.rule, len(optimizer.buffers), numbers):\n",
        "    if False:\n",
        "tests/test_own.py::test_rows_that_depend_on_others_do_not_move_alone",
    ),
    Mutant(
        "halves of a rule that has none",
        "minisign/engine/tried.py",
        '"" if torch.equal(moved, alone) else by_more',
        '""',
        "tests/test_own.py::test_who_cannot_refuses_with_the_reason",
        "17_your_own_optimizer",
    ),
    Mutant(
        "the same noise at every step",
        "minisign/kernels/step.h",
        "mix(uint32_t(t.noise) + uint32_t(number))",
        "mix(uint32_t(t.noise))",
        FUSED + "test_rounding_at_random_is_unbiased",
        "15_stingy_memory",
    ),
    Mutant(
        "a plan that never changes",
        "minisign/engine/plan.py",
        "            launch.set_gradients([",
        "            list([",
        FUSED + "test_a_plan_is_remade_when_anything_moves",
        "14_fused_kernels",
    ),
    Mutant(
        "a plan that does not see where the weights lie",
        "minisign/engine/plan.py",
        " or list(map(_PLACE, tensors)) != self.places",
        "",
        FUSED + "test_a_plan_is_remade_when_anything_moves",
    ),
    Mutant(
        "a plan that does not see what gradients are",
        "minisign/engine/plan.py",
        "not self.alike.check(*tensors, *gs)",
        "not self.alike.check(*tensors, *gs) and None in gs",
        FUSED + "test_a_plan_sees_gradients_of_another_kind",
    ),
    Mutant(
        "gradients kept by a plan",
        "minisign/engine/plan.py",
        "            jobs.append(",
        "            launch.held.extend(gs)\n            jobs.append(",
        FUSED + "test_no_gradient_is_kept",
    ),
    Mutant(
        "found_inf not read",
        "minisign/engine/optimizer.py",
        "return not all(in_kernels) and bool(self.found_inf.item())",
        "return False and bool(self.found_inf.item())",
        FUSED + "test_grad_scaler",
    ),
    Mutant(
        "every micro-batch decays",
        "minisign/engine/released.py",
        '    keep = 1.0 if state.get("taken") else keep\n',
        "",
        RELEASE + "test_one_step_on_the_mean_gradient",
        "15_stingy_memory",
    ),
    Mutant(
        "gradients taken and not freed",
        "minisign/engine/released.py",
        "    p.grad = None\n    g = -g",
        "    g = -g",
        RELEASE + "test_peak_memory",
        "15_stingy_memory",
    ),
    Mutant(
        "one side of the bound",
        "minisign/doctor/bound.py",
        "        block = block.abs_()\n",
        "        block = block.relu_()\n",
        INSPECT + "test_none_missed_in_200_saturated_matrices",
    ),
    Mutant(
        "rows repaired to twice their size",
        "minisign/doctor/repair.py",
        "new = rescaled(row.float(), found.typical)",
        "new = rescaled(row.float(), 2 * found.typical)",
        INSPECT + "test_repair_changes_those_rows_and_no_other_byte",
        "16_your_own_model",
    ),
    Mutant(
        "an envelope that forgets the start's decay",
        "minisign/doctor/envelope.py",
        "        self.left *= 1 - eta * decay\n",
        "",
        WATCH + "test_an_entry_whose_sign_never_changes_stays_on_the_envelope",
    ),
    Mutant(
        "rows with a gradient taken for silent",
        "minisign/doctor/envelope.py",
        "            self.seen.masked_fill_((some != 0).any(dim=1), self.push)\n",
        "            pass\n",
        WATCH + "test_warns_once_of_rows_that_no_longer_come",
    ),
    Mutant(
        "check sums not compared",
        "minisign/lab/checkpoint.py",
        "            is_right = _sha256(path / name) == expected\n",
        "            is_right = bool(_sha256(path / name) and expected)\n",
        "tests/test_train.py::test_bad_checkpoints",
    ),
    Mutant(
        "one checkpoint kept",
        "minisign/lab/checkpoint.py",
        "KEPT = 2\n",
        "KEPT = 1\n",
        "tests/test_train.py::test_bad_checkpoints",
    ),
    Mutant(
        "torch's error in saving let through",
        "minisign/lab/checkpoint.py",
        "ANY = (Exception, CheckpointException)",
        "ANY = (Exception,)",
        RELIABILITY + "test_a_full_disk_is_one_line_and_the_checkpoint_before_stays",
    ),
    Mutant(
        "unpickled without a list of what may be",
        "minisign/lab/checkpoint.py",
        "            metadata = _Unpickler(file).load()\n",
        "            metadata = pickle.load(file)\n",
        RELIABILITY + "test_mutated_files_are_refused_or_read[metadata]",
    ),
    Mutant(
        "the RMS of a shard",
        "minisign/engine/shards.py",
        "    add_up(params[0], found)\n",
        "    add_up(params[0], found[:1])\n",
        PARALLEL + "test_two_processes_with_half_the_batch_are_one[tiger-fsdp]",
    ),
    Mutant(
        "a jitter that draws from torch's generator",
        "minisign/lab/jitter.py",
        "x.shape, generator=generator)",
        "x.shape)",
        JITTER + "test_torchs_own_generator_is_left_alone",
    ),
    Mutant(
        "targets left among the zeros",
        "minisign/lab/loss.py",
        "            rows.scatter_(-1, at, 0)\n",
        "",
        "tests/test_loss.py::test_loss_and_gradient_are_torchs",
    ),
    Mutant(
        "two threads in a process",
        "minisign/studies/processes.py",
        '"MKL_NUM_THREADS": "1"',
        '"MKL_NUM_THREADS": "2"',
        PROCESSES + "test_every_task_has_one_thread_and_its_messages_come_before_its_result",
    ),
    Mutant(
        "an error before the results that are there",
        "minisign/studies/processes.py",
        "key=lambda x: x.exception() is not None",
        "key=lambda x: x.exception() is None",
        PROCESSES + "test_results_that_are_there_come_before_an_error",
    ),
    Mutant(
        "slack of `a > b` with the wrong sign",
        "tests/claims.py",
        'y - x if name.startswith("L") else x - y',
        "y - x",
        RECORDER + "test_each_kind_of_assertion",
    ),
    Mutant(
        "a failing claim that is no fault",
        "tests/robust.py",
        "    failing = [claim for claim in every if claim.fails]\n",
        "    failing: list[Claim] = []\n",
        RECORDER + "test_what_is_wrong_is_named",
    ),
)


def guards(mutant: Mutant) -> list[str]:
    """The arguments that make pytest run the mutant's test, and those for its notebook."""
    notebook = f"notebooks/{mutant.notebook}.ipynb"
    return [mutant.test, *([notebook] if mutant.notebook else [])]


def check(guard: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Runs a test or a notebook in a tree, up to its first failure."""
    return run_pytest(root, ["-x", *(("--nbval", *NBVAL) if guard.endswith(".ipynb") else ()), guard])


def plant(mutant: Mutant | None, root: Path) -> None:
    """Copies the tree to ``root``, with the mutant's bug."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / part, root / part, ignore=ignore)
        else:
            shutil.copy(ROOT / part, root / part)
    if mutant is not None:
        file = root / mutant.file
        text = file.read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.name}: {mutant.old!r} is {text.count(mutant.old)} times in {file}")
        file.write_text(text.replace(mutant.old, mutant.new))


def verdicts(mutant: Mutant) -> list[str]:
    """For each guard, "red" or what happened instead."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plant(mutant, root)
        found = []
        for guard in guards(mutant):
            outcome = check(guard, root)
            # Another status is not a failed test but one that could not run.
            found.append({0: "SURVIVED", 1: "red"}.get(outcome.returncode, f"STATUS {outcome.returncode}"))
        print(f"{mutant.name}: {', '.join(found)}", flush=True)
        return found


def sound(names: list[str]) -> bool:
    """Whether the guards pass on a tree without a bug, with the package of that tree."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plant(None, root)
        which = root / "tests" / "test_which.py"
        which.write_text(f"import minisign\n\ndef test_which(): assert {folder!r} in minisign.__file__\n")
        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(lambda guard: check(guard, root), [f"tests/{which.name}", *names]))
    for guard, outcome in zip(["the package's place", *names], outcomes, strict=True):
        if outcome.returncode:
            print(f"{guard} fails without a bug:\n{outcome.stdout[-2000:]}", file=sys.stderr)
    return not any(outcome.returncode for outcome in outcomes)


def row(mutant: Mutant, found: list[str]) -> list[str]:
    """A mutant's line of the table."""
    named = [
        f"`{guard.split('/')[-1]}`: {verdict}" for guard, verdict in zip(guards(mutant), found, strict=True)
    ]
    return [mutant.name, f"`{mutant.file}`", *named, *[""] * (2 - len(named))]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="NAME", choices=[m.name for m in MUTANTS], help="plant one bug")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in (None, mutant.name)]
    if not sound(sorted({guard for mutant in chosen for guard in guards(mutant)})):
        return 1
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(verdicts, chosen))
    if only is None:
        rows = [row(mutant, verdict) for mutant, verdict in zip(chosen, found, strict=True)]
        columns = ("bug", "in", "test", "notebook")
        TABLE.write_text(report("Bugs planted, and what turns red", "make mutants", TEXT, columns, rows))
    survivors = [m.name for m, verdict in zip(chosen, found, strict=True) if set(verdict) != {"red"}]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} bugs noticed by all that should", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
