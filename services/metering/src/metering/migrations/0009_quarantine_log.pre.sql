-- What a record is: its log, its place in it, and its bytes. A topic that was deleted and made again
-- has other records at the same offsets.

alter table quarantine add column topic_id text not null default '';
comment on column quarantine.topic_id is
  'The log the record was read from, by the id Kafka gives it; empty: not known.';
