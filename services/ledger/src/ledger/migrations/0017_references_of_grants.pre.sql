-- What an officer calls a grant that came in a file: no tenant has two of one reference.
-- Old code neither reads nor writes it: its grants have none.

alter table grants
  add column reference text,
  add constraint grants_reference_check check (length(reference) between 1 and 200),
  add constraint grants_reference_key unique (tenant_id, reference);
comment on column grants.reference is
  'The officer''s own name for it. Null: it was proposed by itself, or taken back by a recovery.';
