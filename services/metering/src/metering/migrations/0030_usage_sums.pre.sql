-- Usage is asked for by tenant, hub, SKU, class, project and day: from sums, not from its buckets.
--
-- Whoever writes buckets, old code too, writes down in the same transaction what it changed: a
-- trigger does. Changes are only ever inserted, so that nobody waits for another; the leased task
-- `usage-sums` adds them to the sums of hours and days. So at every instant
-- buckets = usage_hours + usage_changes and usage_days = usage_hours (decision 0021).

alter table buckets add column if not exists refunded_micro bigint not null default 0;
alter table buckets add column if not exists voided_gpu_ns bigint not null default 0;
comment on column buckets.refunded_micro is 'What of the charge is given back; usage stays billed.';
comment on column buckets.voided_gpu_ns is
  'Time reported under the terms of this bucket that corrections took back: it is in no gpu_ns.';

create table usage_changes (
  change         bigint         generated always as identity primary key,
  tenant_id      text           not null,
  project_id     text           not null,
  hub            text           not null,
  sku            text           not null,
  price_class    text           not null,
  hour_ms        bigint         not null,
  gpu_ns         numeric(38, 0) not null,
  charge_micro   bigint         not null,
  refunded_micro bigint         not null,
  voided_gpu_ns  numeric(38, 0) not null
);
comment on table usage_changes is
  'Changes of buckets, added up per statement, that are not yet in usage_hours and usage_days.';

create table usage_hours (
  tenant_id      text           not null,
  hour_ms        bigint         not null check (hour_ms % 3600000 = 0),
  hub            text           not null,
  project_id     text           not null,
  sku            text           not null,
  price_class    text           not null,
  gpu_ns         numeric(38, 0) not null check (gpu_ns >= 0),
  charge_micro   bigint         not null check (charge_micro >= 0),
  refunded_micro bigint         not null check (refunded_micro >= 0),
  voided_gpu_ns  numeric(38, 0) not null check (voided_gpu_ns >= 0),
  primary key (tenant_id, hour_ms, hub, project_id, sku, price_class)
) with (fillfactor = 80);
create index usage_hours_of_all on usage_hours (hour_ms, hub);
comment on table usage_hours is 'Buckets added up over allocations, nodes and rate lines.';

create table usage_days (
  tenant_id      text           not null,
  day_ms         bigint         not null check ((day_ms + 18000000) % 86400000 = 0),
  hub            text           not null,
  project_id     text           not null,
  sku            text           not null,
  price_class    text           not null,
  gpu_ns         numeric(38, 0) not null check (gpu_ns >= 0),
  charge_micro   bigint         not null check (charge_micro >= 0),
  refunded_micro bigint         not null check (refunded_micro >= 0),
  voided_gpu_ns  numeric(38, 0) not null check (voided_gpu_ns >= 0),
  primary key (tenant_id, day_ms, hub, project_id, sku, price_class)
) with (fillfactor = 80);
create index usage_days_of_all on usage_days (day_ms, hub);
comment on table usage_days is
  'Hours added up over days of Asia/Karachi, which begin at 19:00Z: five hours ahead of UTC.';

-- What a statement changed of buckets: new minus old, per terms and hour.
create function note_usage() returns trigger language plpgsql as $$
begin
  if tg_op = 'INSERT' then
    insert into usage_changes (tenant_id, project_id, hub, sku, price_class, hour_ms, gpu_ns,
                               charge_micro, refunded_micro, voided_gpu_ns)
    select tenant_id, project_id, hub, sku, price_class, hour_ms, sum(gpu_ns),
           sum(charge_micro), sum(refunded_micro), sum(voided_gpu_ns)
      from new_buckets
     group by tenant_id, project_id, hub, sku, price_class, hour_ms;
  elsif tg_op = 'DELETE' then
    insert into usage_changes (tenant_id, project_id, hub, sku, price_class, hour_ms, gpu_ns,
                               charge_micro, refunded_micro, voided_gpu_ns)
    select tenant_id, project_id, hub, sku, price_class, hour_ms, -sum(gpu_ns),
           -sum(charge_micro), -sum(refunded_micro), -sum(voided_gpu_ns)
      from old_buckets
     group by tenant_id, project_id, hub, sku, price_class, hour_ms;
  else
    insert into usage_changes (tenant_id, project_id, hub, sku, price_class, hour_ms, gpu_ns,
                               charge_micro, refunded_micro, voided_gpu_ns)
    select tenant_id, project_id, hub, sku, price_class, hour_ms, sum(gpu_ns),
           sum(charge_micro), sum(refunded_micro), sum(voided_gpu_ns)
      from (select tenant_id, project_id, hub, sku, price_class, hour_ms, gpu_ns,
                   charge_micro, refunded_micro, voided_gpu_ns
              from new_buckets
             union all
            select tenant_id, project_id, hub, sku, price_class, hour_ms, -gpu_ns,
                   -charge_micro, -refunded_micro, -voided_gpu_ns
              from old_buckets) changed
     group by tenant_id, project_id, hub, sku, price_class, hour_ms
    having sum(gpu_ns) <> 0 or sum(charge_micro) <> 0
        or sum(refunded_micro) <> 0 or sum(voided_gpu_ns) <> 0;
  end if;
  return null;
end
$$;

grant select on usage_changes, usage_hours, usage_days
  to :service_api, :service_writer, :service_reader;
grant insert on usage_changes to :service_api, :service_writer;
grant delete on usage_changes to :service_writer;
grant insert, update, delete on usage_hours, usage_days to :service_writer;

-- As with buckets; asked once per statement, since a report reads many rows. Forced upon the owner
-- once it has filled them (0031).
alter table usage_changes enable row level security;
create policy usage_changes_api on usage_changes to :service_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy usage_changes_writer on usage_changes to :service_writer
  using (true) with check (true);
create policy usage_changes_reader on usage_changes for select to :service_reader using (true);

alter table usage_hours enable row level security;
create policy usage_hours_api on usage_hours for select to :service_api
  using ((select current_setting('app.tenant', true)) in (tenant_id, '*'));
create policy usage_hours_writer on usage_hours to :service_writer using (true) with check (true);
create policy usage_hours_reader on usage_hours for select to :service_reader using (true);

alter table usage_days enable row level security;
create policy usage_days_api on usage_days for select to :service_api
  using ((select current_setting('app.tenant', true)) in (tenant_id, '*'));
create policy usage_days_writer on usage_days to :service_writer using (true) with check (true);
create policy usage_days_reader on usage_days for select to :service_reader using (true);

-- Row-level security is forced upon the owner of buckets, too: without this it would find none to
-- add up.
create policy buckets_owner on buckets for select to current_user using (true);

create trigger buckets_added after insert on buckets
  referencing new table as new_buckets for each statement execute function note_usage();
create trigger buckets_changed after update on buckets
  referencing old table as old_buckets new table as new_buckets
  for each statement execute function note_usage();
create trigger buckets_removed after delete on buckets
  referencing old table as old_buckets for each statement execute function note_usage();
