-- Looks at every row once, without keeping anybody out.

alter table grants validate constraint grants_state_check;
alter table grants validate constraint grants_approved_by_check;
alter table grants validate constraint grants_approved_at_check;
alter table grants validate constraint grants_rejected_by_check;
alter table grants validate constraint grants_rejected_at_check;
alter table grants validate constraint grants_reason_check;
alter table programmes validate constraint programmes_theme_check;
