-- A record is found by its log and bytes, too; lists of quarantine and what may be forgotten are
-- found by an index.

create unique index quarantine_record
  on quarantine (topic, partition, record_offset, topic_id, value_sha256);

create index quarantine_of_hub on quarantine (hub, quarantine_id);
create index quarantine_of_reason on quarantine (reason, quarantine_id);
create index quarantine_open on quarantine (quarantine_id) where state = 'open';
create index quarantine_dismissed on quarantine (quarantine_id) where state = 'dismissed';
create index quarantine_forgettable on quarantine (closed_at)
  where state = 'released' and forgotten_at is null;
