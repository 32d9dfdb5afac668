-- Open quarantined time by billing month, so that telling it does not add every record up.

create function billing_month(instant_ms bigint) returns text
  language sql stable
  return to_char(timestamp '1970-01-01 05:00' + instant_ms * interval '1 millisecond', 'YYYY-MM');
comment on function billing_month is 'yyyy-mm in Asia/Karachi, five hours ahead of UTC.';

create table open_time (
  change         bigint         generated always as identity primary key,
  hub            text           not null,
  tenant_id      text           not null,
  month          text           not null,
  waiting_gpu_ns numeric(38, 0) not null
);
comment on table open_time is
  'Changes that add up to the rows of quarantine_time that are not dismissed. Only ever inserted, so '
  'that nobody waits for another; the leased task puts them together.';

insert into open_time (hub, tenant_id, month, waiting_gpu_ns)
select t.hub, t.tenant_id, billing_month(t.hour_ms), sum(t.waiting_gpu_ns)
  from quarantine_time t
 where not t.dismissed and t.tenant_id is not null
 group by t.hub, t.tenant_id, billing_month(t.hour_ms);

grant select on open_time to :service_api, :service_writer, :service_reader;
grant insert on open_time to :service_api, :service_writer;
grant delete on open_time to :service_writer;

alter table open_time enable row level security;
alter table open_time force row level security;
create policy open_time_api on open_time to :service_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy open_time_writer on open_time to :service_writer using (true) with check (true);
create policy open_time_reader on open_time for select to :service_reader using (true);
