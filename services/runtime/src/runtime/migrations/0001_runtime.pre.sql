-- Tables of the runtime kit, in every service's database. `:service` is the service's name.

create table consumer_progress (
  topic          text   not null,
  partition      int    not null check (partition >= 0),
  owner_epoch    bigint not null check (owner_epoch >= 1),
  next_offset    bigint not null check (next_offset >= 0),
  attempt_offset bigint not null,
  attempts       int    not null check (attempts >= 0),
  primary key (topic, partition)
) with (fillfactor = 50);
comment on table consumer_progress is
  'Where each partition is read on: advanced only in the transaction that does the work.';

create table consumer_override (
  override_id bigint generated always as identity primary key,
  topic       text        not null,
  partition   int         not null check (partition >= 0),
  next_offset bigint      not null check (next_offset >= 0),
  accepted_by text        not null check (accepted_by <> ''),
  reason      text        not null check (reason <> ''),
  accepted_at timestamptz not null default clock_timestamp(),
  used_at     timestamptz
);
create unique index consumer_override_one_open
  on consumer_override (topic, partition) where used_at is null;
comment on table consumer_override is
  'An operator accepts, on the record, that a partition is read from another offset.';

create table outbox (
  xid            xid8   not null default pg_current_xact_id(),
  outbox_id      bigint generated always as identity,
  topic          text   not null,
  partition      int    check (partition >= 0),
  message_key    bytea,
  message_value  bytea,
  message_headers bytea,
  primary key (topic, outbox_id)
) with (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
  autovacuum_vacuum_cost_delay = 0
);
comment on table outbox is
  'Messages written with the facts; deleted once the broker has acknowledged them. '
  'xid stands before outbox_id so that a transaction has its id before it draws a number.';

create table idempotency (
  scope           text        not null check (scope <> ''),
  idempotency_key text        not null check (length(idempotency_key) between 1 and 255),
  command         text        not null,
  document        bytea       not null,
  status          int         check (status between 200 and 599),
  answer          bytea,
  recorded_at     timestamptz not null default clock_timestamp(),
  primary key (scope, idempotency_key)
);
create index idempotency_refusals on idempotency (recorded_at) where status >= 400;
comment on table idempotency is
  'First answers by key: for ever for what was done, 35 days for a refusal.';
alter table idempotency enable row level security;
alter table idempotency force row level security;
create policy idempotency_api on idempotency to :service_api
  using (current_setting('app.tenant', true) in (scope, '*'))
  with check (current_setting('app.tenant', true) in (scope, '*'));
create policy idempotency_writer on idempotency to :service_writer using (true) with check (true);
create policy idempotency_reader on idempotency for select to :service_reader using (true);

create table access_keys (
  key_id     text    primary key,
  sha256     text    not null unique check (sha256 ~ '^[0-9a-f]{64}$'),
  role       text    not null,
  tenant_id  text,
  hub        text,
  expires_at timestamptz,
  revoked    boolean not null
);
comment on table access_keys is 'API keys by the hash of their secret; never a secret.';

grant select, insert, update on consumer_progress to :service_writer;
grant select, insert, update on consumer_override to :service_writer;
grant select on consumer_progress to :service_api;
grant select, insert, delete on outbox to :service_writer;
grant select, insert on outbox to :service_api;
grant select, insert, update, delete on idempotency to :service_writer;
grant select, insert, update on idempotency to :service_api;
grant select, insert, update on access_keys to :service_writer;
grant select, insert, update on access_keys to :service_api;
grant select on consumer_progress, consumer_override, outbox, idempotency, access_keys
  to :service_reader;
