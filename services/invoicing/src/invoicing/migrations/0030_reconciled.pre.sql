-- A watermark also says how metering stood against the ledger when it was last compared.

alter table watermarks add column reconciled jsonb;
comment on column watermarks.reconciled is
  'What metering''s last comparison with the ledger found, of all hubs; null: none was heard of.';
