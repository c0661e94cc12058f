"""How a rule of ``minisign.optim`` is carried out: groups and state, lists, rows, pieces, narrow types,
halves."""
