"""How a rule is carried out: torch's contract, lists, rows, pieces, narrow types, released gradients."""
