-- A tenant may be suspended: it gets no new hold, and what it uses is booked all the same.

alter table books add column is_suspended boolean not null default false;
