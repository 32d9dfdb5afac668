-- A place alone does not say which record it is any more (0009, 0013).

alter table quarantine drop constraint quarantine_topic_partition_record_offset_key;
