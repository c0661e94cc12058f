"""How a rule is carried out.

A plain step: ``step`` has ``look`` make a :class:`Work` of each parameter that has a gradient, which says
that rule(p, g, *buffers, **numbers) is due, and ``_move`` hands them to ``roads.apart``, which calls the
rule. Everything else changes a part of a Work on the way: accumulation puts half a rule in the place of
the rule, lazy rows put rows in the place of tensors, released gradients a rule that reads none. The kernels
take many Works at once.

Four files are a step, and to be read in this order:

    contract.py     what an optimizer says of its rule (and exact.py: torch's own, two rough edges off)
    work.py         the look: Work, and how it is made
    optimizer.py    groups and options; a step looks first, then moves
    roads.py        the move: a tensor by itself, or a list of them (lists.py, for GPUs)

The others are asked only where a run needs them:

    lazy.py, rows.py    only rows that take part        halves.py       several micro-batches a step
    rounding.py         bfloat16 at random              released.py     gradients freed within backward
    shards.py           parameters in pieces            fused.py, plan.py   minisign/kernels

options.py and checks.py say what is refused, words.py what a rule may ask of a whole tensor, and tried.py
finds out what a rule does by doing it.
"""
