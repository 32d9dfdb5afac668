-- `python -m ledger recover` rejects proposals of a budget that an operator has named whole.

grant update (reason) on proposals to ledger_writer;
