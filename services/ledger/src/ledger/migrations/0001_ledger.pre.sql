-- The ledger's tables. `tenant_id` leads every key; in books, entries and accounts it may also be
-- `/programmes/<id>`, the book of a programme: no tenant's id has a slash.

create function postings_sum(amounts bigint[]) returns numeric
language plpgsql immutable strict parallel safe as $$
declare
  total numeric := 0;
  amount bigint;
begin
  foreach amount in array amounts loop
    total := total + amount;
  end loop;
  return total;
end
$$;

create function refuse_change() returns trigger language plpgsql as $$
begin
  raise exception 'entries are append-only: % refused', tg_op using errcode = 'insufficient_privilege';
end
$$;

create table tenants (
  tenant_id          text        primary key check (tenant_id ~ '^[A-Za-z0-9._:@+=-]{1,128}$'),
  name               text        not null check (length(name) between 1 and 200),
  kind               text        not null
    check (kind in ('commercial', 'startup', 'university', 'programme')),
  currency           text        not null check (currency ~ '^[A-Z]{3}$'),
  credit_limit_micro bigint      not null check (credit_limit_micro >= 0),
  created_at         timestamptz not null default clock_timestamp(),
  check (kind = 'commercial' or credit_limit_micro = 0)
);
comment on column tenants.credit_limit_micro is
  'Only what is receivable counts against it, so only a commercial tenant can have one.';

create table projects (
  tenant_id  text not null references tenants,
  project_id text not null,
  primary key (tenant_id, project_id)
);

create table programmes (
  programme_id text        primary key check (programme_id ~ '^[A-Za-z0-9._:@+=-]{1,128}$'),
  name         text        not null check (length(name) between 1 and 200),
  currency     text        not null,
  budget_micro bigint      not null check (budget_micro >= 0),
  created_at   timestamptz not null default clock_timestamp()
);

create table grants (
  grant_id     text        primary key,
  tenant_id    text        not null references tenants,
  programme_id text        not null references programmes,
  grant_micro  bigint      not null check (grant_micro > 0),
  priority     int         not null,
  effective_at timestamptz not null,
  expires_at   timestamptz,
  state        text        not null check (state in ('proposed', 'approved')),
  proposed_by  text        not null,
  proposed_at  timestamptz not null default clock_timestamp(),
  approved_by  text,
  approved_at  timestamptz,
  constraint maker_is_not_checker check (approved_by <> proposed_by),
  check ((state = 'approved') = (approved_by is not null)),
  check ((state = 'approved') = (approved_at is not null)),
  check (effective_at = date_trunc('hour', effective_at, 'UTC')),
  check (expires_at = date_trunc('hour', expires_at, 'UTC')),
  check (expires_at > effective_at)
);
create index grants_of_tenant on grants (tenant_id, grant_id);

create table books (
  tenant_id          text        primary key,
  kind               text        not null
    check (kind in ('commercial', 'startup', 'university', 'programme', 'fund')),
  currency           text        not null,
  credit_limit_micro bigint      not null check (credit_limit_micro >= 0),
  seq                bigint      not null check (seq >= 0),
  head_hash          bytea       not null check (length(head_hash) = 32),
  recorded_at        timestamptz not null,
  charged_micro      bigint      not null check (charged_micro >= 0),
  funded_micro       bigint      not null check (funded_micro >= 0),
  receivable_micro   bigint      not null,
  invoiced_micro     bigint      not null,
  settled_micro      bigint      not null,
  unfunded_micro     bigint      not null check (unfunded_micro >= 0),
  reserved_micro     bigint      not null check (reserved_micro >= 0),
  check (charged_micro =
         funded_micro + receivable_micro + invoiced_micro + settled_micro + unfunded_micro)
) with (fillfactor = 50);
comment on table books is 'What a book''s entries come to. Rebuilt from entries it must be equal.';

