-- What old code did not write: where a hold was placed, and what an ended one had drawn by then.

update holds h
   set placed_seq = e.seq
  from entries e
 where h.placed_seq is null and e.tenant_id = h.tenant_id and e.kind = 'hold_placed'
   and convert_from(e.detail, 'UTF8')::jsonb ->> 'hold_id' = h.hold_id;

update holds h
   set drawn_micro =
         h.hold_micro - (convert_from(e.detail, 'UTF8')::jsonb ->> 'open_micro')::bigint
  from entries e
 where h.drawn_micro is null and h.ended is not null and e.tenant_id = h.tenant_id
   and e.kind = 'hold_released'
   and convert_from(e.detail, 'UTF8')::jsonb ->> 'hold_id' = h.hold_id;

alter table lots validate constraint lots_granted_micro_check;
alter table lots validate constraint lots_kept_micro_check;
alter table holds alter column placed_seq set not null;
