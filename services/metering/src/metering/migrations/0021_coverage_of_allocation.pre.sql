-- What a correction names is found by its time, too: an allocation may have years of coverage.

create index coverage_of_allocation_at on coverage (allocation_id, hub, start_ms);
