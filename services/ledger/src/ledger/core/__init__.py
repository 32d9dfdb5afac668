"""What decides in the ledger: values in, values out; no I/O and no clock.

Read `grants`, then `holds`, then `book`, then `decisions`.
"""
