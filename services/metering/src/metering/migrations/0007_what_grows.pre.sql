-- What is asked of one allocation or of a list, and what is due, is found by an index however much
-- is stored beside it; the bytes of released records may be forgotten.

create index coverage_of_allocation on coverage (allocation_id, hub);

-- An allocation that has ended and is not final is looked at twice, and then rests at 'infinity'
-- until something of it changes: what is looked at again and again does not grow with what rests.
create index allocations_due on allocations (hub, check_at)
  where ended_ms is not null and not final;
create index allocations_resting on allocations (hub, ended_ms)
  where ended_ms is not null and not final and (check_at = 'infinity' or checks = 1);
create index allocations_of_tenant on allocations (tenant_id, allocation_id, hub)
  where ended_ms is not null and not final;
comment on column allocations.check_at is
  'When it is looked at next; infinity: once something is billed, or its hub is complete past it.';

create index quarantine_of_hub on quarantine (hub, quarantine_id);
create index quarantine_of_reason on quarantine (reason, quarantine_id);
create index quarantine_open on quarantine (quarantine_id) where state = 'open';
create index quarantine_dismissed on quarantine (quarantine_id) where state = 'dismissed';

alter table quarantine add column forgotten_at timestamptz;
create index quarantine_forgettable on quarantine (closed_at)
  where state = 'released' and forgotten_at is null;
comment on column quarantine.forgotten_at is
  'When the bytes of a released record were forgotten; their SHA-256 and all counts stay.';
