"""Everything two parties of Hisab must agree on; no I/O, and nothing of ours is imported here."""
