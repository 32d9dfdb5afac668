-- Looks at every bucket once, without keeping anybody out.

alter table buckets validate constraint buckets_gpu_ns_check;
