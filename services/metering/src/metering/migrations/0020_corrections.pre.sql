-- Corrections: facts about what was reported, the time that they void, and the time they release.

alter table buckets add column if not exists voided_gpu_ns bigint not null default 0;
comment on column buckets.voided_gpu_ns is
  'Time reported under the terms of this bucket that corrections took back: it is in no gpu_ns.';
alter table buckets add constraint buckets_voided_gpu_ns_check check (voided_gpu_ns >= 0) not valid;

create table corrections (
  arrival        bigint  generated always as identity primary key,
  correction_id  text    not null unique,
  hub            text    not null,
  node_id        text,
  allocation_id  text    not null,
  slice_uuids    text[],
  start_ms       bigint  not null,
  end_ms         bigint  not null,
  revision       bigint  check (revision > 0),
  action         text    not null check (action in ('void', 'replace')),
  release        boolean not null,
  replacement    jsonb,
  reason         text    not null,
  approved_by    text,
  state          text    not null check (state in ('proposed', 'approved', 'rejected')),
  counts         boolean not null,
  waits          boolean not null default false,
  waits_for      text,
  waits_detail   text,
  proposed_by    text,
  proposed_ms    bigint  not null,
  decided_by     text,
  decided_ms     bigint,
  topic          text,
  topic_id       text,
  partition      int,
  record_offset  bigint,
  record_ms      bigint,
  message_key    bytea,
  message_value  bytea,
  message_headers bytea,
  check (start_ms < end_ms),
  check ((state = 'proposed') = (decided_ms is null)),
  check (state <> 'approved' or revision is not null),
  check (state = 'approved' or not counts)
);
create index corrections_of_allocation on corrections (hub, allocation_id, arrival);
create index corrections_not_counting on corrections (arrival)
  where state = 'approved' and not counts;
comment on table corrections is
  'Corrections of hubs that count, and all that operators proposed. Those that count are facts.';
comment on column corrections.waits is
  'Of a hub: nothing was covered of it yet, so whether it needs an approval is judged again.';
comment on column corrections.waits_for is
  'Why an approved one of operators does not count, or not everywhere: a reason of quarantine.';
comment on column corrections.message_value is
  'The record of a hub that said it: it goes to quarantine if it needs an approval after all.';

create table freed_coverage (
  hub           text   not null,
  node_id       text   not null,
  device_uuid   text   not null,
  start_ms      bigint not null,
  slice_uuid    text   not null,
  end_ms        bigint not null,
  tenant_id     text   not null,
  project_id    text   not null,
  allocation_id text   not null,
  sku           text   not null,
  price_class   text   not null,
  share_ppm     int    not null check (share_ppm between 1 and 1000000),
  primary key (hub, node_id, device_uuid, start_ms, slice_uuid, allocation_id),
  check (start_ms < end_ms and start_ms / 86400000 = (end_ms - 1) / 86400000)
);
create index freed_coverage_of_allocation on freed_coverage (allocation_id, hub, start_ms);
comment on table freed_coverage is
  'Coverage that a void has released: it keeps nobody out, and is remembered for its allocation.';

create table freed_time (
  freed_id bigint generated always as identity primary key,
  hub      text   not null,
  start_ms bigint not null,
  end_ms   bigint not null,
  after_id bigint not null default 0,
  check (start_ms < end_ms)
);
comment on table freed_time is
  'Where conflicts may be none any more: the service judges them again, and deletes the row.';
comment on column freed_time.after_id is 'The last quarantined record that was judged again.';

grant select on corrections, freed_coverage, freed_time
  to :service_api, :service_writer, :service_reader;
grant insert, update, delete on corrections, freed_coverage to :service_api, :service_writer;
grant insert on freed_time to :service_api, :service_writer;
grant update, delete on freed_time to :service_writer;

alter table corrections enable row level security;
alter table corrections force row level security;
-- A tenant sees what concerns it: the allocation was reported for it, or was or is to be billed to
-- it. Of coverage and buckets it sees its own only.
create policy corrections_api on corrections to :service_api
  using (current_setting('app.tenant', true) in (replacement ->> 'tenant_id', '*')
         or exists (select from buckets b
                     where b.allocation_id = corrections.allocation_id and b.hub = corrections.hub)
         or exists (select from coverage c
                     where c.allocation_id = corrections.allocation_id and c.hub = corrections.hub));
create policy corrections_writer on corrections to :service_writer using (true) with check (true);
create policy corrections_reader on corrections for select to :service_reader using (true);

alter table freed_coverage enable row level security;
alter table freed_coverage force row level security;
create policy freed_coverage_api on freed_coverage to :service_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy freed_coverage_writer on freed_coverage to :service_writer
  using (true) with check (true);
create policy freed_coverage_reader on freed_coverage for select to :service_reader using (true);
