-- Nobody looks open quarantined time up record by record any more.

drop index quarantine_time_open;
