-- Looks at every bucket once, without keeping anybody out; and 0021 has a better index.

alter table buckets validate constraint buckets_voided_gpu_ns_check;
drop index coverage_of_allocation;
