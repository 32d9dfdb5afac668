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
