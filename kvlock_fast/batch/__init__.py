"""Many edits from one manifest: each in a ledger, those of one source together, none lost."""
