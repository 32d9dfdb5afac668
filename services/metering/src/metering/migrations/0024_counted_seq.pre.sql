-- Of equal revisions the correction that counted first stands. An operator's counts long after its
-- row was made, so its place is given when it begins to count, under the lock of its hub.

alter table corrections add column if not exists counted_seq bigint;
-- Those that are there keep the place that they were metered by.
alter table corrections no force row level security;
update corrections set counted_seq = arrival;
alter table corrections alter column counted_seq set not null;
alter table corrections alter column counted_seq add generated always as identity;
select setval(pg_get_serial_sequence('corrections', 'counted_seq'), coalesce(max(counted_seq), 0) + 1,
              false)
  from corrections;
alter table corrections force row level security;
create unique index corrections_counted on corrections (counted_seq);
comment on column corrections.counted_seq is
  'They rise in the order in which corrections began to count; of those that do not, no matter.';
