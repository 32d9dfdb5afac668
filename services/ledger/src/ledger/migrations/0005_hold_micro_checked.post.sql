-- Looks at every hold once, without keeping anybody out.

alter table holds validate constraint holds_hold_micro_check;
