-- Adds up the buckets that were there before the trigger of 0030; keeps nobody out meanwhile.
--
-- One statement sees one instant: what a writer has changed since is in its bucket and in
-- usage_changes, or in neither. So buckets minus changes is what stood when the trigger was made,
-- however many write while this runs. Nothing moves changes to the sums yet: new code does.

insert into usage_hours (tenant_id, hour_ms, hub, project_id, sku, price_class, gpu_ns,
                         charge_micro, refunded_micro, voided_gpu_ns)
select tenant_id, hour_ms, hub, project_id, sku, price_class, sum(gpu_ns), sum(charge_micro),
       sum(refunded_micro), sum(voided_gpu_ns)
  from (select tenant_id, hour_ms, hub, project_id, sku, price_class, gpu_ns, charge_micro,
               refunded_micro, voided_gpu_ns
          from buckets
         union all
        select tenant_id, hour_ms, hub, project_id, sku, price_class, -gpu_ns, -charge_micro,
               -refunded_micro, -voided_gpu_ns
          from usage_changes) stood
 group by tenant_id, hour_ms, hub, project_id, sku, price_class
having sum(gpu_ns) <> 0 or sum(charge_micro) <> 0
    or sum(refunded_micro) <> 0 or sum(voided_gpu_ns) <> 0;

insert into usage_days (tenant_id, day_ms, hub, project_id, sku, price_class, gpu_ns,
                        charge_micro, refunded_micro, voided_gpu_ns)
select tenant_id, hour_ms - (hour_ms + 18000000) % 86400000, hub, project_id, sku, price_class,
       sum(gpu_ns), sum(charge_micro), sum(refunded_micro), sum(voided_gpu_ns)
  from usage_hours
 group by 1, 2, 3, 4, 5, 6;

alter table usage_changes force row level security;
alter table usage_hours force row level security;
alter table usage_days force row level security;
