-- How far what was published is known here, so that a restored database is found before it is
-- served; and watermarks until they are published, so that none is replaced before it can leave.

create table published_positions (
  topic       text   not null,
  partition   int    not null check (partition >= 0),
  next_offset bigint not null check (next_offset >= 0),
  primary key (topic, partition)
) with (fillfactor = 50);
comment on table published_positions is
  'The offset behind the last record of ours that the broker acknowledged, per partition. What lies '
  'behind it was published by a run that was killed, or by a database this one is an older copy of.';

create table unpublished_watermarks (
  partition int    not null,
  hub       text   not null,
  revision  bigint not null,
  message   bytea  not null,
  xid       xid8   not null default pg_current_xact_id(),
  primary key (partition, hub, revision)
) with (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000
);
create index unpublished_watermarks_by_transaction on unpublished_watermarks (xid);
comment on table unpublished_watermarks is
  'Watermarks until one at least as new is published; xid places them among the entries.';

insert into unpublished_watermarks (partition, hub, revision, message, xid)
select partition, hub, revision, message, xid from hub_watermarks;

-- Old code writes the message beside the newest watermark, new code does not.
alter table hub_watermarks alter column message drop not null;

grant select, insert, update on published_positions to ledger_writer;
grant select, insert, delete on unpublished_watermarks to ledger_writer;
grant select on published_positions, unpublished_watermarks to ledger_reader;
-- `python -m ledger recover` takes back grants with the entries that approved them.
grant insert, update (state, approved_by, approved_at) on grants to ledger_writer;

create table recoveries (
  recovery_id  bigint      generated always as identity primary key,
  accepted_by  text        not null check (accepted_by <> ''),
  reason       text        not null check (reason <> ''),
  entries      bigint      not null check (entries >= 0),
  tenants      text[]      not null,
  holds        text[]      not null,
  recovered_at timestamptz not null default clock_timestamp()
);
comment on table recoveries is
  'What was taken back from the topics into a restored database, on whose word.';
grant select, insert on recoveries to ledger_writer;
grant select on recoveries to ledger_reader;
