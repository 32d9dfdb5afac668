-- Grants are for some usage only, or for a share of it; what is left of a lot expires; a refund is
-- stated beside a total; holds say what they are for, what they drew, and what they lost.

alter table grants
  add column scope jsonb,
  add column coverage_bps int not null default 10000 check (coverage_bps between 1 and 10000),
  add column tax_effect text not null default 'tender'
    check (tax_effect in ('tender', 'reduces_base'));
alter table grants drop constraint grants_state_check, drop constraint grants_check,
  drop constraint grants_check1;
alter table grants
  add constraint grants_state_check check (state in ('proposed', 'approved', 'revoked', 'reversed')),
  add constraint grants_approved_by_check check ((state = 'proposed') = (approved_by is null)),
  add constraint grants_approved_at_check check ((state = 'proposed') = (approved_at is null));
comment on column grants.scope is
  'What it may be used for: {hubs, skus, projects, price_classes}, a missing member means all.';
comment on column grants.coverage_bps is 'Which part of each bucket it pays, in 1/100 %.';

-- Nothing of a lot is counted twice: what is left, what expired, and the rest is drawn.
alter table lots
  add column scope jsonb,
  add column coverage_bps int not null default 10000 check (coverage_bps between 1 and 10000),
  add column expired_micro bigint not null default 0 check (expired_micro >= 0),
  add column reclaimed_micro bigint not null default 0 check (reclaimed_micro >= 0);
alter table lots drop constraint lots_granted_micro_check;
alter table lots
  add constraint lots_granted_micro_check check (granted_micro >= 0) not valid,
  add constraint lots_kept_micro_check check (remaining_micro + expired_micro <= granted_micro)
    not valid;
comment on column lots.granted_micro is '0 once the grant was reversed.';
-- What the sweep of lots looks for.
create index lots_by_expiry on lots (expires_at, tenant_id, grant_id) where remaining_micro > 0;

alter table books
  add column breakage_micro bigint not null default 0 check (breakage_micro >= 0);

alter table buckets
  add column refunded_micro bigint not null default 0 check (refunded_micro >= 0);

alter table holds
  add column price_class text,
  add column placed_seq bigint,
  add column short_micro bigint not null default 0 check (short_micro >= 0),
  add column drawn_micro bigint check (drawn_micro >= 0);
comment on column holds.drawn_micro is
  'What its runs were charged while it stood. Null until new code has moved it: what it gave up.';
-- A scheduler finds the hold of its job.
create index holds_by_job on holds (job_ref, hold_id);
