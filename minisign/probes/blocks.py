"""A model's parameters in blocks: what gradient norms and curvatures are compared between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

Blocks = Mapping[str, Sequence[nn.Parameter]]  # disjoint, by name


def tensor_blocks(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter tensor that is trained a block of its own, a shared one once.

    This is the partition that the code of arXiv 2502.00213 measures (of some layers that it names).
    """
    return {name: [p] for name, p in model.named_parameters() if p.requires_grad}


def layer_blocks(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every layer of a transformer a block, and every other module that holds parameters one too.

    The layers are the children of the longest ``nn.ModuleList`` in the model (of the first of them, if
    several are as long). A parameter that two modules share belongs to the first.

    Raises:
        ValueError: the model has no ``nn.ModuleList``.
    """
    within = f"{_stack(model)}."
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith(within):
            block = within + name.removeprefix(within).split(".")[0]
        else:
            block = name.rpartition(".")[0] or name
        blocks.setdefault(block, []).append(p)
    return blocks


def default_blocks(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """:func:`layer_blocks` of a model that has layers, else :func:`tensor_blocks`."""
    return layer_blocks(model) if _lists(model) else tensor_blocks(model)


def layer_names(model: nn.Module) -> list[str]:
    """Which of :func:`layer_blocks` are layers, from the input to the output.

    Raises:
        ValueError: the model has no ``nn.ModuleList``.
    """
    stack = _stack(model)
    return [f"{stack}.{i}" for i in range(len(_lists(model)[stack]))]


def _stack(model: nn.Module) -> str:
    lists = _lists(model)
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList: it is not known what its layers are"
        )
    return max(lists, key=lambda name: len(lists[name]))  # the first of the longest


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    def found() -> Iterator[tuple[str, nn.ModuleList]]:
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module):
                yield name, module

    return dict(found())
