-- What invoicing keeps: entries as the ledger told them, watermarks, closings, and invoices.
-- Facts (entries, tax rows, sellers, invoices, PDFs) can be inserted and nothing else, by anybody.

create function refuse_change() returns trigger language plpgsql as $$
begin
  raise exception '% only grows: % is refused', tg_table_name, tg_op using errcode = 'restrict_violation';
end
$$;

-- Reference ---------------------------------------------------------------------------------------

create table tenants (
  tenant_id text primary key,
  kind      text not null,
  currency  text not null
);
comment on table tenants is 'Our copy of the ledger''s tenants; no names, no personal data.';

create table legal_entities (
  legal_entity_id text primary key check (legal_entity_id ~ '^[A-Za-z0-9._:@+=-]{1,128}$'),
  name            text not null check (length(name) between 1 and 200),
  series          text not null default 'INV' check (series ~ '^[A-Z]{1,8}$'),
  actor           text not null,
  recorded_at     timestamptz not null default clock_timestamp()
);
comment on table legal_entities is 'Who sells. One in this version; the mapping to hubs comes later.';

create table tax_rates (
  tax_version bigint primary key check (tax_version >= 1),
  hub         text   not null,
  authority   text   not null check (authority <> ''),
  tax_bps     int    not null check (tax_bps between 0 and 10000),
  valid_from  date   not null,
  citation    text   not null check (citation <> ''),
  actor       text   not null,
  recorded_at timestamptz not null default clock_timestamp(),
  unique (hub, valid_from)
);
comment on table tax_rates is
  'Dated tax rows, numbered as they are recorded; valid_from is a Karachi date.';

create trigger legal_entities_only_grow before update or delete or truncate on legal_entities
  for each statement execute function refuse_change();
create trigger tax_rates_only_grow before update or delete or truncate on tax_rates
  for each statement execute function refuse_change();

-- What the ledger said ----------------------------------------------------------------------------

create table watermarks (
  partition    int    not null check (partition >= 0),
  hub          text   not null,
  revision     bigint not null,
  watermark_at timestamptz,
  silent       boolean not null,
  quarantined  jsonb  not null,
  behind       jsonb  not null,
  primary key (partition, hub)
);
comment on table watermarks is 'The newest watermark of each hub in each partition of the entries.';

create table books (
  tenant_id      text   primary key,
  contiguous_seq bigint not null check (contiguous_seq >= 0),
  highest_seq    bigint not null check (highest_seq >= contiguous_seq)
);
comment on table books is
  'How far each tenant''s entries are here: without a gap, and at all. They differ while a gap is '
  'being fetched.';

create table entries (
  tenant_id        text   not null,
  seq              bigint not null check (seq >= 1),
  kind             text   not null,
  entry_hash       bytea  not null check (length(entry_hash) = 32),
  period           text   check (period ~ '^\d{4}-(0[1-9]|1[0-2])$'),
  hour_at          timestamptz,
  hub              text,
  sku              text,
  price_class      text,
  used_gpu_ns      bigint,
  funded_micro     bigint,
  receivable_micro bigint,
  unfunded_micro   bigint,
  document_id      text,
  moved_micro      bigint,
  primary key (tenant_id, seq),
  constraint charge_is_whole check (
    (kind = 'charge') = (period is not null)
    and num_nulls(period, hour_at, hub, sku, price_class, used_gpu_ns, funded_micro,
                  receivable_micro, unfunded_micro) in (0, 9)),
  constraint invoiced_is_whole check (
    (kind = 'invoiced') = (document_id is not null)
    and num_nulls(document_id, moved_micro) in (0, 2))
) partition by hash (tenant_id);
comment on table entries is
  'Each entry of each book, as far as bills need it. period is the usage hour''s month (Karachi).';

create table entries_0 partition of entries for values with (modulus 4, remainder 0);
create table entries_1 partition of entries for values with (modulus 4, remainder 1);
create table entries_2 partition of entries for values with (modulus 4, remainder 2);
create table entries_3 partition of entries for values with (modulus 4, remainder 3);

create index entries_of_month on entries (period, tenant_id, seq) where kind = 'charge';
create index entries_invoiced on entries (document_id) where kind = 'invoiced';

create trigger entries_only_grow before update or delete on entries
  for each row execute function refuse_change();
do $$
declare
  part text;