create table lots (
  tenant_id       text        not null references books,
  grant_id        text        not null,
  programme_id    text        not null,
  priority        int         not null,
  effective_at    timestamptz not null,
  expires_at      timestamptz,
  granted_micro   bigint      not null check (granted_micro > 0),
  remaining_micro bigint      not null,
  reserved_micro  bigint      not null,
  primary key (tenant_id, grant_id),
  check (remaining_micro between 0 and granted_micro),
  check (reserved_micro between 0 and remaining_micro),
  check (effective_at = date_trunc('hour', effective_at, 'UTC')),
  check (expires_at = date_trunc('hour', expires_at, 'UTC'))
) with (fillfactor = 50);

create table accounts (
  tenant_id     text   not null references books,
  account       text   not null,
  balance_micro bigint not null,
  primary key (tenant_id, account)
);
comment on table accounts is
  'Balances of accounts that are neither a lot nor a total of the book: funding, invoiced, budget.';

create table holds (
  tenant_id       text        not null references books,
  hold_id         text        not null unique,
  project_id      text        not null,
  job_ref         text        not null,
  allocation_id   text,
  hub             text        not null,
  sku             text        not null,
  hold_micro      bigint      not null check (hold_micro > 0),
  expires_at      timestamptz not null,
  ended           text        check (ended in ('final', 'released', 'expired')),
  places          text[]      not null,
  reserved        bigint[]    not null,
  primary key (tenant_id, hold_id),
  check (cardinality(places) = cardinality(reserved)),
  check (postings_sum(reserved) <= hold_micro),
  check (ended is null or cardinality(places) = 0)
) with (fillfactor = 70);
create index holds_open_by_allocation on holds (tenant_id, hub, allocation_id)
  where ended is null;
create index holds_open_by_expiry on holds (expires_at) where ended is null;

create table buckets (
  tenant_id     text        not null,
  hour_at       timestamptz not null,
  bucket_id     uuid        not null,
  revision      bigint      not null check (revision >= 0),
  gpu_ns        bigint      not null check (gpu_ns >= 0),
  charged_micro bigint      not null check (charged_micro >= 0),
  accounts      text[]      not null,
  draws         bigint[]    not null,
  primary key (tenant_id, hour_at, bucket_id),
  check (cardinality(accounts) = cardinality(draws)),
  check (postings_sum(draws) = charged_micro)
) with (fillfactor = 85);
comment on table buckets is
  'What was booked of each bucket, and who paid, oldest draw first. The hour keeps the key local.';

create table entries (
  xid           xid8        not null default pg_current_xact_id(),
  seq           bigint      not null check (seq >= 1),
  effective_at  timestamptz not null,
  recorded_at   timestamptz not null,
  revision      bigint,
  gpu_ns        bigint,
  bucket_id     uuid,
  trace_id      uuid,
  over_limit    boolean,
  tenant_id     text        not null,
  kind          text        not null,
  hash          bytea       not null check (length(hash) = 32),
  accounts      text[]      not null,
  amounts       bigint[]    not null,
  balances      bigint[]    not null,
  caused_by     text,
  actor         text,
  allocation_id text,
  project_id    text,
  hold_id       text,
  hub           text,
  node_id       text,
  sku           text,
  price_class   text,
  price_version text,
  detail        bytea,
  primary key (tenant_id, seq),
  constraint postings_sum_to_zero check (postings_sum(amounts) = 0),
  constraint postings_are_whole check (
    cardinality(accounts) = cardinality(amounts) and cardinality(amounts) = cardinality(balances)
    and array_position(amounts, null) is null
  ),
  constraint charges_name_their_bucket check ((kind = 'charge') = (bucket_id is not null)),
  constraint others_name_their_cause check ((kind = 'charge') = (caused_by is null))
);
create index entries_by_transaction on entries (xid);
comment on table entries is
  'One row per entry, its postings inside; append-only. Of a charge, cause and actor follow from '
  'its bucket and are not stored; the previous hash is that of the row before. trace_id is '
  'telemetry: no fact, and not part of the hash.';

