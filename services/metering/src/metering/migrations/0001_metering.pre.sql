-- Metering: what is covered, what it costs, what waits, and up to when hubs are complete.
-- GPU time is in GPU-nanoseconds (1 ms of 1 ppm of a device), amounts in micro-units.

create table hubs (
  hub          text        primary key check (hub ~ '^[a-z][a-z0-9-]{0,30}$'),
  name         text        not null,
  heartbeat_ms bigint      not null check (heartbeat_ms > 0),
  created_at   timestamptz not null default clock_timestamp(),
  watermark_ms bigint,
  statement    jsonb,
  stated_ms    bigint      not null default 0
);
comment on table hubs is 'The registry: every hub here has a topic that is read.';
comment on column hubs.watermark_ms is
  'Complete up to here: the minimum over active sources that has passed a barrier. Never lower.';
comment on column hubs.statement is 'The HubWatermark last told downstream.';

create table hub_partitions (
  hub          text   not null references hubs,
  partition    int    not null check (partition >= 0),
  last_seen_ms bigint not null,
  batches      bigint not null,
  primary key (hub, partition)
) with (fillfactor = 50);
comment on table hub_partitions is 'Kafka timestamp of the last record of each partition.';

create table sources (
  arrival      bigint generated always as identity unique,
  hub          text   not null references hubs,
  source       text   not null,
  node_path    text   not null,
  contiguous   bigint not null check (contiguous >= 0),
  beyond       jsonb  not null,
  watermark_ms bigint,
  standing     text   not null check (standing in ('active', 'closed', 'retired')),
  last_seen_ms bigint not null,
  retired_for  text,
  primary key (hub, source)
) with (fillfactor = 50);
create index sources_of_node on sources (node_path);
comment on column sources.arrival is 'Orders the epochs of a node by first arrival.';
comment on column sources.beyond is
  'Ranges [first, until, first watermark, last watermark] seen beyond the first gap.';

create table nodes (
  hub     text not null,
  node_id text not null,
  primary key (hub, node_id)
);
comment on table nodes is
  'Locked by whoever changes the coverage or the buckets of a node, in the order of the key.';

create table coverage (
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
  primary key (hub, node_id, device_uuid, start_ms, slice_uuid),
  check (start_ms < end_ms and start_ms / 86400000 = (end_ms - 1) / 86400000)
) with (fillfactor = 80);
comment on table coverage is
  'Sold time: disjoint half-open intervals per slice, none longer than a UTC day.';

create table buckets (
  bucket_id     uuid   primary key,
  tenant_id     text   not null,
  project_id    text   not null,
  allocation_id text   not null,
  hold_id       text,
  hub           text   not null,
  node_id       text   not null,
  rate_line_id  text   not null,
  price_version text   not null,
  sku           text   not null,
  price_class   text   not null,
  hour_ms       bigint not null check (hour_ms % 3600000 = 0),
  revision      bigint not null default 0 check (revision >= 0),
  gpu_ns        bigint not null check (gpu_ns > 0),
  charge_micro  bigint not null check (charge_micro >= 0)
) with (fillfactor = 80);
create index buckets_of_hour on buckets (hub, hour_ms);
create index buckets_of_allocation on buckets (allocation_id, hub);

create table tallies (
  hub               text           not null,
  partition         int            not null,
  hour_ms           bigint         not null check (hour_ms % 3600000 = 0),
  reported_gpu_ns   numeric(38, 0) not null check (reported_gpu_ns >= 0),
  duplicate_gpu_ns  numeric(38, 0) not null check (duplicate_gpu_ns >= 0),
  read_records      bigint         not null check (read_records >= 0),
  accepted_records  bigint         not null check (accepted_records >= 0),
  duplicate_records bigint         not null check (duplicate_records >= 0),
  primary key (hub, hour_ms, partition)
) with (fillfactor = 50);
comment on table tallies is
  'What was counted per UTC hour of usage: the sides of the identity that no other table holds.';

create table allocations (
  hub             text   not null,
  allocation_id   text   not null,
  tenant_id       text   not null,
  project_id      text   not null,
  started_ms      bigint,
  ended_ms        bigint,
  cause           text,
  reserved_gpu_ms bigint check (reserved_gpu_ms >= 0),
  final           boolean not null default false,
  checks          int     not null default 0,
  check_at        timestamptz not null default clock_timestamp(),
  primary key (hub, allocation_id, tenant_id)
) with (fillfactor = 70);
create index allocations_not_final on allocations (check_at)
  where ended_ms is not null and not final;
comment on table allocations is 'What lifecycle events said; usage needs none of them.';

create table allocation_duplicates (
  hub              text           not null,
  allocation_id    text           not null,
  tenant_id        text           not null,
  duplicate_gpu_ns numeric(38, 0) not null check (duplicate_gpu_ns >= 0),
  primary key (hub, allocation_id, tenant_id)
) with (fillfactor = 70);