begin
  foreach part in array array['entries', 'entries_0', 'entries_1', 'entries_2', 'entries_3'] loop
    execute format('create trigger %I before truncate on %I for each statement '
      'execute function refuse_change()', part || '_never_truncated', part);
  end loop;
end
$$;

create table month_usage (
  period           text   not null,
  tenant_id        text   not null,
  hub              text   not null,
  sku              text   not null,
  price_class      text   not null,
  first_seq        bigint not null,
  last_seq         bigint not null check (last_seq >= first_seq),
  used_gpu_ns      numeric(38, 0) not null,
  funded_micro     numeric(38, 0) not null,
  receivable_micro numeric(38, 0) not null,
  unfunded_micro   numeric(38, 0) not null,
  primary key (period, tenant_id, hub, sku, price_class)
) with (fillfactor = 50);
comment on table month_usage is
  'What the charges in entries come to per month, book and line: kept in the transaction that keeps '
  'them, so that bills cost what they have lines. Reruns and the reconciliation read the entries.';

-- Closing a month ---------------------------------------------------------------------------------

create table closings (
  period          text primary key check (period ~ '^\d{4}-(0[1-9]|1[0-2])$'),
  legal_entity_id text not null references legal_entities,
  issued_on       date not null,
  override_reason text check (override_reason <> ''),
  overridden      jsonb not null,
  tax_version     bigint not null,
  actor           text not null,
  requested_at    timestamptz not null default clock_timestamp(),
  closed_at       timestamptz
);
comment on table closings is
  'Finance''s command to close a month, and what it overrode. The work that follows is a job that '
  'any process can take up.';

create table bills (
  period          text   not null references closings,
  legal_entity_id text   not null,
  tenant_id       text   not null,
  last_seq        bigint not null check (last_seq >= 1),
  state           text   not null default 'pending'
                  check (state in ('pending', 'computed', 'skipped', 'numbered')),
  draft           jsonb,
  reason          text,
  attempts        int    not null default 0,
  retry_at        timestamptz not null default clock_timestamp(),
  primary key (period, legal_entity_id, tenant_id),
  check (state <> 'computed' or draft is not null)
);
comment on table bills is
  'One bill to make: the entries up to last_seq, the book''s position read once at the close.';

create table invoice_counters (
  legal_entity_id text   not null references legal_entities,
  series          text   not null,
  fiscal_year     text   not null,
  last_position   bigint not null check (last_position >= 1),
  primary key (legal_entity_id, series, fiscal_year)
);
comment on table invoice_counters is
  'The last lock of the numbering transaction. The gap proof is on invoices, not here.';

-- Documents ---------------------------------------------------------------------------------------

create function invoice_adds_up(content jsonb) returns boolean
  language sql immutable parallel safe as $$
  select (content ->> 'net_minor')::numeric = lines.net_minor
     and (content ->> 'tax_minor')::numeric = lines.tax_minor
     and taxes.net_minor = lines.net_minor
     and taxes.tax_minor = lines.tax_minor
     and lines.net_minor * 10000 = lines.net_micro + lines.residue_micro
    from (select sum((line ->> 'net_minor')::numeric)     as net_minor,
                 sum((line ->> 'tax_minor')::numeric)     as tax_minor,
                 sum((line ->> 'net_micro')::numeric)     as net_micro,
                 sum((line ->> 'residue_micro')::numeric) as residue_micro
            from jsonb_array_elements(content -> 'lines') as line) as lines,
         (select sum((tax ->> 'net_minor')::numeric) as net_minor,
                 sum((tax ->> 'tax_minor')::numeric) as tax_minor
            from jsonb_array_elements(content -> 'taxes') as tax) as taxes
$$;