create trigger entries_are_append_only before update or delete on entries
  for each row execute function refuse_change();
create trigger entries_are_never_truncated before truncate on entries
  for each statement execute function refuse_change();
alter table entries enable always trigger entries_are_append_only;
alter table entries enable always trigger entries_are_never_truncated;

create table hub_watermarks (
  partition    int         not null,
  hub          text        not null,
  revision     bigint      not null,
  watermark_at timestamptz,
  message      bytea       not null,
  xid          xid8        not null default pg_current_xact_id(),
  primary key (partition, hub)
) with (fillfactor = 50);
comment on table hub_watermarks is
  'The newest watermark of each hub per partition of charges; xid places it among the entries.';

create table sequence_windows (
  window_id    bigint      generated always as identity primary key,
  from_xid     xid8        not null,
  until_xid    xid8        not null,
  first_index  bigint      not null check (first_index >= 0),
  entries      bigint      not null check (entries > 0),
  published_at timestamptz,
  check (from_xid < until_xid)
);
create unique index sequence_windows_follow on sequence_windows (from_xid);
create unique index sequence_windows_open on sequence_windows (window_id)
  where published_at is null;
comment on table sequence_windows is
  'The global index: entries whose transaction lies in [from_xid, until_xid), by (tenant_id, seq), '
  'have the indexes from first_index on. Rows stay: they are the index.';

create table price_lines (
  rate_line_id       text        primary key,
  price_version      text        not null,
  currency           text        not null,
  sku                text        not null,
  price_class        text        not null,
  micro_per_gpu_hour bigint      not null check (micro_per_gpu_hour >= 0),
  valid_from         timestamptz not null,
  valid_until        timestamptz
);
create index price_lines_by_sku on price_lines (sku, price_class, currency, valid_from);

create table parked_charges (
  topic     text        not null,
  partition int         not null,
  "offset"  bigint      not null,
  reason    text        not null,
  detail    text        not null,
  message   bytea       not null,
  parked_at timestamptz not null default clock_timestamp(),
  primary key (topic, partition, "offset")
);
comment on table parked_charges is
  'Charges that could not be booked: an unknown tenant, a total beyond 64 bits. Never dropped.';

-- Who may what. Nobody but the owner may change or remove an entry, and triggers refuse the owner.

grant select, insert on entries, projects, tenants, programmes, price_lines, parked_charges
  to ledger_writer;
grant select, insert on entries, projects, tenants, programmes, grants to ledger_api;
grant update (state, approved_by, approved_at) on grants to ledger_api;
grant select, insert, update on books, lots, accounts, holds, hub_watermarks to ledger_writer;
grant select, insert, update on buckets, sequence_windows, price_lines to ledger_writer;
grant select on grants to ledger_writer;
grant select, insert, update on books, lots, accounts, holds to ledger_api;
grant select on buckets, hub_watermarks, price_lines, parked_charges, sequence_windows to ledger_api;
grant select on tenants, projects, programmes, grants, books, lots, accounts, holds, buckets, entries,
  hub_watermarks, sequence_windows, price_lines, parked_charges to ledger_reader;

do $policies$
declare
  name text;
begin
  foreach name in array array[
    'tenants', 'projects', 'grants', 'books', 'lots', 'accounts', 'holds', 'buckets', 'entries'
  ] loop
    execute format('alter table %I enable row level security', name);
    execute format('alter table %I force row level security', name);
    execute format(
      'create policy %I on %I to ledger_api'
      ' using (current_setting(''app.tenant'', true) in (tenant_id, ''*''))'
      ' with check (current_setting(''app.tenant'', true) in (tenant_id, ''*''))',
      name || '_api', name
    );
    execute format(
      'create policy %I on %I to ledger_writer using (true) with check (true)',
      name || '_writer', name
    );
    execute format(
      'create policy %I on %I for select to ledger_reader using (true)', name || '_reader', name
    );
  end loop;
end
$policies$;
