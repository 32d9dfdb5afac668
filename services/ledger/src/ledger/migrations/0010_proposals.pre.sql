-- What takes two people, whatever it is: proposals of all kinds but grants, which have a table of
-- their own because they live on. The constraint that makes two people of them is the same on both.

-- Numbers proposals of all kinds in one order, so that a list of both tables has one position.
create sequence proposal_numbers;
grant usage on sequence proposal_numbers to ledger_api, ledger_writer;

create table proposals (
  proposal_id  text        primary key,
  number       bigint      not null unique default nextval('proposal_numbers'),
  kind         text        not null check (kind in (
    'budget', 'credit-limit', 'reverse', 'revoke', 'reclaim', 'settle', 'transfer')),
  tenant_id    text        references tenants,
  terms        jsonb       not null check (terms ->> 'kind' = kind),
  amount_micro bigint      check (amount_micro >= 0),
  state        text        not null check (state in ('proposed', 'approved', 'rejected')),
  proposed_by  text        not null,
  proposed_at  timestamptz not null default clock_timestamp(),
  decided_by   text,
  decided_at   timestamptz,
  reason       text,
  entry_ids    text[]      not null default '{}',
  constraint proposer_is_not_approver check (state <> 'approved' or decided_by <> proposed_by),
  constraint decided_by_somebody check ((state = 'proposed') = (decided_by is null)),
  constraint decided_at_some_time check ((state = 'proposed') = (decided_at is null)),
  constraint rejected_for_a_reason check ((state = 'rejected') = (reason is not null)),
  constraint only_approved_is_entered check (state = 'approved' or cardinality(entry_ids) = 0)
);
create index proposals_by_state on proposals (state, number);
create index proposals_of_tenant on proposals (tenant_id, number);
comment on table proposals is
  'What one person proposed and another decided; of no tenant: a programme''s. amount_micro is what '
  'an approver''s own limit was held against.';

grant select, insert on proposals to ledger_api;
grant update (state, decided_by, decided_at, reason, entry_ids) on proposals to ledger_api;
-- `python -m ledger recover` marks as approved what has its entry.
grant select, update (state, decided_by, decided_at, entry_ids) on proposals to ledger_writer;
grant select on proposals to ledger_reader;

alter table proposals enable row level security;
alter table proposals force row level security;
create policy proposals_api on proposals to ledger_api
  using (current_setting('app.tenant', true) in (tenant_id, '*'))
  with check (current_setting('app.tenant', true) in (tenant_id, '*'));
create policy proposals_writer on proposals to ledger_writer using (true) with check (true);
create policy proposals_reader on proposals for select to ledger_reader using (true);

-- Grants can be rejected, and are listed among the proposals.
alter table grants
  add column number      bigint not null default nextval('proposal_numbers'),
  add column rejected_by text,
  add column rejected_at timestamptz,
  add column reason      text,
  add column entry_ids   text[] not null default '{}',
  add constraint grants_number_key unique (number),
  drop constraint grants_state_check,
  drop constraint grants_approved_by_check,
  drop constraint grants_approved_at_check;
alter table grants
  add constraint grants_state_check
    check (state in ('proposed', 'approved', 'rejected', 'revoked', 'reversed')) not valid,
  add constraint grants_approved_by_check
    check ((state in ('proposed', 'rejected')) = (approved_by is null)) not valid,
  add constraint grants_approved_at_check
    check ((state in ('proposed', 'rejected')) = (approved_at is null)) not valid,
  add constraint grants_rejected_by_check
    check ((state = 'rejected') = (rejected_by is not null)) not valid,
  add constraint grants_rejected_at_check
    check ((state = 'rejected') = (rejected_at is not null)) not valid,
  add constraint grants_reason_check
    check ((state = 'rejected') = (reason is not null)) not valid;
create index grants_by_state on grants (state, number);
create index grants_of_tenant_by_number on grants (tenant_id, number);
create index grants_of_programme on grants (programme_id, number);
grant update (rejected_by, rejected_at, reason, entry_ids) on grants to ledger_api;
grant update (entry_ids) on grants to ledger_writer;

-- How much a key may approve. Rows are added and never changed: the newest of a key counts, and what
-- it was allowed at any earlier moment stays known.
create table approval_limits (
  limit_id            bigint      generated always as identity primary key,
  key_id              text        not null references access_keys,
  approve_up_to_micro bigint      check (approve_up_to_micro >= 0),
  set_by              text        not null,
  set_at              timestamptz not null default clock_timestamp()
);
create index approval_limits_of_key on approval_limits (key_id, limit_id);
comment on column approval_limits.approve_up_to_micro is 'Null: no limit of its own.';
grant select, insert on approval_limits to ledger_api;
grant select on approval_limits to ledger_reader;

-- What a programme is for, and until when. Both may be unknown, as of programmes opened before.
alter table programmes add column theme text, add column ends_at timestamptz;
alter table programmes
  add constraint programmes_theme_check check (length(theme) between 1 and 200) not valid;
create index lots_of_programme on lots (programme_id, tenant_id);

comment on column tenants.credit_limit_micro is
  'As registered: where the fold of its book begins. What it is now stands in books. Only what is '
  'receivable counts against it, so only a commercial tenant can have one.';
comment on column programmes.budget_micro is
  'As opened. What was added since, and what is left, stand in its book.';
