-- What metering compares with the ledger by itself, every hour: the hours in which something of
-- either side has changed since they were last found to agree (decision 0021).

create table changed_hours (
  hub          text   not null,
  hour_ms      bigint not null,
  marks        bigint not null default 1,
  compared_run bigint not null default 0,
  differences  bigint not null default 0 check (differences >= 0),
  primary key (hub, hour_ms)
) with (fillfactor = 70);
comment on table changed_hours is
  'Hours of usage to compare. One that agrees is forgotten, unless it was marked again meanwhile.';
comment on column changed_hours.differences is 'Buckets that differed when it was last compared.';

-- Everything is compared once.
insert into changed_hours (hub, hour_ms)
select hub, hour_ms from buckets group by hub, hour_ms;

alter table reconcile_runs add column complete_until_ms bigint;
comment on column reconcile_runs.complete_until_ms is
  'Up to when usage was complete as it began: the next month to be complete is compared at once.';

grant select, insert, update, delete on changed_hours to :service_writer;
grant select on changed_hours to :service_reader;
-- What is stated of a hub says what the last run found, whoever looks at the hub: counts only.
grant select on reconcile_runs to :service_api;

create index booked_buckets_of_hour on booked_buckets (hub, hour_ms);
