-- What was achieved with a grant, on record and accepted by another key; and grants that come after
-- another: they are approved only once an outcome of that one is accepted.

-- What names a grant names its tenant with it, so that nothing of another tenant can be meant.
alter table grants
  add column after_grant text,
  add constraint grants_of_one_tenant unique (tenant_id, grant_id),
  add constraint grants_after_another check (after_grant <> grant_id) not valid,
  add constraint grants_after_grant_fkey foreign key (tenant_id, after_grant)
    references grants (tenant_id, grant_id) not valid;
comment on column grants.after_grant is
  'Of this grant an outcome has to be accepted first. Null: it waits for none.';

create table outcomes (
  outcome_id      text        primary key,
  number          bigint      not null unique generated always as identity,
  grant_id        text        not null,
  tenant_id       text        not null,
  kind            text        not null check (length(kind) between 1 and 200),
  evidence_sha256 text        not null check (evidence_sha256 ~ '^[0-9a-f]{64}$'),
  note            text        not null check (length(note) <= 1000),
  state           text        not null check (state in ('submitted', 'accepted')),
  submitted_by    text        not null,
  submitted_at    timestamptz not null default clock_timestamp(),
  accepted_by     text,
  accepted_at     timestamptz,
  constraint outcomes_of_grant foreign key (tenant_id, grant_id)
    references grants (tenant_id, grant_id),
  constraint submitter_is_not_accepter check (accepted_by <> submitted_by),
  constraint accepted_by_somebody check ((state = 'accepted') = (accepted_by is not null)),
  constraint accepted_at_some_time check ((state = 'accepted') = (accepted_at is not null))
);
create index outcomes_by_grant on outcomes (grant_id, number);
-- What the report of costs reads.
create index outcomes_accepted on outcomes (grant_id) where state = 'accepted';
comment on table outcomes is
  'What a tenant achieved with a grant. The evidence is kept elsewhere; here is its digest.';

grant select, insert on outcomes to ledger_api;
grant update (state, accepted_by, accepted_at) on outcomes to ledger_api;
grant select on outcomes to ledger_reader;

alter table outcomes enable row level security;
alter table outcomes force row level security;
create policy outcomes_api on outcomes to ledger_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'))
  with check (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy outcomes_reader on outcomes for select to ledger_reader using (true);
