"""What is compared with what: variants, fixes, rates, remedies, and how many runs are made of each."""
