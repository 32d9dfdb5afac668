-- What old code kept after the table of unpublished watermarks was made leaves too.

insert into unpublished_watermarks (partition, hub, revision, message, xid)
select partition, hub, revision, message, xid from hub_watermarks where message is not null
on conflict do nothing;

alter table hub_watermarks drop column message, drop column xid;
comment on table hub_watermarks is 'The newest watermark of each hub per partition of charges.';
