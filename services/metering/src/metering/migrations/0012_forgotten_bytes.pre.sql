-- The bytes of released records may be forgotten. Without an index here: a new column keeps readers
-- out, too, until its file ends.

alter table quarantine add column forgotten_at timestamptz;
comment on column quarantine.forgotten_at is
  'When the bytes of a released record were forgotten; their SHA-256 and all counts stay.';
