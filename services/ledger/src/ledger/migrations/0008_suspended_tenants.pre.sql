-- A tenant may be suspended: it gets no new hold, and what it uses is booked all the same.

alter table books add column is_suspended boolean not null default false;

-- Open holds are listed in the order of their ids, and are few among all that ever were.
create index holds_open_by_id on holds (hold_id) where ended is null;
