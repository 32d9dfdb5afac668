-- A topic that is deleted and made again is another log: an offset means something in its own only.

alter table consumer_progress add column topic_id text not null default '';
comment on column consumer_progress.topic_id is
  'The log that next_offset is a place in, by the id Kafka gives it; empty: not known yet.';