create table quarantine (
  quarantine_id     bigint generated always as identity primary key,
  hub               text        not null,
  topic             text        not null,
  partition         int         not null,
  record_offset     bigint      not null,
  record_ms         bigint      not null,
  reason            text        not null,
  detail            text        not null,
  state             text        not null default 'open'
                                check (state in ('open', 'released', 'dismissed')),
  tenant_id         text,
  allocation_id     text,
  counts            boolean     not null,
  hour_ms           bigint      not null,
  had_new           boolean     not null,
  parts             jsonb,
  judged_generation bigint      not null,
  message_key       bytea,
  message_value     bytea,
  message_headers   bytea       not null,
  value_sha256      text        not null,
  quarantined_at    timestamptz not null default clock_timestamp(),
  closed_at         timestamptz,
  closed_because    text,
  unique (topic, partition, record_offset),
  check ((state = 'open') = (closed_at is null))
);
create index quarantine_listed on quarantine (hub, reason, quarantine_id);
create index quarantine_counted on quarantine (hub, hour_ms)
  where counts and state <> 'released';
create index quarantine_of_allocation on quarantine (allocation_id, hub)
  where allocation_id is not null;
create index quarantine_waiting_tenant on quarantine (tenant_id)
  where state = 'open' and reason = 'unknown-tenant';
create index quarantine_waiting_price on quarantine (judged_generation)
  where state = 'open' and reason in ('unknown-sku', 'no-price');
comment on table quarantine is
  'Records that wait, whole or in part, with their original bytes. Nothing is ever deleted.';
comment on column quarantine.parts is
  'What waits of a record in conflict: [device, slice, share_ppm, start_ms, end_ms]; null: all.';

create table quarantine_time (
  quarantine_id bigint  not null references quarantine,
  hub           text    not null,
  hour_ms       bigint  not null check (hour_ms % 3600000 = 0),
  tenant_id     text,
  waiting_gpu_ns bigint not null check (waiting_gpu_ns > 0),
  dismissed     boolean not null default false,
  primary key (quarantine_id, hour_ms)
);
create index quarantine_time_of_hour on quarantine_time (hub, hour_ms);
create index quarantine_time_open on quarantine_time (hub, tenant_id) where not dismissed;
comment on table quarantine_time is
  'GPU time that waits or was dismissed, per UTC hour of usage; a release deletes its rows.';

create table tenants (
  tenant_id text primary key,
  currency  text not null
);
comment on table tenants is 'Our copy of ledger.tenants.v1: who exists, and in which currency.';

create table price_lists (
  price_version text        primary key,
  currency      text        not null,
  valid_from_ms bigint      not null check (valid_from_ms % 3600000 = 0),
  valid_until_ms bigint     check (valid_until_ms % 3600000 = 0),
  added_by      text        not null,
  added_at      timestamptz not null default clock_timestamp(),
  check (valid_until_ms > valid_from_ms)
);

create table price_lines (
  generation         bigint generated always as identity unique,
  rate_line_id       text   primary key,
  price_version      text   not null references price_lists,
  currency           text   not null,
  sku                text   not null,
  price_class        text   not null,
  micro_per_gpu_hour bigint not null check (micro_per_gpu_hour >= 0),
  valid_from_ms      bigint not null check (valid_from_ms % 3600000 = 0),
  valid_until_ms     bigint check (valid_until_ms % 3600000 = 0),
  unique (currency, sku, price_class, valid_from_ms)
);
comment on table price_lines is 'Immutable. An open line ends where the next of its series begins.';

-- Who may do what. Neither role owns anything.
grant select on hubs, hub_partitions, sources, nodes, coverage, buckets, tallies, allocations,
  allocation_duplicates, quarantine, quarantine_time, tenants, price_lists, price_lines
  to :service_api, :service_writer, :service_reader;
grant insert, update on hubs, sources, nodes, coverage, buckets, tallies, allocations,
  allocation_duplicates, quarantine, quarantine_time
  to :service_api, :service_writer;
grant delete on coverage, quarantine_time to :service_api, :service_writer;
grant insert, update on hub_partitions, tenants to :service_writer;
grant insert on price_lists, price_lines to :service_api;

-- A tenant's key sees the rows of its tenant; keys of other roles see all ('*').
alter table coverage enable row level security;
alter table coverage force row level security;
create policy coverage_api on coverage to :service_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy coverage_writer on coverage to :service_writer using (true) with check (true);
create policy coverage_reader on coverage for select to :service_reader using (true);

alter table buckets enable row level security;
alter table buckets force row level security;
create policy buckets_api on buckets to :service_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy buckets_writer on buckets to :service_writer using (true) with check (true);
create policy buckets_reader on buckets for select to :service_reader using (true);

alter table allocations enable row level security;
alter table allocations force row level security;
create policy allocations_api on allocations to :service_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy allocations_writer on allocations to :service_writer using (true) with check (true);
create policy allocations_reader on allocations for select to :service_reader using (true);

alter table allocation_duplicates enable row level security;
alter table allocation_duplicates force row level security;
create policy allocation_duplicates_api on allocation_duplicates to :service_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy allocation_duplicates_writer on allocation_duplicates to :service_writer
  using (true) with check (true);
create policy allocation_duplicates_reader on allocation_duplicates
  for select to :service_reader using (true);

alter table quarantine enable row level security;
alter table quarantine force row level security;
create policy quarantine_api on quarantine to :service_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy quarantine_writer on quarantine to :service_writer using (true) with check (true);
create policy quarantine_reader on quarantine for select to :service_reader using (true);

alter table quarantine_time enable row level security;
alter table quarantine_time force row level security;
create policy quarantine_time_api on quarantine_time to :service_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy quarantine_time_writer on quarantine_time to :service_writer
  using (true) with check (true);
create policy quarantine_time_reader on quarantine_time for select to :service_reader using (true);
