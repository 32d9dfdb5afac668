-- What a restored metering needs: its own published facts again, and what the ledger has booked.

create table quarantine_decisions (
  hub               text   not null,
  topic             text   not null,
  partition         int    not null,
  record_offset     bigint not null,
  value_sha256      text   not null,
  topic_id          text   not null default '',
  replayed_ms       bigint,
  replayed_because  text,
  dismissed_ms      bigint,
  dismissed_because text,
  dismissed_reason  text,
  primary key (topic, partition, record_offset, value_sha256, topic_id),
  check ((replayed_ms is null) = (replayed_because is null)),
  check ((dismissed_ms is null) = (dismissed_because is null)),
  check (replayed_ms is not null or dismissed_ms is not null)
);
comment on table quarantine_decisions is
  'What operators decided on quarantined records: our copy of metering.decisions.v1.';
comment on column quarantine_decisions.topic_id is
  'The log the record was read from; empty: not known, so any.';

-- A repair states a bucket that is not known here as 0, and must remember at which revision.
alter table buckets drop constraint buckets_gpu_ns_check;
alter table buckets add constraint buckets_gpu_ns_check check (gpu_ns >= 0) not valid;

create table booked_books (
  tenant_id text   primary key,
  seq       bigint not null check (seq > 0)
);
comment on table booked_books is 'Up to which entry of each book booked_buckets was added up.';

create table booked_buckets (
  bucket_id     uuid   primary key,
  tenant_id     text   not null,
  project_id    text   not null,
  allocation_id text   not null,
  hold_id       text,
  hub           text   not null,
  node_id       text   not null,
  sku           text   not null,
  price_class   text   not null,
  price_version text   not null,
  hour_ms       bigint not null,
  revision      bigint not null,
  gpu_ns        bigint not null,
  charge_micro  bigint not null
) with (fillfactor = 80);
comment on table booked_buckets is
  'What the ledger has booked of each bucket: ledger.entries.v1 added up, by `reconcile` alone.';

create table bucket_differences (
  bucket_id    uuid    primary key,
  revision     bigint  not null,
  gpu_ns       bigint  not null,
  charge_micro bigint  not null
);
comment on table bucket_differences is
  'Buckets that looked different in the run of `reconcile` that is going on, and how they stood.';

create table reconcile_runs (
  run_id      bigint generated always as identity primary key,
  finished_at timestamptz not null default clock_timestamp(),
  since_ms    bigint      not null,
  found       bigint      not null check (found >= 0),
  differences bigint      not null check (differences >= 0)
);
comment on column reconcile_runs.differences is 'What was left at the end: after a repair, 0.';

-- The writer takes up what was published; of what is booked, no request ever sees a row.
grant insert on price_lists, price_lines to :service_writer;
grant select, insert, update on quarantine_decisions to :service_api, :service_writer;
grant select, insert, update on booked_books, booked_buckets to :service_writer;
grant select, insert, delete on bucket_differences to :service_writer;
grant select, insert on reconcile_runs to :service_writer;
grant select on quarantine_decisions, booked_books, booked_buckets, bucket_differences,
  reconcile_runs to :service_reader;