create table invoices (
  invoice_id        text   primary key,
  legal_entity_id   text   not null references legal_entities,
  series            text   not null,
  fiscal_year       text   not null,
  position          bigint not null check (position >= 1),
  previous_position bigint,
  number            text   not null,
  tenant_id         text   not null,
  period            text   not null references closings,
  issued_on         date   not null,
  net_minor         numeric(38, 0) not null,
  tax_minor         numeric(38, 0) not null,
  total_minor       numeric(38, 0) not null,
  tender_minor      numeric(38, 0) not null,
  due_minor         numeric(38, 0) not null,
  residue_micro     numeric(38, 0) not null,
  funded_micro      numeric(38, 0) not null,
  invoiced_micro    numeric(38, 0) not null,
  first_seq         bigint not null,
  last_seq          bigint not null,
  content           jsonb  not null,
  content_sha256    text   not null check (content_sha256 ~ '^[0-9a-f]{64}$'),
  finalised_at      timestamptz not null default clock_timestamp(),
  constraint one_invoice_per_month unique (legal_entity_id, tenant_id, period),
  constraint one_number_each unique (legal_entity_id, number),
  constraint one_place_each unique (legal_entity_id, series, fiscal_year, position),
  constraint no_gap foreign key (legal_entity_id, series, fiscal_year, previous_position)
    references invoices (legal_entity_id, series, fiscal_year, position),
  constraint follows_its_predecessor check (
    (position = 1) = (previous_position is null)
    and coalesce(previous_position = position - 1, true)),
  constraint totals_add_up check (
    total_minor = net_minor + tax_minor and due_minor = total_minor - tender_minor
    and funded_micro >= 0 and tender_minor = div(funded_micro, 10000)
    and net_minor * 10000 = funded_micro + invoiced_micro + residue_micro),
  constraint lines_add_up check (invoice_adds_up(content)),
  constraint says_what_it_is check (
    content ->> 'invoice_id' = invoice_id and content ->> 'number' = number
    and content ->> 'tenant_id' = tenant_id and content ->> 'period' = period
    and (content ->> 'net_minor')::numeric = net_minor
    and (content ->> 'total_minor')::numeric = total_minor
    and (content ->> 'due_minor')::numeric = due_minor)
);
comment on table invoices is
  'Finalised documents: numbered without gaps, hashed, immutable. Each place but the first of its '
  'series refers to the place before it, so a gap cannot be inserted.';
create index invoices_of_month on invoices (period, tenant_id);
create index invoices_of_tenant on invoices (tenant_id, period);

create trigger invoices_only_grow before update or delete or truncate on invoices
  for each statement execute function refuse_change();

create table invoice_pdfs (
  invoice_id text  primary key references invoices,
  tenant_id  text  not null,
  pdf        bytea not null,
  pdf_sha256 text  not null check (pdf_sha256 = encode(sha256(pdf), 'hex'))
);
create trigger invoice_pdfs_only_grow before update or delete or truncate on invoice_pdfs
  for each statement execute function refuse_change();

create table invoice_steps (
  invoice_id text not null references invoices,
  tenant_id  text not null,
  step       text not null check (step in ('pdf', 'ledger')),
  outcome    text,
  done_at    timestamptz,
  reason     text,
  attempts   int  not null default 0,
  retry_at   timestamptz not null default clock_timestamp(),
  primary key (invoice_id, step),
  check ((done_at is null) = (outcome is null))
);
comment on table invoice_steps is
  'What remains to be done for a numbered invoice: written with it, done outside any transaction, '
  'the outcome recorded. outcome: the PDF''s SHA-256, or the ledger''s entry.';
create index invoice_steps_open on invoice_steps (step, retry_at) where done_at is null;

-- Who may what ------------------------------------------------------------------------------------

grant select on tenants, legal_entities, tax_rates, watermarks, books, entries, month_usage,
  closings, bills, invoice_counters, invoices, invoice_pdfs, invoice_steps
  to :service_api, :service_writer, :service_reader;
grant insert on legal_entities, tax_rates, closings, bills to :service_api;
grant insert, update on tenants, watermarks, books, month_usage to :service_writer;
grant insert on entries, invoices, invoice_pdfs to :service_writer;
grant update on closings, bills to :service_writer;
grant insert, update on invoice_counters, invoice_steps to :service_writer;

do $$
declare
  of_tenant text;
begin
  foreach of_tenant in array array['tenants', 'books', 'entries', 'month_usage', 'bills',
                                   'invoices', 'invoice_pdfs', 'invoice_steps']
  loop
    execute format('alter table %I enable row level security', of_tenant);
    execute format('alter table %I force row level security', of_tenant);
    execute format('create policy %I on %I to :service_api '
      'using (current_setting(''app.tenant'', true) in (tenant_id, ''*'')) '
      'with check (current_setting(''app.tenant'', true) = ''*'')', of_tenant || '_api', of_tenant);
    execute format('create policy %I on %I to :service_writer using (true) with check (true)',
      of_tenant || '_writer', of_tenant);
    execute format('create policy %I on %I for select to :service_reader using (true)',
      of_tenant || '_reader', of_tenant);
  end loop;
end
$$;
