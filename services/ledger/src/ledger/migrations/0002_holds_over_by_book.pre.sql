-- Every decision on a book, and every answer about it, asks which of its open holds are over.
create index holds_open_by_book on holds (tenant_id, expires_at) where ended is null;

-- A price of 0 (reserved capacity) makes a hold of 0: it reserves nothing, and is a hold. Not looked
-- at here: nobody could place a hold meanwhile (0005 does).
alter table holds drop constraint holds_hold_micro_check;
alter table holds add constraint holds_hold_micro_check check (hold_micro >= 0) not valid;
