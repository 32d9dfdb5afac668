-- Parked closings that go on, dates of a series that never fall, minor units by currency, and an
-- index for books with a gap. Old code survives all of it: what it inserts is held to the new rules.

-- Minor units -------------------------------------------------------------------------------------

create function micro_per_minor(currency text) returns bigint
  language sql immutable parallel safe as $$
  select case
    when currency in (
      'BIF', 'CLP', 'DJF', 'GNF', 'ISK', 'JPY', 'KMF', 'KRW', 'PYG', 'RWF', 'UGX', 'VND', 'VUV',
      'XAF', 'XOF', 'XPF') then 1000000
    when currency in ('BHD', 'IQD', 'JOD', 'KWD', 'LYD', 'OMR', 'TND') then 1000
    else 10000
  end::bigint
$$;
comment on function micro_per_minor is
  'M: micro per minor unit, 10^(6 - the ISO 4217 exponent); the table is in hisab_contracts, and a '
  'test holds this to it. Codes outside that table are refused before they come here.';

create or replace function invoice_adds_up(content jsonb) returns boolean
  language sql immutable parallel safe as $$
  select (content ->> 'net_minor')::numeric = lines.net_minor
     and (content ->> 'tax_minor')::numeric = lines.tax_minor
     and taxes.net_minor = lines.net_minor
     and taxes.tax_minor = lines.tax_minor
     and lines.net_minor * micro_per_minor(content ->> 'currency')
         = lines.net_micro + lines.residue_micro
    from (select sum((line ->> 'net_minor')::numeric)     as net_minor,
                 sum((line ->> 'tax_minor')::numeric)     as tax_minor,
                 sum((line ->> 'net_micro')::numeric)     as net_micro,
                 sum((line ->> 'residue_micro')::numeric) as residue_micro
            from jsonb_array_elements(content -> 'lines') as line) as lines,
         (select sum((tax ->> 'net_minor')::numeric) as net_minor,
                 sum((tax ->> 'tax_minor')::numeric) as tax_minor
            from jsonb_array_elements(content -> 'taxes') as tax) as taxes
$$;

-- `not valid`: a document that an older release issued in yen or dinar is wrong and stays as it is;
-- it is put right by a credit note, and recomputing it says so.
alter table invoices drop constraint totals_add_up;
alter table invoices add constraint totals_add_up check (
  total_minor = net_minor + tax_minor and due_minor = total_minor - tender_minor
  and funded_micro >= 0
  and tender_minor = div(funded_micro, micro_per_minor(content ->> 'currency'))
  and net_minor * micro_per_minor(content ->> 'currency')
      = funded_micro + invoiced_micro + residue_micro) not valid;

-- Dates of a series -------------------------------------------------------------------------------

create table invoice_series (
  legal_entity_id text   not null references legal_entities,
  series          text   not null,
  last_issued_on  date,
  closings_count  bigint not null default 0 check (closings_count >= 0),
  primary key (legal_entity_id, series)
);
comment on table invoice_series is
  'The last date of each series, over all its fiscal years: its row is locked before numbers are '
  'taken. closings_count: every close writes it, so that of two at once one reads what the other '
  'was given.';

insert into invoice_series (legal_entity_id, series, last_issued_on)
select legal_entity_id, series, max(issued_on) from invoices group by legal_entity_id, series;

create function refuse_earlier_series_date() returns trigger language plpgsql as $$
begin
  if new.last_issued_on is distinct from old.last_issued_on
     and coalesce(new.last_issued_on < old.last_issued_on, old.last_issued_on is not null) then
    raise exception 'the last date of series % falls from % to %', old.series, old.last_issued_on,
      new.last_issued_on using errcode = 'check_violation', constraint = 'dates_never_fall';
  end if;
  return new;
end
$$;
create trigger invoice_series_never_fall before update on invoice_series
  for each row execute function refuse_earlier_series_date();
create trigger invoice_series_only_grow before delete or truncate on invoice_series
  for each statement execute function refuse_change();

create function move_series_date_on() returns trigger language plpgsql as $$
declare
  last_on date;
begin
  insert into invoice_series as s (legal_entity_id, series, last_issued_on)
  values (new.legal_entity_id, new.series, new.issued_on)
  on conflict (legal_entity_id, series) do nothing;
  select last_issued_on into last_on
    from invoice_series
   where legal_entity_id = new.legal_entity_id and series = new.series
     for update;
  if new.issued_on < last_on then
    raise exception 'invoice % of % lies before %, the last date of its series', new.number,
      new.issued_on, last_on using errcode = 'check_violation', constraint = 'dates_never_fall';
  end if;
  if last_on is distinct from new.issued_on then
    update invoice_series set last_issued_on = new.issued_on
     where legal_entity_id = new.legal_entity_id and series = new.series;
  end if;
  return new;
end
$$;
create trigger invoices_move_series_date before insert on invoices
  for each row execute function move_series_date_on();

-- Parked closings ---------------------------------------------------------------------------------

create table closing_resumptions (
  period          text   not null references closings,
  resumption      bigint not null check (resumption >= 1),
  override_reason text   check (override_reason <> ''),
  tax_version     bigint,
  taken_up        jsonb  not null,
  failed          jsonb  not null,
  failed_count    bigint not null check (failed_count >= 0),
  actor           text   not null,
  recorded_at     timestamptz not null default clock_timestamp(),
  primary key (period, resumption)
);
comment on table closing_resumptions is
  'Each time finance asked a parked closing to go on: which tax rows were taken up, or what it goes '
  'on without.';
create trigger closing_resumptions_only_grow before update or delete or truncate
  on closing_resumptions for each statement execute function refuse_change();

alter table bills drop constraint bills_state_check;
alter table bills add constraint bills_state_check
  check (state in ('pending', 'computed', 'skipped', 'numbered', 'set_aside'));
alter table bills
  add column reason_kind text,
  add column reason_hub text,
  add column taken_up_tax_version bigint;
comment on column bills.taken_up_tax_version is
  'The later version of the tax table that counts for hubs without a row at the closing''s.';

alter table invoice_steps add column waived boolean not null default false;
comment on column invoice_steps.waived is
  'By an override the month does not wait for it; it is tried for ever all the same.';

-- Books with a gap --------------------------------------------------------------------------------

create index books_open on books (tenant_id) where contiguous_seq < highest_seq;

-- Who may what ------------------------------------------------------------------------------------

grant select on invoice_series, closing_resumptions
  to :service_api, :service_writer, :service_reader;
grant insert (legal_entity_id, series, closings_count) on invoice_series to :service_api;
grant insert on closing_resumptions to :service_api;
grant update (closings_count) on invoice_series to :service_api;
grant insert, update on invoice_series to :service_writer;
grant update (state, taken_up_tax_version, retry_at) on bills to :service_api;
grant update (waived, retry_at) on invoice_steps to :service_api;
