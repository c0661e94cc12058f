"""How a rule is carried out.

Four files are a step, and to be read in this order:

    contract.py     what torch.optim asks of an optimizer, and the engine of a rule
    optimizer.py    groups and options; a step looks first, then moves
    work.py         the look: what is to be done to each parameter
    roads.py        the move: a tensor, or a list of them (lists.py)

The others are asked only where a run needs them:

    lazy.py, rows.py    only rows that take part        halves.py       several micro-batches a step
    rounding.py         bfloat16 at random              released.py     gradients freed within backward
    shards.py           parameters in pieces            fused.py, plan.py   minisign/kernels

options.py and checks.py say what is refused, words.py what a rule may ask of a whole tensor.
"""
